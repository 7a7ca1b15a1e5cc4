"""Cost of snapshots: `launch.benchmark snapshot`.

One stage that holds the whole model is trained in this process, in blocks of
some iterations: with no snapshots, with sparse ones for each way of replay,
with Orbax saving the whole state as often as it can, and once a window. `again`
has no snapshots either, in another worker: it shows how much two equal workers
differ.

A block begins with an iteration that is not timed, and the copy that its last
one leaves behind has ended before the next block begins. So every measured
iteration runs beside the copy of the one before it, or waits for it, as in a
long run; no method pays for a copy that nobody waits for.
"""

from __future__ import annotations

import contextlib
import math
import pathlib
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from launch.benchmark.harness import (
  dense_job,
  one_stage,
  profile_reader,
  scratch,
  summary,
)
from launch.lm import settings as run_settings
from moetion_jax import report as report_lib
from moetion_jax.capture import programs as capture_programs, snapshotter
from moetion_jax.policies import (
  decision as decision_lib,
  settings as capture_settings,
)
from moetion_jax.policies.kinds import sparse
from moetion_jax.programs import stage
from moetion_jax.snapshots import memory_store
from moetion_jax.training import job as job_lib

# A block has as many iterations as take so long, and a multiple of
# _ORBAX_EVERY.
_BLOCK_SECONDS = 4.0
_SHORTEST_BLOCK = 8
_ORBAX_EVERY = 4
_WARM_UP_ITERATIONS = 7
_PADDING_BYTES = 1 << 20
_POOL_FILES = 4
SUBJECTS = ('often', 'window')  # beside `none` and `sparse`, by default


class _TimedBlock:
  """The common length of all blocks."""

  iterations = _SHORTEST_BLOCK

  def choose(self, iteration_seconds: float) -> None:
    """Sets the length of the blocks from a measured iteration."""
    wanted = max(_SHORTEST_BLOCK, _BLOCK_SECONDS / iteration_seconds)
    self.iterations = math.ceil(wanted / _ORBAX_EVERY) * _ORBAX_EVERY


class _Subject:
  """A worker of its own, with a method of capturing its state."""

  def __init__(self, config: run_settings.RunConfig, block: _TimedBlock):
    self.block = block
    self.worker = one_stage.make_worker(config)
    self._config = config
    # Time of the training thread for every snapshot: until it goes on, at work,
    # and waiting for the snapshot before.
    self.blocked_seconds: list[float] = []
    self.cpu_seconds: list[float] = []
    self.late_seconds: list[float] = []
    # CPU time of the training thread in every block.
    self.training_seconds: list[float] = []
    self.iteration = 0

  def run(self, number: int) -> float:
    """Trains one block; returns the seconds of its measured iterations."""
    del number
    first = self.iteration + 1  # not measured
    last = first + self.block.iterations
    self.worker.iteration = self.iteration
    begin = cpu = 0.0

    def stop() -> bool:
      nonlocal begin, cpu
      if self.worker.iteration == first:
        jax.block_until_ready(self.worker.state)
        begin, cpu = time.perf_counter(), time.thread_time()
      return self.worker.iteration >= last

    self.worker.train(
      self._config.train,
      lambda report: None,
      stop,
      first_iteration=first,
      snapshots=self.snapshots(),
    )
    jax.block_until_ready(self.worker.state)
    seconds = time.perf_counter() - begin
    self.training_seconds.append(time.thread_time() - cpu)
    self.iteration = last
    self.flush()
    return seconds

  def snapshots(self) -> Any:
    """Returns what `Worker.train` takes as `snapshots`; None for none."""
    return None

  def flush(self) -> None:
    """Waits for snapshots in progress."""

  def close(self) -> None:
    """Ends the subject's threads."""


class _Nothing(_Subject):
  """No snapshots. Runs first, and so chooses the length of the blocks."""

  def run(self, number: int) -> float:
    seconds = super().run(number)
    if number == 1:
      self.block.choose(seconds / self.block.iterations)
    return seconds


class _Timed:
  """A snapshotter whose calls are timed."""

  def __init__(self, subject: _Subject, inner: Any):
    self._subject = subject
    self._inner = inner

  def __getattr__(self, name: str) -> Any:
    return getattr(self._inner, name)

  def take(self, *arguments: Any, **fields: Any) -> snapshotter.TakenSnapshot:
    begin, cpu = time.perf_counter(), time.thread_time()
    taken = self._inner.take(*arguments, **fields)
    subject = self._subject
    subject.blocked_seconds.append(time.perf_counter() - begin)
    subject.cpu_seconds.append(time.thread_time() - cpu)
    subject.late_seconds.append(taken.blocked_seconds)
    return taken

  def release(self) -> float:
    seconds = self._inner.release()
    if self._subject.blocked_seconds:  # it waited for the snapshot before
      self._subject.blocked_seconds[-1] += seconds
    return seconds


