"""The simulation's core and methods, held against hand-computed seconds."""

import dataclasses
import math
import statistics

import numpy as np
import pytest

from launch.simulate import (
  core,
  methods,
  predict as simulate_predict,
  world as world_lib,
)
from moetion_jax import errors, keys
from moetion_jax.policies import decision

Failure, Pace, World = world_lib.Failure, world_lib.Pace, world_lib.World

RUN = simulate_predict.Measured(
  policy='sparse',
  iterations=30,
  iteration_seconds=1.0,
  landing_seconds=0.5,
  detect_seconds=0.125,
  start_seconds=0.25,
  fetch_seconds=0.125,
  replay_seconds=0.75,
  failures=(),
  stages=3,
)
FIXED = 0.5  # detect, start and fetch of RUN


def predict(**changes) -> core.Result:
  return simulate_predict.predict(dataclasses.replace(RUN, **changes))


def sparse(length=2, **changes) -> methods.Windowed:
  """Iterations of a second; a stage replays them in 0.75."""
  fields = {
    'name': 'sparse',
    'pace': Pace(iteration_seconds=1.0),
    'detect_seconds': 0.25,
    'start_seconds': 0.25,
    'reads': methods.Reads(
      own_seconds=0.0, peer_seconds=1.0, durable_seconds=5.0
    ),
    'decision': decision.CaptureDecision(
      first_iteration=1,
      window_length=length,
      mode='rolling',
      slots=tuple(
        frozenset({keys.OperatorId('slot', i)}) for i in range(length)
      ),
    ),
    'landing_seconds': (0.25,) * length,
    'replay_seconds': 0.75,
    'pipeline_seconds': 0.125,
  }
  return methods.Windowed(**{**fields, **changes})


@pytest.mark.parametrize(
  'seconds,completed,since',
  [
    (0.0, 0, 0.0),
    (1.0, 1, 0.0),
    (3.75, 3, 0.75),
    (4.5, 4, 0.0),  # the fourth takes half a second longer
    (4.25, 3, 1.25),
    (45.0, 40, 0.0),
    (45.0 - 1e-12, 40, 0.0),  # rounding loses no iteration
  ],
)
def test_pace_says_how_far_one_gets(seconds, completed, since):
  pace = Pace(iteration_seconds=1.0, extra_seconds=(0, 0, 0, 0.5))
  assert pace.after(seconds) == (completed, pytest.approx(since, abs=1e-9))
  assert pace.until(completed) == pytest.approx(seconds - since)


@pytest.mark.parametrize('policy', ['sparse', 'dense', 'two_phase', 'partial'])
def test_without_failures_only_overhead_is_lost(policy):
  result = predict(
    policy=policy, iterations=100, interval=4, blocked_seconds=0.2
  )
  assert result.wall_seconds == pytest.approx(100 + 25 * 0.2)
  assert result.ettr == pytest.approx(1 / (1 + 0.05))
  assert result.overhead == pytest.approx(0.05)
  assert result.recovery_seconds == pytest.approx(0, abs=1e-6)
  assert result.failures == result.replayed_iterations == 0


