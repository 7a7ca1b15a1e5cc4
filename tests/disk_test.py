"""What is synced outlives a loss of power, and what is not does not."""

import json
import os
import pathlib

import pytest

from moetion_jax import disk
from moetion_jax.runtime.records import checkpoint_folder, files, merge
from tests.support import helpers, power

_CHECKPOINT = ('manifest.ocdbt', 'commit_success.txt', 'd/1', 'a/2')


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
    for name in _CHECKPOINT:
      file = os.path.join(place, name)
      os.makedirs(os.path.dirname(file), exist_ok=True)
      with open(file, 'w') as out:
        out.write(name * 2000)
  before = _read_tree(path)
  assert len(before) == 4 + has_others
  mounted.cut()
  assert _read_tree(path) == before
  assert sorted(os.listdir(mounted.path)) == ['checkpoint', 'lost+found']


@pytest.mark.parametrize('has_others', [False, True])
def test_the_order_in_which_a_checkpoint_takes_its_place(
  tmp_path, monkeypatch, has_others
):
  """Wherever power is cut, one of both is whole, and none only seems to be."""
  path = tmp_path / 'checkpoint'

  def replace():
    with checkpoint_folder.replacing(path) as place:
      for name in _CHECKPOINT:
        file = pathlib.Path(place, name)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(name)
    return pathlib.Path(place)

  replace()
  if has_others:  # then it is moved in beside them, file by file
    (path / 'd' / 'notes').write_text('mine')
  calls = power.record(monkeypatch)
  place = replace()
  monkeypatch.undo()
  kinds = [call[0] for call in calls]
  removed, moved = kinds.index('remove'), kinds.index('move')
  # All of the new one, and its name, before anything of the old one goes.
  folders = {f for name in _CHECKPOINT for f in (place / name).parents}
  files = {place / name for name in _CHECKPOINT}
  whole = {p for p in files | folders if p.is_relative_to(tmp_path)}
  assert {*map(str, whole)} <= {p for kind, p in calls[:removed]}
  assert {*kinds[:removed]} == {'sync'}
  # That is gone before a file of the new one can be taken for one of its.
  assert 'remove' not in [
    kind for kind, p, *_ in calls[moved:] if not p.startswith(str(place))
  ]
  # What commits it, when all that was moved before has its name on disk.
  last = len(kinds) - 1 - kinds[::-1].index('move')
  for number in range(moved, last + 1):
    if kinds[number] == 'move' and calls[number][2].endswith('success.txt'):
      into = [c[2] for c in calls[:number] if c[0] == 'move']
      assert len(into) == len(_CHECKPOINT) - 1
      for name in into:
        after = calls[calls.index(next(c for c in calls if name in c[2:])) :]
        synced = after[: after.index(calls[number])]
        assert ('sync', os.path.dirname(name)) in synced
  assert ('sync', str(path if has_others else tmp_path)) in calls[last:]


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


def test_an_exchange_of_names(tmp_path):
  for name in ('a', 'b'):
    (tmp_path / name).mkdir()
    (tmp_path / name / 'was').write_text(name)
  if not disk.exchange(tmp_path / 'a', tmp_path / 'b'):
    pytest.skip('this file system cannot exchange names')
  assert (tmp_path / 'a' / 'was').read_text() == 'b'
  assert (tmp_path / 'b' / 'was').read_text() == 'a'
  with pytest.raises(FileNotFoundError):
    disk.exchange(tmp_path / 'a', tmp_path / 'none')
