"""Training states on their way from all stages into one checkpoint.

Each worker puts its state into the store folder: one `.npy` file of bytes per
leaf, and an index with checksums and with the digests that the device computed.
One worker maps them all, compares them with both and writes the checkpoint;
where the state of a stage is divided among replicas, it joins their rows.
"""

from __future__ import annotations

import errno
import json
import math
import os
import pathlib
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from moetion_jax import errors, keys, report
from moetion_jax.hostmem import private, raw_bytes, run_store
from moetion_jax.state import host_digest, partition as partition_lib

_MAPPED_BYTES = 1 << 16  # smaller files are read
_NPY_HEADER_BYTES = 128
_INDEX_NAME = 'index.json'
_FILE_NAME = '{}.npy'
_FULL_POLL_SECONDS = 0.05  # tmpfs does not notify when it has room again


class DamagedError(errors.StoreError):
  """A worker's state that was handed over is not the one it had.

  Attributes:
    stage: the worker's stage.
    replica: the worker's replica.
    is_sent_so: whether what arrived is what was sent, by its checksums: the
      state was another one before it came into host memory.
  """

  def __init__(
    self, stage: int, replica: int, what: str, *, is_sent_so: bool = False
  ):
    """Makes the message of the worker's name and what is wrong.

    Args:
      stage: the stage of the worker that handed the state over.
      replica: its replica.
      what: what is damaged, as the end of a sentence.
      is_sent_so: see the attribute.
    """
    how = 'left its device damaged' if is_sent_so else 'arrived damaged'
    super().__init__(
      f'the final state of stage {stage} replica {replica} {how}: {what}'
    )
    self.stage = stage
    self.replica = replica
    self.is_sent_so = is_sent_so


class StageState(NamedTuple):
  """A stage's whole state on the host, compared with its digests.

  Attributes:
    state: the leaves by group, some of them mapped files.
    digests: the digests of all operators, as devices computed them.
  """

  state: Mapping[str, Mapping[str, np.ndarray]]
  digests: Mapping[keys.OperatorId, np.ndarray]