ONE_FAILURE = [
  # Rolling: snapshots 16 to 19 are there, so a stage does 17 to 20 (again).
  ({'window_length': 4}, (20, 0.75), 4 * 0.75),
  # Snapshot 19 has not landed: one more.
  ({'window_length': 4}, (20, 0.25), 5 * 0.75),
  # Aligned: the newest whole window is 13 to 16.
  ({'window_length': 4, 'window_mode': 'aligned'}, (20, 0.75), 7 * 0.75),
  ({'window_length': 4, 'window_mode': 'aligned'}, (21, 0.75), 4 * 0.75),
  ({'window_length': 4, 'window_mode': 'aligned'}, (21, 0.25), 8 * 0.75),
  # Whole snapshots of 5, 10, 15.
  ({'interval': 5}, (20, 0.75), 5 * 0.75),
  # There is no window yet: from the initial state.
  ({'window_length': 4}, (3, 0.75), 3 * 0.75),
  # Everybody goes back to 15; landed at 17.5.
  ({'policy': 'dense', 'interval': 5, 'landing_seconds': 2.5}, (20, 0.75), 4),
  ({'policy': 'dense', 'interval': 5, 'landing_seconds': 2.5}, (18, 0.5), 2),
  ({'policy': 'dense', 'interval': 5, 'landing_seconds': 2.5}, (18, 0.25), 7),
  ({'policy': 'dense', 'interval': 5}, (3, 0.5), 2),
  # In storage 7 s after its iteration.
  ({'policy': 'two_phase', 'interval': 9, 'landing_seconds': 7}, (25, 0.5), 15),
  ({'policy': 'two_phase', 'interval': 9, 'landing_seconds': 7}, (26, 0.5), 7),
  # Of an interval that changed: 2, 12, 19.
  ({'policy': 'dense', 'taken': (2, 12, 19)}, (20, 0.75), 0),
  ({'policy': 'dense', 'taken': (2, 12, 19)}, (19, 0.75), 6),
  ({'policy': 'dense', 'taken': (2, 12, 19)}, (20, 0.125), 7),
  ({'policy': 'dense', 'taken': (7, 12)}, (3, 0.5), 2),
  ({'policy': 'partial', 'experts': 4, 'tokens': 9}, (9, 0.75), 0),
  ({'policy': 'none'}, (20, 0.75), 19),
]  # fmt: skip


@pytest.mark.parametrize('settings,moment,again_seconds', ONE_FAILURE)
def test_one_failure_costs_exact_seconds(settings, moment, again_seconds):
  result = predict(failures=((*moment, 1),), **settings)
  # To read the initial state takes nothing.
  fixed = FIXED
  if settings.get('policy') == 'none' or moment[0] == 3:
    fixed -= RUN.fetch_seconds
  lost = moment[1] + fixed + again_seconds
  if 'policy' not in settings:
    lost -= 1.0  # then the interrupted iteration is done
  assert result.wall_seconds == pytest.approx(30 + lost)
  assert result.recovery_seconds == pytest.approx(lost)
  assert result.ettr == pytest.approx(30 / (30 + lost))
  assert result.failures == 1


def test_a_failure_happens_once_though_its_iteration_comes_again():
  result = predict(
    policy='dense', interval=10, failures=((16, 0.75, 0), (18, 0.5, 1))
  )
  # Five and seven iterations are done again.
  assert result.replayed_iterations == 5 + 7
  assert result.wall_seconds == pytest.approx(30 + 5.75 + FIXED + 7.5 + FIXED)


def test_partial_counts_lost_tokens_and_raises_k():
  settings = {
      'policy': 'partial', 'experts': 4, 'tokens': 100, 'choices_per_token': 2,
    }  # fmt: skip
  one = predict(failures=((9, 0.75, 0),), **settings)
  # Checkpoint 8 has expert 3; 2, 1, 0 are of 7, 6, 5: one, two, three
  # iterations old, each with 50 choices of tokens, of which a token has two.
  assert one.lost_tokens == pytest.approx((1 + 2 + 3) * 50 / 2)
  # 300 of 1600 choices are beyond the budget: k is 2. From then on
  # checkpoints take experts in pairs, and a restore of 12 (number 11) has two
  # of 11: one iteration, two experts.
  two = predict(failures=((9, 0.75, 0), (13, 0.75, 0)), **settings)
  assert two.lost_tokens - one.lost_tokens == pytest.approx(2 * 50 / 2)
  patient = predict(
    failures=((9, 0.75, 0), (13, 0.75, 0)), plt_budget=0.5, **settings
  )
  assert patient.lost_tokens - one.lost_tokens == pytest.approx(
    (1 + 2 + 3) * 50 / 2
  )
  # What the first restore lost is not lost again by one right after it.
  again = predict(failures=((9, 0.75, 0), (9, 0.75, 0)), **settings)
  assert again.lost_tokens == pytest.approx(one.lost_tokens)


