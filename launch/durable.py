"""Where snapshots lie on disk, with policies that persist them.

No JAX here: the agent uses this module and never creates a JAX backend.
"""

from __future__ import annotations

import os
import pathlib
import shutil

from launch import agent_settings, host_store

_NAME = 'durable'


def folder_of(where: agent_settings.AgentSettings, workdir: str) -> str:
  """The folder of a run's snapshots on disk; '' if it has none.

  Args:
    where: it runs.
    workdir: absolute.
  """
  if not where.captures.rules.is_durable:
    return ''
  if not where.durable_dir:
    return os.path.join(workdir, _NAME)
  name = f'moetion-{host_store.run_id(workdir)}'
  return os.path.join(os.path.abspath(where.durable_dir), name)


def has_left(folder: str) -> bool:
  """Whether there is something that a run can go on with."""
  return bool(folder) and any(pathlib.Path(folder).glob('*.snapshots/*'))


def remove(folder: str) -> None:
  """Removes all of it."""
  if folder:
    shutil.rmtree(folder, ignore_errors=True)
