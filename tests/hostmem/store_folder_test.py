"""The store folder: owner, lock, leftovers, removal."""

import os
import resource
import shutil
import socket
import subprocess
import sys
import uuid

import pytest

from moetion_jax import errors
from moetion_jax.hostmem import memory_limits, store_folder
from tests.support import helpers


@pytest.fixture
def store():
  folder = store_folder.StoreFolder('/dev/shm', f'test-{uuid.uuid4().hex}')
  folder.start()
  yield folder
  folder.remove()


def test_folder_is_private_and_leaves_nothing(store):
  assert store.path.stat().st_mode & 0o777 == 0o700
  store_folder.check_private(store.path)
  (store.path / 'x').write_bytes(b'1')
  store.remove()
  assert not store.path.exists()
  assert store.lock_fds == ()
  store.remove()  # twice is fine


def test_living_run_keeps_others_out(store):
  other = store_folder.StoreFolder(
    '/dev/shm', store.path.name[len('moetion-') :]
  )
  with pytest.raises(errors.StoreError, match=f'pid {os.getpid()}'):
    other.start()
  for _ in range(2):
    with pytest.raises(errors.StoreError, match='in use'):
      store_folder.remove_store(store.path)
    found = store_folder.find_leftovers('/dev/shm')
    assert store.path not in [leftover.path for leftover in found]
    assert store.path.exists()
    (store.path / 'lock').unlink(missing_ok=True)  # somebody tidies up
  assert sorted(path.name for path in store.path.iterdir()) == ['owner']


def test_leftover_is_found_resumed_and_removed(store):
  os.close(store_folder.reserve(store.path / 'data', 1 << 20))
  store.close()
  (leftover,) = [
    leftover
    for leftover in store_folder.find_leftovers('/dev/shm')
    if leftover.path == store.path
  ]
  assert leftover.pid == os.getpid()
  assert leftover.size_bytes >= 1 << 20
  assert 'moetion-' + leftover.run_id == store.path.name
  store.start()  # resume: what is in it stays
  assert (store.path / 'data').stat().st_size == 1 << 20
  store.close()
  store_folder.remove_store(store.path)
  assert not store.path.exists()
  store_folder.remove_store(store.path)


def test_lock_lives_as_long_as_a_worker_that_inherited_it(store):
  worker = subprocess.Popen(
    [sys.executable, '-c', 'input()'],
    stdin=subprocess.PIPE,
    pass_fds=store.lock_fds,
  )
  store.close()  # the agent is gone, its worker is not
  other = store_folder.StoreFolder(
    '/dev/shm', store.path.name[len('moetion-') :]
  )
  with pytest.raises(errors.StoreError, match='in use'):
    other.start()
  worker.kill()
  worker.communicate(timeout=20)
  other.start()
  other.close()


@pytest.mark.parametrize('run_id', ['', '../x', 'a/b', '-x', 'x' * 65, 'a\n'])
def test_bad_run_id(run_id):
  with pytest.raises(errors.StoreError, match='run id'):
    store_folder.StoreFolder('/dev/shm', run_id)


def test_a_full_directory(tight, tmp_path):
  """It says what to do, and leaves nothing."""
  helpers.fill(tight)
  (tmp_path / 'another').mkdir()
  words = 'make room there, or name another directory in tmpfs'
  with pytest.raises(errors.StoreError, match=words):
    store_folder.StoreFolder(tight, 'x').start()
  assert os.listdir(tight) == ['fill']
  for folder in (tmp_path / 'another', tight):
    (tight / 'fill').unlink(missing_ok=True)
    one = store_folder.StoreFolder(folder, 'x')
    one.start()
    one.close()


def test_missing_directory_names_the_flag():
  with pytest.raises(errors.StoreError, match='--hostmem_dir'):
    store_folder.StoreFolder('/dev/shm/no/such', 'x').start()


def test_folder_that_is_not_private(tmp_path):
  (tmp_path / 'moetion-open').mkdir(mode=0o755)
  (tmp_path / 'moetion-open').chmod(0o755)
  with pytest.raises(errors.StoreError, match='0700'):
    store_folder.StoreFolder(tmp_path, 'open').start()
  (tmp_path / 'target').mkdir(mode=0o700)
  (tmp_path / 'moetion-link').symlink_to(tmp_path / 'target')
  with pytest.raises(errors.StoreError, match='not a directory'):
    store_folder.StoreFolder(tmp_path, 'link').start()
  with pytest.raises(errors.StoreError, match='not a store folder'):
    store_folder.remove_store(tmp_path / 'target')


