"""Damage to snapshots and logs, and how it shows."""

import numpy as np
import pytest

from moetion_jax import errors, keys
from moetion_jax.hostmem import (
  entry,
  segment,
  segment_check,
  segment_reader,
  segment_writer,
)
from moetion_jax.runtime import faults
from moetion_jax.runtime.worker import fault_damage
from moetion_jax.snapshots import file as snapshot_file, manifest


def _snapshot(folder, iteration):
  path = folder / str(iteration)
  path.mkdir()
  buffers = [
    manifest.Buffer(n, np.dtype('f4'), (8,), [np.arange(8, dtype='f4')])
    for n in ('compute|a', 'state|b')
  ]
  snapshot_file.write(path, buffers, {'iteration': iteration})
  return path


def test_a_bit_of_a_snapshot_that_only_its_content_shows(tmp_path):
  assert fault_damage.flip_bit_in_snapshot(tmp_path, 'state') == 0
  paths = [_snapshot(tmp_path, i) for i in (3, 12)]
  assert fault_damage.flip_bit_in_snapshot(tmp_path, 'state') == 12
  arrays = []
  for path in paths:
    with snapshot_file.open_snapshot(path, verify=True) as stored:
      arrays.append({n: np.array(a) for n, a in stored.arrays.items()})
  np.testing.assert_array_equal(arrays[0]['compute|a'], arrays[1]['compute|a'])
  bits = [np.unpackbits(a['state|b'].view(np.uint8)) for a in arrays]
  assert np.sum(bits[0] != bits[1]) == 1


def test_arrays_that_hold_nothing_are_passed_over(tmp_path):
  for iteration in (3, 4):
    (tmp_path / str(iteration)).mkdir()
    arrays = {
      'compute|none': np.zeros((0, 3), np.int32),
      'compute|a': np.zeros(8, np.float32),
      'compute|b': np.zeros((), np.float32),
      'state|c': np.zeros(8, np.float32),
    }
    buffers = [
      manifest.Buffer(n, a.dtype, a.shape, [a]) for n, a in arrays.items()
    ]
    snapshot_file.write(tmp_path / str(iteration), buffers, {})
  flip = fault_damage.flip_bit_in_snapshot
  assert flip(tmp_path, 'compute', newer=1, every=True) == 3
  for iteration, hits in ((3, {'compute|a', 'compute|b'}), (4, set())):
    path = tmp_path / str(iteration)
    with snapshot_file.open_snapshot(path, verify=True) as stored:
      assert {n for n, a in stored.arrays.items() if a.any()} == hits


@pytest.mark.parametrize(
  'kind', [faults.FaultKind.CORRUPT_READ, faults.FaultKind.POISON_READ]
)
def test_an_entry_is_damaged_after_it_was_read(tmp_path, kind):
  writer = segment_writer.SegmentWriter(
    tmp_path, keys.WorkerId(0, 0, 1), 4096, 8
  )
  writer.start()
  value = np.arange(16, dtype=np.float32)
  for iteration in (4, 5):
    writer.put(_key(iteration), value)
  index = segment_reader.StoreIndex(tmp_path)
  damage = fault_damage.ReadDamage(tmp_path)
  taken = _take(index, 4)
  damage.after_read(_key(4))
  entry.verify(*taken)
  fault = faults.Fault(number=0, kind=kind, stage=1, iteration=4)
  damage.arm(fault, 4)
  damage.after_read(_key(4, keys.EntryKind.SCALARS))
  entry.verify(*taken)
  damage.after_read(_key(4))
  with pytest.raises(entry.EntryCorruptError):
    entry.verify(*taken)
  assert np.isnan(taken[1]).any() == (kind == 'poison_read')
  damage.after_read(_key(5))  # it happens once
  entry.verify(*_take(index, 5))


def test_a_torn_snapshot(tmp_path):
  assert fault_damage.tear_snapshot(tmp_path) == 0
  path = _snapshot(tmp_path, 4)
  assert fault_damage.tear_snapshot(tmp_path) == 4
  with pytest.raises(manifest.SnapshotCorruptError, match='truncated'):
    snapshot_file.read_manifest(path)


def _key(iteration, kind=keys.EntryKind.ACTIVATION, stage=0):
  return keys.EntryKey(iteration, stage, 0, kind, 0)


def _take(index, iteration):
  taken = index.take(_key(iteration))
  assert taken is not None
  return taken


def test_a_damaged_entry_is_dropped_and_written_again(tmp_path):
  writer = segment_writer.SegmentWriter(
    tmp_path, keys.WorkerId(0, 0, 1), 4096, 8
  )
  writer.start()
  values = {i: np.full(16, i, np.float32) for i in (4, 5, 6)}
  for i, value in values.items():
    writer.put(_key(i, keys.EntryKind.SCALARS), value)
    writer.put(_key(i), value)
  path = segment.segment_path(tmp_path, 0, 0)
  assert segment.newest_iteration(path) == 6
  assert fault_damage.flip_bit_in_log(path, 7) is None
  assert fault_damage.flip_bit_in_log(path, 5) == _key(5)
  index = segment_reader.StoreIndex(tmp_path)
  with pytest.raises(entry.EntryCorruptError) as caught:
    entry.verify(*_take(index, 5))
  assert caught.value.key == _key(5)
  with pytest.raises(errors.StoreError, match='its writer lives'):
    segment_check.drop_damaged(path, 1)
  writer.close()
  assert segment_check.drop_damaged(path, 6) == []
  assert segment_check.drop_damaged(path, 5) == [_key(5)]
  assert segment_check.drop_damaged(path, 5) == []
  assert index.take(_key(5)) is None
  writer = segment_writer.SegmentWriter(
    tmp_path, keys.WorkerId(0, 0, 2), 4096, 8
  )
  writer.start()
  assert not writer.put(_key(6), values[6])
  assert writer.put(_key(5), values[5])
  header, found = _take(index, 5)
  entry.verify(header, found)
  np.testing.assert_array_equal(found, values[5])
  writer.close()
  index.close()


def test_an_entry_that_was_being_retired_keeps_its_memory(tmp_path):
  """Its reader outlives the writer that wanted to reuse it."""
  writer = segment_writer.SegmentWriter(
    tmp_path, keys.WorkerId(0, 0, 1), 4096, 8
  )
  writer.start()
  value = np.zeros(1024, np.float32)
  writer.put(_key(1), value)
  index = segment_reader.StoreIndex(tmp_path)
  _, held = _take(index, 1)
  writer.retain(2)
  with pytest.raises(segment_writer.SegmentFullError, match='a reader holds'):
    writer.put(_key(2), value + 2)
  writer.close()
  writer = segment_writer.SegmentWriter(
    tmp_path, keys.WorkerId(0, 0, 2), 4096, 8
  )
  writer.start()
  writer.retain(2)
  with pytest.raises(segment_writer.SegmentFullError, match='a reader holds'):
    writer.put(_key(2), value + 2)
  np.testing.assert_array_equal(held, value)
  del held, _
  assert writer.put(_key(2), value + 2)
  writer.close()
  index.close()
