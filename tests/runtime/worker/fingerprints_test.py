"""What is read is read once, and again if it may have changed."""

import os
import time
from concurrent import futures

import numpy as np
import pytest

from launch.lm import data as data_lib
from moetion_jax import errors
from moetion_jax.hostmem import store_folder
from moetion_jax.runtime.worker import fingerprints


class Counting:
  """Data that counts how often it is read for a fingerprint."""

  def __init__(self, data):
    self.mapped_files = data.mapped_files
    self.count = 0
    self._data = data

  def fingerprint(self):
    self.count += 1
    return self._data.fingerprint()


def load(path):
  return data_lib.load(
    data_lib.DataConfig(
      data=str(path),
      sequence_length=7,
      microbatch_size=2,
      microbatches=1,
      vocab_size=256,
      seed=0,
    )
  )


@pytest.fixture
def store(tmp_path):
  one = store_folder.StoreFolder(tmp_path, 'store')
  one.start()
  yield one
  one.close()


@pytest.fixture
def file(tmp_path):
  """Ids, written a while ago."""
  path = tmp_path / 'ids.bin'
  np.arange(256, dtype=np.uint16).tofile(path)
  # The time of the last change of anything cannot be set: it has to pass.
  time.sleep(fingerprints._TIME_SECONDS + 0.1)
  return path


def _of(path, store):
  """The fingerprint, and whether the file was read for it."""
  one = Counting(load(path))
  return fingerprints.of(one, store.path), bool(one.count)


def test_one_worker_reads_a_mapped_file_for_all(file, store):
  expected = load(file).fingerprint()
  assert _of(file, store) == (expected, True)
  assert _of(file, store) == (expected, False)
  path = store.path / store_folder.FINGERPRINT
  assert path.stat().st_mode & 0o777 == 0o600
  path.write_bytes(path.read_bytes()[:-9])  # torn by a kill
  assert _of(file, store) == (expected, True)
  assert _of(file, store) == (expected, False)
  # Each agent begins with a reading: a disk forgets as well.
  (store.path / 'owner').write_text('{"pid": 1}')
  assert _of(file, store) == (expected, True)


@pytest.mark.parametrize('how', ['in place', 'unseen', 'replaced', 'longer'])
def test_a_file_that_changes_is_read_again(file, store, how):
  before, _ = _of(file, store)
  ids = np.arange(256, dtype=np.uint16)
  ids[100] += 1
  if how == 'longer':
    ids = np.append(ids, ids)
  status = file.stat()
  new = file.with_name('new.bin') if how == 'replaced' else file
  with open(new, 'r+b' if new == file else 'wb') as opened:
    opened.write(ids.tobytes())
  new.rename(file)
  if how == 'unseen':  # as some tools do
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
  for _ in range(2):  # it was written just now: who knows whether it still is
    found, is_read = _of(file, store)
    assert is_read and found != before and found == load(file).fingerprint()


def test_a_file_that_is_mapped_and_gone(file, store):
  expected = _of(file, store)[0]
  one = Counting(load(file))
  file.unlink()
  assert fingerprints.of(one, store.path) == expected and one.count == 1


def test_text_in_memory_is_no_business_of_others(tmp_path, store):
  (tmp_path / 'text').write_bytes(b'abc' * 99)
  for _ in range(2):
    assert _of(tmp_path / 'text', store)[1]
  assert not (store.path / store_folder.FINGERPRINT).exists()


def test_workers_that_start_together(file, store):
  """One of them reads, the others wait for what it finds."""
  ones = [Counting(load(file)) for _ in range(3)]
  with futures.ThreadPoolExecutor(len(ones)) as pool:
    found = list(pool.map(lambda one: fingerprints.of(one, store.path), ones))
  assert sorted(one.count for one in ones) == [0, 0, 1]
  assert found == [load(file).fingerprint()] * 3


def _watched(file, store):
  one = Counting(load(file))
  one.batch, one.held_out_batch = one._data.batch, one._data.held_out_batch
  sources, known = (
    fingerprints.sources_of(one),
    fingerprints.of(one, store.path),
  )
  one.count = 0
  return one, fingerprints.WatchedData(one, 'DATA', store.path, known, sources)


@pytest.mark.parametrize('kind', ['batch', 'held_out_batch'])
def test_no_batch_of_a_file_that_changed_since_is_given(file, store, kind):
  """It is written in place: what was mapped before shows the new content."""
  one, watched = _watched(file, store)
  before = file.read_bytes()
  read = {
    'batch': lambda: watched.batch(1, 0),
    'held_out_batch': lambda: watched.held_out_batch(0),
  }[kind]
  expected = read().inputs
  assert one.count == 0  # nothing is hashed as long as nothing happens
  os.utime(file)
  np.testing.assert_array_equal(read().inputs, expected)
  # Two bytes swapped; then ids that no model has, which is another error's.
  for wrong in (before[2:4] + before[:2] + before[4:], b'\xff' * len(before)):
    with open(file, 'r+b') as opened:
      opened.write(wrong)
    for _ in range(2):  # it is told each time
      with pytest.raises(errors.ConfigError, match='--data=DATA: has changed'):
        read()
  with open(file, 'r+b') as opened:
    opened.write(before)
  np.testing.assert_array_equal(read().inputs, expected)


def test_a_batch_of_a_file_that_was_another_for_a_moment(file, store):
  one, watched = _watched(file, store)
  expected, before, batch = one.batch(1, 0).inputs, file.read_bytes(), one.batch

  def read_amid(iteration, microbatch):
    one.batch = batch
    for content in (bytes(len(before)), before):
      with open(file, 'r+b') as opened:
        opened.write(content)
      if content != before:
        found = batch(iteration, microbatch)
    return found

  one.batch = read_amid
  np.testing.assert_array_equal(watched.batch(1, 0).inputs, expected)
