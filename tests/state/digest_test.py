import itertools
import math
import zlib

import hypothesis
import hypothesis.strategies as st
import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from moetion_jax import keys, report
from moetion_jax.programs import mesh as mesh_lib
from moetion_jax.state import digest
from tests.support import helpers

# LLVM's optimizations are most of the time that these small programs take.
_digest = jax.jit(
  digest.digest_leaves,
  static_argnums=1,
  compiler_options={'xla_backend_optimization_level': 0},
)


def _alone(leaves) -> np.ndarray:
  """u32[2] of one operator."""
  (lanes,) = np.asarray(_digest(leaves, False))
  return lanes


def _flip(leaf: np.ndarray, word: int, bit: int) -> np.ndarray:
  unsigned = np.dtype(f'u{leaf.dtype.itemsize}')
  flat = leaf.reshape(-1).view(unsigned).copy()
  flat[word] ^= unsigned.type(1 << bit)
  return flat.view(leaf.dtype).reshape(leaf.shape)


# ---- the definition ----------------------------------------------------------


def _mixed(x: int) -> int:
  x = (x ^ (x >> 16)) * 0x85EBCA6B & 0xFFFFFFFF
  x = (x ^ (x >> 13)) * 0xC2B2AE35 & 0xFFFFFFFF
  return x ^ (x >> 16)


def _by_definition(leaves: dict[str, np.ndarray]) -> list[int]:
  """The two lanes of one operator, word by word."""
  columns = []
  for _, leaf in sorted(leaves.items()):
    if leaf.dtype == bool:
      leaf = leaf.astype(np.uint8)
    words = leaf.reshape(-1).view(f'u{leaf.dtype.itemsize}').tolist()
    rows = math.gcd(len(words), 32)
    width = len(words) // rows
    for column in range(width):
      folded = 0
      for row in range(rows):
        power = pow(0x9E3779B1, row, 1 << 32)
        word = words[row * width + column]
        folded += (word ^ (word >> 15)) * power
      columns.append(folded & 0xFFFFFFFF)
  columns += [0] * (-len(columns) % 256)
  names = zlib.crc32('\n'.join(sorted(leaves)).encode())
  terms = [
    _mixed((word + position * 0x243F6A89 + names) & 0xFFFFFFFF)
    for position, word in enumerate(columns)
  ]
  weighted = sum(t * (2 * p + 1) for p, t in enumerate(terms))
  return [sum(terms) & 0xFFFFFFFF, weighted & 0xFFFFFFFF]


@pytest.mark.parametrize(
  'shape', [(1,), (31,), (32,), (33,), (7, 9), (64, 6), (8, 16, 5), (4096, 3)]
)
@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_digest_equals_its_definition(shape, dtype):
  leaf = helpers.random_bits(0, shape, dtype)
  assert list(_alone({'w': leaf})) == _by_definition({'w': leaf})


def test_digest_of_leaves_of_all_dtypes_equals_its_definition():
  leaves = {
    dtype: helpers.random_bits(i, shape, dtype)
    for i, (dtype, shape) in enumerate(
      {
        'float32': (5, 7),
        'bfloat16': (4, 8),
        'float16': (6,),
        'int32': (),
        'uint8': (96,),
        'bool': (3, 11),
      }.items()
    )
  }
  assert list(_alone(leaves)) == _by_definition(leaves)


def test_digest_is_of_bits_and_not_of_values():
  zeros = np.zeros(3, np.float32)
  assert list(_alone({'w': zeros})) != list(_alone({'w': -zeros}))
  nan = np.full(3, np.nan, np.float32)
  assert list(_alone({'w': nan})) == list(_alone({'w': nan}))
  assert list(_alone({'w': nan})) != list(_alone({'w': _flip(nan, 1, 0)}))


@pytest.mark.parametrize('dtype', ['float64', 'int64', 'complex64'])
def test_numbers_of_64_bits_are_two_words(dtype):
  leaf = helpers.random_bits(3, (5, 7), dtype)
  with jax.enable_x64(True):
    found = list(_alone({'w': leaf}))
  assert found == _by_definition({'w': leaf.view(np.uint32)})


def test_leaves_without_numbers_have_a_digest():
  leaves = {
    'a': np.zeros((0, 3), np.float32),
    'w': helpers.random_bits(0, (5,)),
  }
  assert list(_alone(leaves)) == _by_definition(leaves)
  nothing = {'a': np.zeros((0,), np.float32)}
  assert list(_alone(nothing)) != list(_alone({'b': nothing['a']}))


def test_a_group_without_leaves_is_refused():
  with pytest.raises(ValueError, match='without leaves'):
    digest.digest_leaves({}, False)


# ---- what changes it ---------------------------------------------------------


