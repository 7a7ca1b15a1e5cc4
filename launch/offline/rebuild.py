"""Rebuilds a stage's dense state from the stores of a stopped run."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Collection, Mapping
from typing import Any

import numpy as np

from launch.lm import settings as run_settings, transformer_job
from launch.offline import stored_log, stored_run
from moetion_jax import errors, keys, report
from moetion_jax.capture import conversion, programs as capture_programs
from moetion_jax.programs import compilation, stage as stage_lib
from moetion_jax.runtime.checkpoints import file as checkpoint_file, restore
from moetion_jax.runtime.records import held_run
from moetion_jax.snapshots import coverage, reader, snapshot as snapshot_lib
from moetion_jax.state import partition
from moetion_jax.training import worker

# Generation 0: no real worker has it, and nothing is published offline.
_GENERATION = 0


class UnreachableError(errors.MoetionError):
  """The state asked for cannot be made of what is there."""


class DifferentError(errors.MoetionError):
  """A replayed iteration differs from its line in metrics.jsonl."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rebuilt:
  """A stage's rebuilt state, and what it was compared with.

  Attributes:
    stage: the stage's number.
    iteration: the iteration of the state.
    state: the whole state.
    digests: digests of its operators.
    start: iteration where the conversion started.
    complete_at: iteration where it was complete.
    snapshots: iterations whose recorded digests are those that came out.
    losses: iterations whose loss is that of metrics.jsonl.
    whole_digests: iterations whose digest of all stages' state, with those of
      the other stages' snapshots, is that of metrics.jsonl.
    entries: number of entries that came out as they were published.
    applied_updates: number of iterations of which only the update was done.
  """

  stage: int
  iteration: int
  state: partition.State
  digests: Mapping[keys.OperatorId, np.ndarray]
  start: int
  complete_at: int
  snapshots: tuple[int, ...]
  losses: tuple[int, ...]
  whole_digests: tuple[int, ...]
  entries: int
  applied_updates: int

  @property
  def is_verified(self) -> bool:
    """True if the digest of this very state was recorded and is the same."""
    return self.iteration in {*self.snapshots, *self.whole_digests}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rebuilder:
  """Rebuilds states of one stage; `compile` makes one.

  Attributes:
    index: the stage's number.
    data: the run's data; only the first and the last stage read any.
    job: the run's job.
    stage: the stage, for one worker that does what all replicas did.
    programs: the stage's programs.
    captures: its programs of capture and fold.
  """

  index: int
  data: Any  # a worker.Data, or None
  job: transformer_job.TransformerJob
  stage: stage_lib.Stage
  programs: compilation.Programs
  captures: capture_programs.CapturePrograms

  @classmethod
  def compile(
    cls, config: run_settings.RunConfig, index: int, data: worker.Data | None
  ) -> Rebuilder:
    """Compiles a stage's programs."""
    job = transformer_job.of(config)
    stage = job.build_stage(index, team=(0,))
    captures = capture_programs.CapturePrograms(
      stage_lib.layout_of(stage), records_gradients=True
    )
    captures.compile()
    return cls(
      index=index,
      data=data,
      job=job,
      stage=stage,
      programs=stage.compile(),
      captures=captures,
    )

  def rebuild(
    self,
    run: stored_run.StoredRun,
    say: Callable[[str], None],
    iteration: int | None = None,
    start: int | None = None,
  ) -> Rebuilt:
    """Rebuilds the stage's state from the newest start that leads to it.

    Args:
      run: the scanned run; its stores are not in use.
      say: told what is damaged, and why an older start is taken.
      iteration: the state's iteration; None for the newest that can be made.
      start: the snapshot to start from; no other is then tried.

    Raises:
      UnreachableError: there is no such start (any more).
      errors.ConfigError: the initial state is needed and --init_from is not
        what it was.
      errors.MoetionError: `start` is given, and leads to something else.
    """
    for one in run.stages:
      for damage in one.damage:
        if one.stage == self.index or damage.kind is stored_run.DamageKind.LOG:
          say(damage.message)
    excluded: set[int] = set()
    while True:
      candidate, goal = choose(
        run.candidates(self.index), iteration, start, excluded
      )
      attempt = _Attempt(self, run, candidate.start)
      suspects: set[int] = set()
      key: keys.EntryKey | None = None
      done = None
      try:
        done = attempt.run(goal)
      except errors.ConfigError:
        raise
      except errors.MoetionError as error:
        if start is not None:
          raise
        say(f'Not from snapshot {candidate.start.iteration}: {error}')
        suspects = set(error.suspects)
        if isinstance(error, stored_log.EntryLostError):
          key = error.key
        if key is None and not attempt.damaged:
          excluded.add(candidate.start.iteration)
      for damaged, message in sorted(attempt.damaged.items()):
        if damaged not in suspects:  # else the error told of it
          say(f'Snapshot {damaged} is not used: {message}')
      if done:
        return done
      run = run.without(
        {(self.index, i) for i in suspects | attempt.damaged.keys()},
        [key] if key else [],
      )


