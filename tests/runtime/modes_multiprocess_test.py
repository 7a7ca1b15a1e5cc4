"""Modes of all that a run leaves in its store: nobody else's to read.

Whatever the umask is; the files of the workdir follow it.
"""

import os
import pathlib
import signal
import stat

import pytest

from tests.support import runs

pytestmark = [pytest.mark.thorough, pytest.mark.timeout(600)]

SECONDS = 240.0


def _wrong_modes(folder: pathlib.Path):
  """Modes below a folder that others could use, or that are not as promised."""
  wrong, kinds = {}, set()
  # What vanishes meanwhile is passed over, as `Path.rglob` would not.
  for path in (
    pathlib.Path(parent, name)
    for parent, folders, files in os.walk(folder)
    for name in (*folders, *files)
  ):
    try:
      mode = os.lstat(path).st_mode
    except FileNotFoundError:  # retired, renamed, removed
      continue
    expected = 0o700 if stat.S_ISDIR(mode) else 0o600
    kinds.add(stat.S_IFMT(mode))
    if stat.S_IMODE(mode) != expected:
      wrong[str(path)] = oct(mode)
  return wrong, kinds


@pytest.mark.parametrize('policy', ['sparse', 'two_phase'])
def test_every_file_of_a_store(host, workdir, policy):
  """While it runs, and after everything was killed in the middle of its end."""
  before = os.umask(0)
  try:
    run = host.train(
      workdir,
      '--stages=2',
      '--iterations=8',
      '--eval_every=0',
      f'--policy={policy}',
      '--fail=kill_all:phase=save',
      *(['--interval=2'] if policy == 'two_phase' else ['--window_length=2']),
    )
  finally:
    os.umask(before)
  runs.until(run, 'iteration 1/')
  (store,) = host.path.glob('moetion-*')
  kinds = set()
  while run.poll() is None:
    wrong, found = _wrong_modes(store)
    assert not wrong
    kinds |= found
  runs.end(run, -signal.SIGKILL, seconds=SECONDS)
  assert kinds == {stat.S_IFREG, stat.S_IFDIR, stat.S_IFSOCK}
  assert stat.S_IMODE(os.lstat(store).st_mode) == 0o700
  assert _wrong_modes(store)[0] == {}
  names = {path.name for path in store.rglob('*')}
  assert {'lock', 'owner', 'index.json', '0.npy', 'data'} <= names
  if policy == 'two_phase':
    (durable,) = {p.parents[2] for p in workdir.rglob('manifest.json')}
    assert durable.parent == workdir
    assert stat.S_IMODE(os.lstat(durable).st_mode) == 0o700
    assert _wrong_modes(durable)[0] == {}
  assert stat.S_IMODE(os.lstat(workdir / 'metrics.jsonl').st_mode) == 0o666
