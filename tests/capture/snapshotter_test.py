"""The snapshot thread: one copy at a time, none skipped, errors are raised."""

import errno
import gc
import os
import threading
import time
import weakref
from typing import Any

import chex
import jax
import numpy as np
import pytest

from moetion_jax import errors, keys
from moetion_jax.capture import programs as capture_programs, snapshotter
from moetion_jax.policies import decision as decision_lib, slots
from moetion_jax.recovery import hang_detection
from moetion_jax.snapshots import (
  durable_store,
  file as snapshot_file,
  interface as snapshots_interface,
  memory_store,
  snapshot,
)
from tests.support import captures, plain_store

pytestmark = pytest.mark.timeout(60)

_SIZE_BYTES = 1 << 16
_SECONDS = 20.0  # longer than anything here takes


@pytest.fixture(scope='module')
def programs():
  made = capture_programs.CapturePrograms(captures.make_layout())
  made.compile()
  return made


class _HeldStore(memory_store.SnapshotStore):
  """A store whose saves wait until the test lets them go on."""

  def __init__(self, *arguments):
    super().__init__(*arguments)
    self.begun: list[int] = []
    self.may_go_on = threading.Semaphore(0)
    self.running = self.most_running = 0
    self.error: Exception | None = None

  def save(self, iteration, *arguments, **options):
    self.begun.append(iteration)
    self.running += 1
    self.most_running = max(self.running, self.most_running)
    try:
      assert self.may_go_on.acquire(timeout=_SECONDS)
      if self.error:
        raise self.error
      return super().save(iteration, *arguments, **options)
    finally:
      self.running -= 1


class _Log:
  """Records when it is flushed, and up to which entry."""

  def __init__(self, events):
    self.published_count = 0
    self._events = events

  def mark(self):
    return (self.published_count,)

  def flush(self, timeout_seconds=None, mark=None):
    self._events.append(('flush', mark))


@pytest.fixture
def training(programs, shm_folder):
  one = _Training(programs, shm_folder)
  yield one
  one.close()


class _Training:
  """A training thread, as far as snapshots see of it."""

  def __init__(self, programs, folder):
    self.programs = programs
    self.folder = folder
    self.of = programs.layout
    self.stored: list[int] = []
    self._open: list[snapshotter.Snapshotter] = []

  def decision(self, first_iteration=0, length=3, every=1):
    made = slots.make_slots(self.of.operators, self.of.state_bytes(), length)
    return decision_lib.CaptureDecision(
      first_iteration=first_iteration,
      window_length=length,
      mode='rolling',
      every=every,
      slots=made,
    )

  def store(self, files=4, kind=memory_store.SnapshotStore):
    return kind(self.folder, _SIZE_BYTES, files)

  def start(
    self, store=None, decision=None, log=None, on_stored=None, **options: Any
  ):
    taker = snapshotter.Snapshotter(
      self.programs,
      store or self.store(),
      decision or self.decision(),
      {'stage': 3},
      snapshotter.Options(
        log=log,
        on_stored=on_stored
        or (lambda metadata: self.stored.append(metadata['iteration'])),
        **options,
      ),
    )
    taker.start()
    self._open.append(taker)
    return taker

  def take(self, taker, iteration, **fields):
    state = captures.place(self.of, self.host(iteration))
    compute = captures.compute_of(self.of, state)
    extras = {'digests': np.full((4, 2), iteration, np.uint32)}
    return taker.take(iteration, state, compute, extras, **fields)

  def host(self, iteration):
    return captures.make_state(iteration)

  def on_disk(self):
    return sorted(snapshot_file.list_snapshots(self.folder))

  def read(self, iteration):
    path = snapshot_file.list_snapshots(self.folder)[iteration]
    stored = snapshot_file.open_snapshot(path, verify=True)
    return snapshot.from_arrays(self.of, stored.metadata, stored.arrays)

  def close(self):
    for taker in self._open:
      taker.close()


def _wait_until(condition):
  deadline = time.monotonic() + _SECONDS
  while not condition():
    assert time.monotonic() < deadline
    time.sleep(0.002)


def _in_thread(function, *arguments):
  """Starts it; `result()` waits for what it returns."""
  results: list = []
  thread = threading.Thread(target=lambda: results.append(function(*arguments)))
  thread.start()

  def result():
    thread.join(_SECONDS)
    return results[0]

  return thread, result


