"""Boundary logs between stages that share one process.

The device arrays themselves are handed on, by reference.
"""

from __future__ import annotations

import threading

import jax
import numpy as np

from moetion_jax import errors, keys
from moetion_jax.hostmem import raw_bytes
from moetion_jax.logs import interface


class MemoryStore:
  """The entries that the logs of one process share."""

  def __init__(self):
    """Makes an empty store."""
    self.changed = threading.Condition()  # guards `entries`
    self.entries: dict[keys.EntryKey, jax.Array | np.ndarray] = {}


class MemoryLog(interface.Log):
  """One worker's log in a `MemoryStore`."""

  def __init__(self, worker: keys.WorkerId, store: MemoryStore):
    """Stores the arguments.

    Args:
      worker: the worker that publishes and reads.
      store: the store, shared with the other workers' logs.
    """
    self._worker = worker
    self._store = store
    self._waiting_for: keys.EntryKey | None = None
    self._error: errors.MoetionError | None = None

  @property
  def waiting_for(self) -> keys.EntryKey | None:
    """See `interface.Log`."""
    return self._waiting_for

  def start(self) -> None:
    """Does nothing."""

  def close(self) -> None:
    """Makes waiting reads raise; the entries stay in the store."""
    self.interrupt(errors.StoreError('the log is closed'))

  def interrupt(self, error: errors.MoetionError) -> None:
    """See `interface.Log`."""
    with self._store.changed:
      self._error = self._error or error
      self._store.changed.notify_all()

  def publish(self, key: keys.EntryKey, array: jax.Array | np.ndarray) -> None:
    """See `interface.Log`; the entry is there when this returns."""
    if (key.stage, key.replica) != (self._worker.stage, self._worker.replica):
      raise ValueError(f'{self._worker} does not publish: {key}')
    self._check()
    with self._store.changed:
      known = self._store.entries.setdefault(key, array)
      self._store.changed.notify_all()
    if known is not array:
      old, new = np.asarray(known), np.asarray(array)
      if (old.dtype, old.shape) != (new.dtype, new.shape) or not np.array_equal(
        raw_bytes.as_bytes(old), raw_bytes.as_bytes(new)
      ):
        raise errors.EntryMismatchError(
          f'{key}: published again with other contents'
        )

  def read(
    self,
    key: keys.EntryKey,
    sharding: jax.sharding.Sharding | None = None,
    *,
    timeout_seconds: float | None = None,
  ) -> jax.Array:
    """See `interface.Log`; there is no copy that could be damaged."""
    self._check()
    with self._store.changed:
      if key not in self._store.entries:
        self._waiting_for = key
        try:
          self._store.changed.wait_for(
            lambda: key in self._store.entries or self._error, timeout_seconds
          )
        finally:
          self._waiting_for = None
      self._check()
      if key not in self._store.entries:
        raise TimeoutError(f'no {key} within {timeout_seconds} s')
      array = self._store.entries[key]
    if sharding is None and isinstance(array, jax.Array):
      return array
    return jax.device_put(array, sharding)

  def retain(self, first_iteration: int) -> None:
    """See `interface.Log`."""
    me = self._worker.stage, self._worker.replica
    with self._store.changed:
      for key in list(self._store.entries):
        if (key.stage, key.replica) == me and key.iteration < first_iteration:
          del self._store.entries[key]

  def _check(self) -> None:
    if self._error:
      raise self._error
