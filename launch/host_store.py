"""The run's store folder on this host, opened with everything checked.

No JAX here: the agent uses this module and never creates a JAX backend.
"""

from __future__ import annotations

import hashlib
import os

from moetion_jax import base, hostmem, room


def open_store(hostmem_dir: str, workdir: str) -> hostmem.StoreFolder:
  """An empty store folder for a workdir; prints what dead runs left.

  Args:
    hostmem_dir: existing directory in tmpfs.
    workdir: absolute; one workdir has one store on a host.

  Raises:
    base.ConfigError: it cannot be used.
  """
  run_id = hashlib.blake2b(workdir.encode(), digest_size=8).hexdigest()
  try:
    for leftover in hostmem.find_leftovers(hostmem_dir):
      is_ours = leftover.run_id == run_id
      print(
        f'{leftover.path}: {room.format_bytes(leftover.size_bytes)} left by a '
        f'run that died (pid {leftover.pid}); '
        + ('removed.' if is_ours else 'start it again, or remove the folder.'),
        flush=True,
      )
      if is_ours:
        hostmem.remove_store(leftover.path)
    store = hostmem.StoreFolder(hostmem_dir, run_id)
    store.start()
  except base.StoreError as error:
    raise _error(hostmem_dir, error) from error
  return store


def check_hostmem_dir(hostmem_dir: str) -> None:
  """Raises ConfigError unless it is an existing directory."""
  if not os.path.isdir(hostmem_dir):
    raise base.ConfigError('hostmem_dir', hostmem_dir, 'no such directory')


def check_room(hostmem_dir: str, need_bytes: int) -> None:
  """Raises ConfigError, remedy included, if so much does not fit."""
  try:
    room.check_room(need_bytes, room.read_room(hostmem_dir))
  except base.StoreError as error:
    raise _error(hostmem_dir, error) from error


def _error(hostmem_dir: str, error: base.StoreError) -> base.ConfigError:
  return base.ConfigError('hostmem_dir', hostmem_dir, str(error))
