"""A run's own files are removed by name; those of others stay."""

import pathlib

import pytest

from moetion_jax.runtime.records import own_files
from moetion_jax.snapshots import durable_store, file as snapshot_file

# Of a run that finished, and that of one that was killed while it saved.
OWN = (
  'checkpoint/commit_success.txt',
  'checkpoint/_CHECKPOINT_METADATA',
  'checkpoint/_METADATA',
  'checkpoint/manifest.ocdbt',
  'checkpoint/d/0123456789abcdef0123456789abcdef',
  'checkpoint/ocdbt.process_0/manifest.ocdbt',
  'checkpoint/ocdbt.process_0/d/0123456789abcdef0123456789abcdef',
  'checkpoint/array_metadatas/process_0',
  'checkpoint.orbax-checkpoint-tmp/_METADATA',
  'checkpoint.unproven/_METADATA',
  'checkpoint.unproven-2.orbax-checkpoint-tmp/d/' + 'f' * 32,
  'durable/stage-1.replica-0.snapshots/12/data',
  'durable/stage-1.replica-0.snapshots/12/manifest.json',
  'durable/stage-1.replica-0.snapshots/13.tmp/data',
  'metrics.jsonl',
  'events.jsonl',
  'workers.json',
  'logs/stage-0.log',
  'logs/stage-11.replica-1.log',
  '.moetion-json-ab_0189z',
)
# Also of kinds and names that are nearly those.
OTHERS = (
  'corpus/a.txt',
  'model.safetensors',
  'metrics.jsonl.bak',
  '.moetion-json-settings.bak',
  'checkpoint/notes.txt',
  'checkpoint/d/notes.txt',
  'checkpoint/commit_success.txt.mine',
  'checkpoint.mine/_METADATA',
  'checkpoint-1/_METADATA',
  'checkpoint.orbax-checkpoint-tmp/mine',
  'durable/README',
  'durable/stage-1.replica-0.snapshots/best',
  'durable/stage-1.replica-0.snapshots/12/data.copy',
  'durable/moetion-1/stage-0.replica-0.snapshots/1/data',
  'logs/stage-0.log.gz',
  'logs/tensorboard/events',
)


def _make(folder, names):
  for name in names:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(name)


def _files(folder):
  return sorted(
    str(p.relative_to(folder)) for p in folder.rglob('*') if not p.is_dir()
  )


def test_only_what_a_run_made_is_removed(tmp_path):
  _make(tmp_path, (*OWN, *OTHERS, 'config.json', '.lock'))
  found = own_files.find_run(tmp_path)
  files = [p for p in found.own if not p.is_dir()]
  assert sorted(str(p.relative_to(tmp_path)) for p in files) == sorted(OWN)
  own_files.remove(found)
  assert _files(tmp_path) == sorted((*OTHERS, 'config.json', '.lock'))
  assert all((tmp_path / n).read_text() == n for n in OTHERS)
  assert 'corpus/' in found.others and 'checkpoint/notes.txt' in found.others
  # Folders in which nothing of others is are gone.
  assert not (tmp_path / 'checkpoint' / 'ocdbt.process_0').exists()
  own_files.remove(found)  # what is gone already is no error


def test_nothing_is_left_of_a_run_alone(tmp_path):
  _make(tmp_path, OWN)
  found = own_files.find_run(tmp_path)
  assert found.others == ()
  own_files.remove(found)
  assert list(tmp_path.iterdir()) == []


def test_what_commits_a_checkpoint_goes_first(tmp_path):
  _make(tmp_path, OWN)
  first, second, *_ = own_files.find_run(tmp_path).own
  assert (first.name, second.name) == snapshot_file.COMMIT_NAMES


def test_links_are_removed_and_never_followed(tmp_path):
  run, other = tmp_path / 'run', tmp_path / 'other'
  _make(other, (*OWN, 'text'))
  (run / 'checkpoint').mkdir(parents=True)
  for link, target in (
    ('logs', 'logs'),
    ('durable', 'durable'),
    ('metrics.jsonl', 'text'),
    ('checkpoint/d', 'checkpoint/d'),
    ('checkpoint/_METADATA', 'text'),
    ('data', 'text'),
  ):
    (run / link).symlink_to(other / target)
  own_files.remove(own_files.find_run(run))
  assert [p.name for p in run.iterdir()] == ['data']
  assert _files(other) == sorted((*OWN, 'text'))


def test_names_of_another_kind_are_others(tmp_path):
  for name in ('metrics.jsonl', 'checkpoint/_METADATA', 'logs/stage-0.log'):
    (tmp_path / name).mkdir(parents=True)
  (tmp_path / 'durable').write_text('mine')
  found = own_files.find_run(tmp_path)
  own_files.remove(found)
  assert found.others == (
    'checkpoint/_METADATA/',
    'logs/stage-0.log/',
    'durable',
    'metrics.jsonl/',
  )
  assert (tmp_path / 'durable').read_text() == 'mine'
  assert (tmp_path / 'metrics.jsonl').is_dir()


