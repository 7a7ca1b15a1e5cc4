"""Snapshots through Orbax: the handler, the store, kills, damage, accounting.

Kills are real (SIGKILL) and at chosen points: a process kills itself before its
n-th step in the file system, for every n, or is killed at a line it wrote.
"""

import asyncio
import errno
import os
import pathlib
import shutil
import socket
import subprocess
import sys
import uuid

import numpy as np
import orbax.checkpoint as ocp
import pytest
from etils import epath
from jax import numpy as jnp

from moetion_jax import errors as errors_lib
from moetion_jax.snapshots import (
  file as snapshot_file,
  interface,
  manifest,
  memory_store,
  orbax_handler,
)
from tests.support import helpers

pytestmark = pytest.mark.timeout(200)

_REPOSITORY = pathlib.Path(__file__).resolve().parents[2]
_PAGE = os.sysconf('SC_PAGE_SIZE')
_SIZE_BYTES = 4 * _PAGE


@pytest.fixture
def folder(tmp_path):
  shm = pathlib.Path('/dev/shm')
  path = (shm if shm.is_dir() else tmp_path) / f'test-{uuid.uuid4().hex}'
  path.mkdir(mode=0o700)
  yield path
  subprocess.run(['rm', '-rf', path], check=True)


@pytest.fixture
def open_store(folder):
  stores = []

  def open_store(files=3, size_bytes=_SIZE_BYTES):
    for store in stores:
      store.close()
    stores.append(
      memory_store.SnapshotStore(folder / 'worker', size_bytes, files)
    )
    stores[-1].start()
    return stores[-1]

  yield open_store
  for store in stores:
    store.close()


def _arrays(iteration, slot=0):
  random = np.random.default_rng([iteration, slot])
  return {
    f'state {slot}': random.normal(size=(30, 40)).astype(np.float32),
    'compute': random.normal(size=(50,)).astype(jnp.bfloat16),
  }


def _metadata(iteration, slot=0):
  return {'iteration': iteration, 'slot': slot, 'clip': float('nan')}


def _buffers(arrays):
  return [
    manifest.Buffer(name, array.dtype, array.shape, [array])
    for name, array in arrays.items()
  ]


def _save(store, iteration, slot=0, **options):
  return store.save(
    iteration,
    _metadata(iteration, slot),
    _buffers(_arrays(iteration, slot)),
    **options,
  )


_BYTES = 30 * 40 * 4 + 50 * 2


def _check(path, iteration, slots=(0,)):
  """A whole snapshot with the contents of that iteration; returns its slot."""
  with snapshot_file.open_snapshot(path, verify=True) as stored:
    slot = stored.metadata['slot']
    assert slot in slots
    assert stored.metadata['iteration'] == iteration
    expected = _arrays(iteration, slot)
    assert stored.arrays.keys() == expected.keys()
    for name, array in expected.items():
      assert stored.arrays[name].tobytes() == array.tobytes()
  return slot


def _check_all(folder, iterations, slots=(0,)):
  found = snapshot_file.list_snapshots(folder)
  assert list(found) == list(iterations)
  for iteration, path in found.items():
    _check(path, iteration, slots)


def _data_files(folder):
  """Inodes of the data files of a folder, with their bytes."""
  return {
    path.stat().st_ino: path.stat().st_blocks * 512
    for path in folder.rglob('*')
    if path.name == 'data' or path.name.startswith('free-')
  }


def _run(script, *args):
  return subprocess.Popen(
    [sys.executable, '-W', 'ignore', '-c', script, *map(str, args)],
    cwd=_REPOSITORY,
    env=os.environ | {'JAX_PLATFORMS': 'cpu'},
    stdin=subprocess.PIPE,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )


def _finish(process):
  """What it wrote on stdout and stderr; it must succeed."""
  out, errors = process.communicate(timeout=180)
  assert process.returncode == 0, errors[-3000:]
  return out, errors


# --- Through Orbax -----------------------------------------------------------

