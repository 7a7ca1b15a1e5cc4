"""The policies `sparse` and `none`: parts of the state in every iteration.

Window and order follow from measurements.
"""

from __future__ import annotations

import dataclasses
import functools
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from moetion_jax import errors, report
from moetion_jax.policies import (
  decision,
  planner,
  popularity,
  replay_choice,
  settings as capture_settings,
  window,
)
from moetion_jax.policies.kinds import base

FIRST_WINDOW = 4  # window length until something is measured
# With a window of 1 each snapshot is the whole state: room for so many of those
# is not set aside, unless it is asked for with --window_length=1.
_SHORTEST_WINDOW = 2


class SparsePlanner(base.MeasuringPlanner):
  """Decides on window and order, for all stages alike.

  Between two decisions there is at least a whole window, so there is always a
  window of one decision that a recovery can go through.

  The way of replay, where it is left open, is chosen once, after the warm-up;
  there is room for the snapshots of either from the begin.

  Attributes:
    choice: the window in force, or soon to be.
  """

  WARM_UP_ITERATIONS = 6
  MEASURED_ITERATIONS = 5

  def __post_init__(self) -> None:
    super().__post_init__()
    self._popularity = popularity.Popularity(
      kind=self.settings.order, capacity=self.expert_capacity
    )
    self._rates: popularity.Rates = {}
    self._replay = self.settings.replays[0]
    self.choice = self._choose(None)
    self._lag_window = self._window_iterations
    # Made once and for all: a replacement must find files of its own size.
    self._pools = {n: self._make_pools(n) for n in range(1, self.replicas + 1)}

  @property
  def lag_iterations(self) -> int:
    """Iterations by which the recovery line lags behind.

    Shorter windows count for as long as some are kept: the line is at the begin
    of a window, and would be one window further behind otherwise.
    """
    return capture_settings.lag_iterations(
      self._lag_window, self.settings.keep_windows
    )

  @property
  def _window_iterations(self) -> int:
    return self.choice.window_length * self.choice.every

  def remarks(self, first_iteration: int) -> planner.Change | None:
    """See `planner.Planner`: a pinned window of which slots are empty."""
    fields = self._fields(self.choice)
    if not self._is_pinned or 'empty_slots' not in fields:
      return None
    return self._changed('window', first_iteration, fields)

  def _fields(self, choice: window.WindowChoice) -> dict[str, Any]:
    """Returns what an event says of a window; by stage, its empty slots."""
    fields = dataclasses.asdict(choice)
    del fields['pinned']
    empty_slots = [
      max(0, choice.window_length - len(stage.state_bytes))
      for stage in self.stages
    ]
    return fields | ({'empty_slots': empty_slots} if any(empty_slots) else {})

  def decisions(
    self, first_iteration: int
  ) -> tuple[decision.CaptureDecision, ...]:
    """See `planner.Planner`."""
    self._first_iteration = first_iteration
    return tuple(
      decision.CaptureDecision(
        first_iteration=first_iteration,
        window_length=self.choice.window_length,
        mode=self.choice.mode,
        every=self.choice.every,
        slots=stage.slots(self.choice.window_length),
        replay=self._replay,
      )
      for stage in self._in_order()
    )

  def pools(self, workers: int | None = None) -> list[planner.PoolSize]:
    """See `planner.Planner`; it is the same whatever is decided."""
    return list(self._pools[workers or self.replicas])

  def _make_pools(self, workers: int) -> list[planner.PoolSize]:
    longest = self.settings.longest_window
    lengths = range(self._shortest(), longest + 1)
    mode = self.settings.window_mode or decision.MODES[0]  # the larger one
    return [
      planner.PoolSize(
        files=self.settings.kept_snapshots,
        size_bytes=max(
          max(stage.snapshot_bytes(length, mode))
          for stage in ways
          for length in lengths
        ),
      )
      for ways in zip(
        *(self._in_order(workers, r) for r in self.settings.replays),
        strict=True,
      )
    ]

  def add(self, reports: Sequence[report.Report]) -> planner.Change | None:
    """See `planner.Planner`."""
    self._take_in(reports)
    loads = {o: n for one in reports for o, n in one.load.items()}
    self._popularity = popularity.observe(self._popularity, loads)
    iteration = reports[0].iteration
    kept_iterations = self.settings.keep_windows * self._window_iterations
    if iteration >= self._first_iteration + kept_iterations - 1:
      self._lag_window = self._window_iterations
    if iteration > self._first_iteration:  # the first waits for an older copy
      self._note_late(reports)
    if iteration < self._first_iteration + self._window_iterations - 1:
      return None
    leaves_open = not self._is_pinned or self._chooses_replay
    if leaves_open and self._is_warm and not self._has_chosen:
      self._has_chosen = True
      budgets = self._budgets()
      choice = self._choose(budgets)
      if self._chooses_replay:
        return self._change_replay(iteration, choice, budgets)
      return self._change(iteration, choice)
    if self._is_pinned:
      return self._reorder(iteration)
    if self._runs_late:
      self._late.clear()
      if change := self._change(iteration, self._enlarged()):
        self._has_grown = True
        return change
    if change := self._shortened(iteration):
      return change
    return self._reorder(iteration)

  @property
  def _is_pinned(self) -> bool:
    return bool(self.settings.window_length)

  @property
  def _pinned_mode(self) -> str | None:
    """The only mode that a window may have, if there is one."""
    if self._replay == decision.UPDATES:
      return decision.MODES[0]
    return self.settings.window_mode or None

  @property
  def _chooses_replay(self) -> bool:
    return len(self.settings.replays) > 1

  @property
  def _may_be_whole(self) -> bool:
    """True if devices have the memory for a copy of all that they train.

    They have it where it is the host's. A mode that is set means windows, and
    so does recording gradients, which is done in every iteration.
    """
    return (
      self.platform == 'cpu'
      and not self.settings.window_mode
      and self._replay != decision.UPDATES
    )

  def _has_room_for(self, choice: window.WindowChoice) -> bool:
    """Returns True if its snapshots fit; a new order may give larger slots."""
    return all(
      self._fits(
        max(stage.snapshot_bytes(choice.window_length, choice.mode)),
        pool,
        choice.every,
      )
      for stage, pool in zip(self._in_order(), self.pools(), strict=True)
    )

  def _fits(self, size_bytes: int, pool: planner.PoolSize, every: int) -> bool:
    """Returns True if there is room for a stage's snapshots of up to a size.

    Whole snapshots larger than a file of the pool are few: the pool's memory is
    cut anew for them, while older snapshots keep their files.
    """
    if size_bytes <= pool.size_bytes:
      return True
    if not self._may_be_whole or every == 1:
      return False
    if self.choice.every > 1:
      kept = max(map(self.settings.kept_whole, (every, self.choice.every)))
      return kept * size_bytes <= pool.files * pool.size_bytes
    older = self.settings.kept_with(self.choice.window_length)
    kept_bytes = older * pool.size_bytes
    kept_bytes += self.settings.kept_whole(every) * size_bytes
    return kept_bytes <= pool.files * pool.size_bytes

  def _shortest(self) -> int:
    """Returns the shortest window that there will be room for."""
    return self.settings.window_length or min(
      _SHORTEST_WINDOW, self.settings.longest_window
    )

  def _in_order(
    self, workers: int | None = None, replay: str = ''
  ) -> list[window.StageOperators]:
    return [
      s.in_order(
        self.settings.order,
        self._rates,
        workers or self.replicas,
        replay or self._replay,
      )
      for s in self.stages
    ]

  def _budgets(self) -> list[window.CopyBudget]:
    """Returns what each stage can copy, from the last measured iterations."""
    budgets = []
    for stage in range(len(self.stages)):
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
    """Chooses the longest window that a stage wants, or whole snapshots."""
    pinned_mode = self._pinned_mode
    most = max(len(stage.state_bytes) for stage in self.stages)
    if self.settings.window_length > most:
      raise errors.ConfigError(
        'window_length',
        self.settings.window_length,
        f'the largest stage has {most} operators only: no more slots than that',
      )
    if self._is_pinned or budgets is None:
      length = self.settings.window_length or min(
        FIRST_WINDOW, self.settings.longest_window
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
    elif self._chooses_replay and self._replay == decision.UPDATES:
      updates = replay_choice.of_updates(
        self._under(decision.UPDATES, budgets), **self._terms()
      )
      choice = updates.choice if updates else self.choice
    else:
      choose = functools.partial(
        window.choose_common_window,
        self._in_order(),
        budgets,
        max_window_length=self.settings.longest_window,
        pinned_mode=pinned_mode,
      )
      choice = choose(may_be_whole=self._may_be_whole)
      if choice.every > 1 and not self._has_room_for(choice):
        choice = choose(may_be_whole=False)
    if choice.every > 1 and not self._has_room_for(choice):
      choice = dataclasses.replace(
        choice,
        window_length=self.settings.longest_window,
        every=1,
        reason=choice.reason + '; there is no room for whole snapshots: the '
        'longest window',
      )
    elif choice.every == 1 and choice.window_length < self._shortest():
      choice = dataclasses.replace(choice, window_length=self._shortest())
    return dataclasses.replace(choice, pinned=self._is_pinned)

  def _under(
    self, replay: str, budgets: Sequence[window.CopyBudget]
  ) -> list[replay_choice.Stage]:
    """Returns all stages under a way of replay."""
    return replay_choice.stages(self._in_order(replay=replay), budgets)

  def _terms(self) -> dict[str, Any]:
    """Returns what is expected, and what there is room for."""
    return {
      'outlook': replay_choice.Outlook(
        expected_mtbf_seconds=self.settings.expected_mtbf_seconds,
        hides_copies=self.settings.hides_copies(self.platform),
      ),
      'lengths': range(self._shortest(), self.settings.longest_window + 1),
      'room_bytes': [pool.size_bytes for pool in self.pools()],
    }

  def _change_replay(
    self,
    iteration: int,
    choice: window.WindowChoice,
    budgets: Sequence[window.CopyBudget],
  ) -> planner.Change:
    """Chooses the way of replay for good, and says the reasons in any case.

    Args:
      iteration: the iteration that was reported.
      choice: the window for microbatches.
      budgets: see `_choose`.
    """
    predicted = replay_choice.predictions(
      choice,
      *(self._under(replay, budgets) for replay in decision.REPLAYS),
      **self._terms(),
    )
    best = replay_choice.best(predicted)
    before, self._replay = self._replay, best.replay
    change = self._change(iteration, best.choice, is_new=best.replay != before)
    if change is None:
      self._replay = before
      fields = self._fields(self.choice)
      fields['first_iteration'] = self._first_iteration
      change = planner.Change(kind='window', fields=fields, decisions=())
    reasons = {
      'replay': self._replay,
      'expected_mtbf_seconds': self.settings.expected_mtbf_seconds,
      'predicted': {one.replay: one.fields() for one in predicted},
    }
    return dataclasses.replace(change, fields={**change.fields, **reasons})

  def _enlarged(self) -> window.WindowChoice:
    enlarged = [
      window.enlarge(
        self.choice,
        stage,
        max_window_length=self.settings.longest_window,
      )
      for stage in self._in_order()
    ]
    return max(enlarged, key=lambda c: (c.every, c.window_length))

  def _shortened(self, iteration: int) -> planner.Change | None:
    """Changes to a window that is clearly shorter, if one fits by now.

    It does not go from whole snapshots to windows, or back.
    """
    passed = iteration - self._first_iteration + 1
    if not self._looks_again(passed, self._window_iterations):
      return None
    choice = self._choose(self._budgets())
    is_same_kind = (choice.every > 1) == (self.choice.every > 1)
    window_iterations = choice.window_length * choice.every
    if is_same_kind and self._is_clearly_shorter(
      window_iterations, self._window_iterations
    ):
      return self._change(iteration, choice)
    return None

  def _change(
    self, iteration: int, choice: window.WindowChoice, *, is_new: bool = False
  ) -> planner.Change | None:
    """Changes to a window, if it is another one and there is room for it.

    Args:
      iteration: the iteration that was reported.
      choice: the window.
      is_new: whether its snapshots hold something else than those so far.
    """
    before = self.choice
    same = dataclasses.replace(
      before, reason=choice.reason, pinned=choice.pinned
    )
    if choice == same and not is_new:
      self.choice = choice
      return None
    if not self._has_room_for(choice):
      return None
    first_iteration = self._next_first(iteration)
    self.choice = choice
    self._lag_window = min(self._lag_window, self._window_iterations)
    self._late.clear()
    return self._changed('window', first_iteration, self._fields(choice))

  def _reorder(self, iteration: int) -> planner.Change | None:
    if self.settings.order == 'static' or self.choice.window_length == 1:
      return None
    rates = popularity.rates(self._popularity)
    if not popularity.should_reorder(self._rates, rates):
      return None
    before, self._rates = self._rates, rates
    if not self._has_room_for(self.choice):
      self._rates = before
      return None
    return self._changed(
      'reorder', self._next_first(iteration), {'order': self.settings.order}
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
    """Returns the first iteration, not yet begun, of another decision.

    An aligned window is finished first: only a whole one is a start.
    """
    first = iteration + base.NOTICE_ITERATIONS
    if self.choice.mode == 'aligned':
      unfinished = (first - self._first_iteration) % self._window_iterations
      if unfinished:
        first += self._window_iterations - unfinished
    return first


class _NoPlanner(SparsePlanner):
  """A planner that has no room for snapshots, and changes nothing."""

  def pools(self, workers: int | None = None) -> list[planner.PoolSize]:
    """See `planner.Planner`."""
    return [planner.PoolSize(files=0, size_bytes=0) for _ in self.stages]

  def remarks(self, first_iteration: int) -> planner.Change | None:
    """See `planner.Planner`."""
    return None

  def add(self, reports: Sequence[report.Report]) -> planner.Change | None:
    """See `planner.Planner`."""
    return None


class Sparse(capture_settings.Policy):
  """Parts of the state in windows; only stages that lost something go back."""

  name = 'sparse'
  planner = SparsePlanner
  has_windows = True
  is_local = True
  may_record_gradients = True


class Nothing(capture_settings.Policy):
  """No snapshots: there is nothing to go back to."""

  name = 'none'
  planner = _NoPlanner
  takes_snapshots = False
  has_windows = True
