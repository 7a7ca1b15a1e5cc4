"""Snapshots in two phases: what counts is on disk."""

import contextlib
import os
import resource
import shutil
import signal
import sys
import threading

import numpy as np
import pytest

from moetion_jax import disk as disk_lib, errors as errors_lib
from moetion_jax.hostmem import private
from moetion_jax.snapshots import (
  durable_store,
  file as snapshot_file,
  manifest,
  memory_store,
)

_BYTES = 1 << 16


def _buffers(value):
  array = np.full(_BYTES, value, np.uint8)
  return [manifest.Buffer('a', array.dtype, array.shape, [array])]


@pytest.fixture
def stores(tmp_path):
  """(memory folder, disk folder, makes a store of both)."""
  memory, disk = tmp_path / 'memory', tmp_path / 'disk' / 'worker'

  def make():
    return durable_store.DurableStore(
      memory_store.SnapshotStore(memory, _BYTES, 2), disk
    )

  return memory, disk, make


def _read(folder, iteration):
  path = snapshot_file.list_snapshots(folder)[iteration]
  with snapshot_file.open_snapshot(path, verify=True) as stored:
    return stored.metadata, stored.arrays['a'].copy()


def test_both_phases_and_what_is_let_go(stores):
  memory, disk, make = stores
  store = make()
  store.start()
  assert store.iterations() == []
  for iteration in range(1, 6):
    saved = store.save(iteration, {'number': iteration}, _buffers(iteration))
    assert saved == _BYTES
    metadata, array = _read(disk, iteration)
    assert metadata == {'number': iteration} and set(array) == {iteration}
    store.retain(iteration - 1)
  assert store.iterations() == [3, 4, 5]  # of 3 it was told after the save
  assert len(snapshot_file.list_snapshots(memory)) == 2
  store.close()
  # The next one reads the disk, whatever is in memory.
  again = make()
  again.start()
  assert again.iterations() == [3, 4, 5]
  again.save(6, {}, _buffers(6))
  again.save(7, {}, _buffers(7))
  assert again.iterations() == [3, 4, 5, 6, 7]
  again.close()


def test_what_is_on_disk_when_a_save_returns(stores, tmp_path, monkeypatch):
  """All of it, before its name is; and every folder that was made for it."""
  _, disk, make = stores
  synced = []
  sync = os.fsync

  def record(fd):
    synced.append(os.path.relpath(os.readlink(f'/proc/self/fd/{fd}'), tmp_path))
    sync(fd)

  monkeypatch.setattr(os, 'fsync', record)
  store = make()
  store.start()
  assert set(synced) == {'.', 'disk'}  # which have 'disk' and 'worker'
  synced.clear()
  store.save(1, {}, _buffers(1))
  store.close()
  files = [f'1.tmp/{path.name}' for path in (disk / '1').iterdir()]
  assert len(files) == 2
  *found, folder, last = synced
  assert sorted(found) == sorted(f'disk/worker/{name}' for name in files)
  assert (folder, last) == ('disk/worker/1.tmp', 'disk/worker')
  synced.clear()
  store = make()
  store.start()
  store.close()
  assert not synced


def test_one_that_was_not_finished_is_none(stores):
  _, disk, make = stores
  store = make()
  store.start()
  store.save(1, {}, _buffers(1))
  store.interrupt()
  with pytest.raises(durable_store.InterruptedStoreError):
    store.save(2, {}, _buffers(2))
  store.close()
  assert store.iterations() == [1]
  assert (disk / '2.tmp').is_dir()
  again = make()
  again.start()
  assert os.listdir(disk) == ['1']
  # A damaged one is written again, from other bits.
  again.save(1, {}, _buffers(1), replace=True)
  assert set(_read(disk, 1)[1]) == {1}
  again.close()


@pytest.mark.parametrize('exchanges', [True, False])
def test_an_end_at_any_moment_of_a_replacement_leaves_one(
  stores, monkeypatch, exchanges
):
  """Also on a file system that cannot exchange names, such as NFS."""
  _, disk, make = stores
  if not exchanges:
    monkeypatch.setattr(disk_lib, 'exchange', lambda first, second: False)
  store = make()
  store.start()
  store.save(1, {}, _buffers(1))
  seen = []

  def look(event, unused):
    if seen is not None and event in ('os.rename', 'os.remove', 'os.rmdir'):
      seen.append(1 in snapshot_file.list_snapshots(disk))

  sys.addaudithook(look)
  try:
    store.save(1, {}, _buffers(2), replace=True)
    found = list(seen)
  finally:
    seen = None  # a hook stays for ever
    store.close()
  assert len(found) > 3 and all(found)
  assert set(_read(disk, 1)[1]) == {2}
  assert os.listdir(disk) == ['1']


