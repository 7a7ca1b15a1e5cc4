"""Blocks of a snapshot: their names, and the leaves that packed rows are of."""

import hypothesis
import hypothesis.strategies as st
import ml_dtypes
import numpy as np
import pytest

from moetion_jax import errors, keys
from moetion_jax.snapshots import blocks
from moetion_jax.state import layout, model, partition


def _of(group, *experts):
  return tuple(keys.OperatorId(group, e) for e in experts or (-1,))


@pytest.mark.parametrize(
  ('block', 'name'),
  [
    (blocks.Block('state', _of('head'), 'head/w'), 'state|head||head/w'),
    (
      blocks.Block('compute', _of('a/b', 3), '*uint16'),
      'compute|a/b|3|*uint16',
    ),
    (blocks.Block('state', _of('x', 0, 1, 2, 7), 'w'), 'state|x|0-2,7|w'),
    (blocks.Block('state', _of('x', 7, 1, 2), 'a|b'), 'state|x|7,1-2|a|b'),
  ],
)
def test_names(block, name):
  assert block.name == name
  assert blocks.parse(name) == block


@hypothesis.given(st.lists(st.integers(0, 300), min_size=1, max_size=20))
def test_a_name_says_its_operators_in_order(experts):
  block = blocks.Block('state', _of('g', *experts), 'w')
  assert blocks.parse(block.name) == block


@pytest.mark.parametrize('name', ['digests', 'shared|count', 'partials', ''])
def test_other_buffers(name):
  assert blocks.parse(name) is None


@pytest.mark.parametrize(
  'name', ['state', 'state|a', 'state|a|x|w', 'compute|a|1-|w', 'state|a|,|w']
)
def test_what_begins_as_a_block(name):
  with pytest.raises(errors.StoreError, match='does not name operators'):
    blocks.parse(name)


def test_a_group_that_no_name_can_have():
  with pytest.raises(ValueError, match=r"'a\|b': its name may not have '\|'"):
    blocks.check_group('a|b')


# Every size of number, twice, and those that are packed as they are.
_DTYPES = {
  'a': np.float32,
  'b': np.int32,
  'c': ml_dtypes.bfloat16,
  'd': np.bool_,
  'e': np.float16,
  'f': np.complex64,
  'g': ml_dtypes.float8_e4m3fn,
  'h': np.int8,
}
_WIDTHS = {n: 1 + i % 3 for i, n in enumerate(_DTYPES)}


def _layout(stacked):
  rows = (4,) if stacked else ()
  tree = {n: np.zeros((*rows, _WIDTHS[n], 2), d) for n, d in _DTYPES.items()}
  group = model.Group('x', stacked)
  return layout.Layout(
    partition=partition.Partition(tree, lambda path: group),
    compute={},
    compute_dtypes={},
  )


@pytest.mark.parametrize('stacked', [False, True])
def test_packed_rows_are_taken_apart(stacked):
  of = _layout(stacked)
  leaves = blocks.leaves_of(of, 'state', 'x')
  columns = [blocks.packed_column(dtype) for _, dtype in leaves]
  columns = tuple(dict.fromkeys(columns))
  assert columns == ('*uint32', '*uint16', '*bool', '*complex64', '*uint8')
  picked = _of('x', 1, 3) if stacked else _of('x')
  random = np.random.default_rng(0)
  expected = {  # any bits, NaNs among them
    leaf.path: random.integers(
      0,
      2 if dtype.kind == 'b' else 256,
      (len(picked), _WIDTHS[leaf.path], 2) + (dtype.itemsize,),
      np.uint8,
    ).view(dtype)[..., 0]
    for leaf, dtype in leaves
  }
  found = {}
  for column in columns:
    packed = np.dtype(column[1:])
    array = np.concatenate(
      [
        value.reshape(len(picked), -1).view(packed)
        for path, value in expected.items()
        if blocks.packed_dtype(value.dtype) == packed
      ],
      axis=1,
    )
    found |= blocks.rows_by_leaf(
      of, blocks.Block('state', picked, column), array
    )
  assert found.keys() == expected.keys()
  for path, value in expected.items():
    assert found[path].dtype == value.dtype
    assert found[path].shape == value.shape
    assert found[path].tobytes() == value.tobytes()
    assert all(row.flags.c_contiguous for row in found[path])


def test_columns_by_leaf():
  leaves = blocks.leaves_of(_layout(True), 'state', 'x')
  assert blocks.columns(leaves) == tuple(_DTYPES)
  assert not blocks.leaves_of(_layout(True), 'compute', 'x')


@pytest.mark.parametrize(
  ('block', 'array', 'words'),
  [
    (
      blocks.Block('state', _of('y', 0), 'a'),
      np.zeros((1, 1, 2)),
      'y.0.a is not in',
    ),
    (
      blocks.Block('state', _of('x', 0), 'z'),
      np.zeros((1, 1, 2)),
      'x.0.z is not in',
    ),
    (
      blocks.Block('state', _of('x', 0), 'a'),
      np.zeros((2, 1, 2), np.float32),
      r'is float32\(2, 1, 2\), not float32\(1, 1, 2\)',
    ),
    (
      blocks.Block('state', _of('x', 0), '*uint32'),
      np.zeros((1, 5), np.uint32),
      r'is uint32\(1, 5\), not uint32\(1, 6\)',
    ),
    (
      blocks.Block('state', _of('x', 0), '*uint32'),
      np.zeros((1, 6), np.float32),
      r'is float32\(1, 6\), not uint32\(1, 6\)',
    ),
  ],
)
def test_an_array_that_is_not_its_blocks(block, array, words):
  with pytest.raises(errors.StoreError, match=words):
    blocks.rows_by_leaf(_layout(True), block, array)
