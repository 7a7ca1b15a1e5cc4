"""Reads between hosts, in one process: framing, security, faults."""

import contextlib
import dataclasses
import gc
import socket
import threading

import hypothesis
import numpy as np
import pytest
import zmq
import zmq.utils.monitor
from hypothesis import strategies as st

from moetion_jax import errors, keys as keys_lib
from moetion_jax.hostmem import (
  doorbell,
  entry,
  raw_bytes,
)
from moetion_jax.logs import (
  receive_buffers,
  wire_format,
  zmq_client,
  zmq_server,
)
from tests.support import remote_conformance

_SECONDS = remote_conformance.SECONDS
_SECRET = b'0123456789abcdef'
_ME = remote_conformance.ME


_key, _collect = remote_conformance.make_key, remote_conformance.collect
_wait_until = remote_conformance.wait_until


@pytest.fixture
def host():
  host = remote_conformance.Host(zmq_server.StoreServer)
  yield host
  host.close()


@pytest.fixture
def connect():
  """Makes clients."""
  with contextlib.ExitStack() as closing:

    def connect(secret=None, resend_seconds=0.2):
      client = zmq_client.StoreClient(_ME, resend_seconds, secret)
      closing.callback(client.close)
      return client

    yield connect


# --- Messages ----------------------------------------------------------------


def test_message_round_trip():
  worker, key = keys_lib.WorkerId(-1, 3, 1 << 40), _key(1 << 40, 12)
  packed = wire_format.pack(wire_format.MessageType.PIECE, worker, key, 1 << 35)
  assert len(packed) == wire_format.MESSAGE_BYTES
  assert wire_format.unpack(packed) == (
    wire_format.MessageType.PIECE,
    worker,
    key,
    1 << 35,
  )
  assert wire_format.unpack(packed + b'\0') is None
  assert wire_format.unpack(packed[:-1]) is None


@hypothesis.given(
  st.binary(
    min_size=wire_format.MESSAGE_BYTES - 6,
    max_size=wire_format.MESSAGE_BYTES - 6,
  )
)
def test_any_bytes_are_none_or_a_message(data):
  for magic in (b'MoEt\1\1', b'MoEt\1\x09', b'MoEt\2\1', b'\0' * 6):
    unpacked = wire_format.unpack(magic + data)
    if unpacked is not None:
      assert magic == b'MoEt\1\1'
      assert unpacked[2].kind in keys_lib.EntryKind
      assert wire_format.unpack(wire_format.pack(*unpacked)) == unpacked


def test_keys_come_from_the_secret_alone():
  keys = wire_format.CurveKeys.from_secret(_SECRET)
  assert keys == wire_format.CurveKeys.from_secret(bytes(_SECRET))
  other = wire_format.CurveKeys.from_secret(_SECRET + b'x')
  values = {
    keys.server_secret,
    keys.client_secret,
    keys.server_public,
    keys.client_public,
    other.server_secret,
    other.client_secret,
  }
  assert len(values) == 6
  assert zmq.curve_public(keys.client_secret) == keys.client_public
  with pytest.raises(ValueError, match='16'):
    wire_format.CurveKeys.from_secret(b'short')


@pytest.mark.parametrize(
  ('address', 'needs_secret'),
  [
    ('tcp://127.0.0.1:5000', False),
    ('tcp://127.1.2.3:*', False),
    ('tcp://[::1]:5000', False),
    ('tcp://0.0.0.0:5000', True),
    ('tcp://*:5000', True),
    ('tcp://10.0.0.1:5000', True),
    ('tcp://127.example.org:5000', True),
    ('tcp://[::]:5000', True),
  ],
)
def test_loopback_or_a_secret(host, connect, address, needs_secret):
  wire_format.check_address(address, _SECRET)
  if not needs_secret:
    wire_format.check_address(address, None)
    return
  with pytest.raises(errors.StoreError, match='secret'):
    zmq_server.StoreServer(host.folder.path, address).start()
  with pytest.raises(errors.StoreError, match='secret'):
    connect().want(_key(1), address)


def test_readers_that_are_gone_are_forgotten(host, connect, monkeypatch):
  monkeypatch.setattr(zmq_server, '_PARKED_SECONDS', 0.5)
  server, client = host.serve(), connect()
  client.want(_key(1), server.address)
  _wait_until(lambda: server._parked)
  client.close()
  _wait_until(lambda: not server._parked)


