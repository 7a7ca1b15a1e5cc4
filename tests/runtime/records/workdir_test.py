"""The folder of a run: what it may hold, what --fresh removes, its id."""

import errno
import json
import os
import pathlib
import shutil

import pytest

from launch.lm import settings as run_settings
from launch.offline import scan
from moetion_jax import codec, config as config_lib, errors, job_spec
from moetion_jax.hostmem import run_store, store_folder
from moetion_jax.runtime.hosts import child_process
from moetion_jax.runtime.records import (
  files as record_files,
  held_run,
  own_files,
  run_ids,
  whereabouts,
  workdir,
)
from tests.support import helpers, power

_ENVIRONMENT = {'versions': {'jax': '1'}}
_FOUND_OUT = {
  'data_fingerprint': {'name': 'x', 'blake2b': '1'},
  'environment': _ENVIRONMENT,
}


def _config(**train):
  made = run_settings.make(
    'tiny', model_overrides=[], train_overrides=train, optimizer_overrides={}
  )
  return json.loads(json.dumps(codec.encode(made))) | _FOUND_OUT


_ITERATIONS = _config()['train']['iterations']


def _opened(path, *, fresh=False):
  folder = workdir.Workdir(str(path), fresh=fresh)
  folder.lock()
  return folder


def _die(folder):
  """Gives the locks back as a kill does."""
  for fd in folder.lock_fds:
    os.close(fd)


def _begin(path, hostmem, *, fresh=False, config=None, durable=''):
  """Begins a run; returns what was said and kept."""
  folder = _opened(path, fresh=fresh)
  try:
    folder.check(config or _config())
    said = _settle(folder, hostmem, durable)
    return said, folder.accept(config or _config(), _ENVIRONMENT)
  finally:
    folder.close()


def _settle(folder, hostmem, durable=''):
  """Gives a workdir its id, as a run does; returns what was said."""
  chosen = _ids(folder.path, hostmem, folder.locked_id, durable).choose()
  folder.take_id(chosen.run_id)
  return chosen.note


def _ids(path, hostmem, locked_id='', durable=''):
  return run_ids.RunIds(
    path=path,
    hostmem_dir=str(hostmem),
    locked_id=locked_id,
    durable_dir=durable,
  )


def _held(path):
  """The content of config.json."""
  return json.loads((path / 'config.json').read_text())


def _refused(path, *, fresh, config=None):
  """The reason for which a run does not begin; nothing is changed by that."""
  before = _contents(path)
  folder = _opened(path, fresh=fresh)
  try:
    with pytest.raises(errors.ConfigError) as caught:
      folder.check(config or _config())
  finally:
    folder.close()
  assert _contents(path) == before
  return str(caught.value)


def _goes_on(path, *, fresh=False, config=None):
  """A start there is not refused."""
  folder = _opened(path, fresh=fresh)
  try:
    folder.check(config or _config())
  finally:
    folder.close()


def _move_away(path, tmp_path_factory):
  path.rename(tmp_path_factory.mktemp('away') / 'it')


def _contents(folder):
  return {
    str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None
    for p in sorted(pathlib.Path(folder).rglob('*'))
  }


def _leave_all(path):
  """Makes all that a finished run leaves, beside config.json."""
  for name in (
    'metrics.jsonl',
    'events.jsonl',
    'workers.json',
    'logs/stage-0.log',
    'checkpoint/commit_success.txt',
    'checkpoint/_CHECKPOINT_METADATA',
    'checkpoint/d/' + 'a' * 32,
    'durable/stage-0.replica-0.snapshots/3/data',
  ):
    file = path / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text('of the first run')
  _write_metadata(path, {'moetion_config': {}})  # before there were digests
  _write_last_line(path)


def _write_last_line(path, iteration=_ITERATIONS, digest='the end'):
  line = {'iteration': iteration, 'digest': digest}
  (path / 'metrics.jsonl').write_text(json.dumps(line) + '\n')


def _commit(path, iteration=_ITERATIONS, digest='the end'):
  """Makes a checkpoint that says what it is of, as far as a workdir looks."""
  digests = {'iteration': iteration, 'state': digest}
  (path / 'checkpoint').mkdir(exist_ok=True)
  (path / 'checkpoint' / 'commit_success.txt').touch()
  _write_metadata(path, {'moetion_digests': digests})


def _write_metadata(path, value):
  (path / 'checkpoint' / '_CHECKPOINT_METADATA').write_text(
    json.dumps({'custom_metadata': value})
  )


@pytest.fixture
def hostmem(tmp_path):
  folder = tmp_path / 'shm'
  folder.mkdir()
  return folder


@pytest.fixture
def run(tmp_path, hostmem):
  """A workdir of a run that began."""
  _begin(tmp_path / 'run', hostmem)
  return tmp_path / 'run'


