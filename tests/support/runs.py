"""Whole runs as processes: start them, watch them, find what is left.

Faults are scripted on what a run says of itself: its output, `workers.json`.
"""

import contextlib
import fcntl
import json
import os
import pathlib
import signal
import subprocess
import sys
import time
import uuid

from launch.lm import settings as run_settings
from launch.offline import scan
from moetion_jax import codec, errors, report
from moetion_jax.runtime import linux_process
from moetion_jax.runtime.hosts import child_process
from tests.support import helpers

SECONDS = 120.0
# Of runs that are compared with the one of `undisturbed`.
ITERATIONS = 40
_MARK = 'MOETION_TEST_MARK'


class Host:
  """A host memory folder and everything that runs on it."""

  def __init__(self):
    self.mark = uuid.uuid4().hex
    self.path = pathlib.Path('/dev/shm', f'test-{self.mark}')
    self.path.mkdir()
    self.runs = []

  def close(self):
    """Ends whatever still runs, and removes the folder."""
    for run in self.runs:
      run.kill()
      run.communicate()
    for pid in self.processes():
      linux_process.send_signal(pid, signal.SIGKILL)
    subprocess.run(['rm', '-rf', self.path], check=True)

  def start(
    self,
    *arguments,
    environment=(),
    root=helpers.ROOT,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
  ):
    """Starts a command of ours, of the checkout in `root`."""
    process = subprocess.Popen(
      [sys.executable, *arguments],
      cwd=root,
      stdout=stdout,
      stderr=stderr,
      env=os.environ | {_MARK: self.mark} | dict(environment),
      text=True,
    )
    self.runs.append(process)
    return process

  def train(self, workdir, *flags, **how):
    """Starts a run, by default of `ITERATIONS`; `how` as of `start`."""
    return self.start(
      '-m',
      'launch.train',
      *helpers.train_flags(
        workdir,
        f'--hostmem_dir={self.path}',
        f'--iterations={ITERATIONS}',
        *flags,
      ),
      **how,
    )

  def processes(self):
    """Pids of all descendants that live."""
    return child_process.marked(_MARK, self.mark)

  def is_clean(self):
    return not self.processes() and not os.listdir(self.path)

  def has_ended(self, path=None):
    """Whether nothing is left but what the same command goes on with."""
    for store in (path or self.path).iterdir():
      assert store.is_dir() and store.name.startswith('moetion-'), store
      for name in os.listdir(store):
        assert name in ('lock', 'owner') or name.endswith(
          ('.segment', '.snapshots')
        ), name
    return not self.processes()

  def worker_pids(self):
    """Pids of the workers that live, whatever they have said so far."""
    found = []
    for pid in self.processes():
      with contextlib.suppress(OSError):
        command = pathlib.Path(f'/proc/{pid}/cmdline').read_bytes()
        if b'moetion_jax.runtime.worker.main' in command.split(b'\0'):
          found.append(pid)
    return found


def end(process, code=0, seconds=SECONDS):
  """(stdout, stderr) of a run that ends with `code`."""
  out, err = process.communicate(timeout=seconds)
  assert process.returncode == code, (process.returncode, out, err)
  return out, err


def stop(process, number=signal.SIGINT, seconds=SECONDS):
  """Asks a run to stop; returns the last line that it says to a scheduler."""
  process.send_signal(number)
  _, err = end(process, errors.ExitCode.STOPPED, seconds)
  return err.splitlines()[-1]


def until(process, words):
  """Reads its output up to a line with `words`."""
  for line in process.stdout:
    if words in line:
      return line
  raise AssertionError(process.communicate())


def until_trained(process, iterations):
  """Reads its output until it has done so many, wherever it began."""
  for _ in range(iterations):
    until(process, 'tokens/s')


def stop_at_once(process, seconds=SECONDS):
  """Interrupts a run twice, without waiting; returns what `stop` does."""
  process.send_signal(signal.SIGINT)
  until(process, 'again to stop at once')
  return stop(process, seconds=seconds)


