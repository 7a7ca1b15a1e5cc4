"""The content of a run's host stores, and the states that can be made of it.

Values, made by `scan`, and functions of them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import functools
import pathlib
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np

from launch.lm import settings as run_settings
from launch.offline import entries as entries_lib
from moetion_jax import codec, config as config_lib, errors, job_spec, keys
from moetion_jax.hostmem import entry, segment
from moetion_jax.recovery import splice as splice_lib
from moetion_jax.runtime.records import files as record_files
from moetion_jax.snapshots import coverage, interface as snapshots_interface

# As in `capture/conversion`, which imports JAX.
DIGESTS, PARTIALS = 'digests', 'partials'
_UNKNOWN = '?'  # group of operators whose names are not known


# --- What there is -----------------------------------------------------------


class DamageKind(enum.StrEnum):
  """What is damaged."""

  SNAPSHOT = 'snapshot'
  ENTRY = 'entry'
  LOG = 'log'


@dataclasses.dataclass(frozen=True, kw_only=True)
class Damage:
  """Something stored that is not as it was written.

  Attributes:
    stage: the stage it belongs to.
    kind: what is damaged.
    iteration: its iteration; None for a whole log.
    message: text that names file and damage.
    key: the entry's key; None for snapshots and logs.
  """

  stage: int
  kind: DamageKind
  iteration: int | None
  message: str
  key: keys.EntryKey | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class ShareInfo:
  """One worker's snapshot of an iteration, whose manifest is whole.

  Attributes:
    store: the worker's snapshots.
    path: the snapshot's file or directory.
    size_bytes: size of all its buffers.
    share: the operators that it holds.
    digests: number of operators whose digests it holds; 0 for none.
    digest_names: those operators; (): all of the stage.
    has_partials: whether it holds all stages' scalars.
  """

  store: snapshots_interface.StoredSnapshots
  path: pathlib.Path
  size_bytes: int
  share: coverage.Share
  digests: int
  digest_names: tuple[keys.OperatorId, ...] = ()
  has_partials: bool

  def is_there(self) -> bool:
    """Returns whether it is still there: a living run retires snapshots."""
    return self.share.iteration in self.store.iterations()


@dataclasses.dataclass(frozen=True, kw_only=True)
class SnapshotInfo:
  """The shares found of a stage's snapshot of one iteration.

  Attributes:
    found: all shares, those of teams of another size too.
  """

  found: tuple[ShareInfo, ...]

  @functools.cached_property
  def shares(self) -> tuple[ShareInfo, ...]:
    """Shares that make the snapshot, by replica; () while one is missing."""
    named = {one.share.name: one for one in self.found}
    teams = coverage.whole_teams(named).values()
    return tuple(named[name] for team in teams for name in team)

  @property
  def path(self) -> pathlib.Path:
    """The directory of its first share."""
    return (self.shares or self.found)[0].path

  @property
  def size_bytes(self) -> int:
    """Size of the shares that make it."""
    return sum(one.size_bytes for one in self.shares or self.found)

  @property
  def state(self) -> frozenset[keys.OperatorId]:
    """Operators whose training state it holds."""
    every = (one.share.state for one in self.shares or self.found)
    return frozenset().union(*every)

  @property
  def compute(self) -> frozenset[keys.OperatorId]:
    """Operators whose compute weights it holds."""
    every = (one.share.compute for one in self.shares or self.found)
    return frozenset().union(*every)

  @property
  def gradients(self) -> frozenset[keys.OperatorId]:
    """Operators whose gradients it holds."""
    every = (one.share.gradients for one in self.shares or self.found)
    return frozenset().union(*every)

  @property
  def covered(self) -> frozenset[keys.OperatorId]:
    """Operators that it holds anything of."""
    return self.state | self.compute | self.gradients

  @property
  def digests(self) -> int:
    """Number of operators whose digests it holds; 0 for none."""
    named = [one.digests for one in self.shares if one.digest_names]
    return sum(named) if named else max(s.digests for s in self.found)

  @property
  def has_partials(self) -> bool:
    """True if it holds all stages' scalars."""
    return any(one.has_partials for one in self.shares)