def test_what_is_stored(training):
  taker = training.start()
  assert taker.newest == -1 and taker.bandwidth == 0.0
  begin = time.monotonic()
  taken = training.take(taker, 1, clip_factor='0x1p-1', updated=True)
  taker.flush()
  captured = training.decision().captured(1)
  slot, others, _ = captured
  assert taken.snapshot_bytes == snapshot.snapshot_bytes(training.of, captured)
  found = training.read(1)
  assert found.state.keys() == slot and found.compute.keys() == others
  rows = training.of.partition.split(training.host(1))
  for operator in slot:
    chex.assert_trees_all_equal(dict(found.state[operator]), rows[operator])
  chex.assert_trees_all_equal(
    dict(found.extras), {'digests': np.full((4, 2), 1, np.uint32)}
  )
  assert found.metadata == {
    'iteration': 1,
    'stage': 3,
    'clip_factor': '0x1p-1',
    'updated': True,
    'state': keys.operators_to_json(slot),
    'compute': keys.operators_to_json(others),
  }
  assert taker.newest == 1
  # The bytes that were stored, in no more than all the time: digests as well.
  copied_bytes = taker.bandwidth * (time.monotonic() - begin)
  assert copied_bytes > taken.snapshot_bytes and taker.bandwidth > 0
  assert training.stored == [1]


def test_training_waits_while_a_copy_is_late_and_skips_nothing(training):
  store = training.store(9, _HeldStore)
  taker = training.start(store)
  first = training.take(taker, 1)
  assert first.blocked_seconds < 1.0  # the first one waits for nobody
  _wait_until(lambda: store.begun == [1])
  thread, second = _in_thread(training.take, taker, 2)
  time.sleep(0.2)
  assert thread.is_alive() and store.begun == [1]
  store.may_go_on.release()
  assert second().blocked_seconds > 0.1  # visibly
  _wait_until(lambda: store.begun == [1, 2])
  assert taker.newest == 1 and training.stored == [1]
  for iteration in range(3, 7):
    thread, result = _in_thread(training.take, taker, iteration)
    store.may_go_on.release()
    result()
  store.may_go_on.release()
  taker.flush()
  assert store.begun == training.stored == training.on_disk() == [*range(1, 7)]
  assert store.most_running == 1
  assert taker.newest == 6


def test_the_state_is_released_when_its_copies_are_dispatched(training):
  """Not earlier, and not only when they are stored."""
  may_go_on, store = threading.Semaphore(0), training.store(kind=_HeldStore)

  class _HeldPrograms:
    layout = training.of

    def capture(self, *arguments):
      assert may_go_on.acquire(timeout=_SECONDS)
      return training.programs.capture(*arguments)

  taker = snapshotter.Snapshotter(
    _HeldPrograms(), store, training.decision(), {}
  )
  taker.start()
  assert taker.release() < 1.0  # nothing was taken yet
  state = captures.place(training.of, training.host(1))
  taken = taker.take(1, state, captures.compute_of(training.of, state), {})
  assert taken.blocked_seconds < 1.0
  thread, seconds = _in_thread(taker.release)
  time.sleep(0.1)
  assert thread.is_alive()
  may_go_on.release()
  assert seconds() > 0.05
  # As an update does: the buffers of the old state are written again.
  overwrite = jax.jit(
    lambda tree: jax.tree.map(lambda x: x * 0 + 3, tree), donate_argnums=0
  )
  jax.block_until_ready(overwrite(state))
  assert all(x.is_deleted() for x in jax.tree.leaves(state))
  _wait_until(lambda: store.begun == [1])
  store.may_go_on.release()
  taker.close()
  rows = training.of.partition.split(training.host(1))
  found = training.read(1)
  assert found.state
  for operator, leaves in found.state.items():
    chex.assert_trees_all_equal(dict(leaves), rows[operator])