_RESTORE = """
import sys
import orbax.checkpoint as ocp
from moetion_jax.snapshots import orbax_handler
with ocp.Checkpointer(orbax_handler.SnapshotHandler()) as checkpointer:
  restored = checkpointer.restore(sys.argv[1])
assert restored['arrays']['w'].flags.writeable
print(restored['metadata'], restored['arrays']['w'].dtype)
print(restored['arrays']['w'].tobytes().hex())
"""


def test_plain_orbax_reads_what_the_store_saved(folder, open_store):
  array = jnp.arange(12, dtype=jnp.bfloat16).reshape(3, 4)
  buffer = manifest.Buffer('w', array.dtype, (2, 4), [array[2], array[0]])
  assert open_store().save(7, {'iteration': 7}, [buffer]) == 16
  out, _ = _finish(_run(_RESTORE, folder / 'worker/7'))
  expected = np.asarray(array)[[2, 0]].tobytes().hex()
  assert out == f"{{'iteration': 7}} bfloat16\n{expected}\n"


@pytest.mark.parametrize(
  'make', [ocp.Checkpointer, ocp.AsyncCheckpointer], ids=lambda m: m.__name__
)
def test_any_checkpointer_takes_the_handler(folder, make):
  path = folder / 'snapshot'
  with make(orbax_handler.SnapshotHandler()) as checkpointer:
    checkpointer.save(
      path,
      args=orbax_handler.SnapshotSave(_metadata(1), _buffers(_arrays(1))),
    )
    if isinstance(checkpointer, ocp.AsyncCheckpointer):
      checkpointer.wait_until_finished()
    _check(path, 1)
    restored = checkpointer.restore(path)
    assert restored['arrays'].keys() == _arrays(1).keys()
    for name, array in _arrays(1).items():
      assert restored['arrays'][name].tobytes() == array.tobytes()
    metadata = orbax_handler.SnapshotHandler().metadata(path)
    assert metadata['iteration'] == 1
    data = bytearray((path / 'data').read_bytes())
    data[100] ^= 4
    (path / 'data').write_bytes(data)
    with pytest.raises(manifest.SnapshotCorruptError, match='buffer state 0'):
      checkpointer.restore(path)


class _Piece:
  """What a JAX array looks like to the store; reading it calls `on_read`."""

  def __init__(self, array, on_read):
    self.array, self.on_read = array, on_read
    self.dtype, self.nbytes = array.dtype, array.nbytes

  def __array__(self, dtype=None, copy=None):
    self.on_read()
    return self.array


def test_device_arrays_are_read_in_the_background(tmp_path):
  read = []
  array = np.zeros(1, np.float32)
  piece = _Piece(array, lambda: read.append(1))
  save = orbax_handler.SnapshotSave(
    {}, [manifest.Buffer('x', array.dtype, (1,), [piece])]
  )
  handler = orbax_handler.SnapshotHandler()
  (future,) = asyncio.run(handler.async_save(epath.Path(tmp_path), save))
  assert not read
  future.result()
  future.result()
  assert read == [1]


_WORLD = """
import sys
import jax
folder, port, me = sys.argv[1], sys.argv[2], int(sys.argv[3])
jax.distributed.initialize(f'localhost:{port}', 2, me)
import numpy as np
from moetion_jax.snapshots import manifest, memory_store
assert jax.process_count() == 2
array = np.zeros(4, np.float32)
with memory_store.SnapshotStore(f'{folder}/{me}', 64, 8) as store:
  for i in range(2 if me else 7):
    store.save(i, {}, [manifest.Buffer('x', array.dtype, (4,), [array])])
  print(store.iterations(), flush=True)
sys.stdin.read()
"""


def test_processes_of_a_stage_world_do_not_wait_for_each_other(folder):
  with socket.socket() as probe:
    probe.bind(('localhost', 0))
    port = str(probe.getsockname()[1])
  processes = [_run(_WORLD, folder, port, str(me)) for me in range(2)]
  try:
    for process, count in zip(processes, (7, 2), strict=True):
      assert process.stdout is not None
      assert process.stdout.readline() == f'{list(range(count))}\n'
  finally:
    for process in processes:
      process.kill()
      process.communicate()


