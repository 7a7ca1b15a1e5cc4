"""A run whose output nobody reads any more comes to its end all the same."""

import os
import subprocess

import pytest

from tests.support import helpers, runs

pytestmark = [pytest.mark.thorough, pytest.mark.timeout(300)]


@pytest.mark.parametrize('takes_errors', [False, True])
def test_its_reader_ends_after_a_line(host, workdir, takes_errors):
  """As `| head -1`, or `2>&1 | head -1`: a worker that dies prints as well."""
  reader, writer = os.pipe()
  errors = subprocess.STDOUT if takes_errors else subprocess.PIPE
  run = host.train(
    workdir,
    '--iterations=4',
    '--window_length=2',
    '--fail=exception:stage=1,iteration=2,phase=backward',
    stdout=writer,
    stderr=errors,
  )
  os.close(writer)
  with open(reader) as lines:
    assert 'Starting workers of 2 stage(s)' in lines.readline()
  _, err = runs.end(run)
  assert len(runs.metrics(workdir)) == 4
  assert runs.kinds(workdir)[-1] == 'finished'
  assert 'recovered' in runs.kinds(workdir)
  assert host.is_clean()
  if not takes_errors:
    said = [x for x in err.splitlines() if 'can no longer be written' in x]
    assert len(said) == 1 and 'standard output' in said[0]
    assert 'scripted' in err  # the other stream is still there


def test_without_any_stream(host, workdir):
  """As `>&- 2>&-`: no file of the run takes their place."""
  command = helpers.train_flags(
    workdir, f'--hostmem_dir={host.path}', '--iterations=3'
  )
  run = host.start(
    '-c',
    'import os, sys\n'
    'for fd in (0, 1, 2): os.close(fd)\n'
    f"os.execv(sys.executable, [sys.executable, '-m', 'launch.train', "
    f'*{command!r}])',
  )
  runs.end(run)
  assert len(runs.metrics(workdir)) == 3  # each line is JSON
  assert runs.kinds(workdir)[-1] == 'finished'
  assert host.is_clean()
