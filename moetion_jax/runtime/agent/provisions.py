"""Provisions for a run: the spec of its workers, and room in host memory."""

from __future__ import annotations

import os

from moetion_jax import job_spec
from moetion_jax.hostmem import run_store, store_folder
from moetion_jax.runtime import (
  spec as spec_lib,
)
from moetion_jax.runtime.agent import settings as agent_settings
from moetion_jax.runtime.records import workdir


def worker_spec(
  job: job_spec.JobSpec,
  where: agent_settings.AgentSettings,
  folder: workdir.Workdir,
  store: store_folder.StoreFolder,
  secret: str,
) -> spec_lib.Spec:
  """Makes the spec of every worker, except for what the crew fills in.

  Args:
    job: the run's job.
    where: the settings of where it runs.
    folder: the workdir.
    store: the store of the leader's host.
    secret: the job's secret, in hex; '' on one host.
  """
  return spec_lib.Spec(
    job=job,
    stage=spec_lib.STANDBY,
    generation=0,
    agent_pid=os.getpid(),
    cores=(),
    compilation_cache_dir=where.compilation_cache_dir,
    folder=str(store.path),
    durable_folder=where.durable_folder(str(folder.path), folder.run_id),
    handover_folder=str(store.path),
    host='',
    secret=secret,
    platform='',
    grows_capacity=where.captures.policy.grows_capacity(where.captures),
    status_fd=-1,
    control_fd=-1,
  )


def check_room(
  where: agent_settings.AgentSettings,
  folder: workdir.Workdir,
  needed_bytes: int,
) -> None:
  """Checks that host memory has room for a run.

  What its stores hold already is used again or removed, so it counts as room;
  if the run begins anew, so do the stores of hosts that it no longer has.

  Args:
    where: the settings of where it runs.
    folder: the workdir.
    needed_bytes: size of all that the run puts into host memory.

  Raises:
    errors.ConfigError: there is too little room.
  """
  if folder.begins_anew:
    ids = filter(None, (folder.run_id, folder.earlier_id))
    found = [p for x in ids for p in run_store.folders(where.hostmem_dir, x)]
  else:
    found = run_store.paths(where.hostmem_dir, folder.run_id, where.local_hosts)
  used_bytes = sum(map(store_folder.used_bytes, found))
  run_store.check_room(where.hostmem_dir, needed_bytes - used_bytes)