_LOUD = """
import logging, sys
from absl import logging as absl_logging
absl_logging.use_absl_handler()
absl_logging.set_verbosity(absl_logging.INFO)
import numpy as np
from moetion_jax.snapshots import manifest, memory_store
array = np.zeros(4, np.float32)
with memory_store.SnapshotStore(sys.argv[1], 64, 3) as store:
  print('---', file=sys.stderr, flush=True)
  for i in range(5):
    store.retain(i)
    store.save(i, {}, [manifest.Buffer('x', array.dtype, (4,), [array])])
    absl_logging.info('iteration %d', i)
"""


def test_saves_are_silent_and_others_are_not(folder):
  _, errors = _finish(_run(_LOUD, folder / 'worker'))
  lines = errors.split('---\n')[1].splitlines()
  said = [line for line in lines if 'iteration' in line]
  assert [line[-1] for line in said] == list('01234')
  assert len(lines) <= len(said) + 5, errors  # closing may say a little


# --- Data files --------------------------------------------------------------


def test_data_files_go_round(folder, open_store):
  store = open_store(files=3)
  inodes = _data_files(store.folder).keys()
  assert len(inodes) == 3
  for iteration in range(12):
    store.retain(iteration - 1)
    assert _save(store, iteration) == _BYTES
    assert (
      store.iterations()[-2:]
      == [*range(iteration - 1, iteration + 1)][-len(store.iterations()) :]
    )
    files = _data_files(store.folder)
    assert files.keys() == inodes
    assert sum(files.values()) == 3 * _SIZE_BYTES
  _check_all(store.folder, range(9, 12))
  store.close()
  store = open_store(files=3)
  assert store.iterations() == [9, 10, 11]
  store.retain(11)
  assert _save(store, 12) == _BYTES
  assert _data_files(store.folder).keys() == inodes
  _check_all(store.folder, range(10, 13))


