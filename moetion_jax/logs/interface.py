"""What a boundary log is: the interface of the loop, and its settings."""

from __future__ import annotations

import dataclasses
import os
from typing import Protocol

import jax
import numpy as np

from moetion_jax import errors, keys


class Log(Protocol):
  """What the loop needs of a log. `start` first, `close` last."""

  @property
  def waiting_for(self) -> keys.EntryKey | None:
    """The entry that a `read` waits for at this moment, or None."""
    ...

  @property
  def blocked_seconds(self) -> float:
    """How long publishing has waited for room so far."""
    ...

  @property
  def blocked_for(self) -> keys.EntryKey | None:
    """The entry that waits for room at this moment, or None."""
    ...

  @property
  def late_seconds(self) -> float:
    """How long `read` has waited so far for entries that existed.

    Counted from the commit, or from the call if that is later, to the return.
    Producers on other machines have other clocks: there it means nothing.
    """
    ...

  def start(self) -> None:
    """Makes the log usable."""
    ...

  def close(self) -> None:
    """Ends it; drops what `flush` would have waited for. Idempotent."""
    ...

  def interrupt(self, error: errors.MoetionError) -> None:
    """Lets every call, also those that wait, raise `error`. Any thread."""
    ...

  def publish(self, key: keys.EntryKey, array: jax.Array | np.ndarray) -> None:
    """Publishes an entry of this worker, soon after this returns.

    Args:
      key: its name; stage and replica are this worker's.
      array: fully addressable; may not be donated before `flush`.

    Raises:
      ValueError: the key names another producer.
      EntryMismatchError: an unequal entry of that name exists. This and every
        other failure of publishing may come with a later call.
    """
    ...

  def read(
    self,
    key: keys.EntryKey,
    sharding: jax.sharding.Sharding | None = None,
    *,
    verify: bool = False,
    timeout_seconds: float | None = None,
  ) -> jax.Array:
    """Waits for an entry and returns it on the device.

    Args:
      key: its name.
      sharding: where to put it; None for the default device.
      verify: check the checksum, as recovery does (other hosts' entries are
        always checked). After a `prefetch` what was given there holds.
      timeout_seconds: how long to wait; None: as long as it takes.

    Raises:
      TimeoutError: it did not come in time.
      EntryCorruptError: it is damaged.
      FencedError: this worker was replaced.
      StoreError: the log was closed, or publishing has failed.
    """
    ...

  def prefetch(
    self,
    key: keys.EntryKey,
    sharding: jax.sharding.Sharding | None = None,
    *,
    verify: bool = False,
  ) -> None:
    """Starts a `read` in the background; a second one is the same one."""
    ...

  def retain(self, first_iteration: int) -> None:
    """Lets go of this worker's entries of earlier iterations."""
    ...

  @property
  def published_count(self) -> int:
    """How many times `publish` was called so far."""
    ...

  def flush(
    self, timeout_seconds: float | None = None, count: int | None = None
  ) -> None:
    """Waits until what was published can be read, also after our death.

    Args:
      timeout_seconds: how long to wait; None: as long as it takes.
      count: how many of the entries; None: all so far.

    Raises:
      TimeoutError: it took longer.
    """
    ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class LogSettings:
  """Where and how large the log of one worker is.

  Attributes:
    folder: the store folder of this host (`hostmem.StoreFolder`).
    size_bytes: of the segment's ring (`segment.ring_bytes`).
    cells: how many entries the segment holds at most.
    fresh: whether to replace the segment that a predecessor left.
    host: name of this host in the location map.
    secret: of the job; needed to read from other machines.
    full_seconds: how long publishing waits for room before it fails.
    pending_entries: how many entries may wait to be copied before `publish`
      waits as well.
    resend_seconds: after how long a read that got no answer is repeated.
  """

  folder: str | os.PathLike[str]
  size_bytes: int
  cells: int = 4096
  fresh: bool = False
  host: str = ''
  secret: bytes | None = None
  full_seconds: float = 60.0
  pending_entries: int = 64
  resend_seconds: float = 1.0
