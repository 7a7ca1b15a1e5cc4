"""Reckons the host memory that a run would take: `launch.train --dry_run`.

Nothing is started and no backend is created; sizes come from shapes alone.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from launch.lm import settings as run_settings, transformer_job
from moetion_jax.hostmem import memory_limits
from moetion_jax.logs import size as log_size
from moetion_jax.policies import (
  decision,
  planner,
  settings as capture_settings,
)
from moetion_jax.policies.kinds import registry
from moetion_jax.programs import stage
from moetion_jax.runtime import placement
from moetion_jax.training import job as job_lib


def show(
  config: run_settings.RunConfig,
  captures: capture_settings.CaptureSettings,
  *,
  hostmem_dir: str,
  local_hosts: int,
) -> None:
  """Prints the host memory that stages and hosts need, and what is free.

  Args:
    config: the run's settings.
    captures: settings of the snapshots.
    hostmem_dir: a folder in tmpfs.
    local_hosts: number of hosts that the stages are spread over.

  Raises:
    errors.ConfigError: the run could not begin.
  """
  stages = range(config.train.stages)
  sizes = []
  for index in stages:
    parts = stage.layout_of(
      transformer_job.of(config).declare_stage(index), has_devices=False
    )
    sizes.append(job_lib.stage_sizes(parts, config.train.local_devices))
  replicas = config.train.replicas
  pools = captures.policy.planner(
    captures, sizes, '', replicas=replicas
  ).pools()
  spec, kept_iterations = config.job_spec(), captures.kept_iterations
  hosts = placement.host_of_stages(
    config.train.stages, local_hosts, config.train.replicas
  )
  totals = [0] * local_hosts
  for index, size, pool in zip(stages, sizes, pools, strict=True):
    state_bytes = sum(size.state_bytes.values())
    log_bytes = log_size.log_size(spec, index, kept_iterations).file_bytes
    snapshot_bytes = pool.files * pool.size_bytes
    totals[hosts[index]] += (
      replicas * (log_bytes + snapshot_bytes) + state_bytes
    )
    print(
      f'stage {index}: {len(size.state_bytes)} operators, '
      f'{memory_limits.format_bytes(state_bytes)} training state; '
      f'in host memory {memory_limits.format_bytes(log_bytes)} of logs '
      f'({captures.kept_iterations} iterations), '
      f'{memory_limits.format_bytes(snapshot_bytes)} of snapshots '
      f'({pool.files} of at most '
      f'{memory_limits.format_bytes(pool.size_bytes)})'
      + (f', for each of {replicas} replicas' if replicas > 1 else '')
    )
  for line in by_policy(captures, sizes, replicas):
    print(line)
  there = memory_limits.read_room(hostmem_dir)
  for host, total in enumerate(totals):
    print(
      f'host {host}: {memory_limits.format_bytes(total)} with the final state, '
      'which is put there in the end'
    )
  free = [there.tmpfs_free_bytes, there.memory_available_bytes]
  free.append(there.cgroup_available_bytes)
  least = min(n for n in free if n is not None)
  print(f'{hostmem_dir}: {memory_limits.format_bytes(least)} are free')


def by_policy(
  captures: capture_settings.CaptureSettings,
  sizes: Sequence[planner.StageSizes],
  replicas: int = 1,
) -> list[str]:
  """Returns a line for each policy and way of replay.

  It has the bytes of a snapshot, and of all that are kept.

  Args:
    captures: settings of the run; `window_length` counts for sparse only,
      `interval` for the others only.
    sizes: operator sizes of each stage.
    replicas: replicas of each stage.
  """
  lines = []
  variants = [
    (policy, replay)
    for policy in registry.POLICIES.values()
    if policy.takes_snapshots
    for replay in decision.REPLAYS
    if replay == decision.MICROBATCHES
    or (policy.may_record_gradients and captures.window_mode != 'aligned')
  ]
  for policy, replay in variants:
    name = policy.name
    one = dataclasses.replace(captures.under(policy), replay=replay)
    if policy.may_record_gradients:
      name += f' --replay={replay}'
    pools = policy.planner(one, sizes, '', replicas=replicas).pools()
    largest = max(pool.size_bytes for pool in pools)
    total = replicas * sum(pool.files * pool.size_bytes for pool in pools)
    text = (
      f'--policy={name}: a snapshot of a worker takes at most '
      f'{memory_limits.format_bytes(largest)}; all in host memory '
      f'{memory_limits.format_bytes(total)}'
    )
    if policy.is_durable:
      kept = captures.keep_windows + 1  # and the one being written
      on_disk = replicas * kept * sum(pool.size_bytes for pool in pools)
      text += f', on disk {memory_limits.format_bytes(on_disk)}'
    lines.append(text)
  return lines
