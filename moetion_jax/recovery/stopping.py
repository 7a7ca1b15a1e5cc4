"""How all stages end after the same iteration without a barrier.

The agent proposes a limit. A worker that has begun a later iteration already
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
  """What to tell all workers.

  Attributes:
    limit: last iteration.
    commit: whether it holds, or is proposed only.
  """

  limit: int
  commit: bool


def first_proposal(newest_iteration: int, iterations: int) -> StopDecision:
  """What to propose when somebody works on `newest_iteration`."""
  return StopDecision(min(newest_iteration + _AHEAD, iterations), False)


def decide(
  limit: int, begun: Mapping[Any, int], workers: int, iterations: int
) -> StopDecision | None:
  """What follows from the answers to a proposal.

  Args:
    limit: that was proposed.
    begun: by worker, the iteration it had begun when it got the proposal.
    workers: how many must answer.
    iterations: of the whole run.

  Returns:
    None while answers are missing.
  """
  if len(begun) < workers:
    return None
  newest = max(begun.values())
  if newest <= limit:
    return StopDecision(limit, True)
  return first_proposal(newest, iterations)


class IterationLimit:
  """A worker's side: asked by its loop, told by its agent, in two threads."""

  def __init__(self):
    """There is no limit yet."""
    self._changed = threading.Condition()  # guards what follows
    self._begun = 0
    self._limit: int | None = None
    self._committed = False
    self._interrupted = False

  def propose(self, limit: int) -> int:
    """Takes a limit unless it is passed; the iteration begun last."""
    with self._changed:
      if self._begun <= limit:
        self._limit = limit
      self._changed.notify_all()
      return self._begun

  def commit(self, limit: int) -> None:
    """Makes a limit that everyone accepted the end."""
    with self._changed:
      self._limit, self._committed = limit, True
      self._changed.notify_all()

  def interrupt(self, is_on: bool) -> None:
    """Has `stop` say yes at once, or not any more: the worker goes back."""
    with self._changed:
      self._interrupted = is_on
      self._changed.notify_all()

  def stop(self, done: int) -> bool:
    """Whether to end instead of beginning the next iteration; may wait.

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
