"""What each policy promises, by its name."""

import pytest

from moetion_jax import errors
from moetion_jax.policies.kinds import registry


def test_what_each_policy_promises():
  found = registry.POLICIES
  assert [*found] == ['sparse', 'dense', 'two_phase', 'partial', 'none']
  assert all(registry.of_name(name) is found[name] for name in found)
  assert [n for n, p in found.items() if p.is_local] == ['sparse']
  assert [n for n, p in found.items() if not p.is_exact] == ['partial']
  assert [n for n, p in found.items() if p.is_durable] == ['two_phase']
  assert [n for n, p in found.items() if p.has_windows] == ['sparse', 'none']
  assert [n for n, p in found.items() if not p.takes_snapshots] == ['none']
  with pytest.raises(errors.ConfigError, match='--policy=gemini'):
    registry.of_name('gemini')
