"""The store of a run is found wherever its workdir is moved (issue 18)."""

import os
import shutil
import signal

import pytest

from tests.support import helpers, runs

pytestmark = [pytest.mark.thorough, pytest.mark.timeout(600)]


# So many that a run cannot end while another one starts.
_ITERATIONS = f'--iterations={3 * runs.ITERATIONS}'


def _stop(run):
  run.send_signal(signal.SIGINT)
  out, _ = runs.end(run)
  assert 'Stopped after' in out


def _snapshots(store):
  return sorted(str(p.relative_to(store)) for p in store.rglob('manifest.json'))


def test_a_workdir_that_is_linked_copied_and_moved(host, workdir, tmp_path):
  """Begun through a link, gone on with by its path, copied, moved, finished."""
  flags = '--window_length=3', '--eval_every=0', _ITERATIONS
  runs.end(host.train(tmp_path / 'undisturbed', *flags))
  undisturbed = runs.bits(runs.metrics(tmp_path / 'undisturbed'))
  workdir.mkdir()
  (tmp_path / 'link').symlink_to(workdir)
  run = host.train(tmp_path / 'link', *flags)
  runs.until(run, 'iteration 6/')
  _stop(run)
  (store,) = host.path.iterdir()
  # While the original lives its copy begins, in a store of its own.
  copy = tmp_path / 'copy'
  shutil.copytree(workdir, copy)
  run = host.train(workdir, *flags)
  runs.until(run, 'Going on with iteration')
  other = host.train(copy, *flags)
  assert f'copy of {workdir}' in runs.until(other, 'copy of')
  runs.until_trained(run, 2)
  _stop(run)
  runs.until_trained(other, 1)
  _stop(other)
  assert len(list(host.path.iterdir())) == 2
  before = _snapshots(store)
  out, _ = runs.end(host.train(copy, *flags))
  assert 'copy of' not in out and 'Going on with iteration' in out
  assert list(host.path.iterdir()) == [store]
  assert _snapshots(store) == before != []
  assert runs.bits(runs.metrics(copy)) == undisturbed
  moved = tmp_path / 'deep' / 'moved'
  moved.parent.mkdir()
  workdir.rename(moved)
  shown = helpers.launch('show', str(moved), f'--hostmem_dir={host.path}')
  assert shown.returncode == 0 and str(store) in shown.stdout, shown.stderr
  out, _ = runs.end(host.train(moved, *flags))
  assert 'Going on with iteration' in out
  assert min(runs.resumptions(moved)) > 1 and len(runs.resumptions(moved)) == 2
  runs.check_finished(host, moved, undisturbed)


def test_a_run_that_was_killed_before_it_could_begin(host, workdir):
  """Its store has a name that only the lock file knows."""
  run = host.train(workdir)
  runs.wait_for(lambda: list(host.path.glob('moetion-*/owner')))
  os.kill(run.pid, signal.SIGKILL)
  runs.wait_for(lambda: not host.processes())
  assert not (workdir / 'config.json').exists()
  assert len(os.listdir(host.path)) == 1
  out, _ = runs.end(host.train(workdir, '--iterations=2'))
  assert 'removed as soon as the new run can begin' in out
  assert host.is_clean()
