"""A run's own files in folders that a user names: their names, their removal.

Whatever has another name, or is of another kind, is somebody else's. It stays,
wherever it lies, and with it the folders that it lies in. Symbolic links are
links: they are removed, what they point to is not.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import os
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

from moetion_jax import errors
from moetion_jax.runtime.records import files as record_files
from moetion_jax.snapshots import file as snapshot_file, folders

CONFIG = 'config.json'
METRICS = 'metrics.jsonl'
LOCK = '.lock'
CHECKPOINT_NAME = 'checkpoint'
LOGS_NAME = 'logs'
DURABLE_NAME = 'durable'
# A checkpoint that was not read back yet has its name to be, and this.
ASIDE_SUFFIX = '.unproven'
# The suffix of folders that Orbax writes, before it renames them.
ORBAX_SUFFIX = '.orbax-checkpoint-tmp'
_SHOWN = 10  # names in one line

# A folder's contents: the pattern of a name, and None for a file or the
# contents of the folder. In this order they are removed.
Tree = Mapping[str, Any]

_OCDBT: Tree = {
  r'manifest\.ocdbt(\.__lock)?': None,
  'd': {r'[0-9a-f]{32}(\.__lock)?': None},
}
# As Orbax's StandardCheckpointer writes it (a test looks at a real one).
CHECKPOINT: Tree = {
  **{re.escape(name): None for name in snapshot_file.COMMIT_NAMES},
  r'_METADATA|_sharding|_strings\.json': None,
  r'ocdbt\.process_\d+': _OCDBT,
  r'array_metadatas': {r'process_\d+': None},
  **_OCDBT,
}
_FILES = (METRICS, 'events.jsonl', 'workers.json')
# What is written under such a name gets its own when it is whole.
TEMPORARY: Tree = {
  re.escape(record_files.TEMPORARY_PREFIX) + r'[a-z0-9_]{8}': None
}
_LOGS: Tree = {r'stage-\d+(\.replica-\d+)?\.log': None, **TEMPORARY}


def _run_tree() -> Tree:
  """Returns a workdir without its config.json, which goes last, and lock."""
  return {
    rf'{CHECKPOINT_NAME}({re.escape(ASIDE_SUFFIX)}(-\d+)?)?'
    rf'({re.escape(ORBAX_SUFFIX)}.*)?': CHECKPOINT,
    DURABLE_NAME: folders.own_names(),
    **{re.escape(name): None for name in _FILES},
    LOGS_NAME: _LOGS,
    **TEMPORARY,
  }


@dataclasses.dataclass(frozen=True, kw_only=True)
class Found:
  """The contents of a folder.

  Attributes:
    own: paths of the run's files and folders, in the order of their removal.
    others: names of all else, as paths inside the folder; those of folders end
      with a slash.
  """

  own: tuple[pathlib.Path, ...] = ()
  others: tuple[str, ...] = ()


def find(folder: str | os.PathLike[str], tree: Tree) -> Found:
  """Tells a folder's own files from others; changes nothing.

  Args:
    folder: the folder, which need not exist.
    tree: what a run makes in it.

  Raises:
    OSError: a folder cannot be read.
  """
  entries: dict[str, os.DirEntry[str]] = {}
  missing = contextlib.suppress(FileNotFoundError, NotADirectoryError)
  with missing, os.scandir(folder) as found:
    entries = {entry.name: entry for entry in found}
  own: list[pathlib.Path] = []
  others: list[str] = []
  for pattern, inner in tree.items():
    for name in sorted(entries):
      if not re.fullmatch(pattern, name) or not _is_a(entries[name], inner):
        continue
      entry = entries.pop(name)
      if inner is not None and not entry.is_symlink():
        below = find(entry.path, inner)
        own += below.own
        others += [f'{name}/{other}' for other in below.others]
      own.append(pathlib.Path(entry.path))
  others += [
    name + '/' * entry.is_dir(follow_symlinks=False)
    for name, entry in sorted(entries.items())
  ]
  return Found(own=tuple(own), others=tuple(others))


def _is_a(entry: os.DirEntry[str], inner: Tree | None) -> bool:
  """Tells whether an entry is a link, or a file or folder as a run makes it."""
  if entry.is_symlink():
    return True
  if inner is None:
    return entry.is_file(follow_symlinks=False)
  return entry.is_dir(follow_symlinks=False)


def remove(found: Found) -> None:
  """Removes a run's own files; folders go unless others' files are in them.

  Raises:
    OSError: something cannot be removed; what comes after it is still there.
  """
  for path in found.own:
    try:
      if path.is_dir() and not path.is_symlink():
        path.rmdir()
      else:
        path.unlink()
    except FileNotFoundError:
      continue
    except OSError as error:
      if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
        raise


def find_run(workdir: str | os.PathLike[str]) -> Found:
  """Tells a workdir's files from others, config.json and the lock left out."""
  found = find(workdir, _run_tree())
  others = (x for x in found.others if x not in (CONFIG, LOCK))
  return dataclasses.replace(found, others=tuple(others))


