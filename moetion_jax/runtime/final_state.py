"""Training states on their way from all stages into one checkpoint.

Each worker puts its state into the store folder: one `.npy` file of bytes per
leaf, and an index. One worker maps them all and writes the checkpoint; where
the state of a stage is divided among replicas, it joins their rows.
"""

from __future__ import annotations

import errno
import json
import os
import pathlib
import shutil
import time
from collections.abc import Callable, Collection, Iterator, Sequence

import jax
import numpy as np

from moetion_jax import errors
from moetion_jax.hostmem import raw_bytes, run_store
from moetion_jax.state import partition as partition_lib

_MAPPED_BYTES = 1 << 16  # smaller files are read
_NPY_HEADER_BYTES = 128
_FULL_POLL_SECONDS = 0.05  # tmpfs does not notify when it has room again


def put(
  folder: str | os.PathLike[str],
  stage: int,
  state: partition_lib.State,
  full_seconds: float = 0.0,
  on_block: Callable[[], None] = lambda: None,
  *,
  replica: int = 0,
  partition: partition_lib.Partition | None = None,
) -> None:
  """Writes a worker's part of its stage's state.

  Args:
    folder: the store folder of the run's first host.
    stage: the worker's stage.
    state: the worker's part of the state, on the device.
    full_seconds: seconds to wait when there is no room.
    on_block: called when that wait begins.
    replica: the worker's replica of the stage.
    partition: the partition of `state`; None if it is the stage's whole state.

  Raises:
    errors.NoRoomError: there was no room, and none became free in time.
    errors.StoreError: the state cannot be written for another reason.
  """
  path = _folder(folder, stage, replica)
  index = []
  try:
    shutil.rmtree(path, ignore_errors=True)  # left by a worker that died
    path.mkdir()
    for group, leaves in state.items():
      rows = None
      if partition and partition.groups[group].stacked:
        rows = [o.expert for o in partition.operators_of(group)]
      for leaf, value in leaves.items():
        host = np.asarray(jax.device_get(value))
        with open(path / f'{len(index)}.npy', 'wb') as file:
          # Reserve first: NumPy does not say why it could not write.
          size_bytes = host.nbytes + _NPY_HEADER_BYTES
          _reserve(file.fileno(), size_bytes, full_seconds, on_block)
          np.save(file, raw_bytes.as_bytes(host))
          file.truncate()
        shape = list(host.shape)
        index.append([group, leaf, host.dtype.name, shape, rows])
    (path / 'index.json').write_text(json.dumps(index))
  except OSError as error:
    kind = (
      errors.NoRoomError if error.errno == errno.ENOSPC else errors.StoreError
    )
    raise kind(
      f'{path}: the final state cannot be put there: {error.strerror}; free '
      'host memory, or name a larger tmpfs with --hostmem_dir, and start again'
    ) from error


def _reserve(
  fd: int, size_bytes: int, full_seconds: float, on_block: Callable[[], None]
) -> None:
  """Allocates a file's pages, waiting for room if there is none."""
  full_at: float | None = None
  while True:
    try:
      return os.posix_fallocate(fd, 0, size_bytes)
    except OSError as error:
      if error.errno != errno.ENOSPC:
        raise
      if full_at is None:
        full_at = time.monotonic() + full_seconds
        on_block()
      if time.monotonic() >= full_at:
        raise
    time.sleep(_FULL_POLL_SECONDS)


def get(
  folder: str | os.PathLike[str], stage: int, replicas: Collection[int] = (0,)
) -> partition_lib.State:
  """Returns a stage's state, joined from what some of its workers `put`.

  Large leaves are mapped, not read, unless their rows come from several
  workers.

  Args:
    folder: the same folder as for `put`.
    stage: the stage.
    replicas: the replicas of these workers, which together had the whole state.
  """
  parts: dict[str, dict[str, list[tuple[list[int] | None, np.ndarray]]]] = {}
  for replica in replicas:
    for group, leaf, value, rows in _read(_folder(folder, stage, replica)):
      parts.setdefault(group, {}).setdefault(leaf, []).append((rows, value))
  return {
    group: {leaf: _join(of_leaf) for leaf, of_leaf in sorted(leaves.items())}
    for group, leaves in sorted(parts.items())
  }  # type: ignore[return-value]


def _read(
  path: pathlib.Path,
) -> Iterator[tuple[str, str, np.ndarray, list[int] | None]]:
  index = json.loads((path / 'index.json').read_text())
  for number, (group, leaf, dtype, shape, rows) in enumerate(index):
    file = path / f'{number}.npy'
    is_large = file.stat().st_size > _MAPPED_BYTES
    data = np.load(file, mmap_mode='r' if is_large else None)
    value = np.asarray(data).view(np.dtype(dtype)).reshape(shape)
    yield group, leaf, value, rows


def _join(parts: Sequence[tuple[list[int] | None, np.ndarray]]) -> np.ndarray:
  """Joins a leaf from the rows that several workers had."""
  if len(parts) == 1:
    return parts[0][1]
  first = parts[0][1]
  count = sum(len(value) for _, value in parts)
  whole = np.empty((count, *first.shape[1:]), first.dtype)
  for rows, value in parts:
    whole[rows] = value
  return whole


def _folder(
  folder: str | os.PathLike[str], stage: int, replica: int
) -> pathlib.Path:
  name = f'{run_store.STATE_PREFIX}{stage}.replica-{replica}'
  return pathlib.Path(folder) / name
