"""What every snapshot store does: one suite, run for each of them."""

import multiprocessing
import shutil

import numpy as np
import pytest
from jax import numpy as jnp

from moetion_jax import errors
from moetion_jax.runtime.records import own_files
from moetion_jax.snapshots import manifest

DATA_BYTES = 1 << 13
FILES = 4


def _arrays(iteration, slot=0):
  random = np.random.default_rng([iteration, slot])
  return {
    f'state {slot}': random.normal(size=(30, 40)).astype(np.float32),
    'compute': random.normal(size=(50,)).astype(jnp.bfloat16),
    'none': np.zeros((0, 3), np.int32),
  }


def _metadata(iteration, slot=0):
  return {'iteration': iteration, 'slot': slot, 'clip': float('nan')}


def _buffers(arrays):
  return [
    manifest.Buffer(name, array.dtype, array.shape, [array[:1], array[1:]])
    for name, array in arrays.items()
  ]


_BYTES = sum(array.nbytes for array in _arrays(0).values())


def _save(store, iteration, slot=0, of=None, **options):
  arrays = _arrays(iteration if of is None else of, slot)
  return store.save(
    iteration, _metadata(iteration, slot), _buffers(arrays), **options
  )


def _check(store, iteration, slot=0, of=None):
  expected = _arrays(iteration if of is None else of, slot)
  assert store.manifest(iteration).buffers.keys() == expected.keys()
  with store.open(iteration, verify=True) as stored:
    assert repr(stored.metadata) == repr(_metadata(iteration, slot))
    assert stored.arrays.keys() == expected.keys()
    for name, array in expected.items():
      found = stored.arrays[name]
      assert (found.dtype, found.shape) == (array.dtype, array.shape)
      assert found.tobytes() == array.tobytes()
      assert not found.flags.writeable


def _check_all(stored, versions):
  assert stored.iterations() == list(versions)
  for iteration, of in versions.items():
    _check(stored, iteration, of=of)


