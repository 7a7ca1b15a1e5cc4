"""Boundary logs: what workers publish for one another, by name.

The loop publishes and reads entries and knows nothing of where they lie. Two
implementations: `BoundaryLog` between processes and hosts, and, for stages cut
in one process, `memory_log.MemoryLog`.

A publisher thread waits for the copy to the host and writes it into this
worker's segment; a reader thread looks for the entries that are waited for
whenever a doorbell rings, and puts them on the device. On the same host nobody
is asked: the entry is found in mapped memory, and on CPU the device array is
that memory (a copy would need fresh pages, at 2.4 GB/s against 20, measured).
Its lease ends when the last program that reads it has.
"""

from __future__ import annotations

import collections
import concurrent.futures
import contextlib
import dataclasses
import gc
import threading
import time
from collections.abc import Callable, Mapping

import jax
import numpy as np
import zmq

from moetion_jax import (
  base,
  doorbell,
  entry,
  hostmem,
  logs,
  segment,
  store_index,
  transport,
)

# A lease that keeps a full segment full ends without notice.
_LEASE_POLL_SECONDS = 0.01
_COLLECT_SECONDS = 0.05


@dataclasses.dataclass(frozen=True)
class _Read:
  """A read in the background."""

  sharding: jax.sharding.Sharding | None
  verify: bool
  future: concurrent.futures.Future[jax.Array] = dataclasses.field(
    default_factory=concurrent.futures.Future
  )


