"""What the leader knows and decides about recoveries, without processes."""

import pytest

from moetion_jax.recovery import plan as recovery_plan
from tests.support import recoveries

# ---- the beginning -----------------------------------------------------------


def test_a_run_begins_with_the_initial_state():
  run = recoveries.Run()
  plan = run.first_plan()
  assert plan.stages == (0, 1) and plan.start == 0
  for stage in (0, 1):
    go = run.one.go(stage, plan, is_fresh=True)
    assert (go.start, go.complete_at, go.newest, go.target) == (0, 0, 0, 0)
    assert go.line == 0 and go.is_fresh
    assert go.pool_files == 3 * 2 + 4
    assert go.pool_bytes == 2 * 12 + 4 * 2
    size = run.one.log_size(stage)
    assert (go.ring_bytes, go.cells) == (size.ring_bytes, size.cells)
    (decision,) = go.decisions
    assert decision.first_iteration == 0 and decision.window_length == 3
  assert not run.one.is_resumed and not run.events
  assert run.one.room_bytes() == sum(
    run.one.log_size(s).file_bytes + 10 * 32 for s in (0, 1)
  )


def test_without_snapshots_there_is_room_for_none():
  run = recoveries.Run(policy='none')
  go = run.one.go(0, run.first_plan(), is_fresh=True)
  assert go.pool_files == 0


@pytest.mark.parametrize(
  ('iterations', 'reported', 'start', 'complete_at'),
  [
    (([4, 5, 6, 7], [4, 5, 6, 7]), 9, 5, 7),
    (([4, 5, 6, 7], [4, 5, 6]), 9, 4, 6),
    (([4, 5, 6, 7], [4, 5, 6, 7]), 4, 4, 6),  # five is not written down
    (([4, 5, 6, 7], [4, 5, 7]), 9, 0, 0),
    (([4, 5, 6, 7], [4, 5, 6, 7]), 3, 0, 0),
  ],
)
def test_a_run_goes_on_with_what_is_left(
  iterations, reported, start, complete_at
):
  run = recoveries.Run()
  for stage, found in enumerate(iterations):
    run.one.rescan(stage, [run.share(stage, i) for i in found])
  plan = run.first_plan(reported, newest=9)
  assert run.one.is_resumed
  assert plan.start == run.one.line == start
  assert set(plan.complete_at.values()) == {complete_at}
  go = run.one.go(1, plan, is_fresh=False)
  assert (go.start, go.target, go.replays_until) == (start, 0, 9)
  assert go.newest == max(iterations[1])
  assert [d.first_iteration for d in go.decisions] == [start]


# ---- the line ----------------------------------------------------------------


def test_the_line_lags_by_a_window():
  run = recoveries.Run()
  run.first_plan()
  lines = {}
  for iteration in range(1, 12):
    run.train(iteration)
    lines[iteration] = run.one.line
  # Start s is valid with s + 2; a window before the newest one is the line.
  assert lines == {i: max(0, i - 2 - 3) for i in lines}


def test_the_line_waits_for_the_slowest_stage():
  run = recoveries.Run()
  run.first_plan()
  run.train(8, stages=[0])
  assert run.one.line == 0
  for iteration in range(1, 8):
    run.one.stored(1, run.share(1, iteration))
  assert run.one.advance(8) and run.one.line == 2


def test_the_line_is_frozen_while_somebody_recovers():
  run = recoveries.Run()
  run.first_plan()
  run.train(10)
  line = run.one.line
  plan = run.one.fail({1: 'it died'}, run.begun)
  assert list(run.one.recovering) == [1]
  run.one.stored(0, run.share(0, 11))
  run.one.stored(1, run.share(1, 11))
  assert not run.one.advance(11) and run.one.line == line
  run.one.resumed(1, 0.1)
  run.one.caught_up(1)
  assert not run.one.recovering
  assert run.one.advance(11) and run.one.line == line + 1
  assert plan.start >= line


# ---- decisions ---------------------------------------------------------------


def test_a_worker_is_told_what_holds_and_what_comes():
  run = recoveries.Run(window_length=0, max_window_length=6, overlap_target=0.5)
  run.first_plan()
  fine = {'seconds': 2.0, 'copy_bytes_per_second': 26.0}
  decided = run.train(8, **fine)
  (made,) = decided.values()
  assert list(decided) == [6]
  assert {d.first_iteration for d in made} == {9}
  (event,) = run.of_kind('window')
  assert event['first_iteration'] == 9 and event['window_length'] == 6
  firsts = lambda plan: [  # noqa: E731
    d.first_iteration for d in run.decisions(1, plan)
  ]

  def plan(start):
    return recovery_plan.RecoveryPlan(
      stages=(1,), start=start, complete_at={1: start}, sources={}, reasons={}
    )

  assert firsts(plan(8)) == [0, 9]  # it will hold
  assert firsts(plan(9)) == [9]
  assert firsts(plan(30)) == [9]
  assert [d.window_length for d in run.decisions(1, plan(4))] == [4, 6]


