"""Runs whose snapshots stay, and conversions from them, in one process.

A run trains all its stages with snapshots of every stage, and remembers every
state; a conversion then does what a worker that takes a dead one's place does,
and holds what comes out against what was remembered, bit for bit.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import pathlib
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any

import chex
import jax
import numpy as np

from launch.lm import settings as run_settings, transformer_job
from moetion_jax import errors, keys, report as report_lib
from moetion_jax.capture import (
  conversion as conversion_lib,
  programs as capture_programs,
  snapshotter as snapshotter_lib,
)
from moetion_jax.logs import memory_log
from moetion_jax.policies import decision as decision_lib, slots
from moetion_jax.policies.kinds import registry
from moetion_jax.programs import compilation, stage as stage_lib
from moetion_jax.recovery import inventory as inventory_lib
from moetion_jax.snapshots import (
  coverage,
  file as snapshot_file,
  folders,
  memory_store,
  snapshot,
)
from moetion_jax.state import layout
from moetion_jax.training import worker
from tests.support import helpers, one_process

# One MoE layer a stage: eight experts, so that four devices have two each.
_MODEL = {
  'sequence_length': 8,
  'num_layers': 1,
  'first_dense_layers': 0,
  'model_dim': 16,
  'head_dim': 8,
  'num_experts': 8,
  'expert_dim': 16,
  'shared_dim': 16,
}
ITERATIONS = 10
_SPARE_BYTES = 1 << 20  # of a data file: digests, scalars, padding


def run_config(
  *, optimizer: dict, model: dict | None = None, **train
) -> run_settings.RunConfig:
  """A run of ITERATIONS iterations with as many layers as stages.

  Args:
    optimizer: fields of OptimizerConfig.
    model: fields of ModelConfig.
    **train: fields of TrainConfig.
  """
  train = {'stages': 1, **train}
  return helpers.micro_run(
    model={**_MODEL, 'num_layers': train['stages'], **(model or {})},
    optimizer={'warmup_iterations': 3, 'decay_iterations': 7, **optimizer},
    **{
      'iterations': ITERATIONS,
      'microbatch_size': 4,
      'eval_every': 4,
      'eval_microbatches': 1,
      **train,
    },
  )


@dataclasses.dataclass(frozen=True)
class Piece:
  """Some iterations of a run with one window.

  Attributes:
    first_iteration: of them.
    window_length: slots are empty if it is more than there are operators.
    mode: of `slots.MODES`.
    seed: of the operators' order.
    replay: of `decision.REPLAYS`.
    every: iterations from one slot to the next.
  """

  first_iteration: int
  window_length: int
  mode: str = 'rolling'
  seed: int = 0
  replay: str = decision_lib.MICROBATCHES
  every: int = 1

  def decision(self, of: layout.Layout) -> decision_lib.CaptureDecision:
    order = list(of.operators)
    np.random.default_rng(self.seed).shuffle(order)
    return decision_lib.CaptureDecision(
      first_iteration=self.first_iteration,
      window_length=self.window_length,
      mode=self.mode,
      replay=self.replay,
      every=self.every,
      slots=slots.make_slots(order, of.state_bytes(), self.window_length),
    )


@dataclasses.dataclass(frozen=True)
class Compiled:
  """One stage of a configuration."""

  stage: stage_lib.Stage
  programs: compilation.Programs
  captures: capture_programs.CapturePrograms


@functools.lru_cache(maxsize=2)
def compiled(
  config: run_settings.RunConfig, is_packed: bool = False
) -> tuple[Compiled, ...]:
  """All stages; compiling them takes longer than everything else."""
  made = []
  for index in range(config.train.stages):
    stage = transformer_job.of(config).build_stage(index)
    captures = capture_programs.CapturePrograms(
      stage_lib.layout_of(stage), is_packed, records_gradients=True
    )
    captures.compile()
    made.append(Compiled(stage, stage.compile(), captures))
  return tuple(made)


class Remembering(snapshotter_lib.Snapshotter):
  """Keeps every state that it sees."""

  def __init__(self, *arguments: Any):
    super().__init__(*arguments)
    self.states: dict[int, dict] = {}

  def take(self, iteration, state, compute, extras, mask=None, **fields):
    self.states[iteration] = to_host(state)
    return super().take(iteration, state, compute, extras, mask, **fields)


def to_host(state):
  return jax.tree.map(np.array, state)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
  """An undisturbed run, and what it left.

  Attributes:
    config: of the run.
    stages: compiled.
    folder: of the snapshots of all stages.
    states: by stage and iteration.
    reports: by stage, from iteration 1.
    entries: of all stages' logs.
  """

  config: run_settings.RunConfig
  stages: tuple[Compiled, ...]
  folder: pathlib.Path
  states: list[dict[int, dict]]
  reports: list[list[report_lib.Report]]
  entries: memory_log.MemoryStore

  def snapshots(self, index: int) -> dict[int, pathlib.Path]:
    """Directories of a stage's snapshots."""
    return snapshot_file.list_snapshots(self._folder_of(index))

  def _folder_of(self, index: int) -> pathlib.Path:
    return folders.snapshots_folder(self.folder, index, 0)

  def inventory(self) -> inventory_lib.Inventory:
    """Of what the folder says now."""
    found = inventory_lib.Inventory(
      registry.POLICIES['sparse'],
      [s.captures.layout.operators for s in self.stages],
      0,
    )
    for index in range(len(self.stages)):
      found.rescan(index, folders.read_shares(self.folder, index))
    return found

  def starts(self, index: int) -> tuple[coverage.Start, ...]:
    """The valid starts of a stage."""
    return self.inventory().starts(index)

  def load(self, index: int, iteration: int) -> snapshot.Snapshot:
    """As a worker does."""
    path = self.snapshots(index).get(iteration)
    if path is None:
      raise errors.StoreError(f'snapshot {iteration} is missing')
    stored = snapshot_file.open_snapshot(path, verify=True)
    return snapshot.from_arrays(
      self.stages[index].captures.layout, stored.metadata, stored.arrays
    )

  def conversion(
    self, index: int, start: coverage.Start, newest: int | None = None
  ) -> conversion_lib.Conversion:
    """A conversion of a stage that knows of snapshots up to `newest`."""
    one = self.stages[index]
    if newest is None:
      newest = max(self.snapshots(index), default=0)
    return conversion_lib.Conversion(
      one.captures,
      one.programs.digest,
      one.stage.initial_state,
      functools.partial(self.load, index),
      conversion_lib.Route(
        start=start,
        newest=newest,
        applied=range(
          start.iteration + 1, min(start.applied_until, newest) + 1
        ),
      ),
    )

  def snapshotter(self, index: int, pieces: Sequence[Piece]) -> Remembering:
    """Not started."""
    captures = self.stages[index].captures
    first, *later = (p.decision(captures.layout) for p in pieces)
    whole = sum(captures.layout.state_bytes().values())
    taker = Remembering(
      captures,
      memory_store.SnapshotStore(
        self._folder_of(index),
        whole + sum(captures.layout.gradient_bytes().values()) + _SPARE_BYTES,
        self.config.train.iterations + 1,
      ),
      first,
      {'stage': index, 'replica': 0, 'replicas': 1},
    )
    for decision in later:
      taker.decide(decision)
    return taker

  def convert(
    self,
    index: int,
    start: coverage.Start,
    *,
    newest: int | None = None,
    until: int | None = None,
    snapshots: snapshotter_lib.Snapshotter | None = None,
  ) -> conversion_lib.Conversion:
    """Rebuilds a stage, trains on, and compares every state on the way.

    Args:
      index: of the stage.
      start: of the conversion.
      newest: snapshot that there is; None: all that are in the folder.
      until: iteration after which it ends; None: the last one.
      snapshots: takes more of them meanwhile.
    """
    one = self.stages[index]
    until = until or self.config.train.iterations
    rebuilding = self.conversion(index, start, newest)
    log = memory_log.MemoryLog(keys.WorkerId(index, 0, 2), self.entries)
    new = worker.Worker(
      index,
      one.stage,
      one.programs,
      rebuilding.begin(),
      log,
      transformer_job.of(self.config).data(),
    )
    new.iteration = start.iteration
    compared = []

    def look() -> bool:
      if new.iteration >= start.complete_at:
        chex.assert_trees_all_equal(
          to_host(new.state), self.states[index][new.iteration]
        )
        compared.append(new.iteration)
      return new.iteration >= until

    reports: list[report_lib.Report] = []
    new.train(
      self.config.train,
      reports.append,
      look,
      first_iteration=start.iteration + 1,
      snapshots=snapshots,
      conversion=rebuilding,
      retain=lambda iteration: None,
    )
    if new.iteration == self.config.train.iterations and not (
      compared and compared[-1] == new.iteration
    ):
      look()
    assert compared == list(range(start.complete_at, until + 1))
    assert rebuilding.is_complete
    for ours in reports:
      _assert_same(ours, self.reports[index][ours.iteration - 1])
    return rebuilding

  def recover(self, index: int) -> tuple[conversion_lib.Conversion, list[int]]:
    """Converts from the newest start that can be read, as the agent does.

    Returns:
      The conversion, and the iterations of the snapshots that were lost.
    """
    known, lost = self.inventory(), []
    while True:
      start = known.starts(index)[-1]
      try:
        return self.convert(index, start, newest=known.newest(index)), lost
      except conversion_lib.SnapshotLostError as error:
        for iteration in error.suspects:
          known.lose(index, iteration)
          lost.append(iteration)


