"""Snapshot files: format, damage, leases, recycling. No JAX, no Orbax."""

import dataclasses
import os
import pathlib
import shutil
import subprocess
import sys
import uuid

import ml_dtypes
import numpy as np
import pytest

from moetion_jax import errors
from moetion_jax.hostmem import raw_bytes
from moetion_jax.snapshots import (
  file as snapshot_file,
  manifest as manifest_lib,
)

pytestmark = pytest.mark.timeout(120)

_REPOSITORY = pathlib.Path(__file__).resolve().parents[2]
_METADATA = {
  'iteration': 3,
  'scale': 0.1,
  'slot': ['head', 'layers/0/1'],
  'n': None,
}


@pytest.fixture
def folder(tmp_path):
  shm = pathlib.Path('/dev/shm')
  path = (shm if shm.is_dir() else tmp_path) / f'test-{uuid.uuid4().hex}'
  path.mkdir(mode=0o700)
  yield path
  subprocess.run(['rm', '-rf', path], check=True)


def _buffer(name, array, pieces=None):
  return manifest_lib.Buffer(
    name, array.dtype, array.shape, [array] if pieces is None else pieces
  )


def _random(dtype, shape, seed=0):
  dtype = np.dtype(dtype)
  count = int(np.prod(shape)) * dtype.itemsize
  data = np.random.default_rng(seed).integers(0, 256, count, np.uint8)
  if dtype == np.bool_:
    data &= 1
  return data.view(dtype).reshape(shape)


def _write(folder, name='3', arrays=None, data_file=None):
  """A small snapshot; returns its directory and its arrays."""
  path = folder / name
  path.mkdir()
  arrays = arrays or {
    'a': _random(np.float32, (5, 7), len(name)),
    'b': _random(ml_dtypes.bfloat16, (2, 3, 4), len(name)),
    'c': _random(np.int32, (), len(name)),
  }
  buffers = [_buffer(name, array) for name, array in arrays.items()]
  snapshot_file.write(path, buffers, _METADATA, data_file)
  return path, arrays


def _flip(path, position):
  data = bytearray(path.read_bytes())
  data[position] ^= 1
  path.write_bytes(data)


# --- The format --------------------------------------------------------------


@pytest.mark.parametrize('dtype', raw_bytes.DTYPES, ids=str)
def test_bytes_in_are_bytes_out(folder, dtype):
  arrays = {
    str(shape): _random(dtype, shape) for shape in [(), (0, 3), (1,), (5, 7)]
  }
  path, _ = _write(folder, arrays=arrays)
  with snapshot_file.open_snapshot(path, verify=True) as stored:
    assert stored.metadata == _METADATA
    assert list(stored.arrays) == list(arrays)
    for name, array in arrays.items():
      found = stored.arrays[name]
      assert (found.dtype, found.shape) == (array.dtype, array.shape)
      assert found.tobytes() == array.tobytes()
      assert not found.flags.writeable
      assert found.__array_interface__['data'][0] % 64 == 0 or not found.nbytes


def test_pieces_are_rows_of_a_larger_array(folder):
  array = _random(np.float32, (8, 100_000))  # a row is no whole copy step
  rows = [6, 0, 3]
  buffer = manifest_lib.Buffer(
    'rows', array.dtype, (3, 100_000), [array[row] for row in rows]
  )
  turned = _buffer('turned', array[:3, :5].T)  # not C-contiguous
  written = snapshot_file.write(folder, [buffer, turned], {})
  assert written == 3 * 400_000 + 60
  assert buffer.checksum() == raw_bytes.checksum(array[rows])
  with snapshot_file.open_snapshot(folder, verify=True) as stored:
    np.testing.assert_array_equal(stored.arrays['rows'], array[rows])
    np.testing.assert_array_equal(stored.arrays['turned'], array[:3, :5].T)


def test_a_snapshot_without_buffers(folder):
  assert snapshot_file.write(folder, [], {'a': 1}) == 0
  with snapshot_file.open_snapshot(folder, verify=True) as stored:
    assert (stored.metadata, stored.arrays) == ({'a': 1}, {})


