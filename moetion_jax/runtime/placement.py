"""The host, cores and devices of each worker, as pure functions.

XLA starts as many threads as a process may use cores, so the worker's cores are
set before its backend exists. Their number changes the bits
(`xla_setup.cores`), so a replacement gets its predecessor's cores.

Few cores are shared by all workers: while one has nothing to do (a pipeline's
bubble, and above all a recovery of another stage) its core works for another.
Measured with two stages of `tiny` on 2 cores: shared, an iteration takes no
more CPU time, and less time; a replay has the machine to itself. Many cores are
dealt out: a stage's products are too small for all of them.
"""

from __future__ import annotations

import dataclasses
import os
import pathlib
from collections.abc import Mapping, Sequence

from moetion_jax import errors
from moetion_jax.runtime import environment as environment_lib

# A host with at most this many cores shares them among its workers.
_SHARED_CORES = 4
# Fraction of one GPU's memory, for all workers that share it.
_SHARED_MEMORY_FRACTION = 0.9


@dataclasses.dataclass(frozen=True, kw_only=True)
class Placement:
  """The cores and devices of one worker.

  Attributes:
    cores: core numbers as in `os.sched_setaffinity`.
    environment: variables to set on top of the agent's.
  """

  cores: tuple[int, ...]
  environment: Mapping[str, str]


def place(
  workers: int,
  *,
  local_devices: int,
  cores: Sequence[int],
  gpus: Sequence[str],
  environment: Mapping[str, str],
) -> tuple[Placement, ...]:
  """Divides a host among its workers.

  A few cores are open to every worker. More are dealt in runs of neighbours;
  with more workers than cores each gets one, in turn. GPUs are dealt in runs of
  `local_devices`; when there are too few, workers share them in turn, and their
  memory.

  Args:
    workers: number of workers.
    local_devices: number of devices of each worker.
    cores: the cores that the agent may use.
    gpus: GPU names as in CUDA_VISIBLE_DEVICES; empty without any.
    environment: the agent's variables; what the user set there stays.
  """
  parts = 1 if len(cores) <= _SHARED_CORES else min(workers, len(cores))
  groups = len(gpus) // local_devices  # 0: the worker says what is missing
  placements = []
  for index in range(workers):
    variables = memory_variables(environment)
    flags = environment.get('XLA_FLAGS', '')
    if (all_flags := environment_lib.with_determinism(flags)) != flags:
      variables['XLA_FLAGS'] = all_flags
    if groups:
      group = index % groups
      first = group * local_devices
      variables['CUDA_VISIBLE_DEVICES'] = ','.join(
        gpus[first : first + local_devices]
      )
      sharers = len(range(group, workers, groups))
      if sharers > 1 and 'XLA_PYTHON_CLIENT_MEM_FRACTION' not in environment:
        share = _SHARED_MEMORY_FRACTION / sharers
        variables['XLA_PYTHON_CLIENT_MEM_FRACTION'] = f'{share:.3f}'
    part = index % parts
    begin, end = (len(cores) * p // parts for p in (part, part + 1))
    placements.append(
      Placement(cores=tuple(cores[begin:end]), environment=variables)
    )
  return tuple(placements)


def memory_variables(environment: Mapping[str, str]) -> dict[str, str]:
  """Returns variables that make glibc ask for huge pages.

  The loader reads them, so they are set at the start. A worker touches hundreds
  of megabytes in its first iteration (measured at `tiny`: that takes 0.78 s
  with huge pages, else 0.99).
  """
  tunables = environment.get('GLIBC_TUNABLES', '')
  if 'glibc.malloc.hugetlb' in tunables:
    return {}
  parts = filter(None, [tunables, 'glibc.malloc.hugetlb=1'])
  return {'GLIBC_TUNABLES': ':'.join(parts)}


def host_of_stages(
  stages: int, hosts: int, replicas: int = 1
) -> tuple[int, ...]:
  """Returns each stage's host: neighbours together, no host without a stage.

  Raises:
    errors.ConfigError: there are fewer stages than hosts, or several hosts and
      replicas.
  """
  if replicas > 1 and hosts > 1:
    raise errors.ConfigError(
      'local_hosts', hosts, 'must be 1 with --replicas, for now'
    )
  if not 1 <= hosts <= stages:
    raise errors.ConfigError(
      'local_hosts', hosts, f'must be 1 to {stages} (--stages)'
    )
  return tuple(stage * hosts // stages for stage in range(stages))


def visible_gpus(
  environment: Mapping[str, str], device_folder: str = '/dev'
) -> tuple[str, ...]:
  """Returns the NVIDIA devices that workers may use; makes no driver call."""
  platforms = environment.get('JAX_PLATFORMS', '')
  if platforms and not {'cuda', 'gpu'} & set(platforms.split(',')):
    return ()
  named = environment.get('CUDA_VISIBLE_DEVICES')
  if named is not None:
    return tuple(x.strip() for x in named.split(',') if x.strip())
  numbers = (
    path.name.removeprefix('nvidia')
    for path in pathlib.Path(device_folder).glob('nvidia[0-9]*')
  )
  count = sum(number.isdigit() for number in numbers)
  # CUDA numbers the devices from 0, whatever the device files are called.
  return tuple(str(i) for i in range(count))


def usable_cores() -> tuple[int, ...]:
  """Returns the cores that this process may run on."""
  return tuple(sorted(os.sched_getaffinity(0)))
