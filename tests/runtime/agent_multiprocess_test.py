"""Runs of several processes, some of which die; nothing may be left.

Faults are scripted on what a run says of itself: its output, `workers.json`.
"""

import collections
import contextlib
import os
import resource
import signal
import time

import pytest

from moetion_jax import errors
from moetion_jax.hostmem import segment
from tests.support import helpers, runs

pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope='module')
def undisturbed(tmp_path_factory):
  return runs.undisturbed(tmp_path_factory)


_TRAIN_WITHOUT_JAX = """
import sys
from absl import flags
from launch import train
flags.FLAGS(['train', *sys.argv[1:]])
code = train.main(['train'])
assert code == 0, code
assert 'jax' not in sys.modules  # so the agent has no backend either
"""


@pytest.mark.thorough
@pytest.mark.parametrize(
  ('stages', 'microbatches'), [(1, 3), (2, 1), (3, 3), (4, 8)]
)
def test_the_bits_of_the_one_process_cut(host, tmp_path, stages, microbatches):
  """Losses, digests and held-out losses, for fewer and more microbatches."""
  workdir = tmp_path / 'run'
  flags = helpers.train_flags(
    workdir,
    f'--hostmem_dir={host.path}',
    f'--stages={stages}',
    f'--microbatches={microbatches}',
    '--iterations=4',
    f'--data={helpers.DATA}',
  )
  runs.end(host.start('-c', _TRAIN_WITHOUT_JAX, *flags))
  assert host.is_clean()
  assert [w['state'] for w in runs.workers(workdir)] == ['finished'] * stages
  lines = runs.bits(runs.metrics(workdir))
  assert lines == runs.one_process_bits(workdir)


# ---- deaths of workers -------------------------------------------------------


def test_killed_workers_recover(host, tmp_path, undisturbed):
  """One of them, then all at once; stage 0 has fewer operators than slots."""
  workdir = tmp_path / 'run'
  run = host.train(workdir, '--standby', '--window_length=8')
  runs.until(run, 'iteration 12/')
  os.kill(runs.workers(workdir)[1]['pid'], signal.SIGKILL)
  line = runs.until(run, 'was killed by SIGKILL')
  assert 'stage 1, iteration' in line and 'stage(s) 1 recover(s)' in line
  assert 'same digests' in runs.until(run, 'stage 1 recovered in')
  runs.until_trained(run, 2)
  for worker in runs.workers(workdir)[:2]:
    os.kill(worker['pid'], signal.SIGKILL)
  runs.end(run)
  assert runs.bits(runs.metrics(workdir)) == undisturbed
  events = runs.events(workdir)
  count = collections.Counter(e['kind'] for e in events)
  assert count['failure'] == 3 and count['finished'] == 1
  (window,) = runs.of_kind(workdir, 'window')
  assert window['empty_slots'] == [1, 0]
  assert events[-1]['kind'] == 'finished'
  recovered = [e for e in events if e['kind'] == 'recovered']
  assert {e['stage'] for e in recovered} == {0, 1}
  for event in recovered:
    assert event['digest_verified'] and event['source'] == 'own'
    assert event['first_iteration'] > 1 and event['replayed_iterations'] > 0
    assert set(event['seconds']) == {'detect', 'start', 'fetch', 'replay'}
  assert {w['state'] for w in runs.workers(workdir)} == {'finished'}
  assert host.is_clean()


@pytest.mark.thorough
def test_workers_that_die_before_they_train(host, tmp_path, undisturbed):
  workdir = tmp_path / 'run'
  run = host.train(workdir)
  pid, *_ = runs.wait_for(host.worker_pids)
  os.kill(pid, signal.SIGKILL)
  assert 'killed by SIGKILL' in runs.until(run, 'it is started again')
  compiling = runs.wait_for(lambda: runs.workers(workdir))[1]['pid']
  os.kill(compiling, signal.SIGKILL)
  assert 'stage(s) 1 recover(s)' in runs.until(run, 'stage 1, iteration 1:')
  runs.end(run)
  assert runs.bits(runs.metrics(workdir)) == undisturbed
  assert runs.kinds(workdir).count('recovered') == 1
  assert host.is_clean()


def test_a_death_before_training_may_end_the_run(host, tmp_path):
  run = host.train(tmp_path / 'run', '--max_failures=0')
  pid, *_ = runs.wait_for(host.worker_pids)
  os.kill(pid, signal.SIGKILL)
  _, err = runs.end(run, 1)
  assert 'iteration 0' in err and 'killed by SIGKILL' in err
  assert not (tmp_path / 'run').exists()
  assert host.is_clean()


