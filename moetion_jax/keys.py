"""Names of workers, operators and log entries: values that every module shares.

Pure Python: importing this module imports neither JAX nor NumPy.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Iterable, Sequence
from typing import Annotated, Any

from moetion_jax import codec


@dataclasses.dataclass(frozen=True, order=True)
class OperatorId:
  """The unit of checkpointing.

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


def operators_to_json(
  operators: Iterable[OperatorId],
) -> list[list[str | int]]:
  """Lists operators as sorted [group, expert] pairs, for JSON."""
  return [[o.group, o.expert] for o in sorted(operators)]


def operators_from_json(
  value: Iterable[Sequence[Any]],
) -> frozenset[OperatorId]:
  """Inverts `operators_to_json`."""
  return frozenset(OperatorId(group, expert) for group, expert in value)


Operators = Annotated[
  frozenset[OperatorId], codec.Form(operators_to_json, operators_from_json)
]


class EntryKind(enum.IntEnum):
  """Kind of a boundary log entry; its number is part of the file format."""

  ACTIVATION = 1  # forward output, read by the next stage
  GRADIENT = 2  # gradient of the stage's input, read by the previous stage
  SCALARS = 3  # the stage's partial norm and metrics, read by every stage
  EVALUATION = 4  # forward output of an evaluation microbatch


@dataclasses.dataclass(frozen=True, order=True)
class EntryKey:
  """Name of one boundary log entry.

  Attributes:
    iteration: number of the iteration, from 1.
    stage: the producing stage.
    replica: the producing replica.
    kind: the kind of its contents.
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


@dataclasses.dataclass(frozen=True, order=True)
class WorkerId:
  """Name of a worker or an agent that publishes, reads or reports.

  Attributes:
    stage: stage of the worker; -1 for an agent.
    replica: replica of the worker; index of the host for an agent.
    generation: number that grows with every replacement; stores reject older
      ones (fencing).
  """

  stage: int
  replica: int
  generation: int

  def __str__(self) -> str:
    return (
      f'stage {self.stage} replica {self.replica} (generation '
      f'{self.generation})'
    )
