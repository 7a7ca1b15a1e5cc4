"""Client that reads entries from other hosts over ZeroMQ.

The client sends READ to the store server of the producer's host and repeats it
every second until the entry is complete: a request that is parked in a server
dies with it, and only the reader knows that it still waits.

A connection that ended is made anew here: ZeroMQ never does it after an error
of the protocol (measured: a frame that somebody on the way sends a second time
would leave its reader waiting for ever).
"""

from __future__ import annotations

import contextlib
import dataclasses
import time

import numpy as np
import xxhash
import zmq

from moetion_jax import errors, keys as keys_lib
from moetion_jax.hostmem import entry
from moetion_jax.logs import receive_buffers, remote, wire_format

_MAX_ENTRY_BYTES = 1 << 36
_RECONNECT_SECONDS = 0.1


@dataclasses.dataclass
class _Want:
  """A read of an entry on another host, and how far it is."""

  address: str
  resend_at: float
  header: entry.EntryHeader | None = None
  buffer: np.ndarray | None = None  # u8[nbytes], writable
  array: np.ndarray | None = None  # the entry, once complete
  received_bytes: int = 0
  digest: xxhash.xxh3_64 = dataclasses.field(default_factory=xxhash.xxh3_64)


class StoreClient:
  """A `remote.ReadClient` of `zmq_server.StoreServer`s.

  Attributes:
    malformed_count: number of messages ignored because they were not ours.
  """

  def __init__(
    self,
    worker: keys_lib.WorkerId,
    resend_seconds: float,
    secret: bytes | None = None,
  ):
    """Stores the settings.

    Args:
      worker: the worker that reads.
      resend_seconds: seconds without an answer until a read is sent again.
      secret: secret of the job.
    """
    self.malformed_count = 0
    self._worker = worker
    self._poller = zmq.Poller()
    self._secret = secret
    self._resend_seconds = resend_seconds
    self._context: zmq.Context | None = None
    self._sockets: dict[str, zmq.Socket] = {}
    self._ends: dict[str, zmq.Socket] = {}  # which say that one has ended
    self._wants: dict[keys_lib.EntryKey, _Want] = {}
    self._pool = receive_buffers.BufferPool()

  def close(self) -> None:
    """See `remote.ReadClient`."""
    for address in list(self._sockets):
      self._disconnect(address)
    self._wants.clear()
    if self._context is not None:
      self._context.term()
      self._context = None

  def want(self, key: keys_lib.EntryKey, address: str) -> None:
    """See `remote.ReadClient`."""
    want = self._wants.get(key)
    if want is None or want.address != address:
      self._wants[key] = _Want(address, 0.0)
      self._send_due()

  def forget(self, key: keys_lib.EntryKey) -> None:
    """See `remote.ReadClient`."""
    self._wants.pop(key, None)

  def keep(self, addresses: set[str]) -> None:
    """See `remote.ReadClient`."""
    for address in set(self._sockets) - addresses:
      self._disconnect(address)

  def wait(self, fd: int, timeout_seconds: float) -> None:
    """See `remote.ReadClient`."""
    self._poller.register(fd, zmq.POLLIN)
    self._poller.poll(int(timeout_seconds * 1000))

  def collect(self) -> list[remote.Arrival]:
    """See `remote.ReadClient`."""
    arrived = []
    for address, connection in list(self._sockets.items()):
      has_ended = self._ends[address].poll(0)
      while connection.poll(0):
        result = self._receive(address, connection)
        # What was not expected of this message must not begin the next one.
        while connection.rcvmore:
          connection.recv()
        if result is not None:
          self._wants.pop(result.key)
          arrived.append(result)
      if has_ended:
        self._begin_again(address)
    self._send_due()
    return arrived

  def _begin_again(self, address: str) -> None:
    """Gives up a connection; what it was to bring is asked for again."""
    self._disconnect(address)
    resend_at = time.monotonic() + _RECONNECT_SECONDS
    for want in self._wants.values():
      if want.address == address:
        want.resend_at = min(want.resend_at, resend_at)

  def _receive(
    self, address: str, connection: zmq.Socket
  ) -> remote.Arrival | None:
    """Takes a message in; returns the result if it completes a read."""
    head = connection.recv()
    reply = wire_format.unpack(head[: wire_format.MESSAGE_BYTES])
    header = entry.EntryHeader.unpack(head[wire_format.MESSAGE_BYTES :])
    if reply is None or reply[0] == wire_format.MessageType.READ:
      self.malformed_count += 1
      return None
    kind, _, key, offset = reply
    want = self._wants.get(key)
    if want is None or want.address != address:
      return None  # answered before, or by a server we no longer ask
    if kind == wire_format.MessageType.FENCED:
      return remote.Arrival(
        key, header, errors.FencedError(f'{self._worker} was replaced')
      )
    if (
      header is None
      or header.key != key
      or header.nbytes > _MAX_ENTRY_BYTES
      or not connection.rcvmore
    ):
      self.malformed_count += 1
      return None
    if offset == 0:  # the first piece, also of a repetition
      want.buffer, want.array = self._pool.take(header)
      want.header, want.received_bytes = header, 0
      want.digest = xxhash.xxh3_64()
    if want.buffer is None or want.array is None or want.header != header:
      return None
    if offset != want.received_bytes:
      return None  # the rest of a stream whose beginning was lost
    rest = want.buffer[offset:]
    nbytes = connection.recv_into(rest.data)
    if nbytes > len(rest):
      self.malformed_count += 1
      return None
    want.digest.update(rest[:nbytes].data)
    want.received_bytes += nbytes
    want.resend_at = time.monotonic() + self._resend_seconds
    if want.received_bytes < header.nbytes:
      return None
    if want.digest.intdigest() != header.checksum:
      damaged = entry.EntryCorruptError(key, f'damaged at {address}')
      return remote.Arrival(key, header, damaged)
    return remote.Arrival(key, header, want.array)

  def _send_due(self) -> None:
    now = time.monotonic()
    for key, want in self._wants.items():
      if now >= want.resend_at:
        want.resend_at = now + self._resend_seconds
        request = wire_format.pack(
          wire_format.MessageType.READ, self._worker, key
        )
        with contextlib.suppress(zmq.Again):  # its queue is full: next time
          self._connection(want.address).send(request, zmq.NOBLOCK)

  def _connection(self, address: str) -> zmq.Socket:
    if address not in self._sockets:
      wire_format.check_address(address, self._secret)
      if self._context is None:
        self._context = zmq.Context()
      connection = self._context.socket(zmq.DEALER)
      connection.linger = 0
      connection.rcvhwm = 0
      if self._secret is not None:
        keys = wire_format.CurveKeys.from_secret(self._secret)
        connection.curve_serverkey = keys.server_public
        connection.curve_publickey = keys.client_public
        connection.curve_secretkey = keys.client_secret
      ends = connection.get_monitor_socket(zmq.EVENT_DISCONNECTED)
      connection.connect(address)
      self._poller.register(connection, zmq.POLLIN)
      self._poller.register(ends, zmq.POLLIN)
      self._sockets[address], self._ends[address] = connection, ends
    return self._sockets[address]

  def _disconnect(self, address: str) -> None:
    connection, ends = self._sockets.pop(address), self._ends.pop(address)
    self._poller.unregister(connection)
    self._poller.unregister(ends)
    connection.disable_monitor()
    ends.close()
    connection.close()