@pytest.mark.parametrize(
  'change, message',
  [
    ({'dtype': np.dtype('datetime64[s]')}, 'good: dtype .* cannot be stored'),
    ({'dtype': np.dtype(np.int32)}, 'good: a piece of dtype float32'),
    ({'shape': (7,)}, 'good: its pieces are not 28 bytes'),
    ({'name': 'other'}, 'other: there are two'),
  ],
)
def test_buffers_that_cannot_be_written(folder, change, message):
  good = _buffer('good', np.zeros(6, np.float32))
  other = _buffer('other', np.zeros(6, np.float32))
  bad = dataclasses.replace(good, **change)
  with pytest.raises(errors.StoreError, match=message):
    snapshot_file.write(folder, [other, bad], {})
  assert not list(folder.iterdir())


def test_pages_are_used_again(folder):
  data = snapshot_file.DataFile.create(folder / 'pool', 1 << 16)
  inode = (folder / 'pool').stat().st_ino
  assert data.is_reserved
  for name in ('0', '1', '20'):
    path, arrays = _write(folder, name, data_file=data)
    assert (path / 'data').stat().st_ino == inode
    assert (path / 'data').stat().st_size == 1 << 16
    with snapshot_file.open_snapshot(path, verify=True) as stored:
      assert stored.arrays['a'].tobytes() == arrays['a'].tobytes()
    again = snapshot_file.try_recycle(path, folder / 'pool', data)
    assert again is data and data.path == folder / 'pool'
    assert [p.name for p in folder.iterdir()] == ['pool']
  too_large = _buffer('x', np.zeros((1 << 16) + 1, np.uint8))
  with pytest.raises(errors.StoreError, match='do not fit'):
    snapshot_file.write(folder, [too_large], {}, data)
  assert data.path == folder / 'pool'
  data.remove()
  assert not list(folder.iterdir())


def test_data_bytes_is_what_is_used(folder):
  path, arrays = _write(folder)
  need = manifest_lib.data_bytes(a.nbytes for a in arrays.values())
  assert snapshot_file.read_manifest(path).used_bytes == need == 192 + 2 * 64


# --- Damage ------------------------------------------------------------------


def test_every_damage_of_a_manifest_is_found(folder):
  path, _ = _write(folder)
  manifest = path / 'manifest.json'
  whole = manifest.read_bytes()
  for position in range(len(whole)):
    damaged = bytearray(whole)
    damaged[position] ^= 1 << position % 8
    for data in (bytes(damaged), whole[:position]):
      with pytest.raises(ValueError):
        manifest_lib.Manifest.unpack(data)
  assert manifest_lib.Manifest.unpack(whole).pack() == whole
  for damage in (whole[:100], whole[:-1], whole + b' ', b''):
    manifest.write_bytes(damage)
    with pytest.raises(
      manifest_lib.SnapshotCorruptError, match=f'{manifest}: torn'
    ):
      snapshot_file.read_manifest(path)


@pytest.mark.parametrize('number', [1, 3])
def test_a_manifest_of_another_format_is_refused(folder, number):
  path, _ = _write(folder)
  manifest = path / 'manifest.json'
  body = manifest.read_bytes()[13:].split(b', "xxh3_64"')[0]
  assert b'"format": 2' in body
  body = body.replace(b'"format": 2', b'"format": %d' % number)
  checksum = raw_bytes.checksum(np.frombuffer(body, np.uint8))
  manifest.write_bytes(
    b'{"manifest": %b, "xxh3_64": "%016x"}\n' % (body, checksum)
  )
  with pytest.raises(
    manifest_lib.SnapshotCorruptError, match=f'format {number} is not known'
  ):
    snapshot_file.read_manifest(path)


@pytest.mark.parametrize('name', ['data', 'manifest.json'])
def test_a_missing_file_is_named(folder, name):
  path, _ = _write(folder)
  (path / name).unlink()
  for read in (snapshot_file.read_manifest, snapshot_file.open_snapshot):
    with pytest.raises(
      manifest_lib.SnapshotCorruptError, match=f'{path / name}: No such file'
    ):
      read(path)
  with pytest.raises(manifest_lib.SnapshotCorruptError, match='/4: No such'):
    snapshot_file.read_manifest(folder / '4')


