"""A state is split into operators, and merged again."""

import hypothesis
import hypothesis.strategies as st
import jax
import numpy as np
import pytest
from jax import numpy as jnp

from models import stages
from moetion_jax import keys as keys_lib
from moetion_jax.state import model as model_lib, partition as partition_lib
from tests.support import helpers

_DTYPES = ('float32', 'bfloat16', 'float16', 'int32', 'uint8', 'bool')
_GROUPS = (
  model_lib.Group('body', False),
  model_lib.Group('body/experts', True),
  model_lib.Group('head', False),
  model_lib.Group('tail/experts', True),
)


def _random(rng, shape, dtype) -> np.ndarray:
  """Any bits, NaNs and infinities included."""
  dtype = jnp.dtype(dtype)
  if dtype.kind == 'b':
    return rng.integers(0, 2, shape).astype(bool)
  count = int(np.prod(shape, dtype=int)) * dtype.itemsize
  return np.frombuffer(rng.bytes(count), dtype).reshape(shape)


@st.composite
def _trees(draw):
  """A tree of random arrays and a rule for it."""
  counts = {g: draw(st.integers(1, 12)) for g in _GROUPS}
  rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
  leaf = st.tuples(
    st.sampled_from(_GROUPS),
    st.lists(st.integers(1, 3), max_size=3),
    st.sampled_from(_DTYPES),
  )
  keys = st.sampled_from(['a', 'b', 'c', '0', 'w_up'])
  plan = draw(
    st.recursive(
      leaf.map(lambda x: ('leaf', x)),
      lambda node: st.one_of(
        st.lists(node, min_size=1, max_size=3).map(lambda x: ('tuple', x)),
        st.lists(node, min_size=1, max_size=3).map(lambda x: ('list', x)),
        st.dictionaries(keys, node, min_size=1).map(lambda x: ('dict', x)),
      ),
      max_leaves=8,
    )
  )
  rule = {}

  def make(path, node):
    kind, content = node
    if kind == 'dict':
      return {k: make((*path, k), v) for k, v in content.items()}
    if kind != 'leaf':
      children = [make((*path, str(i)), v) for i, v in enumerate(content)]
      return tuple(children) if kind == 'tuple' else children
    group, shape, dtype = content
    rule['/'.join(path)] = group
    stack = (counts[group],) if group.stacked else ()
    return _random(rng, (*stack, *shape), dtype)

  return make((), plan), rule.__getitem__


@hypothesis.settings(deadline=None, max_examples=150)
@hypothesis.given(_trees())
def test_merge_is_the_inverse_of_split(case):
  tree, rule = case
  partition = partition_lib.Partition(tree, rule)
  parts = partition.split(tree)
  merged = partition.merge(parts)
  assert jax.tree.structure(merged) == jax.tree.structure(tree)
  assert helpers.bits_of(merged) == helpers.bits_of(tree)


@hypothesis.settings(deadline=None, max_examples=100)
@hypothesis.given(_trees())
def test_split_gives_every_byte_to_one_operator(case):
  tree, rule = case
  partition = partition_lib.Partition(tree, rule)
  parts = partition.split(tree)
  assert tuple(parts) == partition.operators == tuple(sorted(parts))
  total = sum(leaf.nbytes for leaf in jax.tree.leaves(tree))
  assert sum(partition.operator_bytes.values()) == total
  for operator, leaves in parts.items():
    own = sum(leaf.nbytes for leaf in leaves.values())
    assert partition.operator_bytes[operator] == own
    for path in leaves:
      assert rule(path) == (operator.group, operator.expert >= 0)


def test_partition_reads_shapes_only():
  tree, rule = _example()
  shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), tree)
  from_shapes = partition_lib.Partition(shapes, rule)
  from_arrays = partition_lib.Partition(tree, rule)
  assert from_shapes.leaves == from_arrays.leaves
  assert from_shapes.operator_bytes == from_arrays.operator_bytes
  merged = from_shapes.merge(from_arrays.split(tree))
  assert helpers.bits_of(merged) == helpers.bits_of(tree)


def _example():
  """Two experts of 10 bytes and a body of 12."""
  tree = {
    'experts': (
      np.arange(4, dtype=np.float32).reshape(2, 2),
      np.ones((2, 1), np.int8),
    ),
    'step': np.int32(7),
    'norm': np.ones(2, np.float32),
  }
  tree['experts'] += (np.zeros(2, np.int8),)

  def rule(path):
    return model_lib.Group(
      *(('x', True) if path.startswith('experts') else ('body', False))
    )

  return tree, rule


