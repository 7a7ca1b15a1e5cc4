"""Settings of a run that the library reads: frozen, validated when made.

Only `launch` has flags; field names are the flags' names, so that an error can
name what the user typed.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from moetion_jax import errors

# By name, the factor on a rate that suits adamw: steps of optimizers differ in
# size by nature. `state/optimizers.py` makes them.
OPTIMIZERS = {
  'adamw': 1.0,
  'lion': 0.1,
  'sgd': 30.0,
  'adafactor': 3.0,
  'muon': 1.0,
}


def _require(config: object, name: str, ok: bool, reason: str) -> None:
  if not ok:
    raise errors.ConfigError(name, getattr(config, name), reason)


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
  """The optimizer and its schedule.

  Attributes:
    optimizer: one of OPTIMIZERS.
    learning_rate: the peak learning rate.
    warmup_iterations: iterations of linear warm-up.
    decay_iterations: iteration at which the cosine ends.
    final_fraction: fraction of the peak that is held after that.
    weight_decay: decoupled weight decay, on matrices.
    b1: decay of the first moment, or momentum.
    b2: decay of the second moment (lion: of its momentum).
    clip_norm: global norm to which gradients are clipped; 0 never clips.
    earlier: the schedules of a run that is trained longer with another one:
      last iteration and `decay_iterations` of each, ascending.
  """

  optimizer: str = 'adamw'
  learning_rate: float = 3e-3
  warmup_iterations: int = 20
  decay_iterations: int = 200
  final_fraction: float = 0.1
  weight_decay: float = 0.1
  b1: float = 0.9
  b2: float = 0.99
  clip_norm: float = 1.0
  earlier: tuple[tuple[int, int], ...] = ()

  def __post_init__(self) -> None:
    _require(
      self,
      'optimizer',
      self.optimizer in OPTIMIZERS,
      f'unknown; known are {", ".join(OPTIMIZERS)}',
    )
    _require(self, 'learning_rate', self.learning_rate > 0, 'must be positive')
    _require(
      self, 'decay_iterations', self.decay_iterations >= 1, 'must be at least 1'
    )
    for name in ('warmup_iterations', 'weight_decay', 'clip_norm'):
      _require(self, name, getattr(self, name) >= 0, 'must not be negative')
    for name in ('b1', 'b2'):
      _require(self, name, 0 <= getattr(self, name) < 1, 'must be in [0, 1)')
    _require(
      self,
      'final_fraction',
      0 <= self.final_fraction <= 1,
      'must be in [0, 1]',
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
  """Settings of how a model is trained and spread.

  Attributes:
    seed: seed of initial weights, data order and dropout.
    iterations: the last iteration.
    initial_iteration: the iteration of the initial state. The first one of the
      run is the next, with its data.
    stages: number of pipeline stages.
    replicas: data-parallel workers of each stage.
    local_devices: devices of one worker, along the mesh axis 'expert'.
    microbatches: microbatches per replica and iteration.
    microbatch_size: sequences in one microbatch.
    eval_every: iterations between evaluations; 0 for none.
    eval_microbatches: held-out microbatches in one evaluation.
    shard_optimizer: whether each replica of a stage has and updates only its
      share of the training state (ZeRO-1).
    skip_nonfinite: whether to skip an update whose loss or gradient norm is not
      finite, instead of ending the run.
    optimizer: settings of the optimizer and its schedule.
  """

  seed: int = 0
  iterations: int = 200
  initial_iteration: int = 0
  stages: int = 1
  replicas: int = 1
  local_devices: int = 1
  microbatches: int = 4
  microbatch_size: int = 16
  eval_every: int = 50
  eval_microbatches: int = 8
  shard_optimizer: bool = False
  skip_nonfinite: bool = False
  optimizer: OptimizerConfig = OptimizerConfig()

  def __post_init__(self) -> None:
    for name in (
      'iterations',
      'stages',
      'replicas',
      'local_devices',
      'microbatches',
      'microbatch_size',
      'eval_microbatches',
    ):
      _require(self, name, getattr(self, name) >= 1, 'must be at least 1')
    for name in ('seed', 'eval_every', 'initial_iteration'):
      _require(self, name, getattr(self, name) >= 0, 'must not be negative')
    _require(self, 'seed', self.seed < 2**32, 'must be below 2**32')
    _require(
      self,
      'iterations',
      self.iterations > self.initial_iteration,
      f'must be more than the {self.initial_iteration} that are done already',
    )
    _require(
      self,
      'shard_optimizer',
      self.replicas > 1 or not self.shard_optimizer,
      'needs --replicas=2 or more: a worker alone has all of its stage',
    )
    _require(
      self,
      'microbatch_size',
      self.microbatch_size % self.local_devices == 0,
      f'must be divisible by local_devices={self.local_devices}',
    )

  @property
  def global_microbatches(self) -> int:
    """Microbatches of one iteration, all replicas together."""
    return self.microbatches * self.replicas

  def evaluates(self, iteration: int) -> bool:
    """Returns whether held-out text is evaluated after update `iteration`."""
    if not self.eval_every:
      return False
    return iteration % self.eval_every == 0 or iteration == self.iterations


def trained_longer(
  known: TrainConfig, wanted: TrainConfig, schedule: str
) -> TrainConfig:
  """Makes the settings with which a run goes on, with more iterations.

  Args:
    known: the settings that the run has.
    wanted: those of the user; `decay_iterations` is `iterations` by default.
    schedule: 'pin', for the schedule that the run has; 'stretch', for that of
      `wanted` from the end on that the run has; '', if the user did not say.
  """
  ours, theirs = known.optimizer, wanted.optimizer
  decay_iterations, earlier = theirs.decay_iterations, ours.earlier
  if schedule == 'pin' and decay_iterations == wanted.iterations:
    decay_iterations = ours.decay_iterations
  is_longer = wanted.iterations > known.iterations
  if schedule == 'stretch' and is_longer:
    if decay_iterations != ours.decay_iterations:
      earlier = (*earlier, (known.iterations, ours.decay_iterations))
  optimizer = dataclasses.replace(
    theirs, decay_iterations=decay_iterations, earlier=earlier
  )
  return dataclasses.replace(wanted, optimizer=optimizer)


def differences(
  ours: Mapping[str, Any], theirs: Mapping[str, Any]
) -> list[str]:
  """Returns dotted names of the fields in which two JSON configs differ."""
  out = []
  for name in sorted(ours.keys() | theirs.keys()):
    a, b = ours.get(name), theirs.get(name)
    if isinstance(a, dict) and isinstance(b, dict):
      out += [f'{name}.{inner}' for inner in differences(a, b)]
    elif json.dumps(a) != json.dumps(b):
      out.append(name)
  return out
