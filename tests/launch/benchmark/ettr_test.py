"""What the benchmarks of whole runs make of what runs leave behind."""

import dataclasses
import itertools

import pytest

from launch.benchmark import accuracy, ettr as benchmark_ettr
from launch.benchmark.harness import (
  predict as benchmark_predict,
  runs as benchmark_runs,
)


def _run(moments, events=(), losses=None, eval_every=0, every=1, script=()):
  """A run that wrote iteration i at the i-th moment, in seconds."""
  lines = [
    {
      'iteration': i,
      'loss': 1.0,
      'loss_hex': '0x1',
      'digest': 'd' if losses is None else losses[i - 1],
      'seconds': 1.0,
      'snapshot_bytes': 0 if i % every else 3,
      'copy_bytes_per_second': [1.0, 1.0],
      'blocked_seconds': 0.5,
    }
    | ({'eval_loss': 2.0 / i} if eval_every and not i % eval_every else {})
    for i in range(1, len(moments) + 1)
  ]
  return benchmark_runs.RunOutcome(
    progress=list(zip(moments, range(1, len(moments) + 1), strict=True)),
    lines=lines,
    events=events,
    script=script,
  )


def test_seconds_until_it_is_done_for_good():
  progress = [(1.0, 1), (2.0, 2), (3.0, 3), (4.0, 4), (6.0, 2), (7.0, 4)]
  run = benchmark_runs.RunOutcome(progress=progress, lines=(), events=())
  assert run.seconds(1, 4) == 6.0
  assert run.seconds(2, 4) == 5.0  # begins when it was there first
  assert run.seconds(1, 3) == 6.0  # what was cut does not count
  assert run.seconds(1, 2) == 1.0
  # Lines that came between two looks.
  run = benchmark_runs.RunOutcome(
    progress=[(1.0, 2), (4.0, 5)], lines=(), events=()
  )
  assert run.seconds(1, 3) == 3.0


def _events(*rows) -> list[dict]:
  names = ('time', 'kind', 'stage', 'replayed_iterations')
  return [dict(zip(names, row, strict=False)) for row in rows]


def test_recoveries_that_overlap_are_one():
  events = _events(
    (10.0, 'failure', 1),
    (10.1, 'recovery_started', 1),
    (12.0, 'recovered', 1, 4),
    (20.0, 'failure', 0),
    (20.1, 'recovery_started', 0),
    (20.1, 'recovery_started', 1),
    (21.0, 'recovered', 1, 7),
    (22.0, 'failure', 1),
    (22.1, 'recovery_started', 0),
    (22.1, 'recovery_started', 1),
    (25.0, 'recovered', 0, 9),
    (26.0, 'recovered', 1, 2),
    (30.0, 'failure', 0),  # which it never recovered from
  )
  assert benchmark_runs.recoveries(events) == [
    benchmark_runs.MeasuredRecovery(
      seconds=2.0, stages=1, replayed_iterations=4
    ),
    benchmark_runs.MeasuredRecovery(
      seconds=6.0, stages=2, replayed_iterations=9
    ),
  ]


def test_failures_are_a_poisson_process_drawn_from_a_seed():
  draw = benchmark_runs.draw_failures
  assert draw(3, 25, 20, 500, 4) == draw(3, 25, 20, 500, 4)
  assert draw(3, 25, 20, 500, 4) != draw(4, 25, 20, 500, 4)
  # A shorter run has the first failures of a longer one.
  short, long = draw(3, 25, 20, 200, 4), draw(3, 25, 20, 500, 4)
  assert short and long[: len(short)] == short
  script = draw(0, 20, 100, 20_100, 3)
  iterations = [int(x.split('iteration=')[1].split(',')[0]) for x in script]
  assert all(100 < i <= 20_100 for i in iterations)
  gaps = [b - a for a, b in itertools.pairwise(iterations)]
  mean = sum(gaps) / len(gaps)
  variance = sum((g - mean) ** 2 for g in gaps) / len(gaps)
  assert 18 < mean < 22
  assert 0.8 < variance / mean**2 < 1.2  # of exponential gaps: 1
  assert {x.split(',')[0] for x in script} == {
    f'kill:stage={s}' for s in range(3)
  }