@pytest.mark.thorough
def test_without_snapshots_a_death_ends_the_run(host, tmp_path):
  workdir = tmp_path / 'run'
  run = host.train(workdir, '--policy=none', '--stages=1')
  runs.until(run, 'iteration 2/')
  os.kill(runs.workers(workdir)[0]['pid'], signal.SIGKILL)
  _, err = runs.end(run, 1)
  assert '--policy=none' in err and 'The same command starts over' in err
  assert runs.kinds(workdir) == ['start', 'failure', 'failed']
  assert host.is_clean()


_RAISE_IN_STAGE_1 = f"""
import sys
sys.path.insert(0, {str(helpers.ROOT)!r})
from moetion_jax.training import schedule
tasks, calls = schedule.one_forward_one_backward, []

def scripted(stage, stages, microbatches):
  calls.append(stage)
  if stage == 1 and len(calls) == 3:
    raise RuntimeError('scripted')
  return tasks(stage, stages, microbatches)

schedule.one_forward_one_backward = scripted
"""


@pytest.mark.thorough
def test_an_exception_that_comes_again(host, tmp_path):
  """It is shown with its traceback each time, then the run ends."""
  (tmp_path / 'sitecustomize.py').write_text(_RAISE_IN_STAGE_1)
  workdir = tmp_path / 'run'
  environment = {'PYTHONPATH': str(tmp_path)}
  run = host.train(workdir, '--max_failures=1', environment=environment)
  _, err = runs.end(run, 1)
  assert err.count('[stage 1] Traceback') == 2
  assert 'The run ended: stage 1, iteration 3: 2 failure(s)' in err
  assert 'RuntimeError: scripted' in err and '--max_failures=1' in err
  log = workdir / 'logs' / 'stage-1.log'
  assert str(log) in err and log.read_text().count('Traceback') == 2
  assert runs.kinds(workdir) == [
      'start', 'failure', 'recovery_started', 'failure', 'failed',
    ]  # fmt: skip
  event = runs.events(workdir)[-1]
  assert (event['stage'], event['iteration']) == (1, 3)
  assert host.has_ended()


# ---- ends, after which the same command goes on -----------------------------


@pytest.mark.thorough
def test_a_run_that_failed_or_was_stopped_goes_on(host, tmp_path, undisturbed):
  workdir = tmp_path / 'run'
  run = host.train(workdir, '--max_failures=0')
  runs.until(run, 'iteration 6/')
  os.kill(runs.workers(workdir)[1]['pid'], signal.SIGKILL)
  _, err = runs.end(run, 1)
  assert 'stage 1, iteration' in err and 'SIGKILL' in err
  assert '--max_failures=0' in err
  assert 'the same command goes on' in err and '--fresh' in err
  assert runs.kinds(workdir)[-2:] == ['failure', 'failed']
  event = runs.events(workdir)[-1]
  assert event['stage'] == 1 and event['iteration'] >= 6
  assert {w['state'] for w in runs.workers(workdir)} == {'failed'}
  assert host.has_ended()
  # With another size of everything that is kept.
  run = host.train(workdir, '--max_window_length=12')
  runs.until_trained(run, 3)
  said = runs.stop(run)
  last = runs.metrics(workdir)[-1]['iteration']
  assert 6 <= last < runs.ITERATIONS
  assert said.startswith(
    f'Stopped after iteration {last}. The same command goes on'
  )
  assert '--fresh' in said
  assert {(w['state'], w['iteration']) for w in runs.workers(workdir)} == {
    ('stopped', last)
  }
  assert runs.kinds(workdir)[-1] == 'stopped'
  assert host.has_ended()
  # Workers abort before they can train, whatever is there to go on with.
  flags = {'XLA_FLAGS': '--xla_no_such_flag=1'}
  run = host.train(workdir, '--max_failures=0', environment=flags)
  _, err = runs.end(run, 1)
  assert 'xla_no_such_flag' in err
  assert 'Once the cause is gone, the same command goes on' in err
  assert host.has_ended()
  # As if another version had written it, or the memory were damaged.
  manifests = host.path.glob('moetion-*/stage-1.*.snapshots/*/manifest.json')
  damaged = max(manifests, key=lambda path: int(path.parent.name))
  damaged.write_bytes(damaged.read_bytes()[:-5])
  out, _ = runs.end(host.train(workdir))
  assert '1 snapshot(s) cannot be read and will be written again' in out
  assert f'{damaged}: torn' in out.replace('\n', '')
  first = runs.resumptions(workdir)
  assert len(first) == 2 and min(first) > 1
  assert f'Going on with iteration {first[1]}' in out
  assert runs.bits(runs.metrics(workdir)) == undisturbed
  assert host.is_clean()


