"""The flags that tell `show` and `convert` which run to look at."""

from __future__ import annotations

from collections.abc import Sequence

from absl import flags

from launch.offline import scan, stored_run
from moetion_jax import errors

_WORKDIR = flags.DEFINE_string(
  'workdir', '', 'Folder of the run; also without the name of the flag.'
)
_HOSTMEM_DIR = flags.DEFINE_string(
  'hostmem_dir', '/dev/shm', 'The --hostmem_dir of the run.'
)


def find_run(argv: Sequence[str]) -> stored_run.StoredRun:
  """Finds the run that is named; does not scan it yet.

  Args:
    argv: the command's name, and its arguments that are no flags.

  Raises:
    errors.ConfigError: not exactly one folder is named, or no run is in it.
  """
  named = [*argv[1:], *([_WORKDIR.value] if _WORKDIR.value else [])]
  if len(named) != 1:
    raise errors.ConfigError(
      'workdir', ' '.join(named), 'name the folder of one run'
    )
  return scan.find(named[0], _HOSTMEM_DIR.value)
