"""A second transport: `logs.remote` over plain sockets, for one machine.

A request is a message of `wire_format`; an answer is one, then the header of
the entry and its bytes.
"""

from __future__ import annotations

import contextlib
import select
import socket
import threading
import time

import numpy as np

from moetion_jax import errors, keys
from moetion_jax.hostmem import doorbell, entry, raw_bytes, segment_reader
from moetion_jax.logs import remote, wire_format

_SECONDS = 30.0


def _receive(connection: socket.socket, nbytes: int) -> bytearray:
  """Receives so many bytes; raises ConnectionError if it ends before."""
  data = bytearray(nbytes)
  left = memoryview(data)
  while left:
    count = connection.recv_into(left)
    if not count:
      raise ConnectionError('closed')
    left = left[count:]
  return data


def _connected(address: str) -> socket.socket:
  host, _, port = address.removeprefix('tcp://').rpartition(':')
  return socket.create_connection((host, int(port)), _SECONDS)


class Server:
  """A `remote.ReadServer`."""

  def __init__(self, folder, address='tcp://127.0.0.1:*'):
    self.address = address
    self._index = segment_reader.StoreIndex(folder)
    self._bell = doorbell.Doorbell(folder, 'tcp-server')
    self._generations: dict[tuple[int, int], int] = {}
    self._wanted: dict[socket.socket, dict[keys.EntryKey, keys.WorkerId]] = {}
    self._listener: socket.socket | None = None
    self._closing = threading.Event()
    self._thread = threading.Thread(target=self._serve, name='tcp store-server')

  def start(self):
    wire_format.check_address(self.address, None)
    host, _, port = self.address.removeprefix('tcp://').rpartition(':')
    self._bell.start()
    try:
      self._listener = socket.create_server((host, int(port.replace('*', '0'))))
    except OSError as error:
      self._bell.close()
      raise errors.StoreError(f'{self.address}: {error.strerror}') from error
    self.address = f'tcp://{host}:{self._listener.getsockname()[1]}'
    self._thread.start()

  def close(self):
    self._closing.set()
    if self._listener is not None:
      self._bell.ring()
      self._thread.join()
      for connection in (self._listener, *self._wanted):
        connection.close()
      self._listener = None
    self._index.close()
    self._bell.close()

  def fence(self, worker):
    self._generations[worker.stage, worker.replica] = worker.generation
    self._bell.ring()

  def _serve(self):
    listener = self._listener
    assert listener is not None
    while not self._closing.is_set():
      ready, _, _ = select.select([listener, self._bell, *self._wanted], [], [])
      self._bell.drain()
      for connection in ready:
        if connection is listener:
          self._wanted[listener.accept()[0]] = {}
        elif connection is not self._bell:
          self._attend(connection, self._read_request)
      for connection in list(self._wanted):
        self._attend(connection, self._answer)
      self._index.refresh()

  def _attend(self, connection, action):
    """Does something with a connection; forgets one that has ended."""
    try:
      action(connection)
    except OSError:
      del self._wanted[connection]
      connection.close()

  def _read_request(self, connection):
    request = wire_format.unpack(
      bytes(_receive(connection, wire_format.MESSAGE_BYTES))
    )
    if request is None:
      raise ConnectionError('not one of ours')
    _, worker, key, _ = request
    self._wanted[connection][key] = worker

  def _answer(self, connection):
    for key, worker in list(self._wanted[connection].items()):
      newest = self._generations.get((worker.stage, worker.replica), 0)
      if worker.generation < newest:
        del self._wanted[connection][key]
        kind = wire_format.MessageType.FENCED
        connection.sendall(wire_format.pack(kind, worker, key))
        continue
      taken = self._index.take(key, is_current=True)
      if taken is not None:
        del self._wanted[connection][key]
        header, array = taken
        me = keys.WorkerId(key.stage, key.replica, header.generation)
        message = wire_format.pack(wire_format.MessageType.PIECE, me, key)
        connection.sendall(message + header.pack())
        connection.sendall(raw_bytes.as_bytes(array).data)


class Client:
  """A `remote.ReadClient`."""

  def __init__(self, worker, resend_seconds):
    self._worker = worker
    self._resend_seconds = resend_seconds
    self._connections: dict[str, socket.socket] = {}
    self._wants: dict[keys.EntryKey, str] = {}
    self._resend_at: dict[keys.EntryKey, float] = {}

  def want(self, key, address):
    wire_format.check_address(address, None)
    if self._wants.get(key) != address:
      self._wants[key] = address
      self._resend_at[key] = 0.0
      self._send_due()

  def forget(self, key):
    self._wants.pop(key, None)

  def keep(self, addresses):
    for address in set(self._connections) - addresses:
      self._connections.pop(address).close()

  def wait(self, fd, timeout_seconds):
    select.select([fd, *self._connections.values()], [], [], timeout_seconds)

  def collect(self):
    arrived = []
    for address, connection in list(self._connections.items()):
      try:
        while select.select([connection], [], [], 0)[0]:
          arrival = self._read_answer(connection)
          if self._wants.get(arrival.key) == address:
            del self._wants[arrival.key]
            arrived.append(arrival)
      except OSError:  # asked for again
        self.keep(set(self._connections) - {address})
    self._send_due()
    return arrived

  def close(self):
    self.keep(set())
    self._wants.clear()

  def _read_answer(self, connection) -> remote.Arrival:
    answer = wire_format.unpack(
      bytes(_receive(connection, wire_format.MESSAGE_BYTES))
    )
    if answer is None:
      raise ConnectionError('not one of ours')
    kind, _, key, _ = answer
    if kind == wire_format.MessageType.FENCED:
      fenced = errors.FencedError(f'{self._worker} was replaced')
      return remote.Arrival(key, None, fenced)
    header = entry.EntryHeader.unpack(
      bytes(_receive(connection, entry.HEADER_BYTES))
    )
    if header is None:
      raise ConnectionError('not one of ours')
    data = np.frombuffer(_receive(connection, header.nbytes), np.uint8)
    array = entry.from_bytes(data, header)
    array.flags.writeable = False
    try:
      entry.verify(header, array)
    except entry.EntryCorruptError as error:
      return remote.Arrival(key, header, error)
    return remote.Arrival(key, header, array)

  def _send_due(self):
    now = time.monotonic()
    for key, address in self._wants.items():
      if now < self._resend_at[key]:
        continue
      self._resend_at[key] = now + self._resend_seconds
      with contextlib.suppress(OSError):  # nobody is there: asked again
        if address not in self._connections:
          self._connections[address] = _connected(address)
        kind = wire_format.MessageType.READ
        message = wire_format.pack(kind, self._worker, key)
        self._connections[address].sendall(message)
