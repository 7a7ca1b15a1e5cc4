"""The logs of several replicas as one, for a worker that stands in for others.

When a replica cannot be replaced, another one does its microbatches as well and
writes them into that one's log, under its name. So their readers need not know:
who computes a microbatch is an assignment, a value.
"""

from __future__ import annotations

from collections.abc import Mapping

import jax
import numpy as np

from moetion_jax import errors, keys
from moetion_jax.logs import interface, remote


class JoinedLog(interface.Log):
  """The log of several replicas; each entry goes to its replica's.

  An entry of a neighbour is read through the log of the same replica, whose
  doorbell its producer rings.
  """

  def __init__(self, logs: Mapping[int, interface.Log]):
    """Stores the logs by replica; they are not started yet."""
    self._logs = dict(logs)

  def start(self) -> None:
    """Starts all logs; if one cannot be, closes all and raises its error."""
    try:
      for log in self._logs.values():
        log.start()
    except BaseException:
      self.close()
      raise

  def close(self) -> None:
    """Closes all logs. Idempotent."""
    for log in self._logs.values():
      log.close()

  def interrupt(self, error: errors.MoetionError) -> None:
    """See `interface.Log`."""
    for log in self._logs.values():
      log.interrupt(error)

  @property
  def waiting_for(self) -> keys.EntryKey | None:
    """See `interface.Log`."""
    waiting = (log.waiting_for for log in self._logs.values())
    return next(filter(None, waiting), None)

  @property
  def blocked_for(self) -> str:
    """See `interface.Log`."""
    blocked = (log.blocked_for for log in self._logs.values())
    return next(filter(None, blocked), '')

  @property
  def late_seconds(self) -> float:
    """See `interface.Log`."""
    return sum(log.late_seconds for log in self._logs.values())

  def update_locations(
    self, locations: Mapping[tuple[int, int], remote.Location]
  ) -> None:
    """See `interface.Log`."""
    for log in self._logs.values():
      log.update_locations(locations)

  def publish(self, key: keys.EntryKey, array: jax.Array | np.ndarray) -> None:
    """See `interface.Log`."""
    if key.replica not in self._logs:
      raise ValueError(f'replicas {list(self._logs)} do not publish: {key}')
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
    for log in self._logs.values():
      log.retain(first_iteration)

  def mark(self) -> interface.Mark:
    """See `interface.Log`."""
    return tuple(log.mark() for log in self._logs.values())

  def flush(
    self,
    timeout_seconds: float | None = None,
    mark: interface.Mark | None = None,
  ) -> None:
    """See `interface.Log`; each log may take that long."""
    marks = self.mark() if mark is None else mark
    for log, its_mark in zip(self._logs.values(), marks, strict=True):
      log.flush(timeout_seconds, its_mark)
