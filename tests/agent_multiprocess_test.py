"""Runs of several processes, some of which die; nothing may be left.

Faults are scripted on what a run says of itself: its output, `workers.json`.
"""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time
import uuid

import pytest

from launch import settings
from moetion_jax import report
from tests import helpers

pytestmark = [pytest.mark.fast, pytest.mark.timeout(180)]

_SECONDS = 90.0
_MARK = 'MOETION_TEST_MARK'


class _Host:
  """A host memory folder and everything that runs on it."""

  def __init__(self):
    self.mark = uuid.uuid4().hex
    self.path = pathlib.Path('/dev/shm', f'test-{self.mark}')
    self.path.mkdir()
    self.runs = []

  def start(self, *arguments, environment=()):
    """Starts a command of ours."""
    process = subprocess.Popen(
      [sys.executable, *arguments],
      cwd=helpers.ROOT,
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      env=os.environ | {_MARK: self.mark} | dict(environment),
      text=True,
    )
    self.runs.append(process)
    return process

  def train(self, workdir, *flags, environment=()):
    return self.start(
      '-m',
      'launch.train',
      *helpers.train_flags(workdir, f'--hostmem_dir={self.path}', *flags),
      environment=environment,
    )

  def processes(self):
    """Pids of all descendants that live."""
    wanted = f'{_MARK}={self.mark}'.encode()
    found = []
    for path in pathlib.Path('/proc').glob('[0-9]*/environ'):
      try:
        if wanted in path.read_bytes().split(b'\0'):
          found.append(int(path.parent.name))
      except OSError:
        continue
    return found

  def is_clean(self):
    return not self.processes() and not os.listdir(self.path)


@pytest.fixture
def host():
  host = _Host()
  yield host
  for run in host.runs:
    run.kill()
    run.communicate()
  for pid in host.processes():
    os.kill(pid, signal.SIGKILL)
  subprocess.run(['rm', '-rf', host.path], check=True)


def _end(process, code=0):
  """(stdout, stderr) of a run that ends with `code`."""
  out, err = process.communicate(timeout=_SECONDS)
  assert process.returncode == code, (process.returncode, out, err)
  return out, err


def _until(process, words):
  """Reads its output up to a line with `words`."""
  for line in process.stdout:
    if words in line:
      return line
  raise AssertionError(process.communicate())


def _wait_for(condition, seconds=_SECONDS):
  deadline = time.monotonic() + seconds
  while time.monotonic() < deadline:
    if value := condition():
      return value
    time.sleep(0.01)
  raise AssertionError(f'not within {seconds} s')


def _read_lines(path):
  return [json.loads(x) for x in open(path)] if path.exists() else []


def _metrics(workdir):
  return _read_lines(workdir / 'metrics.jsonl')


def _events(workdir):
  return _read_lines(workdir / 'events.jsonl')


def _workers(workdir):
  path = workdir / 'workers.json'
  return json.loads(path.read_text())['workers'] if path.exists() else []


def _bits(lines):
  names = ('iteration', 'loss_hex', 'digest', 'eval_loss_hex')
  return [[x.get(n) for n in names] for x in lines]


@pytest.mark.parametrize(
  ('stages', 'microbatches'),
  [(1, 3), (2, 1), (2, 8), (3, 3), (4, 8)],
)
def test_the_bits_of_the_one_process_cut(host, tmp_path, stages, microbatches):
  """Losses, digests and held-out losses, for fewer and more microbatches."""
  workdir = tmp_path / 'run'
  run = host.train(
    workdir,
    f'--stages={stages}',
    f'--microbatches={microbatches}',
    '--iterations=4',
    f'--data={helpers.ROOT}/models',
  )
  _end(run)
  lines = _metrics(workdir)
  assert host.is_clean()
  assert [w['state'] for w in _workers(workdir)] == ['finished'] * stages
  value = json.loads((workdir / 'config.json').read_text())
  for name in ('software', 'data_fingerprint'):
    del value[name]
  config = settings.RunConfig.from_json(value)
  expected = []
  for reports in helpers.train_locally(config)[0]:
    digests = {o: d for r in reports for o, d in r.digests.items()}
    loss = reports[-1].eval_loss
    expected.append(
      [
        reports[-1].iteration,
        reports[-1].loss.hex(),
        report.combine(digests),
        None if loss is None else loss.hex(),
      ]
    )
  assert _bits(lines) == expected


def test_the_agent_imports_no_jax(host, tmp_path):
  script = (
    'import sys\n'
    'from absl import flags\n'
    'from launch import train\n'
    'flags.FLAGS(["train", *sys.argv[1:]])\n'
    'code = train.main(["train"])\n'
    'assert code == 0, code\n'
    'assert "jax" not in sys.modules\n'  # so there is no backend either
  )
  flags = helpers.train_flags(
    tmp_path / 'run', f'--hostmem_dir={host.path}', '--iterations=1'
  )
  _end(host.start('-c', script, *flags))
  assert (tmp_path / 'run' / 'checkpoint').is_dir()


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_all_stages_after_one_iteration(host, tmp_path, number):
  workdir = tmp_path / 'run'
  run = host.train(workdir, '--stages=3', '--iterations=2000')
  _until(run, 'iteration 4/')
  run.send_signal(number)
  out, _ = _end(run)
  last = _metrics(workdir)[-1]['iteration']
  assert 4 <= last < 2000
  assert f'Stopped after iteration {last}' in out and '--fresh' in out
  assert {(w['state'], w['iteration']) for w in _workers(workdir)} == {
    ('stopped', last)
  }
  assert [e['kind'] for e in _events(workdir)] == ['start', 'stopped']
  assert host.is_clean()


