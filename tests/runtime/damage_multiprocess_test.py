"""Runs in which log entries are damaged, before or after they were verified.

Every run is compared, iteration for iteration, with one that nothing happened
to. What is damaged before it is read is found by its reader; what is damaged
after that shows by a NaN, or when the entry is verified once more.
"""

import contextlib
import os
import pathlib
import shutil
import signal

import pytest
from orbax import checkpoint as ocp

from moetion_jax import keys
from moetion_jax.hostmem import entry, segment, segment_reader
from moetion_jax.runtime import linux_process
from moetion_jax.runtime.worker import fault_damage
from moetion_jax.snapshots import file as snapshot_file, folders
from tests.support import helpers, runs, worlds

STAGES = 3
ITERATIONS = 12
SECONDS = 240.0

pytestmark = [pytest.mark.thorough, pytest.mark.timeout(600)]


_WINDOW = '--window_length=2'
_DENSE = '--policy=dense'


_train = runs.trainer(STAGES, ITERATIONS, default_flags=[_WINDOW])


@pytest.fixture(scope='module')
def undisturbed(tmp_path_factory):
  """The workdir of a run that nothing happened to."""
  return runs.undisturbed_run(tmp_path_factory, _train, ITERATIONS, SECONDS)


def _check(host, workdir, undisturbed):
  """It ended with all bits of the undisturbed run, those of the checkpoint."""
  runs.check_finished(host, workdir, runs.bits(runs.metrics(undisturbed)))
  found, expected = (
    helpers.bits_of(ocp.StandardCheckpointer().restore(path / 'checkpoint'))
    for path in (workdir, undisturbed)
  )
  assert found == expected


def _found(workdir):
  """Stage and iteration of damaged entries that a check of all logs found."""
  events = runs.of_kind(workdir, 'damage_found')
  return {(e['stage'], e['iteration']) for e in events}


# ---- before it is read -------------------------------------------------------


def _damage_header(path, key):
  """So that nobody finds the entry any more."""
  with segment_reader.SegmentReader.open(path) as reader:
    (header,) = [h for h in reader.entries() if h.key == key]
  with open(path, 'r+b') as file:
    cells = segment.SegmentLayout(file.fileno(), writable=False).cells
    file.seek(segment.cell_offset(header.sequence % cells))
    file.seek(entry.ITERATION_OFFSET, os.SEEK_CUR)
    file.write(b'\x7f')


def _damage_generation(path, key):
  """By one bit, so that it is newer than any."""
  del key  # all entries are lost
  with open(path, 'r+b') as file:
    file.seek(31)
    (byte,) = file.read(1)
    file.seek(31)
    file.write(bytes([byte ^ 0x40]))


def _damage_unread(host, workdir, run, reader, key, damage, stops_agent=True):
  """Damages an entry whose reader is stopped before it can read it."""

  def stopped():
    pids = [w['pid'] for w in runs.workers(workdir) if w['stage'] == reader]
    return next((p for p in pids if linux_process.is_stopped(p)), None)

  runs.until(run, 'iteration 2/')
  if stops_agent:  # it would take a stopped worker for one that hangs
    os.kill(run.pid, signal.SIGSTOP)
  pid = runs.wait_for(stopped, SECONDS)
  name = segment.segment_path('', key.stage, key.replica).name

  def published():
    for path in pathlib.Path(host.path).glob(f'*/{name}'):
      if segment_reader.StoreIndex(path.parent).take(key):
        return path
    return None

  damage(runs.wait_for(published, SECONDS), key)
  with contextlib.suppress(ProcessLookupError):
    os.kill(pid, signal.SIGCONT)
  os.kill(run.pid, signal.SIGCONT)


_TWO = '--local_hosts=2'
_ACTIVATION = keys.EntryKey(6, 0, 0, keys.EntryKind.ACTIVATION, 0)
_EVALUATION = keys.EntryKey(6, 0, 0, keys.EntryKind.EVALUATION, 0)
_TO_ANOTHER_HOST = keys.EntryKey(6, 1, 0, keys.EntryKind.ACTIVATION, 0)