# --- Garbage -----------------------------------------------------------------


def test_garbage_to_the_server(host, connect, caplog):
  server = host.serve()
  host.publish(_key(1), np.arange(5))
  good = wire_format.pack(wire_format.MessageType.READ, _ME, _key(1))
  garbage = [
    [b''],
    [b'x' * 100],
    [good[:-1]],
    [good, b'more'],
    [b'\0' + good[1:]],
    [wire_format.pack(wire_format.MessageType.PIECE, _ME, _key(1))],
    [b'\x80\x04]q\x00.'],
  ]
  with zmq.Context() as context, context.socket(zmq.DEALER) as intruder:
    intruder.connect(server.address)
    for frames in garbage:
      intruder.send_multipart(frames)
    intruder.send(good)  # answered after all before it was looked at
    assert intruder.poll(int(_SECONDS * 1000))
    # Larger than any request: ZeroMQ itself hangs up.
    intruder.send(b'x' * 100_000)
    intruder.close(linger=0)
  assert server.malformed_count == len(garbage)
  assert len([r for r in caplog.records if 'not ours' in r.message]) == 1
  ip, port = server.address.removeprefix('tcp://').rsplit(':', 1)
  with socket.create_connection((ip, int(port)), _SECONDS) as raw:
    with contextlib.suppress(OSError):  # it hangs up on us
      raw.sendall(bytes(range(256)) * 100)
      while raw.recv(4096):
        pass
  client = connect()
  client.want(_key(1), server.address)
  assert _collect(client)[_key(1)].tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize('who', ['plain', 'other job', 'server key only'])
def test_strangers_do_not_get_in(host, connect, who):
  server = host.serve(secret=_SECRET)
  host.publish(_key(1), np.arange(5))
  keys = wire_format.CurveKeys.from_secret(
    b'another job here' if who == 'other job' else _SECRET
  )
  public, private = zmq.curve_keypair()
  with zmq.Context() as context, context.socket(zmq.DEALER) as intruder:
    intruder.linger = 0
    if who != 'plain':
      intruder.curve_serverkey = keys.server_public
      intruder.curve_publickey = public
      intruder.curve_secretkey = private
    monitor = intruder.get_monitor_socket()
    intruder.connect(server.address)
    intruder.send(wire_format.pack(wire_format.MessageType.READ, _ME, _key(1)))
    refused = (
      zmq.EVENT_DISCONNECTED
      | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
      | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
      | zmq.EVENT_HANDSHAKE_FAILED_AUTH
    )
    event = 0
    while not event & refused:
      assert monitor.poll(int(_SECONDS * 1000))
      event = zmq.utils.monitor.recv_monitor_message(monitor)['event']
      assert event != zmq.EVENT_HANDSHAKE_SUCCEEDED
    assert not intruder.poll(0)
    intruder.disable_monitor()
    monitor.close()
  assert server.malformed_count == 0
  _wait_until(lambda: server.refused_count)
  client = connect(_SECRET)
  client.want(_key(1), server.address)
  assert _collect(client)[_key(1)].tolist() == [0, 1, 2, 3, 4]


class _Liar:
  """A server that answers the first request with given frames."""

  def __init__(self):
    self.context = zmq.Context()
    self.router = self.context.socket(zmq.ROUTER)
    self.router.linger = 0
    port = self.router.bind_to_random_port('tcp://127.0.0.1')
    self.address = f'tcp://127.0.0.1:{port}'

  def answer(self, replies):
    identity, _ = self.router.recv_multipart()
    for frames in replies:
      self.router.send_multipart([identity, *frames])

  def close(self):
    self.router.close()
    self.context.term()


@pytest.fixture
def liar():
  liar = _Liar()
  yield liar
  liar.close()


def _reply(array, name, offset=0, **changes):
  header = entry.EntryHeader(
    key=name,
    generation=1,
    sequence=0,
    dtype=array.dtype,
    shape=array.shape,
    offset=0,
    nbytes=array.nbytes,
    checksum=raw_bytes.checksum(array),
  )
  header = dataclasses.replace(header, **changes)
  head = wire_format.pack(wire_format.MessageType.PIECE, _ME, name, offset)
  return [head + header.pack(), array.tobytes()]


