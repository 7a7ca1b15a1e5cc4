"""Failures of stages: their counts, and the recoveries under way."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Mapping
from typing import Any

from moetion_jax import errors
from moetion_jax.recovery import plan as recovery_plan


class WorkerError(errors.MoetionError):
  """A worker ended, or cannot go on.

  Attributes:
    stage: the worker's stage.
    iteration: the iteration that it had begun.
  """

  def __init__(
    self,
    stage: int,
    iteration: int,
    what: str,
    *,
    cause: errors.MoetionError | None = None,
  ):
    """Makes the message of what happened to whom, and when.

    Args:
      stage: the worker's stage.
      iteration: the iteration that it had begun.
      what: the end of the message.
      cause: the reason why the worker cannot go on, if that is an error.
    """
    super().__init__(f'stage {stage}, iteration {iteration}: {what}')
    self.stage = stage
    self.iteration = iteration
    if cause is not None:
      self.is_passing, self.exit_code = cause.is_passing, cause.exit_code


class HangError(errors.MoetionError):
  """A run makes no progress, and nothing that was tried has changed that."""

  exit_code = errors.ExitCode.HUNG


class NoReplacementError(errors.MoetionError):
  """A dead worker has no successor; a run that starts again has new workers."""

  is_passing = True


@dataclasses.dataclass(kw_only=True)
class OngoingRecovery:
  """One stage on its way back.

  Attributes:
    stage: the stage.
    plan: the plan that the stage follows.
    target: iteration in which the predecessor died.
    reason: why the predecessor died, or why the stage joined.
    failed_at: time at which the failure was noticed, `time.monotonic`.
    detect_seconds: time between the failure and its notice, where known.
    fetch_seconds: time that the new worker took to get its state; None before
      it has it.
    resumed_at: time at which it had it, `time.monotonic`.
    goes_back: whether the plan starts before the line.
    recorded: the newest iteration that was written down when it failed.
  """

  stage: int
  plan: recovery_plan.RecoveryPlan
  target: int
  reason: str
  failed_at: float
  detect_seconds: float
  fetch_seconds: float | None = None
  resumed_at: float = 0.0
  goes_back: bool = False
  recorded: int = 0

  @property
  def replayed_iterations(self) -> int:
    """Number of iterations that the stage does again."""
    return recovery_plan.replayed_iterations(self.plan, self.stage, self.target)

  @property
  def applied_updates(self) -> int:
    """Number of iterations of which only the update is done again."""
    return self.plan.applied_until[self.stage] - self.plan.start

  @property
  def compared_iterations(self) -> int:
    """Number of both that came out as they are written down.

    Reports are one iteration late; a worker that reports another digest ends.
    """
    return max(min(self.recorded, self.target - 1) - self.plan.start, 0)

  def measured(self, now: float) -> dict[str, Any]:
    """Returns what an event says of the way back, once it is done.

    Args:
      now: the time at which the stage had caught up, `time.monotonic`.
    """
    assert self.fetch_seconds is not None, 'it has not begun to train yet'
    return {
      'first_iteration': self.plan.first_iteration,
      'replayed_iterations': self.replayed_iterations,
      'applied_updates': self.applied_updates,
      'compared_iterations': self.compared_iterations,
      'seconds': {
        'detect': self.detect_seconds,
        'start': self.resumed_at - self.failed_at - self.fetch_seconds,
        'fetch': self.fetch_seconds,
        'replay': now - self.resumed_at,
      },
    }

  def describe(self, now: float, *, is_exact: bool) -> str:
    """Says for people how long it took, and what came of it.

    Args:
      now: as of `measured`.
      is_exact: whether the policy brings the same bits back.
    """
    if not is_exact:
      how = 'from experts of different age'
    elif self.compared_iterations:
      how = f'{self.compared_iterations} compared, with the same digests'
    else:
      how = 'none of which had been written down, to be compared with'
    done = f'{self.replayed_iterations} iteration(s) done again'
    if self.applied_updates:
      done = f'{self.applied_updates} update(s) applied again, {done}'
    return f'in {now - self.failed_at:.1f} s: {done}, {how}'


class Failures:
  """Counts failures, and raises an error when there are too many."""

  def __init__(self, max_failures: int):
    """Stores the limit.

    Args:
      max_failures: failures of one stage allowed without progress of the line.
    """
    self._max_failures = max_failures
    self._of_stage: collections.Counter[int] = collections.Counter()
    self._unmet: collections.Counter[int] = collections.Counter()
    self._diverged = 0
    self._damaged, self._damaged_at = 0, -1

  def add(
    self, failed: Mapping[int, str], line: int, *, hangs: bool = False
  ) -> None:
    """Counts a failure of each of some stages.

    Args:
      failed: the reason of each failed stage.
      line: the recovery line, for the error.
      hangs: whether it was that a worker hung.

    Raises:
      HangError: a stage failed more often than it may, at last by hanging.
      errors.MoetionError: it failed more often than it may.
    """
    kind = HangError if hangs else errors.MoetionError
    self._of_stage.update(failed.keys())
    for stage, reason in failed.items():
      if self._of_stage[stage] > self._max_failures:
        raise kind(
          f'{self._of_stage[stage]} failure(s) of stage {stage} since '
          f'iteration {line}, the last one: {reason}; more than '
          f'--max_failures={self._max_failures} end the run'
        )

  def add_unmet(self, stage: int, line: int, reason: str) -> None:
    """Counts that a stage's world did not come together, which is no failure.

    Args:
      stage: the stage.
      line: the recovery line, for the error.
      reason: what a member of the world says.

    Raises:
      errors.UnmetError: it happened more often than it may.
    """
    self._unmet[stage] += 1
    if self._unmet[stage] > self._max_failures:
      raise errors.UnmetError(
        f'{self._unmet[stage]} time(s) since iteration {line} the workers of '
        f'stage {stage} did not come together, the last time: {reason}; more '
        f'than --max_failures={self._max_failures} end the run'
      )

  def add_divergence(self, failed: Mapping[int, str], stages: int) -> None:
    """Counts a rebuilt state whose digests are not those of before.

    Args:
      failed: the reason of each failed stage.
      stages: number of stages of the run; each may come out wrong once in one
        recovery.

    Raises:
      errors.MoetionError: it happened more often than that.
    """
    self._diverged += 1
    if self._diverged > stages:
      raise errors.MoetionError('; '.join(failed.values()))

  def add_damage(self, reached: int, reason: str) -> None:
    """Counts that all stages go back because log entries are damaged.

    Args:
      reached: the newest iteration that was begun. That the line moves says
        nothing, since it went back too.
      reason: the damage.

    Raises:
      errors.MoetionError: it happened too often without a newer iteration.
    """
    if reached > self._damaged_at:
      self._damaged, self._damaged_at = 0, reached
    self._damaged += 1
    if self._damaged > self._max_failures:
      raise errors.MoetionError(
        f'{reason}; that happened {self._damaged} time(s) without progress '
        f'beyond iteration {self._damaged_at}, and more than --max_failures='
        f'{self._max_failures} end the run: is the memory of this machine '
        'sound?'
      )

  def line_moved(self) -> None:
    """Counts all stages' failures anew: the run makes progress."""
    self._of_stage.clear()
    self._unmet.clear()

  def all_caught_up(self) -> None:
    """Counts divergences anew: nobody is on the way back any more."""
    self._diverged = 0

  def is_crash_loop(self, stage: int, *, is_unmet: bool = False) -> bool:
    """Returns True if one more failure of a stage would be too many.

    Args:
      stage: the stage.
      is_unmet: whether it would be that its world does not come together.
    """
    counts = self._unmet if is_unmet else self._of_stage
    return counts[stage] >= self._max_failures

  def forgive(self, stage: int) -> None:
    """Counts a stage's failures anew: something was done about them.

    That includes the one at hand, which is yet to be counted.
    """
    self._of_stage[stage] = self._unmet[stage] = -1