@pytest.mark.parametrize(
  ('key', 'phase', 'flags'),
  [
    pytest.param(_ACTIVATION, 'forward', [_WINDOW], id='activation'),
    pytest.param(_EVALUATION, 'update', [_WINDOW], id='evaluation'),
    pytest.param(_ACTIVATION, 'forward', [_DENSE], id='dense'),
    pytest.param(
      _TO_ANOTHER_HOST, 'forward', [_WINDOW, _TWO], id='on another host'
    ),
  ],
)
def test_before_its_first_read(host, workdir, undisturbed, key, phase, flags):
  """Its reader finds that; it and the sender do the iteration again."""
  reader = key.stage + 1
  fault = f'stop:stage={reader},iteration=6,phase={phase}'
  run = _train(host, workdir, fault, flags=flags)
  _damage_unread(
    host, workdir, run, reader, key, fault_damage.damage_entry,
    # The first host's agent also serves what others read.
    stops_agent=_TWO not in flags,
  )  # fmt: skip
  runs.end(run, seconds=SECONDS)
  _check(host, workdir, undisturbed)
  failures = runs.of_kind(workdir, 'failure')
  assert {e['stage'] for e in failures} == {reader}
  assert str(key) in failures[-1]['error']
  assert len(failures) == 1 or _TWO in flags
  started = {e['stage'] for e in runs.of_kind(workdir, 'recovery_started')}
  assert started == (set(range(STAGES)) if _DENSE in flags
                     else {reader - 1, reader})  # fmt: skip
  assert not _found(workdir)


@pytest.mark.parametrize(
  ('damage', 'found'),
  [
    (_damage_header, {(0, 5)}),  # the iteration of the entry before it
    (_damage_generation, set()),  # its writer sees that: the log is lost
  ],
)
def test_an_entry_that_is_lost_before_its_first_read(
  host, workdir, undisturbed, damage, found
):
  """Everybody waits for it, until the logs are checked."""
  run = _train(host, workdir, 'stop:stage=1,iteration=6,phase=forward')
  _damage_unread(host, workdir, run, 1, _ACTIVATION, damage)
  runs.end(run, seconds=SECONDS)
  _check(host, workdir, undisturbed)
  assert _found(workdir) == found


def test_replicas_before_its_first_read(host, workdir, tmp_path):
  runs.end(worlds.train(host, tmp_path / 'undisturbed'), seconds=SECONDS)
  run = worlds.train(
    host, workdir, 'stop:stage=1,replica=0,iteration=6,phase=forward'
  )
  _damage_unread(host, workdir, run, 1, _ACTIVATION, fault_damage.damage_entry)
  runs.end(run, seconds=SECONDS)
  _check(host, workdir, tmp_path / 'undisturbed')
  (failure,) = runs.of_kind(workdir, 'failure')
  assert str(_ACTIVATION) in failure['error']


