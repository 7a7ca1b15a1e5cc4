"""The logs: one suite for all of them, and what only the shared one does."""

import contextlib
import dataclasses
import errno
import functools
import gc
import mmap
import os
import threading
import time
import uuid
from typing import Any

import jax
import numpy as np
import pytest
from jax import numpy as jnp

from moetion_jax import errors, keys
from moetion_jax.hostmem import entry, segment, store_folder
from moetion_jax.logs import (
  boundary_log,
  interface as log_interface,
  joined_log,
  memory_log,
  remote,
  zmq_client,
  zmq_server,
)
from tests.support import helpers, log_conformance, tcp_transport

_SECONDS = log_conformance.SECONDS
_SECRET = b'0123456789abcdef'
_CONNECT = functools.partial(zmq_client.StoreClient, secret=_SECRET)

_key, _Reading = log_conformance.make_key, log_conformance.Reading
_until_waiting = log_conformance.until_waiting
_until_blocked = log_conformance.until_blocked


@pytest.fixture
def folders():
  made = []

  def make():
    folder = store_folder.StoreFolder('/dev/shm', f'test-{uuid.uuid4().hex}')
    folder.start()
    made.append(folder)
    return folder.path

  yield make
  for folder in made:
    folder.remove()


class _Pair:
  """Started logs of stages 0 and 1."""

  def __init__(self, kind, folders):
    self.servers: list[Any] = []
    self.logs: list[Any] = []
    self.locations = {}
    self.connect = tcp_transport.Client if kind == 'sockets' else _CONNECT
    if kind == 'memory':
      store = memory_log.MemoryStore()
      self.logs += [
        memory_log.MemoryLog(keys.WorkerId(stage, 0, 1), store)
        for stage in range(2)
      ]
    else:
      is_apart = kind in ('hosts', 'sockets')
      self.folders = [folders()]
      self.folders.append(folders() if is_apart else self.folders[0])
      self.logs += [self.make(stage) for stage in range(2)]
    if kind == 'joined':
      self.logs = [
        joined_log.JoinedLog({0: log, 1: self.make(stage, replica=1)})
        for stage, log in enumerate(self.logs)
      ]
    for log in self.logs:
      log.start()
    if kind in ('hosts', 'sockets'):
      for stage, folder in enumerate(self.folders):
        server: remote.ReadServer = (
          tcp_transport.Server(folder)
          if kind == 'sockets'
          else zmq_server.StoreServer(folder, secret=_SECRET)
        )
        server.start()
        self.servers.append(server)
        self.locations[stage, 0] = remote.Location(
          host=str(folder), address=server.address
        )
      for log in self.logs:
        log.update_locations(self.locations)

  def make(self, stage, generation=1, replica=0, **changes):
    folder = self.folders[stage]
    settings = log_interface.LogSettings(
      folder=folder, host=str(folder), size_bytes=1 << 20, resend_seconds=0.2
    )
    return boundary_log.BoundaryLog(
      keys.WorkerId(stage, replica, generation),
      dataclasses.replace(settings, **changes),
      self.connect,
    )

  def close(self):
    for closable in self.logs + self.servers:
      closable.close()


class TestEveryLog(log_conformance.LogConformance):
  @pytest.fixture(params=['memory', 'host', 'hosts', 'sockets', 'joined'])
  def pair(self, request, folders):
    pair = _Pair(request.param, folders)
    yield pair
    pair.close()


def test_a_joined_log_flushes_up_to_a_mark(folders):
  """What comes later may wait for room: for what the flush is waited for."""
  pair = _Pair('joined', folders)
  writer, _ = pair.logs
  writer.publish(_key(1), np.ones(4))
  mark = writer.mark()
  of_other = [dataclasses.replace(_key(i), replica=1) for i in range(1, 4)]
  for key in of_other:
    writer.publish(key, np.zeros(400_000, np.uint8))
  _until_blocked(writer, of_other[-1])
  writer.flush(_SECONDS, mark)
  with pytest.raises(TimeoutError):
    writer.flush(0.1)
  pair.close()


@pytest.fixture
def shared(folders):
  pair = _Pair('host', folders)
  yield pair
  pair.close()


# --- The shared log ----------------------------------------------------------


