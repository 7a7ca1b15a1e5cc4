"""Runs whose host memory is full while they run: a visible wait, a clear end.

Memory really runs out: a reader holds what a log needs, or a tmpfs is full.
"""

import contextlib
import errno
import gc
import os
import pathlib
import threading

import pytest

from moetion_jax import keys
from moetion_jax.hostmem import segment_reader
from tests.support import helpers, runs

pytestmark = [pytest.mark.thorough, pytest.mark.timeout(600)]


@pytest.fixture(scope='module')
def undisturbed(tmp_path_factory):
  return runs.undisturbed(tmp_path_factory)


@contextlib.contextmanager
def _held_entry(host):
  """Holds an entry of stage 0 of the one run, as a reader that hangs would."""
  (folder,) = host.path.glob('moetion-*')
  index = segment_reader.StoreIndex(folder)

  def take():
    for header in reversed(index.entries()):
      if (header.key.stage, header.key.kind) == (0, keys.EntryKind.ACTIVATION):
        return index.take(header.key)
    return None

  held = [runs.wait_for(take)]
  try:
    yield held[0][0]
  finally:
    held.clear()
    gc.collect()
    index.close()


def test_a_full_log(host, tmp_path, undisturbed):
  """A visible wait, then the end; the same command goes on, and waits again."""
  workdir = tmp_path / 'run'
  flags = '--log_iterations=10', '--max_failures=3'
  run = host.train(workdir, *flags, '--full_seconds=2')
  runs.until(run, 'iteration 2/')
  with _held_entry(host) as header:
    line = runs.until(run, 'stage 0 is blocked')
    assert 'no room for' in line and '2 s' in line
    assert runs.wait_for(
      lambda: runs.workers(workdir)[0]['state'] == 'blocked', 2
    )
    _, err = runs.end(run, 1)
  assert 'stage 0, iteration' in err and 'that was so for 2 s' in err
  assert f'{header.key}: a reader holds its memory' in err
  assert 'the same command goes on' in err
  assert 'recovery_started' not in runs.kinds(workdir)  # it would wait again
  assert runs.kinds(workdir)[-1] == 'failed'
  assert host.has_ended()
  run = host.train(workdir, *flags)
  runs.until_trained(run, 1)
  with _held_entry(host):
    runs.until(run, 'stage 0 is blocked')
  runs.end(run)
  assert runs.resumptions(workdir)[0] > 1
  assert runs.bits(runs.metrics(workdir)) == undisturbed
  assert host.is_clean()


@pytest.fixture
def small_tmpfs(tmp_path):
  """A tmpfs of its own, that can be filled."""
  with helpers.small_tmpfs(tmp_path / 'tmpfs') as path:
    yield path


@contextlib.contextmanager
def _kept_full(path: pathlib.Path):
  """Fills a file system to its last page, and takes every page that comes free.

  A run gives back a page with every snapshot that it retires, and may have it
  again for the next one: a system that is filled once need not block it.
  """
  is_over, is_full = threading.Event(), threading.Event()
  errors = []

  def fill():
    with open(path / 'filler', 'wb', buffering=0) as file:
      while not is_over.is_set():
        try:
          file.write(bytes(1 << 16))
        except OSError as error:
          errors.append(error.errno)
          is_full.set()
          is_over.wait(0.001)

  thread = threading.Thread(target=fill)
  thread.start()
  try:
    assert is_full.wait(runs.SECONDS)
    yield
  finally:
    is_over.set()
    thread.join()
    (path / 'filler').unlink()
  assert set(errors) == {errno.ENOSPC}


def test_a_full_tmpfs(host, tmp_path, small_tmpfs):
  """A visible wait, then the end; the same command goes on, and waits again."""
  workdir = tmp_path / 'run'
  flags = f'--hostmem_dir={small_tmpfs}', '--iterations=60'
  run = host.train(workdir, *flags, '--full_seconds=1')
  runs.until(run, 'iteration 6/')
  with _kept_full(small_tmpfs):
    assert 'no room for' in runs.until(run, 'is blocked')
    _, err = runs.end(run, 1)
  assert 'No space left' in err and '--hostmem_dir' in err
  assert 'recovery_started' not in runs.kinds(workdir)
  assert host.has_ended(small_tmpfs)
  run = host.train(workdir, *flags)
  runs.until_trained(run, 1)
  with _kept_full(small_tmpfs):
    runs.until(run, 'is blocked')
  runs.end(run)
  assert runs.resumptions(workdir)[0] > 1
  assert [x['iteration'] for x in runs.metrics(workdir)] == [*range(1, 61)]
  assert (workdir / 'checkpoint').is_dir()
  assert not os.listdir(small_tmpfs) and not host.processes()


def test_a_tmpfs_that_is_too_small(host, tmp_path, small_tmpfs):
  flags = [f'--hostmem_dir={small_tmpfs}', '--log_iterations=2000']
  _, err = runs.end(host.train(tmp_path / 'run', *flags), 2)
  assert '64.0 MiB' in err and len(err.strip().splitlines()) == 1
  assert not os.listdir(small_tmpfs) and not host.processes()