def _store(hostmem, path):
  """The store of a run that was stopped."""
  run_id = held_run.read_id(path)
  store = store_folder.StoreFolder(hostmem, run_id, path)
  store.start()
  store.close()
  return store.path


@pytest.mark.parametrize('left_bytes', [0, 4096, 8192])
def test_a_start_on_a_full_disk(tight, hostmem, left_bytes):
  """It says so and leaves nothing; with room there it begins."""
  helpers.fill(tight, left_bytes)
  with pytest.raises((errors.ConfigError, OSError)) as caught:
    _begin(tight / 'run', hostmem, config=_config() | {'note': 'x' * 8192})
  if isinstance(caught.value, errors.ConfigError):
    assert 'No space left on device; make that possible' in str(caught.value)
    assert [path.name for path in tight.iterdir()] == ['fill']
  else:  # in `accept`: the agent ends the run, as `ending.of_system` says
    assert caught.value.errno == errno.ENOSPC
    names = {path.name for path in (tight / 'run').iterdir()}
    assert names <= {'.lock', 'logs'}
  (tight / 'fill').unlink()
  _begin(tight / 'run', hostmem)


# --- What the folder may hold ------------------------------------------------


@pytest.mark.parametrize('fresh', [False, True])
@pytest.mark.parametrize(
  ('content', 'words'),
  [
    ('{"architectures": ["X"]}', '"architectures"'),
    ('{"preset": "tiny", "model": {}, "train": {}}', 'data_fingerprint'),
    ('{"preset": ', 'damaged'),
    ('[1]', 'no JSON object'),
    ('{}', 'nothing'),
    ('{"train": "foo"}', '"train" in it is "foo", and no object'),
    ('\udcff', 'damaged'),
  ],
)
def test_a_config_of_others(tmp_path, tmp_path_factory, fresh, content, words):
  data = content.encode(errors='surrogateescape')
  (tmp_path / 'config.json').write_bytes(data)
  (tmp_path / 'model.safetensors').write_text('weights')
  reason = _refused(tmp_path, fresh=fresh)
  assert words in reason and '--fresh' not in reason
  assert 'name another --workdir, or move that away first' in reason
  _goes_on(tmp_path / 'another', fresh=fresh)
  _move_away(tmp_path / 'config.json', tmp_path_factory)
  _goes_on(tmp_path, fresh=fresh)


@pytest.mark.parametrize('fresh', [False, True])
@pytest.mark.parametrize(
  'field',
  [
    {'changes': [{}]},
    {'changes': [helpers.make_change()]},
    {'environment': {'versions': []}},
    {'left': []},
  ],
  ids=str,
)
def test_a_field_of_a_run_that_was_edited(run, field, fresh):
  """One stage too many, for instance: an error that names file and field."""
  (run / 'config.json').write_text(json.dumps(_held(run) | field))
  reason = _refused(run, fresh=fresh)
  assert 'config.json in it' in reason and f'"{next(iter(field))}' in reason
  assert '\n' not in reason
  if 'left' not in field:
    with pytest.raises(errors.ConfigError, match='config.json is damaged'):
      scan.read_settings(run)


@pytest.mark.parametrize('missing', [*_FOUND_OUT, 'train'])
def test_every_field_of_a_config_is_needed(tmp_path, missing):
  config = _config()
  del config[missing]
  (tmp_path / 'config.json').write_text(json.dumps(config))
  assert missing in _refused(tmp_path, fresh=True)


def test_a_run_of_another_job(tmp_path, hostmem):
  """It need not have a preset or a model: it is known, and told from others."""
  config = {'name': 'mine', 'train': _config()['train']} | _FOUND_OUT
  _begin(tmp_path / 'run', hostmem, config=config)
  _begin(tmp_path / 'run', hostmem, config=config)
  with pytest.raises(errors.ConfigError, match='other settings .name'):
    _begin(tmp_path / 'run', hostmem, config=config | {'name': 'yours'})


@pytest.mark.parametrize('fresh', [False, True])
@pytest.mark.parametrize(
  'name', ['checkpoint/x', 'metrics.jsonl', 'logs/stage-0.log']
)
def test_files_that_look_like_a_runs(tmp_path, tmp_path_factory, fresh, name):
  (tmp_path / name).parent.mkdir(exist_ok=True)
  (tmp_path / name).write_text('of others')
  reason = _refused(tmp_path, fresh=fresh)
  first = name.split('/')[0]
  assert first in reason and '--fresh' not in reason
  assert 'name another --workdir, or move that away first' in reason
  _move_away(tmp_path / first, tmp_path_factory)
  _goes_on(tmp_path, fresh=fresh)