def remove_durable(folder: str) -> tuple[str, ...]:
  """Removes a run's folders of snapshots, and the folder they are in.

  Args:
    folder: that folder; '' for none.

  Returns:
    What is not the run's and stays, as paths.

  Raises:
    OSError: something cannot be removed.
  """
  if not folder or not os.path.isdir(folder) or os.path.islink(folder):
    return ()
  found = find(folder, folders.own_names())
  own = (*found.own, pathlib.Path(folder))
  remove(dataclasses.replace(found, own=own))
  return tuple(os.path.join(folder, other) for other in found.others)


def remove_snapshots(
  folder: str | os.PathLike[str], path: str | os.PathLike[str]
) -> None:
  """Removes what a run made at a path, or below it, in its folder on disk.

  Args:
    folder: the folder of all its snapshots.
    path: a path in it.

  Raises:
    OSError: something cannot be removed.
  """
  found = find(folder, folders.own_names())
  own = tuple(one for one in found.own if one.is_relative_to(path))
  remove(Found(own=own))


def run_names(workdir: str | os.PathLike[str]) -> list[str]:
  """Names what looks like a run's in a folder, whoever made it.

  Raises:
    OSError: a folder cannot be read.
  """
  folder = pathlib.Path(workdir)
  names = [
    name
    for name in (CONFIG, *_FILES, CHECKPOINT_NAME)
    if os.path.lexists(folder / name)
  ]
  trees = {LOGS_NAME: _LOGS, DURABLE_NAME: folders.own_names()}
  for name, tree in trees.items():
    if find(folder / name, tree).own:
      names.append(f'{name}/')
  return names


def in_the_way(workdir: str | os.PathLike[str], *, fresh: bool) -> str:
  """Says why a run cannot write a file or folder of its own; '' if it can.

  Args:
    workdir: the folder.
    fresh: whether links of such names are removed before.
  """
  folder = pathlib.Path(workdir)
  for name in (CONFIG, *_FILES, CHECKPOINT_NAME, LOGS_NAME, DURABLE_NAME):
    path = folder / name
    if not os.path.lexists(path) or (fresh and path.is_symlink()):
      continue
    if name in (CONFIG, *_FILES) and not path.is_file():
      return f'{name} in it is no file'
    if name not in (CONFIG, *_FILES) and not path.is_dir():
      return f'{name} in it is no folder'
    if name == CHECKPOINT_NAME and path.is_symlink():
      return f'{name} in it is a symbolic link, through which no run writes'
  return ''


def name_some(names: Sequence[str]) -> str:
  """Names several things; of very many some, and the number of the others."""
  more = len(names) - _SHOWN
  if more <= 1:  # to say that there is one more takes as much room
    return ', '.join(names)
  return f'{", ".join(names[:_SHOWN])} and {more} more'


def config_error(
  error: OSError, flag: str, value: object
) -> errors.ConfigError:
  """Says that a file of the run cannot be read or removed.

  Raises:
    errors.SystemRefusalError: that is not because of the file.
  """
  errors.check_limits(error)
  return errors.ConfigError(
    flag, value, f'{error.filename}: {error.strerror}; make that possible'
  )