@pytest.mark.parametrize(
  ('shape', 'dtype'),
  [((3, 5), 'float32'), ((32,), 'float32'), ((64,), 'bfloat16'), ((), 'int32')],
)
def test_every_bit_of_a_leaf_changes_both_lanes(shape, dtype):
  leaf = helpers.random_bits(0, shape, dtype)
  words, bits = max(1, leaf.size), 8 * leaf.dtype.itemsize
  variants = np.stack(
    [leaf] + [_flip(leaf, w, b) for w in range(words) for b in range(bits)]
  )
  lanes = np.asarray(_digest({'w': variants}, True))
  assert lanes.shape == (1 + words * bits, 2)
  assert np.all(lanes[1:] != lanes[0])


_OPERATOR = {
  'master/w': helpers.random_bits(0, (48, 40)),
  'master/norm': helpers.random_bits(1, (37,)),
  'optimizer/mu': helpers.random_bits(2, (48, 40), 'bfloat16'),
  'optimizer/count': np.int32(12),
}


@hypothesis.settings(deadline=None, max_examples=100)
@hypothesis.given(st.data())
def test_any_bit_of_an_operator_changes_both_lanes(draw):
  name = draw.draw(st.sampled_from(sorted(_OPERATOR)))
  leaf = np.asarray(_OPERATOR[name])
  word = draw.draw(st.integers(0, leaf.size - 1))
  bit = draw.draw(st.integers(0, 8 * leaf.dtype.itemsize - 1))
  changed = _alone(_OPERATOR | {name: _flip(leaf, word, bit)})
  assert np.all(changed != _alone(_OPERATOR))


def _swapped(leaf: np.ndarray, a: int, b: int) -> np.ndarray:
  out = leaf.copy()
  out[[a, b]] = out[[b, a]]
  return out


@hypothesis.settings(deadline=None, max_examples=100)
@hypothesis.given(st.data())
def test_swapping_two_words_changes_it(draw):
  words = _OPERATOR['master/w'].reshape(-1)
  a = draw.draw(st.integers(0, words.size - 1))
  b = draw.draw(st.integers(0, words.size - 1))
  hypothesis.assume(words[a].tobytes() != words[b].tobytes())
  changed = _swapped(words, a, b).reshape(48, 40)
  assert np.any(_alone(_OPERATOR | {'master/w': changed}) != _alone(_OPERATOR))


def _unseen(before: list[np.ndarray], after: list[np.ndarray]) -> str:
  """How many changes of a leaf of 64 words leave its digest as it was."""
  ours = np.asarray(_digest({'w': np.stack(before)}, True))
  theirs = np.asarray(_digest({'w': np.stack(after)}, True))
  unseen = int(np.sum(np.all(ours == theirs, axis=1)))
  return f'{unseen} of {len(before)}' if unseen else ''


_PAIRS = list(itertools.combinations(range(64), 2))


# What optimizers and faults write is no random word: numbers differ in a sign,
# an exponent, a few high bits.
@pytest.mark.parametrize(
  ('first', 'second'), [(1.0, -1.0), (1.0, 2.0), (1.0, 4.0), (0.0, -0.0)]
)
def test_swapping_two_numbers_changes_it_wherever_they_stand(first, second):
  before, after = [], []
  for a, b in _PAIRS:
    leaf = np.full(64, 3.0, np.float32)
    leaf[[a, b]] = first, second
    before.append(leaf)
    after.append(_swapped(leaf, a, b))
  unseen = _unseen(before, after)
  assert not unseen


@pytest.mark.parametrize('shape', [(64,), (48, 40), (33,)])
def test_changing_the_sign_of_every_number_changes_it(shape):
  leaf = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
  assert np.any(_alone({'w': leaf}) != _alone({'w': -leaf}))


def test_changing_the_sign_of_two_numbers_changes_it_wherever_they_stand():
  leaf = np.random.default_rng(0).standard_normal(64).astype(np.float32)
  after = [_flip(_flip(leaf, a, 31), b, 31) for a, b in _PAIRS]
  unseen = _unseen([leaf] * len(after), after)
  assert not unseen


@pytest.mark.parametrize('distance', [1, 2, 16, 32])
def test_flipping_one_bit_of_two_words_changes_it(distance):
  leaf = helpers.random_bits(0, (64,))
  after = [
    _flip(_flip(leaf, word, bit), word + distance, bit)
    for word in range(64 - distance)
    for bit in range(32)
  ]
  unseen = _unseen([leaf] * len(after), after)
  assert not unseen


@pytest.mark.parametrize('shape', [(48, 40), (33, 7), (5, 3)])
def test_swapping_two_rows_or_columns_changes_it(shape):
  leaf = helpers.random_bits(0, shape)
  for a, b in ((0, 1), (0, shape[0] - 1), (1, 3)):
    assert np.any(_alone({'w': leaf}) != _alone({'w': _swapped(leaf, a, b)}))
  turned = np.ascontiguousarray(_swapped(leaf.T, 0, 2).T)
  assert np.any(_alone({'w': leaf}) != _alone({'w': turned}))


