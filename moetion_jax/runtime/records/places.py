"""Places that a run reads and writes: none may lie where it removes things.

Paths are compared as what they are in the end, and by each symbolic link that
they lead through.
"""

from __future__ import annotations

import dataclasses
import glob
import os
import pathlib
import re
from collections.abc import Collection, Iterator, Sequence

from moetion_jax import errors
from moetion_jax.runtime.records import own_files

_MAX_LINKS = 40  # as the kernel follows
# What a run writes as a whole, and what it writes on the way to that.
_WRITTEN = re.compile(
  rf'{own_files.LOGS_NAME}|{own_files.CHECKPOINT_NAME}'
  rf'({re.escape(own_files.ASIDE_SUFFIX)}.*|{re.escape(own_files.ORBAX_SUFFIX)}.*)?'
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Places:
  """The settings of a run that are paths; '' where one is not set.

  Attributes:
    workdir: the run's folder.
    data: the text: a file, a folder or a pattern.
    init_from: the checkpoint that the run starts from.
    durable_dir: the directory of snapshots on disk.
    hostmem_dir: the directory of the run's stores.
    compilation_cache_dir: the folder of compiled programs.
  """

  workdir: str
  data: str = ''
  init_from: str = ''
  durable_dir: str = ''
  hostmem_dir: str = ''
  compilation_cache_dir: str = ''


def check(
  places: Places, *, of_run: Sequence[str | os.PathLike[str]], fresh: bool
) -> None:
  """Checks that a run removes nothing that it reads or others keep.

  Args:
    places: the settings.
    of_run: folders that the run removes at its end, existing or not: its
      stores, and its snapshots on disk.
    fresh: whether an earlier run in the workdir is removed.

  Raises:
    errors.ConfigError: a setting is in the way; says which, and what to do.
  """
  workdir = os.path.realpath(places.workdir)
  removed = [os.path.realpath(folder) for folder in of_run]
  # A cache that cannot be used is no reason not to train.
  for name in ('init_from', 'durable_dir', 'hostmem_dir'):
    check_found(name, getattr(places, name))
  for name in ('durable_dir', 'hostmem_dir', 'compilation_cache_dir'):
    check_output(name, getattr(places, name), places.workdir, of_run)
  if places.durable_dir and _same(places.durable_dir, places.hostmem_dir):
    raise errors.ConfigError(
      'durable_dir',
      places.durable_dir,
      'is --hostmem_dir: what is to outlive host memory must lie elsewhere',
    )
  doomed: frozenset[str] = frozenset()
  if fresh:
    own = own_files.find_run(workdir).own
    doomed = frozenset(map(str, own)) | {
      os.path.join(workdir, own_files.CONFIG)
    }
  for name, value, paths in (
    ('init_from', places.init_from, _checkpoint_files(places, workdir, doomed)),
    ('data', places.data, _data_files(places.data, doomed)),
  ):
    for path in paths:
      _check_input(name, value, path, removed, doomed)
  _check_outside_data(places)


def _check_outside_data(places: Places) -> None:
  """Checks that nothing is written among the files that are all read.

  Raises:
    errors.ConfigError: a folder of the run lies there: the text would change.
  """
  root = os.path.realpath(os.path.expanduser(places.data))
  if not places.data or not os.path.isdir(root):
    return
  for name in ('workdir', 'durable_dir', 'hostmem_dir'):
    value = getattr(places, name)
    path = os.path.realpath(os.path.expanduser(value))
    if not value or not is_inside(path, root):
      continue
    below = os.path.relpath(path, root)
    if below == os.curdir or not any(
      part.startswith('.') for part in pathlib.Path(below).parts
    ):
      raise errors.ConfigError(
        name,
        value,
        f'lies in --data={places.data}, of which all files are read: what the '
        'run writes would change its own text. Name a folder outside',
      )


def _check_input(
  name: str,
  value: str,
  path: str,
  removed: Collection[str],
  doomed: Collection[str],
) -> None:
  """Checks that what a run reads stays there.

  Args:
    name: the name of the setting.
    value: its value.
    path: a path that is read because of it.
    removed: folders that the run removes at its end.
    doomed: paths that --fresh removes.

  Raises:
    errors.ConfigError: it is removed.
  """
  for stop in stops(path):
    if any(is_inside(stop, folder) for folder in removed):
      what = 'the run removes at its end'
    elif stop in doomed:
      what = '--fresh removes'
    else:
      continue
    remedy = f'move it out first (mv {stop} ELSEWHERE), and name it there'
    if path != value:
      remedy = 'name a place without it'
    raise errors.ConfigError(
      name, value, f'needs {stop}, which {what}; {remedy}'
    )


def check_output(
  name: str,
  value: str,
  workdir: str,
  of_run: Sequence[str | os.PathLike[str]],
) -> None:
  """Checks that what is written somewhere stays there.

  Args:
    name: the name of the setting.
    value: the path; '' for none.
    workdir: the folder of a run.
    of_run: see `check`.

  Raises:
    errors.ConfigError: it lies in what that run writes itself.
  """
  path = os.path.realpath(os.path.expanduser(value))
  removed = [os.path.realpath(folder) for folder in of_run]
  where = _written(path, os.path.realpath(workdir), removed) if value else ''
  if where:
    raise errors.ConfigError(
      name,
      value,
      f'lies in {where}, which the run writes and removes itself; name a '
      'folder outside',
    )


def check_found(name: str, value: str) -> None:
  """Raises errors.ConfigError if the system refuses to look a path up.

  A name may be too long, or a folder on the way may not be searched. That
  nothing is there is no such error.
  """
  try:
    os.stat(os.path.expanduser(value))
  except FileNotFoundError:
    pass
  except OSError as error:
    raise errors.ConfigError(
      name, value, f'{error.strerror}; make that possible, or name another one'
    ) from error


def _written(path: str, workdir: str, removed: Collection[str]) -> str:
  """Returns the folder that the run writes as a whole and `path` lies in."""
  for folder in removed:
    if is_inside(path, folder):
      return folder
  if path != workdir and is_inside(path, workdir):
    first = pathlib.Path(path).relative_to(workdir).parts[0]
    if _WRITTEN.fullmatch(first):
      return os.path.join(workdir, first)
  return ''


def _checkpoint_files(
  places: Places, workdir: str, doomed: Collection[str]
) -> Iterator[str]:
  """Yields what is read of --init_from and may be removed."""
  if not places.init_from:
    return
  yield places.init_from
  path = os.path.realpath(places.init_from)
  if is_inside(path, workdir):
    yield from sorted(file for file in doomed if is_inside(file, path))


def _data_files(data: str, doomed: Collection[str]) -> Iterator[str]:
  """Yields what is read of --data and may be removed, as `launch.lm.data`."""
  path = os.path.expanduser(data)
  if not data:
    return
  if not os.path.lexists(path):
    yield from filter(os.path.isfile, glob.iglob(path, recursive=True))
    return
  yield path
  if not os.path.isdir(path) or not doomed:
    return
  root = os.path.realpath(path)
  for file in sorted(doomed):
    if is_inside(file, root):
      parts = pathlib.Path(file).relative_to(root).parts
      if not any(part.startswith('.') for part in parts):
        yield file
  for folder, _, names in os.walk(root):
    files = (os.path.join(folder, name) for name in names)
    yield from filter(os.path.islink, files)


def is_inside(path: str, folder: str) -> bool:
  """Tells whether a path is a folder or lies in it; both without links."""
  return os.path.commonpath([path, folder]) == folder


def stops(path: str) -> Iterator[str]:
  """Yields each symbolic link that a path leads through, and its end.

  Each is a path without other links.
  """
  rest = [*reversed(pathlib.Path(os.getcwd(), path).parts)]
  here, links = rest.pop(), 0
  while rest:
    name = rest.pop()
    if name == '..':
      here = os.path.dirname(here)
      continue
    step = os.path.join(here, name)
    if not os.path.islink(step) or links >= _MAX_LINKS:
      here = step
      continue
    links += 1
    yield step
    target = pathlib.Path(os.readlink(step))
    if target.is_absolute():
      here = target.anchor
      target = target.relative_to(here)
    rest += reversed(target.parts)
  yield here


def _same(one: str, other: str) -> bool:
  return os.path.realpath(one) == os.path.realpath(other)
