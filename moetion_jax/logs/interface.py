"""Interface of a boundary log, as the loop uses it, and its settings."""

from __future__ import annotations

import abc
import dataclasses
import os
from collections.abc import Mapping
from typing import Any, Protocol

import jax
import numpy as np

from moetion_jax import errors, keys
from moetion_jax.logs import remote

Mark = tuple[Any, ...]


class Log(Protocol):
  """A boundary log for the loop. Call `start` first, `close` last.

  Methods that are not abstract are right for a log whose entries are there as
  soon as they are published, and on the device.
  """

  @property
  def waiting_for(self) -> keys.EntryKey | None:
    """The entry that a `read` waits for at this moment, or None."""
    return None

  @property
  def blocked_for(self) -> str:
    """The entry that waits for room at this moment, and why; '' for none."""
    return ''

  @property
  def late_seconds(self) -> float:
    """Seconds that `read` has waited so far for entries that existed.

    Counted from the commit, or from the call if that is later, to the return.
    Producers on other machines have other clocks: for them it means nothing.
    """
    return 0.0

  @abc.abstractmethod
  def start(self) -> None:
    """Makes the log usable."""

  @abc.abstractmethod
  def close(self) -> None:
    """Closes the log; drops what `flush` would have waited for. Idempotent."""

  @abc.abstractmethod
  def interrupt(self, error: errors.MoetionError) -> None:
    """Makes every call, waiting ones included, raise `error`. Any thread."""

  def update_locations(
    self, locations: Mapping[tuple[int, int], remote.Location]
  ) -> None:
    """Replaces the location map, by (stage, replica). Any thread.

    A location of an older generation than the known one is ignored. Producers
    that the map does not name are looked for on this host. Waiting reads go on
    at the new places.
    """

  @abc.abstractmethod
  def publish(self, key: keys.EntryKey, array: jax.Array | np.ndarray) -> None:
    """Publishes an entry of this worker, soon after this returns.

    Args:
      key: name of the entry; stage and replica are this worker's.
      array: fully addressable array; may not be donated before `flush`.

    Raises:
      ValueError: the key names another producer.
      EntryMismatchError: an unequal entry of that name exists. This and every
        other failure of publishing may come with a later call.
    """

  @abc.abstractmethod
  def read(
    self,
    key: keys.EntryKey,
    sharding: jax.sharding.Sharding | None = None,
    *,
    timeout_seconds: float | None = None,
  ) -> jax.Array:
    """Waits for an entry and returns it on the device, verified.

    After a `prefetch` the `sharding` given there holds.

    Args:
      key: name of the entry.
      sharding: sharding of the array; None for the default device.
      timeout_seconds: seconds to wait; None waits forever.

    Raises:
      TimeoutError: the entry did not come in time.
      EntryCorruptError: the entry is damaged.
      FencedError: this worker was replaced.
      StoreError: the log was closed, or publishing has failed.
    """

  def prefetch(
    self,
    key: keys.EntryKey,
    sharding: jax.sharding.Sharding | None = None,
  ) -> None:
    """Starts a `read` in the background; a second call joins the first."""

  def retain(self, first_iteration: int) -> None:
    """Lets go of this worker's entries from before `first_iteration`."""

  def mark(self) -> Mark:
    """Returns a mark behind all that was published so far, for `flush`."""
    return ()

  def flush(
    self, timeout_seconds: float | None = None, mark: Mark | None = None
  ) -> None:
    """Waits until what was published can be read, even if this worker dies.

    Args:
      timeout_seconds: seconds to wait; None waits forever.
      mark: what was published before this mark; None for all so far.

    Raises:
      TimeoutError: it took longer.
    """


@dataclasses.dataclass(frozen=True, kw_only=True)
class LogSettings:
  """Place, size and limits of one worker's log.

  Attributes:
    folder: the store folder of this host (`store_folder.StoreFolder`).
    size_bytes: size of the segment's ring (`segment.ring_bytes`).
    cells: number of entries the segment holds at most.
    fresh: whether to replace the segment that a predecessor left.
    host: name of this host in the location map.
    pending_entries: number of entries that may wait to be copied before
      `publish` waits as well.
    resend_seconds: seconds after which a read that got no answer is repeated.
  """

  folder: str | os.PathLike[str]
  size_bytes: int
  cells: int = 4096
  fresh: bool = False
  host: str = ''
  pending_entries: int = 64
  resend_seconds: float = 1.0
