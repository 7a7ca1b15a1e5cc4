"""A run that an earlier version began is finished by this one, bit for bit.

The earlier version is the commit before the packages were moved; it is taken
from the history of this repository, and runs for real.
"""

import io
import os
import signal
import subprocess
import tarfile

import pytest

from moetion_jax.hostmem import run_store
from moetion_jax.runtime.records import held_run
from tests.support import helpers, runs

pytestmark = [pytest.mark.thorough, pytest.mark.timeout(600)]

_BEFORE = 'cb385cedc9323effc9617674cdb2525d94c96def'
_ITERATIONS = 12
SECONDS = 240.0


@pytest.fixture(scope='module')
def before(tmp_path_factory):
  """The files of the earlier version."""
  archive = subprocess.run(
    ['git', 'archive', _BEFORE], cwd=helpers.ROOT, capture_output=True
  )
  if archive.returncode:
    pytest.skip(f'the history has no {_BEFORE}: a shallow clone, or no clone')
  folder = tmp_path_factory.mktemp('before')
  with tarfile.open(fileobj=io.BytesIO(archive.stdout)) as tar:
    tar.extractall(folder, filter='data')
  return folder


def _train(host, workdir, *flags, **options):
  return host.train(workdir, f'--iterations={_ITERATIONS}', *flags, **options)


@pytest.mark.parametrize(
  'flags',
  [
    ('--stages=2', '--window_length=3'),
    ('--stages=2', '--policy=two_phase', '--interval=3'),
    ('--stages=1', '--replicas=2', '--shard_optimizer', '--window_length=2'),
  ],
  ids=['sparse', 'two_phase', 'zero1'],
)
def test_a_run_of_before_is_finished(
  host, workdir, before, tmp_path_factory, flags
):
  undisturbed = tmp_path_factory.mktemp('undisturbed') / 'run'
  runs.end(_train(host, undisturbed, *flags), seconds=SECONDS)
  run = _train(host, workdir, *flags, root=before)
  runs.until_trained(run, _ITERATIONS - 3)
  os.kill(run.pid, signal.SIGKILL)  # the agent, and so all of it
  runs.wait_for(lambda: not host.processes())
  written = len(runs.metrics(workdir))
  assert 0 < written < _ITERATIONS
  out, _ = runs.end(_train(host, workdir, *flags), seconds=SECONDS)
  assert 'Going on with iteration' in out, out
  (first,) = runs.resumptions(workdir)
  assert 1 < first <= written + 1
  runs.check_finished(host, workdir, runs.bits(runs.metrics(undisturbed)))
  # From now on it is found wherever it is moved.
  assert held_run.read_id(workdir) == run_store.former_id(workdir)