class StoreConformance:
  """The suite.

  A fixture `make` makes stores of one folder, not started, with room for
  `FILES` snapshots of `DATA_BYTES`. A fixture `stored` is what
  `registry.stored` returns for that folder where the store is in use. A fixture
  `damage` flips a bit in the first array of a snapshot that a store has.
  """

  def test_what_goes_in_comes_out(self, make):
    store = make()
    store.start()
    assert store.iterations() == []
    for iteration in (9, 10, 2):
      assert _save(store, iteration) == _BYTES
    assert store.iterations() == [2, 9, 10]
    for iteration in store.iterations():
      _check(store, iteration)
    store.close()
    store.close()

  def test_a_successor_takes_over(self, make):
    first = make()
    first.start()
    _save(first, 1)
    _save(first, 2)
    first.close()
    second = make()
    assert second.iterations() == [1, 2]  # before `start` too
    _check(second, 2)
    second.start()
    assert second.iterations() == [1, 2]
    assert _save(second, 2) == 0
    assert _save(second, 3) == _BYTES
    for store in (first, second):
      for iteration in (1, 2, 3):
        _check(store, iteration)
    second.close()

  def test_another_process_reads_while_it_saves(self, make, stored):
    assert stored.iterations() == [] and stored.paths() == {}
    stored.forget(1)  # there is none
    store = make()
    store.start()
    _save(store, 2)
    _save(store, 1)
    assert stored.iterations() == list(stored.paths()) == [1, 2]
    assert all(p.parent == store.folder for p in stored.paths().values())
    stored.check_is_ours()
    _check(stored, 2)
    _save(store, 2, of=3, replace=True)
    other = multiprocessing.get_context('spawn').Process(
      target=_check_all, args=(stored, {1: 1, 2: 3})
    )
    other.start()
    other.join(60)
    assert other.exitcode == 0
    store.close()

  def test_what_is_forgotten_or_removed_no_longer_counts(self, make, stored):
    store = make()
    store.start()
    for iteration in (1, 2, 3):
      _save(store, iteration)
    store.close()
    stored.forget(3)
    path = stored.paths()[1]
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    for found in (stored, make()):
      assert found.iterations() == list(found.paths()) == [2]
      for gone in (1, 3):
        with pytest.raises(manifest.SnapshotCorruptError, match=f'/{gone}'):
          found.open(gone)
    store = make()
    store.start()
    assert store.iterations() == [2]
    for iteration in (1, 3):  # it is taken again, with whatever bits
      assert _save(store, iteration, of=7) == _BYTES
      _check(stored, iteration, of=7)
    store.close()

  def test_what_is_falsified_shows_by_its_content_alone(self, make, stored):
    store = make()
    store.start()
    for iteration in (3, 4):
      _save(store, iteration)

    def change(arrays):
      arrays['compute'][3] = 7
      return ['compute']

    stored.falsify(4, change)
    _check(stored, 3)
    with stored.open(4, verify=True) as found:
      expected = _arrays(4)
      assert found.arrays['compute'][3] == 7
      expected['compute'][3] = 7
      for name, array in expected.items():
        assert found.arrays[name].tobytes() == array.tobytes()

  def test_what_is_torn(self, make, stored):
    store = make()
    store.start()
    for iteration in (3, 4):
      _save(store, iteration)
    stored.tear(4)
    with pytest.raises(manifest.SnapshotCorruptError):
      stored.manifest(4)
    _check(stored, 3)

  def test_all_that_lies_there_has_a_name_of_its_own(self, make, stored):
    store = make()
    store.start()
    _save(store, 3)
    store.close()
    found = own_files.find(store.folder, stored.own_names())
    assert found.own and not [x for x in found.others if 'free' not in x]

  def test_what_is_not_there(self, make):
    store = make()
    for read in (store.open, store.manifest):
      with pytest.raises(manifest.SnapshotCorruptError, match='/7'):
        read(7)

  def test_equal_again_changes_nothing(self, make):
    store = make()
    store.start()
    _save(store, 1)
    for replace in (False, True):
      assert _save(store, 1, replace=replace) == 0
    _check(store, 1)
    store.close()

  def test_other_bits_are_an_error_unless_they_replace(self, make):
    store = make()
    store.start()
    _save(store, 1)
    with pytest.raises(errors.EntryMismatchError, match='1, buffer state 0'):
      _save(store, 1, of=2)
    with pytest.raises(errors.EntryMismatchError, match='1, metadata clip'):
      metadata = {**_metadata(1), 'clip': 1.0}
      store.save(1, metadata, _buffers(_arrays(1)))
    _check(store, 1)
    assert _save(store, 1, of=2, replace=True) == _BYTES
    _check(store, 1, of=2)
    store.close()

  def test_other_buffers_are_not_taken_unless_they_replace(self, make):
    store = make()
    store.start()
    _save(store, 1)
    assert _save(store, 1, slot=1) == 0
    _check(store, 1)
    assert _save(store, 1, slot=1, replace=True) == _BYTES
    _check(store, 1, slot=1)
    store.close()

  @pytest.mark.parametrize('is_restarted', [False, True])
  def test_a_damaged_one_is_found_and_replaced(
    self, make, damage, is_restarted
  ):
    store = make()
    store.start()
    _save(store, 1)
    damage(store, 1)
    with pytest.raises(manifest.SnapshotCorruptError, match='state 0'):
      store.open(1, verify=True)
    if is_restarted:
      store.close()
      store = make()
      store.start()
    assert _save(store, 1) == _BYTES
    _check(store, 1)
    store.close()

  def test_only_what_is_retained_is_kept_for_long(self, make):
    store = make()
    store.start()
    for iteration in range(1, 4 * FILES):
      store.retain(iteration - 1)
      store.retain(iteration - 3)  # it never falls
      assert _save(store, iteration) == _BYTES
      found = store.iterations()
      assert len(found) <= FILES and found[-1] == iteration
      if iteration > 1:
        assert iteration - 1 in found
    for iteration in store.iterations():
      _check(store, iteration)
    store.close()

  def test_a_reader_keeps_what_it_reads(self, make):
    store = make()
    store.start()
    _save(store, 1)
    stored = store.open(1)
    array = stored.arrays['state 0']
    stored.close()
    for iteration in range(2, 3 * FILES):
      store.retain(iteration - 1)
      _save(store, iteration)
    assert array.tobytes() == _arrays(1)['state 0'].tobytes()
    store.close()

  @pytest.mark.parametrize('is_started', [False, True])
  def test_it_can_be_enlarged(self, make, is_started):
    store = make()
    if is_started:
      store.start()
    store.enlarge(2 * DATA_BYTES)
    if not is_started:
      store.start()
    x = np.arange(2 * DATA_BYTES, dtype=np.uint8)
    assert store.save(1, {}, _buffers({'x': x})) == x.nbytes
    with store.open(1, verify=True) as stored:
      assert stored.arrays['x'].tobytes() == x.tobytes()
    store.close()

  def test_what_cannot_be_stored(self, make):
    store = make()
    store.start()
    twice = 2 * _buffers({'x': np.zeros(3)})
    with pytest.raises(errors.StoreError, match='two buffers'):
      store.save(1, {}, twice)
    assert store.iterations() == []
    assert _save(store, 1) == _BYTES
    store.close()
