"""Runs in which workers and agents die, and come out as if nobody had.

Every run is compared, iteration for iteration, with one that nothing happened
to: losses, held-out losses and digests of the whole state, the training after
the last recovery included. Data varies, gradients are clipped, the learning
rate changes, there is dropout, and there are more microbatches than stages.
"""

import os
import signal

import pytest

from tests.support import runs

STAGES = 3
ITERATIONS = 12
WINDOW = 3
# A worker starts in seconds; on a machine with other work it may take long.
SECONDS = 240.0

pytestmark = [pytest.mark.thorough, pytest.mark.timeout(600)]


_train = runs.trainer(
  STAGES, ITERATIONS, f'--window_length={WINDOW}', '--standby'
)


@pytest.fixture(scope='module')
def undisturbed(tmp_path_factory):
  """What every run must come to."""
  lines = runs.bits(
    runs.undisturbed_metrics(tmp_path_factory, _train, ITERATIONS, SECONDS)
  )
  assert sum(x[-1] is not None for x in lines) == ITERATIONS // 3
  return lines


def _failures(workdir):
  """By stage, how many of its workers died."""
  failed = [e['stage'] for e in runs.of_kind(workdir, 'failure')]
  return [failed.count(stage) for stage in range(STAGES)]


def _generations(workdir):
  return [w['generation'] for w in runs.workers(workdir)]


def test_kills_in_every_phase(host, workdir, undisturbed):
  """Of one stage after the other; each comes back alone."""
  faults = [
    'kill:stage=1,iteration=3,phase=backward',
    'kill:stage=0,iteration=5,phase=forward',
    'kill:stage=2,iteration=7,phase=update',
    'kill:stage=1,iteration=9,phase=capture',
    'kill:stage=0,iteration=11,phase=publish',
  ]
  # Another order of what is captured changes nothing of what is computed.
  run = _train(host, workdir, *faults, flags=['--order=soft_count'])
  runs.end(run, seconds=SECONDS)
  runs.check_finished(host, workdir, undisturbed)
  happened = runs.of_kind(workdir, 'fault')
  assert [e['number'] for e in happened] == [0, 1, 2, 3, 4]
  assert [e['phase'] for e in happened] == [
      'backward', 'forward', 'update', 'capture', 'publish',
    ]  # fmt: skip
  for kind in ('failure', 'recovery_started', 'recovered'):
    found = [e['stage'] for e in runs.of_kind(workdir, kind)]
    assert found == [1, 0, 2, 1, 0], kind
  assert _generations(workdir) == [3, 3, 2]
  for event in runs.of_kind(workdir, 'recovered')[2:]:
    # A window but one, snapshots that had not landed, what was interrupted.
    assert WINDOW - 1 <= event['replayed_iterations'] <= WINDOW + 2
    assert event['source'] == 'own'


def test_nobody_else_is_disturbed(host, workdir, undisturbed):
  """A warm standby takes the place; all others stay what they are."""
  # A stop at the end, so that the run is not over before the standby is warm.
  run = _train(host, workdir, 'stop:stage=2,iteration=12,phase=update')
  runs.until(run, 'iteration 1/')
  before = {w['stage']: w for w in runs.workers(workdir)}

  def after():
    now = {w['stage']: w for w in runs.workers(workdir)}
    return now if now[2]['generation'] > 1 else None

  now = runs.wait_for(after, SECONDS)
  for stage in (0, 1):
    assert now[stage]['pid'] == before[stage]['pid']
    assert now[stage]['generation'] == 1
  assert now[2]['pid'] != before[2]['pid']
  runs.end(run, seconds=SECONDS)
  runs.check_finished(host, workdir, undisturbed)
  assert _generations(workdir) == [1, 1, 2]
  for event in runs.events(workdir):
    assert event['stage'] in (None, 2)
  (failure,) = runs.of_kind(workdir, 'failure')
  assert 'SIGSTOP' in failure['error']


def _stop(run):
  runs.stop(run, signal.SIGTERM, SECONDS)


@pytest.mark.timeout(2400)
def test_a_warm_standby_is_promoted(host, tmp_path):
  """It takes a killed worker's place, and another one is warmed."""
  # It gets what others leave over: minutes, where cores are few and busy.
  seconds = 900.0
  flags = ['--stages=2', '--iterations=100000', '--eval_every=10']
  workdir, other = tmp_path / 'run', tmp_path / 'other'
  run = _train(host, workdir, flags=flags)
  pids = []
  for stage in (1, 0):

    def standby():
      found = [w for w in runs.workers(workdir) if w['state'] == 'standby']
      return found[0]['pid'] if found and found[0]['pid'] not in pids else None

    pids.append(runs.wait_for(standby, seconds))
    os.kill(runs.workers(workdir)[stage]['pid'], signal.SIGKILL)
    number = len(pids)
    runs.wait_for(lambda n=number: len(runs.of_kind(workdir, 'recovered')) == n)
    # The file is rewritten now and then, so it may lag behind the event.
    runs.wait_for(lambda s=stage: runs.workers(workdir)[s]['pid'] == pids[-1])
  _stop(run)
  lines = runs.metrics(workdir)
  assert _failures(workdir)[:2] == [1, 1]
  again = _train(host, other, flags=flags)
  runs.until(again, f'iteration {len(lines)}/')
  _stop(again)
  assert runs.bits(runs.metrics(other)[: len(lines)]) == runs.bits(lines)
  assert not host.processes()