@pytest.mark.parametrize('fresh', [False, True])
def test_other_files_are_no_obstacle(tmp_path, hostmem, fresh):
  path = tmp_path / 'run'
  for name in ('corpus/a.txt', 'thesis.tex', 'logs/mine'):
    (path / name).parent.mkdir(parents=True, exist_ok=True)
    (path / name).write_text(name)
  _, kept = _begin(path, hostmem, fresh=fresh)
  assert kept == (['logs/mine', 'corpus/', 'thesis.tex'] if fresh else [])
  assert (path / 'thesis.tex').read_text() == 'thesis.tex'
  assert held_run.read_config(path)


def test_what_a_kill_left_of_a_file_that_was_being_written(run, hostmem):
  """A user's own file of nearly that name stays."""
  torn, mine = run / '.moetion-json-abcd1234', run / '.moetion-json-notes.txt'
  torn.write_text('{')
  mine.write_text('')
  _begin(run, hostmem)
  assert not torn.exists() and mine.exists()


def test_another_run(run):
  reason = _refused(run, fresh=False, config=_config(seed=7))
  assert 'train.seed' in reason
  assert 'pass --fresh to remove it, or another --workdir' in reason
  _goes_on(run, fresh=True, config=_config(seed=7))
  _goes_on(run.with_name('another'), config=_config(seed=7))


def test_one_run_at_a_time_whoever_removes_the_lock_file(run, tmp_path):
  """Nor does a start that is refused make another one, with another id."""
  folder = _opened(run)
  (run / '.lock').unlink()
  before = _contents(run)
  with pytest.raises(errors.ConfigError, match='a living run uses it'):
    _opened(run)
  assert _contents(run) == before
  # Nor where the folder was moved to; another one in its place is free.
  run.rename(tmp_path / 'moved')
  with pytest.raises(errors.ConfigError, match='a living run uses it'):
    _opened(tmp_path / 'moved')
  _opened(run).close()
  folder.close()
  _opened(tmp_path / 'moved').close()


def test_a_lock_file_of_others(tmp_path):
  (tmp_path / '.lock').write_text('pid 17')
  with pytest.raises(errors.ConfigError, match=r'\.lock'):
    _opened(tmp_path)
  (tmp_path / '.lock').unlink()
  (tmp_path / 'precious').write_text('')
  (tmp_path / '.lock').symlink_to('precious')
  with pytest.raises(errors.ConfigError):
    _opened(tmp_path)
  assert (tmp_path / 'precious').read_bytes() == b''


def test_an_empty_lock_file_is_no_sign_of_a_run(tmp_path, run):
  """But beside a config.json: earlier versions left it empty."""
  (tmp_path / '.lock').write_bytes(b'')
  with pytest.raises(errors.ConfigError, match=r'\.lock in it is empty.*move'):
    _opened(tmp_path)
  assert (tmp_path / '.lock').read_bytes() == b''
  (tmp_path / '.lock').unlink()
  folder = _opened(tmp_path)  # as the error says
  # A start that is killed at once leaves one that the next start knows.
  assert folder.locked_id and (tmp_path / '.lock').read_bytes()
  folder.close()
  (run / '.lock').write_bytes(b'')
  _opened(run).close()


def test_a_start_that_dies_while_it_makes_the_lock(tmp_path, monkeypatch):
  with monkeypatch.context() as patch:

    def die(*unused):
      raise SystemExit

    patch.setattr(os, 'link', die)
    folder = workdir.Workdir(str(tmp_path), fresh=False)
    with pytest.raises(SystemExit):
      folder.lock()
    _die(folder)
  assert not (tmp_path / '.lock').exists()
  _opened(tmp_path).close()


def test_the_lock_where_there_are_no_hard_links(tmp_path, monkeypatch):
  def refuse(*unused):
    raise PermissionError(errno.EPERM, 'no hard links')

  monkeypatch.setattr(os, 'link', refuse)
  folder = _opened(tmp_path)
  assert folder.locked_id and os.listdir(tmp_path) == ['.lock']
  folder.close()
  assert os.listdir(tmp_path) == []


def test_what_was_locked_for_no_run_leaves_nothing(tmp_path):
  folder = _opened(tmp_path / 'a' / 'b')
  folder.take_id(held_run.new_id())
  folder.close()
  assert list(tmp_path.iterdir()) == []
  folder = _opened(tmp_path)
  folder.close()
  assert list(tmp_path.iterdir()) == []


def test_a_finished_run_is_on_disk_before_its_store_goes(run, tmp_path):
  """As after a death between the checkpoint's rename and the end."""
  with power.disk(tmp_path) as disk:
    path = disk.path / 'run'
    shutil.copytree(run, path)
    folder = _opened(path)
    os.sync()
    _leave_all(path)
    assert folder.is_finished()
    whole = _contents(path)
    folder.sync_finished()
    folder.close()
    disk.cut()
    after = _contents(path)
    for name, content in whole.items():
      if name.startswith(('checkpoint', 'metrics')):
        assert after[name] == content