@pytest.mark.parametrize(
  'damage',
  [
    lambda path: os.truncate(path, 0),
    lambda path: os.truncate(path, _SIZE_BYTES // 2),
    lambda path: path.unlink(),
  ],
  ids=['nothing left', 'half left', 'removed'],
)
def test_free_files_that_are_cut_or_removed(open_store, damage):
  """Nobody dies of SIGBUS: others take their place."""
  store = open_store(files=3)
  _save(store, 1)
  before = _data_files(store.folder)
  for path in store.folder.glob('free-*'):
    damage(path)
  assert _save(store, 2) == _save(store, 3) == _BYTES
  _check_all(store.folder, [1, 2, 3])
  assert list(_data_files(store.folder).values()) == [_SIZE_BYTES] * 3
  assert len(before.keys() & _data_files(store.folder).keys()) == 1


def test_a_full_store_says_why(open_store):
  store = open_store(files=2)
  _save(store, 0)
  _save(store, 1)
  with pytest.raises(interface.SnapshotFullError, match='must be kept'):
    _save(store, 2)
  store.retain(2)
  reader = [
    snapshot_file.open_snapshot(path)
    for path in snapshot_file.list_snapshots(store.folder).values()
  ]
  with pytest.raises(interface.SnapshotFullError, match='readers hold'):
    _save(store, 2)
  _check_all(store.folder, [0, 1])  # neither was harmed
  reader[1].close()
  assert _save(store, 2) == _BYTES
  _check_all(store.folder, [0, 2])
  reader[0].close()
  assert _save(store, 3) == 0 or store.iterations() == [2, 3]


def test_more_host_memory_for_a_full_store(open_store):
  """What the error says, each in its way: more files, or fewer snapshots."""
  store = open_store(files=2)
  _save(store, 0)
  _save(store, 1)
  words = 'give more host memory or keep fewer windows'
  with pytest.raises(interface.SnapshotFullError, match=words):
    _save(store, 2)
  store.close()
  store = open_store(files=3)
  assert _save(store, 2) == _BYTES
  store.retain(1)
  assert _save(store, 3) == _BYTES
  _check_all(store.folder, [1, 2, 3])


def test_fewer_snapshots_for_a_small_tmpfs(tight):
  with pytest.raises(errors_lib.StoreError, match='fewer kept windows need'):
    memory_store.SnapshotStore(tight / 'worker', 5 * _PAGE, 4).start()
  assert not list((tight / 'worker').iterdir())
  with memory_store.SnapshotStore(tight / 'worker', 5 * _PAGE, 2):
    pass
  assert len(list((tight / 'worker').iterdir())) == 2


def test_snapshots_that_do_not_fit(open_store):
  store = open_store()
  large = np.zeros(_SIZE_BYTES + 1, np.uint8)
  with pytest.raises(errors_lib.StoreError, match='20.0 KiB|16.1 KiB'):
    store.save(0, {}, _buffers({'x': large}))
  with pytest.raises(TypeError):
    store.save(0, {'x': large}, [])
  assert store.save(0, {}, _buffers({'x': large[1:]})) == _SIZE_BYTES


def test_settings_that_changed(folder, open_store):
  store = open_store(files=3)
  _save(store, 0)
  _save(store, 1)
  old = _data_files(store.folder).keys()
  store = open_store(files=4, size_bytes=2 * _SIZE_BYTES)
  _check_all(store.folder, [0, 1])
  files = _data_files(store.folder)
  assert sorted(files.values()) == [_SIZE_BYTES] * 2 + [2 * _SIZE_BYTES] * 2
  for iteration in range(2, 8):
    store.retain(iteration - 2)
    _save(store, iteration)
  files = _data_files(store.folder)
  assert list(files.values()) == [2 * _SIZE_BYTES] * 4
  assert not old & files.keys()
  store = open_store(files=2, size_bytes=_SIZE_BYTES)
  assert store.iterations() == [4, 5, 6, 7]  # nothing that counts is lost
  with pytest.raises(interface.SnapshotFullError):
    _save(store, 8)
  for iteration in range(8, 12):
    store.retain(iteration - 1)
    _save(store, iteration)
  _check_all(store.folder, [10, 11])
  assert list(_data_files(store.folder).values()) == [_SIZE_BYTES] * 2


def _save_large(store, iteration):
  x = np.full(2 * _SIZE_BYTES, iteration, np.uint8)
  return store.save(iteration, {}, _buffers({'x': x}))


def test_larger_files_in_the_same_memory(folder, open_store):
  store = open_store(files=7)
  for iteration in range(4):
    _save(store, iteration)
  store.enlarge(2 * _SIZE_BYTES)
  store.enlarge(_SIZE_BYTES)  # they are as large
  held = [sum(_data_files(store.folder).values())]
  assert held == [4 * _SIZE_BYTES]  # of the free files the memory was needed
  _save_large(store, 4)
  with pytest.raises(interface.SnapshotFullError):
    _save_large(store, 5)  # one file's worth is left
  store.retain(1)
  _save_large(store, 5)
  assert store.iterations() == [1, 2, 3, 4, 5]
  for iteration in range(6, 12):
    store.retain(iteration - 2)
    assert _save_large(store, iteration) == 2 * _SIZE_BYTES
    held.append(sum(_data_files(store.folder).values()))
  assert max(held) <= 7 * _SIZE_BYTES
  assert store.iterations() == [9, 10, 11]
  # Who takes it over cuts it the same way, or as before.
  store.close()
  store = memory_store.SnapshotStore(folder / 'worker', _SIZE_BYTES, 7)
  store.enlarge(2 * _SIZE_BYTES)
  with store:
    assert store.iterations() == [9, 10, 11]
    store.retain(11)
    _save_large(store, 12)
    assert sum(_data_files(store.folder).values()) <= 7 * _SIZE_BYTES
  store = open_store(files=7)
  for iteration in range(13, 24):
    store.retain(iteration - 6)
    _save(store, iteration)
  assert list(_data_files(store.folder).values()) == [_SIZE_BYTES] * 7
  _check_all(store.folder, range(17, 24))


def test_a_memory_that_others_filled_does_not_end_who_takes_over(tight):
  """Files are cut anew when they are needed: a save can wait for room."""

  def store():
    made = memory_store.SnapshotStore(tight / 'worker', 2 * _PAGE, 4)
    made.enlarge(4 * _PAGE)
    return made

  def save(one, iteration):
    x = np.full(4 * _PAGE, iteration, np.uint8)
    return one.save(iteration, {}, _buffers({'x': x}))

  with store() as one:
    save(one, 0)
  helpers.fill(tight)
  with store() as one:
    with pytest.raises(OSError, match='only 0 bytes free') as caught:
      save(one, 1)
    assert caught.value.errno == errno.ENOSPC
    (tight / 'fill').unlink()
    assert save(one, 1) == 4 * _PAGE
    assert one.iterations() == [0, 1]


def test_a_larger_file_than_was_reserved(open_store):
  store = open_store(files=3)
  with pytest.raises(errors_lib.StoreError, match='does not fit into 48.0 KiB'):
    store.enlarge(3 * _SIZE_BYTES + 1)
  assert _save(store, 0) == _BYTES
  store.enlarge(3 * _SIZE_BYTES)
  with pytest.raises(interface.SnapshotFullError):
    _save_large(store, 1)
  store.retain(1)
  assert _save_large(store, 1) == 2 * _SIZE_BYTES


def test_no_room(folder, open_store):
  store = memory_store.SnapshotStore(folder / 'worker', 1 << 50, 2)
  with pytest.raises(errors_lib.StoreError, match='--shm-size'):
    store.start()
  assert not list((folder / 'worker').iterdir())
  with pytest.raises(errors_lib.StoreError, match='not started'):
    _save(store, 0)
  with pytest.raises(errors_lib.StoreError, match='No such file'):
    memory_store.SnapshotStore(folder / 'none/worker', 1, 1).start()
  open_store()
  with pytest.raises(errors_lib.StoreError, match='another living process'):
    memory_store.SnapshotStore(folder / 'worker', 1, 1).start()


# --- The same iteration again ------------------------------------------------


def test_the_same_again_is_nothing_to_do(open_store):
  store = open_store()
  _save(store, 1)
  before = snapshot_file.list_snapshots(store.folder)[1].stat().st_ino
  for replace in (False, True):
    assert _save(store, 1, replace=replace) == 0
  assert snapshot_file.list_snapshots(store.folder)[1].stat().st_ino == before


def test_diverged_bits_are_named(open_store):
  store = open_store()
  _save(store, 1)
  other = _arrays(1)
  other['compute'].view(np.uint8)[3] ^= 1
  with pytest.raises(errors_lib.EntryMismatchError, match='1, buffer compute'):
    store.save(1, _metadata(1), _buffers(other))
  with pytest.raises(errors_lib.EntryMismatchError, match='1, metadata clip'):
    store.save(1, _metadata(1) | {'clip': 0.5}, _buffers(_arrays(1)))
  _check_all(store.folder, [1])


def test_another_slot_replaces_only_if_asked(open_store):
  store = open_store(files=2)
  _save(store, 1)
  assert _save(store, 1, slot=1) == 0
  _check_all(store.folder, [1], slots=(0,))
  with snapshot_file.open_snapshot(store.folder / '1') as reader:
    assert _save(store, 1, slot=1, replace=True) == _BYTES
    _check_all(store.folder, [1], slots=(1,))
    # The old one is still read: its data file is not free yet.
    with pytest.raises(interface.SnapshotFullError):
      _save(store, 2)
    reader.verify()
  assert _save(store, 2) == _BYTES
  assert len(_data_files(store.folder)) == 2
  _check_all(store.folder, [1, 2], slots=(0, 1))


def _damage_data(path):
  data = bytearray((path / 'data').read_bytes())
  data[1] ^= 1
  (path / 'data').write_bytes(data)


def _damage_manifest(path):
  (path / 'manifest.json').write_bytes(b'{')


@pytest.mark.parametrize(
  'damage',
  [
    _damage_data,
    _damage_manifest,
    lambda path: os.truncate(path / 'data', 10),
    lambda path: (path / 'data').unlink(),
    lambda path: (path / 'manifest.json').unlink(),
    shutil.rmtree,
  ],
  ids=['data', 'manifest', 'truncated', 'no data', 'no manifest', 'nothing'],
)
@pytest.mark.parametrize('restart', [False, True])
def test_a_damaged_snapshot_is_written_again(open_store, damage, restart):
  store = open_store()
  _save(store, 1)
  _save(store, 2)
  damage(store.folder / '1')
  if restart:
    store = open_store()
  assert _save(store, 2) == 0
  assert _save(store, 1) == _BYTES
  _check_all(store.folder, [1, 2])
  assert list(_data_files(store.folder).values()) == [_SIZE_BYTES] * 3
  store.retain(3)
  assert _save(store, 3) == _save(store, 4) == _save(store, 5) == _BYTES
  _check_all(store.folder, [3, 4, 5])


def _fail():
  raise RuntimeError('device lost')


def test_a_failed_save_leaves_everything_as_it_was(open_store):
  store = open_store(files=2)
  _save(store, 1)
  array = np.zeros(1, np.float32)
  bad = manifest.Buffer('x', array.dtype, (1,), [_Piece(array, _fail)])
  for iteration in (1, 2, 2):
    with pytest.raises(RuntimeError, match='device lost'):
      store.save(iteration, {}, [bad], replace=True)
    _check_all(store.folder, [1])
    assert len(_data_files(store.folder)) == 2
  assert _save(store, 2) == _BYTES
  _check_all(store.folder, [1, 2])


def test_what_is_no_whole_data_file_is_not_adopted(folder, open_store):
  worker = folder / 'worker'
  worker.mkdir(mode=0o700)
  (worker / 'free-0').touch()  # killed before its pages were reserved
  (worker / 'free-1').write_bytes(b'x' * _PAGE)
  (worker / 'free-2').touch()
  os.truncate(worker / 'free-2', _SIZE_BYTES)  # sparse
  for name in ('5.orbax-checkpoint-tmp', '6', 'retired-9'):
    (worker / name).mkdir()
    (worker / name / 'data').write_bytes(b'x' * _SIZE_BYTES)
  (worker / '7').mkdir()
  store = open_store(files=4)
  assert store.iterations() == []
  assert list(_data_files(worker).values()) == [_SIZE_BYTES] * 4
  assert all(path.name.startswith('free-') for path in worker.iterdir())


def test_a_kill_between_old_and_new_brings_the_old_one_back(open_store):
  store = open_store()
  _save(store, 1)
  (store.folder / '1').rename(store.folder / '1.replaced')
  (store.folder / '1').mkdir()
  _check_all(store.folder, [1])
  store = open_store()
  assert [*snapshot_file.list_snapshots(store.folder).values()] == [
    store.folder / '1'
  ]
  _check_all(store.folder, [1])
  assert _save(store, 1) == 0


# --- Kills -------------------------------------------------------------------

# Forks a process for each n: it kills itself before its n-th step, a step being
# a change of the file system or the copy of a buffer. Another process looks at
# what was left as the agent does, adopts it and goes on.
_KILLS = """
import os, pathlib, signal, sys, traceback
sys.path.insert(0, 'tests/snapshots')
import memory_store_test as t
from moetion_jax.snapshots import file as snapshot_file, manifest, memory_store

folder, cut = pathlib.Path(sys.argv[1]), sys.argv[2] == 'cut anew'
files = 6 if cut else 2

def work(folder, step, report):
  def save(iteration, slot=0, **options):
    buffers = [
      manifest.Buffer(name, a.dtype, a.shape, [t._Piece(a, step)])
      for name, a in t._arrays(iteration, slot).items()
    ]
    store.save(iteration, t._metadata(iteration, slot), buffers, **options)
  store = memory_store.SnapshotStore(folder, t._SIZE_BYTES, files)
  store.start()
  for iteration in range(3):
    store.retain(iteration - 1)
    save(iteration)
    report(iteration + 1)
    if cut:
      store.enlarge(2 * t._SIZE_BYTES)
  store.retain(2)
  save(2, slot=1, replace=True)
  report(4)
  store.close()

def killed(folder, n, progress):
  steps = 0
  def step():
    nonlocal steps
    if steps == n:
      os.kill(os.getpid(), signal.SIGKILL)
    steps += 1
  def hook(event, arguments):
    if event in ('os.rename', 'os.remove', 'os.rmdir', 'os.mkdir') or (
      event == 'open' and str(folder) in str(arguments[0])
    ):
      step()
  sys.addaudithook(hook)
  work(folder, step, lambda count: os.pwrite(progress, bytes([count]), 0))

def check(folder, saved):
  found = snapshot_file.list_snapshots(folder)
  newest = min(saved, 3) - 1
  assert newest < 0 or newest in found, found
  for iteration, path in found.items():
    slot = t._check(path, iteration, (0, 1) if iteration == 2 else (0,))
    assert slot == 1 or saved < 4 or iteration < 2
  assert sum(t._data_files(folder).values()) <= files * t._SIZE_BYTES
  store = memory_store.SnapshotStore(folder, t._SIZE_BYTES, files)
  if cut:
    store.enlarge(2 * t._SIZE_BYTES)
  with store:
    assert store.iterations() == list(found)
    for iteration in range(max(newest, 0), 5):
      sizes = list(t._data_files(folder).values())
      if cut:
        assert sum(sizes) <= files * t._SIZE_BYTES, sizes
      else:
        assert sizes == [t._SIZE_BYTES] * files
      store.retain(iteration - 1)
      t._save(store, iteration)
    held = {p.name for p in folder.iterdir()}
    assert {'3', '4'} <= held and (cut or len(held) == 2), held

def child(function, *args):
  pid = os.fork()
  if pid == 0:
    try:
      function(*args)
      os._exit(0)
    except BaseException:
      traceback.print_exc()
      os._exit(1)
  return os.waitpid(pid, 0)[1]

n, status = -1, None
while status != 0:
  n += 1
  place = folder / str(n)
  place.mkdir(mode=0o700)
  progress = os.open(folder / f'{n}.progress', os.O_RDWR | os.O_CREAT)
  status = child(killed, place / 'worker', n, progress)
  assert status in (0, signal.SIGKILL), status
  saved = int.from_bytes(os.pread(progress, 1, 0), 'little')
  os.close(progress)
  if (place / 'worker').exists():
    assert child(check, place / 'worker', saved) == 0, (n, saved)
print(n)
"""


@pytest.mark.parametrize('how', ['', 'cut anew'])
def test_a_kill_at_any_step_loses_nothing(folder, how):
  out, _ = _finish(_run(_KILLS, folder, how))
  assert int(out) > 40  # that many kills


_SAVES = """
import sys
import numpy as np
from moetion_jax.snapshots import manifest, memory_store
store = memory_store.SnapshotStore(sys.argv[1], 8 << 20, 3)
store.start()
first = max(store.iterations(), default=-1) + 1
for i in range(first, first + 1000):
  store.retain(i - 1)
  x = np.full(1 << 20, i, np.int64)
  store.save(i, {}, [manifest.Buffer('x', x.dtype, x.shape, [x])])
  print(i, flush=True)
"""


def test_kills_from_outside_in_the_middle_of_saves(folder):
  for lines in (1, 2, 5):
    process = _run(_SAVES, folder / 'worker')
    assert process.stdout is not None
    saved = [int(process.stdout.readline()) for _ in range(lines)]
    process.kill()
    # It may have saved more between its last line that we read and the kill.
    saved += [int(line) for line in process.communicate()[0].split()]
    found = snapshot_file.list_snapshots(folder / 'worker')
    last = saved[-1]
    assert {last} <= set(found) <= set(range(last - 2, last + 2))
    for iteration, path in found.items():
      with snapshot_file.open_snapshot(path, verify=True) as stored:
        assert (stored.arrays['x'] == iteration).all()
    files = _data_files(folder / 'worker').values()
    assert len(files) == 3 and sum(files) == 3 * (8 << 20)
