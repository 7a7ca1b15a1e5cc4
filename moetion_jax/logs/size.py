"""Host memory that the boundary logs of a run take, as pure functions."""

from __future__ import annotations

import dataclasses

import numpy as np

from launch.lm import settings as run_settings
from moetion_jax import errors
from moetion_jax.hostmem import segment

_SCALARS_BYTES = 4 * 4
_SPARE_CELLS = 64


@dataclasses.dataclass(frozen=True, kw_only=True)
class LogSize:
  """Size of one worker's log.

  Attributes:
    ring_bytes: size of the ring of payloads.
    cells: number of entries that the log can hold.
  """

  ring_bytes: int
  cells: int

  @property
  def file_bytes(self) -> int:
    """Host memory that the log takes."""
    return segment.file_bytes(self.ring_bytes, self.cells)


def check_shape(config: run_settings.RunConfig) -> None:
  """Raises ConfigError if the model cannot be cut or spread as asked."""
  model, train = config.model, config.train
  if train.stages > model.num_layers:
    raise errors.ConfigError(
      'stages', train.stages, f'must be 1 to {model.num_layers} (the layers)'
    )
  if model.num_experts % train.local_devices:
    raise errors.ConfigError(
      'local_devices',
      train.local_devices,
      f'must divide num_experts={model.num_experts}',
    )


def entry_sizes(config: run_settings.RunConfig, stage: int) -> list[int]:
  """Lists the bytes of each payload that a stage publishes in an iteration."""
  model, train = config.model, config.train
  hidden_bytes = (
    train.microbatch_size
    * model.sequence_length
    * model.model_dim
    * np.dtype(model.compute_dtype).itemsize
  )
  neighbours = (stage > 0) + (stage < train.stages - 1)
  entries = train.microbatches * neighbours
  if train.eval_every and stage < train.stages - 1:
    entries += train.eval_microbatches
  return [hidden_bytes] * entries + [_SCALARS_BYTES]


def log_size(
  config: run_settings.RunConfig, stage: int, log_iterations: int
) -> LogSize:
  """Computes the log size of a stage that keeps `log_iterations` iterations."""
  sizes = entry_sizes(config, stage)
  return LogSize(
    ring_bytes=segment.ring_bytes(sizes, log_iterations),
    cells=len(sizes) * (log_iterations + 1) + _SPARE_CELLS,
  )