def test_what_training_gives_back_is_not_kept(training):
  """Memory of a device: copies are of their own, and gone when all is here."""
  programs = capture_programs.CapturePrograms(training.of, is_packed=True)
  programs.compile()
  store = training.store(kind=_HeldStore)
  taker = snapshotter.Snapshotter(programs, store, training.decision(), {})
  taker.start()
  state = captures.place(training.of, training.host(1))
  compute = captures.compute_of(training.of, state)
  kept = [weakref.ref(x) for x in (*jax.tree.leaves(state), *compute.values())]
  taker.take(1, state, compute, {'digests': next(iter(compute.values()))})
  taker.release()
  _wait_until(lambda: store.begun == [1])
  del state, compute
  gc.collect()
  assert len(kept) > 10 and not any(array() is not None for array in kept)
  store.may_go_on.release()
  taker.close()
  assert training.on_disk() == [1]


def test_flush_waits_for_the_copy_on_its_way(training):
  store = training.store(kind=_HeldStore)
  taker = training.start(store)
  training.take(taker, 1)
  thread, _ = _in_thread(taker.flush)
  time.sleep(0.1)
  assert thread.is_alive() and not training.stored
  store.may_go_on.release()
  thread.join(_SECONDS)
  assert not thread.is_alive() and training.stored == [1]


def test_close_waits_for_the_copy_on_its_way(training):
  store = training.store(kind=_HeldStore)
  taker = training.start(store)
  training.take(taker, 1)
  _wait_until(lambda: store.begun)
  thread, _ = _in_thread(taker.close)
  time.sleep(0.1)
  assert thread.is_alive()
  store.may_go_on.release()
  thread.join(_SECONDS)
  assert not thread.is_alive() and training.on_disk() == [1]
  taker.close()  # again, for nothing
  training.store().start()  # the folder is free


@pytest.mark.parametrize('call', ['take', 'flush', 'release'])
def test_an_error_of_the_thread_is_raised_by_the_next_call(training, call):
  store = training.store(kind=_HeldStore)
  store.error = errors.StoreError('the disk is on fire')
  taker = training.start(store)
  training.take(taker, 1)
  store.may_go_on.release()
  if call == 'release':  # it waits for the dispatch, not for the copy
    with pytest.raises(errors.StoreError, match='on fire'):
      taker.flush()
  for _ in range(2):  # and by every later one
    with pytest.raises(errors.StoreError, match='on fire'):
      training.take(taker, 2) if call == 'take' else getattr(taker, call)()
  assert store.begun == [1]
  taker.close()


def test_an_error_ends_a_take_that_waits(training):
  store = training.store(kind=_HeldStore)
  store.error = errors.StoreError('the disk is on fire')
  taker = training.start(store)
  training.take(taker, 1)
  caught: list[Exception] = []

  def take():
    try:
      training.take(taker, 2)
    except errors.StoreError as error:
      caught.append(error)

  thread, result = _in_thread(take)
  _wait_until(lambda: store.begun)
  store.may_go_on.release()
  result()
  assert not thread.is_alive() and 'on fire' in str(caught[0])


def test_an_error_of_who_is_told_is_raised(training):
  def refuse(metadata):
    raise errors.StoreError('nobody listens')

  taker = training.start(on_stored=refuse)
  training.take(taker, 1)
  with pytest.raises(errors.StoreError, match='nobody listens'):
    taker.flush()


# ---- retention ---------------------------------------------------------------


def test_files_of_what_is_let_go_of_are_used_again(training):
  def files():
    return {
      p.stat().st_ino for p in training.folder.rglob('*') if _is_data_file(p)
    }

  taker = training.start(training.store(files=4))
  reserved = files()
  assert len(reserved) == 4
  for iteration in range(1, 30):
    taker.retain(iteration - 2)
    training.take(taker, iteration)
  taker.flush()
  assert files() == reserved
  assert training.on_disk()[-3:] == [27, 28, 29]
  assert len(training.on_disk()) <= 4


def _is_data_file(path):
  return path.name == 'data' or path.name.startswith('free-')


def test_a_full_store_waits_until_something_may_go(training):
  said = []
  taker = training.start(
    training.store(files=3), on_block=lambda *one: said.append(one)
  )
  for iteration in range(1, 4):
    training.take(taker, iteration)
  training.take(taker, 4)  # dispatched; there is no room for it yet
  thread, result = _in_thread(training.take, taker, 5)
  time.sleep(0.3)
  assert thread.is_alive() and training.on_disk() == [1, 2, 3]
  taker.retain(2)  # from another thread, as the line's news comes
  _wait_until(lambda: training.on_disk() == [2, 3, 4])
  assert result().blocked_seconds > 0.1
  full = hang_detection.Shortage.SNAPSHOTS
  assert said[:2] == [(full, 'snapshot 4'), (None, '')]
  taker.retain(3)
  taker.flush()
  assert training.on_disk() == [3, 4, 5]


