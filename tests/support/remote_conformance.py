"""What both ends of every transport do: one suite, run for each of them."""

import functools
import gc
import os
import time
import uuid

import ml_dtypes
import numpy as np
import pytest

from moetion_jax import errors, keys
from moetion_jax.hostmem import (
  doorbell,
  entry,
  segment_writer,
  store_folder,
)

SECONDS = 30.0
ME = keys.WorkerId(1, 0, 7)
_RING_BYTES = 8 << 20


def make_key(iteration, microbatch=0):
  return keys.EntryKey(iteration, 0, 0, keys.EntryKind.ACTIVATION, microbatch)


class Host:
  """A store folder with a producer in it, and servers.

  Args:
    make_server: of a folder, perhaps with an address.
  """

  def __init__(self, make_server):
    self.folder = store_folder.StoreFolder(
      '/dev/shm', f'test-{uuid.uuid4().hex}'
    )
    self.folder.start()
    worker = keys.WorkerId(0, 0, 1)
    self.writer = segment_writer.SegmentWriter(
      self.folder.path, worker, _RING_BYTES
    )
    self.writer.start()
    self.bell = doorbell.Doorbell(self.folder.path, 'producer')
    self.bell.start()
    self.servers = []
    self.make_server = make_server

  def serve(self, *arguments, **options):
    server = self.make_server(self.folder.path, *arguments, **options)
    server.start()
    self.servers.append(server)
    return server

  def publish(self, name, array):
    self.writer.put(name, array)
    self.bell.ring_others()

  def close(self):
    for server in self.servers:
      server.close()
    self.bell.close()
    self.writer.close()
    self.folder.remove()


def collect(client, count=1):
  """Waits for `count` results, by key."""
  results, deadline = {}, time.monotonic() + SECONDS
  never = os.eventfd(0)
  while len(results) < count:
    assert time.monotonic() < deadline, f'only {list(results)}'
    client.wait(never, 0.05)
    results |= {arrival.key: arrival.result for arrival in client.collect()}
  os.close(never)
  return results


def wait_until(condition):
  deadline = time.monotonic() + SECONDS
  while not condition():
    assert time.monotonic() < deadline
    os.sched_yield()


