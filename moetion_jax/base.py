"""Value types and error classes that every other module shares.

Pure Python: importing this module imports neither JAX nor NumPy, so the agent,
which must never create a JAX backend, can use it freely.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Iterable, Sequence
from typing import Any


class MoetionError(Exception):
  """Base of every error this project raises on purpose."""


class ConfigError(MoetionError):
  """A setting is unknown, out of range or contradicts another one.

  `launch` turns it into one line on stderr and exit code 2.

  Attributes:
    flag: name of the setting as the user writes it, without dashes.
    value: what it was set to.
    reason: what is wrong and what would be right.
  """

  def __init__(self, flag: str, value: object, reason: str):
    super().__init__(f'--{flag}={value}: {reason}')
    self.flag = flag
    self.value = value
    self.reason = reason


class NonFiniteError(MoetionError):
  """The loss or the gradient norm of an iteration is NaN or infinite."""


class EntryMismatchError(MoetionError):
  """An entry was published twice with unequal contents: bits diverged."""


class StoreError(MoetionError):
  """The host store is full, damaged or not usable here."""


class NoRoomError(StoreError):
  """Host memory stayed full for as long as there was to wait for room."""


@dataclasses.dataclass(frozen=True, order=True)
class OperatorId:
  """The unit of checkpointing (DESIGN section 2).

  Attributes:
    group: name of the group of leaves the operator is made of, for example
      'layers/3/experts', 'layers/3', 'embedding', 'head'.
    expert: index along the leading dim of every leaf of the group, or -1 when
      the group as a whole is one operator.
  """

  group: str
  expert: int = -1

  def __str__(self) -> str:
    return self.group if self.expert < 0 else f'{self.group}/{self.expert}'


# Why a worker is blocked that may not overwrite any of its snapshots.
SNAPSHOTS_FULL = 'all its snapshots are needed'


def operators_to_json(
  operators: Iterable[OperatorId],
) -> list[list[str | int]]:
  """Sorted [group, expert] pairs; `operators_from_json` is the inverse."""
  return [[o.group, o.expert] for o in sorted(operators)]


def operators_from_json(
  value: Iterable[Sequence[Any]],
) -> frozenset[OperatorId]:
  """The inverse of `operators_to_json`."""
  return frozenset(OperatorId(group, expert) for group, expert in value)


class EntryKind(enum.IntEnum):
  """What a boundary log entry holds (its number is part of the file format)."""

  ACTIVATION = 1  # forward output, read by the next stage
  GRADIENT = 2  # gradient of the stage's input, read by the previous stage
  SCALARS = 3  # the stage's partial norm and metrics, read by every stage
  EVALUATION = 4  # forward output of an evaluation microbatch


@dataclasses.dataclass(frozen=True, order=True)
class EntryKey:
  """Name of one boundary log entry (DESIGN sections 1 and 2).

  Attributes:
    iteration: from 1.
    stage: the producing stage.
    replica: the producing replica.
    kind: what the entry holds.
    microbatch: index within the producing replica's iteration, from 0; 0 for
      SCALARS.
  """

  iteration: int
  stage: int
  replica: int
  kind: EntryKind
  microbatch: int = 0

  def __str__(self) -> str:
    return (
      f'{self.kind.name.lower()} of stage {self.stage} replica {self.replica}, '
      f'iteration {self.iteration}, microbatch {self.microbatch}'
    )
