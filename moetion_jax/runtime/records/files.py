"""The files a run leaves behind.

`metrics.jsonl` is written once, in order, by the leader alone. A line that
exists already (the run is being repeated or continued) is compared instead of
written: losses and digests must come out the same, bit for bit.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import stat
import tempfile
import time
from typing import IO, Any

from moetion_jax import codec, disk, errors

# Of a JSON file that is being written, before eight characters.
TEMPORARY_PREFIX = '.moetion-json-'
# Fields in which two runs of one iteration must agree exactly.
_EXACT = ('iteration', 'loss_hex', 'digest', 'tokens')
_PUT_BACK = 'put back the file as it was, or pass --fresh to start over'


class MetricsMismatchError(errors.WrongBitsError):
  """An iteration came out differently than the line written for it."""


def read_lines(path: str | os.PathLike[str]) -> dict[int, dict[str, Any]]:
  """Reads the lines of a `metrics.jsonl`, by iteration; changes nothing.

  Damaged lines, and a last one that is not whole yet, are left out.
  """
  lines = {}
  with contextlib.suppress(FileNotFoundError), open(path, 'rb') as f:
    for raw in f:
      iteration, line = _parse(raw)
      if iteration is not None:
        lines[iteration] = line
  return lines


def _parse(raw: bytes) -> tuple[int | None, dict[str, Any]]:
  """Returns a line's iteration, None for a damaged one, and the line."""
  line = codec.read_object(raw)
  iteration = line.get('iteration')
  return (iteration if type(iteration) is int else None), line


class MetricsFile:
  """Appends lines to `metrics.jsonl`, comparing where a line exists.

  A context manager: `start` reads what is there and cuts a torn last line.
  """

  def __init__(self, path: str, initial_iteration: int = 0):
    """Stores the path, and the iteration before that of the first line."""
    self._path = path
    self._initial_iteration = initial_iteration
    self._known: dict[int, dict[str, Any]] = {}
    self._file = None
    self._size_bytes = 0

  def start(self) -> None:
    """Opens the file.

    Raises:
      errors.StoreError: a line is damaged, missing or out of order; but for the
        last ones, which are written again.
    """
    unshare(self._path)
    self._file = open(self._path, 'a+b')
    cut_torn_line(self._file)
    self._file.seek(0)
    for number, raw in enumerate(self._file, 1):
      expected = self._initial_iteration + number
      iteration, line = _parse(raw)
      if iteration != expected:
        wrong = 'is damaged'
        if iteration is not None:
          wrong = f'is of iteration {iteration}, and not of {expected}'
        self.close()
        raise errors.StoreError(f'{self._path}:{number} {wrong}: {_PUT_BACK}')
      self._known[expected] = line
    self._size_bytes = self._file.tell()

  def close(self) -> None:
    """Closes the file; idempotent."""
    if self._file:
      with contextlib.suppress(OSError):  # `write` has reported it
        self._file.close()
      self._file = None

  def __enter__(self) -> MetricsFile:
    self.start()
    return self

  def __exit__(self, *unused: object) -> None:
    self.close()

  @property
  def last_iteration(self) -> int:
    """The newest iteration that has a line; 0 for none."""
    return max(self._known, default=0)

  def digest(self, iteration: int) -> str:
    """Returns the digest in an iteration's line; '' if it has none."""
    return str(self._known.get(iteration, {}).get('digest', ''))

  @property
  def skipped_in_all(self) -> int:
    """The number of lines without an update."""
    return sum(not x.get('updated', True) for x in self._known.values())

  def skipped(self, iteration: int) -> int:
    """Returns how many updates in a row, up to one, were left out."""
    first = iteration
    while not self._known.get(first, {}).get('updated', True):
      first -= 1
    return iteration - first

  def write(self, line: dict[str, Any]) -> None:
    """Writes one iteration's line, or compares it with the one that exists.

    Raises:
      MetricsMismatchError: a line exists and differs.
      errors.StoreError: somebody removed, replaced, cut or lengthened the file.
    """
    file = self._untouched()
    iteration = line['iteration']
    known = self._known.get(iteration)
    if known is None:
      # JSON has no NaN: such a loss is written as null, and loss_hex keeps it.
      clean = {k: None if _nonfinite(v) else v for k, v in line.items()}
      with disk.naming(self._path):
        self._size_bytes += file.write(json.dumps(clean).encode() + b'\n')
        file.flush()
      self._known[iteration] = line
      return
    for field in _EXACT:
      if known.get(field) != line[field]:
        raise MetricsMismatchError(
          f'iteration {iteration}: {field} is {line[field]}, but '
          f'{self._path} has {known.get(field)}: this is not the run that '
          'wrote it (other code, software or hardware?), or the line was '
          f'changed: {_PUT_BACK}'
        )

  def sync(self) -> None:
    """Returns once all lines are on disk: a loss of power leaves them.

    Raises:
      errors.StoreError: as of `write`.
    """
    with disk.naming(self._path):
      os.fsync(self._untouched().fileno())

  def cut(self, iteration: int) -> None:
    """Removes the lines of later iterations, which will come out otherwise.

    Raises:
      errors.StoreError: as of `write`.
    """
    file, kept = self._untouched(), 0
    file.seek(0)
    for raw in file:
      known, _ = _parse(raw)
      if known is None or known > iteration:
        break
      kept += len(raw)
    with disk.naming(self._path):
      file.truncate(kept)
    self._size_bytes = kept
    self._known = {i: x for i, x in self._known.items() if i <= iteration}

  def _untouched(self) -> IO[bytes]:
    """Returns the file, which nobody else has changed since it was opened."""
    assert self._file is not None, 'start() was not called'
    fd = self._file.fileno()
    with disk.naming(self._path):
      is_ours = is_in_place(self._path, fd)
      if is_ours and os.fstat(fd).st_size == self._size_bytes:
        return self._file
    raise errors.StoreError(
      f'{self._path}: was removed, replaced, cut or added to while its run '
      f'wrote it: {_PUT_BACK}'
    )


