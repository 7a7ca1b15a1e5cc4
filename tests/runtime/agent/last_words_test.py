"""A run tells at its end of the one that it was to replace."""

import functools
import importlib
import json
import os
import pathlib
import pkgutil
import re
import selectors
import shutil
import signal

import numpy as np
import pytest

import moetion_jax
from moetion_jax import codec, errors, keys
from moetion_jax.hostmem import store_folder
from moetion_jax.policies import planner, settings as capture_settings
from moetion_jax.policies.kinds import registry
from moetion_jax.recovery import actions, failures, notices, plan
from moetion_jax.runtime import faults, messages
from moetion_jax.runtime.agent import (
  executor,
  last_words,
  provisions,
  settings as agent_settings,
)
from moetion_jax.runtime.hosts import (
  child_process,
  crew as crew_lib,
  hosts as hosts_lib,
  remote_host,
  stores,
)
from moetion_jax.runtime.records import (
  files,
  held_run,
  merge,
  recorder,
  workdir,
)
from tests.support import helpers, power


@pytest.fixture
def folder(tmp_path):
  """The workdir of a run that is to begin anew, locked."""
  run = workdir.Workdir(str(tmp_path / 'run'), fresh=True)
  run.lock()
  run.take_id(held_run.new_id())
  found_out = {'data_fingerprint': {}, 'environment': {}}
  config = codec.encode(helpers.micro_run()) | found_out
  (run.path / 'config.json').write_text(json.dumps(config))
  (run.path / 'events.jsonl').write_text('')
  yield run
  run.close()


def _executor(tmp_path, folder, record=None, workers=()):
  """Makes an executor of a run with stores, and with workers where told."""
  job = helpers.micro_run().job_spec()
  where = agent_settings.AgentSettings(
    workdir=str(folder.path),
    fresh=True,
    captures=capture_settings.CaptureSettings(
      policy=registry.of_name('sparse')
    ),
  )
  store = store_folder.StoreFolder(tmp_path, 'store')
  hosts = hosts_lib.Hosts(job.train.stages, 1, store)
  crew = crew_lib.Crew(
    job,
    hosts,
    selectors.DefaultSelector(),  # nobody is started
    provisions.worker_spec(job, where, folder, store, ''),
    faults.FaultBook([]),
    ((), ()),
  )
  one = executor.Executor(
    where,
    folder,
    hosts,
    crew,
    stores.Stores(1, 1, hosts, str(tmp_path / 'durable')),
    record or recorder.Recorder(job, folder, recorder.View()),
  )
  crew.workers.update(workers)
  one.keep(True)
  return one


@pytest.mark.parametrize('is_removed', [False, True])
@pytest.mark.parametrize('is_failure', [False, True])
def test_what_it_says_of_the_earlier_run_is_true(
  tmp_path, folder, is_removed, is_failure
):
  """An end after the removal, but before anybody trains."""
  one = _executor(tmp_path, folder)
  if is_removed:

    def remove():
      # A file cannot take its place: the beginning ends there.
      (folder.path / 'config.json').unlink()
      (folder.path / 'config.json').mkdir()
      return ()

    folder.remove_elsewhere = remove
    with pytest.raises(IsADirectoryError):
      folder.accept(codec.encode(helpers.micro_run()), {})
  assert (folder.path / 'events.jsonl').exists() == (not is_removed)
  if is_failure:
    one.fail(errors.StoreError('full'))
  else:
    one.do(actions.Stop())
    assert one.result[0] == errors.ExitCode.STOPPED
  said = ' '.join(one.last_words)
  assert ('Nothing of the earlier run was removed.' in said) != is_removed
  assert ('he same command starts over.' in said) == is_removed


@pytest.mark.timeout(60)
def test_a_disk_too_full_for_the_logs_hides_no_end(tmp_path, folder, capfd):
  workers = {}
  for stage in range(2):
    worker = workers[stage, 0] = child_process.WorkerProcess(stage)
    worker.start(helpers.worker_spec(helpers.micro_run()), {}, ())
    worker.open_log(pathlib.Path('/dev/full'))
    helpers.print_as(worker, 'last words')
  one = _executor(tmp_path, folder, workers=workers)
  one.fail(errors.StoreError('full'))
  assert [w.exit_code for w in workers.values()] == [-signal.SIGKILL] * 2
  assert one.last_words[0] == 'The run ended: full'
  shown = capfd.readouterr().err
  assert '[stage 0] last words\n[stage 1] last words\n' in shown


# ---- every end, and what the same command does after it ----------------------

_GOES_ON = (
  'he same command goes on from the snapshots in S; --fresh, or removing them, '
  'starts over.'
)
_STARTS_OVER = 'he same command starts over.'
_STOPPED, _STAYS = 'T', 'Once the cause is gone, t'