def test_adjacent_stages_and_all_at_once(host, workdir, undisturbed):
  faults = [
    'kill:stage=0,iteration=4,phase=backward',
    'kill:stage=1,iteration=4,phase=backward',
    *(f'kill:stage={s},iteration=8,phase=update' for s in range(STAGES)),
  ]
  runs.end(_train(host, workdir, *faults), seconds=SECONDS)
  runs.check_finished(host, workdir, undisturbed)
  assert _failures(workdir) == [2, 2, 1]


def test_again_while_and_right_after_it_recovers(host, workdir, undisturbed):
  faults = [
    'kill:stage=1,iteration=6',
    'kill:stage=1,iteration=1,phase=start',
    'kill:stage=1,phase=replay',
    'kill:stage=0,iteration=7',
    'kill:stage=2,iteration=1,phase=compile',
    'kill:stage=1,iteration=7,phase=backward',
    'kill:stage=2,iteration=8',
  ]
  run = _train(host, workdir, *faults, flags=['--max_failures=6'])
  runs.end(run, seconds=SECONDS)
  runs.check_finished(host, workdir, undisturbed)
  assert len(runs.of_kind(workdir, 'fault')) == len(faults)
  assert _failures(workdir) == [1, 4, 2]


def test_the_first_and_the_last_iteration(host, workdir, undisturbed):
  faults = [
    'kill:stage=2,iteration=1',
    'kill:stage=0,iteration=1,phase=publish',
    f'kill:stage=1,iteration={ITERATIONS},phase=update',
  ]
  runs.end(_train(host, workdir, *faults), seconds=SECONDS)
  runs.check_finished(host, workdir, undisturbed)
  assert _failures(workdir) == [1, 1, 1]


def test_after_it_was_done(host, workdir, undisturbed):
  """It is started again, since its state is part of the checkpoint."""
  run = _train(
    host,
    workdir,
    f'stop:stage=2,iteration={ITERATIONS},phase=capture',
    flags=['--nostandby'],
  )

  def done():
    now = runs.workers(workdir)
    return now if now and now[0]['state'] == 'done' else None

  os.kill(runs.wait_for(done, SECONDS)[0]['pid'], signal.SIGKILL)
  runs.end(run, seconds=SECONDS)
  runs.check_finished(host, workdir, undisturbed)
  assert _failures(workdir) == [1, 0, 1]
  assert 'while done' in runs.of_kind(workdir, 'failure')[-1]['error'] or (
    'while done' in runs.of_kind(workdir, 'failure')[0]['error']
  )


def test_every_way_to_end(host, workdir, undisturbed):
  faults = [
    'exit:stage=0,iteration=4',
    'exception:stage=1,iteration=6,phase=backward',
    'oom:stage=2,iteration=8,phase=update',
    'stop:stage=0,iteration=10,phase=publish',
  ]
  _, err = runs.end(_train(host, workdir, *faults), seconds=SECONDS)
  runs.check_finished(host, workdir, undisturbed)
  errors = [e['error'] for e in runs.of_kind(workdir, 'failure')]
  words = ('exited with code 3', 'RuntimeError: scripted', 'MemoryError')
  for error, word in zip(errors, (*words, 'SIGSTOP'), strict=True):
    assert word in error
  assert '[stage 1] Traceback' in err


def test_agent_and_everything_killed(host, workdir, undisturbed):
  """The same command goes on from host memory, where nothing else is left."""
  faults = [
    'kill_agent:iteration=6,phase=backward',
    'kill:stage=1,iteration=8',
    'kill_all:stage=2,iteration=9,phase=capture',
    f'kill_agent:stage=1,iteration={ITERATIONS},phase=publish',
  ]
  for number in range(3):
    run = _train(host, workdir, *faults)
    runs.end(run, -signal.SIGKILL, seconds=SECONDS)
    runs.wait_for(lambda: not host.processes(), seconds=10)
    (store,) = os.listdir(host.path)
    assert len(runs.of_kind(workdir, 'resumed')) == number
  runs.end(_train(host, workdir, *faults), seconds=SECONDS)
  runs.check_finished(host, workdir, undisturbed)
  assert [e['fault'] for e in runs.of_kind(workdir, 'fault')] == [
      'kill_agent', 'kill', 'kill_all', 'kill_agent',
    ]  # fmt: skip
  for event in runs.of_kind(workdir, 'resumed'):
    assert event['first_iteration'] > 1
  assert _failures(workdir) == [0, 1, 0]