class _Sparse(_Subject):
  """Sparse snapshots, with the chosen window."""

  def __init__(
    self,
    config: run_settings.RunConfig,
    block: _TimedBlock,
    folder: pathlib.Path,
    settings: capture_settings.CaptureSettings,
  ):
    super().__init__(config, block)
    layout = stage.layout_of(self.worker.stage)
    self.programs = capture_programs.CapturePrograms(
      layout, records_gradients=settings.records_gradients
    )
    self.programs.compile()
    self.sizes = job_lib.stage_sizes(layout, 1)
    self.records_gradients = settings.records_gradients
    self._planner = sparse.SparsePlanner(
      settings,
      [self.sizes],
      jax.default_backend(),
    )
    (decision,) = self._planner.decisions(1)
    (pool,) = self._planner.pools()
    self._taker = snapshotter.Snapshotter(
      self.programs,
      memory_store.SnapshotStore(
        folder, pool.size_bytes + _PADDING_BYTES, _POOL_FILES
      ),
      decision,
      {'stage': 0, 'replica': 0, 'replicas': 1},
    )
    self._taker.start()

  @property
  def window(self) -> str:
    """Name of the window in force."""
    choice = self._planner.choice
    if choice.every > 1:
      return f'whole, every {choice.every}'
    return f'{choice.mode}, {choice.window_length}'

  def choose(self, reports: Sequence[report_lib.Report]) -> None:
    """Chooses the window as a run does after its warm-up."""
    for one in reports:
      if self._planner.add([one]):
        (decision,) = self._planner.decisions(self.iteration + 1)
        self._taker.decide(decision)

  def run(self, number: int) -> float:
    if number == 1:  # a warm-up round: measured as in a run
      reports: list[report_lib.Report] = []
      last = self.iteration + _WARM_UP_ITERATIONS
      begin = time.perf_counter()
      self.worker.train(
        self._config.train,
        reports.append,
        lambda: self.worker.iteration >= last,
        first_iteration=self.iteration + 1,
        snapshots=self._taker,
      )
      self.iteration = last
      self.choose(reports)
      for seconds in (
        self.blocked_seconds,
        self.cpu_seconds,
        self.late_seconds,
      ):
        seconds.clear()
      return time.perf_counter() - begin
    return super().run(number)

  def snapshots(self) -> Any:
    # Only the newest few are kept.
    self._taker.retain(self.iteration + 1)
    return _Timed(self, self._taker)

  def flush(self) -> None:
    self._taker.flush()

  def close(self) -> None:
    self._taker.close()


class _Dense(_Subject):
  """Orbax's AsyncCheckpointer, saving the whole state."""

  def __init__(
    self,
    config: run_settings.RunConfig,
    block: _TimedBlock,
    folder: pathlib.Path,
    every: int,
  ):
    super().__init__(config, block)
    self._saver = dense_job.DenseSaver(folder, every)

  def snapshots(self) -> Any:
    return _Timed(self, self._saver)

  def flush(self) -> None:
    self._saver.flush()

  def close(self) -> None:
    self._saver.close()


