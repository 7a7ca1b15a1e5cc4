"""Runs that are trained longer have the bits of one that was from the start."""

import shutil

import pytest

from tests.support import helpers, runs

pytestmark = [pytest.mark.thorough, pytest.mark.timeout(400)]

_FIRST, _LAST = 8, 14


def _train(host, workdir, *flags):
  return host.train(
    workdir,
    '--stages=2',
    '--window_length=3',
    '--dropout_rate=0.1',
    '--eval_every=4',
    *flags,
  )


@pytest.fixture(scope='module')
def finished(tmp_path_factory):
  """The workdir of a run of `_FIRST` iterations."""
  workdir = tmp_path_factory.mktemp('longer') / 'run'
  with runs.host() as host:
    runs.end(_train(host, workdir, f'--iterations={_FIRST}'))
    assert host.is_clean()
  return workdir


@pytest.fixture
def workdir(finished, tmp_path):
  """A finished run of its own for a test."""
  path = tmp_path / 'run'
  shutil.copytree(finished, path)
  return path


def test_a_finished_run_goes_on(host, workdir):
  """It dies before its first snapshot: one stage, then everything."""
  more = f'--iterations={_LAST}', '--extend=pin'
  before = runs.metrics(workdir)
  _, err = runs.end(_train(host, workdir, more[0]), 2)
  assert '--extend=pin' in err and '--extend=stretch' in err
  dies = (
    f'--fail=kill:stage=1,iteration={_FIRST + 1},phase=forward',
    f'--fail=kill_all:stage=0,iteration={_FIRST + 1},phase=update',
  )
  runs.end(_train(host, workdir, *more, *dies), -9)
  (failure,) = runs.of_kind(workdir, 'failure')
  assert (failure['stage'], failure['iteration']) == (1, _FIRST + 1)
  assert runs.bits(runs.metrics(workdir)) == runs.bits(before)
  out, _ = runs.end(_train(host, workdir, *more, *dies))
  assert f'Going on with iteration {_FIRST + 1}, from {workdir}' in out, out
  runs.check_finished(host, workdir, runs.one_process_bits(workdir))
  assert runs.metrics(workdir)[:_FIRST] == before
  assert runs.resumptions(workdir) == [_FIRST + 1] * 2
  assert runs.kinds(workdir).count('extended') == 1
  out, _ = runs.end(_train(host, workdir, *more))
  assert 'This run is finished' in out


def test_a_new_run_takes_over_the_position(host, finished, workdir, tmp_path):
  """With the schedule of the other, so that the two are one trajectory."""
  new = tmp_path / 'new'
  flags = (
    f'--iterations={_LAST}',
    f'--init_from={finished}/checkpoint',
    '--init_position',
  )
  runs.end(_train(host, new, *flags, '--fail=kill:stage=0,iteration=11'))
  runs.end(_train(host, workdir, f'--iterations={_LAST}', '--extend=pin'))
  expected = runs.bits(runs.metrics(workdir))
  runs.check_finished(host, new, expected[_FIRST:])


def test_a_stopped_run_gets_another_end(host, tmp_path):
  """It was to end with its eighth iteration; and the text moved meanwhile."""
  workdir, text = tmp_path / 'run', tmp_path / 'text'
  text.write_bytes(helpers.DATA.read_bytes())
  run = _train(host, workdir, f'--iterations={_FIRST}', f'--data={text}')
  runs.until(run, 'iteration 2/')
  runs.stop(run)
  text.rename(tmp_path / 'moved')
  (tmp_path / 'link').symlink_to(tmp_path / 'moved')
  more = (
    f'--iterations={_LAST}',
    '--extend=stretch',
    f'--data={tmp_path}/./link',
  )
  runs.end(_train(host, workdir, *more))
  assert runs.resumptions(workdir)[0] > 1
  runs.check_finished(host, workdir, runs.one_process_bits(workdir))
