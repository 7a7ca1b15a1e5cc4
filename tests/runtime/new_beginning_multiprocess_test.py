"""A stage of which nothing is left, late in a run: all begin again."""

import os
import pathlib
import shutil
import signal

import pytest

from tests.support import runs

pytestmark = [pytest.mark.thorough, pytest.mark.timeout(400)]

# Many more iterations than are kept, which are 2 windows of 2 and 4 more.
_ITERATIONS = 24


def _train(host, workdir):
  return host.train(
    workdir,
    '--stages=2',
    f'--iterations={_ITERATIONS}',
    '--window_length=2',
    '--dropout_rate=0.1',
    '--nostandby',
  )


def test_all_snapshots_of_a_stage_are_lost(host, tmp_path):
  runs.end(_train(host, tmp_path / 'undisturbed'), seconds=200)
  workdir = tmp_path / 'run'
  run = _train(host, workdir)
  runs.until(run, 'iteration 16/')
  pid = runs.workers(workdir)[1]['pid']
  os.kill(pid, signal.SIGSTOP)  # so that it takes no other meanwhile
  (folder,) = pathlib.Path(host.path).glob('*/stage-1.replica-0.snapshots')
  assert len(list(folder.glob('[0-9]*/manifest.json'))) >= 4
  for manifest in folder.glob('*/manifest.json'):
    manifest.unlink()
  os.kill(pid, signal.SIGKILL)
  runs.end(run, seconds=200)
  assert host.is_clean()
  expected = runs.bits(runs.metrics(tmp_path / 'undisturbed'))
  assert runs.bits(runs.metrics(workdir)) == expected
  started = [e for e in runs.events(workdir) if e['kind'] == 'recovery_started']
  assert [(e['stage'], e['first_iteration']) for e in started] == [
    (0, 1),
    (1, 1),
  ]
  recovered = [e for e in runs.events(workdir) if e['kind'] == 'recovered']
  assert {e['source'] for e in recovered} == {'initial'}
  shutil.rmtree(tmp_path)