@pytest.mark.parametrize('size', [0, 319])
def test_a_truncated_data_file_is_named(folder, size):
  path, _ = _write(folder)
  os.truncate(path / 'data', size)
  for read in (snapshot_file.read_manifest, snapshot_file.open_snapshot):
    with pytest.raises(
      manifest_lib.SnapshotCorruptError,
      match=f'{path / "data"}: truncated to {size} of 320 bytes',
    ):
      read(path)


def test_a_flipped_bit_names_its_buffer(folder):
  path, arrays = _write(folder)
  for name, buffer in snapshot_file.read_manifest(path).buffers.items():
    for position in (0, arrays[name].nbytes - 1):
      _flip(path / 'data', buffer.offset + position)
      with snapshot_file.open_snapshot(path) as stored:
        with pytest.raises(
          manifest_lib.SnapshotCorruptError, match=f'buffer {name} '
        ):
          stored.verify()
      with pytest.raises(manifest_lib.SnapshotCorruptError) as caught:
        snapshot_file.open_snapshot(path, verify=True)
      # Whoever keeps the error does not keep the lease.
      assert _can_be_recycled(path), caught
      _flip(path / 'data', buffer.offset + position)
  snapshot_file.open_snapshot(path, verify=True).close()


# --- The folder, leases ------------------------------------------------------


def _can_be_recycled(path):
  """Whether no reader holds the data file."""
  data = snapshot_file.DataFile.open(path / 'data')
  free = data.try_lock()
  data.close()
  return free


def test_committed_snapshots_are_listed(folder):
  assert snapshot_file.list_snapshots(folder / 'none') == {}
  for name in ('10', '9', '0'):
    _write(folder, name)
  _write(folder, '11.orbax-checkpoint-tmp')
  _write(folder, '012')
  _write(folder, '9.replaced')  # its successor is there
  _write(folder, '13.replaced')  # killed before its successor was
  path, _ = _write(folder, '14')
  (path / 'manifest.json').unlink()  # being retired
  (folder / '15').touch()
  found = snapshot_file.list_snapshots(folder)
  assert list(found) == [0, 9, 10, 13]
  assert [p.name for p in found.values()] == ['0', '9', '10', '13.replaced']


def test_a_snapshot_that_is_read_is_not_recycled(folder):
  path, arrays = _write(folder)
  one = snapshot_file.open_snapshot(path)
  two = snapshot_file.open_snapshot(path)
  kept = two.arrays['a'][1:3]
  for close in (one.close, two.close, two.close):
    assert snapshot_file.try_recycle(path, folder / 'pool') is None
    snapshot_file.open_snapshot(path, verify=True).close()  # still whole
    close()
  # An array that is still used counts as much as an open snapshot.
  assert snapshot_file.try_recycle(path, folder / 'pool') is None
  np.testing.assert_array_equal(kept, arrays['a'][1:3])
  del kept
  data = snapshot_file.try_recycle(path, folder / 'pool')
  assert data is not None and data.path == folder / 'pool'
  assert not path.exists()
  data.close()


def _descriptors(path):
  """How many of this process's descriptors are of a file, now or once there."""
  found = 0
  for fd in os.listdir('/proc/self/fd'):
    try:
      found += os.readlink(f'/proc/self/fd/{fd}').startswith(str(path))
    except FileNotFoundError:  # the one that lists
      continue
  return found


@pytest.mark.parametrize('step', ['manifest', 'move'])
def test_a_failed_recycling_keeps_no_descriptor_and_no_lock(folder, step):
  path, _ = _write(folder)
  target = folder / 'pool'
  if step == 'manifest':  # which cannot be unlinked
    (path / 'manifest.json').unlink()
    (path / 'manifest.json').mkdir()
  else:
    target.mkdir()
  with pytest.raises(OSError):
    snapshot_file.try_recycle(path, target)
  assert _descriptors(path) == 0
  data = snapshot_file.DataFile.open(path / 'data')
  with pytest.raises(OSError):
    snapshot_file.try_recycle(path, target, data)
  other = snapshot_file.DataFile.open(path / 'data')
  assert other.try_lock()  # a reader could take its lease
  other.close()
  data.close()