def test_a_failure_during_a_recovery_begins_it_again():
  world = World(stages=4)
  # It replays iteration 10 and half of 11, at which the others wait.
  first = 10.5, Failure(gpu=1)
  alone = core.simulate(sparse(), world, [first], iterations=20)
  assert alone.wall_seconds == pytest.approx(20 + 0.5 + 1.5 * 0.75)
  for gpu in (1, 3):  # the same stage, or one that recovers beside it
    both = core.simulate(
      sparse(),
      world,
      [first, (11.5, Failure(gpu=gpu))],
      iterations=20,
    )
    assert both.wall_seconds == pytest.approx(11.5 + 0.5 + 1.5 * 0.75 + 9.5)
    assert both.failures == 2
  # Of the second stage the copy of iteration 10 has landed while the first one
  # recovered; it was late for neither.
  dense = methods.Whole(
    name='dense',
    pace=Pace(iteration_seconds=1.0),
    detect_seconds=0.25,
    start_seconds=0.25,
    reads=methods.Reads(own_seconds=1.0),
    interval=5,
    landing_seconds=0.25,
  )
  result = core.simulate(
      dense, world, [(13.5, Failure(gpu=0)), (14.5, Failure(gpu=2))],
      iterations=20,
    )  # fmt: skip
  assert result.wall_seconds == pytest.approx(14.5 + 0.5 + 1.0 + 10)


HOST = Failure(gpu=0, whole_host=True)


@pytest.mark.parametrize(
  'world,failures,changes,expected',
  [
    # Two adjacent stages replay together, from the peer: 10 is done again.
    (World(stages=4, gpus_per_host=2), [(10.5, HOST)], {},
     10.5 + 0.5 + 1.0 + 1.5 * 0.875 + 9.5),
    # No copies: all four train again from the initial state.
    (World(stages=4, gpus_per_host=2, peers=0), [(10.5, HOST)], {},
     10.5 + 0.5 + 20),
    # The peer dies while they recover: the same.
    (World(stages=4, gpus_per_host=2),
     [(10.5, HOST), (11.5, Failure(gpu=3, whole_host=True))], {},
     11.5 + 0.5 + 20),
    # The durable tier has 8: everybody goes back.
    (World(stages=4, gpus_per_host=2, peers=0), [(10.5, HOST)],
     {'durable': methods.Durable(every=4, landing_seconds=2.0)},
     10.5 + 0.5 + 5.0 + 12),
    # ... or 4, if it takes longer to write.
    (World(stages=4, gpus_per_host=2, peers=0), [(10.5, HOST)],
     {'durable': methods.Durable(every=4, landing_seconds=3.0)},
     10.5 + 0.5 + 5.0 + 16),
    # One worker alone: its host's store is there.
    (World(stages=4, gpus_per_host=2), [(10.5, Failure(gpu=0))], {},
     10.5 + 0.5 + 1.5 * 0.75 + 9.5),
    # Without logs all go back, at the pace of four neighbours.
    (World(stages=4, gpus_per_host=2), [(10.5, Failure(gpu=0))],
     {'logs': False}, 10.5 + 0.5 + 0.75 + 3 * 0.125 + 10),
  ],
)  # fmt: skip
def test_hosts_take_workers_snapshots_and_logs_along(
  world, failures, changes, expected
):
  result = core.simulate(sparse(**changes), world, failures, iterations=20)
  assert result.wall_seconds == pytest.approx(expected)