def test_split_by_hand():
  tree, rule = _example()
  partition = partition_lib.Partition(tree, rule)
  body, first, second = partition.operators
  assert (body, first, second) == (
    keys_lib.OperatorId('body'),
    keys_lib.OperatorId('x', 0),
    keys_lib.OperatorId('x', 1),
  )
  assert partition.operator_bytes == {body: 12, first: 10, second: 10}
  assert partition.operators_of('x') == (first, second)
  parts = partition.split(tree)
  assert {k: set(v) for k, v in parts.items()} == {
    body: {'step', 'norm'},
    first: {'experts/0', 'experts/1', 'experts/2'},
    second: {'experts/0', 'experts/1', 'experts/2'},
  }
  np.testing.assert_array_equal(parts[second]['experts/0'], [2, 3])


def test_experts_are_ordered_by_number():
  tree = {'w': np.zeros((12, 1))}
  partition = partition_lib.Partition(
    tree, lambda _: model_lib.Group('x', True)
  )
  assert [o.expert for o in partition.operators] == list(range(12))


def test_rows_of_groups_are_named_in_operator_order():
  tree, rule = _example()
  partition = partition_lib.Partition(tree, rule)
  rows = np.array([[1, 2], [3, 4], [5, 6]])
  named = partition.by_operator(rows)
  assert {str(o): list(row) for o, row in named.items()} == {
    'body': [1, 2],
    'x/0': [3, 4],
    'x/1': [5, 6],
  }
  with pytest.raises(ValueError, match='zip'):
    partition.by_operator(rows[:2])


@pytest.mark.parametrize(
  ('tree', 'message'),
  [
    ({'a': np.ones((2, 1)), 'b': np.ones((3, 1))}, 'b stacks 3'),
    ({'a': np.ones(())}, 'a is a scalar'),
    ({'a': np.ones((1, 1)), 'whole': np.ones(1)}, 'both stacked and not'),
    ({'a': np.ones((2, 1)), 'whole': np.ones(1)}, 'whole'),
  ],
)
def test_a_partition_that_cannot_be_is_refused(tree, message):
  def rule(path):
    return model_lib.Group('x', path != 'whole')

  with pytest.raises(ValueError, match=message):
    partition_lib.Partition(tree, rule)


def test_leaves_of_one_path_are_refused():
  # Joined with '/', the two paths are the same: one leaf would be lost.
  tree = {'a': {'b': np.zeros(1)}, 'a/b': np.ones(1)}
  with pytest.raises(ValueError, match='a/b'):
    partition_lib.Partition(tree, lambda _: model_lib.Group('x', False))


def test_a_tree_of_another_structure_or_shape_is_refused():
  tree, rule = _example()
  partition = partition_lib.Partition(tree, rule)
  with pytest.raises(ValueError, match='structure'):
    partition.split(tree | {'more': np.ones(1)})
  with pytest.raises(ValueError, match=r'norm has shape \(3,\)'):
    partition.split(tree | {'norm': np.ones(3, np.float32)})


def test_a_missing_operator_or_leaf_is_refused():
  tree, rule = _example()
  partition = partition_lib.Partition(tree, rule)
  parts = partition.split(tree)
  expert = keys_lib.OperatorId('x', 1)
  with pytest.raises(KeyError):
    partition.merge({o: v for o, v in parts.items() if o != expert})
  lacking = {k: v for k, v in parts[expert].items() if k != 'experts/1'}
  with pytest.raises(KeyError):
    partition.merge(parts | {expert: lacking})


def test_the_rule_of_a_state_takes_the_longest_group_that_fits():
  names = ['layers/1/norm', 'layers/1/experts/w', 'layers/10/norm', 'head/w']
  rule = partition_lib.state_rule(stages.partition, names)
  assert rule('layers/1/master/layers/1/norm').name == 'layers/1'
  assert rule('layers/10/optimizer/0/mu/layers/10/norm').name == 'layers/10'
  experts = rule('layers/1/experts/optimizer/0/count')
  assert experts == ('layers/1/experts', True)
  assert rule('head/master/head/w').name == 'head'


def test_parameters_are_grouped_in_order():
  names = ['head/w', 'layers/0/experts/w_up', 'layers/0/experts/w_down']
  assert list(
    partition_lib.group_parameters(names, stages.partition).items()
  ) == [
    (('head', False), ('head/w',)),
    (
      ('layers/0/experts', True),
      ('layers/0/experts/w_down', 'layers/0/experts/w_up'),
    ),
  ]