def test_a_full_store_does_not_keep_one_from_closing(training):
  taker = training.start(training.store(files=1))
  training.take(taker, 1)
  training.take(taker, 2)
  begin = time.monotonic()
  taker.close()
  assert time.monotonic() - begin < 5.0
  assert training.on_disk() == [1]


class _NoRoomStore(memory_store.SnapshotStore):
  """A store in a tmpfs that is full until the test makes room."""

  number = errno.ENOSPC
  has_room = False
  tries = 0

  def save(self, *arguments, **options):
    self.tries += 1
    if not self.has_room:
      raise OSError(self.number, os.strerror(self.number))
    return super().save(*arguments, **options)


def test_a_host_without_memory_is_waited_for_and_said(training):
  said: list[tuple[object, ...]] = []
  store = training.store(kind=_NoRoomStore)
  taker = training.start(store, on_block=lambda *one: said.append(one))
  training.take(taker, 1)
  _wait_until(lambda: store.tries > 2)
  ((shortage, what),) = said
  assert shortage is hang_detection.Shortage.ROOM
  assert what.startswith('snapshot 1: No space left on device; free host mem')
  store.has_room = True
  taker.flush()
  assert said[1:] == [(None, '')]
  assert training.on_disk() == [1]


def test_a_host_that_stays_without_memory_ends_the_run(training):
  said: list[tuple[object, ...]] = []
  store = training.store(kind=_NoRoomStore)
  taker = training.start(
    store, on_block=lambda *one: said.append(one), full_seconds=0.3
  )
  training.take(taker, 1)
  with pytest.raises(errors.NoRoomError, match='snapshot 1: .* for 0.3 s'):
    taker.flush()
  assert said[-1] == (None, '')


class _BusyStore(memory_store.SnapshotStore):
  """Has no room, then files that are all in use, then no room again."""

  tries = 0
  fails = (*'nsss', *'nsss', *'nsss')

  def save(self, *arguments, **options):
    self.tries += 1
    if self.tries > len(self.fails):
      return super().save(*arguments, **options)
    if self.fails[self.tries - 1] == 'n':
      raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    raise snapshots_interface.SnapshotFullError('all in use')


def test_times_without_room_are_not_added_up_and_each_is_said(training):
  """0.1 s between tries: the third time without room is after 0.8 s."""
  said: list[tuple[object, ...]] = []
  taker = training.start(
    training.store(kind=_BusyStore),
    on_block=lambda *one: said.append(one),
    full_seconds=0.5,
  )
  training.take(taker, 1)
  taker.flush()
  lack = hang_detection.Shortage
  kinds = [lack.ROOM, None, lack.SNAPSHOTS, None]
  assert [kind for kind, _ in said] == kinds * 3
  for kind, what in said:
    assert ('No space left' in what) is (kind is lack.ROOM)
    assert what.startswith('snapshot 1') is (kind is not None)
  assert training.on_disk() == [1]


def test_any_other_error_of_the_file_system_is_raised(training):
  store = training.store(kind=_NoRoomStore)
  store.number = errno.EIO
  taker = training.start(store)
  training.take(taker, 1)
  with pytest.raises(OSError, match='Input/output'):
    taker.flush()
  assert store.tries == 1


# ---- decisions ---------------------------------------------------------------


def test_a_decision_holds_from_its_iteration_on(training):
  taker = training.start(training.store(12))
  other = training.decision(first_iteration=4, length=2)
  taker.decide(other)
  for iteration in range(1, 8):
    held = training.decision() if iteration < 4 else other
    slot, *_ = held.captured(iteration)
    assert taker.slot(iteration) == slot
    training.take(taker, iteration)
    taker.flush()
    assert training.read(iteration).state.keys() == slot


def test_a_later_word_on_an_iteration_replaces_the_earlier(training):
  taker = training.start()
  for length, first in ((2, 6), (1, 4)):
    taker.decide(training.decision(first_iteration=first, length=length))
  assert taker.slot(9) == frozenset(training.of.operators)


