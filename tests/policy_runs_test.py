"""Failures that all policies have, and what is made of a run's files."""

import statistics
import tempfile

import pytest

from launch import benchmark_accuracy, benchmark_ettr, policy_runs
from tests import helpers

pytestmark = [pytest.mark.fast, pytest.mark.timeout(180)]

_FIRST = policy_runs.WARM_UP_ITERATIONS + 1


def test_failures_are_drawn_from_the_seed_alone():
  draw = policy_runs.draw_failures
  assert draw(1, 20.0, 500, 2) == draw(1, 20.0, 500, 2)
  assert draw(1, 20.0, 500, 2) != draw(2, 20.0, 500, 2)
  # A longer run has the same ones first.
  short, long = draw(1, 20.0, 300, 2), draw(1, 20.0, 600, 2)
  assert long[: len(short)] == short and len(long) > len(short)


def test_failures_are_poisson_and_inside_the_run():
  found = [policy_runs.draw_failures(s, 25.0, 1011, 3) for s in range(200)]
  for failures in found:
    assert all(_FIRST <= f.iteration < 1011 for f in failures)
    moments = [f.iteration for f in failures]
    assert moments == sorted(moments)
  counts = [len(failures) for failures in found]
  # Mean 40 and variance 40, of 200 draws: five standard errors.
  assert abs(statistics.fmean(counts) - 40) < 5 * (40 / 200) ** 0.5
  assert 25 < statistics.variance(counts) < 60
  assert {f.stage for failures in found for f in failures} == {0, 1, 2}


def _event(kind, stage, **fields):
  return {'kind': kind, 'stage': stage, **fields}


def _recovered(stage, replayed, **seconds):
  return _event(
    'recovered', stage, replayed_iterations=replayed, seconds=seconds
  )


def _outcome(events=(), progress=((0.0, 10), (1.0, 11), (4.0, 12), (5.0, 14))):
  return policy_runs.Outcome(progress=progress, metrics=(), events=events)


def test_stages_that_go_back_together_are_one_recovery():
  outcome = _outcome(
    [
      _event('recovery_started', 0),
      _event('recovery_started', 1),
      _recovered(1, 5, detect=0.1, replay=3.0),
      _recovered(0, 4, detect=0.2, replay=1.0),
      _event('window', None),
      _event('recovery_started', 1),
      _recovered(1, 3, detect=0.0, replay=2.0),
    ]
  )
  assert outcome.recoveries() == [
    {'seconds': 3.1, 'iterations': 5, 'detect': 0.1, 'replay': 3.0},
    {'seconds': 2.0, 'iterations': 3, 'detect': 0.0, 'replay': 2.0},
  ]
  assert outcome.recovery_seconds == pytest.approx(5.1)
  assert outcome.redone_iterations == 8


def test_effective_time():
  outcome = _outcome()
  assert (outcome.iterations, outcome.wall_seconds) == (4, 5.0)
  assert policy_runs.ettr(outcome, 1.0) == 0.8
  assert outcome.quiet_seconds == 1.0


def test_a_real_run_with_a_failure_and_without(tmp_path):
  """It comes to the same bits, takes longer, and can be drawn."""
  flags = [*helpers.train_flags('')[1:], '--stages=2', '--eval_every=7']
  failure = policy_runs.Failure(stage=1, iteration=14, phase='backward')
  with tempfile.TemporaryDirectory(dir='/dev/shm', prefix='test-') as memory:
    none, sparse = (
      policy_runs.run(flags, policy, failures, memory, iterations=20)
      for policy, failures in (('none', ()), ('sparse', (failure,)))
    )
  assert none.bits() == sparse.bits() and none.loss() == sparse.loss()
  assert not none.recoveries() and none.recovery_seconds == 0
  (recovery,) = sparse.recoveries()
  assert recovery['iterations'] > 0
  assert 0 < sparse.recovery_seconds < sparse.wall_seconds
  assert [i for _, i in sparse.progress][-1] == 20
  outcomes = {('none', 25.0): [none], ('sparse', 25.0): [sparse]}
  (found,) = [
    row for row in benchmark_ettr.rows(outcomes) if row[0].endswith('ETTR')
  ]
  useful = none.wall_seconds / none.iterations * sparse.iterations
  assert found[1].median == pytest.approx(useful / sparse.wall_seconds)
  benchmark_ettr.plot(outcomes, tmp_path / 'ettr.png')
  both = {'none': none, 'sparse': sparse}
  benchmark_accuracy.plot(both, tmp_path / 'accuracy.png')
  rows = benchmark_accuracy.rows(both)
  shares = {name: value.median for name, value, _ in rows}
  assert shares['sparse: share of iterations equal in every bit to none'] == 1
  for name in ('ettr', 'accuracy'):
    assert (tmp_path / f'{name}.png').read_bytes().startswith(b'\x89PNG')
