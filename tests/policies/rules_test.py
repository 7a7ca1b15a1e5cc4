"""What each policy promises, by its name."""

import pytest

from moetion_jax import errors
from moetion_jax.policies import rules


def test_what_each_policy_promises():
  assert rules.POLICIES == (
    'sparse',
    'dense',
    'two_phase',
    'partial',
    'none',
  )
  found = {name: rules.of_name(name) for name in rules.POLICIES}
  assert [n for n, p in found.items() if p.is_local] == ['sparse']
  assert [n for n, p in found.items() if not p.is_exact] == ['partial']
  assert [n for n, p in found.items() if p.is_whole] == ['dense', 'two_phase']
  assert [n for n, p in found.items() if p.is_durable] == ['two_phase']
  assert [n for n, p in found.items() if not p.takes_snapshots] == ['none']
  with pytest.raises(errors.ConfigError, match='--policy=gemini'):
    rules.of_name('gemini')
