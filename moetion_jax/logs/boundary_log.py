"""Boundary logs: what workers publish for one another, by name.

The loop publishes and reads entries without knowing where they lie. There are
two implementations: `BoundaryLog` between processes and hosts, and
`memory_log.MemoryLog` for stages that share one process.

A publisher thread waits for the copy to the host and writes it into this
worker's segment; a reader thread looks for the entries that are waited for
whenever a doorbell rings, and puts them on the device. On the same host nobody
is asked: the entry is found in mapped memory, and on CPU the device array is
that memory (a copy would need fresh pages, at 2.4 GB/s against 20, measured).
Its lease ends when the last program that reads it has ended.
"""

from __future__ import annotations

import collections
import concurrent.futures
import contextlib
import dataclasses
import gc
import threading
import time
from collections.abc import Mapping

import jax
import numpy as np

from moetion_jax import errors, keys
from moetion_jax.hostmem import (
  doorbell,
  entry,
  segment_reader,
  segment_writer,
  store_folder,
)
from moetion_jax.logs import interface as log_interface, remote

# A lease that keeps a full segment full ends without notice.
_LEASE_POLL_SECONDS = 0.01
_COLLECT_SECONDS = 0.05


class BoundaryLog(log_interface.Log):
  """A worker's log in host memory.

  Publish, read and prefetch from one thread; everything else from any.
  """

  def __init__(
    self,
    worker: keys.WorkerId,
    settings: log_interface.LogSettings,
    connect: remote.Connect,
  ):
    """Stores the arguments.

    Args:
      worker: the worker that publishes and reads.
      settings: the log's settings.
      connect: makes the client that reads from other hosts.
    """
    self._worker = worker
    self._settings = settings
    self._connect = connect
    self._writer = segment_writer.SegmentWriter(
      settings.folder, worker, settings.size_bytes, settings.cells
    )
    self._index = segment_reader.StoreIndex(settings.folder)
    self._bell = doorbell.Doorbell(
      settings.folder, f'stage-{worker.stage}.replica-{worker.replica}'
    )
    self._threads: list[threading.Thread] = []
    # Replaced as a whole: whoever reads one entry of it needs no lock.
    self._locations: dict[tuple[int, int], remote.Location] = {}
    self._changed = threading.Condition()  # guards what follows
    self._queue: collections.deque[
      tuple[keys.EntryKey, jax.Array | np.ndarray]
    ] = collections.deque()
    self._reads: dict[keys.EntryKey, Read] = {}
    self._published_count = 0
    self._error: BaseException | None = None
    self._closing = False
    self._waiting_for: keys.EntryKey | None = None
    self._blocked_for = ''
    self._late_nanoseconds = 0

  def start(self) -> None:
    """See `interface.Log`: creates or adopts the segment, starts the threads.

    Raises:
      StoreError: the folder is not private; or see `SegmentWriter.start`.
    """
    store_folder.check_private(self._settings.folder)
    self._writer.start(self._settings.fresh)
    try:
      self._bell.start()
    except BaseException:
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
    self._fail(errors.StoreError('the log is closed'))
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

  def interrupt(self, error: errors.MoetionError) -> None:
    """See `interface.Log`."""
    self._fail(error)

  @property
  def waiting_for(self) -> keys.EntryKey | None:
    """See `interface.Log`."""
    return self._waiting_for

  @property
  def blocked_for(self) -> str:
    """See `interface.Log`."""
    return self._blocked_for

  @property
  def late_seconds(self) -> float:
    """See `interface.Log`."""
    return self._late_nanoseconds / 1e9

  def update_locations(
    self, locations: Mapping[tuple[int, int], remote.Location]
  ) -> None:
    """See `interface.Log`."""
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
    """See `interface.Log`."""
    with self._changed:
      self._writer.retain(first_iteration)
      self._changed.notify_all()

  # --- Publishing ------------------------------------------------------------

  def publish(self, key: keys.EntryKey, array: jax.Array | np.ndarray) -> None:
    """See `interface.Log`; waits only while `pending_entries` are queued."""
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
      self._published_count += 1
      self._changed.notify_all()

  def mark(self) -> log_interface.Mark:
    """See `interface.Log`."""
    return (self._published_count,)

  def flush(
    self,
    timeout_seconds: float | None = None,
    mark: log_interface.Mark | None = None,
  ) -> None:
    """See `interface.Log`."""
    with self._changed:
      (count,) = self.mark() if mark is None else mark
      done = self._changed.wait_for(
        lambda: (
          self._error is not None
          or self._published_count - len(self._queue) >= count
        ),
        timeout_seconds,
      )
      self._check()
    if not done:
      raise TimeoutError(f'not published within {timeout_seconds} s')

  def _publish_all(self) -> None:
    """Runs the publisher thread."""
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
        self._writer.look_back(key.iteration)
    except BaseException as error:  # reported by every later call
      self._fail(error)

  def _put(self, key: keys.EntryKey, array: np.ndarray) -> bool:
    """Writes an entry, waiting for room."""
    try:
      while not self._closing:
        try:
          return self._writer.put(key, array)
        except segment_writer.SegmentFullError as error:
          self._blocked_for = f'{key}: {error}'
          self._bell.ring_others()  # lets them drop what they need no more
          with self._changed:
            self._changed.wait(_LEASE_POLL_SECONDS)
      return False
    finally:
      self._blocked_for = ''

  # --- Reading ---------------------------------------------------------------

  def read(
    self,
    key: keys.EntryKey,
    sharding: jax.sharding.Sharding | None = None,
    *,
    timeout_seconds: float | None = None,
  ) -> jax.Array:
    """See `interface.Log`."""
    begin = time.monotonic_ns()
    with self._changed:
      self._check()
      read = self._reads.get(key)
    if read is None:
      read = Read(sharding)
      if self._address(key) is not None or not self._take(key, read):
        read = self._start_read(key, read)
    waits = not read.future.done()
    if waits:
      self._waiting_for = key
    try:
      return read.future.result(timeout_seconds)
    except concurrent.futures.TimeoutError:
      raise TimeoutError(f'no {key} within {timeout_seconds} s') from None
    finally:
      if waits:
        self._waiting_for = None
      with self._changed:
        if read.future.done():
          self._reads.pop(key, None)
          if committed := read.committed_nanoseconds:
            late = time.monotonic_ns() - max(begin, committed)
            self._late_nanoseconds += max(0, late)

  def prefetch(
    self,
    key: keys.EntryKey,
    sharding: jax.sharding.Sharding | None = None,
  ) -> None:
    """See `interface.Log`."""
    self._start_read(key, Read(sharding))

  def _start_read(self, key: keys.EntryKey, read: Read) -> Read:
    with self._changed:
      self._check()
      if key in self._reads:
        return self._reads[key]
      self._reads[key] = read
    self._bell.ring()
    return read

  def _take(self, key: keys.EntryKey, read: Read) -> bool:
    """Completes the read of an entry that is on this host; False if it is not.

    Memory that was written a moment ago can be damaged as well; what comes from
    other hosts was verified on its way.

    Raises:
      StoreError: the segment is damaged.
    """
    taken = self._index.take(key)
    if taken is None:
      return False
    try:
      entry.verify(*taken)
    except entry.EntryCorruptError as error:
      read.complete(None, error)
    else:
      read.complete(*taken)
    return True

  def _address(self, key: keys.EntryKey) -> str | None:
    """Returns the store server to ask for an entry; None for this host."""
    location = self._locations.get((key.stage, key.replica))
    if location is None or location.host == self._settings.host:
      return None
    return location.address

  def _read_all(self) -> None:
    """Runs the reader thread."""
    try:
      client = self._connect(self._worker, self._settings.resend_seconds)
      with contextlib.closing(client):
        self._look_again_and_again(client)
    except BaseException as error:  # reported by every later call
      self._fail(error)

  def _look_again_and_again(self, client: remote.ReadClient) -> None:
    """Completes reads until the log is closed."""
    tick_seconds = self._settings.resend_seconds / 2
    refresh_at = collect_at = 0.0
    while not self._closing:
      client.wait(self._bell.fileno(), tick_seconds)
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

  def _look(self, client: remote.ReadClient) -> None:
    """Completes the reads whose entries can be had now.

    Raises:
      FencedError: this worker was replaced.
    """
    self._writer.check_fence()
    with self._changed:
      waiting = {k: r for k, r in self._reads.items() if not r.future.done()}
      client.keep({place.address for place in self._locations.values()})
    for key, read in waiting.items():
      address = self._address(key)
      if address is not None:
        client.want(key, address)
        continue
      client.forget(key)
      self._take(key, read)
    for key, header, result in client.collect():
      if key in waiting:
        waiting[key].complete(header, result)

  # --- Failing ---------------------------------------------------------------

  def _check(self) -> None:
    if self._error is not None:
      raise self._error
    self._writer.check_fence()

  def _fail(self, error: BaseException) -> None:
    """Makes every call, waiting ones included, raise the first `error`."""
    with self._changed:
      if self._error is None:
        self._error = error
      started = list(self._reads.values())
      self._changed.notify_all()
    for read in started:
      with contextlib.suppress(concurrent.futures.InvalidStateError):
        read.future.set_exception(self._error)


@dataclasses.dataclass
class Read:
  """A read of one entry.

  Attributes:
    sharding: sharding of the array; None for the default device.
    committed_nanoseconds: time of the commit, see `entry.EntryHeader`; 0 until
      the read is done.
    future: future of the array on the device.
  """

  sharding: jax.sharding.Sharding | None
  committed_nanoseconds: int = 0
  future: concurrent.futures.Future[jax.Array] = dataclasses.field(
    default_factory=concurrent.futures.Future
  )

  def complete(
    self,
    header: entry.EntryHeader | None,
    result: np.ndarray | errors.StoreError,
  ) -> None:
    """Ends the read with an entry, header included, or with an error."""
    # Closing may have ended it meanwhile.
    with contextlib.suppress(concurrent.futures.InvalidStateError):
      try:
        if isinstance(result, errors.StoreError):
          raise result
        assert header is not None
        self.committed_nanoseconds = header.committed_nanoseconds
        array = jax.device_put(result, self.sharding)
      except Exception as error:
        self.future.set_exception(error)
      else:
        self.future.set_result(array)