class EventsFile:
  """Appends to `events.jsonl`: what happened, when, to whom."""

  def __init__(self, path: str):
    self._path = path

  def write(self, kind: str, **fields: Any) -> None:
    """Appends one event; `time` is seconds since the epoch."""
    event = {'time': time.time(), 'kind': kind, 'stage': None, 'replica': None}
    unshare(self._path)
    with disk.naming(self._path), open(self._path, 'a+b') as f:
      cut_torn_line(f)
      f.write(json.dumps(event | fields).encode() + b'\n')


def cut_torn_line(file: IO[bytes]) -> None:
  """Cuts what a death, or a full disk, left of a last line.

  Args:
    file: a file of lines, open for reading and appending.
  """
  if file.seek(0, os.SEEK_END):
    file.seek(-1, os.SEEK_END)
    if file.read() != b'\n':
      file.seek(0)
      file.truncate(file.read().rfind(b'\n') + 1)


def unshare(path: str | os.PathLike[str]) -> None:
  """Puts a copy in the place of a file that has other names too.

  A folder copied by hard links (`cp -al`) has the files of the other one: what
  is written into them, and not beside and renamed, would be in both.

  Args:
    path: the file's path, at which nothing need be.

  Raises:
    OSError: there is no room for a copy, or it cannot be put there.
  """
  try:
    status = os.lstat(path)
  except FileNotFoundError:
    return
  if not stat.S_ISREG(status.st_mode) or status.st_nlink == 1:
    return
  folder = os.path.dirname(path) or '.'
  with (
    disk.naming(path),
    tempfile.NamedTemporaryFile(
      dir=folder, prefix=TEMPORARY_PREFIX, delete=False
    ) as f,
  ):
    try:
      shutil.copy2(path, f.name)
      os.fsync(f.fileno())  # else a loss of power leaves the name alone
      os.replace(f.name, path)
    except BaseException:  # a full disk, most likely
      os.unlink(f.name)
      raise


def is_in_place(path: str | os.PathLike[str], fd: int) -> bool:
  """Tells whether a path still names what a descriptor has open."""
  try:
    return os.path.samestat(os.stat(path), os.fstat(fd))
  except (FileNotFoundError, NotADirectoryError):
    return False


def write_json(
  path: str, value: Any, mode: int = 0o644, *, outlives_power: bool = True
) -> None:
  """Replaces a JSON file atomically: readers see the old or the new one.

  Args:
    path: the file's path.
    value: what it will hold.
    mode: its mode.
    outlives_power: whether a loss of power after this leaves the new one, and
      one before that the old one. It takes as long as the disk takes.
  """
  folder = os.path.dirname(path) or '.'
  with (
    disk.naming(path),
    tempfile.NamedTemporaryFile(
      'w', dir=folder, prefix=TEMPORARY_PREFIX, delete=False
    ) as f,
  ):
    try:
      json.dump(value, f, indent=2)
      f.write('\n')
      f.flush()
      os.chmod(f.name, mode)
      if outlives_power:
        os.fsync(f.fileno())
      os.replace(f.name, path)
    except BaseException:  # a full disk, most likely
      os.unlink(f.name)
      raise
  if outlives_power:
    disk.sync_folder(folder)


def _nonfinite(value: Any) -> bool:
  return isinstance(value, float) and (
    value != value or value in (float('inf'), float('-inf'))
  )