def test_snapshots_on_disk(tmp_path):
  names = [n for n in OWN if n.startswith('durable/')]
  _make(tmp_path, names)
  folder = tmp_path / 'durable'
  assert own_files.remove_durable(str(folder)) == ()
  assert not folder.exists()
  _make(tmp_path, [*names, 'durable/stage-0.replica-0.snapshots/1/mine'])
  kept = 'stage-0.replica-0.snapshots/1/mine'
  assert own_files.remove_durable(str(folder)) == (str(folder / kept),)
  assert _files(folder) == [kept]
  link = tmp_path / 'link'
  link.symlink_to(folder)
  _make(tmp_path, names)
  assert own_files.remove_durable(str(link)) == ()
  assert len(_files(folder)) == len(names) + 1
  assert own_files.remove_durable('') == ()


def test_a_part_of_the_snapshots_on_disk(tmp_path):
  stage = 'stage-1.replica-0.snapshots'
  own = [f'{stage}/{n}/data' for n in ('3', '4', '5.tmp')]
  others = [f'{stage}/5/notes', f'{stage}/free-0', f'{stage}/mine/data']
  _make(tmp_path, [*own, *others])
  own_files.remove_snapshots(tmp_path, tmp_path / stage / '3')
  assert _files(tmp_path) == sorted([*own[1:], *others])
  own_files.remove_snapshots(tmp_path, tmp_path / stage / 'mine')
  own_files.remove_snapshots(tmp_path, tmp_path / stage / 'free-0')
  assert _files(tmp_path) == sorted([*own[1:], *others])
  own_files.remove_snapshots(tmp_path, tmp_path / stage)
  assert _files(tmp_path) == sorted(others)


def test_the_names_that_a_durable_store_gives(tmp_path):
  """They are in `snapshot_file.TREE`; a new name is added there and here."""
  for suffix in (
    durable_store._TEMPORARY_SUFFIX,
    durable_store._OLD_SUFFIX,
    snapshot_file.REPLACED_SUFFIX,
  ):
    folder = tmp_path / 'stage-0.replica-0.snapshots' / f'7{suffix}'
    folder.mkdir(parents=True)
    (folder / snapshot_file.DATA_NAME).touch()
    (folder / snapshot_file.MANIFEST_NAME).touch()
  assert own_files.remove_durable(str(tmp_path)) == ()
  assert not tmp_path.exists()


@pytest.mark.parametrize(
  ('names', 'expected'),
  [
    ((), []),
    (
      ('corpus.txt', 'logs/mine.log', 'durable/x/y', '.moetion-json-ab_0189z'),
      [],
    ),
    (('checkpoint/anything',), ['checkpoint']),
    (('metrics.jsonl',), ['metrics.jsonl']),
    (('logs/stage-0.log',), ['logs/']),
    (('durable/stage-0.replica-0.snapshots/1/data',), ['durable/']),
    (
      ('config.json', 'events.jsonl', 'workers.json'),
      ['config.json', 'events.jsonl', 'workers.json'],
    ),
  ],
)
def test_what_looks_like_a_run(tmp_path, names, expected):
  _make(tmp_path, names)
  assert own_files.run_names(tmp_path) == expected


def test_what_is_in_the_way(tmp_path):
  way = lambda **kw: own_files.in_the_way(tmp_path, **{'fresh': False, **kw})  # noqa: E731
  _make(tmp_path, OWN)
  assert way() == way(fresh=True) == ''
  other = tmp_path / 'other'
  other.mkdir()
  checkpoint = tmp_path / 'checkpoint'
  checkpoint.rename(tmp_path / 'was')
  checkpoint.symlink_to(other)
  assert 'symbolic link' in way() and way(fresh=True) == ''
  checkpoint.unlink()
  checkpoint.write_text('mine')
  assert way() == way(fresh=True) == 'checkpoint in it is no folder'
  checkpoint.unlink()
  pathlib.Path(tmp_path, 'events.jsonl').unlink()
  pathlib.Path(tmp_path, 'events.jsonl').mkdir()
  assert way() == way(fresh=True) == 'events.jsonl in it is no file'


def test_a_few_names_then_a_count():
  assert own_files.name_some(['a', 'b']) == 'a, b'
  assert own_files.name_some('abcdefghijk') == 'a, b, c, d, e, f, g, h, i, j, k'
  assert own_files.name_some('abcdefghijkl').endswith('i, j and 2 more')