def test_garbage_to_the_client(connect, liar):
  client, array = connect(), np.arange(10, dtype=np.int32)
  client.want(_key(1), liar.address)
  good = _reply(array, _key(1))
  malformed = [
    [b''],
    [b'x' * 300, b'y'],
    [wire_format.pack(wire_format.MessageType.READ, _ME, _key(1))],
    [good[0][:-1], good[1]],
    [good[0]],
    [good[0], good[1] + b'!'],
    _reply(array, _key(1), key=_key(2)),
    _reply(array, _key(1), nbytes=44),  # not what its shape says
    _reply(array, _key(1), shape=(1 << 40,), nbytes=1 << 42),
  ]
  ignored = [
    _reply(array, _key(9)),  # not asked for
    _reply(array, _key(1), offset=4),  # no beginning
  ]
  liar.answer(malformed + ignored + [[*good, b'an extra frame']])
  np.testing.assert_array_equal(_collect(client)[_key(1)], array)
  assert client.malformed_count == len(malformed)


def test_damage_on_the_way_is_found(connect, liar):
  client, array = connect(), np.arange(10, dtype=np.int32)
  client.want(_key(1), liar.address)
  liar.answer([_reply(array, _key(1), checksum=1)])
  error = _collect(client)[_key(1)]
  assert isinstance(error, entry.EntryCorruptError)
  assert str(_key(1)) in str(error)


def test_stream_that_begins_again(connect, liar):
  client, array = connect(), np.arange(10, dtype=np.int32)
  client.want(_key(1), liar.address)
  head, data = _reply(array, _key(1))
  rest = _reply(array, _key(1), offset=16)[0]
  liar.answer([[head, data[:16]], [head, data[:16]], [rest, data[16:]]])
  np.testing.assert_array_equal(_collect(client)[_key(1)], array)


def test_garbage_to_a_server_with_a_secret(host, connect, caplog):
  server = host.serve(secret=_SECRET)
  host.publish(_key(1), np.arange(5))
  ip, port = server.address.removeprefix('tcp://').rsplit(':', 1)
  client = connect(_SECRET)
  for count, data in enumerate((b'x', b'\xff' + b'\0' * 99, b''), 1):
    with socket.create_connection((ip, int(port)), _SECONDS) as raw:
      with contextlib.suppress(OSError):  # it may hang up on us
        raw.sendall(data)
        raw.shutdown(socket.SHUT_WR)
        while raw.recv(4096):
          pass
    _wait_until(lambda count=count: server.refused_count == count)
    client.want(_key(1), server.address)  # ours are not counted
    assert _collect(client)[_key(1)].tolist() == [0, 1, 2, 3, 4]
  assert len([r for r in caplog.records if 'not ours' in r.message]) == 1


class _Wire:
  """A wire to a server, on which somebody sees and repeats what goes by.

  Attributes:
    address: the address at which clients connect.
    sent: the frames of the clients, each connection's greeting the first.
    repeats: whose next frame is sent twice; 'client', 'server' or ''.
  """

  def __init__(self, address):
    ip, port = address.removeprefix('tcp://').rsplit(':', 1)
    self._server = ip, int(port)
    self._listener = socket.create_server(('127.0.0.1', 0))
    self.address = f'tcp://127.0.0.1:{self._listener.getsockname()[1]}'
    self.sent = []
    self.repeats = ''
    self._open = []
    threading.Thread(target=self._accept, daemon=True).start()

  @property
  def connections(self):
    """How often a client connected."""
    return sum(frame.startswith(b'\xff') for frame in self.sent)

  def close(self):
    for one in (self._listener, *self._open):
      with contextlib.suppress(OSError):
        one.shutdown(socket.SHUT_RDWR)
      one.close()

  def replay(self):
    """Sends a connection's frames again, to a new one; until it hangs up."""
    with socket.create_connection(self._server, _SECONDS) as again:
      with contextlib.suppress(OSError):
        again.sendall(b''.join(self.sent))
        again.shutdown(socket.SHUT_WR)
        while again.recv(4096):
          pass

  def _accept(self):
    with contextlib.suppress(OSError):
      while True:
        client, _ = self._listener.accept()
        server = socket.create_connection(self._server, _SECONDS)
        self._open += client, server
        for name, source, sink in (
          ('client', client, server),
          ('server', server, client),
        ):
          threading.Thread(
            target=self._pass_on, args=(name, source, sink), daemon=True
          ).start()

  def _pass_on(self, name, source, sink):
    with contextlib.suppress(OSError, EOFError), sink, source:
      greeting = b''
      while len(greeting) < 64:  # in parts: each waits for the other's
        greeting += (part := _read(source, 1))
        sink.sendall(part)
      if name == 'client':
        self.sent.append(greeting)
      while True:
        flags = _read(source, 1)
        size = _read(source, 8 if flags[0] & 2 else 1)
        frame = flags + size + _read(source, int.from_bytes(size))
        if name == 'client':
          self.sent.append(frame)
        sink.sendall(frame)
        if self.repeats == name:
          self.repeats = ''
          sink.sendall(frame)