def test_workers_of_a_host():
  world = World(stages=3, replicas=2, expert_devices=2, gpus_per_host=4)
  assert (world.gpus, world.hosts) == (12, 3)
  assert world.workers_of(Failure(gpu=5)) == {2}
  assert world.workers_of(Failure(gpu=5, whole_host=True)) == {2, 3}
  assert list(world.hosts_of_stage(1)) == [1]
  large = World(stages=2, replicas=1, expert_devices=8, gpus_per_host=4)
  assert large.workers_of(Failure(gpu=5, whole_host=True)) == {0}
  assert list(large.hosts_of_stage(1)) == [2, 3]


def test_spare_hosts_run_out():
  failures = [(t, Failure(gpu=0, needs_spare=True)) for t in (10.5, 30.5, 40.5)]
  world = World(stages=2, replicas=2, spare_hosts=1, repair_seconds=100.0)
  lost = 0.5 + 1.5 * 0.75
  wait = core.simulate(sparse(), world, failures[:2], iterations=40)
  # The second one waits for the host that the first one took.
  assert wait.waited_for_repair_seconds == pytest.approx(110.5 - 30.5)
  assert wait.ettr < 40 / (40 + lost)
  shrink = dataclasses.replace(world, on_no_spare='shrink')
  less = core.simulate(sparse(), shrink, failures[:2], horizon_seconds=200.0)
  assert less.waited_for_repair_seconds == 0
  # From the second recovery to the repair everything takes twice as long.
  begin = 30.5 + lost
  assert less.degraded_seconds == pytest.approx((110.5 - begin) / 2, abs=1)
  # Both replicas of a stage cannot be missing: the third one waits.
  other = dataclasses.replace(failures[2][1], gpu=1)
  third = core.simulate(
    sparse(), shrink, [*failures[:2], (40.5, other)], horizon_seconds=300.0
  )
  assert third.waited_for_repair_seconds == pytest.approx(110.5 - 40.5)
  with pytest.raises(errors.ConfigError, match='ran out'):
    core.simulate(
      sparse(),
      World(stages=2, spare_hosts=0),
      failures,
      iterations=40,
    )


def test_a_second_failure_does_not_make_a_repair_shorter():
  world = World(stages=4, spare_hosts=0, repair_seconds=100.0)
  failures = [
    (10.5, Failure(gpu=0, needs_spare=True)),
    (20.0, Failure(gpu=2)),
  ]
  dense = methods.Whole(
    name='dense',
    pace=Pace(iteration_seconds=1.0),
    detect_seconds=0.25,
    start_seconds=0.25,
    reads=methods.Reads(own_seconds=1.0),
    interval=5,
    landing_seconds=0.25,
  )
  result = core.simulate(dense, world, failures, iterations=20)
  assert result.wall_seconds == pytest.approx(110.5 + 0.5 + 1.0 + 10)
  result = core.simulate(sparse(), world, failures, iterations=20)
  assert result.wall_seconds == pytest.approx(110.5 + 0.5 + 1.5 * 0.75 + 9.5)


def test_back_at_a_durable_state_it_is_there_still():
  # Both die with all copies; the second time right after the first.
  method = sparse(durable=methods.Durable(every=4, landing_seconds=2.0))
  host = Failure(gpu=0, whole_host=True)
  result = core.simulate(
    method,
    World(stages=2, peers=0),
    [(10.5, host), (17.0, host)],
    iterations=20,
  )
  # Training goes on from 8 at 16, and again from 8 at 22.5.
  assert result.wall_seconds == pytest.approx(17.0 + 0.5 + 5.0 + 12)


def test_skipping_frozen_operators_makes_conversion_shorter():
  operators = [keys.OperatorId('slot', i) for i in range(3)]
  plain = sparse(3)
  method = sparse(3, frozen_share=dict.fromkeys(operators, 0.1))
  # Start 4 is of slot 0. Its first replayed iteration has two frozen, the
  # second one, the third none.
  assert plain.replay(4, 5, 1) == pytest.approx(5 * 0.75)
  assert method.replay(4, 5, 1) == pytest.approx(0.75 * (5 - 0.2 - 0.1))
  assert method.replay(4, 1, 1) == pytest.approx(0.75 * (1 - 0.2))
  assert method.replay(4, 3, 1, 0.5) == pytest.approx(0.75 * (3.5 - 0.2 - 0.1))


