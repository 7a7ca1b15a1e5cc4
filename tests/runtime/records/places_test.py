"""Paths of settings that lie where a run removes something."""

import os
import re
import subprocess

import pytest

from moetion_jax import errors
from moetion_jax.runtime.checkpoints import file as checkpoint_file
from moetion_jax.runtime.records import places as places_lib, workdir


@pytest.fixture
def here(tmp_path, monkeypatch):
  """A folder with a run `r`, its store `shm/moetion-1`, and other things."""
  for name in (
    'r/config.json',
    'r/metrics.jsonl',
    'r/logs/stage-0.log',
    'r/logs/mine.txt',
    'r/checkpoint/_METADATA',
    'r/checkpoint/mine/_METADATA',
    'r/corpus/a.txt',
    'shm/moetion-1/lock',
    'disk/moetion-1/stage-0.replica-0.snapshots/1/data',
    'text/a.txt',
    'linked/b.txt',
    'old/checkpoint/_METADATA',
    '.hidden/config.json',
  ):
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(name)
  (tmp_path / 'to-r').symlink_to('r')
  (tmp_path / 'to-checkpoint').symlink_to('to-r/checkpoint')
  (tmp_path / 'linked' / 'link.txt').symlink_to('../r/metrics.jsonl')
  (tmp_path / 'r' / 'to-text').symlink_to('../text')
  (tmp_path / 'to-logs').symlink_to(tmp_path / 'r' / 'logs')
  monkeypatch.chdir(tmp_path)
  return tmp_path


def _check(fresh, workdir='r', **fields):
  places_lib.check(
    places_lib.Places(
      **{'workdir': workdir, 'hostmem_dir': 'shm', **fields},
    ),
    of_run=['shm/moetion-1', 'disk/moetion-1'],
    fresh=fresh,
  )


@pytest.fixture
def as_other(tmp_path):
  """Becomes a user who may search `tmp_path`, and not its folder `closed`."""
  if os.geteuid() != 0:
    pytest.skip('only root may be another user')
  (tmp_path / 'closed').mkdir(mode=0o700)
  tmp_path.chmod(0o777)
  before = os.open('.', os.O_RDONLY)
  os.chdir(tmp_path)  # those above it may be closed to others too
  os.seteuid(65534)
  yield
  os.seteuid(0)
  os.fchdir(before)
  os.close(before)


_REFUSED = [
  ('x' * 500, 'File name too long'),
  ('/'.join(['x' * 200] * 25), 'File name too long'),
  ('closed/x', 'Permission denied'),
  ('loop', 'Too many levels of symbolic links'),
]


@pytest.mark.parametrize(('path', 'why'), _REFUSED, ids=lambda x: x[:10])
def test_paths_that_the_system_refuses(here, as_other, path, why):
  """The setting is named, before anything is made or removed."""
  os.symlink('loop', 'loop')
  for name in ('init_from', 'durable_dir', 'hostmem_dir'):
    with pytest.raises(errors.ConfigError, match=why) as error:
      _check(False, **{name: path})
    assert error.value.flag == name and str(error.value.value) == path
  _check(False, compilation_cache_dir=path)  # the run does without


@pytest.mark.parametrize(
  ('path', 'why'),
  [
    *_REFUSED[:3],
    ('/proc/x', 'No such file'),
    ('/dev/null/x', 'Not a directory'),
  ],
  ids=lambda x: x[:10],
)
def test_workdirs_that_the_system_refuses(
  tmp_path, monkeypatch, request, path, why
):
  monkeypatch.chdir(tmp_path)
  os.symlink('loop', 'loop')
  if path.startswith('closed'):
    request.getfixturevalue('as_other')
  folder = workdir.Workdir(path, fresh=False)
  with pytest.raises(errors.ConfigError, match=why) as error:
    folder.lock()
  assert error.value.flag == 'workdir'
  folder.close()
  assert {'loop', 'closed'} >= set(os.listdir('.'))


@pytest.mark.parametrize(('path', 'why'), _REFUSED, ids=lambda x: x[:10])
def test_checkpoints_that_the_system_refuses(as_other, path, why):
  """They are not damaged."""
  os.symlink('loop', 'loop')
  with pytest.raises(errors.ConfigError, match=why) as error:
    checkpoint_file.load_config(path, 'checkpoint')
  assert 'damaged' not in str(error.value)


@pytest.mark.parametrize(
  'init_from',
  [
    'r/checkpoint',
    'r/checkpoint/',
    'r/../r/./checkpoint',
    'to-r/checkpoint',
    'to-checkpoint',
  ],
)
def test_init_from_that_fresh_removes(here, init_from):
  with pytest.raises(errors.ConfigError, match='ELSEWHERE') as caught:
    _check(True, init_from=init_from)
  assert caught.value.flag == 'init_from'
  assert f'mv {here}/r/' in caught.value.reason
  with pytest.raises(errors.ConfigError, match='ELSEWHERE'):
    _check(True, workdir='to-r', init_from=init_from)
  _check(False, init_from=init_from)  # nothing is removed
  _move_out(caught.value.reason)
  _check(True, init_from='elsewhere')


