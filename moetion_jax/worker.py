"""The loop of one stage.

A worker reads entries of its neighbours' boundary logs, runs its programs on
them and publishes what comes out (DESIGN section 1). It never receives
anything: what it needs is named, and reading waits until it exists.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable
from typing import Any, Protocol

import jax
import numpy as np

from moetion_jax import (
  base,
  config as config_lib,
  logs,
  operators,
  report as report_lib,
  schedule,
  stage as stage_lib,
  stage_model,
)

Report = report_lib.Report

# Layout of a SCALARS entry, f32[4].
_SQUARED_NORM, _LOSS, _AUXILIARY_LOSS, _DROPPED = range(4)


class Batch(Protocol):
  """Tokens of one microbatch: i32[B, T] each."""

  inputs: np.ndarray
  labels: np.ndarray


class Data(Protocol):
  """Random access to training and held-out text."""

  def batch(self, iteration: int, microbatch: int) -> Any:
    """The Batch of a global microbatch; a pure function."""
    ...

  def held_out_batch(self, index: int) -> Any:
    """A held-out Batch."""
    ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Verdict:
  """What all stages decide alike from all stages' scalars.

  Attributes:
    loss: f32.
    auxiliary_loss: f32.
    grad_norm: f32.
    dropped: of all stages.
    clip_factor: by which every gradient is multiplied.
    bad_stage: first stage whose loss or gradients are not finite, or None.
  """

  loss: np.float32
  auxiliary_loss: np.float32
  grad_norm: np.float32
  dropped: int
  clip_factor: np.float32
  bad_stage: int | None


def judge(partials: list[np.ndarray], clip_norm: float) -> Verdict:
  """Sums the stages' SCALARS in stage order, in fp32.

  Args:
    partials: one SCALARS entry a stage.
    clip_norm: 0 for no clipping.
  """
  total = np.zeros(4, np.float32)
  bad_stage = None
  for stage, partial in enumerate(partials):
    with np.errstate(over='ignore', invalid='ignore'):  # judged below
      total += partial
    if bad_stage is None and not np.all(np.isfinite(partial)):
      bad_stage = stage
  norm = np.sqrt(total[_SQUARED_NORM])
  factor = np.float32(1)
  if clip_norm and norm > clip_norm:
    factor = np.float32(clip_norm) / norm
  if bad_stage is None and not np.isfinite(norm):
    bad_stage = len(partials) - 1
  return Verdict(
    loss=total[_LOSS],
    auxiliary_loss=total[_AUXILIARY_LOSS],
    grad_norm=norm,
    dropped=int(total[_DROPPED]),
    clip_factor=factor,
    bad_stage=bad_stage,
  )


class Worker:
  """One stage's training loop over its compiled programs.

  `state` and `compute` are always whole: they are swapped together when an
  update was dispatched. Only this object donates `state`. `iteration` and
  `program` say what is being done, to any thread that asks.
  """

  def __init__(
    self,
    index: int,
    stage: stage_lib.Stage,
    programs: stage_lib.Programs,
    state: operators.State,
    log: logs.Log,
    data: Data,
  ):
    """Stores; `train` does the work."""
    self.index = index
    self.stage = stage
    self.programs = programs
    self.state = state
    self.compute = programs.compute_of(state)
    self.log = log
    self.iteration = 0
    self.program = ''
    self._data = data
    self._waited = 0.0
    # Until snapshots choose slots, no operator is selected.
    self._slot = {
      group: np.array(mask)
      for group, mask in schedule.selection_by_group(
        stage.partition.operators, slot=frozenset()
      ).items()
    }

  def train(
    self,
    config: config_lib.TrainConfig,
    report: Callable[[Report], None],
    stop: Callable[[], bool] = lambda: False,
    first_iteration: int = 1,
    log_iterations: int = 1,
  ) -> int:
    """Trains from `first_iteration` to the last one.

    Args:
      config: of the run.
      report: called once for each iteration, in order, one iteration late: a
        digest is read when the next iteration's work is already under way.
      stop: asked between iterations; True ends the loop early. With several
        stages all must stop after the same iteration.
      first_iteration: the one after the current state's.
      log_iterations: of how many iterations the log keeps the entries.

    Returns:
      The last iteration that was done.

    Raises:
      NonFiniteError: without `skip_nonfinite`, at the first loss or gradient
        norm that is NaN or infinite.
    """
    pending: Callable[[], Report] | None = None
    iteration = first_iteration - 1
    while iteration < config.iterations and not stop():
      self.iteration = iteration = iteration + 1
      begin, self._waited = time.monotonic(), 0.0
      gradients, mine = self._gradients(iteration, config)
      if pending:
        report(pending())
      verdict = self._verdict(iteration, mine, config)
      self.program = 'update'
      if verdict.bad_stage is None:
        self.state, self.compute, _ = self.programs.update(
          self.state, gradients, verdict.clip_factor, self._slot
        )
      digests = self.programs.digest(self.state)
      eval_loss = self._evaluate(iteration, config)
      self.log.retain(iteration - log_iterations + 1)
      pending = functools.partial(
        self._report,
        iteration,
        verdict,
        digests,
        eval_loss,
        time.monotonic() - begin,
        self._waited,
      )
    if pending:
      report(pending())
    return iteration

  def _gradients(self, iteration: int, config: config_lib.TrainConfig):
    """All microbatches of an iteration: (gradients, own SCALARS entry)."""
    acc, counts = self.programs.zeros(), []
    in_flight: dict[int, tuple[Any, Any]] = {}
    tasks = schedule.one_forward_one_backward(
      self.index, config.stages, config.microbatches
    )
    following_tasks = (*tasks[1:], None)
    for (kind, m), following in zip(tasks, following_tasks, strict=True):
      self.program = kind.value
      self._prefetch(iteration, following)
      if kind is schedule.TaskKind.FORWARD:
        inputs = self._inputs(base.EntryKind.ACTIVATION, iteration, m)
        position = stage_model.Position(
          np.uint32(iteration), np.array([m], np.uint32)
        )
        y, residuals, count = self.programs.forward(
          self.compute, inputs, position
        )
        self._send(base.EntryKind.ACTIVATION, iteration, m, y)
        in_flight[m] = (y if self.stage.model.has_head else (), residuals)
        counts.append(count)
      else:
        dy, residuals = in_flight.pop(m)
        if not self.stage.model.has_head:
          dy = self._read(base.EntryKind.GRADIENT, iteration, m, self.index + 1)
        dx, acc = self.programs.backward(self.compute, residuals, dy, acc)
        del residuals
        self._send(base.EntryKind.GRADIENT, iteration, m, dx)
    self.program = 'reduce'
    gradients, scalars = self.programs.reduce(acc, tuple(counts))
    return gradients, scalars

  def _verdict(
    self, iteration: int, scalars, config: config_lib.TrainConfig
  ) -> Verdict:
    """Publishes this stage's scalars, reads everyone's, decides.

    Waits for the device: `update` must be dispatched only when the gradients
    are ready, since dispatching it deletes the old state at once.
    """
    host = jax.device_get(scalars)
    mine = np.array(
      [
        host['squared_norm'],
        host['loss'],
        host['auxiliary_loss'],
        host['dropped'],
      ],
      np.float32,
    )
    self.log.publish(self._key(base.EntryKind.SCALARS, iteration, 0), mine)
    partials = []
    for stage in range(config.stages):
      if stage == self.index:
        partials.append(mine)
      else:
        entry = self._read(base.EntryKind.SCALARS, iteration, 0, stage)
        partials.append(np.asarray(entry))
    verdict = judge(partials, config.optimizer.clip_norm)
    if verdict.bad_stage is not None and not config.skip_nonfinite:
      raise base.NonFiniteError(
        f'iteration {iteration}: loss {verdict.loss} and gradient norm '
        f'{verdict.grad_norm} are not finite, first in stage '
        f'{verdict.bad_stage}; lower --learning_rate, or pass '
        '--skip_nonfinite to leave such updates out'
      )
    return verdict

  def _evaluate(
    self, iteration: int, config: config_lib.TrainConfig
  ) -> float | None:
    """Held-out loss of the state after `iteration`; None where unknown."""
    if not config.evaluates(iteration):
      return None
    self.program = 'evaluate'
    losses = []
    for _, m in schedule.evaluation(config.eval_microbatches):
      inputs = self._inputs(base.EntryKind.EVALUATION, iteration, m)
      y = self.programs.evaluate(self.compute, inputs)
      if self.stage.model.has_head:
        losses.append(y)
      else:
        self._send(base.EntryKind.EVALUATION, iteration, m, y)
    if not losses:
      return None
    return float(np.mean([np.float32(x) for x in losses], dtype=np.float32))

  def _report(self, iteration, verdict, digests, eval_loss, seconds, waited):
    return Report(
      iteration=iteration,
      stage=self.index,
      loss=float(verdict.loss),
      auxiliary_loss=float(verdict.auxiliary_loss),
      grad_norm=float(verdict.grad_norm),
      dropped=verdict.dropped,
      updated=verdict.bad_stage is None,
      digests=self.stage.partition.by_operator(jax.device_get(digests)),
      eval_loss=eval_loss,
      seconds=seconds,
      waited_seconds=waited,
    )

  # ---- entries ---------------------------------------------------------------

  def _key(
    self, kind: base.EntryKind, iteration: int, m: int, stage: int | None = None
  ) -> base.EntryKey:
    return base.EntryKey(
      iteration=iteration,
      stage=self.index if stage is None else stage,
      replica=0,
      kind=kind,
      microbatch=m,
    )

  def _inputs(
    self, kind: base.EntryKind, iteration: int, m: int
  ) -> stage_model.Inputs:
    """A microbatch's tokens or activations, and the last stage's labels."""
    model = self.stage.model
    batch: Any = None
    if model.has_embedding or model.has_head:
      batch = (
        self._data.held_out_batch(m)
        if kind is base.EntryKind.EVALUATION
        else self._data.batch(iteration, m)
      )
    if model.has_embedding:
      x = batch.inputs
    else:
      x = self._read(kind, iteration, m, self.index - 1)
    return stage_model.Inputs(x, batch.labels if model.has_head else None)

  def _read(
    self, kind: base.EntryKind, iteration: int, m: int, stage: int
  ) -> jax.Array:
    begin = time.monotonic()
    sharding = self.stage.rows_sharding
    if kind is base.EntryKind.SCALARS:
      sharding = self.stage.same_sharding
    value = self.log.read(self._key(kind, iteration, m, stage), sharding)
    self._waited += time.monotonic() - begin
    return value

  def _prefetch(self, iteration: int, task: schedule.Task | None) -> None:
    """Has the next task's input put on the device while this one runs."""
    model = self.stage.model
    if task and task.kind is schedule.TaskKind.FORWARD:
      kind, producer = base.EntryKind.ACTIVATION, self.index - 1
      is_from_outside = not model.has_embedding
    else:
      kind, producer = base.EntryKind.GRADIENT, self.index + 1
      is_from_outside = not model.has_head
    if task and is_from_outside:
      self.log.prefetch(
        self._key(kind, iteration, task.microbatch, producer),
        self.stage.rows_sharding,
      )

  def _send(self, kind: base.EntryKind, iteration: int, m: int, value) -> None:
    """Publishes `value` unless there is no neighbour in that direction."""
    if not isinstance(value, tuple):
      self.log.publish(self._key(kind, iteration, m), value)