def test_a_reorder_moves_the_line_as_before():
  run = recoveries.Run(order='count')
  run.first_plan()
  loads = {o: 1.0 + o.expert for s in (0, 1) for o in recoveries.operators(s)}
  decided = run.train(9, load=loads)
  assert list(decided) == [2]
  (event,) = run.of_kind('reorder')
  assert event == {'kind': 'reorder', 'first_iteration': 5, 'order': 'count'}
  assert run.one.line == 4
  for stage in (0, 1):
    first, second = (
      d.first_iteration
      for d in run.decisions(
        stage,
        recovery_plan.RecoveryPlan(
          stages=(stage,),
          start=3,
          complete_at={stage: 5},
          sources={},
          reasons={},
        ),
      )
    )
    assert (first, second) == (0, 5)


# ---- failures ----------------------------------------------------------------


def test_one_stage_recovers():
  run = recoveries.Run(stages=3)
  run.first_plan()
  run.train(10)
  plan = run.one.fail({1: 'it died'}, run.begun, detect_seconds=0.25)
  assert plan.stages == (1,) and plan.start == 8
  assert plan.complete_at == {1: 10}
  (event,) = run.of_kind('recovery_started')
  assert event == {
    'kind': 'recovery_started',
    'stage': 1,
    'replica': 0,
    'reason': 'it died',
    'first_iteration': 9,
    'target': 11,
  }
  go = run.one.go(1, plan, is_fresh=False)
  assert (go.start, go.complete_at, go.newest) == (8, 10, 10)
  assert go.target == go.replays_until == 11
  assert go.line == run.one.line == 5
  run.one.resumed(1, 0.0)
  assert 'stage 1 recovered' in run.one.caught_up(1)
  (event,) = run.of_kind('recovered')
  seconds = event.pop('seconds')
  assert event == {
    'kind': 'recovered',
    'stage': 1,
    'replica': 0,
    'source': 'own',
    'first_iteration': 9,
    'replayed_iterations': 3,
    'digest_verified': True,
  }
  assert set(seconds) == {'detect', 'start', 'fetch', 'replay'}
  assert seconds['detect'] == 0.25 and seconds['fetch'] == 0.0
  assert all(0 <= x < 5 for x in seconds.values())


def test_one_that_did_not_recover_has_not():
  run = recoveries.Run()
  run.first_plan()
  assert run.one.caught_up(1) == ''
  run.one.resumed(1, 0.0)
  assert not run.events


def test_a_second_failure_while_it_recovers():
  run = recoveries.Run()
  run.first_plan()
  run.train(10)
  run.one.fail({1: 'first'}, run.begun)
  # It replays iteration 9 when it dies again; it must come to 11 still.
  plan = run.one.fail({1: 'second'}, [11, 9])
  assert plan.start == 8
  assert run.one.go(1, plan, is_fresh=False).target == 11
  run.one.resumed(1, 0.0)
  run.one.caught_up(1)
  (event,) = run.of_kind('recovered')
  assert event['replayed_iterations'] == 3


def test_two_stages_recover_together():
  run = recoveries.Run(stages=3)
  run.first_plan()
  run.train(10)
  run.one.fail({1: 'it died'}, run.begun)
  plan = run.one.fail({2: 'it died as well'}, run.begun)
  assert set(plan.stages) <= {1, 2} and 2 in plan.stages
  for stage in (1, 2):
    run.one.resumed(stage, 0.0)
    assert run.one.recovering
    run.one.caught_up(stage)
  assert not run.one.recovering


def test_a_damaged_snapshot_means_an_older_start():
  run = recoveries.Run()
  run.first_plan()
  run.train(10)
  assert run.one.fail({1: 'it died'}, run.begun).start == 8
  plan = run.one.fail({1: 'snapshot 9 is lost'}, run.begun, suspects=[9])
  assert plan.start == 6 and plan.complete_at == {1: 8}
  # A rescan reads the manifest, which says nothing of it.
  run.one.rescan(1, [run.share(1, i) for i in range(5, 11)])
  assert run.one.fail({1: 'it died'}, run.begun).start == 6


def test_a_damaged_entry_brings_its_sender_back():
  run = recoveries.Run(stages=3)
  run.first_plan()
  run.train(10)
  plan = run.one.fail({1: 'it read damage'}, run.begun, corrupt=(0, 9))
  assert plan.stages == (0, 1)
  reasons = {e['stage']: e['reason'] for e in run.of_kind('recovery_started')}
  assert reasons[1] == 'it read damage'
  assert 'an entry of iteration 9 is corrupt' in reasons[0]
  for stage in (0, 1):
    run.one.resumed(stage, 0.0)
    run.one.caught_up(stage)
  # It was written again.
  assert run.one.fail({1: 'it died'}, run.begun).stages == (1,)