def test_the_table_of_ettr(tmp_path):
  """Undisturbed 40 iterations take 40 s, of which 10 count."""
  recovered = _events(
    (70.0, 'failure', 0),
    (70.0, 'recovery_started', 0),
    (72.5, 'recovered', 0, 6),
    (73.0, 'standby', None),
  )
  recovered[3]['seconds'] = 9.0
  recovered[2]['seconds'] = {'detect': 0, 'start': 0, 'fetch': 0, 'replay': 3}
  rolled_back = [{'kind': 'rolled_back', 'lost_tokens': 8.0, 'plt': 0.04}]
  outcomes = {
    ('none', 0): [_run([float(i) for i in range(1, 41)])],
    ('sparse', 0): [_run([i * 1.25 for i in range(1, 41)])],
    # It loses 4 s in iteration 36, and does others in 1.6 s.
    ('sparse', 50): [
      _run(
        [i * 1.6 + 4 * (i > 35) + 10 for i in range(1, 41)],
        [*recovered, *rolled_back],
      )
    ],
  }
  found = {
    name: summary.median
    for name, summary, _ in benchmark_ettr.rows(outcomes, stages=2)
  }
  assert found == {
    'sparse, overhead, %': pytest.approx((25 + 60) / 2),
    'MTBF 50, sparse, ETTR': pytest.approx(0.5),
    'MTBF 50, sparse, lost to failures, % of its own pace': (
      pytest.approx(25.0)
    ),
    'MTBF 50, sparse, lost by a failure, s': pytest.approx(4.0),
    'MTBF 50, sparse, ETTR of all rounds together': (
      pytest.approx(1 / 1.425 / 1.25)
    ),
    'MTBF 50, sparse, failures': 1.0,
    'MTBF 50, sparse, recovery, s': 2.5,
    'MTBF 50, sparse, iterations done again': 6.0,
    'MTBF 50, sparse, lost tokens, %': 4.0,
    'MTBF 50, sparse, final loss against undisturbed': 0.0,
    # Nothing dies by its script: 16 s of 20.
    'MTBF 50, sparse, simulated from its own pace, off by, %': (
      pytest.approx(20.0)
    ),
    # 12.5 s of 20: iterations of 1.25 s.
    'MTBF 50, sparse, simulated from the pace of other runs, off by, %': (
      pytest.approx(37.5)
    ),
  }
  last = benchmark_ettr.details(outcomes)[-1]
  assert last['ettr'] == pytest.approx(0.5) and last['is_bit_equal']
  assert last['lost_tokens'] == 8.0 and last['blocked_seconds'] == 20.0
  assert last['quiet_iteration_seconds'] == pytest.approx(1.6)
  benchmark_ettr.plot(outcomes, tmp_path / 'ettr.png')
  assert (tmp_path / 'ettr.png').read_bytes().startswith(b'\x89PNG')


def test_by_how_much_sparse_is_ahead():
  """Of two rounds: 2 s and none are lost, against 4 s and 1 s, of 10."""

  def late(seconds):
    events = _events((70.0, 'failure', 0), (72.0, 'recovered', 0, 1))
    events[1]['seconds'] = dict.fromkeys(
      ('detect', 'start', 'fetch', 'replay'), 0.5
    )
    events.append({'time': 73.0, 'kind': 'standby', 'seconds': 1.0})
    moments = [i * 1.0 + seconds * (i > 35) + 35 for i in range(1, 41)]
    return _run(moments, events)

  quiet = [late(0.0)] * 2
  outcomes = {
    ('none', 0): quiet,
    ('sparse', 0): quiet,
    ('sparse', 50): [late(2.0), late(0.0)],
    ('dense', 0): quiet,
    ('dense', 50): [late(4.0), late(1.0)],
  }
  found = {
    name: (summary.median, goal)
    for name, summary, goal in benchmark_ettr.rows(outcomes, stages=2)
  }
  what = 'ETTR of all rounds together'
  assert found[f'MTBF 50, sparse, {what}'][0] == pytest.approx(20 / 22)
  assert found[f'MTBF 50, dense, {what}'][0] == pytest.approx(20 / 25)
  assert found[f'MTBF 50, sparse / dense, {what}'] == (
    pytest.approx(25 / 22),
    '> 1',
  )
  assert found['MTBF 50, dense, lost by a failure, s'][0] == 2.5
  assert f'MTBF 50, sparse / sparse, {what}' not in found


def test_the_table_of_accuracy(tmp_path):
  moments = [float(i) for i in range(1, 9)]
  exact = _run(moments, eval_every=4)
  stale = _run(
    moments,
    [{'kind': 'rolled_back', 'plt': 0.25}],
    losses=list('dddddxyz'),
    eval_every=4,
  )
  outcomes = {'none': exact, 'sparse': exact, 'partial': stale}
  assert accuracy.curve(exact) == [(4, 0.5), (8, 0.25)]
  found = {name: summary.median for name, summary, _ in accuracy.rows(outcomes)}
  assert found == {
    'none, final held-out loss': 0.25,
    'sparse, final held-out loss': 0.25,
    'sparse, bits of the undisturbed run': 1.0,
    'sparse, against undisturbed': 0.0,
    'partial, final held-out loss': 0.25,
    'partial, bits of the undisturbed run': 0.0,
    'partial, against undisturbed': 0.0,
    'partial, lost tokens, %': 25.0,
  }
  accuracy.plot(outcomes, tmp_path / 'accuracy.png')
  assert (tmp_path / 'accuracy.png').read_bytes().startswith(b'\x89PNG')


def test_quiet_iterations_are_those_that_nothing_died_in():
  run = _run(
    [1.0, 2.0, 3.0, 8.0, 9.0, 10.5, 11.5, 12.5],
    script=['kill:stage=1,iteration=5,phase=update'],
  )
  assert benchmark_predict.disturbed(run) == {4, 5, 6}
  assert benchmark_predict.own_pace(run, 1).iteration_seconds == 1.0
  # Going back is no iteration; several between two looks are.
  back = benchmark_runs.RunOutcome(
    progress=[(0.0, 1), (2.0, 2), (3.0, 1), (7.0, 3)], lines=(), events=()
  )
  assert benchmark_predict.quiet_seconds(back, 1) == (2.0 + 4.0) / 3