@pytest.mark.parametrize(
  ('cause_stays', 'stores', 'has_begun', 'starts_over', 'is_removed', 'says'),
  [
    (False, 'S', True, False, False, _STOPPED + _GOES_ON),
    (False, 'S', False, False, False, _STOPPED + _GOES_ON),
    (False, '', True, False, False, _STOPPED + _STARTS_OVER),
    (False, '', False, False, False, ''),
    (False, 'S', True, True, True, _STOPPED + _GOES_ON),
    (False, 'S', False, True, True, _STOPPED + _STARTS_OVER),
    (False, 'S', False, True, False, 'Nothing of the earlier run was removed.'),
    (False, '', False, True, False, ''),
    (True, 'S', True, False, False, _STAYS + _GOES_ON),
    (True, 'S', False, False, False, _STAYS + _GOES_ON),
    (True, '', True, False, False, _STAYS + _STARTS_OVER),
    (True, '', False, False, False, ''),
    (True, 'S', False, True, True, _STAYS + _STARTS_OVER),
    (True, 'S', False, True, False, 'Nothing of the earlier run was removed.'),
  ],
)
def test_what_the_same_command_does(
  cause_stays, stores, has_begun, starts_over, is_removed, says
):
  assert says == last_words.how_to_go_on(
    stores,
    has_begun=has_begun,
    starts_over=starts_over,
    is_removed=is_removed,
    cause_stays=cause_stays,
  )


def test_a_run_that_is_trained_longer_goes_on_from_its_checkpoint():
  situation = {'starts_over': False, 'is_removed': False, 'cause_stays': False}
  says = functools.partial(last_words.how_to_go_on, has_begun=True, **situation)
  assert 'goes on from the snapshots in S;' in says('S', 'C')
  assert says('', 'C') == (
    'The same command goes on from C; --fresh starts over.'
  )
  # It has changed nothing yet.
  assert not last_words.how_to_go_on('', 'C', has_begun=False, **situation)


_NAN = errors.NonFiniteError('the loss is NaN', 'lower --learning_rate')


_ENDS = [
  # In the order in which a run can meet them.
  (failures.WorkerError(0, 0, 'was killed by SIGABRT'), False),
  (errors.MoetionError('two workers compute with other libraries'), False),
  (errors.StoreError('metrics.jsonl:3 is damaged'), False),
  (_NAN, False),
  (errors.EntryMismatchError('other bits'), False),
  (errors.NoRoomError('host memory is full'), False),
  (errors.DamagedDiskError('read back otherwise, twice'), False),
  (files.MetricsMismatchError('not the run that wrote it'), False),
  (merge.ReplicaMismatchError('silent data corruption'), True),
  (plan.UnrecoverableError('nothing is left to start from'), False),
  (failures.HangError('every stage waits'), False),
  (failures.NoReplacementError('--policy=none'), True),
  (errors.UnmetError('the world did not come together, again'), True),
  (hosts_lib.StoreGoneError('store-host1: was removed'), True),
  (remote_host.HostError('host-1: it cannot be used'), False),
  (remote_host.HostDiedError('host-1: its agent was killed'), True),
  (
    failures.WorkerError(
      0, 5, 'nobody', cause=failures.NoReplacementError('replaces it')
    ),
    True,
  ),
  (errors.StoreError('w: No space left; make that possible'), False),
  (errors.SystemRefusalError('Too many open files: raise the limit'), False),
]


@pytest.mark.parametrize(
  ('error', 'is_passing'),
  _ENDS,
  ids=lambda x: type(x).__name__ if isinstance(x, Exception) else None,
)
def test_every_end_of_a_run(tmp_path, folder, error, is_passing):
  """Only where its cause is gone is the same command said to go on."""
  one = _executor(tmp_path, folder)
  one.has_begun = True
  one.fail(error)
  ended, how = one.last_words
  assert ended == f'The run ended: {error}'
  is_hang = isinstance(error, failures.HangError)
  code = errors.ExitCode.HUNG if is_hang else errors.ExitCode.FAILED
  assert one.result[0] == code
  assert ('Once the cause is gone, the same' in how) == (not is_passing)
  assert ('The same command goes on' in how) == is_passing


