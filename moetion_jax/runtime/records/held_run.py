"""The run that a folder holds: its config.json and its id.

The id names the run's store in host memory and its folder of snapshots on disk.
It stands in config.json, and goes with that wherever the folder is moved;
before there is one, in the lock file (see `run_ids`).
"""

from __future__ import annotations

import json
import os
import pathlib
import re
import secrets
from typing import Any

from moetion_jax.hostmem import store_folder
from moetion_jax.runtime.records import changes, own_files, whereabouts

RUN_ID = 'run_id'
# The path that the folder had when a run in it last began, and its device and
# inode (a store's owner file has fields of the same names).
WORKDIR = store_folder.WORKDIR
FOLDER = store_folder.FOLDER
# Fields that are no settings: they say which run it is, and where.
MARKS = (RUN_ID, WORKDIR, FOLDER, *whereabouts.FIELDS)
_ID_BYTES = 8
_ID = re.compile(rf'[0-9a-f]{{{2 * _ID_BYTES}}}')
# Objects in every run's config.json, whatever its job is.
_FIELDS = ('train', 'data_fingerprint')
# The one that has what the run computes with; the second of earlier versions.
_SOFTWARE_FIELDS = (changes.ENVIRONMENT, changes.SOFTWARE)
_TRAIN_FIELDS = ('stages', 'optimizer')
_SHOWN = 3
_LONGEST = 40  # characters of a value in a message


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
  missing = [x for x in _FIELDS if not isinstance(value.get(x), dict)]
  if not any(isinstance(value.get(name), dict) for name in _SOFTWARE_FIELDS):
    missing.append(_SOFTWARE_FIELDS[0])
  if 'train' not in missing:
    train = value['train']
    missing += [f'train.{name}' for name in _TRAIN_FIELDS if name not in train]
  if missing:
    raise NotOursError(_say_what_is_wrong(value, missing[0]))
  try:
    changes.check_content(value, _stages(value))
    whereabouts.Whereabouts.from_json(value)
  except ValueError as error:
    raise NotOursError(str(error)) from error
  return value


def _stages(config: dict[str, Any]) -> int | None:
  """Returns a run's number of stages; None if it is no number."""
  stages = config['train']['stages']
  return stages if isinstance(stages, int) else None


def _say_what_is_wrong(value: dict[str, Any], name: str) -> str:
  """Says that a field is missing, or of the wrong kind.

  Args:
    value: the content of the file.
    name: the name of the field.
  """
  if name in value:
    text = json.dumps(value[name])[:_LONGEST]
    return f'"{name}" in it is {text}, and no object'
  has = ', '.join(f'"{other}"' for other in list(value)[:_SHOWN]) or 'nothing'
  return f'it has {has}, but no "{name}"'


def read_id(folder: str | os.PathLike[str]) -> str:
  """Reads the id of the run that a folder holds.

  Returns:
    The id; '' if none is stored, or the folder cannot be read.
  """
  try:
    return valid_id((read_config(folder) or {}).get(RUN_ID))
  except (OSError, NotOursError):
    return ''


def valid_id(value: object) -> str:
  """Returns a run's id; '' for anything else."""
  return value if isinstance(value, str) and _ID.fullmatch(value) else ''
