"""All policies; another one is a module beside this one, and a line here."""

from __future__ import annotations

from moetion_jax import errors
from moetion_jax.policies import settings
from moetion_jax.policies.kinds import partial, sparse, whole

POLICIES: dict[str, settings.Policy] = {
  policy.name: policy
  for policy in (
    sparse.Sparse(),
    whole.Dense(),
    whole.TwoPhase(),
    partial.Partial(),
    sparse.Nothing(),
  )
}


def of_name(name: str) -> settings.Policy:
  """Returns the policy of that name; raises ConfigError if there is none."""
  errors.check_known('policy', name, POLICIES)
  return POLICIES[name]