class BoundaryLog:
  """A worker's log in host memory (see `logs.Log`).

  Publish, read and prefetch from one thread; everything else from any.
  """

  def __init__(
    self,
    worker: hostmem.WorkerId,
    settings: logs.LogSettings,
    on_wait: Callable[[base.EntryKey | None], None] | None = None,
    on_block: Callable[[base.EntryKey | None], None] | None = None,
  ):
    """Stores the arguments.

    Args:
      worker: who publishes and reads.
      settings: of the log.
      on_wait: called with an entry when `read` begins to wait for it, with
        None when it has come; in the reading thread.
      on_block: the same for an entry that waits for room; in the publisher
        thread.
    """
    self._worker = worker
    self._settings = settings
    self._on_wait = on_wait or (lambda key: None)
    self._on_block = on_block or (lambda key: None)
    self._writer = segment.SegmentWriter(
      settings.folder, worker, settings.size_bytes, settings.slots
    )
    self._index = store_index.StoreIndex(settings.folder)
    self._bell = doorbell.Doorbell(
      settings.folder, f'stage-{worker.stage}.replica-{worker.replica}'
    )
    self._threads: list[threading.Thread] = []
    self._changed = threading.Condition()  # guards what follows
    self._queue: collections.deque[
      tuple[base.EntryKey, jax.Array | np.ndarray]
    ] = collections.deque()
    self._reads: dict[base.EntryKey, _Read] = {}
    self._locations: dict[tuple[int, int], transport.Location] = {}
    self._error: BaseException | None = None
    self._closing = False
    self._waiting_for: base.EntryKey | None = None
    self._blocked_seconds = 0.0
    self._blocked_since: float | None = None

  def start(self) -> None:
    """Creates or adopts the segment and starts the threads.

    Raises:
      StoreError: see `SegmentWriter.start`; or the folder is not private.
    """
    hostmem.check_private(self._settings.folder)
    self._writer.start(self._settings.fresh)
    try:
      self._bell.start()
    except base.StoreError:
      self._writer.close()
      raise
    for target in (self._publish_all, self._read_all):
      thread = threading.Thread(
        target=target, name=f'log {target.__name__}', daemon=True
      )
      self._threads.append(thread)
      thread.start()

  def close(self) -> None:
    """Ends the threads and removes the bell; the segment stays."""
    self._fail(base.StoreError('the log is closed'))
    with self._changed:
      self._closing = True
      self._queue.clear()
      self._changed.notify_all()
    if self._threads:
      self._bell.ring()
    for thread in self._threads:
      thread.join()
    self._threads.clear()
    self._writer.close()
    self._index.close()
    self._bell.close()

  @property
  def waiting_for(self) -> base.EntryKey | None:
    """The entry that `read` waits for at this moment, or None."""
    return self._waiting_for

  @property
  def blocked_seconds(self) -> float:
    """How long publishing has waited for room so far."""
    since = self._blocked_since
    now_seconds = 0.0 if since is None else time.monotonic() - since
    return self._blocked_seconds + now_seconds

  def update_locations(
    self, locations: Mapping[tuple[int, int], transport.Location]
  ) -> None:
    """Replaces the location map, by (stage, replica).

    A location of an older generation than the known one is ignored. Producers
    that it does not name are looked for on this host. Reads that wait go on at
    the new places.
    """
    with self._changed:
      known = self._locations
      self._locations = {
        producer: known[producer]
        if producer in known
        and known[producer].generation > location.generation
        else location
        for producer, location in locations.items()
      }
    self._bell.ring()

  def retain(self, first_iteration: int) -> None:
    """See `logs.Log`."""
    with self._changed:
      self._writer.retain(first_iteration)
      self._changed.notify_all()

  # --- Publishing ------------------------------------------------------------

  def publish(self, key: base.EntryKey, array: jax.Array | np.ndarray) -> None:
    """See `logs.Log`; waits only while `pending_entries` wait to be copied."""
    if (key.stage, key.replica) != (self._worker.stage, self._worker.replica):
      raise ValueError(f'{self._worker} does not publish: {key}')
    if isinstance(array, jax.Array):
      array.copy_to_host_async()
    with self._changed:
      self._changed.wait_for(
        lambda: (
          self._error is not None
          or len(self._queue) < self._settings.pending_entries
        )
      )
      self._check()
      self._queue.append((key, array))
      self._changed.notify_all()

  def flush(self, timeout_seconds: float | None = None) -> None:
    """See `logs.Log`."""
    with self._changed:
      done = self._changed.wait_for(
        lambda: self._error is not None or not self._queue, timeout_seconds
      )
      self._check()
    if not done:
      raise TimeoutError(f'not published within {timeout_seconds} s')

  def _publish_all(self) -> None:
    """The publisher thread."""
    try:
      while True:
        with self._changed:
          self._changed.wait_for(lambda: self._queue or self._closing)
          if self._closing:
            return
          key, array = self._queue[0]
        written = self._put(key, np.asarray(array))
        del array
        if written:
          self._bell.ring_others()
        with self._changed:
          if self._queue:  # empty: being closed
            self._queue.popleft()
          if key in self._reads:
            self._bell.ring()
          self._changed.notify_all()
    except BaseException as error:  # reported by every later call
      self._fail(error)

  def _put(self, key: base.EntryKey, array: np.ndarray) -> bool:
    """Writes an entry, waiting for room as long as the settings allow."""
    try:
      while not self._closing:
        try:
          return self._writer.put(key, array)
        except segment.SegmentFullError as error:
          now = time.monotonic()
          if self._blocked_since is None:
            self._blocked_since = now
            self._on_block(key)
          elif now - self._blocked_since > self._settings.full_seconds:
            raise base.StoreError(
              f'{key}: no room for {self._settings.full_seconds:g} s: {error}'
            ) from error
          self._bell.ring_others()  # lets them drop what they need no more
          with self._changed:
            self._changed.wait(_LEASE_POLL_SECONDS)
      return False
    finally:
      if self._blocked_since is not None:
        self._blocked_seconds += time.monotonic() - self._blocked_since
        self._blocked_since = None
        self._on_block(None)

  # --- Reading ---------------------------------------------------------------

  def read(
    self,
    key: base.EntryKey,
    sharding: jax.sharding.Sharding | None = None,
    *,
    verify: bool = False,
    timeout_seconds: float | None = None,
  ) -> jax.Array:
    """See `logs.Log`."""
    with self._changed:
      self._check()
      read = self._reads.get(key)
    if read is None:
      if self._address(key) is None and (taken := self._index.take(key)):
        return _to_device(*taken, _Read(sharding, verify))
      read = self._start_read(key, _Read(sharding, verify))
    waits = not read.future.done()
    if waits:
      self._waiting_for = key
      self._on_wait(key)
    try:
      return read.future.result(timeout_seconds)
    except concurrent.futures.TimeoutError:
      raise TimeoutError(f'no {key} within {timeout_seconds} s') from None
    finally:
      if waits:
        self._waiting_for = None
        self._on_wait(None)
      with self._changed:
        if read.future.done():
          self._reads.pop(key, None)

  def prefetch(
    self,
    key: base.EntryKey,
    sharding: jax.sharding.Sharding | None = None,
    *,
    verify: bool = False,
  ) -> None:
    """See `logs.Log`."""
    self._start_read(key, _Read(sharding, verify))

  def _start_read(self, key: base.EntryKey, read: _Read) -> _Read:
    with self._changed:
      self._check()
      if key in self._reads:
        return self._reads[key]
      self._reads[key] = read
    self._bell.ring()
    return read

  def _address(self, key: base.EntryKey) -> str | None:
    """The store server to ask for an entry; None: it is on this host."""
    location = self._locations.get((key.stage, key.replica))
    if location is None or location.host == self._settings.host:
      return None
    return location.address

  def _read_all(self) -> None:
    """The reader thread."""
    poller = zmq.Poller()
    poller.register(self._bell.fileno(), zmq.POLLIN)
    client = transport.StoreClient(
      self._worker, poller, self._settings.secret, self._settings.resend_seconds
    )
    tick_milliseconds = int(self._settings.resend_seconds * 500)
    refresh_at = collect_at = 0.0
    try:
      while not self._closing:
        poller.poll(tick_milliseconds)
        self._bell.drain()
        self._look(client)
        if time.monotonic() > refresh_at:
          refresh_at = time.monotonic() + self._settings.resend_seconds
          self._index.refresh()
        if time.monotonic() > collect_at:
          # JAX lets go of host memory in a call or in a garbage collection; a
          # loop that waits makes no calls, and its neighbour may need the room.
          collect_at = time.monotonic() + _COLLECT_SECONDS
          gc.collect(0)
    except BaseException as error:  # reported by every later call
      self._fail(error)
    finally:
      client.close()

  def _look(self, client: transport.StoreClient) -> None:
    """Completes the reads whose entries can be had now."""
    with self._changed:
      reads = {k: r for k, r in self._reads.items() if not r.future.done()}
      client.keep({place.address for place in self._locations.values()})
    for key, read in reads.items():
      address = self._address(key)
      if address is not None:
        client.want(key, address)
        continue
      client.forget(key)
      if taken := self._index.take(key):
        _complete(read, *taken)
    for key, result in client.collect():
      if key in reads:
        _complete(reads[key], None, result)

  # --- Failing ---------------------------------------------------------------

  def _check(self) -> None:
    if self._error is not None:
      raise self._error

  def _fail(self, error: BaseException) -> None:
    """Lets every call, also those that wait, raise `error`: the first one."""
    with self._changed:
      if self._error is None:
        self._error = error
      reads = list(self._reads.values())
      self._changed.notify_all()
    for read in reads:
      with contextlib.suppress(concurrent.futures.InvalidStateError):
        read.future.set_exception(self._error)


def _complete(
  read: _Read,
  header: entry.EntryHeader | None,
  result: np.ndarray | base.StoreError,
) -> None:
  """Ends a read with an entry (verified if without header) or an error."""
  # Closing may have ended it meanwhile.
  with contextlib.suppress(concurrent.futures.InvalidStateError):
    try:
      if isinstance(result, base.StoreError):
        raise result
      array = _to_device(header, result, read)
    except Exception as error:
      read.future.set_exception(error)
    else:
      read.future.set_result(array)


def _to_device(
  header: entry.EntryHeader | None, array: np.ndarray, read: _Read
) -> jax.Array:
  if read.verify and header is not None:
    entry.verify(header, array)
  return jax.device_put(array, read.sharding)
