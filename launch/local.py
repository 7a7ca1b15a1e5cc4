"""A whole run in one process: every stage a thread, logs in memory.

What the agent and its workers do across processes, without processes: the same
loop, programs and reports. The one-process cut of a model is what the
multi-process pipeline is held against, bit for bit.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from launch import capture_plan, checkpoint, data as data_lib, settings
from models import stages
from moetion_jax import (
  base,
  hostmem,
  layout as layout_lib,
  memory_log,
  mesh as mesh_lib,
  operators,
  optimizers,
  stage as stage_lib,
  worker,
)


def load_data(config: settings.RunConfig) -> data_lib.Dataset:
  """The run's text; raises base.ConfigError."""
  return data_lib.load(
    data_lib.DataConfig(
      data=config.data,
      data_dtype=config.data_dtype,
      sequence_length=config.model.sequence_length,
      microbatch_size=config.train.microbatch_size,
      microbatches=config.train.global_microbatches,
      vocab_size=config.model.vocab_size,
      seed=config.train.seed,
    )
  )


def declare_stage(
  config: settings.RunConfig,
  index: int,
  team: tuple[int, ...] | None = None,
  position: int | None = None,
  max_capacity_factor: float | None = None,
) -> stage_lib.Stage:
  """A stage of the run, without devices; creates no backend.

  Args:
    config: of the run.
    index: of the stage.
    team: the replicas that have a worker; None: all.
    position: of a worker in its stage world: with --shard_optimizer it has its
      share only; None: the whole stage.
    max_capacity_factor: see `stages.build_stage`.

  Raises:
    base.ConfigError: the stage cannot be spread like that.
  """
  train = config.train
  spec = stages.cut(config.model, train.stages)[index]
  model = stages.build_stage(
    config.model,
    spec,
    seed=train.seed,
    expert_devices=train.local_devices,
    max_capacity_factor=max_capacity_factor,
  )
  whole = stage_lib.Stage(
    model,
    optimizers.make(train.optimizer),
    mesh_lib.abstract_mesh(train.local_devices),
    stage_lib.ProgramShape(
      microbatch_size=train.microbatch_size,
      sequence_length=config.model.sequence_length,
      microbatches=train.microbatches,
      replicas=train.replicas,
      team=team,
    ),
  )
  if position is None or not train.shard_optimizer:
    return whole
  return whole.sharded(position) if whole.shape.world_size > 1 else whole


def build_stage(
  config: settings.RunConfig,
  index: int,
  team: tuple[int, ...] | None = None,
  position: int | None = None,
) -> stage_lib.Stage:
  """As `declare_stage`, on this process's devices; compiles nothing."""
  return bind(config, declare_stage(config, index, team, position))


def bind(
  config: settings.RunConfig, declared: stage_lib.Stage
) -> stage_lib.Stage:
  """A declared stage on this process's devices, in its world if it has one.

  Raises:
    base.ConfigError: there are too few devices.
  """
  train = config.train
  devices = jax.local_devices()
  if train.local_devices > len(devices):
    raise base.ConfigError(
      'local_devices', train.local_devices, f'{len(devices)} are there'
    )
  mesh = mesh_lib.make_mesh(devices[: train.local_devices])
  workers = declared.shape.world_size
  if workers == 1:
    return declared.on(mesh)
  of_process: dict[int, list[Any]] = {}
  for device in jax.devices():
    of_process.setdefault(device.process_index, []).append(device)
  everyone = [
    device
    for _, own in sorted(of_process.items())
    for device in own[: train.local_devices]
  ]
  return declared.on(mesh, mesh_lib.make_mesh(everyone, workers))


def stage_sizes(
  layout: layout_lib.Layout, expert_devices: int
) -> capture_plan.StageSizes:
  """What the leader is told of a stage's operators.

  Args:
    layout: of the stage, with devices or without.
    expert_devices: over how many its experts are, or will be, spread.
  """
  devices = layout.partition.devices(expert_devices)
  return capture_plan.StageSizes(
    state_bytes=layout.state_bytes(),
    compute_bytes=layout.compute_bytes(),
    device={o: devices[o] for o in layout.operators},
  )