def _assert_same(ours: report_lib.Report, theirs: report_lib.Report) -> None:
  names = ('iteration', 'updated', 'dropped', 'eval_loss', 'load')
  for name in names:
    assert getattr(ours, name) == getattr(theirs, name), name
  for name in ('loss', 'auxiliary_loss', 'grad_norm'):
    a, b = float(getattr(ours, name)), float(getattr(theirs, name))
    assert a.hex() == b.hex(), name
  chex.assert_trees_all_equal(ours.digests, theirs.digests)


@contextlib.contextmanager
def recorded(
  config: run_settings.RunConfig,
  pieces: Sequence[Piece],
  is_packed: bool = False,
) -> Iterator[Run]:
  """Trains a run to its end; what it left is gone afterwards."""
  folder = pathlib.Path(tempfile.mkdtemp(dir='/dev/shm', prefix='conversion-'))
  run = Run(
    config=config,
    stages=compiled(config, is_packed),
    folder=folder,
    states=[],
    reports=[[] for _ in range(config.train.stages)],
    entries=memory_log.MemoryStore(),
  )
  try:
    data = transformer_job.of(config).data()
    workers, options = [], []
    with contextlib.ExitStack() as stack:
      for index, one in enumerate(run.stages):
        taker = run.snapshotter(index, pieces)
        state = one.stage.initial_state()
        run.states.append(taker.states)
        taker.states[0] = to_host(state)
        taker.start()
        stack.callback(taker.close)
        log = memory_log.MemoryLog(keys.WorkerId(index, 0, 1), run.entries)
        workers.append(
          worker.Worker(index, one.stage, one.programs, state, log, data)
        )
        options.append({'snapshots': taker, 'retain': lambda iteration: None})

      def report(one):
        for index, part in enumerate(one):
          run.reports[index].append(part)

      one_process.train(config, workers, report, options=options)
      for option in options:
        option['snapshots'].flush()
    yield run
  finally:
    shutil.rmtree(folder, ignore_errors=True)
