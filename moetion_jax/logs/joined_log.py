"""The logs of several replicas as one, for a worker that stands in for others.

When a replica cannot be replaced, another one does its microbatches as well and
writes them into that one's log, under its name. So their readers need not know:
who computes a microbatch is an assignment, a value (DESIGN section 1).
"""

from __future__ import annotations

from collections.abc import Mapping

import jax
import numpy as np

from moetion_jax import errors, keys
from moetion_jax.logs import boundary_log, remote


class JoinedLog:
  """An `interface.Log` of several replicas; each entry goes to its replica's.

  An entry of a neighbour is read through the log of the same replica, whose
  doorbell its producer rings.
  """

  def __init__(self, logs: Mapping[int, boundary_log.BoundaryLog]):
    """Stores the logs by replica; they are not started yet."""
    self._logs = dict(logs)

  def start(self) -> None:
    """Starts all logs; if one raises StoreError, closes all and raises it."""
    try:
      for log in self._logs.values():
        log.start()
    except errors.StoreError:
      self.close()
      raise

  def close(self) -> None:
    """Closes all logs. Idempotent."""
    for log in self._logs.values():
      log.close()

  def interrupt(self, error: errors.MoetionError) -> None:
    """See `interface.Log`."""
    for log in self._all():
      log.interrupt(error)

  @property
  def waiting_for(self) -> keys.EntryKey | None:
    """See `interface.Log`."""
    return next(filter(None, (x.waiting_for for x in self._all())), None)

  @property
  def blocked_for(self) -> keys.EntryKey | None:
    """See `interface.Log`."""
    return next(filter(None, (x.blocked_for for x in self._all())), None)

  @property
  def late_seconds(self) -> float:
    """See `interface.Log`."""
    return sum(log.late_seconds for log in self._all())

  @property
  def published_count(self) -> int:
    """See `interface.Log`."""
    return sum(log.published_count for log in self._all())

  def _all(self) -> list[boundary_log.BoundaryLog]:
    return list(self._logs.values())

  def update_locations(
    self, locations: Mapping[tuple[int, int], remote.Location]
  ) -> None:
    """See `BoundaryLog.update_locations`."""
    for log in self._all():
      log.update_locations(locations)

  def publish(self, key: keys.EntryKey, array: jax.Array | np.ndarray) -> None:
    """See `interface.Log`."""
    self._logs[key.replica].publish(key, array)

  def read(
    self,
    key: keys.EntryKey,
    sharding: jax.sharding.Sharding | None = None,
    *,
    timeout_seconds: float | None = None,
  ) -> jax.Array:
    """See `interface.Log`."""
    return self._logs[key.replica].read(
      key, sharding, timeout_seconds=timeout_seconds
    )

  def prefetch(
    self,
    key: keys.EntryKey,
    sharding: jax.sharding.Sharding | None = None,
  ) -> None:
    """See `interface.Log`."""
    self._logs[key.replica].prefetch(key, sharding)

  def retain(self, first_iteration: int) -> None:
    """See `interface.Log`."""
    for log in self._all():
      log.retain(first_iteration)

  def flush(
    self, timeout_seconds: float | None = None, count: int | None = None
  ) -> None:
    """See `interface.Log`; waits for all so far, whatever `count` is."""
    del count
    for log in self._all():
      log.flush(timeout_seconds)