@pytest.mark.parametrize('is_moved', [True, False])
def test_a_workdir_that_is_gone(tmp_path, folder, is_moved):
  """Whichever file is missed, the folder is named, and what to do."""
  one = _executor(tmp_path, folder)
  one.has_begun = True
  moved = tmp_path / 'moved'
  folder.path.rename(moved)
  if not is_moved:
    shutil.rmtree(moved)
  missed = FileNotFoundError(2, 'No such file', str(folder.path / 'x'))
  one.fail(last_words.of_system(missed, folder))
  ended, how = one.last_words
  if is_moved:
    assert f'{folder.path}: was moved to {moved}' in ended
    assert f'--workdir={moved}' in ended
    assert 'Once the cause is gone, the same command goes on' in how
  else:
    assert f'{folder.path}: was removed' in ended
    durable = tmp_path / 'durable'
    assert how.startswith(f'Without that nothing goes on from {durable}')
    assert how.endswith('The same command starts over.')
  folder.path.mkdir()  # what somebody else makes in its place is left alone
  with pytest.raises(errors.StoreError, match='was moved|was removed'):
    folder.check_in_place()
  assert not os.listdir(folder.path)
  full = OSError(28, 'No space left on device', str(folder.path / 'x'))
  folder.path.rmdir()
  if is_moved:
    moved.rename(folder.path)  # as the error says
    folder.check_in_place()
    assert str(folder.path) in str(last_words.of_system(full, folder))


def test_the_readme_lists_every_exit_code():
  text = (helpers.ROOT / 'README.md').read_text()
  _, table = text.split('| exit code | what | start the same command again? |')
  listed = re.findall(r'^\| (\d+) \|', table.split('\n\n')[0], re.MULTILINE)
  assert sorted(map(int, listed)) == sorted(errors.ExitCode)


def test_what_names_no_file_is_not_blamed_on_the_workdir(folder):
  said = str(last_words.of_system(OSError(32, 'Broken pipe'), folder))
  assert str(folder.path) not in said and 'Broken pipe' in said


def test_each_error_has_its_row():
  """One that is added is to be thought about: is its cause gone?"""
  for module in pkgutil.walk_packages(moetion_jax.__path__, 'moetion_jax.'):
    importlib.import_module(module.name)
  kinds = {errors.MoetionError}
  while more := {c for k in kinds for c in k.__subclasses__()} - kinds:
    kinds |= more
  left = kinds - {type(error) for error, _ in _ENDS}
  names = {k.__name__ for k in left if k.__module__.startswith('moetion_jax')}
  # What is refused is no end; of the others a worker dies, and a `WorkerError`
  # says so, or they stay in the worker, or in a user's own loop.
  assert names <= {
    'ConfigError',
    'DamagedError',
    'DivergedError',
    'EntryCorruptError',
    'EntryDecayedError',
    'FencedError',
    'InterruptedStoreError',
    'NotExactError',
    'ReplayMismatchError',
    'SegmentFullError',
    'SelectionError',
    'SnapshotCorruptError',
    'SnapshotFullError',
    'SnapshotLostError',
    'StopHereError',
    'WrongBitsError',
    '_OtherStateError',
  }


@pytest.mark.parametrize(
  ('action', 'message'),
  [
    # A checkpoint alone says that a run is finished, whoever died beside it.
    (actions.Save(worker=(0, 0), iteration=1, replicas=((0,),)), messages.Save),
    # Snapshots that a worker removes then are those of earlier lines.
    (actions.MoveLine(kept_from=1, entry_line=1), messages.Line),
  ],
  ids=['a checkpoint', 'a line on disk'],
)
def test_lines_are_on_disk_before_what_needs_them(tmp_path, action, message):
  with power.disk(tmp_path) as disk:
    folder = workdir.Workdir(str(disk.path / 'run'), fresh=False)
    folder.lock()
    os.sync()
    operator = keys.OperatorId('head')
    ready = notices.Ready(
      device='',
      platform='cpu',
      lowering_platform='cpu',
      state_bytes=0,
      operators=planner.StageSizes(
        state_bytes={operator: 0},
        compute_bytes={},
        gradient_bytes={},
        device={},
      ),
      environment={},
      data_fingerprint={},
    )
    job = helpers.micro_run().job_spec()
    saver = child_process.WorkerProcess(0)
    told, saver._control_fd = os.pipe()
    saver._sender.start()
    with recorder.Recorder(job, folder, recorder.View()) as record:
      record.accept({(0, 0): ready}, {})
      digests = {operator: np.zeros(2, np.uint32)}
      record.add(helpers.make_report(1, loss=1.0, digests=digests), [[0]])
      one = _executor(tmp_path, folder, record, {(0, 0): saver})
      one.do(action)
    assert isinstance(
      messages.unpack(messages.ToWorker, os.read(told, 1 << 16)), message
    )
    os.close(told)
    saver.close()
    folder.close()
    disk.cut()
    assert list(files.read_lines(folder.path / 'metrics.jsonl')) == [1]