def test_a_checkpoint_alone_is_no_finished_run(run):
  folder = _opened(run)
  (run / 'checkpoint').mkdir()
  (run / 'checkpoint' / 'notes.txt').write_text('mine')
  assert not folder.is_finished()
  _commit(run)
  assert not folder.is_finished()
  _write_last_line(run)
  assert folder.is_finished() and folder.is_proven()
  (run / 'config.json').unlink()
  assert not folder.is_finished()
  folder.close()


@pytest.mark.parametrize(
  'checkpoint, line, words',
  [
    ((), None, 'ends with iteration 0'),
    ((), (_ITERATIONS - 1,), f'ends with iteration {_ITERATIONS - 1}'),
    ((9,), (), 'it is of iteration 9'),
    ((_ITERATIONS, 'other'), (), 'with digest other'),
  ],
  ids=['no lines', 'not at its end', 'iteration', 'digest'],
)
def test_a_checkpoint_of_another_run_finishes_nothing(
  run, tmp_path_factory, checkpoint, line, words
):
  _commit(run, *checkpoint)
  if line is not None:
    _write_last_line(run, *line)
  reason = _refused(run, fresh=False)
  assert words in reason and 'move that checkpoint away' in reason, reason
  folder = _opened(run)
  assert not folder.is_finished()
  folder.close()
  _goes_on(run, fresh=True)
  _move_away(run / 'checkpoint', tmp_path_factory)
  _goes_on(run)


def test_a_checkpoint_of_before_digests_proves_nothing(run):
  _leave_all(run)
  folder = _opened(run)
  folder.check(_config())
  assert folder.is_finished() and not folder.is_proven()
  folder.close()


@pytest.mark.parametrize(
  'content',
  [
    None,
    '{"custom',
    '[]',
    '{}',
    '[' * 100_000,
    '{"custom_metadata": {"moetion_config": 1, '
    '"moetion_digest~": {}, "moetion_checksum": "x"}}',
  ],
)
def test_damaged_metadata_finish_nothing(run, tmp_path_factory, content):
  _commit(run)
  _write_last_line(run)
  metadata = run / 'checkpoint' / '_CHECKPOINT_METADATA'
  whole = metadata.read_text()
  metadata.unlink() if content is None else metadata.write_text(content)
  folder = _opened(run)
  assert not folder.is_finished()
  folder.close()
  reason = _refused(run, fresh=False)
  assert '_CHECKPOINT_METADATA is missing or damaged' in reason, reason
  _write_last_line(run, digest=None)  # of a version that wrote none
  _goes_on(run)
  _write_last_line(run)
  metadata.write_text(whole)
  _goes_on(run)
  metadata.unlink()
  _move_away(run / 'checkpoint', tmp_path_factory)  # as it says
  _goes_on(run)


def test_a_copy_of_hard_links_writes_nothing_into_the_original(
  run, hostmem, tmp_path
):
  _leave_all(run)
  (run / 'checkpoint' / 'commit_success.txt').unlink()
  before, copy = _contents(run), tmp_path / 'copy'
  shutil.copytree(run, copy, copy_function=os.link)
  living = _opened(run)
  try:  # nor does it wait for the other's lock
    said, _ = _begin(copy, hostmem)
  finally:
    living.close()
  assert 'is a copy of' in said
  record_files.EventsFile(str(copy / 'events.jsonl')).write('start')
  lines = record_files.MetricsFile(str(copy / 'metrics.jsonl'), _ITERATIONS - 1)
  with lines:
    lines.write({'iteration': _ITERATIONS + 1})
  log = child_process.Transcript('stage 0')
  log.open_log(copy / 'logs' / 'stage-0.log')
  log.add(b'of the copy')
  log.close()
  assert _contents(run) == before
  for name in ('.lock', 'config.json', 'events.jsonl'):
    assert (copy / name).read_bytes() != before[name]
  for name in ('metrics.jsonl', 'logs/stage-0.log'):
    now = (copy / name).read_bytes()
    assert now.startswith(before[name]) and now != before[name]


def _longer(path, iterations, extend='pin'):
  """Opens a workdir for a run of more iterations; returns both."""
  folder = workdir.Workdir(str(path), fresh=False, extend=extend)
  folder.lock()
  train = codec.decode(
    config_lib.TrainConfig, _config(iterations=iterations)['train']
  )
  config = _config() | {'train': folder.settings_of(train)}
  return folder, json.loads(json.dumps(config))