def _move_out(reason):
  """Does what a refusal says: `mv` with a name in place of ELSEWHERE."""
  command = re.search(r'\((mv .*) ELSEWHERE\), and name it there', reason)[1]
  subprocess.run([*command.split(), 'elsewhere'], check=True)


def test_the_whole_workdir_as_a_checkpoint(here):
  with pytest.raises(errors.ConfigError, match='name a place without it'):
    _check(True, init_from='r')
  _check(False, init_from='r')


@pytest.mark.parametrize(
  'fields',
  [
    {'init_from': 'old/checkpoint'},
    {
      'init_from': 'r/checkpoint/mine'
    },  # it stays, as all that others put there
    {'init_from': 'no/such/folder'},
    {'data': 'text'},
    {'data': 'r/corpus'},
    {'data': 'r/corpus/*.txt'},
    {'data': 'r/logs/mine.txt'},
    {'data': 'r/to-text'},
    {'data': 'no/such/*'},
    # Of a folder no hidden file is read.
    {'data': '.', 'workdir': '.hidden', 'hostmem_dir': '.shm'},
    {'durable_dir': 'r'},
    {'durable_dir': 'r/disk'},
    {'durable_dir': 'r/durable'},
    {'durable_dir': 'disk'},
    {'compilation_cache_dir': 'r/cache'},
    {'hostmem_dir': 'r'},
  ],
)
@pytest.mark.parametrize('fresh', [False, True])
def test_what_is_not_in_the_way(here, fields, fresh):
  _check(fresh, **fields)


@pytest.mark.parametrize(
  'data',
  [
    'r/metrics.jsonl',
    'r/config.json',
    'to-r/../to-r/metrics.jsonl',
    'r/*.jsonl',
    'r/**/*.log',
    'r',
    'r/',
    '.',
    'linked',
    'linked/*',
    'linked/link.txt',
    'to-logs',
  ],
)
def test_data_that_fresh_removes(here, data):
  with pytest.raises(errors.ConfigError, match='--fresh removes') as caught:
    _check(True, data=data)
  assert caught.value.flag == 'data' and caught.value.value == data
  if data.rstrip('/') not in ('r', '.'):  # the workdir lies in these
    _check(False, data=data)


def test_data_through_a_link_that_fresh_removes(here):
  """Its target stays, but is not found any more."""
  (here / 'r' / 'events.jsonl').symlink_to('../text/a.txt')
  with pytest.raises(errors.ConfigError, match=f'{here}/r/events.jsonl') as e:
    _check(True, data='r/events.jsonl')
  _move_out(e.value.reason)
  _check(True, data='elsewhere')


@pytest.mark.parametrize('fresh', [False, True])
@pytest.mark.parametrize(
  'fields',
  [
    {'data': 'shm/moetion-1/lock'},
    {'init_from': 'disk/moetion-1/checkpoint'},
    {'durable_dir': 'r/checkpoint'},
    {'durable_dir': 'to-checkpoint/x'},
    {'durable_dir': 'r/logs/x'},
    {'durable_dir': 'shm'},
    {'durable_dir': 'shm/moetion-1'},
    {'hostmem_dir': 'r/checkpoint'},
    {'hostmem_dir': 'r/checkpoint.orbax-checkpoint-tmp'},
    {'compilation_cache_dir': 'to-logs'},
    {'compilation_cache_dir': 'disk/moetion-1/cache'},
  ],
)
def test_what_is_always_in_the_way(here, fields, fresh):
  (flag,) = fields
  with pytest.raises(errors.ConfigError) as caught:
    _check(fresh, **fields)
  assert caught.value.flag == flag
  said = 'name a folder outside', 'must lie elsewhere', 'name it there'
  assert any(words in caught.value.reason for words in said)
  _check(fresh, **{flag: 'old'})


@pytest.mark.parametrize(
  'name, value',
  [('workdir', 'text/r'), ('workdir', 'text'), ('durable_dir', 'text/disk')],
)
def test_what_is_written_among_the_text(here, name, value):
  with pytest.raises(errors.ConfigError, match=f'--{name}=.*--data=text') as e:
    _check(False, **{'data': 'text', name: value})
  assert 'Name a folder outside' in str(e.value)
  _check(False, **{'data': 'text', name: 'old/r'})
  _check(False, **{'data': 'text', name: 'text/.hidden/r'})  # is not read


def test_where_a_path_leads(here):
  stops = lambda path: list(places_lib.stops(path))  # noqa: E731
  assert stops('text/a.txt') == [f'{here}/text/a.txt']
  assert stops('to-checkpoint/mine') == [
    f'{here}/to-checkpoint',
    f'{here}/to-r',
    f'{here}/r/checkpoint/mine',
  ]
  assert stops('r/to-text/../linked') == [
    f'{here}/r/to-text',
    f'{here}/linked',
  ]
  assert stops('to-logs')[-1] == os.path.realpath('to-logs')
  (here / 'loop').symlink_to('loop')
  assert len(stops('loop/x')) < 50
