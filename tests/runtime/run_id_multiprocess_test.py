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
  assert runs.stop(run).startswith('Stopped after')


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
  # Moved while it lives: it ends, and says where it goes on.
  moved = tmp_path / 'deep' / 'moved'
  moved.parent.mkdir()
  run = host.train(workdir, *flags)
  runs.until_trained(run, 1)
  workdir.rename(moved)
  _, err = runs.end(run, 1)
  assert f'was moved to {moved} while its run lived; move it back' in err
  assert f'--workdir={moved}' in err and not workdir.exists()
  assert 'Once the cause is gone, the same command goes on from' in err
  shown = helpers.launch('show', str(moved), f'--hostmem_dir={host.path}')
  assert shown.returncode == 0 and str(store) in shown.stdout, shown.stderr
  out, _ = runs.end(host.train(moved, *flags))
  assert 'Going on with iteration' in out
  assert min(runs.resumptions(moved)) > 1 and len(runs.resumptions(moved)) == 3
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


@pytest.mark.parametrize('first', ['try', 'keep'])
def test_a_copy_of_a_run_that_was_moved(host, workdir, tmp_path, first):
  """`cp -r run try; mv run keep`: whichever starts first, the store stays."""
  flags = '--window_length=3', '--eval_every=0', _ITERATIONS
  run = host.train(workdir, *flags)
  runs.until(run, 'iteration 6/')
  _stop(run)
  (store,) = host.path.iterdir()
  before = _snapshots(store)
  assert before
  copy, moved = tmp_path / 'try', tmp_path / 'keep'
  shutil.copytree(workdir, copy)
  workdir.rename(moved)
  for name in (first, {'try': 'keep', 'keep': 'try'}[first]):
    run = host.train(tmp_path / name, *flags)
    words = 'is a copy of' if name == 'try' else 'Going on with iteration'
    runs.until(run, words)
    runs.until_trained(run, 1)
    _stop(run)
    if name == 'try':
      assert len(list(host.path.iterdir())) == 2
    if name == first == 'try':
      assert _snapshots(store) == before
  assert runs.resumptions(copy) == runs.resumptions(workdir) == []
  assert min(runs.resumptions(moved)) > 1
  lines = runs.bits(runs.metrics(moved))
  assert runs.bits(runs.metrics(copy))[:6] == lines[:6]


def test_what_a_run_left_in_other_places_goes_at_its_end(
  host, workdir, tmp_path, shm_folder
):
  """Another --hostmem_dir, and snapshots on disk of another policy."""
  flags = '--eval_every=0', _ITERATIONS
  disk = (
    '--policy=two_phase',
    '--interval=2',
    f'--durable_dir={tmp_path}/disk',
  )
  run = host.train(workdir, *flags, *disk)
  runs.until(run, 'iteration 6/')
  _stop(run)
  (on_disk,) = (tmp_path / 'disk').iterdir()
  # Stopped before it has anything of its own: nothing is removed.
  other = f'--hostmem_dir={shm_folder}'
  run = host.train(workdir, *flags, other)
  assert str(on_disk) in runs.until(run, "The run's snapshots are in")
  runs.until(run, 'Starting')
  runs.stop(run)
  assert on_disk.exists() and list(host.path.iterdir())
  out, _ = runs.end(host.train(workdir, *flags, other))
  assert 'Finished' in out
  assert host.is_clean()
  assert not list(shm_folder.iterdir()) and not on_disk.exists()


def test_a_fresh_run_removes_what_another_policy_left(host, workdir, tmp_path):
  disk = (
    '--policy=two_phase',
    '--interval=2',
    f'--durable_dir={tmp_path}/disk',
  )
  run = host.train(workdir, *disk)
  runs.until(run, 'iteration 6/')
  _stop(run)
  (on_disk,) = (tmp_path / 'disk').iterdir()
  (on_disk / 'notes').write_text('mine')
  out, _ = runs.end(host.train(workdir, '--fresh', '--iterations=2'))
  assert f'{on_disk}/notes' in out
  assert [path.name for path in on_disk.iterdir()] == ['notes']
  assert host.is_clean()


def test_whose_a_store_is_after_a_start_that_was_refused(host, workdir):
  """It names the process that left it, not the one that was refused."""
  run = host.train(workdir)
  runs.until(run, 'iteration 4/')
  _stop(run)
  refused = host.train(workdir, environment={'JAX_ENABLE_X64': '1'})
  out, err = runs.end(refused, 2)
  assert 'jax_enable_x64' in err and 'Going on' not in out
  assert 'the run goes on with it, if it can begin' in out
  out, _ = runs.end(host.train(workdir))
  assert f'left by pid {run.pid};' in out and 'Going on' in out