def test_what_failures_cost_is_what_those_that_died_had():
  def recovered(stage, detect, start, replay, iterations):
    seconds = {'detect': detect, 'start': start, 'fetch': 0.5, 'replay': replay}
    return {
      'kind': 'recovered',
      'stage': stage,
      'seconds': seconds,
      'replayed_iterations': iterations,
    }

  failure = {'kind': 'failure', 'stage': 1}
  runs = [
    _run([1.0], [failure, recovered(0, 9, 9, 9, 9), recovered(1, 1, 2, 6, 3)]),
    _run([1.0], [failure, recovered(1, 2, 4, 2, 1)]),
  ]
  assert benchmark_predict.costs(runs, 0) == benchmark_predict.MeasuredCosts(
    detect_seconds=1.5, start_seconds=3.0, fetch_seconds=0.5, replay_seconds=2.0
  )


def test_iterations_beside_a_standby_that_is_prepared_are_not_quiet():
  """Two failures; the second comes before another standby is warm."""
  lengths = [1.0] * 5 + [4.0, 1.5, 1.5, 5.0, 1.75, 1.75, 1.0, 1.0, 1.0]
  events = [
    {'time': time, 'kind': kind, 'stage': 0}
    | {'seconds': dict.fromkeys(('detect', 'start', 'fetch', 'replay'), 0.0)}
    | {'replayed_iterations': 1}
    for time, kind in [
      (5.5, 'failure'),
      (8.9, 'recovered'),
      (12.5, 'failure'),
      (16.9, 'recovered'),
      (20.4, 'standby'),
    ]
  ]
  run = dataclasses.replace(
    _run(list(itertools.accumulate(lengths)), events), began=0.0
  )
  assert benchmark_predict.own_pace(run, 1).iteration_seconds == 1.0
  # Twice half a second, twice three quarters; by two failures.
  assert benchmark_predict.costs([run], 1).warming_seconds == 2.5 / 2
  later = dataclasses.replace(run, began=100.0)  # all that was before it began
  assert benchmark_predict.own_pace(later, 1).iteration_seconds > 1.0


@pytest.mark.parametrize(
  'policy,every,landing_seconds,phase,lost_seconds',
  [
    # Snapshots 26 to 29 have landed: 27 to 30, of which 30 was new anyway.
    ('sparse', 1, 0.5, 'update', 0.9 + 4 * 0.5 - 1.0),
    ('sparse', 1, 0.5, 'backward', 0.3 + 5 * 0.5 - 1.0),  # 29 has not
    # Everybody goes back to 28, had it landed by then.
    ('dense', 4, 1.5, 'update', 0.9 + 1.0),
    ('dense', 4, 1.5, 'backward', 0.3 + 5.0),
  ],
)
def test_what_the_simulator_says_of_a_run(
  policy, every, landing_seconds, phase, lost_seconds
):
  script = [f'kill:stage=1,iteration=30,phase={phase}']
  run = _run([float(i) for i in range(1, 41)], every=every, script=script)
  for line in run.lines:
    line['snapshot_bytes'] *= landing_seconds * 2 / 3
  assert benchmark_predict.rhythm(run, 20) == (40, every)
  seconds = benchmark_predict.predicted_seconds(
    run,
    policy=policy,
    stages=2,
    first=20,
    pace=benchmark_predict.MeasuredPace(iteration_seconds=1.0),
    costs=benchmark_predict.MeasuredCosts(
      detect_seconds=0.25,
      start_seconds=0.25,
      fetch_seconds=0.25,
      replay_seconds=0.5,
    ),
  )
  assert seconds == pytest.approx(20 + 0.75 + lost_seconds)


def test_the_simulator_is_told_when_an_interval_changed():
  script = ['kill:stage=1,iteration=30,phase=update']
  run = _run([float(i) for i in range(1, 41)], every=4, script=script)
  for line in run.lines:
    if 22 <= line['iteration'] < 36:  # the last one before the failure is 20
      line['snapshot_bytes'] = 0
  seconds = benchmark_predict.predicted_seconds(
      run,
      policy='two_phase',
      stages=2,
      first=20,
      pace=benchmark_predict.MeasuredPace(iteration_seconds=1.0),
      costs=benchmark_predict.MeasuredCosts(
        detect_seconds=0.25, start_seconds=0.25, fetch_seconds=0.25,
        replay_seconds=0.5,
      ),
    )  # fmt: skip
  assert seconds == pytest.approx(20 + 0.75 + 0.9 + 9.0)


def test_the_pace_beside_a_run_has_what_a_snapshot_costs():
  base = _run([float(i) for i in range(1, 31)])
  quiet = _run([i * 1.25 for i in range(1, 31)], every=4)
  assert benchmark_predict.pace_beside(base, quiet, 20) == (
    benchmark_predict.MeasuredPace(iteration_seconds=1.0, blocked_seconds=1.0)
  )