def test_one_that_was_to_be_replaced_takes_its_place_again(stores):
  _, disk, make = stores
  with contextlib.closing(make()) as store:
    store.start()
    store.save(1, {}, _buffers(1))
    store.save(2, {}, _buffers(2))
  replaced = disk / f'1{snapshot_file.REPLACED_SUFFIX}'
  (disk / '1').rename(replaced)
  shutil.copytree(disk / '2', disk / f'2{snapshot_file.REPLACED_SUFFIX}')
  with contextlib.closing(make()) as store:
    store.start()
    assert store.iterations() == [1, 2]
    assert sorted(os.listdir(disk)) == ['1', '2']
    assert set(_read(disk, 1)[1]) == {1}


def test_one_that_was_replaced_is_forgotten_with_its_successor(stores):
  _, disk, make = stores
  with contextlib.closing(make()) as store:
    store.start()
    store.save(1, {}, _buffers(1))
  shutil.copytree(disk / '1', disk / f'1{snapshot_file.REPLACED_SUFFIX}')
  store.forget(1)
  assert store.iterations() == []
  with contextlib.closing(make()) as store:
    store.start()
    store.save(1, {}, _buffers(2))
    assert set(_read(disk, 1)[1]) == {2}


def test_a_disk_that_cannot_be_written_is_named(stores, tmp_path):
  _, disk, make = stores
  disk.parent.write_bytes(b'')
  with pytest.raises(errors_lib.StoreError, match=str(disk)):
    make().start()


@pytest.mark.parametrize('is_removed', [False, True])
def test_a_copy_in_memory_that_is_cut_or_removed_meanwhile(
  stores, monkeypatch, is_removed
):
  """It is named, and not the disk; nobody copies nothing for ever."""
  memory, _, make = stores
  store = make()
  store.start()
  source, make_folder = memory / '1' / 'data', private.make_folder

  def lose(path, **options):
    if path.name == '1.tmp':  # as it is about to be copied
      source.unlink() if is_removed else os.truncate(source, _BYTES // 2)
    make_folder(path, **options)

  monkeypatch.setattr(private, 'make_folder', lose)
  with pytest.raises(errors_lib.StoreError, match=str(source)) as caught:
    store.save(1, {}, _buffers(1))
  assert 'durable_dir' not in str(caught.value)
  monkeypatch.undo()
  assert store.iterations() == []
  store.save(1, {}, _buffers(1), replace=True)
  assert store.iterations() == [1]
  store.close()


def test_a_disk_that_is_full(stores):
  """A limit of the size of files is met like one; then there is room."""
  _, disk, make = stores
  store = make()
  store.start()
  store.save(1, {}, _buffers(1))
  before = resource.getrlimit(resource.RLIMIT_FSIZE)
  old = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
  try:
    # Memory was reserved before; only the disk is written to.
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 10, before[1]))
    with pytest.raises(
      errors_lib.StoreError, match='make room, or name another --durable_dir'
    ):
      store.save(2, {}, _buffers(2))
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, old)
  assert store.iterations() == [1]
  store.save(2, {}, _buffers(2))
  assert store.iterations() == [1, 2] and set(_read(disk, 2)[1]) == {2}
  store.close()


def test_interrupt_from_another_thread_ends_a_save(stores, monkeypatch):
  """Between two pieces, so that nobody waits for a slow disk."""
  _, disk, make = stores
  store = make()
  store.start()
  sendfile, begun = os.sendfile, threading.Event()

  def slow(target, source, offset, count):
    begun.set()
    assert interrupted.wait(30)
    return sendfile(target, source, offset, min(count, 1024))

  interrupted = threading.Event()
  monkeypatch.setattr(os, 'sendfile', slow)
  errors = []

  def save():
    try:
      store.save(1, {}, _buffers(1))
    except errors_lib.StoreError as error:
      errors.append(error)

  thread = threading.Thread(target=save)
  thread.start()
  assert begun.wait(30)
  store.interrupt()
  interrupted.set()
  thread.join(30)
  store.close()
  assert isinstance(errors[0], durable_store.InterruptedStoreError)
  assert not snapshot_file.list_snapshots(disk)