def wait_for(condition, seconds=SECONDS):
  deadline = time.monotonic() + seconds
  while time.monotonic() < deadline:
    if value := condition():
      return value
    time.sleep(0.01)
  raise AssertionError(f'not within {seconds} s')


def read_lines(path):
  return [json.loads(x) for x in open(path)] if path.exists() else []


def metrics(workdir):
  return read_lines(workdir / 'metrics.jsonl')


def events(workdir):
  return read_lines(workdir / 'events.jsonl')


def workers(workdir):
  path = workdir / 'workers.json'
  return json.loads(path.read_text())['workers'] if path.exists() else []


def bits(lines):
  names = ('iteration', 'loss_hex', 'digest', 'eval_loss_hex')
  return [[x.get(n) for n in names] for x in lines]


def kinds(workdir):
  """Of events, in order."""
  return [e['kind'] for e in events(workdir)]


def of_kind(workdir, kind):
  """Events, in order."""
  return [e for e in events(workdir) if e['kind'] == kind]


def check_finished(host, workdir, expected):
  """A run finished, came to these bits, and left nothing."""
  assert bits(metrics(workdir)) == expected
  assert events(workdir)[-1]['kind'] == 'finished'
  assert (workdir / 'checkpoint').is_dir()
  assert host.is_clean()
  for event in of_kind(workdir, 'recovered'):
    assert event['digest_verified'] == (event['compared_iterations'] > 0)
    assert set(event['seconds']) == {'detect', 'start', 'fetch', 'replay'}


def resumptions(workdir):
  """First iterations of those runs that went on from snapshots."""
  return [e['first_iteration'] for e in of_kind(workdir, 'resumed')]


def one_process_bits(workdir):
  """What `bits` should be: of the same stages, trained in this process."""
  settings, _ = scan.read_settings(workdir)
  config = codec.decode(run_settings.RunConfig, settings)
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
  return expected


def undisturbed(tmp_path_factory):
  """Bits of a run of `ITERATIONS` that nothing happened to.

  It is made once, for all processes of the test session.
  """
  folder = tmp_path_factory.getbasetemp()
  if 'PYTEST_XDIST_WORKER' in os.environ:
    folder = folder.parent
  workdir = folder / 'undisturbed'
  with open(folder / 'undisturbed.lock', 'w') as lock:
    fcntl.flock(lock, fcntl.LOCK_EX)
    if not (workdir / 'checkpoint').exists():
      with host() as one:
        end(one.train(workdir))
        assert one.is_clean()
  found = bits(metrics(workdir))
  assert len(found) == ITERATIONS
  return found


def trainer(stages, iterations, *always, default_flags=()):
  """Returns what starts a run of this shape, in which faults may happen.

  Args:
    stages: that it has.
    iterations: that it has.
    *always: flags of each such run.
    default_flags: what stands where its caller gives no `flags`.
  """

  def train(host, workdir, *faults, flags=default_flags):
    return host.train(
      workdir,
      f'--stages={stages}',
      f'--iterations={iterations}',
      '--microbatches=4',
      '--dropout_rate=0.1',
      *always,
      *(f'--fail={fault}' for fault in faults),
      *flags,
    )

  return train


def undisturbed_run(tmp_path_factory, train, iterations, seconds=SECONDS):
  """The workdir of a run that nothing happens to.

  Args:
    tmp_path_factory: pytest's.
    train: starts it, on a host and in a workdir.
    iterations: that it has.
    seconds: that it may take.
  """
  workdir = tmp_path_factory.mktemp('undisturbed') / 'run'
  with host() as one:
    end(train(one, workdir), seconds=seconds)
    assert one.is_clean()
  numbers = [x['iteration'] for x in metrics(workdir)]
  assert numbers == list(range(1, iterations + 1))
  return workdir


def undisturbed_metrics(tmp_path_factory, train, iterations, seconds=SECONDS):
  """Metrics of such a run; see `undisturbed_run`."""
  return metrics(undisturbed_run(tmp_path_factory, train, iterations, seconds))


@contextlib.contextmanager
def host():
  """A `Host`, closed at the end."""
  one = Host()
  try:
    yield one
  finally:
    one.close()
