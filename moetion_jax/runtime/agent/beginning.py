"""The beginning of a run: room in host memory, and the spec of its workers."""

from __future__ import annotations

import os

from launch.lm import settings as run_settings
from moetion_jax.hostmem import run_store, store_folder
from moetion_jax.runtime import messages
from moetion_jax.runtime.agent import settings as agent_settings
from moetion_jax.runtime.records import workdir


def worker_spec(
  config: run_settings.RunConfig,
  where: agent_settings.AgentSettings,
  folder: workdir.Workdir,
  store: store_folder.StoreFolder,
  secret: str,
) -> messages.Spec:
  """Makes the spec of every worker, except for what the crew fills in.

  Args:
    config: the run's settings.
    where: the settings of where it runs.
    folder: the workdir.
    store: the store of the leader's host.
    secret: the job's secret, in hex; '' on one host.
  """
  return messages.Spec(
    config=config,
    stage=messages.STANDBY,
    generation=0,
    agent_pid=os.getpid(),
    cores=(),
    compilation_cache_dir=where.compilation_cache_dir,
    folder=str(store.path),
    durable_folder=where.durable_folder(str(folder.path)),
    handover_folder=str(store.path),
    host='',
    secret=secret,
    platform='',
    full_seconds=where.full_seconds,
    # Experts whose capacity nothing limits take all tokens anyway.
    grows_capacity=where.captures.grows_capacity
    and config.model.capacity_factor > 0,
    status_fd=-1,
    control_fd=-1,
  )


def check_room(
  where: agent_settings.AgentSettings,
  store: store_folder.StoreFolder,
  needed_bytes: int,
) -> None:
  """Checks that host memory has room for a run.

  Args:
    where: the settings of where it runs.
    store: the store of the leader's host; what is in it already counts as room.
    needed_bytes: size of all that the run puts into host memory.

  Raises:
    errors.ConfigError: there is too little room.
  """
  used_bytes = store_folder.used_bytes(store.path)
  run_store.check_room(where.hostmem_dir, needed_bytes - used_bytes)