def test_a_folder_that_only_looks_like_a_store(tmp_path):
  """It is not listed, and no lock file is made in it."""
  folder = tmp_path / 'moetion-thesis'
  folder.mkdir(mode=0o700)
  (folder / 'data').write_text('mine')
  assert store_folder.find_leftovers(tmp_path) == []
  assert [path.name for path in folder.iterdir()] == ['data']


def test_the_owner_is_who_started_last(store):
  store.close()
  name = store.path.name.removeprefix('moetion-')
  for workdir in ('/a/run', '/b/moved'):
    other = store_folder.StoreFolder('/dev/shm', name, workdir)
    other.start()
    assert store_folder.read_owner(store.path)['workdir'] == workdir
    other.close()
  found = store_folder.find_leftovers('/dev/shm')
  assert [x.workdir for x in found if x.path == store.path] == ['/b/moved']


def test_who_put_nothing_into_a_store_does_not_own_it(tmp_path):
  first = store_folder.StoreFolder(tmp_path, 'x', tmp_path)
  first.start()
  first.disown()  # there was nobody before
  before = store_folder.read_owner(first.path)
  status = tmp_path.stat()
  assert before['folder'] == [status.st_dev, status.st_ino]
  first.close()
  second = store_folder.StoreFolder(tmp_path, 'x', tmp_path / 'gone')
  second.start()
  assert store_folder.read_owner(second.path) != before
  second.disown()
  second.close()
  assert store_folder.read_owner(first.path) == before
  assert sorted(os.listdir(first.path)) == ['lock', 'owner']


@pytest.mark.parametrize('is_new', [True, False])
def test_no_room_for_the_owner_file(tmp_path, is_new):
  """Nothing stays that was not there, and no descriptor."""
  store = store_folder.StoreFolder(tmp_path, 'x')
  if not is_new:
    store.start()
    store.close()
  before = sorted(tmp_path.rglob('*')), os.listdir('/proc/self/fd')
  limits = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (0, limits[1]))
  try:
    with pytest.raises(errors.StoreError, match='--hostmem_dir') as caught:
      store.start()
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
  assert str(store.path) in str(caught.value) and store.lock_fds == ()
  assert (sorted(tmp_path.rglob('*')), os.listdir('/proc/self/fd')) == before
  store.start()
  store.remove()


def test_an_emptied_store_keeps_its_lock_and_sockets(store):
  (store.path / 'stage-0.replica-0.segment').write_bytes(b'x')
  (store.path / 'stage-0.replica-0.snapshots' / '3').mkdir(parents=True)
  (store.path / 'state-stage-0').mkdir()
  with socket.socket(socket.AF_UNIX) as bell:
    bell.bind(str(store.path / 'bell'))
    store_folder.empty_store(store.path)
  assert sorted(os.listdir(store.path)) == ['bell', 'lock', 'owner']


@pytest.mark.parametrize('content', ['{"pid": ', '[' * 100_000])
def test_damaged_owner_file(store, content):
  (store.path / 'owner').write_text(content)
  store.close()
  (leftover,) = [
    leftover
    for leftover in store_folder.find_leftovers('/dev/shm')
    if leftover.path == store.path
  ]
  assert leftover.pid == 0


def test_reserve_beyond_tmpfs_leaves_no_file(store):
  size_bytes = memory_limits.read_room(store.path).tmpfs_bytes + (1 << 30)
  with pytest.raises(errors.StoreError, match='--shm-size'):
    store_folder.reserve(store.path / 'data', size_bytes)
  assert not (store.path / 'data').exists()


def test_a_folder_that_was_removed_is_made_anew(store):
  """Its descriptors stay: processes that start later inherit its locks."""
  before = store.lock_fds
  assert not store.is_gone
  shutil.rmtree(store.path)
  assert store.is_gone
  store.make_anew()
  assert not store.is_gone and store.lock_fds == before
  assert not any(map(os.get_inheritable, before))
  assert store_folder.read_owner(store.path)['run_id'] == store.run_id
  other = store_folder.StoreFolder(store.path.parent, store.run_id)
  with pytest.raises(errors.StoreError, match='in use by a living run'):
    other.start()
  store.close()
  other.start()
  assert not store.is_gone  # nobody says so of one that is closed
  other.close()


def test_a_folder_that_somebody_else_has_made_meanwhile(store):
  """It is used if nobody lives there; else all is as before."""
  shutil.rmtree(store.path)
  other = store_folder.StoreFolder(store.path.parent, store.run_id)
  other.start()
  assert store.is_gone
  before = store.lock_fds
  with pytest.raises(errors.StoreError, match='in use by a living run'):
    store.make_anew()
  assert store.lock_fds == before and store.is_gone
  other.close()
  store.make_anew()
  assert not store.is_gone