@pytest.mark.parametrize('length', [1, 3, 5])
@pytest.mark.parametrize('landing', [0.25, 0.75, 1.25])
def test_with_records_no_window_is_done_again(length, landing):
  method = sparse(
    length, update_seconds=0.01, landing_seconds=(landing,) * length
  )
  recorded = dataclasses.replace(
    method,
    decision=dataclasses.replace(method.decision, replay='updates'),
    frozen_share={keys.OperatorId('slot', 0): 0.1},  # nothing is frozen later
  )
  result = core.simulate(
    recorded, World(stages=4), [(20.5, Failure(gpu=1))], iterations=30
  )
  # Detected and replaced; window - 1 updates; what had not landed, and the half
  # of the interrupted iteration, at the pace of one stage.
  not_landed = math.ceil(landing - 0.5) if landing > 0.5 else 0
  assert result.replayed_iterations == not_landed
  assert result.wall_seconds == pytest.approx(
    30 + 0.5 + 0.01 * (length - 1) + 0.75 * (not_landed + 0.5)
  )


def test_of_two_neighbours_that_die_neither_needs_more_of_the_other():
  method = sparse(update_seconds=0.01)
  recorded = dataclasses.replace(
    method, decision=dataclasses.replace(method.decision, replay='updates')
  )
  world = World(stages=4, gpus_per_host=2)
  count = recorded.decision.window_length
  host = Failure(gpu=0, whole_host=True)
  result = core.simulate(recorded, world, [(20.5, host)], iterations=30)
  # From the peer, 1 s; they do the half iteration again, both together.
  assert result.replayed_iterations == 0
  assert result.wall_seconds == pytest.approx(
    30 + 0.5 + 1.0 + 0.01 * (count - 1) + 0.875 * 0.5
  )


def _step_by_step(failures, horizon):
  """Global rollback, iteration by iteration: completed at the horizon.

  Snapshots every 4 iterations, there after 2.5 s; a restart takes 1.25 s, and
  1 s more to read a snapshot.
  """
  failures = [*failures, math.inf]
  now, state = 0.0, 0
  ready = {0: 0.0}  # by snapshot
  while True:
    end = now + 1.0
    if min(end, horizon) <= failures[0]:
      if end > horizon:
        return state
      now, state = end, state + 1
      if state % 4 == 0:
        ready[state] = now + 2.5
      continue
    while failures[0] < now or failures[0] < end:
      died = failures.pop(0)
      if died > horizon:
        return state
      state = max(s for s, there in ready.items() if there <= died)
      ready = {s: t for s, t in ready.items() if s <= state}
      now = died + 1.25 + (1.0 if state else 0.0)
      end = now


@pytest.mark.parametrize('seed', range(10))
def test_dense_agrees_with_stepping_through_every_iteration(seed):
  source = np.random.default_rng(seed)
  times = np.cumsum(source.exponential(15.0, 100)).tolist()
  dense = methods.Whole(
    name='dense',
    pace=Pace(iteration_seconds=1.0),
    detect_seconds=0.5,
    start_seconds=0.75,
    reads=methods.Reads(own_seconds=1.0),
    interval=4,
    landing_seconds=2.5,
  )
  result = core.simulate(
    dense,
    World(stages=2),
    [(t, Failure(gpu=0)) for t in times],
    horizon_seconds=500.0,
  )
  assert int(result.curve[-1][1]) == _step_by_step(times, 500.0)
  assert result.failures == sum(t < 500.0 for t in times)


