"""Which run a command looks at, as `show` and `convert` are told."""

from __future__ import annotations

from collections.abc import Sequence

from absl import flags

from launch import store_scan, stored
from moetion_jax import base

_WORKDIR = flags.DEFINE_string(
  'workdir', '', 'Folder of the run; also without the name of the flag.'
)
_HOSTMEM_DIR = flags.DEFINE_string(
  'hostmem_dir', '/dev/shm', 'The --hostmem_dir of the run.'
)


def find_run(argv: Sequence[str]) -> stored.StoredRun:
  """The run that is named, not scanned yet.

  Args:
    argv: the command's name, and what was not a flag.

  Raises:
    base.ConfigError: not one folder is named, or there is nothing in it.
  """
  named = [*argv[1:], *([_WORKDIR.value] if _WORKDIR.value else [])]
  if len(named) != 1:
    raise base.ConfigError(
      'workdir', ' '.join(named), 'name the folder of one run'
    )
  return store_scan.find(named[0], _HOSTMEM_DIR.value)