def test_files_that_are_cut_or_removed(host, workdir, undisturbed):
  """Each is lost at once: no stage fails twice before it gets on."""
  run = _train(host, workdir, flags=[_WINDOW, '--max_failures=1'])
  # Early: a fast run that is nearly over may end before it notices.
  for iteration, stage, left in ((2, 0, 0.5), (3, 1, None), (4, 2, 0)):
    runs.until(run, f'iteration {iteration}/')
    (store,) = host.path.glob('moetion-*')
    snapshots = snapshot_file.list_snapshots(
      folders.snapshots_folder(store, stage, 0)
    )
    # The newest, so that nobody removes it meanwhile: an older one serves.
    newest = snapshots[max(snapshots)] / snapshot_file.DATA_NAME
    os.truncate(newest, newest.stat().st_size // 2)
    log = segment.segment_path(store, stage, 0)
    if left is None:
      log.unlink()
    else:
      os.truncate(log, int(log.stat().st_size * left))
  _, err = runs.end(run, seconds=SECONDS)
  _check(host, workdir, undisturbed)
  assert 'defect' not in err
  failures = runs.of_kind(workdir, 'failure')
  for stage in range(STAGES):
    (first, *_) = [e['error'] for e in failures if e['stage'] == stage]
    assert 'cut or removed' in first or 'SIGBUS' in first, first


@pytest.mark.soak
@pytest.mark.parametrize('flag', [_WINDOW, _DENSE])
def test_a_store_and_the_logs_of_output_that_are_removed(
  host, workdir, undisturbed, flag
):
  """Once they are lost, all begin anew: no stage fails a second time."""
  run = _train(host, workdir, flags=[flag, '--max_failures=1'])
  runs.until(run, 'iteration 6/')
  (store,) = host.path.glob('moetion-*')
  shutil.rmtree(workdir / 'logs')
  store.rename(tmp := host.path / 'removed')  # at once, unlike the next line
  shutil.rmtree(tmp)
  runs.end(run, seconds=SECONDS)
  _check(host, workdir, undisturbed)
  (lost,) = runs.of_kind(workdir, 'store_lost')
  assert lost['path'] == str(store)
  started = runs.of_kind(workdir, 'recovery_started')
  assert {e['stage'] for e in started} == set(range(STAGES))
  assert {e['first_iteration'] for e in started} == {1}
  assert os.listdir(workdir / 'logs')


@pytest.mark.soak
def test_a_store_of_several_hosts_that_is_removed(host, workdir, undisturbed):
  """The run ends at once, and the same command does all again."""
  run = _train(host, workdir, flags=[_WINDOW, _TWO])
  runs.until(run, 'iteration 6/')
  (store,) = host.path.glob('moetion-*-host1')
  shutil.rmtree(store)
  _, err = runs.end(run, 1, seconds=SECONDS)
  assert f'{store}: was removed while its run lived' in err
  assert err.splitlines()[-1] == 'The same command starts over.'
  runs.end(_train(host, workdir, flags=[_WINDOW, _TWO]), seconds=SECONDS)
  _check(host, workdir, undisturbed)


# ---- after it was verified ---------------------------------------------------


@pytest.mark.parametrize('flag', [_WINDOW, _DENSE])
def test_a_nan(host, workdir, undisturbed, flag):
  """Whatever was made of the damage is dropped, at all stages."""
  fault = 'poison_read:stage=1,iteration=7'
  run = _train(host, workdir, fault, flags=[flag])
  out, err = runs.end(run, seconds=SECONDS)
  _check(host, workdir, undisturbed)
  assert _found(workdir) == {(0, 7)}
  assert 'All that came after iteration 6 is dropped' in out
  (why, *_) = [e['error'] for e in runs.of_kind(workdir, 'failure')]
  assert 'not finite' in why and 'damaged' in out
  for text in (why, out, err):  # damage explains it: no setting is to blame
    assert '--learning_rate' not in text and '--skip_nonfinite' not in text
  recovered = runs.of_kind(workdir, 'recovered')
  assert {e['stage'] for e in recovered} == set(range(STAGES))


@pytest.mark.parametrize(
  'fault',
  [
    'corrupt_read:stage=1,iteration=6',
    'corrupt_read:stage=1,iteration=6,phase=backward',
    f'corrupt_read:stage=2,iteration={ITERATIONS}',
  ],
  ids=['an activation', 'a gradient', 'in the last iteration'],
)
def test_other_bits(host, workdir, undisturbed, fault):
  """Nothing shows it but the second look: the lines were wrong for a while."""
  runs.end(_train(host, workdir, fault), seconds=SECONDS)
  _check(host, workdir, undisturbed)
  ((_, iteration),) = _found(workdir)
  assert f'iteration={iteration}' in fault


@pytest.mark.parametrize('phase', ['start,iteration=7', 'replay'])
def test_a_failure_while_all_go_back(host, workdir, undisturbed, phase):
  # A gradient, which says that stage 2 has begun that iteration.
  damage = 'poison_read:stage=1,iteration=7,phase=backward'
  faults = [damage, f'kill:stage=2,phase={phase}']
  runs.end(_train(host, workdir, *faults), seconds=SECONDS)
  _check(host, workdir, undisturbed)
  assert len(runs.of_kind(workdir, 'fault')) == 2


def test_replicas(host, workdir, tmp_path):
  runs.end(worlds.train(host, tmp_path / 'undisturbed'), seconds=SECONDS)
  fault = 'poison_read:stage=1,replica=1,iteration=6'
  runs.end(worlds.train(host, workdir, fault), seconds=SECONDS)
  _check(host, workdir, tmp_path / 'undisturbed')
  assert _found(workdir) == {(0, 6)}


def test_everything_dies_before_it_shows(host, workdir, undisturbed):
  """Wrong states, wrong lines of metrics: the next start drops them."""
  faults = ['corrupt_read:stage=1,iteration=6', 'kill_all:iteration=8']
  run = _train(host, workdir, *faults)
  runs.end(run, -signal.SIGKILL, seconds=SECONDS)
  assert runs.bits(runs.metrics(workdir)) != runs.bits(
    runs.metrics(undisturbed)[: len(runs.metrics(workdir))]
  )
  runs.wait_for(lambda: not host.processes())
  runs.end(_train(host, workdir, *faults), seconds=SECONDS)
  _check(host, workdir, undisturbed)
  assert _found(workdir) == {(0, 6)}
  (resumed,) = runs.of_kind(workdir, 'resumed')
  assert resumed['first_iteration'] <= 6


def test_memory_that_is_not_sound(host, workdir, undisturbed):
  """The run ends; the same command finds the damage again, and goes on."""
  fault = 'poison_read:stage=1,iteration=7'
  faults = [fault, f'{fault},phase=replay']
  run = _train(host, workdir, *faults, flags=[_WINDOW, '--max_failures=1'])
  _, err = runs.end(run, 1, seconds=SECONDS)
  assert 'is the memory of this machine sound' in err
  runs.end(_train(host, workdir, *faults), seconds=SECONDS)
  _check(host, workdir, undisturbed)


def test_a_nan_with_whole_logs_ends_the_run(host, workdir):
  run = _train(host, workdir, flags=['--learning_rate=1e30'])
  _, err = runs.end(run, 1, seconds=SECONDS)
  assert 'not finite' in err and '--learning_rate' in err
  assert 'entries of the logs were checked and are whole' in err
  assert not runs.of_kind(workdir, 'damage_found')
