"""Sets JAX up before its backend exists, from settings, not by import order."""

from __future__ import annotations

import ctypes
import os
import platform
import sys
from importlib import metadata

import jax

from launch import placement

# Packages on whose versions the bits of a run depend.
_PACKAGES = (
  'jax',
  'jaxlib',
  'flax',
  'optax',
  'orbax-checkpoint',
  'grain',
)

# mallopt parameters of glibc.
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -2, -4, -8


def configure(*, local_devices: int, compilation_cache_dir: str) -> None:
  """Sets platform options; call once, before anything touches a device.

  Args:
    local_devices: virtual devices on CPU; other platforms take what they see.
    compilation_cache_dir: persistent cache of compiled programs; '' for none.
  """
  _keep_freed_memory()
  flags = os.environ.get('XLA_FLAGS', '')
  if 'xla_gpu_deterministic_ops' not in flags:
    os.environ['XLA_FLAGS'] = f'{flags} {placement.DETERMINISM_FLAG}'.strip()
  jax.config.update('jax_num_cpu_devices', local_devices)
  if compilation_cache_dir:
    jax.config.update(
      'jax_compilation_cache_dir', os.path.expanduser(compilation_cache_dir)
    )
    jax.config.update('jax_persistent_cache_min_compile_time_secs', 0)
    jax.config.update('jax_persistent_cache_min_entry_size_bytes', -1)


def software() -> dict[str, str]:
  """Versions on which the bits of a run depend; creates the backend."""
  return {
    'python': platform.python_version(),
    **{name: metadata.version(name) for name in _PACKAGES},
    'platform': jax.default_backend(),
    'device': jax.devices()[0].device_kind,
  }


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