@pytest.mark.parametrize('kind', ['host', 'hosts', 'sockets'])
def test_waits_for_what_exists_are_counted(folders, kind):
  pair = _Pair(kind, folders)
  writer, reader = pair.logs
  # Not published yet: the wait counts from the commit, after the publication.
  reading = _Reading(reader, _key(1))
  _until_waiting(reader, _key(1))
  before = time.monotonic()
  writer.publish(_key(1), jnp.ones(4))
  reading.get()
  first = reader.late_seconds
  assert 0 < first < time.monotonic() - before
  # Published: all of it counts, but not the time when nobody asked.
  writer.publish(_key(2), jnp.ones(4))
  writer.flush(_SECONDS)
  before = time.monotonic()
  reader.read(_key(2), timeout_seconds=_SECONDS)
  assert 0 < reader.late_seconds - first < time.monotonic() - before
  pair.close()


def test_device_array_is_the_mapped_memory_and_holds_its_lease(shared):
  writer, reader = shared.logs
  half = np.arange((1 << 20) // 8, dtype=np.float32)  # two fit
  writer.publish(_key(1), half)
  writer.publish(_key(2), half)
  held = reader.read(_key(1), timeout_seconds=_SECONDS)
  first = held.unsafe_buffer_pointer()
  assert reader.read(_key(1)).unsafe_buffer_pointer() == first  # no copy
  writer.retain(3)
  writer.publish(_key(3), half + 1)
  _until_blocked(writer, _key(3))
  np.testing.assert_array_equal(held, half)
  del held
  gc.collect()
  writer.flush(_SECONDS)
  assert not writer.blocked_for
  found = reader.read(_key(3), timeout_seconds=_SECONDS)
  np.testing.assert_array_equal(found, half + 1)


def test_program_in_flight_holds_the_lease(shared):
  writer, reader = shared.logs
  size = (1 << 20) // 4  # one fits
  ones = jnp.ones(size)

  @jax.jit
  def consume(x):
    busy = jax.lax.fori_loop(0, 60, lambda _, y: jnp.sin(y) + 1, ones)
    # Uses x only when `busy` is known.
    return x * jnp.where(busy[0] > -10, 1, 0)

  consume(ones).block_until_ready()
  for iteration in range(1, 5):
    writer.retain(iteration)
    writer.publish(_key(iteration), jnp.full(size, float(iteration)))
    y = consume(reader.read(_key(iteration), timeout_seconds=_SECONDS))
    # While it runs, the writer does its best to overwrite its input.
    writer.retain(iteration + 1)
    writer.publish(
      _key(iteration, microbatch=1), jnp.full(size, -float(iteration))
    )
    assert (np.asarray(y) == iteration).all()
    writer.flush(_SECONDS)
    del y


def test_donated_input_does_not_write_to_the_log(shared):
  writer, reader = shared.logs
  writer.publish(_key(1), jnp.arange(4096.0))
  double = jax.jit(lambda x: x * 2, donate_argnums=0)
  result = double(reader.read(_key(1), timeout_seconds=_SECONDS))
  np.testing.assert_array_equal(result, np.arange(4096.0) * 2)
  found = reader.read(_key(1))
  np.testing.assert_array_equal(found, np.arange(4096.0))


def test_full_log_waits_visibly_and_says_why(shared):
  log = shared.make(1, 2, size_bytes=mmap.PAGESIZE, fresh=True)
  shared.logs[1].close()
  log.start()
  page = np.zeros(mmap.PAGESIZE, np.uint8)
  log.publish(_key(1, stage=1), page)
  log.publish(_key(2, stage=1), page)
  _until_blocked(log, _key(2, stage=1))
  assert 'since iteration 1' in log.blocked_for
  assert '--log_iterations' in log.blocked_for
  with pytest.raises(TimeoutError):  # it is not the log that gives up
    log.flush(0.1)
  log.close()
  assert not log.blocked_for


def test_full_log_goes_on_when_the_line_advances(shared):
  writer, reader = shared.logs
  for iteration in range(1, 4):
    writer.publish(_key(iteration), np.full(400_000, iteration, np.uint8))
  _until_blocked(writer, _key(3))
  writer.retain(2)
  found = reader.read(_key(3), timeout_seconds=_SECONDS)
  assert (np.asarray(found) == 3).all()


def test_publish_itself_waits_when_too_much_is_pending(shared):
  log = shared.make(
    1, 2, size_bytes=mmap.PAGESIZE, pending_entries=2, fresh=True
  )
  shared.logs[1].close()
  log.start()
  published = []

  def publish():
    with pytest.raises(errors.StoreError, match='closed'):
      for microbatch in range(5000):
        log.publish(_key(1, 1, microbatch), np.zeros(mmap.PAGESIZE, np.uint8))
        published.append(microbatch)

  thread = threading.Thread(target=publish)
  thread.start()
  _until_blocked(log, _key(1, 1, 1))
  log.close()
  thread.join(_SECONDS)
  assert not thread.is_alive() and len(published) <= 4


def test_failed_computation_reaches_the_caller(shared):
  writer, _ = shared.logs

  def fail(_):
    raise RuntimeError('scripted')

  broken = jax.jit(
    lambda x: jax.pure_callback(fail, jax.ShapeDtypeStruct((), x.dtype), x)
  )
  with pytest.raises(Exception, match='scripted'):
    writer.publish(_key(1), broken(jnp.ones(())))
    writer.flush(_SECONDS)


@pytest.mark.parametrize('kind', ['host', 'hosts'])
@pytest.mark.parametrize('is_prefetched', [False, True])
def test_corrupt_entry(folders, kind, is_prefetched):
  """Its first read finds it, in the reader's thread as well."""
  pair = _Pair(kind, folders)
  writer, reader = pair.logs
  writer.publish(_key(1), np.zeros(1000, np.uint8))
  writer.flush(_SECONDS)
  path = segment.segment_path(pair.folders[0], 0, 0)
  with path.open('r+b') as file:
    file.seek(path.stat().st_size - (1 << 20) + 500)
    file.write(b'\1')
  if is_prefetched:
    reader.prefetch(_key(1))
  with pytest.raises(entry.EntryCorruptError, match=str(_key(1))):
    reader.read(_key(1), timeout_seconds=_SECONDS)
  pair.close()


@pytest.mark.parametrize('kind', ['host', 'hosts'])
def test_logs_that_begin_anew_hide_the_old_ones(folders, kind):
  """At once: all went back because what was in them is wrong."""
  pair = _Pair(kind, folders)
  for generation in (1, 2, 3):
    writer, reader = pair.logs
    writer.publish(_key(1), np.full(8, generation))
    writer.flush(_SECONDS)
    found = reader.read(_key(1), timeout_seconds=_SECONDS)
    assert found.tolist() == [generation] * 8
    for stage, log in enumerate(pair.logs):
      log.close()
      segment.segment_path(pair.folders[stage], stage, 0).unlink()
      pair.logs[stage] = pair.make(stage, generation + 1, fresh=True)
      pair.logs[stage].start()
      pair.logs[stage].update_locations(pair.locations)
  pair.close()


def test_replacement_publishes_the_same_again(shared):
  writer, reader = shared.logs
  writer.publish(_key(1), jnp.arange(3))
  writer.flush(_SECONDS)
  writer.close()
  # Nobody is left, its entries are.
  assert reader.read(_key(1), timeout_seconds=_SECONDS).tolist() == [0, 1, 2]
  reading = _Reading(reader, _key(2))
  _until_waiting(reader, _key(2))
  replacement = shared.make(0, generation=2)
  replacement.start()
  replacement.publish(_key(1), jnp.arange(3))
  replacement.publish(_key(2), jnp.arange(4))
  assert reading.get().tolist() == [0, 1, 2, 3]
  replacement.close()


def test_reader_may_start_before_its_producer(folders):
  pair = _Pair('host', folders)
  late = pair.folders[0]
  for log in pair.logs:
    log.close()
  segment.segment_path(late, 0, 0).unlink()
  reader, writer = pair.make(1, 2), pair.make(0, 2)
  reader.start()
  reading = _Reading(reader, _key(1))
  _until_waiting(reader, _key(1))
  writer.start()
  writer.publish(_key(1), jnp.ones(3))
  assert reading.get().tolist() == [1, 1, 1]
  reader.close()
  writer.close()


def test_locations_change_under_a_read_that_waits(folders):
  pair = _Pair('hosts', folders)
  writer, reader = pair.logs
  host, address = str(pair.folders[0]), pair.servers[0].address
  nobody = remote.Location(host=host, address='tcp://127.0.0.1:1', generation=3)
  reader.update_locations({(0, 0): nobody})
  writer.publish(_key(1), jnp.ones(3))
  reading = _Reading(reader, _key(1))
  _until_waiting(reader, _key(1))
  late = remote.Location(host=host, address=address, generation=2)
  reader.update_locations({(0, 0): late})  # from a map of before: ignored
  with pytest.raises(TimeoutError):
    reader.read(_key(1), timeout_seconds=0.3)
  new = remote.Location(host=host, address=address, generation=4)
  reader.update_locations({(0, 0): new})
  assert reading.get().tolist() == [1, 1, 1]
  pair.close()


def _refused(worker, resend_seconds):
  """Connects to nobody, for want of a descriptor."""
  raise OSError(errno.EMFILE, 'Too many open files')


def _open_files():
  """The files in host memory that this process has open."""
  found = []
  for name in os.listdir('/proc/self/fd'):
    with contextlib.suppress(FileNotFoundError):
      found.append(os.readlink(f'/proc/self/fd/{name}'))
  return sorted(
    path for path in found if path.startswith('/dev/shm/moetion-test-')
  )


@pytest.mark.parametrize('left', range(6))
def test_a_start_that_is_refused_leaves_nothing_open(folders, left):
  """Neither a descriptor nor the lock: whoever tries again can have both."""
  settings = log_interface.LogSettings(folder=folders(), size_bytes=1 << 14)
  gc.collect()
  before = _open_files()
  log = boundary_log.BoundaryLog(keys.WorkerId(0, 0, 1), settings, _refused)
  with helpers.no_descriptor(left):
    with contextlib.suppress(errors.MoetionError, OSError):
      log.start()
      log.close()  # it has all that it needs
  del log
  gc.collect()
  assert _open_files() == before
  log = boundary_log.BoundaryLog(keys.WorkerId(0, 0, 1), settings, _refused)
  log.start()
  log.close()


@pytest.mark.timeout(60)
def test_a_reader_without_a_client_keeps_nobody_waiting(folders):
  settings = log_interface.LogSettings(folder=folders(), size_bytes=1 << 14)
  log = boundary_log.BoundaryLog(keys.WorkerId(0, 0, 1), settings, _refused)
  log.start()
  with pytest.raises(OSError, match='Too many open files'):
    log.read(_key(1, 1), timeout_seconds=5.0)
  log.close()


def test_fenced_reader(folders):
  pair = _Pair('hosts', folders)
  pair.servers[0].fence(keys.WorkerId(1, 0, 2))
  with pytest.raises(errors.FencedError, match='generation 1'):
    pair.logs[1].read(_key(1), timeout_seconds=_SECONDS)
  pair.close()


@pytest.mark.parametrize('left', [None, 0.0, 0.5])
@pytest.mark.parametrize('kind', ['host', 'hosts'])
def test_a_log_that_is_cut_or_removed(folders, kind, left):
  """Who writes it fails, whatever it waits for; who reads it waits."""
  pair = _Pair(kind, folders)
  writer, reader = pair.logs
  writer.publish(_key(1), np.zeros(9, np.float32))
  writer.flush(_SECONDS)
  reader.read(_key(1), timeout_seconds=_SECONDS)
  # Of the other, which gives nothing.
  waiting = _Reading(writer, _key(1, stage=1)), _Reading(reader, _key(2))
  _until_waiting(writer, _key(1, stage=1))
  _until_waiting(reader, _key(2))
  path = segment.segment_path(pair.folders[0], 0, 0)
  if left is None:
    path.unlink()
  else:
    os.truncate(path, int(path.stat().st_size * left))
  assert 'cut or removed' in str(waiting[0].get())
  with pytest.raises(errors.StoreError, match='cut or removed'):
    writer.publish(_key(2), np.zeros(9, np.float32))
  writer.close()
  # Its next generation begins a new one.
  segment.fence(pair.folders[0], keys.WorkerId(0, 0, 2))
  pair.logs[0] = pair.make(0, generation=2)
  pair.logs[0].start()
  pair.logs[0].publish(_key(2), np.ones(9, np.float32))
  assert waiting[1].get().tolist() == [1] * 9
  pair.close()


def test_close_leaves_only_segments_and_no_thread(folders):
  before = set(threading.enumerate())
  pair = _Pair('hosts', folders)
  pair.logs[0].publish(_key(1), jnp.ones(3))
  pair.logs[1].read(_key(1), timeout_seconds=_SECONDS)
  pair.close()
  pair.close()
  names = {path.name for folder in pair.folders for path in folder.iterdir()}
  assert names == {
    'lock',
    'owner',
    'stage-0.replica-0.segment',
    'stage-1.replica-0.segment',
  }
  left = set(threading.enumerate()) - before
  assert not [thread for thread in left if 'log ' in thread.name]
  assert not [thread for thread in left if 'store' in thread.name]


def test_folder_must_be_private(tmp_path):
  tmp_path.chmod(0o755)
  settings = log_interface.LogSettings(folder=tmp_path, size_bytes=1)
  log = boundary_log.BoundaryLog(keys.WorkerId(0, 0, 1), settings, _CONNECT)
  with pytest.raises(errors.StoreError, match='0700'):
    log.start()
  log.close()
