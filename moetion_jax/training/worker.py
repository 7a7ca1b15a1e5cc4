"""The loop of one worker of a stage.

A worker reads entries of its neighbours' boundary logs, runs its programs on
them and publishes what comes out. It never receives anything: what it needs is
named, and reading waits until it exists.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import jax
import numpy as np

from moetion_jax import config as config_lib, keys, report as report_lib
from moetion_jax.capture import (
  conversion as conversion_lib,
  selection,
  snapshotter,
)
from moetion_jax.logs import interface as log_interface
from moetion_jax.programs import compilation, stage as stage_lib
from moetion_jax.state import model as model_lib, partition
from moetion_jax.training import idle_clock, scalars as scalars_lib, schedule

_EVALUATOR = 0  # the replica that evaluates


class Data(Protocol):
  """Random access to training and held-out text.

  A batch has the tokens of one microbatch: `inputs` and `labels`, i32[B, T].
  """

  def batch(self, iteration: int, microbatch: int) -> Any:
    """Returns the batch of a global microbatch; a pure function."""
    ...

  def held_out_batch(self, index: int) -> Any:
    """Returns a held-out batch."""
    ...

  def fingerprint(self) -> dict[str, Any]:
    """Returns what tells this data from other data, as JSON.

    A field `name` is for people: it is not compared. A class may have
    `mapped_files()` as well, which returns the paths of what this reads from
    files each time: while they are unchanged, one worker of a host reads them
    for all, and no batch that was read from them after a change is used.
    """
    ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class GrownCapacity:
  """Larger capacities of experts for some iterations.

  Attributes:
    forward: the stage's forward program, of a model that scales capacities.
    backward: the stage's backward program, of the same model.
    factors: f32[L, E], factors of the usual capacities.
    until: last iteration for which this holds.
  """

  forward: Callable[..., Any]
  backward: Callable[..., Any]
  factors: np.ndarray
  until: int


class Worker:
  """One worker's training loop over its stage's compiled programs.

  It reads from the same replica of its neighbours.

  `state` and `compute` are always whole: they are swapped together once an
  update is dispatched. Only this object donates `state`. For any thread that
  asks, `iteration` and `program` say what is being done, and `steps` counts the
  programs begun.

  Attributes:
    replica: this worker's replica.
    on_phase: called with a phase and the iteration: the name of a program that
      begins, or 'publish' when something was published.
    on_read: called with the name of each entry that was read.
    grown: larger capacities of experts; None: the usual ones.
  """

  def __init__(
    self,
    index: int,
    stage: stage_lib.Stage,
    programs: compilation.Programs,
    state: partition.State,
    log: log_interface.Log,
    data: Data,
    replicas: Sequence[int] = (0,),
  ):
    """Stores the arguments and makes `compute`; `train` does the work."""
    self.index = index
    self.replica = replicas[0]
    self._replicas = tuple(replicas)
    self.stage = stage
    self.programs = programs
    self.state = state
    self.compute = stage.compute_of(programs, state)
    self.log = log
    self.iteration = 0
    self.program = ''
    self.steps = 0
    self.on_phase: Callable[[str, int], None] = lambda phase, iteration: None
    self.on_read: Callable[[keys.EntryKey], None] = lambda key: None
    self.grown: GrownCapacity | None = None
    self._data = data
    self._waited = self._late = 0.0
    self._idle = idle_clock.IdleClock()
    self._outputs: Any = None  # of the program that was dispatched last
    self._expert_groups = stage.whole.partition.stacked_groups

  def train(
    self,
    config: config_lib.TrainConfig,
    report: Callable[[report_lib.Report], None],
    stop: Callable[[], bool] = lambda: False,
    *,
    first_iteration: int | None = None,
    snapshots: snapshotter.Snapshotter | None = None,
    conversion: conversion_lib.Conversion | None = None,
    retain: Callable[[int], None] | None = None,
  ) -> int:
    """Trains from `first_iteration` to the last one.

    Args:
      config: the run's settings.
      report: called once for each iteration, in order, one iteration late: a
        digest is read when the next iteration's work is already under way.
      stop: asked between iterations; True ends the loop early. With several
        stages all must stop after the same iteration.
      first_iteration: the iteration after the current state's; None: the first
        one of the run.
      snapshots: takes a snapshot after every update; None for no snapshots.
      conversion: conversion that began the current, partial state; None: the
        state is whole.
      retain: called after every iteration, in which log and snapshots may be
        allowed to drop what nobody needs; None: they keep the last iteration.

    Returns:
      The last iteration that was done.

    Raises:
      errors.NonFiniteError: without `skip_nonfinite`, at the first loss or
        gradient norm that is NaN or infinite.
      conversion.DivergedError: the conversion came to other bits.
    """
    self._idle.start()
    try:
      return self._train(
        config,
        report,
        stop,
        first_iteration or config.initial_iteration + 1,
        snapshots,
        conversion,
        retain,
      )
    finally:
      self._idle.close()

  def _train(
    self,
    config,
    report,
    stop,
    first_iteration,
    snapshots,
    conversion,
    retain,
  ) -> int:
    pending: Callable[[], report_lib.Report] | None = None
    iteration = first_iteration - 1
    while iteration < config.iterations and not stop():
      self.iteration = iteration = iteration + 1
      begin, self._waited = time.monotonic(), 0.0
      self._late = self.log.late_seconds
      record, scalars = None, {}
      if conversion and conversion.applies(iteration):
        record = conversion.record(iteration)
        gradients = record.gradients and self.stage.place_gradients(
          record.gradients
        )
        load, partials = record.load, list(record.partials)
        self._publish_scalars(iteration, partials[self.index])
      else:
        gradients, scalars = self._gradients(iteration, config)
        load, partials = scalars['load'], None
      if pending:
        report(pending())
      if partials is None:
        partials = self._partials(iteration, scalars, config, conversion)
      verdict = scalars_lib.decide(iteration, partials, config)
      slot = snapshots.slot(iteration) if snapshots else frozenset()
      mask: selection.Mask = selection.make_mask(
        self.stage.partition.operators, slot
      )
      blocked_seconds = snapshots.release() if snapshots else 0.0
      if verdict.is_finite and gradients:
        self._begin('update')
        self.state, self.compute, mask = self.programs.update(
          self.state, gradients, verdict.clip_factor, mask
        )
      is_partial = bool(conversion and not conversion.is_complete)
      if is_partial:
        self._begin('fold')
      digests = None
      if conversion:
        self.state, digests = conversion.advance(iteration, self.state)
      applies_next = bool(conversion and conversion.applies(iteration + 1))
      # A fold after an update changes what the update made the weights of.
      is_stale = is_partial or record or self.stage.ownership
      if is_stale and not applies_next:
        # One replica's operators may be complete before another's are, so all
        # gather in every iteration that is followed by a forward.
        self.compute = self.stage.compute_of(self.programs, self.state)
      if digests is None:
        digests = self.programs.digest(self.state)
      self._outputs = digests
      if record:
        eval_loss = record.eval_loss
      else:
        eval_loss = self._evaluate(iteration, config)
      taken = snapshotter.TakenSnapshot()
      is_whole = not conversion or conversion.is_complete
      # What was applied is a snapshot already; it has not all gradients.
      if snapshots and is_whole and not record:
        self._begin('capture')
        if conversion and iteration in conversion.damaged:
          snapshots.distrust(iteration)
        taken = snapshots.take(
          iteration,
          self.state,
          self.compute,
          {
            conversion_lib.DIGESTS: digests,
            conversion_lib.PARTIALS: verdict.partials,
            conversion_lib.LOAD: load,
          },
          mask=mask,
          gradients=gradients,
          clip_factor=float(verdict.clip_factor).hex(),
          updated=verdict.is_finite,
          is_record=True,
          eval_loss=None if eval_loss is None else eval_loss.hex(),
        )
      if retain is not None:
        retain(iteration)
      else:
        self.log.retain(iteration)
        if snapshots:
          snapshots.retain(iteration - 1)
      pending = functools.partial(
        self._report,
        iteration=iteration,
        verdict=verdict,
        digests=digests,
        frozen=conversion.frozen_digests() if conversion else {},
        load=load,
        eval_loss=eval_loss,
        seconds=time.monotonic() - begin,
        waited_seconds=self._waited,
        late_seconds=self.log.late_seconds - self._late,
        snapshot_bytes=taken.snapshot_bytes,
        blocked_seconds=blocked_seconds + taken.blocked_seconds,
        copy_bytes_per_second=snapshots.bandwidth if snapshots else 0.0,
      )
    if pending:
      report(pending())
    return iteration

  def _begin(self, program: str) -> None:
    self.program = program
    self.steps += 1
    self.on_phase(program, self.iteration)

  def _gradients(self, iteration: int, config: config_lib.TrainConfig):
    """Runs an iteration's microbatches; returns (gradients, own scalars)."""
    accumulated = [
      self._accumulate(iteration, config, replica) for replica in self._replicas
    ]
    self._begin('reduce')
    return self.stage.reduce(self.programs, accumulated)

  def _accumulate(
    self, iteration: int, config: config_lib.TrainConfig, replica: int
  ):
    """Runs the microbatches of one replica; returns (acc, counts of all)."""
    acc, counts = self.programs.zeros(), []
    programs: Any = self.programs
    grown, factors = self.grown, None
    if grown is not None and iteration <= grown.until:
      programs, factors = grown, grown.factors
    in_flight: dict[int, tuple[Any, Any]] = {}
    tasks = schedule.one_forward_one_backward(
      self.index, config.stages, config.microbatches
    )
    following_tasks = (*tasks[1:], None)
    for (kind, m), following in zip(tasks, following_tasks, strict=True):
      self._begin(kind.value)
      self._prefetch(iteration, replica, following)
      if kind is schedule.TaskKind.FORWARD:
        inputs = self._inputs(keys.EntryKind.ACTIVATION, iteration, replica, m)
        position = model_lib.Position(
          np.uint32(iteration),
          np.array([self._global(replica, m)], np.uint32),
          factors,
        )
        y, residuals, count = programs.forward(self.compute, inputs, position)
        self._outputs = y, count
        self._send(keys.EntryKind.ACTIVATION, iteration, replica, m, y)
        in_flight[m] = (y if self.stage.model.has_head else (), residuals)
        counts.append(count)
      else:
        dy, residuals = in_flight.pop(m)
        if not self.stage.model.has_head:
          key = self._key(
            keys.EntryKind.GRADIENT, iteration, replica, m, self.index + 1
          )
          dy = self._read(key)
        dx, acc = programs.backward(self.compute, residuals, dy, acc)
        del residuals
        self._outputs = dx, acc
        self._send(keys.EntryKind.GRADIENT, iteration, replica, m, dx)
    return acc, tuple(counts)

  def _publish_scalars(self, iteration: int, mine: np.ndarray) -> None:
    """Publishes this stage's scalars of an iteration, for all its replicas."""
    for replica in self._replicas:
      self._publish(self._key(keys.EntryKind.SCALARS, iteration, replica), mine)

  def _partials(
    self,
    iteration: int,
    scalars: Mapping[str, jax.Array],
    config: config_lib.TrainConfig,
    conversion: conversion_lib.Conversion | None,
  ) -> list[np.ndarray]:
    """Publishes this stage's scalars and returns everyone's, in stage order.

    A conversion waits for nobody where a snapshot recorded everyone's.

    Waits for the device: `update` must be dispatched only when the gradients
    are ready, since dispatching it deletes the old state at once.
    """
    host = jax.device_get({k: v for k, v in scalars.items() if k != 'load'})
    self._outputs = None
    mine = np.array([host[name] for name in scalars_lib.SCALARS], np.float32)
    self._publish_scalars(iteration, mine)
    recorded = conversion.partials(iteration) if conversion else None
    partials = [] if recorded is None else list(recorded)
    for stage in range(len(partials), config.stages):
      if stage == self.index:
        partials.append(mine)
      else:
        key = self._key(
          keys.EntryKind.SCALARS, iteration, self.replica, 0, stage
        )
        partials.append(np.asarray(self._read(key)))
    return partials

  def _evaluate(
    self, iteration: int, config: config_lib.TrainConfig
  ) -> float | None:
    """Returns the held-out loss after `iteration`; None where unknown.

    All replicas have the same state: the first one of each stage evaluates it.
    """
    if not config.evaluates(iteration) or _EVALUATOR not in self._replicas:
      return None
    self._begin('evaluate')
    losses = []
    for _, m in schedule.evaluation(config.eval_microbatches):
      inputs = self._inputs(keys.EntryKind.EVALUATION, iteration, _EVALUATOR, m)
      y = self._outputs = self.programs.evaluate(self.compute, inputs)
      if self.stage.model.has_head:
        losses.append(y)
      else:
        self._send(keys.EntryKind.EVALUATION, iteration, _EVALUATOR, m, y)
    if not losses:
      return None
    return float(np.mean([np.float32(x) for x in losses], dtype=np.float32))

  def _report(
    self,
    verdict: scalars_lib.Verdict,
    digests: jax.Array,
    frozen: Mapping[keys.OperatorId, np.ndarray],
    load: jax.Array,
    **fields: Any,
  ) -> report_lib.Report:
    found = self.stage.partition.by_operator(digests)
    loads = np.asarray(load)  # [L, E]
    return report_lib.Report(
      stage=self.index,
      replica=self.replica,
      loss=float(verdict.loss),
      auxiliary_loss=float(verdict.auxiliary_loss),
      grad_norm=float(verdict.grad_norm),
      dropped=verdict.dropped,
      updated=verdict.is_finite,
      digests={**found, **frozen},
      load={
        operator: int(count)
        for group, counts in zip(self._expert_groups, loads, strict=True)
        for operator, count in zip(
          self.stage.whole.partition.operators_of(group), counts, strict=True
        )
      },
      **fields,
    )

  # ---- entries ---------------------------------------------------------------

  def _global(self, replica: int, m: int) -> int:
    """Numbers a replica's microbatch among those of all replicas."""
    return replica * self.stage.shape.microbatches + m

  def _key(
    self,
    kind: keys.EntryKind,
    iteration: int,
    replica: int,
    m: int = 0,
    stage: int | None = None,
  ) -> keys.EntryKey:
    return keys.EntryKey(
      iteration=iteration,
      stage=self.index if stage is None else stage,
      replica=replica,
      kind=kind,
      microbatch=m,
    )

  def _inputs(
    self, kind: keys.EntryKind, iteration: int, replica: int, m: int
  ) -> model_lib.Inputs:
    """Gets a microbatch's tokens or activations; labels in the last stage."""
    model = self.stage.model
    batch: Any = None
    if model.has_embedding or model.has_head:
      batch = (
        self._data.held_out_batch(m)
        if kind is keys.EntryKind.EVALUATION
        else self._data.batch(iteration, self._global(replica, m))
      )
    if model.has_embedding:
      x = batch.inputs
    else:
      x = self._read(self._key(kind, iteration, replica, m, self.index - 1))
    return model_lib.Inputs(x, batch.labels if model.has_head else None)

  def _read(self, key: keys.EntryKey) -> jax.Array:
    wait = self._idle.begin(self._outputs)
    sharding = self.stage.rows_sharding
    if key.kind is keys.EntryKind.SCALARS:
      sharding = self.stage.same_sharding
    value = self.log.read(key, sharding)
    self.on_read(key)
    self._waited += self._idle.idle_seconds(wait)
    return value

  def _prefetch(
    self, iteration: int, replica: int, task: schedule.Task | None
  ) -> None:
    """Puts the next task's input on the device while this one runs."""
    model = self.stage.model
    if task and task.kind is schedule.TaskKind.FORWARD:
      kind, producer = keys.EntryKind.ACTIVATION, self.index - 1
      is_from_outside = not model.has_embedding
    else:
      kind, producer = keys.EntryKind.GRADIENT, self.index + 1
      is_from_outside = not model.has_head
    if task and is_from_outside:
      self.log.prefetch(
        self._key(kind, iteration, replica, task.microbatch, producer),
        self.stage.rows_sharding,
      )

  def _send(
    self, kind: keys.EntryKind, iteration: int, replica: int, m: int, value
  ) -> None:
    """Publishes `value` unless there is no neighbour in that direction."""
    if not isinstance(value, tuple):
      self._publish(self._key(kind, iteration, replica, m), value)

  def _publish(self, key: keys.EntryKey, value) -> None:
    self.log.publish(key, value)
    self.on_phase('publish', key.iteration)
