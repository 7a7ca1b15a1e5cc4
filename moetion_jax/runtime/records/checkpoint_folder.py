"""The folder of a checkpoint: whether it is whole, and how it is replaced.

Others may put files into it, which no save takes away.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import pathlib
import re
from collections.abc import Iterator

from moetion_jax import errors
from moetion_jax.runtime.records import own_files

_MARKER, _METADATA = own_files.COMMIT_NAMES


def is_committed(path: str | os.PathLike[str]) -> bool:
  """Returns whether Orbax committed a checkpoint in a folder.

  Args:
    path: the folder, which need not exist.
  """
  folder = pathlib.Path(path)
  if (folder / _MARKER).is_file():
    return True
  try:  # versions before that file, and copies without it
    value = json.loads((folder / _METADATA).read_bytes())
  except (OSError, ValueError):
    return False
  return isinstance(value, dict) and bool(value.get('commit_timestamp_nsecs'))


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[str]:
  """Gives a place to write a checkpoint to, then moves it to where it belongs.

  What an earlier save left there, or on its way there, is removed by name
  first. Files of others stay where they are: the new checkpoint is then
  written beside them and moved in, what commits it last.

  Args:
    path: the folder of the checkpoint.

  Yields:
    The path to write to, at which nothing is.

  Raises:
    errors.StoreError: the folder cannot be replaced.
  """
  folder = pathlib.Path(os.path.abspath(path))
  try:
    place = _prepare(folder)
  except OSError as error:
    raise _error(folder, error) from error
  yield str(place)
  if place != folder:
    try:
      _move_into(place, folder)
    except OSError as error:
      raise _error(folder, error) from error


def _prepare(folder: pathlib.Path) -> pathlib.Path:
  """Removes earlier saves of ours; returns a path at which nothing is."""
  if folder.is_symlink():
    raise OSError(0, 'is a symbolic link, and no folder', str(folder))
  aside = re.escape(own_files.ASIDE_SUFFIX)
  orbax = re.escape(own_files.ORBAX_SUFFIX)
  name = rf'{re.escape(folder.name)}({aside}(-\d+)?)?({orbax}.*)?'
  if folder.parent.is_dir():
    found = own_files.find(folder.parent, {name: own_files.CHECKPOINT})
    own_files.remove(found)
  for number in itertools.count(0):
    suffix = own_files.ASIDE_SUFFIX if number else ''
    suffix += f'-{number}' if number > 1 else ''
    place = folder.with_name(folder.name + suffix)
    # Orbax removes whatever has the name of its temporary folder.
    written = place.with_name(place.name + own_files.ORBAX_SUFFIX)
    if not os.path.lexists(place) and not os.path.lexists(written):
      return place
  raise AssertionError


def _move_into(source: pathlib.Path, target: pathlib.Path) -> None:
  """Moves all that is in a folder into another one, what commits it last."""
  target.mkdir(exist_ok=True)
  commits = own_files.COMMIT_NAMES
  for name in sorted(
    os.listdir(source), key=lambda n: (n in commits, n == _MARKER, n)
  ):
    inner = source / name
    if inner.is_dir() and (target / name).is_dir():
      _move_into(inner, target / name)
    else:
      inner.replace(target / name)
  source.rmdir()


def _error(folder: pathlib.Path, error: OSError) -> errors.StoreError:
  return errors.StoreError(
    f'{error.filename or folder}: {error.strerror}; move it away, then start '
    'again: a checkpoint is to be written there'
  )