class _Attempt:
  """One conversion from one start.

  Attributes:
    damaged: errors of snapshots that could not be read, by iteration.
  """

  def __init__(
    self, tools: Rebuilder, run: stored_run.StoredRun, start: coverage.Start
  ):
    self.damaged: dict[int, str] = {}
    self._tools = tools
    self._run = run
    self._start = start
    self._read: set[int] = set()
    self._losses: list[int] = []
    self._whole_digests: list[int] = []

  def run(self, goal: int) -> Rebuilt:
    """Trains from the start to `goal`, as a recovering worker does."""
    one = self._run.stages[self._tools.index]
    log = stored_log.StoredLog(
      keys.WorkerId(self._tools.index, 0, _GENERATION), self._run.stages
    )
    restoring = conversion.Conversion(
      self._tools.captures,
      self._tools.programs.digest,
      self._initial_state,
      self._load,
      conversion.Route(
        start=self._start,
        newest=max(one.snapshots, default=0),
        initial=self._run.initial,
        unverified_until=one.unverified_until,
        applied=range(
          self._start.iteration + 1, min(self._start.applied_until, goal) + 1
        ),
      ),
    )
    with contextlib.closing(log):
      log.start()
      stage_worker = worker.Worker(
        self._tools.index,
        self._tools.stage,
        self._tools.programs,
        restoring.begin(),
        log,
        self._tools.data,
        range(self._run.train.replicas),
      )
      stage_worker.iteration = self._start.iteration
      stage_worker.train(
        # An evaluation changes no state.
        dataclasses.replace(self._run.train, eval_every=0),
        self._compare,
        lambda: stage_worker.iteration >= goal,
        first_iteration=self._start.iteration + 1,
        conversion=restoring,
      )
    state = stage_worker.state
    return Rebuilt(
      stage=self._tools.index,
      iteration=goal,
      state=state,
      digests=self._tools.stage.partition.by_operator(
        self._tools.programs.digest(state)
      ),
      start=self._start.iteration,
      complete_at=self._start.complete_at,
      snapshots=tuple(sorted(self._read)),
      losses=tuple(self._losses),
      whole_digests=tuple(self._whole_digests),
      entries=log.compared,
      applied_updates=max(
        min(self._start.applied_until, goal) - self._start.iteration, 0
      ),
    )

  def _initial_state(self) -> partition.State:
    if base := self._run.base:
      tree = checkpoint_file.load(base.path, 'workdir', base.digest)
      stage = self._tools.stage
      return restore.initial(stage, tree, base.path, 'workdir')()
    digest = self._run.found_out.get(held_run.INIT_DIGEST, '')
    job = transformer_job.of(self._run.config, digest)
    return job.initial(self._tools.stage)()

  def _load(self, iteration: int) -> snapshot_lib.Snapshot:
    """Loads a snapshot, verified. Conversions compare the digests of each."""
    info = self._run.stages[self._tools.index].snapshots.get(iteration)
    if info is None or not info.shares:
      raise errors.StoreError('there is none, or it was damaged')
    try:
      snapshot = reader.load(
        self._tools.captures.layout,
        iteration,
        (share.store for share in info.shares),
      )
    except errors.StoreError as error:
      self.damaged[iteration] = str(error)
      raise
    is_compared = (
      iteration > self._run.stages[self._tools.index].unverified_until
    )
    if is_compared and conversion.DIGESTS in snapshot.extras:
      self._read.add(iteration)
    return snapshot

  def _compare(self, one: report.Report) -> None:
    """Compares a replayed iteration with its line, if there is one."""
    line = self._run.metrics.get(one.iteration)
    if line is None:
      return
    self._equal(one.iteration, 'loss', float(one.loss).hex(), line['loss_hex'])
    self._losses.append(one.iteration)
    digests = dict(one.digests)
    for other in self._run.stages:
      if other.stage != self._tools.index:
        theirs = other.digests(one.iteration)
        if theirs is None or one.iteration <= other.unverified_until:
          return
        digests |= theirs
    found = report.combine(digests)
    self._equal(one.iteration, 'digest of the state', found, line['digest'])
    self._whole_digests.append(one.iteration)

  def _equal(self, iteration: int, what: str, found: str, was: object) -> None:
    if found != was:
      raise DifferentError(
        f'the {what} of iteration {iteration} is {found}, but metrics.jsonl '
        f'has {was}'
      )


def choose(
  candidates: Collection[stored_run.Candidate],
  iteration: int | None = None,
  start: int | None = None,
  excluded: Collection[int] = (),
) -> tuple[stored_run.Candidate, int]:
  """Chooses the start to take, and the iteration to go to from it.

  Args:
    candidates: the valid starts of a stage.
    iteration: the iteration to reach; None for the newest that can be.
    start: the iteration to start from; None for the newest that leads there.
    excluded: iterations of starts that turned out to be no good.

  Raises:
    UnreachableError: there is no such start; the message says what there is.
  """
  usable = [
    c for c in candidates if c.is_usable and c.start.iteration not in excluded
  ]
  if start is not None:
    named = [c for c in usable if c.start.iteration == start]
    if not named:
      raise UnreachableError(
        f'snapshot {start} is no start that leads to a whole state; '
        f'{_describe(candidates)}'
      )
    usable = named
  goal = iteration
  if goal is None:
    goal = max((c.reaches for c in usable), default=0)
    if not goal and start is None:
      raise UnreachableError(
        'nothing is left but the initial state (--iteration=0); '
        + _describe(candidates)
      )
  reaching = [c for c in usable if c.start.complete_at <= goal <= c.reaches]
  if not reaching:
    raise UnreachableError(
      f'iteration {goal} cannot be reached; {_describe(candidates)}'
    )
  return max(reaching, key=lambda c: c.start.iteration), goal


def _describe(candidates: Collection[stored_run.Candidate]) -> str:
  """Lists the starts, for an error about one that is not there."""
  texts = []
  for one in candidates:
    if one.is_usable:
      runs = [(one.start.complete_at, one.reaches)]
      texts.append(
        f'{one.start.iteration} leads to {stored_run.format_runs(runs)}'
      )
  text = 'starts: ' + ('; '.join(texts) or 'none')
  newest = max(candidates, key=lambda c: c.reaches, default=None)
  if newest and newest.missing:
    text += f'. Beyond {newest.reaches} the logs have no {newest.missing}'
  return text