@pytest.mark.parametrize('extend', ['pin', 'stretch'])
def test_a_finished_run_goes_on_from_its_checkpoint(run, hostmem, extend):
  _leave_all(run)
  _commit(run)
  last = _ITERATIONS + 20
  with pytest.raises(errors.ConfigError, match='pin.*--extend=stretch'):
    folder, config = _longer(run, last, '')
    try:
      folder.check(config)
    finally:
      folder.close()
  for written in range(3):  # and again, wherever it died
    folder, config = _longer(run, last, extend)
    folder.check(config)
    assert not folder.is_finished()
    assert folder.base == job_spec.Base(
      path=str(run / 'checkpoint'), iteration=_ITERATIONS, digest='the end'
    )
    assert folder.ended_at == (0 if written else _ITERATIONS)
    _settle(folder, hostmem)
    folder.accept(config, _ENVIRONMENT)
    folder.close()
    assert (run / 'checkpoint' / 'commit_success.txt').exists()
    held = _held(run)['train']
    assert held['iterations'] == last
    assert held['optimizer']['decay_iterations'] == (
      _ITERATIONS if extend == 'pin' else last
    )
    with open(run / 'metrics.jsonl', 'a') as lines:
      line = {'iteration': _ITERATIONS + written + 1, 'digest': 'later'}
      lines.write(json.dumps(line) + '\n')
  _write_last_line(run, last, 'the new end')
  _commit(run, last, 'the new end')
  folder, config = _longer(run, last, extend)
  folder.check(config)
  assert folder.is_finished() and folder.base is None
  folder.close()


def test_a_stopped_run_goes_on_to_a_later_end(run, hostmem):
  folder, config = _longer(run, _ITERATIONS + 20)
  folder.check(config)
  assert folder.base is None and not folder.is_finished()
  _settle(folder, hostmem)
  folder.accept(config, _ENVIRONMENT)
  folder.close()
  assert _held(run)['train'] == config['train']


@pytest.mark.parametrize('digest', ['another', None])
def test_what_proves_no_end_is_no_beginning(run, digest):
  """The checkpoint of something else, or one that does not say of what."""
  _leave_all(run)
  if digest:
    _commit(run, digest=digest)
  with pytest.raises(errors.ConfigError, match='digest'):
    folder, config = _longer(run, _ITERATIONS + 20)
    try:
      folder.check(config)
    finally:
      folder.close()


@pytest.mark.parametrize(
  'changed, flag',
  [
    ({'data_fingerprint': {'name': 'x', 'blake2b': '2'}}, '--data='),
    ({'data': '/moved', 'data_fingerprint': {'blake2b': '2'}}, '--data='),
    ({'init_digest': 'y'}, '--init_from='),
    ({'init_from': '/moved', 'init_digest': 'y'}, '--init_from='),
    ({'init_from': '', 'init_digest': ''}, '--init_from='),
  ],
)
def test_what_the_run_reads_has_changed(tmp_path, hostmem, changed, flag):
  known = _config() | {'init_from': '/there', 'init_digest': 'x'}
  _begin(tmp_path, hostmem, config=known)
  reason = _refused(tmp_path, fresh=False, config=known | changed)
  assert reason.startswith(flag) and 'has changed since the run' in reason
  _begin(tmp_path, hostmem, config=known)


def test_what_the_run_reads_has_moved(tmp_path, hostmem):
  known = _config() | {'init_from': '/there', 'init_digest': 'x'}
  _begin(tmp_path, hostmem, config=known)
  moved = {
    'data': './link/to/data',
    'data_fingerprint': {'name': 'data', 'blake2b': '1'},
    'init_from': '/moved',
  }
  folder = _opened(tmp_path)  # as before a worker has read it
  folder.check(
    {k: v for k, v in (known | moved).items() if k not in held_run.FOUND_OUT}
  )
  folder.close()
  _begin(tmp_path, hostmem, config=known | moved)
  assert _held(tmp_path)['data'] == './link/to/data'  # for whoever reads it
  assert _held(tmp_path)['init_from'] == '/moved'
  assert scan.read_settings(tmp_path)[0]['init_from'] == '/moved'
  # It is no other run for that.
  assert 'init_from' in _refused(
    tmp_path, fresh=False, config=_config() | {'init_from': ''}
  )


def test_a_checkpoint_without_digests_may_be_spelled_otherwise(
  tmp_path, hostmem, monkeypatch
):
  path = tmp_path / 'run'
  (tmp_path / 'old').mkdir()
  (tmp_path / 'link').symlink_to(tmp_path / 'old')
  monkeypatch.chdir(tmp_path)
  known = _config() | {'init_from': str(tmp_path / 'old'), 'init_digest': ''}
  _begin(path, hostmem, config=known)
  for spelled in ('old', './old/', 'link'):
    _begin(path, hostmem, config=known | {'init_from': spelled})
  reason = _refused(path, fresh=False, config=known | {'init_from': 'other'})
  assert 'other settings (init_from)' in reason


def test_a_run_of_before_gets_the_digest_of_what_it_began_with(run, hostmem):
  assert 'init_digest' not in _held(run)
  _begin(run, hostmem, config=_config() | {'init_digest': 'x'})
  assert _held(run)['init_digest'] == 'x'
  assert scan.read_settings(run)[1]['init_digest'] == 'x'


