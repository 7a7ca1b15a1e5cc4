"""The store server: a host's committed entries, for readers elsewhere.

A request is answered when its entry exists: at once, or when the doorbell
rings. Nothing is lost with a server that dies: all it knows is repeated by its
readers or lies in tmpfs.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import threading
import time
import weakref

import numpy as np
import zmq
import zmq.auth.thread
import zmq.utils.monitor

from moetion_jax import errors, keys as keys_lib
from moetion_jax.hostmem import doorbell, entry, raw_bytes, segment_reader
from moetion_jax.logs import wire_format

PIECE_BYTES = 1 << 20
_MAX_REQUEST_BYTES = 1024
_MAX_PARKED = 1 << 16
_PARKED_SECONDS = 5.0  # readers repeat themselves every second
_COMPLAINT_SECONDS = 60.0
_UNREACHABLE_MILLISECONDS = 10_000

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class _Endpoint:
  """A bound address: where requests arrive, and what its connections do.

  Attributes:
    context: the context of the sockets.
    authenticator: the thread that knows the readers' keys, if there is one.
    router: the socket of requests.
    monitor: the socket of events of its connections.
  """

  context: zmq.Context
  authenticator: zmq.auth.thread.ThreadAuthenticator | None
  router: zmq.Socket
  monitor: zmq.Socket

  def close(self) -> None:
    """Closes the sockets and all connections."""
    self.router.disable_monitor()
    self.monitor.close()
    self.router.close()
    if self.authenticator is not None:
      self.authenticator.stop()
    self.context.term()


def _bind(address: str, secret: bytes | None) -> _Endpoint:
  """Binds an address; raises StoreError if that cannot be done."""
  context, authenticator = zmq.Context(), None
  router = context.socket(zmq.ROUTER)
  router.linger = 0
  router.maxmsgsize = _MAX_REQUEST_BYTES
  # What waits to be sent is mapped memory and small headers: no limit, since
  # at a limit a ROUTER drops.
  router.sndhwm = 0
  # A host that vanished may not hold leases for the kernel's 15 minutes.
  router.tcp_maxrt = _UNREACHABLE_MILLISECONDS
  if secret is not None:
    keys = wire_format.CurveKeys.from_secret(secret)
    authenticator = zmq.auth.thread.ThreadAuthenticator(context)
    authenticator.start()
    authenticator.configure_curve_callback(
      domain='*', credentials_provider=keys
    )
    router.curve_server = True
    router.curve_secretkey = keys.server_secret
  monitor = router.get_monitor_socket(
    zmq.EVENT_ACCEPTED | zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED
  )
  endpoint = _Endpoint(context, authenticator, router, monitor)
  try:
    router.bind(address)
  except zmq.ZMQError as error:
    endpoint.close()
    raise errors.StoreError(f'{address}: {error.strerror}') from error
  return endpoint


class StoreServer:
  """A `remote.ReadServer`.

  Runs in the host's agent, so it outlives the workers whose entries it serves.

  Attributes:
    address: address that readers connect to, known after `start`.
    malformed_count: number of messages that were not ours, or were about
      damaged segments.
    refused_count: number of connections that ended before they proved to be
      ours.
  """

  def __init__(
    self,
    folder: str | os.PathLike[str],
    address: str = 'tcp://127.0.0.1:*',
    secret: bytes | None = None,
  ):
    """Stores the settings.

    Args:
      folder: the store folder.
      address: address to bind; '*' stands for any free port.
      secret: secret of the job; needed unless `address` is loopback.
    """
    self.address = address
    self.malformed_count = 0
    self.refused_count = 0
    self._secret = secret
    self._index = segment_reader.StoreIndex(folder)
    self._bell = doorbell.Doorbell(folder, 'store-server')
    self._closing = threading.Event()
    self._thread: threading.Thread | None = None
    self._endpoint: _Endpoint | None = None
    self._generations: dict[tuple[int, int], int] = {}
    # By key and connection: who reads, and when it counts as gone.
    self._parked: dict[
      tuple[keys_lib.EntryKey, bytes], tuple[keys_lib.WorkerId, float]
    ] = {}
    self._sending: dict[tuple[keys_lib.EntryKey, bytes], weakref.ref] = {}
    self._complain_at = 0.0
    # Connections by descriptor, oldest first, that proved nothing yet.
    self._strangers: dict[int, None] = {}

  def start(self) -> None:
    """See `remote.ReadServer`."""
    wire_format.check_address(self.address, self._secret)
    self._bell.start()
    try:
      self._endpoint = _bind(self.address, self._secret)
    except BaseException:
      self.close()
      raise
    router = self._endpoint.router
    self.address = router.last_endpoint.decode().rstrip('\0')
    self._thread = threading.Thread(
      target=self._serve,
      args=(router, self._endpoint.monitor),
      name='store-server',
      daemon=True,
    )
    self._thread.start()

  def close(self) -> None:
    """See `remote.ReadServer`."""
    self._closing.set()
    if self._thread is not None:
      self._bell.ring()
      self._thread.join()
      self._thread = None
    if self._endpoint is not None:
      self._endpoint.close()
      self._endpoint = None
    self._index.close()
    self._bell.close()

  def fence(self, worker: keys_lib.WorkerId) -> None:
    """See `remote.ReadServer`."""
    self._generations[worker.stage, worker.replica] = worker.generation
    self._bell.ring()

  def _serve(self, router: zmq.Socket, monitor: zmq.Socket) -> None:
    poller = zmq.Poller()
    poller.register(router, zmq.POLLIN)
    poller.register(monitor, zmq.POLLIN)
    poller.register(self._bell.fileno(), zmq.POLLIN)
    tidy_at = 0.0
    while not self._closing.is_set():
      poller.poll(1000 if self._parked else None)
      self._bell.drain()
      self._receive(router)
      self._watch(monitor)
      self._refuse_fenced(router)
      for key in {key for key, _ in self._parked}:
        self._answer(router, key)
      if time.monotonic() > tidy_at:
        tidy_at = time.monotonic() + 1
        self._tidy()

  def _receive(self, router: zmq.Socket) -> None:
    """Parks every request that has arrived."""
    while True:
      try:
        frames = router.recv_multipart(zmq.NOBLOCK)
      except zmq.Again:
        return
      request = wire_format.unpack(frames[1]) if len(frames) == 2 else None
      if request is None or request[0] != wire_format.MessageType.READ:
        self.malformed_count += 1
        self._complain(f'a message that is not ours ({len(frames)} frames)')
        continue
      _, worker, key, _ = request
      if len(self._parked) < _MAX_PARKED:
        gone_at = time.monotonic() + _PARKED_SECONDS
        self._parked[key, frames[0]] = worker, gone_at

  def _refuse_fenced(self, router: zmq.Socket) -> None:
    """Tells readers of older generations that they were replaced."""
    for (key, identity), (worker, _) in list(self._parked.items()):
      newest = self._generations.get((worker.stage, worker.replica), 0)
      if worker.generation < newest:
        del self._parked[key, identity]
        fenced = wire_format.pack(wire_format.MessageType.FENCED, worker, key)
        router.send_multipart([identity, fenced])

  def _watch(self, monitor: zmq.Socket) -> None:
    """Counts connections that were not ours; ZeroMQ itself hangs up."""
    while monitor.poll(0):
      event = zmq.utils.monitor.recv_monitor_message(monitor)
      if event['event'] == zmq.EVENT_ACCEPTED:
        self._strangers[event['value']] = None
      elif event['event'] == zmq.EVENT_HANDSHAKE_SUCCEEDED:
        # The event does not say whose: taken in the order in which they came.
        if self._strangers:
          del self._strangers[next(iter(self._strangers))]
      elif event['value'] in self._strangers:
        del self._strangers[event['value']]
        self.refused_count += 1
        self._complain('a connection that is not ours')

  def _answer(self, router: zmq.Socket, key: keys_lib.EntryKey) -> None:
    """Sends an entry to all who wait for it, if it exists."""
    try:
      # What all stages went back from may still be mapped here, and be wrong.
      taken = self._index.take(key, is_current=True)
    except (errors.StoreError, OSError) as error:
      self.malformed_count += 1
      self._complain(str(error))
      return
    if taken is None:
      return
    for parked in [parked for parked in self._parked if parked[0] == key]:
      del self._parked[parked]
      sending = self._sending.get(parked)
      # A reader that repeats itself before the last byte is out can wait.
      if sending is None or sending() is None:
        self._send(router, parked, *taken)

  def _send(
    self,
    router: zmq.Socket,
    parked: tuple[keys_lib.EntryKey, bytes],
    header: entry.EntryHeader,
    array: np.ndarray,
  ) -> None:
    key, identity = parked
    # Frames hold slices of this view, and so the lease, until they are out.
    data = raw_bytes.as_bytes(array).view()
    self._sending[parked] = weakref.ref(data)
    memory, packed = memoryview(data.data), header.pack()
    me = keys_lib.WorkerId(key.stage, key.replica, header.generation)
    for offset in range(0, max(1, header.nbytes), PIECE_BYTES):
      router.send_multipart(
        [
          identity,
          wire_format.pack(wire_format.MessageType.PIECE, me, key, offset)
          + packed,
          memory[offset : offset + PIECE_BYTES],
        ],
        copy=False,
      )

  def _tidy(self) -> None:
    now = time.monotonic()
    self._parked = {
      parked: (worker, gone_at)
      for parked, (worker, gone_at) in self._parked.items()
      if now < gone_at
    }
    self._sending = {
      parked: sending
      for parked, sending in self._sending.items()
      if sending() is not None
    }
    self._index.refresh()

  def _complain(self, what: str) -> None:
    """Logs what was ignored, once in a while."""
    if time.monotonic() >= self._complain_at:
      self._complain_at = time.monotonic() + _COMPLAINT_SECONDS
      _log.warning(
        '%s: ignored %s; %d messages and %d connections so far',
        self.address,
        what,
        self.malformed_count,
        self.refused_count,
      )