def test_a_lost_log_brings_its_stage_back():
  run = recoveries.Run(stages=3)
  run.first_plan()
  run.train(10)
  plan = run.one.fail({1: 'it died'}, run.begun, lost=[2])
  assert plan.stages == (1, 2)


# ---- all over again ----------------------------------------------------------


@pytest.mark.parametrize('resumed_at', [0, 20])
def test_all_begin_again_when_nothing_of_a_stage_is_left(resumed_at):
  run = recoveries.Run()
  if resumed_at:
    for stage in (0, 1):
      run.one.rescan(
        stage, [run.share(stage, i) for i in range(15, resumed_at + 3)]
      )
  assert run.first_plan(resumed_at, 0).start == resumed_at
  run.train(resumed_at + 12)
  assert run.one.line > resumed_at
  run.one.rescan(1, [])
  plan = run.one.fail({1: 'it died'}, run.begun)
  assert plan.stages == (0, 1) and plan.start == 0
  assert run.one.goes_back(plan)
  for stage in (0, 1):
    go = run.one.go(stage, plan, is_fresh=True)
    # Nothing is dropped, nothing is there, and it is known what to capture.
    assert (go.line, go.newest, go.start) == (0, 0, 0)
    assert go.decisions[0].first_iteration == 0
    assert go.target == resumed_at + 13
  # The line moves on meanwhile: the stores hold less than the way back.
  for iteration in range(1, 11):
    for stage in (0, 1):
      run.one.stored(stage, run.share(stage, iteration))
    run.one.advance(resumed_at + 12)
  assert run.one.line == 5
  # And if a worker dies then it is a recovery like any other.
  plan = run.one.fail({0: 'it died'}, [10, 11])
  assert plan.stages == (0,) and plan.start == 8
  assert not run.one.goes_back(plan)
  # Its way is as long as the others': what is kept must move on with it.
  assert run.one.go(0, plan, is_fresh=False).target == resumed_at + 13
  for iteration in range(11, resumed_at + 13):
    for stage in (0, 1):
      run.one.stored(stage, run.share(stage, iteration))
    run.one.advance(resumed_at + 12)
  assert run.one.line == resumed_at + 12 - 2 - 3
  for stage in (0, 1):
    run.one.resumed(stage, 0.0)
    run.one.caught_up(stage)
  events = {e['stage']: e for e in run.of_kind('recovered')}
  assert events[1]['source'] == 'initial' and events[0]['source'] == 'own'


def test_going_back_to_the_initial_state_at_first_keeps_what_is_there():
  run = recoveries.Run()
  run.first_plan()
  run.train(2)
  plan = run.one.fail({1: 'it died'}, run.begun)
  assert plan.stages == (1,) and plan.start == 0
  assert not run.one.goes_back(plan)


@pytest.mark.parametrize(('reported', 'start'), [(8, 8), (7, 7), (None, 8)])
def test_an_iteration_that_was_not_reported_is_done_again(reported, start):
  """A worker that begins with a whole snapshot never reports its iteration."""
  run = recoveries.Run(window_length=1)
  run.first_plan()
  for iteration in range(1, 9):
    for stage in (0, 1):
      run.one.stored(stage, run.share(stage, iteration, length=1))
  plan = run.one.fail({0: 'died'}, [9, 9], reported=reported)
  assert (plan.stages, plan.start) == ((0,), start)


def test_what_a_replay_passes_is_reported_by_it():
  run = recoveries.Run(window_length=3)
  run.first_plan()
  for iteration in range(1, 9):
    for stage in (0, 1):
      run.one.stored(stage, run.share(stage, iteration))
  plan = run.one.fail({0: 'died'}, [9, 9], reported=5)
  assert plan.start == 6


# ---- all go back because entries were damaged --------------------------------


def test_logs_that_begin_at_the_start_have_nothing_from_before_it():
  """Whoever needs more takes all others along; the line is not frozen."""
  run = recoveries.Run()
  run.first_plan()
  run.train(12)
  line = run.one.line
  for stage in (0, 1):  # 12 is the first iteration with a damaged entry
    run.one.rescan(stage, [run.share(stage, i) for i in range(line, 12)])
  plan = run.one.plan_together(
    {1: 'it read damage'}, run.begun, 11, failed_at=0.0
  )
  assert plan.stages == (0, 1) and line < plan.start == 9
  assert run.one.line == 9 and run.one.goes_back(plan)
  for stage in (0, 1):
    go = run.one.go(stage, plan, is_fresh=True)
    assert (go.line, go.newest, go.complete_at) == (9, 11, 11)
  alone = run.one.fail({0: 'died'}, [11, 11])
  assert alone.stages == (0,) and alone.start == 9
  run.one.count({0: 'it is damaged'}, suspects=[9])
  further = run.one.fail({0: 'again'}, [11, 11])
  assert further.stages == (0, 1) and further.start < 9
  assert run.one.goes_back(further)
