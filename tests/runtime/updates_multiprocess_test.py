"""Runs whose recoveries apply recorded gradients, and come to the same bits.

They are compared with runs that record none: what is captured changes nothing
of what is computed.
"""

import signal

import pytest

from tests.support import runs, worlds

pytestmark = [pytest.mark.thorough, pytest.mark.timeout(600)]

_STAGES, _ITERATIONS, _WINDOW = 3, 14, 3
_UPDATES = '--replay=updates'
_train = runs.trainer(
  _STAGES, _ITERATIONS, f'--window_length={_WINDOW}', '--standby'
)


@pytest.fixture(scope='module')
def undisturbed(tmp_path_factory):
  """What every run must come to."""
  return runs.bits(
    runs.undisturbed_metrics(
      tmp_path_factory, _train, _ITERATIONS, worlds.SECONDS
    )
  )


def _applied(workdir):
  """(iterations done again, updates applied) of each recovery, in order."""
  return [
    (e['replayed_iterations'], e['applied_updates'])
    for e in runs.of_kind(workdir, 'recovered')
  ]


def test_kills_in_every_phase_and_of_everything(host, workdir, undisturbed):
  """Next to nothing is done again: what was interrupted, or had not landed."""
  faults = [
    'kill:stage=1,iteration=4,phase=backward',
    'kill:stage=0,iteration=6,phase=update',
    'kill:stage=2,iteration=8,phase=capture',
    'kill_all:stage=1,iteration=11,phase=forward',
  ]
  flags = [_UPDATES]
  runs.end(
    _train(host, workdir, *faults, flags=flags),
    -signal.SIGKILL,
    seconds=worlds.SECONDS,
  )
  runs.wait_for(lambda: not host.processes(), seconds=20)
  applied = _applied(workdir)
  runs.end(_train(host, workdir, *faults, flags=flags), seconds=worlds.SECONDS)
  runs.check_finished(host, workdir, undisturbed)
  assert len(applied) == 3
  for again, updates in applied:
    assert 1 <= again <= 3 and updates >= _WINDOW - 1


def test_replicas_that_share_the_training_state(host, tmp_path, workdir):
  """Each applies what it owns; one dies while they do."""
  faults = [
    'kill:stage=1,replica=1,iteration=4,phase=backward',
    'kill:stage=0,replica=0,iteration=6,phase=update',
    'kill:stage=0,replica=1,iteration=5,phase=replay',
  ]
  flags = ['--shard_optimizer', '--max_failures=6']
  calm = tmp_path / 'calm'
  runs.end(worlds.train(host, calm), seconds=worlds.SECONDS)
  run = worlds.train(host, workdir, *faults, flags=[*flags, _UPDATES])
  runs.end(run, seconds=worlds.SECONDS)
  runs.check_finished(host, workdir, runs.bits(runs.metrics(calm)))
  assert all(updates for _, updates in _applied(workdir))


def test_from_one_mode_to_the_other_and_back(host, workdir, undisturbed):
  """A start finds what the run before left, in whichever form that is."""
  for iteration, replay in ((6, 'updates'), (10, 'microbatches')):
    fault = f'kill_all:stage=1,iteration={iteration},phase=backward'
    run = _train(host, workdir, fault, flags=[f'--replay={replay}'])
    runs.end(run, -signal.SIGKILL, seconds=worlds.SECONDS)
    runs.wait_for(lambda: not host.processes(), seconds=20)
  fault = 'kill:stage=2,iteration=13,phase=forward'
  run = _train(host, workdir, fault, flags=[_UPDATES])
  runs.end(run, seconds=worlds.SECONDS)
  runs.check_finished(host, workdir, undisturbed)
  assert len(runs.resumptions(workdir)) == 2