def rows(
  preset: str,
  rounds: int,
  hostmem_dir: str,
  *,
  subjects: Sequence[str] = SUBJECTS,
  train: Mapping[str, Any] | None = None,
  window_mode: str = '',
  replays: Sequence[str] = (decision_lib.MICROBATCHES,),
  profile_dir: str = '',
) -> list[summary.Row]:
  """Measures all subjects and returns the rows; see the module.

  Args:
    preset: name of the model's shape.
    rounds: measured blocks of every method.
    hostmem_dir: folder in tmpfs.
    subjects: methods beside `none` and `sparse`: 'often', 'window', 'again'.
    train: fields of the TrainConfig that differ from the preset; None values
      do not.
    window_mode: mode of the sparse snapshots; '' to choose, which on CPU often
      comes to no windows.
    replays: ways of replay that the sparse snapshots are for, of
      `decision.REPLAYS`.
    profile_dir: folder for the JAX profile of a block with sparse snapshots;
      '' for none.
  """
  config = run_settings.make(
    preset,
    model_overrides=[],
    train_overrides={
      'stages': 1,
      'eval_every': 0,
      'iterations': 100_000,
      **(train or {}),
    },
    optimizer_overrides={},
  )
  # Fills the cache: a subject that compiles its programs differs from one that
  # loads them.
  one_stage.make_worker(config)
  block = _TimedBlock()
  with scratch.folder(hostmem_dir) as root, contextlib.ExitStack() as stack:

    def made(kind: type[_Subject], name: str = '', *arguments: Any) -> Any:
      fields = ()
      if name:
        fields = (root / name, *arguments)
        (root / name).mkdir(mode=0o700)
      subject = kind(config, block, *fields)
      stack.callback(subject.close)
      return subject

    ours: dict[str, _Sparse] = {
      _name(replay): made(
        _Sparse,
        _name(replay),
        capture_settings.CaptureSettings(
          policy=sparse.Sparse(), window_mode=window_mode, replay=replay
        ),
      )
      for replay in replays
    }
    found: dict[str, _Subject] = {'none': made(_Nothing), **ours}
    others = {
      'again': ('none, again', lambda: made(_Subject)),
      'often': (
        'orbax, every iteration',
        lambda: made(_Dense, 'often', 1),
      ),
      'window': (
        f'orbax, every {_ORBAX_EVERY}th',
        lambda: made(_Dense, 'window', _ORBAX_EVERY),
      ),
    }
    for key in subjects:
      name, make = others[key]
      found[name] = make()
    seconds = summary.interleave({n: s.run for n, s in found.items()}, rounds)
    profiled = [
      row
      for name, subject in ours.items()
      if profile_dir
      for row in _profile(name, subject, f'{profile_dir}/{name}')
    ]
  # Without recorded gradients and with them.
  goals = '<= 1.03', '<= 1.05'
  if jax.default_backend() != 'cpu':
    goals = '<= 1.01', '<= 1.05'
  out: list[summary.Row] = _paces('none', found['none'], seconds['none'])
  for name, subject in found.items():
    if isinstance(subject, _Nothing):
      continue
    is_ours = isinstance(subject, _Sparse)
    label = name
    if isinstance(subject, _Sparse):
      label = f'{name} ({subject.window})'
    out.append(
      (
        f'iteration, {label} / none',
        summary.paired_ratio(seconds[name], seconds['none']),
        goals[subject.records_gradients] if is_ours else '',
      )
    )
    out += _paces(label, subject, seconds[name])
    blocked = [s * 1e3 for s in subject.blocked_seconds]
    if not blocked:
      continue
    out += [
      (
        f'training thread blocked, {label}, ms',
        summary.summarize(blocked),
        'median <= 1' if is_ours else '',
      ),
      (
        f'training thread blocked, {label}, 95th percentile, ms',
        summary.summarize([float(np.percentile(blocked, 95))]),
        '<= 5' if is_ours else '',
      ),
    ]
    if is_ours:  # on CPU the update dispatched before has the cores
      out += [
        (
          f'of that {what}, {label}, ms',
          summary.summarize([s * 1e3 for s in values]),
          '',
        )
        for what, values in (
          ('at work', subject.cpu_seconds),
          ('waiting for the last copy', subject.late_seconds),
        )
      ]
  memory = [row for name, one in ours.items() for row in _memory(name, one)]
  return out + profiled + memory


def _name(replay: str) -> str:
  """Returns the name of sparse snapshots for a way of replay."""
  is_other = replay != decision_lib.MICROBATCHES
  return f'sparse, {replay}' if is_other else 'sparse'


def _paces(
  label: str, subject: _Subject, seconds: Sequence[float]
) -> list[summary.Row]:
  """Returns an iteration's length, and its training thread's time at work.

  The difference is what training waits for: a copy, the GIL, the device.
  """
  iterations = subject.block.iterations
  at_work = subject.training_seconds[-len(seconds) :]  # warm-ups come before
  return [
    (
      f'{what}, {label}, ms',
      summary.summarize([s / iterations * 1e3 for s in values]),
      '',
    )
    for what, values in (
      ('iteration', seconds),
      ('of that the training thread is at work', at_work),
    )
  ]


def _profile(name: str, sparse: _Sparse, folder: str) -> list[summary.Row]:
  """Profiles one more block: copies to the host beside computation."""
  options = jax.profiler.ProfileOptions()
  options.python_tracer_level = 0  # it makes the host several times slower
  sparse.block.iterations = _SHORTEST_BLOCK
  with jax.profiler.trace(folder, profiler_options=options):
    sparse.run(0)
  found = profile_reader.read(folder)
  return [
    (f'profile of {_SHORTEST_BLOCK + 1} iterations, {name}: {what}', value, '')
    for what, value in (
      ('device computes, ms', summary.summarize([found.busy_ms])),
      ('copies to the host, ms', summary.summarize([found.copies_ms])),
      (
        'of that beside computation, share',
        summary.summarize([found.overlapped]),
      ),
      ('from its begin to its end, ms', summary.summarize([found.span_ms])),
    )
    if found.busy_ms  # CPU devices have no streams
  ]


def _memory(name: str, sparse: _Sparse) -> list[summary.Row]:
  """Returns device memory beyond training: one slot, and what it refers to."""
  (decision,) = sparse._planner.decisions(1)
  state = sum(sparse.sizes.state_bytes.values())
  slot = max(
    sum(sparse.sizes.state_bytes[o] for o in slot) for slot in decision.slots
  )
  others, tree = 'compute', sparse.sizes.compute_bytes
  if sparse.records_gradients:
    others, tree = 'gradient', sparse.sizes.gradient_bytes
  return [
    (f'{what}, {name}, MB', summary.summarize([n / 1e6]), '')
    for what, n in (
      ('training state', state),
      ('device memory beyond training: largest slot', slot),
      (f'device memory beyond training: one {others} tree', sum(tree.values())),
    )
  ]