def test_a_second_signal_ends_at_once(host, tmp_path):
  run = host.train(tmp_path / 'run', '--iterations=2000')
  _until(run, 'iteration 2/')
  stopped = _workers(tmp_path / 'run')[1]['pid']
  os.kill(stopped, signal.SIGSTOP)  # so that no iteration can be finished
  run.send_signal(signal.SIGINT)
  _until(run, 'again to stop at once')
  run.send_signal(signal.SIGINT)
  begin = time.monotonic()
  _end(run)
  assert time.monotonic() - begin < 5
  assert host.is_clean()


def test_a_signal_while_compiling(host, tmp_path):
  run = host.train(tmp_path / 'run', '--compilation_cache_dir=')
  _wait_for(lambda: _workers(tmp_path / 'run'))
  run.send_signal(signal.SIGTERM)
  out, _ = _end(run)
  assert 'Stopped after iteration 0' in out
  assert host.is_clean()


def test_a_worker_that_is_killed_ends_the_run(host, tmp_path):
  workdir = tmp_path / 'run'
  run = host.train(workdir, '--iterations=2000')
  _until(run, 'iteration 3/')
  os.kill(_workers(workdir)[1]['pid'], signal.SIGKILL)
  _, err = _end(run, 1)
  assert 'stage 1, iteration' in err and 'SIGKILL' in err
  event = _events(workdir)[-1]
  assert (event['kind'], event['stage']) == ('failure', 1)
  assert event['iteration'] >= 3
  assert {w['state'] for w in _workers(workdir)} == {'failed'}
  assert host.is_clean()


def test_a_worker_that_dies_while_compiling_ends_the_run(host, tmp_path):
  workdir = tmp_path / 'run'
  run = host.train(workdir, '--compilation_cache_dir=')
  (pid, *_) = [w['pid'] for w in _wait_for(lambda: _workers(workdir))]
  os.kill(pid, signal.SIGKILL)
  _, err = _end(run, 1)
  assert 'stage 0, iteration 0' in err and 'compiling' in err
  assert _events(workdir)[-1]['kind'] == 'failure'
  assert host.is_clean()


_RAISE_IN_STAGE_1 = f"""
import sys
sys.path.insert(0, {str(helpers.ROOT)!r})
from moetion_jax import schedule
tasks, calls = schedule.one_forward_one_backward, []

def scripted(stage, stages, microbatches):
  calls.append(stage)
  if stage == 1 and len(calls) == 3:
    raise RuntimeError('scripted')
  return tasks(stage, stages, microbatches)

schedule.one_forward_one_backward = scripted
"""


def test_an_exception_is_shown_with_its_traceback(host, tmp_path):
  (tmp_path / 'sitecustomize.py').write_text(_RAISE_IN_STAGE_1)
  workdir = tmp_path / 'run'
  environment = {'PYTHONPATH': str(tmp_path)}
  run = host.train(workdir, environment=environment)
  _, err = _end(run, 1)
  assert '[stage 1] Traceback' in err
  assert 'stage 1, iteration 3: RuntimeError: scripted' in err
  assert 'Traceback' in (workdir / 'logs' / 'stage-1.log').read_text()
  event = _events(workdir)[-1]
  assert (event['kind'], event['stage'], event['iteration']) == (
    'failure', 1, 3,
  )  # fmt: skip
  assert host.is_clean()


def test_an_agent_killed_takes_its_workers_along(host, tmp_path):
  workdir = tmp_path / 'run'
  run = host.train(workdir, '--iterations=40')
  _until(run, 'iteration 3/')
  run.kill()
  _wait_for(lambda: not host.processes(), seconds=2)
  before = _metrics(workdir)
  assert len(os.listdir(host.path)) == 1
  again = host.train(workdir, '--iterations=40')
  out, _ = _end(again)
  assert 'left by a run that died' in out and 'compared' in out
  lines = _metrics(workdir)
  assert _bits(lines[: len(before)]) == _bits(before)
  assert [x['iteration'] for x in lines] == list(range(1, 41))
  assert host.is_clean()


def test_a_second_run_in_the_workdir_is_refused(host, tmp_path):
  run = host.train(tmp_path / 'run', '--iterations=2000')
  _until(run, 'iteration 1/')
  _, err = _end(host.train(tmp_path / 'run', '--iterations=2000'), 2)
  assert 'living run' in err and len(err.strip().splitlines()) == 1
  run.send_signal(signal.SIGTERM)
  _end(run)
  assert host.is_clean()


@pytest.mark.parametrize(
  ('flags', 'words'),
  [
    (['--log_iterations=100000000'], '--log_iterations'),
    (['--log_iterations=0'], '--log_iterations=0'),
    (['--hostmem_dir=/no/such/folder'], '--hostmem_dir=/no/such/folder'),
  ],
)
def test_host_memory_that_is_not_there(host, tmp_path, flags, words):
  _, err = _end(host.train(tmp_path / 'run', *flags), 2)
  assert words in err and len(err.strip().splitlines()) == 1
  assert not (tmp_path / 'run').exists()
  assert host.is_clean()
