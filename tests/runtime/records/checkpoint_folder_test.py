"""A checkpoint is replaced whole, and files of others stay in its folder."""

import re
import shutil
import sys

import numpy as np
import pytest
from orbax import checkpoint as ocp

from moetion_jax import errors
from moetion_jax.runtime.records import checkpoint_folder, own_files
from moetion_jax.snapshots import file as snapshot_file

_TREE = {'iteration': np.int64(3), 'parameters': {'a': np.arange(5000.0)}}


def _write(place, tree=_TREE):
  with ocp.StandardCheckpointer() as checkpointer:
    checkpointer.save(place, tree, custom_metadata={'x': 1})
    checkpointer.wait_until_finished()


def _save(path, tree=_TREE):
  with checkpoint_folder.replacing(path) as place:
    _write(place, tree)


def _read(path):
  with ocp.StandardCheckpointer() as checkpointer:
    return checkpointer.restore(path)


def test_a_real_checkpoint_has_no_names_but_known_ones(tmp_path):
  assert own_files.ORBAX_SUFFIX == ocp.path.atomicity.TMP_DIR_SUFFIX
  path = tmp_path / 'checkpoint'
  assert not checkpoint_folder.is_committed(path)
  _save(path)
  assert checkpoint_folder.is_committed(path)
  found = own_files.find_run(tmp_path)
  assert found.others == () and len(found.own) > 5
  (path / 'commit_success.txt').unlink()
  assert checkpoint_folder.is_committed(path)  # a version before that file
  own_files.remove(found)
  assert not path.exists()


def test_files_of_others_stay(tmp_path):
  path = tmp_path / 'checkpoint'
  for name in ('notes.txt', 'd/notes.txt', 'mine/deep/notes.txt'):
    (path / name).parent.mkdir(parents=True, exist_ok=True)
    (path / name).write_text(name)
  temporary = tmp_path / f'checkpoint{own_files.ORBAX_SUFFIX}'
  temporary.mkdir()
  (temporary / 'notes.txt').write_text('Orbax would remove this')
  for factor in (1.0, 2.0):  # the second replaces the first
    tree = {'a': factor * np.arange(5000.0)}
    assert checkpoint_folder.is_committed(path) == (factor == 2.0)
    _save(path, tree)
    assert checkpoint_folder.is_committed(path)
    np.testing.assert_array_equal(_read(path)['a'], tree['a'])
    for name in ('notes.txt', 'd/notes.txt', 'mine/deep/notes.txt'):
      assert (path / name).read_text() == name
  assert [p.name for p in temporary.iterdir()] == ['notes.txt']
  assert sorted(p.name for p in tmp_path.iterdir()) == [
    path.name,
    temporary.name,
  ]


def _stand_in_the_way(path, is_folder):
  """Puts something at a path that nothing of the other kind replaces."""
  if is_folder:
    path.mkdir()
    (path / 'notes.txt').write_text('mine')
  else:
    path.write_text('mine')


def test_an_end_at_any_moment_leaves_none_or_a_whole_one(tmp_path):
  """Files are moved in one by one: each move once is the one that fails."""
  source, path = tmp_path / 'whole', tmp_path / 'checkpoint'
  _write(source)
  marker = snapshot_file.COMMIT_MARKER_NAME
  names = {p.name: p.is_dir() for p in source.iterdir()}
  assert names.keys() > set(snapshot_file.COMMIT_NAMES)
  for name, is_folder in names.items():
    (path / 'others').mkdir(parents=True)
    (path / 'others' / 'notes.txt').write_text('mine')
    _stand_in_the_way(path / name, is_folder=not is_folder)
    with pytest.raises(errors.StoreError, match=re.escape(name)):
      _save(path)
    # What commits comes last; with the first of its two files all is there.
    assert checkpoint_folder.is_committed(path) == (name == marker), name
    (path / name).rename(tmp_path / 'away')
    if name == marker:
      np.testing.assert_array_equal(
        _read(path)['parameters']['a'], _TREE['parameters']['a']
      )
    _save(path)
    assert checkpoint_folder.is_committed(path)
    np.testing.assert_array_equal(_read(path)['iteration'], 3)
    assert (path / 'others' / 'notes.txt').read_text() == 'mine'
    shutil.rmtree(path)
    away = tmp_path / 'away'
    shutil.rmtree(away) if away.is_dir() else away.unlink()
    assert [p.name for p in tmp_path.iterdir()] == ['whole']


def test_an_end_at_any_moment_of_a_replacement_leaves_one(tmp_path):
  """The old one goes when the new one is there, before each thing removed."""
  path = tmp_path / 'checkpoint'
  _save(path, {'a': np.arange(5000.0)})
  seen = []

  def look(event, unused):
    if seen is not None and event in ('os.rename', 'os.remove', 'os.rmdir'):
      seen.append(checkpoint_folder.is_committed(path))

  sys.addaudithook(look)
  try:
    _save(path, {'a': 2 * np.arange(5000.0)})
    found = list(seen)
  finally:
    seen = None  # a hook stays for ever
  assert len(found) > 5 and all(found)
  np.testing.assert_array_equal(_read(path)['a'], 2 * np.arange(5000.0))
  assert [p.name for p in tmp_path.iterdir()] == ['checkpoint']


def test_what_a_killed_save_left_goes(tmp_path):
  """Killed when the names were exchanged: the old one lies beside."""
  path = tmp_path / 'checkpoint'
  _save(path)
  shutil.copytree(path, tmp_path / f'checkpoint{own_files.ASIDE_SUFFIX}')
  checkpoint_folder.clear_rest(path)
  assert [p.name for p in tmp_path.iterdir()] == ['checkpoint']
  assert checkpoint_folder.is_committed(path)


def test_a_link_is_not_written_through(tmp_path):
  (tmp_path / 'other').mkdir()
  (tmp_path / 'other' / '_METADATA').write_text('mine')
  (tmp_path / 'checkpoint').symlink_to(tmp_path / 'other')
  with pytest.raises(errors.StoreError, match='symbolic link.*move it away'):
    _save(tmp_path / 'checkpoint')
  assert (tmp_path / 'other' / '_METADATA').read_text() == 'mine'
  (tmp_path / 'checkpoint').rename(tmp_path / 'away')
  _save(tmp_path / 'checkpoint')
  assert checkpoint_folder.is_committed(tmp_path / 'checkpoint')


@pytest.mark.parametrize(
  'content', ['', '{}', '[]', '{"commit_timestamp_nsecs": null}']
)
def test_what_is_not_committed(tmp_path, content):
  (tmp_path / '_CHECKPOINT_METADATA').write_text(content)
  (tmp_path / 'notes.txt').write_text('mine')
  assert not checkpoint_folder.is_committed(tmp_path)
