"""The run that a folder holds: its config.json and its id.

The id names the run's store in host memory and its folder of snapshots on disk.
It stands in config.json; before there is one, in the lock file. It goes with
the folder wherever that is moved.
"""

from __future__ import annotations

import json
import os
import pathlib
import re
import secrets
from typing import Any

from moetion_jax.runtime.records import changes, own_files

RUN_ID = 'run_id'
# The path that the folder had when a run in it last began.
WORKDIR = 'workdir'
# The directory of its stores in host memory at that time.
HOSTMEM_DIR = 'hostmem_dir'
_ID_BYTES = 8
_ID = re.compile(rf'[0-9a-f]{{{2 * _ID_BYTES}}}')
# Fields of every run's config.json, and what they hold.
_FIELDS = {
  'preset': str,
  'model': dict,
  'train': dict,
  'data_fingerprint': dict,
}
# The one that has what the run computes with; the second of earlier versions.
_SOFTWARE_FIELDS = (changes.ENVIRONMENT, changes.SOFTWARE)
_TRAIN_FIELDS = ('stages', 'optimizer')
_SHOWN = 3


class NotOursError(Exception):
  """A config.json is no run's of ours; says what it is."""


def new_id() -> str:
  """Draws the id of a new run."""
  return secrets.token_hex(_ID_BYTES)


def read_config(folder: str | os.PathLike[str]) -> dict[str, Any] | None:
  """Reads the config.json of a run, of this version or another.

  Returns:
    Its content; None if there is no such file.

  Raises:
    NotOursError: it is not of a run, or damaged.
    OSError: it cannot be read.
  """
  try:
    data = pathlib.Path(folder, own_files.CONFIG).read_bytes()
  except FileNotFoundError:
    return None
  try:
    value = json.loads(data)
  except ValueError as error:
    raise NotOursError(f'it is damaged, or no JSON: {error}') from error
  if not isinstance(value, dict):
    raise NotOursError('it holds no JSON object')
  missing = [
    name
    for name, kind in _FIELDS.items()
    if not isinstance(value.get(name), kind)
  ]
  if not any(isinstance(value.get(name), dict) for name in _SOFTWARE_FIELDS):
    missing.append(_SOFTWARE_FIELDS[0])
  if 'train' not in missing:
    train = value['train']
    missing += [f'train.{name}' for name in _TRAIN_FIELDS if name not in train]
  if missing:
    has = ', '.join(f'"{name}"' for name in list(value)[:_SHOWN]) or 'nothing'
    raise NotOursError(f'it has {has}, but no "{missing[0]}"')
  return value


def read_id(folder: str | os.PathLike[str]) -> str:
  """Reads the id of the run that a folder holds, or began to hold.

  Returns:
    The id; '' if none is stored, or the folder cannot be read.
  """
  try:
    config = read_config(folder)
    if config is not None:
      return valid_id(config.get(RUN_ID))
    return valid_id(pathlib.Path(folder, own_files.LOCK).read_text().strip())
  except (OSError, ValueError, NotOursError):
    return ''


def valid_id(value: object) -> str:
  """Returns a run's id; '' for anything else."""
  return value if isinstance(value, str) and _ID.fullmatch(value) else ''
