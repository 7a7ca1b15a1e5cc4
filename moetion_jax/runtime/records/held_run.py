"""The run that a folder holds: its config.json and its id.

Its settings, all that config.json has, are the same at each start, with two
exceptions: what it reads may lie elsewhere, if it is the same; and it may get
more iterations.

The id names the run's store in host memory and its folder of snapshots on disk.
It stands in config.json, and goes with that wherever the folder is moved;
before there is one, in the lock file (see `run_ids`).
"""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import re
import secrets
from collections.abc import Mapping
from typing import Any

from moetion_jax import codec, config as config_lib, errors, job_spec
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

DATA_FINGERPRINT = 'data_fingerprint'
# Of the checkpoint that the run began with; versions before have none.
INIT_DIGEST = 'init_digest'
# The settings that say where a run's inputs lie, by what says which they are.
_INPUTS = {DATA_FINGERPRINT: 'data', INIT_DIGEST: 'init_from'}
# Fields of config.json known only once a worker has a backend and the data.
FOUND_OUT = (
  DATA_FINGERPRINT,
  INIT_DIGEST,
  changes.ENVIRONMENT,
  changes.CHANGES,
  changes.SOFTWARE,
)
# Those that may be other ones at a later start.
KEPT_UP = ('train', *_INPUTS.values(), INIT_DIGEST)
_MOST_NAMED = 5  # settings in a message


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
    errors.SystemRefusalError: the same, for a reason that is not in the file.
  """
  try:
    data = pathlib.Path(folder, own_files.CONFIG).read_bytes()
  except FileNotFoundError:
    return None
  except OSError as error:
    errors.check_limits(error)  # else what is there would count as no run
    raise
  try:
    value = json.loads(data)
  except (ValueError, RecursionError) as error:
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


def settings_of(
  known: Mapping[str, Any] | None,
  train: config_lib.TrainConfig,
  extend: str,
) -> config_lib.TrainConfig:
  """Returns the settings of training, as they go on for a run.

  Args:
    known: the content of the run's config.json; None for a new run.
    train: the user's settings.
    extend: the schedule of a run that is trained longer, see
      `config.trained_longer`.
  """
  had = _train_of(known) if known else None
  return config_lib.trained_longer(had, train, extend) if had else train


def check(
  known: Mapping[str, Any],
  config: Mapping[str, Any],
  workdir: str,
  extend: str,
) -> int:
  """Checks that settings are those of a run.

  Args:
    known: the content of the run's config.json.
    config: the settings; the fields that a worker finds out may be missing.
    workdir: the folder, for errors.
    extend: see `settings_of`.

  Returns:
    The number of iterations that the run has; `config` may have more.

  Raises:
    errors.ConfigError: they are those of another one, or the user did not say
      with which schedule it gets more iterations.
  """
  known, had = dict(known), _train_of(known)
  if had:
    wanted = codec.decode(config_lib.TrainConfig, config['train'])
    # With the settings that are new since, and those of a longer run.
    known['train'] = codec.encode(_longer(had, wanted, workdir, extend))
  for name, flag in _INPUTS.items():
    # It may lie elsewhere now: which one it is says the rest.
    is_given = bool(config.get(flag)) or name == DATA_FINGERPRINT
    if (
      flag in config
      and is_given
      and (known.get(name) or _same_place(known.get(flag), config[flag]))
    ):
      known[flag] = config[flag]
  for name in FOUND_OUT:
    if name not in config:
      known.pop(name, None)
  if INIT_DIGEST not in known:
    config = {k: v for k, v in config.items() if k != INIT_DIGEST}
  for name in MARKS:
    known.pop(name, None)
  of_people = f'{DATA_FINGERPRINT}.{job_spec.NAME}'
  changed = [
    name for name in config_lib.differences(known, config) if name != of_people
  ]
  for name, flag in _INPUTS.items():
    if changed and changed[0].partition('.')[0] == name:
      what = ', '.join(changed[:_MOST_NAMED])
      raise job_spec.changed_input(flag, config.get(flag, ''), what)
  if changed or not had:
    what = ', '.join(changed[:_MOST_NAMED])
    raise errors.ConfigError(
      'workdir',
      workdir,
      f'holds a run with other settings ({what}); pass --fresh to remove it, '
      'or another --workdir',
    )
  return had.iterations


def _longer(
  had: config_lib.TrainConfig,
  wanted: config_lib.TrainConfig,
  workdir: str,
  extend: str,
) -> config_lib.TrainConfig:
  """Returns the settings that a run has, but for those that may change.

  Raises:
    errors.ConfigError: see `check`.
  """
  if wanted.iterations <= had.iterations:
    return had
  if not extend:
    raise errors.ConfigError(
      'iterations',
      wanted.iterations,
      f'{workdir} holds a run of {had.iterations}, whose learning rate decays '
      f'until {had.optimizer.decay_iterations}. --extend=pin goes on with that '
      'schedule, --extend=stretch with that of '
      f'{wanted.optimizer.decay_iterations} from iteration '
      f'{had.iterations + 1} on (a job with an optimizer of its own keeps to '
      'that, with either); --fresh removes the run',
    )
  optimizer = had.optimizer
  if extend == 'stretch':
    decay_iterations = wanted.optimizer.decay_iterations
    optimizer = dataclasses.replace(
      optimizer, decay_iterations=decay_iterations
    )
  longer = dataclasses.replace(
    had, iterations=wanted.iterations, optimizer=optimizer
  )
  return config_lib.trained_longer(had, longer, extend)


def _train_of(config: Mapping[str, Any]) -> config_lib.TrainConfig | None:
  """Reads a run's settings of training; None if they are of another version."""
  try:
    return codec.decode(config_lib.TrainConfig, config['train'])
  except (ValueError, errors.ConfigError):
    return None


def _same_place(one: object, other: str) -> bool:
  """Returns True if two settings name the same path, however spelled."""
  if not isinstance(one, str) or not one or not other:
    return False
  here = os.path.realpath(os.path.expanduser(other))
  return os.path.realpath(os.path.expanduser(one)) == here
