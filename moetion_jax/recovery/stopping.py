"""Stopping of all stages after the same iteration, without a barrier.

The agent proposes a limit. A worker that has already begun a later iteration
says so; one that accepts goes on, and waits at the limit until the agent
commits it or, because somebody was beyond, proposes a later one. So nobody
trains beyond what others will do, and nobody ends where others need more.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

_AHEAD = 2  # so that a proposal normally finds everyone before it


@dataclasses.dataclass(frozen=True)
class StopDecision:
  """The limit to tell all workers.

  Attributes:
    limit: the last iteration to train.
    commit: True if the limit holds, False if it is only proposed.
  """

  limit: int
  commit: bool


def first_proposal(newest_iteration: int, iterations: int) -> StopDecision:
  """Returns the proposal while somebody works on `newest_iteration`."""
  return StopDecision(min(newest_iteration + _AHEAD, iterations), False)


def decide(
  limit: int, begun: Mapping[Any, int], workers: int, iterations: int
) -> StopDecision | None:
  """Decides what follows from the answers to a proposal.

  Args:
    limit: the proposed limit.
    begun: the iteration that each worker had begun when it got the proposal.
    workers: number of workers that must answer.
    iterations: number of iterations of the whole run.

  Returns:
    What to tell all workers now; None while answers are missing.
  """
  if len(begun) < workers:
    return None
  newest = max(begun.values())
  if newest <= limit:
    return StopDecision(limit, True)
  return first_proposal(newest, iterations)