def _read(source, nbytes):
  data = source.recv(nbytes, socket.MSG_WAITALL)
  if len(data) < nbytes:
    raise EOFError
  return data


@pytest.fixture
def wire(host):
  """A wire to a server with a secret, which has entry 1 and 2."""
  wire = _Wire(host.serve(secret=_SECRET).address)
  host.publish(_key(1), np.arange(5))
  host.publish(_key(2), np.arange(7))
  yield wire
  wire.close()


def test_a_connection_that_is_replayed_gets_nothing(wire, host, connect):
  client = connect(_SECRET)
  client.want(_key(1), wire.address)
  assert _collect(client)[_key(1)].tolist() == [0, 1, 2, 3, 4]
  (server,) = host.servers
  before = server.refused_count
  assert len(wire.sent) >= 3  # greeting, handshake, request
  wire.replay()
  _wait_until(lambda: server.refused_count > before)
  assert not server.malformed_count
  client.want(_key(2), wire.address)
  assert _collect(client)[_key(2)].tolist() == [*range(7)]


@pytest.mark.parametrize('whose', ['client', 'server'])
def test_a_frame_that_comes_twice_ends_its_connection(wire, connect, whose):
  """Its number is known; the reader connects anew, and gets what it wants."""
  client = connect(_SECRET)
  client.want(_key(1), wire.address)
  assert _collect(client)[_key(1)].tolist() == [0, 1, 2, 3, 4]
  before = wire.connections
  wire.repeats = whose
  client.want(_key(2), wire.address)
  assert _collect(client)[_key(2)].tolist() == [*range(7)]
  client.want(_key(1), wire.address)
  assert _collect(client)[_key(1)].tolist() == [0, 1, 2, 3, 4]
  assert wire.connections > before


# --- Parts -------------------------------------------------------------------


def test_buffers_are_used_again_but_never_while_read():
  pool, array = receive_buffers.BufferPool(), np.zeros((10, 100), np.float32)
  packed = _reply(array, _key(1))[0][wire_format.MESSAGE_BYTES :]
  header = entry.EntryHeader.unpack(packed)
  assert header is not None
  memory, loan = pool.take(header)
  address = memory.__array_interface__['data'][0]
  assert address % 64 == 0
  memory[:] = 1
  view = loan[3:5]
  del loan
  gc.collect()
  other, _ = pool.take(header)
  assert other.__array_interface__['data'][0] != address
  assert view.tobytes() == b'\1' * 800
  del view
  gc.collect()
  addresses = {
    taken[0].__array_interface__['data'][0]
    for taken in [pool.take(header) for _ in range(2)]
  }
  assert address in addresses


def test_doorbell(tmp_path):
  deep = tmp_path / ('x' * 120)  # longer than a socket address may be
  deep.mkdir()
  first, second = doorbell.Doorbell(deep, 'a'), doorbell.Doorbell(deep, 'b')
  first.start()
  first.ring_others()  # nobody there
  second.start()
  poller = zmq.Poller()
  poller.register(second.fileno(), zmq.POLLIN)
  assert not poller.poll(0)
  for _ in range(5000):  # more than its queue holds
    first.ring_others()
  assert poller.poll(0)
  second.drain()
  assert not poller.poll(0)
  second.ring()
  assert poller.poll(0)
  second.close()
  (deep / 'dead.bell').touch()  # left by a dead process
  first.ring_others()
  first.close()
  assert [path.name for path in deep.iterdir()] == ['dead.bell']
