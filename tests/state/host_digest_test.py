"""The digests of the host are those of the device, bit for bit."""

import jax
import numpy as np
import pytest

from moetion_jax import keys
from moetion_jax.state import digest, host_digest
from tests.support import helpers

# LLVM's optimizations are most of the time that these small programs take.
_on_device = jax.jit(
  digest.digest_leaves,
  static_argnums=1,
  compiler_options={'xla_backend_optimization_level': 0},
)
_DTYPES = (
  *('bool', 'int8', 'uint8', 'int16', 'float16', 'bfloat16', 'int32', 'uint32'),
  *('float32', 'int64', 'float64', 'complex64', 'complex128'),
  *('float8_e4m3fn', 'float8_e5m2'),
)


@pytest.mark.parametrize('stacked', [False, True])
def test_leaves_of_all_dtypes_and_shapes(stacked):
  shapes = [(5, 7, 9), (5, 64), (5, 4096), (5,), (5, 31), (5, 0), (5, 1, 32)]
  leaves = {
    f'{dtype}/{i}': helpers.random_bits(i, shape, dtype)
    for dtype in _DTYPES
    for i, shape in enumerate(shapes)
  }
  if not stacked:
    leaves['scalar'] = helpers.random_bits(8, (), 'int32')
  with jax.enable_x64(True):
    expected = np.asarray(_on_device(leaves, stacked))
  found = host_digest.digest_leaves(leaves, stacked)
  assert found.dtype == np.uint32 and found.shape == (5 if stacked else 1, 2)
  np.testing.assert_array_equal(found, expected)


def test_large_leaves_and_views():
  """Several columns of 256, and rows that do not lie together in memory."""
  whole = helpers.random_bits(1, (6, 40000), 'float32')
  leaves = {'w': whole[::2], 'v': whole[:3, ::7]}
  assert not leaves['w'].flags.c_contiguous
  np.testing.assert_array_equal(
    host_digest.digest_leaves(leaves, True),
    np.asarray(_on_device(leaves, True)),
  )


def test_leaves_without_numbers():
  for leaves in (
    {'a': np.zeros((0, 3), np.float32)},
    {'a': np.zeros(0, bool), 'b': helpers.random_bits(0, (3,), 'float32')},
  ):
    np.testing.assert_array_equal(
      host_digest.digest_leaves(leaves, False),
      np.asarray(_on_device(leaves, False)),
    )
  with pytest.raises(ValueError, match='without leaves'):
    host_digest.digest_leaves({}, False)


def test_a_state_and_where_two_differ():
  state = {
    'experts': {'w': helpers.random_bits(0, (3, 8), 'float32')},
    'head': {
      'w': helpers.random_bits(1, (4,), 'float32'),
      'count': np.int32(3),
    },
  }
  state['head']['count'] = np.asarray(state['head']['count'])
  found = host_digest.digest_state(state, {'experts'})
  experts = [keys.OperatorId('experts', e) for e in range(3)]
  head = keys.OperatorId('head')
  assert list(found) == [*experts, head]
  assert host_digest.stacked_groups(found) == {'experts'}
  assert host_digest.differences(found, found) == []
  other = {o: d.copy() for o, d in found.items()}
  other[experts[1]][1] ^= 1
  del other[head]
  other[keys.OperatorId('tail')] = found[head]
  wrong = [experts[1], head, keys.OperatorId('tail')]
  assert host_digest.differences(found, other) == wrong
  assert host_digest.differences(other, found) == wrong
