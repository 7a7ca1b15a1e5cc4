"""The settings of a run as one frozen value, and its JSON form.

`train.py` makes it from flags; workers and tools read it from `config.json`.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import ml_dtypes  # noqa: F401  NumPy knows bfloat16 by it
import numpy as np

from models import config as model_config, presets
from moetion_jax import codec, config, errors, job_spec
from moetion_jax.runtime.checkpoints import proof
from moetion_jax.runtime.records import checkpoint_folder

# What a preset trains with unless flags say otherwise. Iterations of the
# `paper_*` presets are nominal: those are for clusters and cost models.
_TRAIN_DEFAULTS: dict[str, dict[str, Any]] = {
  'tiny': {'iterations': 150, 'microbatches': 4, 'microbatch_size': 16},
  'small': {'iterations': 140, 'microbatches': 8, 'microbatch_size': 8},
  'paper': {'iterations': 100_000, 'microbatches': 64, 'microbatch_size': 4},
}
_OPTIMIZER_DEFAULTS: dict[str, dict[str, Any]] = {
  'tiny': {'learning_rate': 6e-3},
  'small': {'learning_rate': 3e-3},
  'paper': {'learning_rate': 4.2e-4, 'warmup_iterations': 2000},
}
# Fields of OptimizerConfig that say which learning rate an update has.
_SCHEDULE = (
  'learning_rate',
  'warmup_iterations',
  'decay_iterations',
  'final_fraction',
  'earlier',
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig:
  """All settings of a run.

  Attributes:
    preset: name of the model's shape before overrides.
    model: the model's shape.
    train: how it is trained and spread.
    data: path, folder, glob or .bin; '' for the standard library's sources.
    data_dtype: dtype of the ids in a .bin.
    init_from: final checkpoint of another run to start from; '' for none.
    init_weights_only: takes only its weights; the optimizer state is new.
  """

  preset: str
  model: model_config.ModelConfig
  train: config.TrainConfig
  data: str = ''
  data_dtype: str = 'uint16'
  init_from: str = ''
  init_weights_only: bool = False

  @property
  def tokens_per_iteration(self) -> int:
    """Tokens that all stages train on in one iteration."""
    train = self.train
    sequences = train.global_microbatches * train.microbatch_size
    return sequences * self.model.sequence_length

  def job_spec(self) -> job_spec.JobSpec:
    """Returns the run's job, as an agent knows it.

    Raises:
      errors.ConfigError: the model cannot be cut or spread as asked.
    """
    model, train = self.model, self.train
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
    tokens = train.microbatch_size * model.sequence_length
    seats = model.capacity(tokens // train.local_devices) * train.local_devices
    return job_spec.JobSpec(
      factory='launch.lm.transformer_job:TransformerJob',
      config=codec.encode(self),
      hidden_bytes=(
        tokens * model.model_dim * np.dtype(model.compute_dtype).itemsize
      ),
      tokens_per_iteration=self.tokens_per_iteration,
      expert_capacity=seats * train.global_microbatches,
      data=self.data,
      init_from=self.init_from,
    )


def override_model(
  model: model_config.ModelConfig, overrides: list[str]
) -> model_config.ModelConfig:
  """Applies 'field=value' settings to a model's shape.

  Raises:
    errors.ConfigError: a setting is wrong; names the flag `model` and it.
  """
  fields = {f.name: f for f in dataclasses.fields(model)}
  changed: dict[str, Any] = {}
  for setting in overrides:
    name, equals, text = setting.partition('=')
    if not equals or name not in fields:
      raise errors.ConfigError(
        'model',
        setting,
        f'must be FIELD=VALUE with a field of {", ".join(fields)}',
      )
    kind = type(getattr(model, name))
    try:
      changed[name] = _parse(kind, text)
    except ValueError:
      raise errors.ConfigError(
        'model', setting, f'the value must be of type {kind.__name__}'
      ) from None
  try:
    return dataclasses.replace(model, **changed)
  except errors.ConfigError as e:
    raise errors.ConfigError('model', f'{e.flag}={e.value}', e.reason) from None


def make(
  preset: str,
  *,
  model_overrides: list[str],
  train_overrides: dict[str, Any],
  optimizer_overrides: dict[str, Any],
  **fields: Any,
) -> RunConfig:
  """Makes a preset's configuration with what the user set on top.

  Args:
    preset: a name of `models.presets`.
    model_overrides: 'field=value' settings of the model's shape.
    train_overrides: fields of TrainConfig; None means not set.
    optimizer_overrides: fields of OptimizerConfig; None means not set.
    **fields: the other fields of RunConfig.

  Raises:
    errors.ConfigError: a value is not allowed; names flag and value.
  """
  model = override_model(presets.get(preset), model_overrides)
  kind = preset if preset in _TRAIN_DEFAULTS else 'paper'
  train = _TRAIN_DEFAULTS[kind] | _given(train_overrides)
  given = _given(optimizer_overrides)
  optimizer = _OPTIMIZER_DEFAULTS[kind] | {
    'decay_iterations': max(1, train['iterations']),
    **given,
  }
  if 'learning_rate' not in given:
    factor = config.OPTIMIZERS.get(given.get('optimizer', 'adamw'), 1.0)
    optimizer['learning_rate'] *= factor
  return RunConfig(
    preset=preset,
    model=model,
    train=config.TrainConfig(
      **train, optimizer=config.OptimizerConfig(**optimizer)
    ),
    **fields,
  )


def position_of(init_from: str) -> tuple[int, dict[str, Any]]:
  """Reads what a run takes over that goes on where a checkpoint ends.

  Args:
    init_from: the checkpoint's folder.

  Returns:
    The iteration of its state, and fields of OptimizerConfig: the schedule of
    the run that wrote it.

  Raises:
    errors.ConfigError: it does not say them, or is damaged.
  """
  try:
    metadata = checkpoint_folder.read_metadata(init_from)['custom_metadata']
    known = proof.from_metadata(metadata)
    train = codec.decode(config.TrainConfig, metadata[proof.CONFIG]['train'])
    if known is None:
      raise ValueError('it is of an earlier version')
  except (OSError, ValueError, KeyError, TypeError) as error:
    raise errors.ConfigError(
      'init_from',
      init_from,
      f'does not say its iteration and schedule ({error}), which '
      "--init_position takes over; leave that out, or name a finished run's "
      'WORKDIR/checkpoint',
    ) from error
  schedule = {name: getattr(train.optimizer, name) for name in _SCHEDULE}
  return known.iteration, schedule


def _given(overrides: dict[str, Any]) -> dict[str, Any]:
  return {k: v for k, v in overrides.items() if v is not None}


def _parse(kind: type, text: str) -> Any:
  if kind is bool:
    if text.lower() not in ('true', 'false'):
      raise ValueError(text)
    return text.lower() == 'true'
  return kind(text)
