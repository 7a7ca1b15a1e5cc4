"""A worker of a whole model in this process, to be timed."""

from __future__ import annotations

from launch.lm import settings as run_settings, transformer_job
from moetion_jax import keys
from moetion_jax.logs import memory_log
from moetion_jax.training import worker


def make_worker(
  config: run_settings.RunConfig, data: worker.Data | None = None
) -> worker.Worker:
  """Compiles the one stage of a run and makes its worker.

  Args:
    config: the run's settings, of one stage.
    data: what the worker reads; None: the run's text.
  """
  job = transformer_job.of(config)
  stage = job.build_stage(0)
  return worker.Worker(
    0,
    stage,
    stage.compile(),
    job.initial(stage)(),
    memory_log.MemoryLog(keys.WorkerId(0, 0, 1), memory_log.MemoryStore()),
    data or job.data(),
  )
