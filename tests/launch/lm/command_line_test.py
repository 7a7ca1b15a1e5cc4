"""Commands, however they are started, refuse a wrong flag in one line."""

import subprocess
import sys

import pytest

from tests.support import helpers

_COMMANDS = ('train', 'show', 'convert', 'generate')
_PACKAGES = ('chaos', 'simulate', 'benchmark')


@pytest.mark.parametrize(
  ('name', 'file'),
  [
    *((name, f'{name}.py') for name in _COMMANDS),
    *((name, name) for name in _PACKAGES),
    *((name, f'{name}/__main__.py') for name in _PACKAGES),
  ],
)
def test_a_command_that_is_run_as_a_file(tmp_path, name, file):
  """From anywhere, as what other tools do with a path."""
  ended = subprocess.run(
    [sys.executable, helpers.ROOT / 'launch' / file, '--no_such_flag'],
    cwd=tmp_path,
    capture_output=True,
    text=True,
    timeout=60,
  )
  (said,) = ended.stderr.splitlines()
  assert ended.returncode == 2 and said.startswith(f'launch.{name}: error:')
