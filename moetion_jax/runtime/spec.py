"""Everything that a worker process is told when it starts, on its stdin."""

from __future__ import annotations

import dataclasses
from typing import Any

from moetion_jax import job_spec
from moetion_jax.runtime import (
  environment as environment_lib,
  faults as faults_lib,
)

STANDBY = -1  # the stage number of a process that has no stage yet


@dataclasses.dataclass(frozen=True, kw_only=True)
class Spec:
  """Everything that a worker process is told when it starts.

  Attributes:
    job: the run's job.
    stage: the stage that the worker trains; STANDBY for none yet.
    replica: the worker's replica of the stage.
    generation: the worker's generation.
    world: address of the stage world's coordinator; '' for a worker alone, and
      for a standby that joins no world ahead.
    team: the replicas of the stage that have a worker, in the world's order.
    stands_for: replicas without a worker, whose microbatches this worker does.
    agent_pid: pid of the process with which the worker dies.
    cores: the cores on which the worker runs; empty for any.
    compilation_cache_dir: see `xla_setup.configure`.
    folder: the store folder of the worker's host.
    durable_folder: the folder of snapshots on disk; '' for none.
    handover_folder: the leader's store folder, into which everyone puts the
      final state. So a host of `--local_hosts` is on the leader's machine.
    host: name of the worker's host in the location map.
    secret: the job's secret, in hex; '' where all stages share one host.
    platform: for a standby, the platform as named by `compilation.platform_of`,
      where it is known.
    is_replacement: whether the run had begun before this worker.
    grows_capacity: whether an `orders.Go` may have a `capacity`.
    environment: the record that the worker's own must equal, see
      `environment.check_replacement`; {} for any.
    data_fingerprint: the fingerprint that the worker's data must have; {} for
      any.
    faults: the scripted faults that the worker performs.
    status_fd: the descriptor to which the worker writes.
    control_fd: the descriptor from which the worker reads.
  """

  job: job_spec.JobSpec
  stage: int
  replica: int = 0
  generation: int
  world: str = ''
  team: tuple[int, ...] = (0,)
  stands_for: tuple[int, ...] = ()
  agent_pid: int
  cores: tuple[int, ...]
  compilation_cache_dir: str
  folder: str
  durable_folder: str = ''
  handover_folder: str
  host: str
  secret: str = dataclasses.field(repr=False)
  platform: str
  is_replacement: bool = False
  grows_capacity: bool = False
  environment: environment_lib.Record = dataclasses.field(default_factory=dict)
  data_fingerprint: dict[str, Any] = dataclasses.field(default_factory=dict)
  faults: tuple[faults_lib.Fault, ...] = ()
  status_fd: int
  control_fd: int

  @property
  def loads_ahead(self) -> bool:
    """True if a standby creates a backend and loads its programs.

    On an accelerator it would take memory from the workers; and a backend on
    CPU has as many threads as cores that it may use at its creation.
    """
    return self.platform == 'cpu' and bool(self.cores)
