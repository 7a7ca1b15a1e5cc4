"""Schedule of a stage's work on its microbatches, as a value."""

from __future__ import annotations

import enum
from typing import NamedTuple


class TaskKind(enum.Enum):
  """One of the programs that run once a microbatch."""

  FORWARD = 'forward'
  BACKWARD = 'backward'
  EVALUATE = 'evaluate'


class Task(NamedTuple):
  """One program on one microbatch."""

  kind: TaskKind
  microbatch: int


def one_forward_one_backward(
  stage: int, stages: int, microbatches: int
) -> tuple[Task, ...]:
  """Makes the 1F1B schedule of a stage (PipeDream-Flush, arXiv 2006.09503).

  A stage runs ahead by as many forwards as there are stages behind it, then
  alternates, so that at most stages - stage microbatches are in flight.
  Backwards come in microbatch order: gradients accumulate in that order.
  """
  if not 0 <= stage < stages:
    raise ValueError(f'stage {stage} of {stages}')
  ahead = min(stages - stage - 1, microbatches)
  tasks = [Task(TaskKind.FORWARD, m) for m in range(ahead)]
  for m in range(microbatches):
    if m + ahead < microbatches:
      tasks.append(Task(TaskKind.FORWARD, m + ahead))
    tasks.append(Task(TaskKind.BACKWARD, m))
  return tuple(tasks)


def evaluation(microbatches: int) -> tuple[Task, ...]:
  """Lists the held-out microbatches that follow an iteration's update."""
  return tuple(Task(TaskKind.EVALUATE, m) for m in range(microbatches))