def test_nobody_opens_what_is_being_recycled(folder):
  path, _ = _write(folder)
  data = snapshot_file.DataFile.open(path / 'data')
  assert data.try_lock()
  with pytest.raises(manifest_lib.SnapshotCorruptError, match='being recycled'):
    snapshot_file.open_snapshot(path)
  data.close()
  snapshot_file.open_snapshot(path).close()


def _run(script, *args):
  return subprocess.Popen(
    [sys.executable, '-c', script, *map(str, args)],
    cwd=_REPOSITORY,
    stdin=subprocess.PIPE,
    stdout=subprocess.PIPE,
    text=True,
  )


def test_a_lease_ends_with_a_killed_reader(folder):
  path, _ = _write(folder)
  reader = _run(
    """
import sys
from moetion_jax.snapshots import file as snapshot_file
stored = snapshot_file.open_snapshot(sys.argv[1])
print('reading', flush=True)
sys.stdin.read()
""",
    path,
  )
  assert reader.stdout is not None
  assert reader.stdout.readline() == 'reading\n'
  assert snapshot_file.try_recycle(path, folder / 'pool') is None
  reader.kill()
  reader.communicate(timeout=60)
  data = snapshot_file.try_recycle(path, folder / 'pool')
  assert data is not None
  data.close()


def test_readers_never_see_a_recycled_snapshot(folder):
  """One data file is rewritten as fast as possible while it is being read."""
  writer = _run(
    """
import itertools, pathlib, sys
import numpy as np
from moetion_jax.snapshots import file as snapshot_file, manifest
folder, enough = map(pathlib.Path, sys.argv[1:])
data = snapshot_file.DataFile.create(folder / 'pool', 1 << 16)
for i in itertools.takewhile(lambda _: not enough.exists(), itertools.count()):
  array = np.full((1 << 14,), i, np.int32)
  temporary = folder / f'{i}.orbax-checkpoint-tmp'
  temporary.mkdir()
  buffer = manifest.Buffer('x', array.dtype, array.shape, [array])
  snapshot_file.write(temporary, [buffer], {'i': i}, data)
  temporary.rename(folder / str(i))
  path = folder / str(i)
  while snapshot_file.try_recycle(path, folder / 'pool', data) is None:
    pass
print('done', flush=True)
""",
    folder,
    folder / 'enough',
  )
  read = 0
  while writer.poll() is None:
    if read == 100:
      (folder / 'enough').touch()
    for iteration, path in snapshot_file.list_snapshots(folder).items():
      try:
        with snapshot_file.open_snapshot(path) as stored:
          array = stored.arrays['x']
          assert stored.metadata == {'i': iteration}
          assert array.min() == array.max() == iteration
          stored.verify()
          del array
          read += 1
      except manifest_lib.SnapshotCorruptError as error:
        assert 'No such file' in str(error) or 'recycled' in str(error)
  assert writer.communicate(timeout=60)[0] == 'done\n'
  assert read >= 100


@pytest.mark.parametrize(
  ('names', 'is_ours'),
  [
    (['7/data', '7/manifest.json', 'free-0', 'retired-1/data'], True),
    (['7/data', '7/manifest.json', '7/of a later Orbax'], True),
    (['7/data'], True),
    (['7/_CHECKPOINT_METADATA', '8.orbax-checkpoint-tmp/data'], True),
    (['notes', 'runs/7/x', 'x7/y'], True),  # which no store removes
    (['100/default/x', '100/_CHECKPOINT_METADATA'], False),
    (['100/model.safetensors'], False),
    (['100/data', '100/labels.csv'], False),
    (['100/data/train.bin'], False),
  ],
)
def test_checkpoints_of_others(folder, tmp_path, names, is_ours):
  for name in names:
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).touch()
  if is_ours:
    return snapshot_file.check_is_ours(folder)
  words = '100.*name another folder, or move that away'
  with pytest.raises(errors.StoreError, match=words):
    snapshot_file.check_is_ours(folder)
  shutil.move(folder / '100', tmp_path)
  snapshot_file.check_is_ours(folder)