def test_whole_snapshots_now_and_then(host, workdir, tmp_path):
  """What is chosen if copies may take next to nothing of an iteration."""
  flags = ['--window_length=0', '--overlap_target=1e-6', '--iterations=34']
  flags += ['--eval_every=0', '--order=count']
  faults = [
    'kill:stage=1,iteration=9,phase=capture',  # the first of them
    'kill:stage=0,iteration=24,phase=backward',
    'kill_agent:iteration=30,phase=update',
  ]
  run = _train(host, workdir, *faults, flags=flags)
  runs.end(run, -signal.SIGKILL, seconds=SECONDS)
  runs.end(_train(host, workdir, *faults, flags=flags), seconds=SECONDS)
  chosen = runs.of_kind(workdir, 'window')[0]  # the second agent does as well
  assert (chosen['window_length'], chosen['every']) == (1, 8)
  sizes = [x['snapshot_bytes'] for x in runs.metrics(workdir)]
  first = chosen['first_iteration']
  taken = [i for i in range(first, 23) if sizes[i - 1]]
  assert taken == list(range(first, 23, 8))
  for event in runs.of_kind(workdir, 'recovered')[1:]:
    assert event['digest_verified'] and event['replayed_iterations'] <= 10
  other = tmp_path / 'other'
  runs.end(_train(host, other, flags=flags), seconds=SECONDS)
  runs.check_finished(host, workdir, runs.bits(runs.metrics(other)))


def test_a_damaged_snapshot(host, workdir, undisturbed):
  """Only its digest shows it; one that is torn is none."""
  faults = [
    'corrupt_snapshot:stage=1,iteration=7',
    'torn_snapshot:stage=2,iteration=10',
  ]
  runs.end(_train(host, workdir, *faults), seconds=SECONDS)
  runs.check_finished(host, workdir, undisturbed)
  assert _failures(workdir) == [0, 2, 1]
  started = [
    e for e in runs.of_kind(workdir, 'recovery_started') if e['stage'] == 1
  ]
  assert 'has another digest than before the failure' in started[1]['reason']
  assert started[1]['first_iteration'] < started[0]['first_iteration']


def test_damaged_compute_weights(host, workdir, undisturbed):
  """No digest covers them; what a replay publishes with them does."""
  fault = 'corrupt_weights:stage=1,iteration=8,phase=update'
  runs.end(_train(host, workdir, fault), seconds=SECONDS)
  runs.check_finished(host, workdir, undisturbed)
  assert _failures(workdir) == [0, 2, 0]
  first, second = runs.of_kind(workdir, 'recovery_started')
  assert 'damaged in a way that' in second['reason']
  assert second['first_iteration'] < first['first_iteration']


def test_a_damaged_entry_of_a_live_sender(host, workdir, undisturbed):
  """Its sender goes back as well, and writes it again."""
  faults = [
    'corrupt_log:stage=0,iteration=7',
    # Before the sender itself has looked at the entry once more.
    'kill:stage=1,iteration=7,phase=backward',
  ]
  runs.end(_train(host, workdir, *faults), seconds=SECONDS)
  runs.check_finished(host, workdir, undisturbed)
  first, second = runs.of_kind(workdir, 'failure')
  assert first['stage'] == second['stage'] == 1
  assert 'do not have the checksum' in second['error']
  joined = [
    e for e in runs.of_kind(workdir, 'recovery_started') if not e['stage']
  ]
  assert 'is corrupt and stage 1 needs it' in joined[0]['reason']
  (dropped,) = runs.of_kind(workdir, 'entry_dropped')
  assert (dropped['stage'], dropped['iteration']) == (0, 6)
  assert _generations(workdir) == [2, 3, 1]


def test_a_worker_that_fails_again_and_again(host, workdir):
  """The run ends with what the worker said last, and can be gone on with."""
  faults = [f'exception:stage=1,iteration=5,phase={p}' for p in (
      'forward', 'backward', 'update',
    )]  # fmt: skip
  run = _train(host, workdir, *faults, flags=['--max_failures=2'])
  _, err = runs.end(run, 1, seconds=SECONDS)
  assert '3 failure(s) of stage 1' in err and 'RuntimeError: scripted' in err
  assert '--max_failures=2' in err and 'Traceback' in err
  assert runs.events(workdir)[-1]['kind'] == 'failed'
  assert not host.processes()
