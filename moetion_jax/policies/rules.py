"""The policies by name, and the promises of each."""

from __future__ import annotations

import dataclasses

from moetion_jax import errors


def check_known(flag: str, value: str, known: tuple[str, ...]) -> None:
  """Raises ConfigError unless `value` is one of the flag's known values."""
  if value not in known:
    raise errors.ConfigError(flag, value, f'known are {", ".join(known)}')


@dataclasses.dataclass(frozen=True, kw_only=True)
class Policy:
  """The promises of a policy.

  Attributes:
    name: one of POLICIES.
    takes_snapshots: whether anything is captured.
    is_local: whether only the stages that lost something go back; otherwise
      all stages go back together to the newest snapshot that all have.
    is_exact: whether a run that recovers ends with the bits of an undisturbed
      one.
    is_whole: whether every snapshot is the whole state.
    is_durable: whether a restore reads what was written to storage; memory is
      lost with the process.
  """

  name: str
  takes_snapshots: bool = True
  is_local: bool = False
  is_exact: bool = True
  is_whole: bool = False
  is_durable: bool = False


_ALL = (
  Policy(name='sparse', is_local=True),
  Policy(name='dense', is_whole=True),
  Policy(name='two_phase', is_whole=True, is_durable=True),
  Policy(name='partial', is_exact=False),
  Policy(name='none', takes_snapshots=False),
)
POLICIES = tuple(policy.name for policy in _ALL)


def of_name(name: str) -> Policy:
  """Returns the policy of that name; raises ConfigError if there is none."""
  check_known('policy', name, POLICIES)
  return next(policy for policy in _ALL if policy.name == name)
