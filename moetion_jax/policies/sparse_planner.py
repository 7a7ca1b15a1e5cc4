"""The leader's decisions on what is captured when, from measurements.

Pure, but for what it remembers: reports go in, decisions come out.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from moetion_jax import report
from moetion_jax.policies import (
  decision,
  planner,
  popularity,
  settings as capture_settings,
  window,
)

FIRST_WINDOW = 4  # until something is measured
_WARM_UP_ITERATIONS = 6
_MEASURED_ITERATIONS = 5  # of the warm-up, the last ones
# A decision holds from so many iterations after the newest that is reported: no
# stage has begun that one. (If one had, nothing but its slots would differ.)
NOTICE_ITERATIONS = 3
# A snapshot a window of 1 is the whole state: room for that many of them is
# not set aside, unless it is asked for with --window_length=1.
_SHORTEST_WINDOW = 2
# An iteration that waited longer than this share of it for a copy was late;
# after so many of them, among so many, the window grows.
LATE_SHARE = 0.02
_LATE_ITERATIONS = 3
_LATE_AMONG = 20
# After so many windows, and iterations, another look whether a shorter one
# would do: while a run begins, copies and iterations are slower than later. It
# has to be shorter by a quarter: what is measured is noisy.
_LOOK_WINDOWS = 4
_LOOK_ITERATIONS = 12
SHORTER = 0.75


def looks_again(passed: int, window_iterations: int) -> bool:
  """Whether it is time to see whether a shorter window would do.

  Args:
    passed: iterations with this window.
    window_iterations: of it.
  """
  every = max(_LOOK_WINDOWS * window_iterations, _LOOK_ITERATIONS)
  return passed > 0 and passed % every == 0


class SparsePlanner:
  """Decides, for all stages alike, on window and order.

  Between two decisions there is a whole window at least: so there is always a
  window of one decision that a recovery can go through.

  Attributes:
    choice: the window in force, or soon to be.
    lag_iterations: by how much the recovery line lags behind with it.
  """

  def __init__(
    self,
    settings: capture_settings.CaptureSettings,
    stages: Sequence[planner.StageSizes],
    platform: str,
    capacity: float | None = None,
    replicas: int = 1,
  ):
    """Stores the arguments.

    Args:
      settings: of the run.
      stages: operators of each stage.
      platform: as JAX calls it.
      capacity: tokens that an expert takes in an iteration at most.
      replicas: of each stage.

    Raises:
      base.ConfigError: the window is longer than a stage can have.
    """
    self._settings = settings
    self._stages = stages
    self._replicas = replicas
    self._platform = platform
    self._target = planner.overlap_target(settings, platform)
    # Of the last iterations; later ones are not looked at.
    self._measured: collections.deque[Sequence[report.Report]] = (
      collections.deque(maxlen=_MEASURED_ITERATIONS)
    )
    self._measured_iterations = 0
    self._late: collections.deque[bool] = collections.deque(maxlen=_LATE_AMONG)
    self._popularity = popularity.Popularity(
      kind=settings.order, capacity=capacity
    )
    self._rates: popularity.Rates = {}
    self._first_iteration = 0  # of the last decision
    self._has_chosen = False  # from what was measured
    self._has_grown = False  # since copies ran late
    self.choice = self._choose(None)
    self._lag_window = self._window_iterations
    # Once and for all: a replacement must find files of its own size.
    self._pools = {n: self._make_pools(n) for n in range(1, replicas + 1)}

  @property
  def lag_iterations(self) -> int:
    """By how much the recovery line lags behind.

    By shorter windows, for as long as there are some: the line is at the begin
    of a window, and would be one further behind otherwise.
    """
    return self._lag_window * (self._settings.keep_windows - 1)

  @property
  def _window_iterations(self) -> int:
    return self.choice.window_length * self.choice.every

  def decisions(
    self, first_iteration: int
  ) -> tuple[decision.CaptureDecision, ...]:
    """What every stage captures from an iteration on, until a `Change`."""
    self._first_iteration = first_iteration
    return tuple(
      decision.CaptureDecision(
        first_iteration=first_iteration,
        window_length=self.choice.window_length,
        mode=self.choice.mode,
        every=self.choice.every,
        slots=stage.slots(self.choice.window_length),
      )
      for stage in self._in_order()
    )

  def pools(self, workers: int | None = None) -> list[planner.PoolSize]:
    """Room for the snapshots of every stage, whatever is decided.

    Args:
      workers: that share them; None: all replicas do.
    """
    return list(self._pools[workers or self._replicas])

  def _make_pools(self, workers: int) -> list[planner.PoolSize]:
    if self._settings.policy == 'none':
      return [planner.PoolSize(files=0, size_bytes=0) for _ in self._stages]
    longest = self._settings.longest_window
    lengths = range(self._shortest(), longest + 1)
    mode = self._settings.window_mode or decision.MODES[0]  # the larger one
    return [
      planner.PoolSize(
        files=self._settings.kept_snapshots,
        size_bytes=max(
          max(stage.snapshot_bytes(length, mode)) for length in lengths
        ),
      )
      for stage in self._in_order(workers)
    ]

  def add(self, reports: Sequence[report.Report]) -> planner.Change | None:
    """Takes an iteration in.

    Args:
      reports: one a stage, of the iteration after the last one's.

    Returns:
      What changes, if something does.
    """
    if self._settings.policy == 'none':
      return None
    loads = {o: n for one in reports for o, n in one.load.items()}
    self._popularity = popularity.observe(self._popularity, loads)
    self._measured.append(reports)
    self._measured_iterations += 1
    iteration = reports[0].iteration
    kept_iterations = self._settings.keep_windows * self._window_iterations
    if iteration >= self._first_iteration + kept_iterations - 1:
      self._lag_window = self._window_iterations
    if iteration > self._first_iteration:  # the first waits for one before
      self._late.append(
        any(r.blocked_seconds > LATE_SHARE * r.seconds for r in reports)
      )
    if iteration < self._first_iteration + self._window_iterations - 1:
      return None
    if self._is_pinned:
      return self._reorder(iteration)
    if (
      self._measured_iterations >= _WARM_UP_ITERATIONS and not self._has_chosen
    ):
      self._has_chosen = True
      return self._change(iteration, self._choose(self._budgets()))
    if sum(self._late) >= _LATE_ITERATIONS:
      self._late.clear()
      if change := self._change(iteration, self._enlarged()):
        self._has_grown = True
        return change
    if change := self._shortened(iteration):
      return change
    return self._reorder(iteration)

  @property
  def _is_pinned(self) -> bool:
    return bool(self._settings.window_length)

  @property
  def _may_be_whole(self) -> bool:
    """Whether devices have the memory for a copy of all that they train.

    Where that is the host's, they have. A mode that is set means windows.
    """
    return self._platform == 'cpu' and not self._settings.window_mode

  def _has_room_for(self, choice: window.WindowChoice) -> bool:
    """Whether its snapshots fit; in another order slots may come out larger."""
    return all(
      self._fits(
        max(stage.snapshot_bytes(choice.window_length, choice.mode)),
        pool,
        choice.every,
      )
      for stage, pool in zip(self._in_order(), self.pools(), strict=True)
    )

  def _fits(self, size_bytes: int, pool: planner.PoolSize, every: int) -> bool:
    """Whether there is room for snapshots of a stage, the largest of a size.

    Whole ones that are larger than a file of the pool are few: its memory is
    cut anew for them, while older snapshots have the files that they have.
    """
    if size_bytes <= pool.size_bytes:
      return True
    if not self._may_be_whole or every == 1:
      return False
    if self.choice.every > 1:
      kept = max(map(self._settings.kept_whole, (every, self.choice.every)))
      return kept * size_bytes <= pool.files * pool.size_bytes
    older = self._settings.kept_with(self.choice.window_length)
    kept_bytes = older * pool.size_bytes
    kept_bytes += self._settings.kept_whole(every) * size_bytes
    return kept_bytes <= pool.files * pool.size_bytes

  def _shortest(self) -> int:
    """The shortest window that there will be room for."""
    return self._settings.window_length or min(
      _SHORTEST_WINDOW, self._settings.longest_window
    )

  def _in_order(
    self, workers: int | None = None
  ) -> list[window.StageOperators]:
    return [
      s.in_order(self._settings.order, self._rates, workers or self._replicas)
      for s in self._stages
    ]

  def _budgets(self) -> list[window.CopyBudget]:
    """What each stage can copy, from the last iterations of the warm-up."""
    budgets = []
    for stage in range(len(self._stages)):
      reports = [r[stage] for r in self._measured]
      budgets.append(
        window.CopyBudget(
          iteration_seconds=statistics.median(r.seconds for r in reports),
          bandwidth_bytes_per_second=max(
            1.0, statistics.median(r.copy_bytes_per_second for r in reports)
          ),
          overlap_target=self._target,
        )
      )
    return budgets

  def _choose(
    self, budgets: Sequence[window.CopyBudget] | None
  ) -> window.WindowChoice:
    """The longest window that a stage wants, or whole snapshots."""
    pinned_mode = self._settings.window_mode or None
    if self._is_pinned or budgets is None:
      length = self._settings.window_length or min(
        FIRST_WINDOW, self._settings.longest_window
      )
      choices = [
        window.choose_window(
          stage,
          None,
          pinned_length=min(length, len(stage.order))
          if not self._is_pinned
          else length,
          pinned_mode=pinned_mode,
        )
        for stage in self._in_order()
      ]
      choice = window.longest(choices)
    else:
      choose = functools.partial(
        window.choose_common_window,
        self._in_order(),
        budgets,
        max_window_length=self._settings.longest_window,
        pinned_mode=pinned_mode,
      )
      choice = choose(may_be_whole=self._may_be_whole)
      if choice.every > 1 and not self._has_room_for(choice):
        choice = choose(may_be_whole=False)
    if choice.every > 1 and not self._has_room_for(choice):
      choice = dataclasses.replace(
        choice,
        window_length=self._settings.longest_window,
        every=1,
        reason=choice.reason + '; there is no room for whole snapshots: the '
        'longest window',
      )
    elif choice.every == 1 and choice.window_length < self._shortest():
      choice = dataclasses.replace(choice, window_length=self._shortest())
    return dataclasses.replace(choice, pinned=self._is_pinned)

  def _enlarged(self) -> window.WindowChoice:
    enlarged = [
      window.enlarge(
        self.choice,
        stage,
        max_window_length=self._settings.longest_window,
      )
      for stage in self._in_order()
    ]
    return max(enlarged, key=lambda c: (c.every, c.window_length))

  def _shortened(self, iteration: int) -> planner.Change | None:
    """A window that is clearly shorter, if by now one fits.

    Not after copies ran late: a window that was too short is not tried again.
    Nor from whole snapshots to windows, or back.
    """
    passed = iteration - self._first_iteration + 1
    looks = self._has_chosen and not self._has_grown
    if not looks or not looks_again(passed, self._window_iterations):
      return None
    choice = self._choose(self._budgets())
    is_same_kind = (choice.every > 1) == (self.choice.every > 1)
    window_iterations = choice.window_length * choice.every
    if is_same_kind and window_iterations <= SHORTER * self._window_iterations:
      return self._change(iteration, choice)
    return None

  def _change(
    self, iteration: int, choice: window.WindowChoice
  ) -> planner.Change | None:
    """Goes over to a window, if it is another one."""
    before = self.choice
    same = dataclasses.replace(
      before, reason=choice.reason, pinned=choice.pinned
    )
    if choice == same:
      self.choice = choice
      return None
    if not self._has_room_for(choice):
      return None
    first_iteration = self._next_first(iteration)
    self.choice = choice
    self._lag_window = min(self._lag_window, self._window_iterations)
    self._late.clear()
    fields = dataclasses.asdict(choice)
    del fields['pinned']
    return self._changed('window', first_iteration, fields)

  def _reorder(self, iteration: int) -> planner.Change | None:
    if self._settings.order == 'static' or self.choice.window_length == 1:
      return None
    rates = popularity.rates(self._popularity)
    if not popularity.should_reorder(self._rates, rates):
      return None
    before, self._rates = self._rates, rates
    if not self._has_room_for(self.choice):
      self._rates = before
      return None
    return self._changed(
      'reorder', self._next_first(iteration), {'order': self._settings.order}
    )

  def _changed(
    self, kind: str, first_iteration: int, fields: Mapping[str, Any]
  ) -> planner.Change:
    return planner.Change(
      kind=kind,
      fields={'first_iteration': first_iteration, **fields},
      decisions=self.decisions(first_iteration),
    )

  def _next_first(self, iteration: int) -> int:
    """From when on another decision may hold, which nobody has begun.

    An aligned window is finished first: it is a start as a whole only.
    """
    first = iteration + NOTICE_ITERATIONS
    if self.choice.mode == 'aligned':
      unfinished = (first - self._first_iteration) % self._window_iterations
      if unfinished:
        first += self._window_iterations - unfinished
    return first
