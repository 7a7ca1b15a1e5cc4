"""The language-model job: its data, its stages, its initial state."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import optax

from launch.lm import checkpoint, data as data_lib, settings as run_settings
from models import stages
from moetion_jax import codec, job_spec
from moetion_jax.programs import stage as stage_lib
from moetion_jax.runtime.checkpoints import file as checkpoint_file, restore
from moetion_jax.state import model as model_lib, optimizers, partition
from moetion_jax.training import job


class TransformerJob(job.Job):
  """A job whose `spec` comes from a `RunConfig`."""

  def __init__(self, spec: job_spec.JobSpec):
    """Reads the settings from the spec."""
    super().__init__(spec)
    self._settings = codec.decode(run_settings.RunConfig, spec.config)

  def stage_model(self, index: int) -> model_lib.StageModel:
    """Cuts the stage out of the model, see `Job`."""
    model, train = self._settings.model, self._settings.train
    return stages.build_stage(
      model,
      stages.cut(model, train.stages)[index],
      seed=train.seed,
      expert_devices=train.local_devices,
    )

  def optimizer(self) -> optax.GradientTransformation:
    """Makes the optimizer that the settings name."""
    return optimizers.make(self._settings.train.optimizer)

  def data(self) -> data_lib.Dataset:
    """Loads the text; raises errors.ConfigError."""
    model, train = self._settings.model, self._settings.train
    return data_lib.load(
      data_lib.DataConfig(
        data=self._settings.data,
        data_dtype=self._settings.data_dtype,
        sequence_length=model.sequence_length,
        microbatch_size=train.microbatch_size,
        microbatches=train.global_microbatches,
        vocab_size=model.vocab_size,
        seed=train.seed,
      )
    )

  def initial(self, stage: stage_lib.Stage) -> Callable[[], partition.State]:
    """Reads the checkpoint that the run starts from, if any, see `Job`."""
    path = self._settings.init_from
    if not path:
      return stage.initial_state
    weights_only = self._settings.init_weights_only
    tree = checkpoint_file.load(path, 'init_from', self.spec.init_digest)
    checkpoint.check_all_stages(tree, path, 'init_from')
    return restore.initial(
      stage, tree, path, 'init_from', weights_only=weights_only
    )


def of(config: run_settings.RunConfig, init_digest: str = '') -> TransformerJob:
  """Makes the job of a run.

  Args:
    config: the run's settings.
    init_digest: digest of the state in its --init_from; '' for any.

  Raises:
    errors.ConfigError: the model cannot be cut or spread as asked.
  """
  spec = dataclasses.replace(config.job_spec(), init_digest=init_digest)
  return TransformerJob(spec)