class RemoteConformance:
  """The suite.

  A fixture `host` is a `Host`; a fixture `connect` makes clients of a worker
  and of seconds until a read is sent again, by default `ME` and 0.2.
  """

  @pytest.mark.parametrize(
    ('dtype', 'shape'),
    [
      (np.float32, ()),
      (np.uint8, (0, 5)),
      (np.int32, (3, 4)),
      (ml_dtypes.bfloat16, (1000, 1001)),  # more than a piece of 1 MiB
      (np.uint8, (3 << 20,)),
    ],
  )
  def test_bytes_in_are_bytes_out(self, host, connect, dtype, shape):
    server, client = host.serve(), connect()
    count = int(np.prod(shape)) * np.dtype(dtype).itemsize
    data = np.random.default_rng(0).integers(0, 256, count, np.uint8)
    array = data.view(dtype).reshape(shape)
    host.publish(make_key(1), array)
    client.want(make_key(1), server.address)
    found = collect(client)[make_key(1)]
    assert (found.dtype, found.shape) == (np.dtype(dtype), shape)
    assert found.tobytes() == array.tobytes()
    assert not found.flags.writeable

  def test_an_entry_that_comes_later_is_announced(self, host, connect):
    server = host.serve()
    clients = [connect(resend_seconds=3600.0) for _ in range(3)]
    host.publish(make_key(1), np.arange(2))
    for client in clients:
      for microbatch in range(4):
        client.want(make_key(2, microbatch), server.address)
      client.want(make_key(1), server.address)
      collect(client)  # so the server has read what was asked for before
    for microbatch in range(4):
      host.publish(make_key(2, microbatch), np.full(9, microbatch))
    for client in clients:
      found = collect(client, 4)
      for microbatch in range(4):
        assert (found[make_key(2, microbatch)] == microbatch).all()

  def test_a_read_that_is_repeated_ends_once(self, host, connect):
    server, client = host.serve(), connect(resend_seconds=0.0)
    client.want(make_key(1), server.address)
    for _ in range(50):
      assert not client.collect()
    host.publish(make_key(1), np.arange(1 << 18))
    np.testing.assert_array_equal(
      collect(client)[make_key(1)], np.arange(1 << 18)
    )
    host.publish(make_key(2), np.arange(2))
    client.want(make_key(2), server.address)
    assert list(collect(client)) == [make_key(2)]

  def test_a_read_that_is_forgotten_never_ends(self, host, connect):
    server, client = host.serve(), connect()
    client.want(make_key(1), server.address)
    client.forget(make_key(1))
    host.publish(make_key(1), np.arange(2))
    host.publish(make_key(2), np.arange(2))
    client.want(make_key(2), server.address)
    assert list(collect(client)) == [make_key(2)]

  def test_reads_go_on_when_the_server_is_replaced(self, host, connect):
    server, client = host.serve(), connect()
    host.publish(make_key(1), np.arange(2))
    client.want(make_key(2), server.address)
    client.want(make_key(1), server.address)
    collect(client)
    server.close()  # with the request that it had read
    host.serve(server.address)
    host.publish(make_key(2), np.arange(5))
    assert collect(client)[make_key(2)].tolist() == [0, 1, 2, 3, 4]

  def test_a_read_goes_on_at_another_address(self, host, connect):
    old, client = host.serve(), connect(resend_seconds=3600.0)
    client.want(make_key(1), old.address)
    old.close()
    new = host.serve()
    client.keep({new.address})
    client.want(make_key(1), new.address)
    host.publish(make_key(1), np.arange(3))
    assert collect(client)[make_key(1)].tolist() == [0, 1, 2]

  def test_a_descriptor_ends_the_wait(self, host, connect):
    server, client = host.serve(), connect()
    client.want(make_key(1), server.address)
    bell = os.eventfd(1)
    client.wait(bell, 3600.0)  # longer than the test may last
    assert os.eventfd_read(bell) == 1
    os.close(bell)

  def test_the_lease_ends_when_the_entry_is_sent(self, host, connect):
    server, client = host.serve(), connect()
    data = np.zeros(_RING_BYTES * 3 // 4, np.uint8)  # the ring has one
    for iteration in range(1, 5):
      host.writer.retain(iteration)
      name = make_key(iteration)
      wait_until(functools.partial(_try_publish, host, name, data))
      client.want(name, server.address)
      assert collect(client)[name].nbytes == data.nbytes

  def test_a_damaged_entry_is_found(self, host, connect):
    server, client = host.serve(), connect()
    host.publish(make_key(1), np.zeros(1000, np.uint8))
    path = host.writer.path
    with path.open('r+b') as file:
      file.seek(path.stat().st_size - _RING_BYTES + 500)
      file.write(b'\1')
    client.want(make_key(1), server.address)
    error = collect(client)[make_key(1)]
    assert isinstance(error, entry.EntryCorruptError)
    assert str(make_key(1)) in str(error)

  def test_fencing(self, host, connect):
    server = host.serve()
    newer = keys.WorkerId(ME.stage, ME.replica, ME.generation + 1)
    old, new = connect(), connect(worker=newer)
    for client in (old, new):
      client.want(make_key(1), server.address)
    server.fence(newer)  # what was asked before is refused too
    assert isinstance(collect(old)[make_key(1)], errors.FencedError)
    host.publish(make_key(1), np.arange(5))
    assert collect(new)[make_key(1)].tolist() == [0, 1, 2, 3, 4]
    old.want(make_key(1), server.address)
    assert isinstance(collect(old)[make_key(1)], errors.FencedError)

  def test_an_address_is_served_once(self, host):
    taken, other = host.serve(), Host(host.make_server)
    with pytest.raises(errors.StoreError, match='in use'):
      other.serve(taken.address)
    other.close()


def _try_publish(host, name, data):
  try:
    host.publish(name, data)
  except segment_writer.SegmentFullError:
    gc.collect(0)
    return False
  return True