def test_iterations_without_a_snapshot(training):
  taker = training.start(decision=training.decision(length=1, every=3))
  for iteration in range(1, 8):
    taken = training.take(taker, iteration)
    assert bool(taken.snapshot_bytes) == (iteration in (3, 6))
    assert bool(taker.slot(iteration)) == (iteration in (3, 6))
  taker.flush()
  assert training.on_disk() == [3, 6]


# ---- what is there already ---------------------------------------------------


def test_a_replay_takes_nothing_twice(training):
  taker = training.start()
  for iteration in (1, 2):
    training.take(taker, iteration)
  taker.close()
  again = training.start()
  assert again.newest == 2
  for iteration in (1, 2):
    assert training.take(again, iteration) == snapshotter.TakenSnapshot()
  assert training.take(again, 3).snapshot_bytes
  again.flush()
  # Nobody may have heard of those that are there: they are told once more.
  assert training.stored == [1, 2, 1, 2, 3]


def test_a_snapshot_that_is_not_trusted_is_taken_again(training):
  taker = training.start()
  for iteration in (1, 2):
    training.take(taker, iteration)
  taker.close()
  damaged = snapshot_file.list_snapshots(training.folder)[1] / 'data'
  with open(damaged, 'r+b') as file:
    file.write(b'\x55' * 64)
  # In another order, so that it cannot be the same one.
  order = list(reversed(training.of.operators))
  made = slots.make_slots(order, training.of.state_bytes(), 3)
  other = decision_lib.CaptureDecision(
    first_iteration=0, window_length=3, mode='rolling', slots=made
  )
  again = training.start(decision=other)
  again.distrust(1)
  assert training.take(again, 1).snapshot_bytes
  assert training.take(again, 2) == snapshotter.TakenSnapshot()  # as it was
  assert (
    training.take(again, 1) == snapshotter.TakenSnapshot()
  )  # once is enough
  again.flush()
  captured = other.captured(1)
  assert captured and training.read(1).state.keys() == captured[0]
  assert sorted(training.stored) == [1, 1, 1, 2, 2]  # 1 was taken twice


def test_one_that_is_not_trusted_may_have_had_other_bits(training):
  """Damage that its checksums do not show: what a replay comes to counts."""
  taker = training.start()
  training.take(taker, 1)
  taker.close()
  before = training.read(1)
  again = training.start()
  again.distrust(1)
  training.host = lambda iteration: captures.make_state(99)
  assert training.take(again, 1).snapshot_bytes
  again.flush()
  after = training.read(1)
  assert after.state.keys() == before.state.keys()
  operator = min(after.state)
  with pytest.raises(AssertionError):
    chex.assert_trees_all_equal(
      dict(after.state[operator]), dict(before.state[operator])
    )
  assert training.stored == [1, 1]


@pytest.mark.parametrize('kind', ['durable', 'plain'])
def test_every_store_gets_the_same(training, tmp_path, kind):
  memory, other = training.store(), plain_store.PlainStore(tmp_path / 'other')
  if kind == 'durable':
    within = memory_store.SnapshotStore(tmp_path / 'memory', _SIZE_BYTES, 1)
    other = durable_store.DurableStore(within, tmp_path / 'other')
  for store in (memory, other):
    taker = training.start(store)
    for iteration in range(1, 4):
      training.take(taker, iteration)
    taker.flush()
    taker.retain(4)
    assert store.iterations() == [1, 2, 3]
  for iteration in range(1, 4):
    assert other.manifest(iteration) == memory.manifest(iteration)
    other.open(iteration, verify=True).close()


# ---- the log -----------------------------------------------------------------


def test_a_snapshot_counts_only_after_what_was_published_before_it(training):
  events: list = []

  class _Store(memory_store.SnapshotStore):
    def save(self, iteration, *arguments, **options):
      events.append(('save', iteration))
      return super().save(iteration, *arguments, **options)

  log = _Log(events)
  taker = training.start(
    training.store(kind=_Store),
    log=log,
    on_stored=lambda metadata: events.append(('told', metadata['iteration'])),
  )
  log.published_count = 7
  training.take(taker, 1)
  taker.flush()
  log.published_count = 12
  training.take(taker, 2)
  log.published_count = 99  # later than the snapshot: of no concern
  taker.flush()
  assert events == [
    ('flush', (7,)),
    ('save', 1),
    ('told', 1),
    ('flush', (12,)),
    ('save', 2),
    ('told', 2),
  ]