def load_initial(
  config: settings.RunConfig, stage: stage_lib.Stage
) -> dict[str, Any] | None:
  """The checkpoint that the run starts from, checked against `stage`.

  Returns:
    None when the run starts from its seed.

  Raises:
    base.ConfigError: it is missing, damaged or of another model.
  """
  if not config.init_from:
    return None
  tree = checkpoint.load(config.init_from, 'init_from')
  checkpoint.check(
    stage, tree, config.init_from, weights_only=config.init_weights_only
  )
  return tree


def initial_state(
  config: settings.RunConfig,
  stage: stage_lib.Stage,
  initial: Mapping[str, Any] | None,
) -> operators.State:
  """State 0: from the seed, or from what `load_initial` read."""
  if initial is None:
    return stage.initial_state()
  return checkpoint.state_of(
    stage, initial, weights_only=config.init_weights_only
  )


def make_workers(
  config: settings.RunConfig, data: worker.Data
) -> list[worker.Worker]:
  """Compiles every stage; their logs are one shared memory."""
  store = memory_log.MemoryStore()
  workers = []
  for index in range(config.train.stages):
    stage = build_stage(config, index)
    state = initial_state(config, stage, load_initial(config, stage))
    programs = stage.compile()
    log = memory_log.MemoryLog(hostmem.WorkerId(index, 0, 1), store)
    workers.append(worker.Worker(index, stage, programs, state, log, data))
  return workers


def train(
  config: settings.RunConfig,
  workers: Sequence[worker.Worker],
  on_iteration: Callable[[Sequence[worker.Report]], None],
  stop: Callable[[], bool] = lambda: False,
  options: Sequence[Mapping[str, Any]] = (),
) -> int:
  """Trains all stages to the end of the run.

  Args:
    config: of the run.
    workers: as made by `make_workers`.
    on_iteration: called in this thread with all stages' reports of an
      iteration, in order.
    stop: asked by the first stage between iterations.
    options: further arguments of each stage's `Worker.train`.

  Returns:
    The last iteration done.

  Raises:
    The first error of any stage or of `on_iteration`.
  """
  options = options or [{}] * len(workers)
  if len(workers) == 1:
    return workers[0].train(
      config.train, lambda r: on_iteration([r]), stop, **options[0]
    )
  reports: queue.Queue = queue.Queue()
  last_iterations = [0] * len(workers)
  errors: list[BaseException] = []  # the first one is the cause of the others
  last = _LastIteration(stop)

  def run(index: int) -> None:
    try:
      last_iterations[index] = workers[index].train(
        config.train, reports.put, last.stop_of(index), **options[index]
      )
    except BaseException as e:  # handed to the caller's thread
      errors.append(e)
      for w in workers:
        w.log.close()
    finally:
      reports.put(None)

  threads = [
    threading.Thread(target=run, args=(i,), name=f'stage-{i}')
    for i in range(len(workers))
  ]
  for thread in threads:
    thread.start()
  gathered: dict[int, dict[int, worker.Report]] = {}
  refused = False
  running = len(threads)
  while running:
    report = reports.get()
    if report is None:
      running -= 1
      continue
    by_stage = gathered.setdefault(report.iteration, {})
    by_stage[report.stage] = report
    if len(by_stage) == len(workers) and not refused:
      del gathered[report.iteration]
      try:
        on_iteration([by_stage[i] for i in range(len(workers))])
      except BaseException as e:  # the stages must be ended first
        errors.append(e)
        refused = True
        last.now()
        for w in workers:
          w.log.close()
  for thread in threads:
    thread.join()
  if errors:
    raise errors[0]
  return last_iterations[-1]


class _LastIteration:
  """Makes all stages stop after the same iteration.

  Stage 0 asks first, since every other stage's iteration needs its
  activations; the others follow its answer for the same iteration.
  """

  def __init__(self, stop: Callable[[], bool]):
    self._stop = stop
    self._answers: list[bool] = []
    self._changed = threading.Condition()
    self._ended = False

  def now(self) -> None:
    with self._changed:
      self._ended = True
      self._changed.notify_all()

  def stop_of(self, index: int) -> Callable[[], bool]:
    asked = 0

    def stop() -> bool:
      nonlocal asked
      asked += 1
      with self._changed:
        if index == 0:
          self._answers.append(self._ended or self._stop())
          self._changed.notify_all()
        self._changed.wait_for(
          lambda: self._ended or len(self._answers) >= asked
        )
        return self._ended or self._answers[asked - 1]

    return stop