@pytest.mark.thorough
def test_a_run_that_was_ended_at_once_goes_on(host, tmp_path, undisturbed):
  """By a second signal, and by a SIGKILL of its agent."""
  workdir = tmp_path / 'run'
  run = host.train(workdir)
  runs.until(run, 'iteration 6/')
  stopped = runs.workers(workdir)[1]['pid']
  os.kill(stopped, signal.SIGSTOP)  # so that no iteration can be finished
  assert 'The same command goes on' in runs.stop_at_once(run)
  assert 'recovered' not in runs.kinds(workdir)
  assert host.has_ended()
  run = host.train(workdir)
  runs.until_trained(run, 3)
  run.kill()
  runs.wait_for(lambda: not host.processes(), seconds=10)
  out, _ = runs.end(host.train(workdir))
  assert f'left by pid {run.pid}; the run goes on with it' in out
  first = runs.resumptions(workdir)
  assert len(first) == 2 and min(first) > 1
  assert runs.bits(runs.metrics(workdir)) == undisturbed
  assert host.is_clean()


@pytest.mark.thorough
def test_workers_go_on_with_a_stopped_agent(host, tmp_path, undisturbed):
  """They wait for the line, which it moves, in the middle of an iteration."""
  workdir = tmp_path / 'run'
  run = host.train(workdir, '--window_length=3')
  runs.until(run, 'iteration 5/')
  run.send_signal(signal.SIGSTOP)

  def newest():
    paths = host.path.glob('*/*.segment')
    return [segment.newest_iteration(path) for path in paths]

  seen, since = newest(), time.monotonic()
  while time.monotonic() < since + 2:  # until stores and logs are full
    time.sleep(0.05)
    if seen != newest():
      seen, since = newest(), time.monotonic()
  assert max(seen) < runs.ITERATIONS
  run.send_signal(signal.SIGCONT)
  runs.end(run)
  assert 'failure' not in runs.kinds(workdir)
  assert runs.bits(runs.metrics(workdir)) == undisturbed
  assert host.is_clean()


@pytest.mark.thorough
def test_a_terminal_that_goes_stops_a_run(host, tmp_path):
  workdir = tmp_path / 'run'
  ours, theirs = os.openpty()
  os.set_blocking(ours, False)
  # These tests may themselves run under nohup, which a child would inherit.
  before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
  run = host.train(workdir, stdout=theirs, stderr=theirs)
  signal.signal(signal.SIGHUP, before)
  os.close(theirs)

  def has_begun():
    with contextlib.suppress(BlockingIOError):
      os.read(ours, 1 << 16)  # else it waits until somebody reads
    return len(runs.metrics(workdir)) > 3

  runs.wait_for(has_begun)
  os.close(ours)
  for _ in range(2):  # the kernel sends one, and the shell another
    run.send_signal(signal.SIGHUP)
  assert run.wait(runs.SECONDS) == errors.ExitCode.STOPPED
  assert runs.kinds(workdir)[-1] == 'stopped'
  assert host.has_ended() and os.listdir(host.path)


@pytest.mark.thorough
def test_a_full_disk_ends_a_run_that_can_go_on(host, tmp_path, undisturbed):
  workdir = tmp_path / 'run'
  run = host.train(workdir)
  runs.until(run, 'iteration 5/')
  # Of the agent alone: from now on no file of its can grow.
  resource.prlimit(run.pid, resource.RLIMIT_FSIZE, (1, 1))
  _, err = runs.end(run, 1)
  assert 'Traceback' not in err
  assert 'File too large' in err and 'the same command goes on' in err
  runs.end(host.train(workdir))
  assert min(runs.resumptions(workdir)) > 1
  assert runs.bits(runs.metrics(workdir)) == undisturbed
  assert host.is_clean()


@pytest.mark.thorough
def test_a_run_that_compiles(host, tmp_path):
  """Its workdir is in use, and a signal ends it at once."""
  workdir = tmp_path / 'run'
  run = host.train(workdir, '--compilation_cache_dir=')
  runs.wait_for(lambda: runs.workers(workdir))
  _, err = runs.end(host.train(workdir), 2)
  assert 'living run' in err and len(err.strip().splitlines()) == 1
  said = runs.stop(run, signal.SIGTERM)
  assert said == 'Stopped after iteration 0. The same command starts over.'
  assert host.is_clean()


@pytest.mark.parametrize(
  ('flags', 'words'),
  [
    (['--log_iterations=100000000'], '--log_iterations'),
    (['--log_iterations=5'], '--log_iterations=5'),
    (['--hostmem_dir=/no/such/folder'], '--hostmem_dir=/no/such/folder'),
    (['--local_hosts=2', '--replicas=2'], '--local_hosts=2'),
    (['--local_hosts=2', '--policy=partial'], '--local_hosts=2'),
  ],
)
def test_what_is_refused_leaves_nothing(host, tmp_path, flags, words):
  _, err = runs.end(host.train(tmp_path / 'run', *flags), 2)
  assert words in err and len(err.strip().splitlines()) == 1
  assert not (tmp_path / 'run').exists()
  assert host.is_clean()
