"""Segments and their index, within one process."""

import gc
import mmap
import os

import hypothesis
import ml_dtypes
import numpy as np
import pytest
from hypothesis import strategies as st

from moetion_jax import errors, keys
from moetion_jax.hostmem import (
  entry,
  raw_bytes,
  segment,
  segment_reader,
  segment_writer,
)
from moetion_jax.runtime.worker import fault_damage

_ME = keys.WorkerId(0, 0, 1)


def _key(iteration, microbatch=0, kind=keys.EntryKind.ACTIVATION, stage=0):
  return keys.EntryKey(iteration, stage, 0, kind, microbatch)


class _Starter:
  """Starts writers in one folder, each after the last one ended."""

  def __init__(self, folder):
    self.folder = folder
    self.index = segment_reader.StoreIndex(folder)
    self.writer = None

  def __call__(
    self, worker=_ME, size_bytes=4 * mmap.PAGESIZE, cells=16, fresh=False
  ):
    self.stop()
    self.writer = segment_writer.SegmentWriter(
      self.folder, worker, size_bytes, cells
    )
    self.writer.start(fresh)
    return self.writer

  def stop(self):
    if self.writer is not None:
      self.writer.close()


@pytest.fixture
def start(tmp_path):
  starter = _Starter(tmp_path)
  yield starter
  starter.index.close()
  starter.stop()


@pytest.mark.parametrize('dtype', raw_bytes.DTYPES, ids=str)
@pytest.mark.parametrize('shape', [(), (0, 3), (1,), (5, 7)])
def test_bytes_in_are_bytes_out(start, dtype, shape):
  writer = start()
  count = int(np.prod(shape)) * dtype.itemsize
  data = np.random.default_rng(0).integers(0, 256, count, np.uint8)
  if dtype == np.bool_:
    data &= 1
  array = data.view(dtype).reshape(shape)
  assert writer.put(_key(1), array)
  header, found = start.index.take(_key(1))
  assert (found.dtype, found.shape) == (dtype, shape)
  assert found.tobytes() == array.tobytes()
  assert not found.flags.writeable or not count
  assert header.generation == 1
  entry.verify(header, found)
  assert found.__array_interface__['data'][0] % 64 == 0 or not count


def test_array_that_is_not_contiguous(start):
  writer = start()
  array = np.arange(24, dtype=np.int32).reshape(4, 6).T[::2]
  writer.put(_key(1), array)
  np.testing.assert_array_equal(start.index.take(_key(1))[1], array)


def test_header_survives_packing_and_nothing_else_does():
  header = entry.EntryHeader(
    key=_key(7, 3),
    generation=2,
    sequence=9,
    dtype=np.dtype(ml_dtypes.bfloat16),
    shape=(2, 3, 4),
    offset=64,
    nbytes=48,
    checksum=1 << 63,
  )
  packed = header.pack()
  assert len(packed) == entry.HEADER_BYTES
  assert entry.EntryHeader.unpack(packed) == header
  for position in range(len(packed)):
    damaged = bytearray(packed)
    damaged[position] ^= 1
    assert entry.EntryHeader.unpack(bytes(damaged)) is None
  assert entry.EntryHeader.unpack(packed[:-1]) is None
  assert entry.EntryHeader.unpack(b'') is None


def test_publishing_again(start):
  writer = start()
  array = np.arange(6, dtype=np.float32)
  assert writer.put(_key(1), array)
  assert not writer.put(_key(1), array.copy())
  for other in (
    array + 1,
    array.reshape(2, 3),
    array.view(np.int32),
    array[:5],
  ):
    with pytest.raises(errors.EntryMismatchError, match=str(_key(1))):
      writer.put(_key(1), other)
  nan = np.array([np.nan, -0.0], np.float32)  # bits count, not values
  assert writer.put(_key(2), nan)
  assert not writer.put(_key(2), nan)
  with pytest.raises(errors.EntryMismatchError):
    writer.put(_key(2), np.array([np.nan, 0.0], np.float32))