# --- What a fresh run removes ------------------------------------------------


def test_fresh_removes_what_is_the_runs_and_when_it_can_begin(run, hostmem):
  _leave_all(run)
  (run / 'checkpoint' / 'notes.txt').write_text('mine')
  first_id = held_run.read_id(run)
  before = _contents(run)
  folder = _opened(run, fresh=True)
  folder.check(_config(seed=7))
  _settle(folder, hostmem)
  assert folder.begins_anew and not folder.is_finished()
  assert _contents(run) == before
  order = []
  folder.remove_elsewhere = lambda: order.append(_contents(run)) or ['x']
  assert folder.accept(_config(seed=7), _ENVIRONMENT) == [
    'checkpoint/notes.txt',
    'x',
  ]
  folder.close()
  assert order == [before]  # the stores go first
  assert sorted(_contents(run)) == [
    '.lock',
    'checkpoint',
    'checkpoint/notes.txt',
    'config.json',
    'logs',
  ]
  assert _held(run)['train']['seed'] == 7
  assert held_run.read_id(run) == first_id


def test_a_death_while_an_earlier_run_is_removed(tmp_path, hostmem):
  """Whatever is gone by then, the run is ours, and --fresh goes on."""
  path, moments = tmp_path / 'run', 1
  moment = 0
  while moment < moments:
    _begin(path, hostmem)
    _leave_all(path)
    (path / 'corpus').write_text('mine')
    own = own_files.find_run(path).own
    moments = len(own) + 1
    own_files.remove(own_files.Found(own=own[:moment]))
    folder = _opened(path)
    folder.check(_config())
    assert folder.is_finished() == (moment == 0)
    folder.close()
    _, kept = _begin(path, hostmem, fresh=True, config=_config(seed=7))
    assert kept == ['corpus']
    names = ['.lock', 'config.json', 'corpus', 'logs']
    assert sorted(p.name for p in path.iterdir()) == names
    (path / 'config.json').unlink()
    moment += 1
  assert moments > 10


def test_fresh_after_a_link_took_the_checkpoints_place(run, hostmem, tmp_path):
  """A finished run whose checkpoint was moved to where there is room."""
  _leave_all(run)
  (run / 'checkpoint').rename(tmp_path / 'elsewhere')
  (run / 'checkpoint').symlink_to(tmp_path / 'elsewhere')
  folder = _opened(run)
  folder.check(_config())
  assert folder.is_finished()
  folder.close()
  moved = _contents(tmp_path / 'elsewhere')
  _begin(run, hostmem, fresh=True)
  assert not os.path.lexists(run / 'checkpoint')
  assert _contents(tmp_path / 'elsewhere') == moved
  (run / 'checkpoint').symlink_to(tmp_path / 'empty')
  assert 'no folder' in _refused(run, fresh=False)
  (tmp_path / 'empty').mkdir()
  assert 'symbolic link' in _refused(run, fresh=False)


# --- The id ------------------------------------------------------------------


def test_the_id_is_found_before_a_run_is_accepted(tmp_path, hostmem):
  """As after a kill -9: nothing was closed."""
  folder = _opened(tmp_path / 'run')
  _settle(folder, hostmem)
  store = store_folder.StoreFolder(hostmem, folder.run_id, folder.path)
  store.start()
  store.close()
  _die(folder)
  again = _opened(tmp_path / 'run')
  _settle(again, hostmem)
  assert again.run_id == folder.run_id
  again.accept(_config(), _ENVIRONMENT)
  again.close()
  assert _held(tmp_path / 'run')['run_id'] == again.run_id


@pytest.mark.parametrize('first', ['run', 'old'])
@pytest.mark.parametrize('tier', ['memory', 'disk', 'elsewhere'])
@pytest.mark.parametrize('fresh', [False, True])
def test_all_that_is_in_a_folder_is_moved_but_its_lock(
  run, hostmem, tmp_path, first, tier, fresh
):
  """`mv run/* old/`: what is stored is of the one that has the config.json."""
  run_id, durable = held_run.read_id(run), ''
  if tier == 'memory':
    (_store(hostmem, run) / 'stage-0.replica-0.segment').write_text('x')
  elif tier == 'disk':
    durable = str(tmp_path / 'disk')
    (tmp_path / 'disk' / f'moetion-{run_id}').mkdir(parents=True)
  old = tmp_path / 'old'
  old.mkdir()
  for path in run.glob('[!.]*'):
    path.rename(old / path.name)
  assert [p.name for p in run.iterdir()] == ['.lock']
  for path in (run, old) if first == 'run' else (old, run):
    folder = _opened(path)
    ids = _ids(path, hostmem, folder.locked_id, durable)
    if path == run:
      chosen = ids.choose_new() if fresh else ids.choose()
      assert chosen.run_id != run_id
      assert not chosen.earlier_id and not chosen.note
    else:
      assert ids.choose().run_id == run_id
      assert 'or a copy, cannot be told' in ids.choose().note
    folder.close()
    _begin(path, hostmem, durable=durable)
  assert held_run.read_id(old) == run_id != held_run.read_id(run)


