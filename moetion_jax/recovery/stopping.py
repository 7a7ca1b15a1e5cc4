"""Stopping of all stages after the same iteration, without a barrier.

The agent proposes a limit. A worker that has already begun a later iteration
says so; one that accepts goes on, and waits at the limit until the agent
commits it or, because somebody was beyond, proposes a later one. So nobody
trains beyond what others will do, and nobody ends where others need more.
"""

from __future__ import annotations

import dataclasses
import threading
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


class IterationLimit:
  """A worker's limit: its loop asks, its agent sets, in two threads."""

  def __init__(self):
    """Starts without a limit."""
    self._changed = threading.Condition()  # guards what follows
    self._begun = 0
    self._limit: int | None = None
    self._committed = False
    self._interrupted = False

  def propose(self, limit: int) -> int:
    """Takes a limit unless it is passed; returns the iteration begun last."""
    with self._changed:
      if self._begun <= limit:
        self._limit = limit
      self._changed.notify_all()
      return self._begun

  def commit(self, limit: int) -> None:
    """Makes the limit that everyone accepted final."""
    with self._changed:
      self._limit, self._committed = limit, True
      self._changed.notify_all()

  def interrupt(self, is_on: bool) -> None:
    """Sets whether `stop` returns True at once, for a worker to go back."""
    with self._changed:
      self._interrupted = is_on
      self._changed.notify_all()

  def stop(self, done: int) -> bool:
    """Returns True to end, False to begin the next iteration; may wait.

    Args:
      done: the iteration that is done.
    """
    with self._changed:
      self._begun = done
      self._changed.wait_for(
        lambda: (
          self._interrupted
          or self._committed
          or self._limit is None
          or self._begun < self._limit
        )
      )
      if self._interrupted:
        return True
      if self._limit is not None and self._begun >= self._limit:
        return True
      self._begun += 1
      return False