def test_damage_is_detected_also_by_publishing_again(start, tmp_path):
  writer = start()
  array = np.arange(1000, dtype=np.int32)
  writer.put(_key(1), array)
  header, _ = start.index.take(_key(1))
  path = segment.segment_path(tmp_path, 0, 0)
  data_offset = path.stat().st_size - 4 * mmap.PAGESIZE
  with path.open('r+b') as file:
    file.seek(data_offset + header.offset + 77)
    file.write(b'\xff')
  header, found = start.index.take(_key(1))
  with pytest.raises(entry.EntryCorruptError, match=str(_key(1))):
    entry.verify(header, found)
  with pytest.raises(entry.EntryDecayedError, match=str(_key(1))):
    writer.put(_key(1), array)


def test_damage_is_noticed_two_iterations_later(start, tmp_path):
  writer = start()
  for microbatch in range(5):
    writer.put(_key(1, microbatch), np.full(100, microbatch))
  path = segment.segment_path(tmp_path, 0, 0)
  assert fault_damage.damage_entry(path, _key(1, 3))
  writer.look_back(2)
  writer.look_back(3)  # a few at a time
  with pytest.raises(entry.EntryDecayedError, match=str(_key(1, 3))):
    writer.look_back(3)
  writer.look_back(3)  # others are not to blame


def test_damage_is_noticed_before_the_entry_is_gone(start, tmp_path):
  writer = start(cells=2)
  for iteration in (1, 2):
    writer.put(_key(iteration), np.full(100, iteration))
  path = segment.segment_path(tmp_path, 0, 0)
  assert fault_damage.damage_entry(path, _key(1))
  writer.retain(3)
  with pytest.raises(entry.EntryDecayedError, match=str(_key(1))):
    writer.put(_key(3), np.zeros(100))


def test_a_damaged_header_says_nothing(start, tmp_path):
  """Neither its iteration nor its contents; the entry is lost."""
  writer = start()
  for iteration in (3, 5, 4):  # as a replay does
    writer.put(_key(iteration), np.zeros(10))
  path = segment.segment_path(tmp_path, 0, 0)
  assert segment.newest_iteration(path) == 5
  with path.open('r+b') as file:
    file.seek(segment.cell_offset(1) + entry.ITERATION_OFFSET + 2)
    file.write(b'\1')
  assert segment.newest_iteration(path) == 4
  assert start.index.take(_key(5)) is None
  assert start.index.take(_key(4)) is not None  # which comes after it


def test_retention_frees_space_in_order(start):
  size_bytes = segment.ring_bytes([3000, 8], 2)
  writer = start(size_bytes=size_bytes)
  for iteration in range(1, 100):
    writer.retain(iteration - 2)
    writer.put(_key(iteration), np.full(3000, iteration, np.uint8))
    scalars = _key(iteration, kind=keys.EntryKind.SCALARS)
    writer.put(scalars, np.array([iteration]))
    for kept in range(max(1, iteration - 2), iteration + 1):
      assert (start.index.take(_key(kept))[1] == kept % 256).all()
  found = {header.key for header in start.index.entries()}
  assert {_key(97), _key(98), _key(99)} <= found
  assert start.index.take(_key(1)) is None


def test_full_segment(start):
  writer = start()
  page = np.zeros(mmap.PAGESIZE, np.uint8)
  for microbatch in range(4):
    writer.put(_key(1, microbatch), page)
  with pytest.raises(segment_writer.SegmentFullError, match='--log_iterations'):
    writer.put(_key(2), page)
  assert start.index.take(_key(1, 0)) is not None  # nothing was given up
  writer.retain(2)
  assert writer.put(_key(2), page)
  with pytest.raises(errors.StoreError, match='do not fit'):
    writer.put(_key(3), np.zeros(5 * mmap.PAGESIZE, np.uint8))
  with pytest.raises(errors.StoreError, match='dtype'):
    writer.put(_key(3), np.array(['text']))


