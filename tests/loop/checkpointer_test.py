"""The README's loop, killed and started again."""

import pathlib
import re
import shutil
import signal
import subprocess
import sys
import tempfile

import numpy as np
import pytest

from tests.support import helpers

_SAVE = """
import numpy, sys
flat = jax.tree_util.tree_flatten_with_path(checkpointer.state)[0]
numpy.savez(sys.argv[1], **{jax.tree_util.keystr(p): x for p, x in flat})
"""


@pytest.fixture
def shm():
  folder = pathlib.Path(tempfile.mkdtemp(dir='/dev/shm', prefix='loop-test-'))
  yield folder
  shutil.rmtree(folder, ignore_errors=True)


def _program(folder: pathlib.Path) -> str:
  """The README's text, with another folder."""
  readme = (helpers.ROOT / 'README.md').read_text()
  section = readme.split('## Use it in a loop of your own')[1]
  found = re.search(r'```python\n(.*?)```', section, re.DOTALL)
  assert found
  text = found[1]
  assert len([line for line in text.splitlines() if line.strip()]) < 30
  assert "'/dev/shm/my-run'" in text
  return text.replace('/dev/shm/my-run', str(folder))


def _start(program: str, out: pathlib.Path) -> subprocess.Popen:
  return subprocess.Popen(
    [sys.executable, '-c', program + _SAVE, str(out)],
    cwd=helpers.ROOT,
    stdout=subprocess.PIPE,
    text=True,
  )


def _lines(process: subprocess.Popen, until: int = 10**9) -> dict[int, str]:
  """Losses that it prints, to its end or up to an iteration."""
  losses = {}
  assert process.stdout is not None
  for line in process.stdout:
    iteration, loss = line.split()
    losses[int(iteration)] = loss
    if int(iteration) >= until:
      break
  return losses


@pytest.mark.thorough
@pytest.mark.timeout(240)
def test_the_readme_program_killed_three_times_ends_with_the_same_bits(shm):
  with _start(_program(shm / 'whole'), shm / 'whole.npz') as process:
    expected = _lines(process)
  assert process.returncode == 0
  assert sorted(expected) == list(range(1, 201))

  program, found = _program(shm / 'killed'), {}
  for until in (3, 60, 131):
    with _start(program, shm / 'killed.npz') as process:
      losses = _lines(process, until)
      process.send_signal(signal.SIGKILL)
    if len(found) > 8:  # a whole window was there
      # It went on from where it was, not from the beginning.
      assert 1 < min(losses) <= max(found) + 1
    found |= losses
  with _start(program, shm / 'killed.npz') as process:
    losses = _lines(process)
  assert process.returncode == 0
  assert min(losses) > 100
  found |= losses
  assert found == expected
  whole, killed = np.load(shm / 'whole.npz'), np.load(shm / 'killed.npz')
  assert sorted(whole) == sorted(killed) and len(whole) > 5
  for name in whole:
    np.testing.assert_array_equal(whole[name], killed[name], strict=True)
