"""Training states on their way from all stages into one checkpoint.

Each worker puts its state into the store folder, one `.npy` file of bytes a
leaf and an index; one worker maps them all and writes the checkpoint. Where
replicas share the state of a stage, it puts their rows together.
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
_FULL_POLL_SECONDS = 0.05  # tmpfs tells nobody that it has room again


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
  """Writes what a worker has of a stage's state.

  Args:
    folder: store folder of the run's first host.
    stage: whose state it is.
    state: on the device.
    full_seconds: how long to wait when there is no room.
    on_block: called when that wait begins.
    replica: of the worker.
    partition: of the state; None: it is the stage's whole state.

  Raises:
    base.NoRoomError: there is none, and none came.
    base.StoreError: it cannot be written for another reason.
  """
  path = _folder(folder, stage, replica)
  index = []
  try:
    shutil.rmtree(path, ignore_errors=True)  # of one that died meanwhile
    path.mkdir()
    for group, leaves in state.items():
      rows = None
      if partition and partition.groups[group].stacked:
        rows = [o.expert for o in partition.operators_of(group)]
      for leaf, value in leaves.items():
        host = np.asarray(jax.device_get(value))
        with open(path / f'{len(index)}.npy', 'wb') as file:
          # First, since NumPy does not say why it could not write.
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
  """Gives a file its pages, waiting for them if there are none."""
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
  """A stage's state, of what some of its workers `put`.

  Large leaves are mapped, not read, unless their rows come from several.

  Args:
    folder: see `put`.
    stage: whose state it is.
    replicas: of the workers; together they had all of it.
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
  """A leaf of the rows that several workers had."""
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