def test_cells_run_out(start):
  writer = start(cells=4)
  for iteration in range(1, 5):
    writer.put(_key(iteration), np.zeros((), np.uint8))
  with pytest.raises(segment_writer.SegmentFullError):
    writer.put(_key(5), np.zeros((), np.uint8))
  writer.retain(3)
  assert writer.put(_key(5), np.zeros((), np.uint8))
  assert writer.put(_key(6), np.zeros((), np.uint8))
  with pytest.raises(segment_writer.SegmentFullError):
    writer.put(_key(7), np.zeros((), np.uint8))


def test_lease_lasts_as_long_as_a_view(start):
  writer = start(size_bytes=mmap.PAGESIZE)
  page = np.arange(mmap.PAGESIZE, dtype=np.int64).astype(np.uint8)
  writer.put(_key(1), page)
  _, array = start.index.take(_key(1))
  view = array[10:20].reshape(2, 5)
  del array
  writer.retain(2)
  with pytest.raises(segment_writer.SegmentFullError, match='reader'):
    writer.put(_key(2), page + 1)
  assert start.index.take(_key(1)) is None  # no new readers
  np.testing.assert_array_equal(view.ravel(), page[10:20])
  del view
  gc.collect()
  assert writer.put(_key(2), page + 1)


def test_two_leases_of_one_entry_are_independent(start):
  writer = start(size_bytes=mmap.PAGESIZE)
  page = np.zeros(mmap.PAGESIZE, np.uint8)
  writer.put(_key(1), page)
  first, second = start.index.take(_key(1)), start.index.take(_key(1))
  writer.retain(2)
  del first
  gc.collect()
  with pytest.raises(segment_writer.SegmentFullError):
    writer.put(_key(2), page)
  del second
  gc.collect()
  assert writer.put(_key(2), page)


def test_views_outlive_index_and_writer(start):
  writer = start()
  writer.put(_key(1), np.arange(9))
  _, array = start.index.take(_key(1))
  start.index.close()
  writer.close()
  writer.path.unlink()
  np.testing.assert_array_equal(array, np.arange(9))


def test_replacement_adopts_what_is_there(start):
  writer = start()
  writer.put(_key(1), np.arange(9))
  writer.put(_key(2), np.arange(8))
  _, held = start.index.take(_key(2))
  replacement = start(keys.WorkerId(0, 0, 2))
  assert not replacement.put(_key(1), np.arange(9))
  with pytest.raises(errors.EntryMismatchError):
    replacement.put(_key(2), np.arange(7))
  assert replacement.put(_key(3), np.arange(7))
  generations = [header.generation for header in start.index.entries()]
  assert generations == [1, 1, 2]
  np.testing.assert_array_equal(held, np.arange(8))


def test_fencing(start, tmp_path):
  start(keys.WorkerId(0, 0, 5))
  late = segment_writer.SegmentWriter(tmp_path, keys.WorkerId(0, 0, 6), 64)
  with pytest.raises(errors.StoreError, match='living process'):
    late.start()
  with pytest.raises(errors.StoreError, match='living process'):
    late.start(fresh=True)
  with pytest.raises(errors.StoreError, match='generation 5 fences off 4'):
    start(keys.WorkerId(0, 0, 4))


def test_fresh_replaces_the_segment_under_its_readers(start):
  writer = start()
  writer.put(_key(1), np.arange(9))
  assert start.index.take(_key(1)) is not None
  start(keys.WorkerId(0, 0, 2), fresh=True)
  start.index.refresh()
  assert start.index.take(_key(1)) is None