def test_swapping_two_leaves_changes_it():
  ours = {
    'a': helpers.random_bits(0, (6, 4)),
    'b': helpers.random_bits(1, (6, 4)),
  }
  swapped = {'a': ours['b'], 'b': ours['a']}
  assert np.any(_alone(ours) != _alone(swapped))
  # Even where the words are the same and only the name is another.
  assert np.any(_alone({'a': ours['a']}) != _alone({'b': ours['a']}))


def test_a_leaf_of_zeros_counts():
  ours = {'a': helpers.random_bits(0, (6, 4))}
  zeros = np.zeros(8, np.float32)
  assert np.any(_alone(ours) != _alone(ours | {'b': zeros}))


# ---- what does not -----------------------------------------------------------


def _stacked(experts: int) -> dict[str, np.ndarray]:
  return {
    'master/w': helpers.random_bits(0, (experts, 16, 20)),
    'master/norm': helpers.random_bits(1, (experts, 37)),
    'optimizer/mu': helpers.random_bits(2, (experts, 9, 5), 'bfloat16'),
    'optimizer/count': helpers.random_bits(3, (experts,), 'int32'),
  }


def test_digest_does_not_depend_on_the_order_of_leaves():
  leaves = _stacked(4)
  backwards = dict(reversed(leaves.items()))
  np.testing.assert_array_equal(_digest(leaves, True), _digest(backwards, True))


def test_an_expert_in_a_stack_has_the_digest_it_has_alone():
  leaves = _stacked(8)
  together = np.asarray(_digest(leaves, True))
  assert together.shape == (8, 2)
  assert together.dtype == np.uint32
  for e in range(8):
    own = {n: leaf[e : e + 1] for n, leaf in leaves.items()}
    np.testing.assert_array_equal(_digest(own, True), together[e : e + 1])
    unstacked = {n: leaf[e] for n, leaf in leaves.items()}
    np.testing.assert_array_equal(_digest(unstacked, False)[0], together[e])


def test_swapping_two_experts_swaps_their_digests():
  leaves = _stacked(4)
  order = [0, 3, 2, 1]
  swapped = {n: leaf[order] for n, leaf in leaves.items()}
  lanes = np.asarray(_digest(leaves, True))
  np.testing.assert_array_equal(_digest(swapped, True), lanes[order])

  def whole(lanes):
    return report.combine(
      {keys.OperatorId('x', e): row for e, row in enumerate(lanes)}
    )

  assert whole(lanes) != whole(lanes[order])


@pytest.mark.parametrize('devices', [1, 2, 4])
def test_digest_does_not_depend_on_sharding(devices):
  leaves = _stacked(8)
  mesh = mesh_lib.make_mesh(jax.devices()[:devices])
  spec = PartitionSpec('expert')
  placed = jax.device_put(leaves, NamedSharding(mesh, spec))
  local = jax.shard_map(
    lambda x: digest.digest_leaves(x, True),
    mesh=mesh,
    in_specs=spec,
    out_specs=spec,
    check_vma=False,
  )
  expected = _digest(leaves, True)
  np.testing.assert_array_equal(_digest(placed, True), expected)
  np.testing.assert_array_equal(jax.jit(local)(placed), expected)


# ---- a whole state -----------------------------------------------------------


def _lanes(*lanes: int) -> np.ndarray:
  return np.array(lanes, np.uint32)


_DIGESTS = {
  keys.OperatorId('layers/0/experts', e): _lanes(e * 77 + 5, e * 31 + 9)
  for e in range(6)
} | {keys.OperatorId('head'): _lanes(5, 9)}


@hypothesis.settings(deadline=None, max_examples=50)
@hypothesis.given(st.permutations(sorted(_DIGESTS)))
def test_the_digest_of_a_state_does_not_depend_on_order(operators):
  shuffled = {o: _DIGESTS[o] for o in operators}
  assert report.combine(shuffled) == report.combine(_DIGESTS)


def test_the_digest_of_a_state_depends_on_which_operator_has_which():
  head, first = keys.OperatorId('head'), keys.OperatorId('layers/0/experts', 1)
  swapped = _DIGESTS | {head: _DIGESTS[first], first: _DIGESTS[head]}
  assert report.combine(swapped) != report.combine(_DIGESTS)
  fewer = {o: d for o, d in _DIGESTS.items() if o != head}
  assert report.combine(fewer) != report.combine(_DIGESTS)


def test_the_digest_of_a_state_is_16_hex_digits():
  text = report.combine(_DIGESTS)
  assert len(text) == 16
  assert int(text, 16) >= 0
  assert report.combine({}) == 16 * '0'


@hypothesis.settings(deadline=None, max_examples=100)
@hypothesis.given(st.sampled_from(sorted(_DIGESTS)), st.integers(0, 63))
def test_any_bit_of_a_digest_changes_that_of_the_state(operator, bit):
  changed = _flip(_DIGESTS[operator], bit // 32, bit % 32)
  ours = report.combine(_DIGESTS)
  theirs = report.combine(_DIGESTS | {operator: changed})
  lane = slice(0, 8) if bit < 32 else slice(8, 16)
  assert ours[lane] != theirs[lane]
