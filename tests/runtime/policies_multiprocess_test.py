"""Runs under the baseline policies in which workers and agents die.

The exact ones come out as if nobody had died; nobody's process is started
again but that of the dead.
"""

import functools
import pathlib
import shutil
import signal

import pytest

from tests.support import runs

STAGES = 2
ITERATIONS = 14
SECONDS = 240.0

pytestmark = [pytest.mark.thorough, pytest.mark.timeout(600)]


_train = runs.trainer(STAGES, ITERATIONS)


@pytest.fixture(scope='module')
def undisturbed(tmp_path_factory):
  """What every exact run must come to: it captures nothing."""
  train = functools.partial(_train, flags=['--policy=none'])
  return runs.bits(
    runs.undisturbed_metrics(tmp_path_factory, train, ITERATIONS, SECONDS)
  )


def _pids(workdir):
  return {w['stage']: w['pid'] for w in runs.workers(workdir)}


def _check_processes(workdir, before, dead):
  """After one recovery: all live but the dead; all are a new generation."""
  now = runs.workers(workdir)
  assert [w['generation'] for w in now] == [2] * STAGES
  for worker in now:
    is_new = worker['pid'] != before[worker['stage']]
    assert is_new == (worker['stage'] == dead), worker


def _until_recovered(run, workdir):
  """(pids before, events) of a run in which one worker dies."""
  runs.until(run, 'iteration 1/')
  before = _pids(workdir)
  runs.wait_for(
    lambda: len(runs.of_kind(workdir, 'recovered')) == STAGES, SECONDS
  )
  return before, runs.of_kind(workdir, 'recovered')


def _end_with_the_agent(host, run):
  runs.end(run, -signal.SIGKILL, seconds=SECONDS)
  runs.wait_for(lambda: not host.processes(), seconds=10)


def test_dense_goes_back_together(host, workdir, undisturbed):
  """To the newest whole snapshot in host memory."""
  faults = [
    'kill:stage=1,iteration=7,phase=backward',
    'kill_agent:iteration=12,phase=backward',
  ]
  flags = ['--policy=dense', '--interval=3']
  run = _train(host, workdir, *faults, flags=flags)
  before, recovered = _until_recovered(run, workdir)
  _end_with_the_agent(host, run)
  _check_processes(workdir, before, dead=1)
  for event in recovered:
    assert event['source'] == 'own'
    assert event['first_iteration'] in (4, 7)  # after 3, or 6
    replayed = event['replayed_iterations']
    assert 7 - event['first_iteration'] <= replayed <= 4
  runs.end(_train(host, workdir, *faults, flags=flags), seconds=SECONDS)
  runs.check_finished(host, workdir, undisturbed)
  assert runs.resumptions(workdir)[0] in (7, 10)
  # Those that a replay comes by are there already.
  took = {x['iteration'] for x in runs.metrics(workdir) if x['snapshot_bytes']}
  assert took and took <= {3, 6, 9, 12}


def test_two_phase_reads_from_disk(host, workdir, tmp_path, undisturbed):
  """What is in memory is lost with the process, or the machine."""
  faults = [
    'kill:stage=0,iteration=8,phase=capture',
    'kill_agent:iteration=12,phase=backward',
  ]
  disk = tmp_path / 'disk'
  flags = ['--policy=two_phase', '--interval=3', f'--durable_dir={disk}']
  run = _train(host, workdir, *faults, flags=flags)
  before, recovered = _until_recovered(run, workdir)
  _end_with_the_agent(host, run)
  _check_processes(workdir, before, dead=0)
  for event in recovered:
    assert event['source'] == 'durable'
    assert event['first_iteration'] in (4, 7)
  shutil.rmtree(host.path)  # as a reboot does
  host.path.mkdir()
  runs.end(_train(host, workdir, *faults, flags=flags), seconds=SECONDS)
  runs.check_finished(host, workdir, undisturbed)
  assert runs.resumptions(workdir)[0] in (7, 10)
  assert not disk.exists()  # no folder was there before the run


def test_partial_goes_on_with_stale_experts(host, workdir, undisturbed):
  """Other bits come out, every line of them in order, and the loss is told."""
  flags = [
    '--policy=partial',
    '--interval=2',
    '--partial_select=load_aware',
    '--plt_budget=0.02',
  ]
  run = _train(
    host, workdir, 'kill:stage=1,iteration=9,phase=backward', flags=flags
  )
  before, recovered = _until_recovered(run, workdir)
  runs.end(run, seconds=SECONDS)
  assert host.is_clean()
  _check_processes(workdir, before, dead=1)
  assert runs.kinds(workdir)[-1] == 'finished'
  found = runs.bits(runs.metrics(workdir))
  assert [x[0] for x in found] == list(range(1, ITERATIONS + 1))
  (back,) = runs.of_kind(workdir, 'rolled_back')
  start = back['iteration']
  assert start in (4, 6, 8)
  assert found[:start] == undisturbed[:start]
  for line, exact in zip(found[start:], undisturbed[start:], strict=True):
    assert line[2] != exact[2]
    assert 0 < float.fromhex(line[1]) < 10
  # The budget is spent: from then on two of the four experts of a layer.
  assert back['plt'] > 0.02 and back['experts'] == 2
  for event in recovered:
    assert not event['digest_verified']
    assert event['lost_tokens'] == back['lost_tokens'] > 0
    assert event['plt'] == back['plt']
    assert event['first_iteration'] == start + 1
  sizes = [x['snapshot_bytes'] for x in runs.metrics(workdir)]
  assert sizes[ITERATIONS - 3] > sizes[1] > 0


def test_popular_experts_make_up_for_what_they_lost(host, workdir):
  """Of `--partial_select=popularity`: they take more tokens for some time."""
  flags = [
    '--policy=partial',
    '--interval=2',
    '--partial_select=popularity',
    '--model=capacity_factor=0.75',
  ]
  run = _train(
    host, workdir, 'kill:stage=1,iteration=9,phase=backward', flags=flags
  )
  runs.end(run, seconds=SECONDS)
  assert host.is_clean()
  (back,) = runs.of_kind(workdir, 'rolled_back')
  start, until = back['iteration'], back['capacity_until']
  assert start < until < ITERATIONS
  dropped = [x['dropped'] for x in runs.metrics(workdir)]
  grown, usual = dropped[start:until], dropped[:start] + dropped[until:]
  assert max(grown) < min(usual)


def _leases(pid):
  """Snapshots that a process has mapped to read them."""
  maps = pathlib.Path(f'/proc/{pid}/maps').read_text()
  return {
    line.split()[-1]
    for line in maps.splitlines()
    if '.snapshots/' in line and line.split()[1] == 'r--s'
  }


def test_what_a_restore_read_is_let_go_of(host, workdir):
  """Else a live process that goes back again has no snapshot left to write."""
  flags = ['--policy=partial', '--interval=2', '--iterations=100000']
  faults = [f'kill:stage=1,iteration={i},phase=backward' for i in (9, 13)]
  run = _train(host, workdir, *faults, flags=flags)
  runs.wait_for(
    lambda: len(runs.of_kind(workdir, 'recovered')) == 2 * STAGES, SECONDS
  )
  live = _pids(workdir)[0]
  runs.wait_for(lambda: not _leases(live), SECONDS)
  runs.stop_at_once(run, SECONDS)
