"""Intervals of whole snapshots against cases computed by hand."""

import dataclasses

import pytest

from moetion_jax.policies import intervals

# ---- dense -------------------------------------------------------------------


@pytest.mark.parametrize(
  ('state_bytes', 'bandwidth', 'seconds', 'target', 'interval'),
  [
    (100.0, 100.0, 1.0, 1.0, 1),  # 1 s in an iteration of 1 s: just hidden
    (101.0, 100.0, 1.0, 1.0, 2),
    (1200.0, 100.0, 2.0, 1.0, 6),  # 12 s in iterations of 2 s
    (1200.0, 100.0, 2.0, 0.5, 12),  # of which half may copy
    (1200.0, 100.0, 2.0, 0.02, 300),
    (300.0, 100.0, 0.1, 1.0, 30),  # 30.000000000000004 in floats
    (1.0, 1e12, 1.0, 1.0, 1),  # never less than every iteration
  ],
)
def test_dense_interval(state_bytes, bandwidth, seconds, target, interval):
  found = intervals.dense_interval(
    state_bytes=state_bytes,
    bandwidth_bytes_per_second=bandwidth,
    iteration_seconds=seconds,
    overlap_target=target,
  )
  assert found == interval


def test_dense_interval_has_a_limit_and_needs_measurements():
  case: dict = {
    'state_bytes': 1200.0,
    'bandwidth_bytes_per_second': 100.0,
    'iteration_seconds': 2.0,
  }
  assert intervals.dense_interval(**case, max_interval=4) == 4
  assert intervals.dense_interval(**case, max_interval=40) == 6
  for name, value in (
    ('bandwidth_bytes_per_second', 0.0),
    ('iteration_seconds', 0.0),
    ('overlap_target', 0.0),
    ('overlap_target', 1.5),
  ):
    with pytest.raises(ValueError, match=name):
      intervals.dense_interval(**{**case, name: value})


def test_common_dense_interval_suits_the_slowest():
  copies = [(100.0, 100.0), (1200.0, 100.0), (100.0, 40.0)]
  found = intervals.common_dense_interval(
    copies, iteration_seconds=2.0, overlap_target=0.5
  )
  assert found == 12  # 12 s in halves of 2 s


# ---- two_phase ---------------------------------------------------------------


@pytest.mark.parametrize(
  ('overhead', 'durable', 'budget', 'interval'),
  [
    (0.35, 0.0, 0.035, 10),  # 0.35 s are 3.5 % of 10 iterations of 1 s
    (0.36, 0.0, 0.035, 11),
    (0.35, 0.0, 0.07, 5),
    (0.35, 12.5, 0.035, 13),  # in storage after 13 iterations only
    (0.0, 0.0, 0.035, 1),
  ],
)
def test_two_phase_interval(overhead, durable, budget, interval):
  costs = intervals.TwoPhaseCosts(
    iteration_seconds=1.0, overhead_seconds=overhead, durable_seconds=durable
  )
  assert intervals.two_phase_interval(costs, budget) == interval
  assert intervals.two_phase_interval(costs, budget, 4) == min(4, interval)


def _observe_all(tuner, seconds, snapshots=(), disturbed=(), durable=0.0):
  for number, each in enumerate(seconds):
    tuner = intervals.observe(
      tuner,
      each,
      takes_snapshot=number in snapshots,
      is_disturbed=number in disturbed,
      durable_seconds=durable,
    )
  return tuner


def test_the_interval_is_tuned_to_the_budget():
  tuner = intervals.TwoPhaseTuner(overhead_budget=0.05)
  assert intervals.tune(tuner) == tuner  # nothing is known
  tuner = _observe_all(tuner, [1.0, 9.0, 1.0, 1.0])  # median 1
  assert tuner.iteration_seconds == 1.0 and tuner.costs is None
  tuner = dataclasses.replace(tuner, interval=4)
  # Of the first period: 1.2 + 1.1 + 1 + 1 = 4.3, so 0.3 s of overhead.
  tuner = _observe_all(
    tuner,
    [1.2, 1.1, 1.0, 1.0, 1.2],
    snapshots=(0, 4),
    disturbed=(1,),
    durable=1.9,
  )
  assert tuner.overheads == (pytest.approx(0.3),)
  assert tuner.durables == (1.9,)
  assert tuner.period == (1.2,)
  assert tuner.costs is None  # one may have been slow for another reason
  tuner = _observe_all(
    tuner,
    [1.1, 1.0, 1.0, 8.2, 1.1, 1.0, 1.0, 1.2],
    snapshots=(3, 7),
    disturbed=(0, 4),
    durable=1.9,
  )
  assert tuner.overheads == pytest.approx((0.3, 0.3, 7.3))
  # 0.3 s are 5 % of 6 iterations.
  tuned = intervals.tune(tuner)
  assert tuned.interval == 6
  assert not tuned.overheads and not tuned.period  # of the other interval
  assert tuned.undisturbed == tuner.undisturbed
  assert intervals.tune(tuner, max_interval=5).interval == 5


def test_the_interval_is_raised_at_once_and_lowered_with_care():
  def tuned(interval, overhead, durable=0.0):
    tuner = intervals.TwoPhaseTuner(
      overhead_budget=0.1,
      interval=interval,
      undisturbed=(1.0,),
      overheads=(overhead,) * 12,
      durables=(durable,) * 12,
    )
    return intervals.tune(tuner).interval

  assert tuned(10, 1.01) == 11
  assert tuned(10, 2.5) == 20  # 25, after another look
  # That is certain: 23, and two that nothing disturbs.
  assert tuned(10, 2.5, 22.5) == 25
  assert tuned(10, 0.0, 22.5) == 25
  assert tuned(10, 1.0) == 10
  assert tuned(10, 0.6) == 10  # 6 would do
  assert tuned(10, 0.5) == 5
  assert tuned(10, 0.0) == 3  # one begins, one is disturbed, one is neither
  assert tuned(1, 0.0) == 3


def test_a_snapshot_and_what_it_disturbs_are_not_the_base():
  tuner = intervals.TwoPhaseTuner(undisturbed=(1.0,))
  tuner = _observe_all(tuner, [5.0, 4.0, 1.0], snapshots=(0,), disturbed=(1,))
  assert tuner.undisturbed == (1.0, 1.0)
  with pytest.raises(ValueError, match='seconds'):
    _observe_all(tuner, [0.0])