@pytest.mark.parametrize('window', [4, 10])
def test_the_papers_approximation_of_an_aligned_window(window):
  """1/(1 + T_ckpt/(T_iter interval)) * 1/(1 + 1.5 w T_iter / MTBF)."""
  mtbf, blocked = 60.0 * window, 0.02
  method = sparse(
    window,
    pace=Pace(iteration_seconds=1.0, extra_seconds=(blocked,)),
    decision=dataclasses.replace(sparse(window).decision, mode='aligned'),
    detect_seconds=0.0,
    start_seconds=0.0,
    # It lands as late as it may, and replay takes as long as training.
    landing_seconds=(1.0 + blocked,) * window,
    replay_seconds=1.0 + blocked,
  )
  world = World(stages=1)
  ettrs = []
  for seed in range(20):
    failures = world_lib.poisson(
      np.random.default_rng(seed), world, mtbf_seconds=mtbf
    )
    result = core.simulate(method, world, failures, horizon_seconds=300 * mtbf)
    ettrs.append(result.ettr)
  expected = 1 / (1 + blocked) / (1 + 1.5 * window / mtbf)
  error = statistics.stdev(ettrs) / math.sqrt(len(ettrs))
  # Failures during recoveries are no part of the approximation: second order.
  second = (1.5 * window / mtbf) ** 2
  assert error < 0.002
  assert abs(statistics.mean(ettrs) - expected) < 3 * error + second


def test_seeds_repeat_and_curves_go_on():
  world = World(stages=3)

  def run():
    failures = world_lib.poisson(
      np.random.default_rng(7), world, mtbf_seconds=20.0, host_share=0.5
    )
    return core.simulate(sparse(), world, failures, horizon_seconds=1000.0)

  first = run()
  assert first == run()
  seconds = [s for s, _ in first.curve]
  assert seconds == sorted(seconds) and seconds[-1] == 1000.0
  assert first.curve[-1][1] == pytest.approx(first.iterations)
  assert first.useful_seconds + first.recovery_seconds == pytest.approx(1000)
  assert first.failures > 30
  with pytest.raises(ValueError, match='needs an end'):
    core.simulate(sparse(), world)


# Of a real run of `launch.train --preset=tiny --stages=2 --window_length=4` in
# which stage 1 died in iteration 20 and stage 0 in iteration 40, on a machine
# busy with other things: seconds of iterations 2 to 41.
RECORDED = (
  5.435, 4.664, 4.916, 7.247, 4.367, 5.068, 4.945, 3.958, 3.925, 5.337, 5.144,
  5.650, 4.499, 4.569, 4.315, 3.650, 3.932, 3.929, 13.098, 3.434, 3.489, 4.286,
  5.327, 5.038, 4.300, 4.071, 4.327, 5.526, 3.872, 2.809, 2.675, 2.562, 2.656,
  2.626, 2.641, 2.692, 3.466, 4.499, 11.782, 3.054,
)  # fmt: skip


def test_a_recorded_run_is_predicted_within_two_percent():
  quiet = [s for i, s in enumerate(RECORDED, 2) if i not in (20, 40)]
  # Its events `recovered`: replay seconds, and iterations done again.
  replay = (10.909 + 10.481) / (4 + 5)
  result = predict(
    iterations=40,  # the first one compiles
    stages=2,
    window_length=4,
    iteration_seconds=statistics.mean(quiet),
    # The copy of iteration 19 had landed by then, that of 39 had not.
    failures=((19, 0.1, 1), (39, 0.0, 0)),
    landing_seconds=0.1,
    detect_seconds=(0.309 + 0.141) / 2,
    start_seconds=(1.620 + 1.060) / 2,
    fetch_seconds=(0.053 + 0.066) / 2,
    replay_seconds=replay,
  )
  assert result.replayed_iterations + result.failures == 4 + 5
  error = simulate_predict.error(result.wall_seconds, sum(RECORDED))
  assert error < 0.02


def test_predictions_are_held_against_runs():
  assert simulate_predict.error(10.2, 10.0) == pytest.approx(0.02)
  with pytest.raises(errors.ConfigError, match='policy'):
    predict(policy='other')