def put(
  folder: str | os.PathLike[str],
  stage: int,
  state: partition_lib.State,
  digests: Mapping[keys.OperatorId, np.ndarray],
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
    digests: the digests of its operators, as the device computed them.
    full_seconds: seconds to wait when there is no room.
    on_block: called when that wait begins.
    replica: the worker's replica of the stage.
    partition: the partition of `state`; None if it is the stage's whole state.

  Raises:
    errors.NoRoomError: there was no room, and none became free in time.
    errors.StoreError: the state cannot be written for another reason.
  """
  path = folder_of(folder, stage, replica)
  index = []
  try:
    shutil.rmtree(path, ignore_errors=True)  # left by a worker that died
    private.make_folder(path)
    for group, leaves in state.items():
      rows = None
      if partition and partition.groups[group].stacked:
        rows = [o.expert for o in partition.operators_of(group)]
      for leaf, value in leaves.items():
        host = np.asarray(jax.device_get(value))
        name = _FILE_NAME.format(len(index))
        with open(private.create(path / name), 'wb') as file:
          # Reserve first: NumPy does not say why it could not write.
          size_bytes = host.nbytes + _NPY_HEADER_BYTES
          _reserve(file.fileno(), size_bytes, full_seconds, on_block)
          np.save(file, raw_bytes.as_bytes(host))
          file.truncate()
        checksum = f'{raw_bytes.checksum(host):016x}'
        shape = list(host.shape)
        index.append([group, leaf, host.dtype.name, shape, rows, checksum])
    own = report.digests_to_json(digests)
    body = json.dumps({'leaves': index, 'digests': own}).encode()
    private.write(path / _INDEX_NAME, _checksum_of(body) + b'\n' + body)
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
  folder: str | os.PathLike[str], stage: int, replicas: Sequence[int] = (0,)
) -> StageState:
  """Returns a stage's state, joined from what some of its workers `put`.

  Large leaves are mapped, not read, unless their rows come from several
  workers. All of it is read once here, and compared.

  Args:
    folder: the same folder as for `put`.
    stage: the stage.
    replicas: the replicas of these workers, which together had the whole state.

  Raises:
    DamagedError: it is not what a worker had.
  """
  parts: dict[str, dict[str, list[tuple[list[int] | None, np.ndarray]]]] = {}
  digests: dict[keys.OperatorId, np.ndarray] = {}
  givers: dict[keys.OperatorId, int] = {}
  damaged: dict[int, str] = {}  # the first damaged file of each replica
  for replica in replicas:
    path = folder_of(folder, stage, replica)
    try:
      of_replica, own = _read_index(path)
      for number, fields in enumerate(of_replica):
        group, leaf, *_, rows, checksum = fields
        value = _read_leaf(path / _FILE_NAME.format(number), fields)
        if f'{raw_bytes.checksum(value):016x}' != checksum:
          damaged.setdefault(replica, _FILE_NAME.format(number))
        parts.setdefault(group, {}).setdefault(leaf, []).append((rows, value))
    except (OSError, ValueError, TypeError, KeyError) as error:
      raise DamagedError(stage, replica, f'{path}: {error}') from error
    digests |= own
    givers |= dict.fromkeys(own, replica)
  state = {
    group: {leaf: _join(of_leaf) for leaf, of_leaf in sorted(leaves.items())}
    for group, leaves in sorted(parts.items())
  }
  found = host_digest.digest_state(state, host_digest.stacked_groups(digests))
  wrong = host_digest.differences(found, digests)
  if wrong or damaged:
    replica = givers.get(wrong[0], replicas[0]) if wrong else min(damaged)
    of_replica = [o for o in wrong if givers.get(o, replicas[0]) == replica]
    names = ', '.join(map(str, of_replica)) or 'see its checksum'
    where = folder_of(folder, stage, replica) / damaged.get(replica, '')
    raise DamagedError(
      stage,
      replica,
      f'{where}: other bits than the device had: {names}',
      is_sent_so=replica not in damaged,
    )
  return StageState(state, digests)


def _read_index(
  path: pathlib.Path,
) -> tuple[list[list[Any]], dict[keys.OperatorId, np.ndarray]]:
  """Reads the fields of each leaf, and the digests of the operators.

  Raises:
    OSError, ValueError: the index is missing or damaged.
  """
  checksum, _, body = (path / _INDEX_NAME).read_bytes().partition(b'\n')
  if checksum != _checksum_of(body):
    raise ValueError(f'{_INDEX_NAME} does not have its own checksum')
  value = json.loads(body)
  return value['leaves'], report.digests_from_json(value['digests'])


def _read_leaf(file: pathlib.Path, fields: Sequence[Any]) -> np.ndarray:
  """Reads or maps a leaf; OSError or ValueError if its size is another."""
  _, _, dtype, shape, *_ = fields
  size_bytes = math.prod(shape) * np.dtype(dtype).itemsize
  found_bytes, header_bytes = file.stat().st_size, _NPY_HEADER_BYTES
  if found_bytes != header_bytes + size_bytes:
    raise ValueError(
      f'{file.name} has {found_bytes} bytes, not {header_bytes + size_bytes}'
    )
  if size_bytes > _MAPPED_BYTES:
    data: np.ndarray = np.memmap(file, np.uint8, 'r', offset=header_bytes)
  else:
    data = np.fromfile(file, np.uint8, offset=header_bytes)
  return np.asarray(data).view(np.dtype(dtype)).reshape(shape)


def _checksum_of(body: bytes) -> bytes:
  checksum = raw_bytes.checksum(np.frombuffer(body, np.uint8))
  return f'{checksum:016x}'.encode()


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


def folder_of(
  folder: str | os.PathLike[str], stage: int, replica: int
) -> pathlib.Path:
  """Returns the folder of what one worker puts into a store folder."""
  name = f'{run_store.STATE_PREFIX}{stage}.replica-{replica}'
  return pathlib.Path(folder) / name
