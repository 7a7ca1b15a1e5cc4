"""What is synced outlives a loss of power, and what is not does not."""

import json
import os

import pytest

from moetion_jax import disk
from moetion_jax.runtime.records import checkpoint_folder, files, merge
from tests.support import helpers, power


@pytest.fixture
def mounted(tmp_path):
  with power.disk(tmp_path) as one:
    yield one


def _make_tree(folder):
  (folder / 'a' / 'b').mkdir(parents=True)
  (folder / 'empty').mkdir()
  for name in ('x', 'a/y', 'a/b/z'):
    (folder / name).write_text(name * 3000)
  (folder / 'a' / 'link').symlink_to('nowhere')


def _read_tree(folder):
  return {
    str(path.relative_to(folder)): path.read_text()
    for path in sorted(folder.rglob('*'))
    if path.is_file()
  }


def test_a_loss_of_power(mounted):
  """Only of what is synced anything is left: so `cut` cuts."""
  for name in ('synced', 'other'):
    (mounted.path / name).mkdir()
  disk.sync_folder(mounted.path)
  for name in ('other', 'synced'):
    _make_tree(mounted.path / name)
  whole = _read_tree(mounted.path / 'synced')
  disk.sync_tree(mounted.path / 'synced')
  (mounted.path / 'late').write_text('late')
  mounted.cut()
  assert _read_tree(mounted.path / 'synced') == whole
  assert (mounted.path / 'synced' / 'empty').is_dir()
  assert _read_tree(mounted.path / 'other') != whole
  assert not (mounted.path / 'late').exists()


@pytest.mark.parametrize('has_others', [False, True])
def test_a_checkpoint_that_took_its_place(mounted, has_others):
  path = mounted.path / 'checkpoint'
  if has_others:  # then it is moved in beside them, file by file
    (path / 'a').mkdir(parents=True)
    (path / 'a' / 'notes').write_text('mine')
    os.sync()
  with checkpoint_folder.replacing(path) as place:
    os.mkdir(place)
    for name in ('manifest.ocdbt', 'commit_success.txt', 'd/1', 'a/2'):
      file = os.path.join(place, name)
      os.makedirs(os.path.dirname(file), exist_ok=True)
      with open(file, 'w') as out:
        out.write(name * 2000)
  before = _read_tree(path)
  assert len(before) == 4 + has_others
  mounted.cut()
  assert _read_tree(path) == before
  assert sorted(os.listdir(mounted.path)) == ['checkpoint', 'lost+found']


def test_a_json_file(mounted):
  path = mounted.path / 'config.json'
  files.write_json(str(path), {'n': 1})
  mounted.cut()
  files.write_json(str(path), {'n': 2})
  mounted.cut()
  assert json.loads(path.read_text()) == {'n': 2}
  files.write_json(str(path), {'n': 3}, outlives_power=False)
  mounted.cut()
  assert json.loads(path.read_text()) == {'n': 2}


def test_lines_of_metrics(mounted):
  path = mounted.path / 'metrics.jsonl'
  with files.MetricsFile(str(path)) as lines:
    disk.sync_folder(mounted.path)
    for iteration in (1, 2):
      report = helpers.make_report(iteration, loss=1.5)
      lines.write(merge.make_line([report], 64))
    lines.sync()
  mounted.cut()
  assert list(files.read_lines(path)) == [1, 2]


def test_errors_name_the_file(tmp_path):
  for sync in (disk.sync_file, disk.sync_folder, disk.sync_tree):
    with pytest.raises(OSError) as caught:
      sync(tmp_path / 'missing')
    assert caught.value.filename == str(tmp_path / 'missing')


def test_a_device_has_a_name(mounted):
  name = disk.device_of(mounted.path / 'not' / 'there')
  assert '/dev/loop' in name and 'ext4' in name and str(mounted.path) in name
  assert 'mounted at /proc)' in disk.device_of('/proc/self')
