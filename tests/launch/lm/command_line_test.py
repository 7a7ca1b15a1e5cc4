"""Commands, however they are started, refuse a wrong flag in one line."""

import os
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


@pytest.mark.parametrize(
  ('name', 'variables', 'is_taken'),
  [
    ('ü', {'LC_ALL': 'C'}, True),
    (
      'ü',
      {'LC_ALL': 'C', 'PYTHONUTF8': '0', 'PYTHONCOERCECLOCALE': '0'},
      False,
    ),
    (b'\xfc', {}, False),
  ],
)
def test_names_that_are_not_of_ascii_letters(
  tmp_path, name, variables, is_taken
):
  ended = subprocess.run(
    [sys.executable, '-m', 'launch.show', name],
    cwd=helpers.ROOT,
    env=os.environ | variables,
    capture_output=True,
    text=True,
    timeout=60,
  )
  (said,) = ended.stderr.splitlines()
  assert ended.returncode == 2
  assert ('holds no run' in said) == is_taken
  assert ('PYTHONUTF8=1' in said) == (not is_taken)


def test_a_current_folder_that_was_removed(tmp_path):
  (tmp_path / 'x').mkdir()
  ended = subprocess.run(
    f'cd x && rmdir ../x && exec "{sys.executable}" '
    f'"{helpers.ROOT}/launch/show.py" run',
    shell=True,
    cwd=tmp_path,
    capture_output=True,
    text=True,
    timeout=60,
  )
  (said,) = ended.stderr.splitlines()
  assert ended.returncode == 2 and 'the current folder' in said
