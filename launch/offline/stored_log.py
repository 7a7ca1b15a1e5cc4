"""The logs that a stopped run left, read by one of its stages offline."""

from __future__ import annotations

from collections.abc import Collection

import jax
import numpy as np

from launch.offline import stored_run
from moetion_jax import errors, keys
from moetion_jax.hostmem import entry, raw_bytes, segment_reader
from moetion_jax.logs import interface


class EntryLostError(errors.StoreError):
  """A needed entry is missing or damaged.

  Attributes:
    key: the entry's key.
  """

  def __init__(self, key: keys.EntryKey, reason: str):
    super().__init__(reason)
    self.key = key


class StoredLog(interface.Log):
  """A stage's log of all stored entries; no call waits, nothing is written.

  What the stage publishes again is compared with what it published before.

  Attributes:
    compared: number of entries compared.
  """

  def __init__(
    self,
    worker: keys.WorkerId,
    stages: Collection[stored_run.StoredStage],
  ):
    """Stores the arguments.

    Args:
      worker: the worker that reads, and publishes again.
      stages: all stages of the run; entries that they lack are not read.
    """
    self.compared = 0
    self._worker = worker
    self._stages = {one.stage: one for one in stages}
    self._indices: dict[str, segment_reader.StoreIndex] = {}

  def start(self) -> None:
    """Opens the stores."""
    for one in self._stages.values():
      name = str(one.folder)
      if name not in self._indices:
        self._indices[name] = segment_reader.StoreIndex(name)

  def close(self) -> None:
    """Forgets the stores; arrays that were read stay valid."""
    for index in self._indices.values():
      index.close()
    self._indices.clear()

  def interrupt(self, error: errors.MoetionError) -> None:
    """Does nothing: no call waits here."""

  def publish(self, key: keys.EntryKey, array: jax.Array | np.ndarray) -> None:
    """Compares an entry with the stored one, if any; see `interface.Log`."""
    if key.stage != self._worker.stage:
      raise ValueError(f'{self._worker} does not publish: {key}')
    known = self._stages[key.stage].entries.get(key)
    if known is None:
      return
    new = np.asarray(array)
    found = raw_bytes.checksum(new)
    if (known.dtype, known.shape, known.checksum) != (
      new.dtype,
      new.shape,
      found,
    ):
      raise errors.EntryMismatchError(
        f'{key}: comes out with other contents: was {known.dtype}'
        f'{list(known.shape)} checksum {known.checksum:016x}, now {new.dtype}'
        f'{list(new.shape)} checksum {found:016x}'
      )
    self.compared += 1

  def read(
    self,
    key: keys.EntryKey,
    sharding: jax.sharding.Sharding | None = None,
    *,
    timeout_seconds: float | None = None,
  ) -> jax.Array:
    """Reads an entry; never waits. See `interface.Log`.

    Raises:
      EntryLostError: the entry is missing or damaged.
    """
    del timeout_seconds
    one = self._stages[key.stage]
    path, taken = one.segment_path(key.replica), None
    try:
      if key in one.entries:
        taken = self._indices[str(one.folder)].take(key)
      if taken is not None:
        entry.verify(*taken)
    except errors.StoreError as error:
      raise EntryLostError(key, f'{path}: {error}') from error
    if taken is None:
      raise EntryLostError(key, f'{path}: there is no {key}')
    return jax.device_put(taken[1], sharding)