@dataclasses.dataclass(frozen=True, kw_only=True)
class StoredStage:
  """The content of a store for one stage, all its replicas together.

  Attributes:
    stage: the stage's number.
    folder: the store of its host.
    generation: newest generation of workers that wrote its logs; 0: none did.
    segment_bytes: size of its logs' files.
    snapshots: its snapshots by iteration, ascending; some may lack a share.
    entries: the entries of its logs, by key.
    damage: damage seen without reading any data.
    splices: where the run went on with other software; none lies between a
      start and what can be made of it.
    only_start: the start of a splice that was begun and not finished: no other
      one counts, and no entry; None if there is no such splice.
    initial: iteration of the initial state.
  """

  stage: int
  folder: pathlib.Path
  generation: int = 0
  segment_bytes: int = 0
  snapshots: Mapping[int, SnapshotInfo]
  entries: Mapping[keys.EntryKey, entry.EntryHeader]
  damage: tuple[Damage, ...] = ()
  splices: tuple[splice_lib.Splice, ...] = ()
  only_start: int | None = None
  initial: int = 0

  def segment_path(self, replica: int) -> pathlib.Path:
    """Returns the path of a replica's log file."""
    return segment.segment_path(self.folder, self.stage, replica)

  @functools.cached_property
  def operators(self) -> frozenset[keys.OperatorId]:
    """The stage's operators; those that no snapshot holds are named '?'."""
    infos = self.snapshots.values()
    known = frozenset().union(*(s.covered for s in infos))
    number = max((s.digests for s in infos), default=0)
    unknown = range(len(known), number)
    return known | {keys.OperatorId(_UNKNOWN, i) for i in unknown}

  @functools.cached_property
  def starts(self) -> tuple[coverage.Start, ...]:
    """Valid starts of a conversion, the initial state included."""
    shares = [
      x.share
      for iteration, info in self.snapshots.items()
      for x in info.shares
      if iteration > self.initial
    ]
    starts = coverage.valid_starts(
      (
        coverage.initial_record(self.operators, self.initial),
        *coverage.complete_records(shares),
      ),
      self.operators,
    )
    return tuple(
      start
      for start in starts
      if self.only_start in (None, start.iteration)
      and splice_lib.allows(
        self.splices,
        self.stage,
        start.iteration,
        is_running=True,
        initial=self.initial,
      )
    )

  @property
  def unverified_until(self) -> int:
    """The last iteration whose recorded digests say nothing; 0: none."""
    return splice_lib.unverified_until(self.splices, self.stage)

  def digests(self, iteration: int) -> dict[keys.OperatorId, np.ndarray] | None:
    """Reads the digests of all operators from an iteration's snapshot.

    Returns None if it lacks them or they are damaged, or if it is not known
    whose they are: snapshots of a part (`--policy=partial`) do not name all
    operators.
    """
    info = self.snapshots.get(iteration)
    if info is None or any(o.group == _UNKNOWN for o in self.operators):
      return None  # the names of all operators tell whose they are
    found: dict[keys.OperatorId, np.ndarray] = {}
    for one in info.shares:
      # In the order of `partition.Partition.operators`.
      names = one.digest_names or tuple(sorted(self.operators))
      if not one.digests or one.digests != len(names):
        return None
      with contextlib.suppress(errors.StoreError):
        with one.store.open(iteration) as stored:
          stored.verify(DIGESTS)
          rows = np.array(stored.arrays[DIGESTS])
          found |= dict(zip(names, rows, strict=True))
    return found if found.keys() == self.operators else None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Candidate:
  """A valid start, and how far the stored entries lead from it.

  Attributes:
    start: where the conversion starts, and where it is complete.
    reaches: newest iteration that can be replayed.
    missing: the entry that the next iteration lacks; None if `reaches` is the
      last iteration of the run.
  """

  start: coverage.Start
  reaches: int
  missing: keys.EntryKey | None

  @property
  def is_usable(self) -> bool:
    """True if it leads to a whole state."""
    return self.reaches >= self.start.complete_at


