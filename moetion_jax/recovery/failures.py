"""How often each stage has failed since the recovery line last advanced."""

from __future__ import annotations

import collections
from collections.abc import Mapping

from moetion_jax import errors


class Failures:
  """Counts failures and says when there were too many."""

  def __init__(self, max_failures: int):
    """Stores the limit.

    Args:
      max_failures: of one stage without progress of the line.
    """
    self._max_failures = max_failures
    self._of_stage: collections.Counter[int] = collections.Counter()
    self._diverged = 0

  def add(self, failed: Mapping[int, str], line: int) -> None:
    """Counts a failure of each of some stages.

    Args:
      failed: why, by stage.
      line: the recovery line, for the error.

    Raises:
      errors.MoetionError: a stage failed more often than it may.
    """
    self._of_stage.update(failed.keys())
    for stage, reason in failed.items():
      if self._of_stage[stage] > self._max_failures:
        raise errors.MoetionError(
          f'{self._of_stage[stage]} failure(s) of stage {stage} since '
          f'iteration {line}, the last one: {reason}; more than '
          f'--max_failures={self._max_failures} end the run'
        )

  def add_divergence(self, failed: Mapping[int, str], stages: int) -> None:
    """Counts a rebuilt state whose digests are not those of before.

    Args:
      failed: why, by stage.
      stages: of the run; each may come out wrong once in one recovery.

    Raises:
      errors.MoetionError: it happened more often than that.
    """
    self._diverged += 1
    if self._diverged > stages:
      raise errors.MoetionError('; '.join(failed.values()))

  def line_moved(self) -> None:
    """Begins to count anew: the run makes progress."""
    self._of_stage.clear()

  def all_caught_up(self) -> None:
    """Nobody is on the way back any more."""
    self._diverged = 0

  def is_crash_loop(self, stage: int) -> bool:
    """Whether one more failure of a stage would be too many."""
    return self._of_stage[stage] >= self._max_failures

  def forgive(self, stage: int) -> None:
    """Counts a stage's failures anew: something was done about them.

    About the one at hand as well, which is yet to be counted.
    """
    self._of_stage[stage] = -1