_MISHAPS = {
  'nothing left': lambda path: os.truncate(path, 0),
  'half left': lambda path: os.truncate(path, path.stat().st_size // 2),
  'a page missing': lambda path: os.truncate(
    path, path.stat().st_size - mmap.PAGESIZE
  ),
  'grown': lambda path: os.truncate(path, path.stat().st_size + 1),
  'removed': lambda path: path.unlink(),
  'replaced': lambda path: path.rename(path.with_name('moved')).touch(),
}


@pytest.mark.parametrize('mishap', _MISHAPS)
def test_a_segment_that_is_cut_or_removed_under_its_users(
  start, tmp_path, mishap
):
  """Nobody dies of SIGBUS: it is lost, and the next generation begins anew."""
  writer, path = start(), segment.segment_path(tmp_path, 0, 0)
  writer.put(_key(1), np.arange(9))
  assert start.index.take(_key(1)) is not None
  _MISHAPS[mishap](path)
  if mishap == 'replaced':
    os.unlink(tmp_path / 'moved')
  for use in (writer.check_fence, lambda: writer.put(_key(2), np.arange(9))):
    with pytest.raises(errors.StoreError, match='cut or removed'):
      use()
  # What a file that is only removed has is right.
  is_whole = mishap in ('removed', 'replaced')
  assert (start.index.take(_key(1)) is not None) == is_whole
  assert segment.whole_bytes(path) == 0
  successor = keys.WorkerId(0, 0, 2)
  segment.fence(tmp_path, successor)
  assert not path.exists()
  start.index.refresh()
  assert start.index.take(_key(1)) is None
  start(successor).put(_key(1), np.arange(9))
  assert segment.whole_bytes(path) == path.stat().st_size
  assert start.index.take(_key(1)) is not None


def test_settings_that_grew(start):
  start()
  with pytest.raises(errors.StoreError, match='--fresh'):
    start(keys.WorkerId(0, 0, 2), size_bytes=5 * mmap.PAGESIZE)
  start(keys.WorkerId(0, 0, 2), size_bytes=5 * mmap.PAGESIZE, fresh=True)


@pytest.mark.parametrize(
  'size_bytes', [0, 10, mmap.PAGESIZE, 3 * mmap.PAGESIZE]
)
def test_file_that_is_no_segment(start, tmp_path, size_bytes):
  path = segment.segment_path(tmp_path, 0, 0)
  path.write_bytes(b'\xff' * size_bytes)
  with pytest.raises(errors.StoreError, match='segment'):
    start()
  with pytest.raises(errors.StoreError, match='segment'):
    start.index.take(_key(1))


def test_reader_that_sleeps_for_whole_rounds(start):
  writer = start(cells=4)
  index = start.index
  writer.put(_key(1), np.zeros(1))
  assert index.take(_key(1)) is not None
  for iteration in range(2, 30):
    writer.retain(iteration - 2)
    writer.put(_key(iteration), np.full(1, iteration))
  assert index.take(_key(29))[1][0] == 29
  assert index.take(_key(27))[1][0] == 27
  assert index.take(_key(1)) is None


@hypothesis.settings(
  max_examples=40,
  deadline=None,
  suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture],
)
@hypothesis.given(
  st.lists(
    st.tuples(st.integers(0, 9000), st.integers(0, 3), st.booleans()),
    max_size=40,
  )
)
def test_ring_never_loses_what_is_retained(start, actions):
  """Against a dict: entry sizes, how far the line advances, a restart."""
  writer = start(fresh=True)
  start.index.refresh()
  first, expected, generation = 0, {}, 1
  for iteration, (nbytes, advance, restart) in enumerate(actions, 1):
    if restart:
      generation += 1
      writer = start(keys.WorkerId(0, 0, generation))
    first += advance
    writer.retain(first)
    array = np.random.default_rng(iteration).integers(0, 256, nbytes, np.uint8)
    try:
      writer.put(_key(iteration), array)
      expected[iteration] = array
    except segment_writer.SegmentFullError:
      pass
    for kept, array in expected.items():
      if kept >= first:
        header, found = start.index.take(_key(kept))
        assert found.tobytes() == array.tobytes()
        entry.verify(header, found)
        del found