def test_the_id_goes_with_the_folder(run, hostmem, tmp_path, monkeypatch):
  run_id = held_run.read_id(run)
  _store(hostmem, run)

  def check(path):
    said, _ = _begin(path, hostmem)
    assert not said and held_run.read_id(path) == run_id

  (tmp_path / 'link').symlink_to('run')
  check(tmp_path / 'link')
  check(run)
  monkeypatch.chdir(run)
  check('.')
  check('../link')
  monkeypatch.chdir(tmp_path)
  moved = tmp_path / 'deep' / 'moved'
  moved.parent.mkdir()
  run.rename(moved)
  check(moved)
  assert _held(moved)['workdir'] == str(moved)
  again = tmp_path / 'again'
  moved.rename(again)
  # Another run is now where it was.
  _begin(moved, hostmem)
  assert held_run.read_id(moved) != run_id
  check(again)


@pytest.mark.parametrize('where', ['another file system', 'its place'])
def test_what_cannot_be_told_from_a_copy_is_the_run_and_that_is_told(
  run, hostmem, tmp_path, shm_folder, where
):
  """Across file systems a folder is copied and then removed."""
  run_id, target = held_run.read_id(run), shm_folder / 'run'
  assert target.parent.stat().st_dev != run.stat().st_dev
  shutil.copytree(run, target)
  if where == 'its place':
    run.rename(tmp_path / 'kept')  # so that its inode is in use
    target = run
    shutil.copytree(shm_folder / 'run', run)
  else:
    shutil.rmtree(run)
  said, _ = _begin(target, hostmem)
  assert 'or a copy, cannot be told' in said and str(run) in said
  assert held_run.read_id(target) == run_id
  said, _ = _begin(target, hostmem)
  assert not said


@pytest.mark.parametrize('has_store', [False, True])
@pytest.mark.parametrize('first', ['try', 'keep'])
def test_a_copy_of_a_run_that_was_moved(
  run, hostmem, tmp_path, first, has_store
):
  """`cp -r run try; mv run keep`: the moved one is the run."""
  run_id = held_run.read_id(run)
  if has_store:
    _store(hostmem, run)
  shutil.copytree(run, tmp_path / 'try')
  run.rename(tmp_path / 'keep')
  for name in (first, {'try': 'keep', 'keep': 'try'}[first]):
    said, _ = _begin(tmp_path / name, hostmem)
    if name == 'keep':
      assert not said and held_run.read_id(tmp_path / name) == run_id
      continue
    assert f'is a copy of the folder that was {run}' in said
    assert held_run.read_id(tmp_path / name) not in ('', run_id)
    said, _ = _begin(tmp_path / name, hostmem)
    assert not said


def test_a_copy_in_the_place_of_a_run_that_was_moved(run, hostmem, tmp_path):
  """The moved one is begun first, and keeps its id."""
  run_id = held_run.read_id(run)
  _store(hostmem, run)
  run.rename(tmp_path / 'keep')
  shutil.copytree(tmp_path / 'keep', run)
  said, _ = _begin(tmp_path / 'keep', hostmem)
  assert not said and held_run.read_id(tmp_path / 'keep') == run_id
  _store(hostmem, tmp_path / 'keep')
  said, _ = _begin(run, hostmem)
  assert f'copy of {tmp_path}/keep' in said
  assert held_run.read_id(run) != run_id


@pytest.mark.parametrize('has_store', [False, True])
@pytest.mark.parametrize('fresh', [False, True])
def test_a_copy_gets_an_id_of_its_own(run, hostmem, tmp_path, has_store, fresh):
  run_id, copy = held_run.read_id(run), tmp_path / 'copy'
  if has_store:
    _store(hostmem, run)
  shutil.copytree(run, copy)
  assert _ids(copy, hostmem).find_original(run_id).original == str(run)
  living = _opened(run)  # it does not matter whether the original lives
  said, _ = _begin(copy, hostmem, fresh=fresh)
  living.close()
  assert f'copy of {run}' in said
  own_id = held_run.read_id(copy)
  assert own_id not in ('', run_id)
  assert held_run.read_id(run) == run_id
  for path, expected in ((run, run_id), (copy, own_id)):
    said, _ = _begin(path, hostmem)
    assert not said and held_run.read_id(path) == expected