@dataclasses.dataclass(frozen=True, kw_only=True)
class StoredRun:
  """A run and the content of its stores.

  Attributes:
    workdir: the run's folder, an absolute path.
    settings: the run's settings, as config.json has them.
    found_out: see `scan.read_settings`.
    folders: the run's stores.
    base: the checkpoint from which the run goes on, as it is trained longer;
      None for none.
    stages: the stores' content, by stage.
  """

  workdir: pathlib.Path
  settings: Mapping[str, Any]
  found_out: Mapping[str, Any]
  folders: tuple[pathlib.Path, ...]
  base: job_spec.Base | None = None
  stages: tuple[StoredStage, ...] = ()

  @functools.cached_property
  def train(self) -> config_lib.TrainConfig:
    """Settings of training and of its spread, whatever the job is."""
    return codec.decode(config_lib.TrainConfig, self.settings['train'])

  @functools.cached_property
  def config(self) -> run_settings.RunConfig:
    """The settings of a run of launch.train.

    Raises:
      errors.ConfigError: the run is of another job, whose model nobody here
        knows.
    """
    try:
      return codec.decode(run_settings.RunConfig, self.settings)
    except (ValueError, KeyError, TypeError) as error:
      raise errors.ConfigError(
        'workdir',
        str(self.workdir),
        'holds a run of another job than that of launch.train, or of another '
        f'version ({error}): its states cannot be made here. The command '
        'that began it goes on from what it left',
      ) from error

  @property
  def only_start(self) -> int | None:
    """The only start that counts, see `StoredStage`; None: all do."""
    return next((one.only_start for one in self.stages), None)

  @property
  def caution(self) -> str:
    """Says why one start counts only; '' if all do."""
    if self.only_start is None:
      return ''
    return (
      'The run ended while it went over to other software: it begins again '
      f'with state {self.newest_common_start or self.initial}, and drops its '
      'logs and all later starts.'
    )

  @property
  def initial(self) -> int:
    """Iteration of the initial state."""
    train = self.train
    return self.base.iteration if self.base else train.initial_iteration

  @property
  def newest_common_start(self) -> int | None:
    """The newest start that is valid in all stages; None if there is none."""
    starts = [{s.iteration for s in one.starts} for one in self.stages]
    return max(set.intersection(*starts), default=None)

  @functools.cached_property
  def metrics(self) -> Mapping[int, Mapping[str, object]]:
    """Lines of metrics.jsonl by iteration."""
    return record_files.read_lines(self.workdir / 'metrics.jsonl')

  def candidates(self, stage: int) -> tuple[Candidate, ...]:
    """Returns a stage's valid starts, ascending, and how far each leads."""
    train, one = self.train, self.stages[stage]
    found: list[Candidate] = []
    for start in reversed(one.starts):
      # Recorded gradients need no entries.
      reaches = max(start.iteration, start.applied_until)
      missing = None
      while reaches < train.iterations and missing is None:
        if found and reaches == max(
          found[-1].start.iteration, found[-1].start.applied_until
        ):
          reaches, missing = found[-1].reaches, found[-1].missing
          break
        info = one.snapshots.get(reaches + 1)
        has_scalars = reaches + 1 > one.unverified_until and bool(
          info and info.has_partials
        )
        missing = next(
          (
            key
            for key in entries_lib.needed_entries(
              train,
              stage,
              reaches + 1,
              scalars=not has_scalars,
            )
            if key not in self.stages[key.stage].entries
          ),
          None,
        )
        reaches += missing is None
      found.append(Candidate(start=start, reaches=reaches, missing=missing))
    return tuple(reversed(found))

  def without(
    self,
    snapshots: Collection[tuple[int, int | None]] = (),
    entries: Collection[keys.EntryKey] = (),
  ) -> StoredRun:
    """Returns the same run without some snapshots and entries.

    Args:
      snapshots: stage and iteration of each snapshot to leave out.
      entries: keys of the entries to leave out.
    """
    gone = frozenset(entries)
    stages = tuple(
      dataclasses.replace(
        one,
        snapshots={
          i: info
          for i, info in one.snapshots.items()
          if (one.stage, i) not in snapshots
        },
        entries={k: h for k, h in one.entries.items() if k not in gone},
      )
      for one in self.stages
    )
    return dataclasses.replace(self, stages=stages)


# --- What a conversion needs -------------------------------------------------


def whole_iterations(
  train: config_lib.TrainConfig, one: StoredStage
) -> list[tuple[int, int]]:
  """Returns runs [first, last] of iterations whose entries are all there."""
  return runs_of(
    [
      iteration
      for iteration in {key.iteration for key in one.entries}
      if all(
        key in one.entries
        for key in entries_lib.published_entries(train, one.stage, iteration)
      )
    ]
  )


def runs_of(iterations: Collection[int]) -> list[tuple[int, int]]:
  """Groups iterations into runs [first, last], ascending."""
  runs: list[tuple[int, int]] = []
  for iteration in sorted(iterations):
    if runs and runs[-1][1] == iteration - 1:
      runs[-1] = runs[-1][0], iteration
    else:
      runs.append((iteration, iteration))
  return runs


def format_runs(runs: Collection[Sequence[int]]) -> str:
  """Formats runs for people: '3 to 5, 7'."""
  return ', '.join(
    f'{run[0]}' if run[0] == run[1] else f'{run[0]} to {run[1]}' for run in runs
  )
