"""What all planners share."""

from moetion_jax import keys
from moetion_jax.policies import planner as planner_lib


def test_sizes_in_json():
  sizes = planner_lib.StageSizes(
    state_bytes={keys.OperatorId('a', 1): 12, keys.OperatorId('b'): 24},
    compute_bytes={keys.OperatorId('a', 1): 2, keys.OperatorId('b'): 5},
    device={keys.OperatorId('a', 1): 3, keys.OperatorId('b'): None},
  )
  value = sizes.to_json()
  assert value == [['a', 1, 12, 2, 3], ['b', -1, 24, 5, None]]
  assert planner_lib.StageSizes.from_json(value) == sizes
