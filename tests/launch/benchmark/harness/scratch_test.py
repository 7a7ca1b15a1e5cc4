"""Folders go with their program, also when it is killed."""

import os
import pathlib
import subprocess
import sys

import pytest

from launch.benchmark.harness import scratch

pytestmark = pytest.mark.timeout(120)

_PROGRAM = """
import pathlib, sys
from launch.benchmark.harness import scratch
with scratch.folder(sys.argv[1]) as path:
  (path / 'deep').mkdir()
  (path / 'deep' / 'file').write_text('held')
  print(path, flush=True)
  sys.stdin.read()
"""


@pytest.fixture
def start(tmp_path):
  """Starts programs that hold a folder each."""
  running = []

  def start_one():
    process = subprocess.Popen(
      [sys.executable, '-c', _PROGRAM, str(tmp_path)],
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      text=True,
    )
    running.append(process)
    return process, pathlib.Path(process.stdout.readline().strip())

  yield start_one
  for process in running:
    process.kill()
    process.communicate()


def test_a_folder_is_gone_at_the_end(tmp_path):
  with scratch.folder(tmp_path) as path:
    assert path.parent == tmp_path and not os.listdir(path)
    assert path.stat().st_mode & 0o777 == 0o700
    (path / 'file').write_text('held')
  assert not os.listdir(tmp_path)
  with pytest.raises(ValueError, match='mine'), scratch.folder(tmp_path):
    raise ValueError('mine')
  assert not os.listdir(tmp_path)


def test_what_a_killed_program_left_goes_and_no_other(start, tmp_path):
  _, held = start()
  killed, left = start()
  (tmp_path / 'of-others').mkdir()
  killed.kill()
  killed.wait()
  assert (left / 'deep' / 'file').exists()  # nobody was there to remove it
  with scratch.folder(tmp_path) as mine:
    assert not left.exists()
    assert (held / 'deep' / 'file').read_text() == 'held'
    scratch.remove_abandoned(tmp_path)  # nor its own
    assert {p.name for p in tmp_path.iterdir()} == {
      held.name,
      mine.name,
      'of-others',
    }


def test_a_program_that_ends_removes_its_own(start):
  process, path = start()
  process.communicate('')
  assert process.returncode == 0 and not path.exists()
