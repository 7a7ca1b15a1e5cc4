"""The saver compares the state with the line that the leader wrote."""

import numpy as np
import pytest

from moetion_jax import errors, keys, report
from moetion_jax.runtime.worker import finish


def test_the_state_is_the_one_of_the_metrics():
  digests = {
    keys.OperatorId('head'): np.array([1, 2], np.uint32),
    keys.OperatorId('experts', 1): np.array([3, 4], np.uint32),
  }
  recorded = report.combine(digests)
  finish.check_whole(digests, recorded, 7)
  with pytest.raises(errors.StoreError, match='has none for iteration 7'):
    finish.check_whole(digests, '', 7)
  digests[keys.OperatorId('experts', 1)][0] += 1
  with pytest.raises(errors.StoreError, match=f'has {recorded} for iter'):
    finish.check_whole(digests, recorded, 7)