def test_a_copy_keeps_its_new_id_through_a_kill(run, hostmem, tmp_path):
  copy = tmp_path / 'copy'
  shutil.copytree(run, copy)
  folder = _opened(copy)
  assert _settle(folder, hostmem)
  _die(folder)
  said, _ = _begin(copy, hostmem)
  assert not said and held_run.read_id(copy) == folder.run_id


def test_a_copy_of_a_run_that_had_not_begun(hostmem, tmp_path):
  first = _opened(tmp_path / 'run')
  _settle(first, hostmem)
  store = store_folder.StoreFolder(hostmem, first.run_id, first.path)
  store.start()
  shutil.copytree(first.path, tmp_path / 'copy')
  said, _ = _begin(tmp_path / 'copy', hostmem)
  assert not said  # there is nothing to do again
  assert held_run.read_id(tmp_path / 'copy') != first.run_id
  store.remove()
  first.close()


@pytest.mark.parametrize('spelling', ['run', 'link'])
@pytest.mark.parametrize('tier', ['shm', 'disk'])
def test_a_run_of_a_version_that_stored_no_id(
  run, hostmem, tmp_path, spelling, tier
):
  (run / '.lock').write_text('')
  (run / 'config.json').write_text(json.dumps(_config()))
  (tmp_path / 'link').symlink_to('run')
  run_id = run_store.former_id(tmp_path / 'run')
  (tmp_path / tier).mkdir(exist_ok=True)
  (tmp_path / tier / f'moetion-{run_id}').mkdir(mode=0o700)
  _begin(tmp_path / spelling, hostmem, durable=str(tmp_path / 'disk'))
  assert _held(run)['run_id'] == run_id
  run.rename(tmp_path / 'moved')
  _begin(tmp_path / 'moved', hostmem)
  assert held_run.read_id(tmp_path / 'moved') == run_id


def test_a_run_of_that_version_which_left_nothing(run, hostmem):
  (run / '.lock').write_text('')
  (run / 'config.json').write_text(json.dumps(_config()))
  _begin(run, hostmem)
  assert held_run.read_id(run) not in ('', run_store.former_id(run))


def test_settings_are_read_without_the_id(run):
  config, found_out = scan.read_settings(run)
  assert config.keys() | found_out.keys() == _config().keys()


def test_a_run_that_begins_anew_has_an_id_of_its_own(run, hostmem, tmp_path):
  """Nothing that the earlier one left, wherever, can be taken for its own."""
  earlier = held_run.read_id(run)
  (hostmem / f'moetion-{earlier}').mkdir(mode=0o700, exist_ok=True)
  new = _ids(run, hostmem, earlier).choose_new()
  assert new.earlier_id == earlier != new.run_id and not new.note
  # The same command after a death before it was accepted: the same store.
  store_folder.StoreFolder(hostmem, new.run_id, run).start()
  again = _ids(run, hostmem, new.run_id).choose_new()
  assert again.run_id == new.run_id
  # The store of a folder that is elsewhere stays, and goes with that one.
  shutil.copytree(run, tmp_path / 'copy')
  run.rename(tmp_path / 'kept')
  copy = _ids(tmp_path / 'copy', hostmem, earlier).choose_new()
  assert copy.run_id != earlier and not copy.earlier_id
  assert f'copy is a copy of the folder that was {run}' in copy.note
  kept = _ids(tmp_path / 'kept', hostmem, earlier).choose_new()
  assert kept.earlier_id == earlier and not kept.note


def test_a_run_of_before_the_id_was_stored_that_begins_anew(run, hostmem):
  """It left nothing: there is no store, and none is looked for."""
  (run / '.lock').write_text('')
  (run / 'config.json').write_text(json.dumps(_config()))
  new = _ids(run, hostmem).choose_new()
  assert new.run_id and not new.earlier_id


def test_the_places_of_a_run_are_recorded(run, hostmem, tmp_path):
  """Each start records its own, and what it leaves; a copy has none of that."""
  for name in ('a', 'b'):
    folder = _opened(run)
    folder.check(_config())
    _settle(folder, hostmem)
    folder.whereabouts = whereabouts.Whereabouts(
      hostmem_dir=f'/{name}', on_disk='durable' if name == 'a' else ''
    )
    folder.accept(_config(), _ENVIRONMENT)
    folder.close()
  held = _held(run)
  assert held['hostmem_dir'] == '/b' and held['on_disk'] == ''
  assert held['left'] == {'hostmem_dir': {'/a': 0}, 'on_disk': {'durable': 0}}
  assert held['folder'] == [run.stat().st_dev, run.stat().st_ino]
  shutil.copytree(run, tmp_path / 'copy')
  folder = _opened(tmp_path / 'copy')
  folder.check(_config())
  assert 'copy of' in _settle(folder, hostmem)
  folder.close()
  held = _held(tmp_path / 'copy')
  assert held['hostmem_dir'] == '' and held['left'] == {
    'on_disk': {'durable': 0}
  }
