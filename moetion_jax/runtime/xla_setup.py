"""Sets JAX up before its backend exists, from settings, not by import order."""

from __future__ import annotations

import ctypes
import os
import sys

import jax

from moetion_jax import errors
from moetion_jax.programs import jax_internals
from moetion_jax.runtime import environment

# Members may have to import and compile first, on a machine with much to do.
# For one that died nobody waits: the agent ends them all.
_WORLD_SECONDS = 600
# The agent watches, by a clock that does not jump; JAX goes by the time of day.
_HEARTBEAT_SECONDS = 7 * 24 * 3600

# mallopt parameters of glibc.
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -2, -4, -8


def configure(*, local_devices: int, compilation_cache_dir: str) -> None:
  """Sets platform options; call once, before anything touches a device.

  Args:
    local_devices: number of virtual devices on CPU; other platforms use the
      devices that they see.
    compilation_cache_dir: folder of the persistent cache of compiled programs;
      '' for none.
  """
  _keep_freed_memory()
  flags = os.environ.get('XLA_FLAGS', '')
  os.environ['XLA_FLAGS'] = environment.with_determinism(flags)
  jax.config.update('jax_num_cpu_devices', local_devices)
  if compilation_cache_dir:
    jax.config.update(
      'jax_compilation_cache_dir', os.path.expanduser(compilation_cache_dir)
    )
    jax.config.update('jax_persistent_cache_min_compile_time_secs', 0)
    jax.config.update('jax_persistent_cache_min_entry_size_bytes', -1)


def join_world(address: str, replicas: int, replica: int) -> None:
  """Makes this process a member of its stage world; call after `configure`.

  Args:
    address: address of the world's coordinator, which is replica 0.
    replicas: number of members of the world.
    replica: this process's number among them.

  Raises:
    errors.UnmetError: the others did not come. JAX ends the process instead
      where the port is taken, or after the time limit.
  """
  # The agent ends workers; this service would swallow SIGTERM.
  jax.config.update('jax_enable_preemption_service', False)
  try:
    jax.distributed.initialize(
      address,
      replicas,
      replica,
      cluster_detection_method='deactivate',
      initialization_timeout=_WORLD_SECONDS,
      heartbeat_timeout_seconds=_HEARTBEAT_SECONDS,
      coordinator_bind_address=address,
    )
    jax_internals.gather_at(address.rpartition(':')[0])
    jax.devices()  # waits for the others
  except Exception as error:  # JAX passes on the RPC layer's errors
    raise errors.UnmetError(
      f'the stage world at {address} did not come together: {error}'
    ) from error
  jax_internals.let_all_write_cache()


def touch_memory(size_bytes: int) -> None:
  """Takes memory from the kernel now and leaves it to the allocator.

  A standby calls this before it is promoted: the page faults of its first
  iteration are then no part of a recovery (measured at `tiny`: 45 thousand, up
  to 0.3 s on a virtual machine). Call after `configure`.
  """
  if not sys.platform.startswith('linux'):
    return
  libc = ctypes.CDLL('libc.so.6')
  libc.malloc.restype = ctypes.c_void_p
  libc.malloc.argtypes = [ctypes.c_size_t]
  libc.free.argtypes = [ctypes.c_void_p]
  if pointer := libc.malloc(size_bytes):
    ctypes.memset(pointer, 0, size_bytes)
    libc.free(pointer)


def cores() -> str:
  """Returns the number of cores that XLA computes with on CPU, as text.

  The bits depend on it: matrix products are cut into as many parts as there are
  threads (measured at `tiny`: one core and two differ from iteration 1 on).
  """
  return str(len(os.sched_getaffinity(0)))


def use_cores(count: str | None) -> None:
  """Limits this process to as many cores as a worker had.

  Call before `configure`.

  Args:
    count: the worker's `cores()`; None where it was not recorded.
  """
  usable = sorted(os.sched_getaffinity(0))
  if count is not None and int(count) < len(usable):
    os.sched_setaffinity(0, usable[: int(count)])


def _keep_freed_memory() -> None:
  """Makes glibc reuse freed memory instead of giving it back to the kernel.

  XLA's CPU client allocates every buffer anew in every program; returned to
  the kernel, hundreds of MB are page-faulted again each microbatch (measured
  at `small`: a third of the CPU time was spent there).
  """
  if not sys.platform.startswith('linux'):
    return
  try:
    libc = ctypes.CDLL('libc.so.6')
    mallopt = libc.mallopt
  except (OSError, AttributeError):  # another libc has its own habits
    return
  mallopt(_M_MMAP_MAX, 0)
  mallopt(_M_TRIM_THRESHOLD, -1)
  mallopt(_M_TOP_PAD, 64 << 20)
  mallopt(_M_ARENA_MAX, 1)
