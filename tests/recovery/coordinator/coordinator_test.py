"""What the coordinator has done when something happens, without processes."""

import pytest

from moetion_jax import errors
from moetion_jax.hostmem import segment_check
from moetion_jax.recovery import (
  actions,
  events,
  failures,
  hang_detection,
  notices,
  orders,
)
from tests.support import helpers, recoveries

_State = hang_detection.WorkerState


def _train(run, until):
  run.begin()
  run.train(until)
  return run


# ---- the beginning -----------------------------------------------------------


def test_a_run_begins_with_the_initial_state():
  run = recoveries.Run()
  gone = run.begin()
  assert list(gone) == [0, 1] and run.of(actions.ForgetSnapshots)
  for go in gone.values():
    assert (go.start, go.complete_at, go.newest, go.target) == (0, 0, 0, 0)
    assert go.line == 0 and go.is_fresh and go.generation == 1
    assert (go.pool_files, go.pool_bytes) == (3 * 2 + 4, 2 * 12 + 4 * 2)
    (decision,) = go.decisions
    assert decision.first_iteration == 0 and decision.window_length == 3
  logs, everything = (a.needed_bytes for a in run.of(actions.CheckRoom))
  sizes = [run.one.state.log_size(stage) for stage in gone]
  assert logs == sum(one.file_bytes for one in sizes)
  told = [(go.ring_bytes, go.cells) for go in gone.values()]
  assert told == [(one.ring_bytes, one.cells) for one in sizes]
  assert everything == logs + 2 * (10 * 32 + 12 * 6)
  assert not run.of(actions.Record)


def test_without_snapshots_there_is_room_for_none():
  assert recoveries.Run(policy='none').begin()[0].pool_files == 0


@pytest.mark.parametrize(
  ('iterations', 'recorded', 'start', 'complete_at'),
  [
    (([4, 5, 6, 7], [4, 5, 6, 7]), 9, 5, 7),
    (([4, 5, 6, 7], [4, 5, 6]), 9, 4, 6),
    (([4, 5, 6, 7], [4, 5, 6, 7]), 4, 4, 6),  # five is not written down
    (([4, 5, 6, 7], [4, 5, 7]), 9, 0, 0),
    (([4, 5, 6, 7], [4, 5, 6, 7]), 3, 0, 0),
  ],
)
def test_a_run_goes_on_with_what_is_left(
  iterations, recorded, start, complete_at
):
  run = recoveries.Run()
  for stage, found in enumerate(iterations):
    run.shares[stage] = {(i, 0): recoveries.share(stage, i) for i in found}
  gone = run.begin(recorded, newest=9)
  for stage, go in gone.items():
    assert (go.start, go.complete_at) == (start, complete_at)
    assert (go.target, go.replays_until) == (0, 9)
    assert go.newest == (max(iterations[stage]) if start else 0)
    assert go.is_fresh == (not start)
    assert [d.first_iteration for d in go.decisions] == [start]
  assert run.line == start
  assert [a.keeps for a in run.of(actions.Keep)][0] == bool(start)
  assert len(run.of_kind('resumed')) == bool(start)


def test_snapshots_are_not_thrown_away_because_lines_are_missing():
  run = recoveries.Run()
  for stage in (0, 1):
    run.shares[stage] = {
      (i, 0): recoveries.share(stage, i) for i in range(8, 20)
    }
  run.begin(last_recorded=0, newest=19)
  error = run.error()
  assert isinstance(error, errors.ConfigError)
  assert 'ends with iteration 0' in error.reason
  assert 'snapshots of iterations 8' in error.reason
  assert not run.of(actions.ForgetSnapshots) and not run.of(actions.DropLogs)
  assert not run.of(actions.Keep)


@pytest.mark.parametrize('max_failures', [0, 2])
def test_a_death_before_anybody_trains(max_failures):
  run = recoveries.Run(settings={'max_failures': max_failures})
  run.start()
  run.ready(1)
  for _ in range(max_failures):
    run.dies(1)
  assert [a.generation for a in run.of(actions.Replace) if a.stage == 1] == [
    *range(1, max_failures + 2)
  ]
  run.dies(1)
  assert isinstance(run.error(), failures.WorkerError)
  assert 'stage 1, iteration 0: the worker (pid 1)' in str(run.error())


def test_who_died_before_training_must_be_ready_again():
  run = recoveries.Run()
  run.start()
  run.ready(1)
  run.dies(1)
  run.ready(0)
  assert not run.of(actions.Accept)
  assert recoveries.orders_in(run.ready(1))[1].generation == 2


def test_damage_in_logs_of_an_earlier_run_is_dropped_at_first():
  run = recoveries.Run()
  for stage in (0, 1):
    run.shares[stage] = {
      (i, 0): recoveries.share(stage, i) for i in range(8, 20)
    }
  run.damage = (segment_check.Damage(15, 0, 0, 'E'),)
  gone = run.begin(last_recorded=19, newest=19)
  assert gone[0].start == 12 and gone[0].complete_at == 14
  kinds = [type(a) for a in run.done]
  dropped = kinds.index(actions.DropLogs)
  assert kinds.index(actions.ForgetAfter) < kinds.index(actions.ForgetNewer)
  assert kinds.index(actions.ForgetNewer) < dropped < kinds.index(actions.Scan)
  assert len(run.of_kind('damage_found')) == 1


# ---- the line ----------------------------------------------------------------


def test_the_line_lags_by_a_window():
  run = recoveries.Run()
  run.begin()
  lines = {}
  for iteration in range(1, 12):
    run.train(iteration)
    lines[iteration] = run.line
  # Start s is valid with s + 2; a window before the newest one is the line.
  assert lines == {i: max(0, i - 2 - 3) for i in lines}
  told = [a.kept_from for a in run.of(actions.MoveLine)]
  assert told == list(range(1, 7))


def test_the_line_is_frozen_while_somebody_recovers():
  run = _train(recoveries.Run(), 10)
  line = run.line
  assert run.dies(1)[1].start >= line
  for stage in (0, 1):
    run.stores(stage, 11)
  run.reports(11)
  assert run.line == line
  run.comes_back(1)
  assert run.line == line + 1


def test_a_worker_that_has_no_room_moves_the_line_of_a_shorter_past():
  run = _train(recoveries.Run(), 10)
  full = {
    'state': _State.BLOCKED,
    'shortage': hang_detection.Shortage.SNAPSHOTS,
  }
  for _ in range(2):
    for _ in range(3):
      run.works_on(0, 11, **full)
      run.now += 0.5
  assert run.line == 8


# ---- decisions ---------------------------------------------------------------


def test_a_worker_is_told_what_holds_and_what_comes():
  run = recoveries.Run(window_length=0, max_window_length=6, overlap_target=0.5)
  run.begin()
  run.train(8, seconds=2.0, copy_bytes_per_second=26.0)
  made = [
    a.order.decision
    for a in run.of(actions.Send)
    if isinstance(a.order, orders.Decide)
  ]
  assert len(made) == 2 and {d.first_iteration for d in made} == {9}
  (event,) = run.of_kind('window')
  assert event['first_iteration'] == 9 and event['window_length'] == 6
  go = run.dies(1)[1]  # it will hold
  assert [d.first_iteration for d in go.decisions] == [0, 9]
  assert [d.window_length for d in go.decisions] == [4, 6]


def test_a_stage_with_fewer_operators_than_slots_is_told_of(monkeypatch):
  of_all = recoveries.operators
  monkeypatch.setattr(recoveries, 'operators', lambda s: of_all(s)[: 6 - 4 * s])
  run = recoveries.Run()
  gone = run.begin()
  (event,) = run.of_kind('window')
  assert event['window_length'] == 3 and event['empty_slots'] == [0, 1]
  sizes = {s: [len(x) for x in go.decisions[0].slots] for s, go in gone.items()}
  assert sorted(sizes[1]) == [0, 1, 1] and min(sizes[0]) == 2
  run.train(10)
  assert run.line == 5
  go = run.dies(1)[1]  # what begins after an empty slot has less to replay
  assert (go.start, go.complete_at) == (9, 10)


def test_decisions_that_nobody_can_go_back_to_are_forgotten():
  run = recoveries.Run(policy='partial', interval=2)
  run.begin()
  run.train(50)
  assert run.line > 40
  for known in run.one.state.decisions:
    assert known[0].first_iteration <= run.line and len(known) < 5


# ---- failures ----------------------------------------------------------------


def test_one_stage_recovers():
  run = _train(recoveries.Run(stages=3), 10)
  run.says(1, notices.Faulted(at=run.now - 0.25, iteration=11, fields={}))
  gone = run.dies(1)
  assert list(gone) == [1]
  go = gone[1]
  assert (go.start, go.complete_at, go.newest) == (8, 10, 10)
  assert go.target == go.replays_until == 11 and not go.is_fresh
  assert go.line == run.line == 5 and go.generation == 2
  (event,) = run.of_kind('recovery_started')
  assert event.pop('reason').startswith('the worker (pid 1) was killed by')
  assert event == {
    'stage': 1, 'replica': 0, 'first_iteration': 9, 'target': 11,
  }  # fmt: skip
  run.now += 3
  run.comes_back(1)
  (event,) = run.of_kind('recovered')
  assert event == {
    'stage': 1,
    'replica': 0,
    'source': 'own',
    'first_iteration': 9,
    'replayed_iterations': 3,
    'applied_updates': 0,
    'compared_iterations': 2,
    'seconds': {'detect': 0.25, 'start': 3.0, 'fetch': 0.0, 'replay': 0.0},
    'digest_verified': True,
  }
  assert 'stage 1 recovered in 3.0 s' in run.of(actions.Note)[-1].text


def test_a_recovery_before_anything_is_written_down_proves_nothing():
  run = recoveries.Run()
  run.begin()
  run.works_on(1, 1)
  run.dies(1)
  run.comes_back(1)
  (event,) = run.of_kind('recovered')
  assert event['compared_iterations'] == 0 and not event['digest_verified']
  assert 'same digests' not in run.of(actions.Note)[-1].text


def test_one_that_did_not_recover_has_not():
  run = recoveries.Run()
  run.begin()
  run.says(1, notices.CaughtUp())
  assert not run.of_kind('recovered')


def test_a_second_failure_while_it_recovers():
  run = _train(recoveries.Run(), 10)
  run.dies(1)
  # It replays iteration 9 when it dies again; it must come to 11 still.
  run.works_on(1, 9)
  go = run.dies(1)[1]
  assert (go.start, go.target, go.generation) == (8, 11, 3)
  run.comes_back(1)
  (event,) = run.of_kind('recovered')
  assert event['replayed_iterations'] == 3


def test_a_damaged_snapshot_means_an_older_start():
  run = _train(recoveries.Run(), 10)
  assert run.dies(1)[1].start == 8
  go = run.dies(1, error='snapshot 9 is lost', suspects=(9,))[1]
  assert (go.start, go.complete_at, go.excluded) == (6, 8, (9,))
  # A scan reads the manifest, which says nothing of it.
  assert run.dies(1)[1].start == 6


def test_a_damaged_entry_brings_its_sender_back():
  run = _train(recoveries.Run(stages=3), 10)
  run.damage = (segment_check.Damage(9, 0, 0, 'E'),)
  gone = run.dies(1, error='it read damage', corrupt=(0, 9))
  assert list(gone) == [0, 1]
  reasons = {e['stage']: e['reason'] for e in run.of_kind('recovery_started')}
  assert 'it read damage' in reasons[1]
  assert 'an entry of iteration 9 is corrupt' in reasons[0]
  assert run.of_kind('entry_dropped') == [
    {'stage': 0, 'replica': 0, 'iteration': 9, 'entry': 'E'}
  ]
  run.comes_back(0, 1)
  assert list(run.dies(1)) == [1]  # it was written again


def test_a_lost_log_brings_its_stage_back():
  run = _train(recoveries.Run(stages=3), 10)
  run.missing = {2}
  gone = run.dies(1)
  assert list(gone) == [1, 2] and gone[2].is_fresh and not gone[1].is_fresh


def test_an_error_that_comes_again_ends_the_run():
  run = _train(recoveries.Run(), 10)
  failed = notices.Failed(error='no room', iteration=11, is_final=True)
  run.says(1, failed)
  assert str(run.error()) == 'stage 1, iteration 11: no room'
  assert run.dies(1) == {}


# ---- all over again ----------------------------------------------------------


@pytest.mark.parametrize('resumed_at', [0, 20])
def test_all_begin_again_when_nothing_of_a_stage_is_left(resumed_at):
  run = recoveries.Run()
  if resumed_at:
    for stage in (0, 1):
      run.shares[stage] = {
        (i, 0): recoveries.share(stage, i) for i in range(15, resumed_at + 3)
      }
  assert run.begin(resumed_at)[0].start == resumed_at
  run.train(resumed_at + 12)
  assert run.line > resumed_at
  run.shares[1].clear()
  gone = run.dies(1)
  assert list(gone) == [0, 1]
  for go in gone.values():
    # Nothing is dropped, nothing is there, and it is known what to capture.
    assert (go.line, go.newest, go.start) == (0, 0, 0) and go.is_fresh
    assert go.decisions[0].first_iteration == 0
    assert go.target == resumed_at + 13
  # One that dies before its log has begun leaves the old one to the next.
  assert run.dies(0)[0].is_fresh
  # The line moves on meanwhile: the stores hold less than the way back.
  for stage in (0, 1):
    run.resumes(stage)
  for iteration in range(1, 11):
    for stage in (0, 1):
      run.stores(stage, iteration)
  assert run.line == 5
  # And if a worker dies then it is a recovery like any other.
  run.newest = [10, 10]
  gone = run.dies(0)
  assert list(gone) == [0] and gone[0].start == 8 and not gone[0].is_fresh
  # Its way is as long as the others': what is kept must move on with it.
  assert gone[0].target == resumed_at + 13
  for iteration in range(11, resumed_at + 13):
    for stage in (0, 1):
      run.stores(stage, iteration)
  assert run.line == resumed_at + 12 - 2 - 3
  run.comes_back(0, 1)
  found = {e['stage']: e for e in run.of_kind('recovered')}
  assert found[1]['source'] == 'initial' and found[0]['source'] == 'own'


def test_going_back_to_the_initial_state_at_first_keeps_what_is_there():
  run = _train(recoveries.Run(), 2)
  gone = run.dies(1)
  assert list(gone) == [1] and gone[1].start == 0 and not gone[1].is_fresh


@pytest.mark.parametrize(
  ('length', 'reported', 'start'), [(1, 8, 8), (1, 7, 7), (3, 5, 5)]
)
def test_an_iteration_that_was_not_reported_is_done_again(
  length, reported, start
):
  """A worker never reports the iteration of the state that it begins with."""
  run = recoveries.Run(window_length=length)
  run.begin()
  run.train(reported, length)
  for iteration in range(reported + 1, 9):
    for stage in (0, 1):
      run.stores(stage, iteration, length)
  run.newest = [9, 9]
  gone = run.dies(0)
  assert list(gone) == [0] and gone[0].start == start


def test_snapshots_of_an_earlier_run_do_not_tell_what_was_reported():
  run = recoveries.Run()
  for stage in (0, 1):
    for iteration in range(4, 12):
      run.keeps(stage, iteration)
  assert run.begin(last_recorded=5, newest=11)[0].start == 5
  assert run.dies(0)[0].start == 5
  for stage in (0, 1):
    for iteration in (6, 7):
      run.stores(stage, iteration)
  run.reports(6)
  assert run.dies(0)[0].start == 6


def test_a_log_that_began_anew_has_nothing_from_before():
  run = _train(recoveries.Run(), 10)
  run.missing = {1}
  gone = run.dies(1)
  assert list(gone) == [1] and gone[1].start == 8 and gone[1].is_fresh
  run.comes_back(1)
  run.shares[0] = {n: s for n, s in run.shares[0].items() if n[0] < 10}
  gone = run.dies(0)  # it needs iteration 8 of stage 1
  assert list(gone) == [0, 1] and gone[0].start == 7


def test_who_lost_a_log_may_have_lost_all():
  run = _train(recoveries.Run(), 10)
  run.missing = {1}
  run.shares[1].clear()
  gone = run.dies(0)
  assert {go.start for go in gone.values()} == {0} and list(gone) == [0, 1]


# ---- all go back together ----------------------------------------------------


def test_all_stop_where_they_are_and_begin_together():
  run = _train(recoveries.Run(policy='dense', interval=2), 1)
  assert run.dies(1) == {}  # stage 0 has to stop first
  stops = [
    a.worker
    for a in run.of(actions.Send)
    if isinstance(a.order, orders.StopHere)
  ]
  assert stops == [(0, 0)]
  # What it still says of the past counts for nothing.
  assert run.reports(2, stages=[0]) == []
  gone = recoveries.orders_in(run.says(0, notices.StoppedHere()))
  assert {s: g.generation for s, g in gone.items()} == {0: 2, 1: 2}
  assert all(go.is_fresh and go.start == 0 for go in gone.values())
  assert run.of(actions.DropLogs)


def test_wrong_bits_that_damage_explains_take_all_back_before_it():
  run = _train(recoveries.Run(), 20)
  run.damage = (segment_check.Damage(18, 0, 0, 'E'),)
  failed = notices.Failed(
    error='NaN', iteration=21, is_final=True, has_wrong_bits=True
  )
  done = run.says(1, failed)
  assert actions.Kill(worker=(1, 0)) in done and not run.of(actions.Fail)
  run.dies(1)
  gone = recoveries.orders_in(run.says(0, notices.StoppedHere()))
  # Logs that begin at the start have nothing from before it.
  assert {(g.start, g.complete_at, g.line) for g in gone.values()} == {
    (15, 17, 15)
  }
  assert run.of(actions.ForgetAfter)[-1].iteration == 17
  assert run.of(actions.ForgetNewer)[-1].iterations == {0: 17, 1: 17}


def test_wrong_bits_that_nothing_explains_end_the_run():
  run = _train(recoveries.Run(), 20)
  failed = notices.Failed(
    error='NaN', advice='A', iteration=9, is_final=True, has_wrong_bits=True
  )
  run.says(1, failed)
  assert str(run.error()).endswith('checked and are whole); A')


# ---- replicas ----------------------------------------------------------------


def test_a_stage_shrinks_when_nobody_can_be_started():
  settings = {'shrinks': True, 'max_workers': 7}
  run = _train(recoveries.Run(replicas=2, settings=settings), 10)
  run.dies(1)
  run.comes_back(1)
  (first,) = [a for a in run.of(actions.Replace) if a.generation == 2]
  assert first.team == (0, 1) and first.begun == 11
  run.dies(1)  # one may be started still
  last = run.of(actions.Replace)[-1]
  assert (last.stage, last.team, last.generation) == (1, (1,), 3)
  assert run.of(actions.Orphan) == [actions.Orphan(stage=1, team=(1,))]
  assert run.of_kind('shrunk') == [{'stage': 1, 'replica': 0, 'team': (1,)}]


def test_nobody_to_take_its_place_ends_the_run():
  run = _train(recoveries.Run(settings={'max_workers': 2}), 10)
  run.dies(1)
  assert run.error().is_passing
  assert '--max_workers=2 processes were started' in str(run.error())


def test_a_stage_grows_again():
  settings = {'shrinks': True, 'max_failures': 0, 'grow_after': 2}
  run = _train(recoveries.Run(replicas=2, settings=settings), 10)
  run.dies(1)
  run.comes_back(1)
  assert run.one.state.team(1) == (1,)
  for iteration in (11, 12):
    for stage, replica in ((0, 0), (0, 1), (1, 1)):
      report = helpers.make_report(iteration, stage, replica=replica)
      done = run.says(stage, notices.Reported(report=report), replica)
  (start,) = [a for a in done if isinstance(a, actions.Replace)]
  assert (start.stage, start.team, start.generation) == (1, (0, 1), 3)
  assert run.of_kind('grown') == [{'stage': 1, 'team': (0, 1)}]


# ---- hanging -----------------------------------------------------------------


def test_a_worker_that_hangs_is_ended_and_one_that_waits_is_not():
  run = _train(recoveries.Run(settings={'hang_timeout_seconds': 5}), 10)
  run.works_on(0, 11, state=_State.WAITING, detail='x')
  for _ in range(30):
    run.now += 0.25
    for worker in run.one.state.workers:
      worker.heard_at = run.one.state.watched
    run.handle(events.Looked())
  assert {a.worker for a in run.of(actions.Kill)} == {(1, 0)}
  run.dies(1)
  (event,) = run.of_kind('failure')
  assert 'hung: it has been running forward' in event['error']


def test_an_agent_that_slept_blames_nobody():
  run = _train(recoveries.Run(settings={'hang_timeout_seconds': 5}), 10)
  run.handle(events.Looked())
  run.now += 60
  run.handle(events.Looked(stopped=frozenset({(0, 0)})))
  assert not run.of(actions.Kill)


def test_time_that_the_agent_was_not_given_counts_for_nobody():
  run = _train(recoveries.Run(settings={'hang_timeout_seconds': 5}), 10)
  run.works_on(0, 11)
  for _ in range(4):  # it looks four times a second, if the machine lets it
    run.now += 6
    run.handle(events.Looked())
  assert not run.of(actions.Kill)
  for _ in range(7):
    run.now += 0.25
    run.handle(events.Looked())
  (killed,) = {a.worker for a in run.of(actions.Kill)}
  assert killed == (0, 0)


# ---- the end -----------------------------------------------------------------


def _done(run):
  for stage in range(run.stages):
    done = run.says(stage, notices.Done(iteration=60))
  return done


def test_all_hand_over_then_the_first_saves():
  run = _train(recoveries.Run(iterations=60), 10)
  asked = [a.worker for a in _done(run) if isinstance(a, actions.Send)]
  assert asked == [(0, 0), (1, 0)]
  assert run.says(1, notices.HandedOver()) == []
  (save,) = run.says(0, notices.HandedOver())
  assert save == actions.Save(
    worker=(0, 0), iteration=10, replicas=((0,), (0,))
  )
  assert run.says(0, notices.Saved()) == [actions.Finish(iteration=10)]


def test_who_dies_at_the_end_is_asked_again():
  run = _train(recoveries.Run(iterations=60), 10)
  _done(run)
  run.says(1, notices.HandedOver())
  run.dies(1)
  run.comes_back(1)
  assert run.says(0, notices.HandedOver()) == []
  (again,) = [a for a in _done(run) if isinstance(a, actions.Send)]
  assert again == actions.Send(worker=(1, 0), order=orders.HandOver())


@pytest.mark.parametrize(
  ('is_sent_so', 'says'),
  [
    (False, 'that was 3 times: host memory is damaged'),
    (True, 'that was 3 times: host memory brought what was sent'),
  ],
)
def test_damage_is_named_as_what_it_is(is_sent_so, says):
  """What has its checksum was damaged before it came into host memory."""
  run = _train(recoveries.Run(), 10)
  _done(run)
  message = notices.Damaged(
    stage=1, replica=0, what='stage 1: X', is_sent_so=is_sent_so
  )
  assert run.says(0, message) == []  # nobody has handed over yet
  for _ in range(3):
    assert not run.of(actions.Fail)
    run.says(1, notices.HandedOver())
    run.says(0, message)
  assert says in str(run.error()) and 'stage 1: X' in str(run.error())
  found = run.of_kind('final_state_damaged')
  assert [e['stage'] for e in found] == [1] * 3


def test_a_checkpoint_that_is_written_again_is_told():
  run = _train(recoveries.Run(), 10)
  run.says(0, notices.Rewritten(what='W/checkpoint: read otherwise'))
  said = 'W/checkpoint: read otherwise; it is written once more.'
  assert run.of(actions.Note)[-1].text == said
  (event,) = run.of_kind('final_checkpoint_damaged')
  assert event['error'] == 'W/checkpoint: read otherwise'


def test_a_run_that_is_asked_stops_after_the_same_iteration():
  run = _train(recoveries.Run(), 10)
  told = run.handle(events.StopAsked())
  proposals = {a.worker: a.order for a in told if isinstance(a, actions.Send)}
  assert proposals == dict.fromkeys([(0, 0), (1, 0)], orders.Propose(limit=13))
  assert run.says(0, notices.Answer(limit=13, begun=11)) == []
  committed = run.says(1, notices.Answer(limit=13, begun=12))
  assert {a.order for a in committed} == {orders.Commit(limit=13)}
  for stage in (0, 1):
    done = run.says(stage, notices.Done(iteration=13))
  assert done == [actions.Stop(iteration=10)]


def test_asked_twice_it_stops_at_once():
  run = _train(recoveries.Run(), 10)
  run.handle(events.StopAsked())
  assert run.handle(events.StopAsked()) == [
    actions.Stop(iteration=10),
    actions.KillNow(),
  ]
  run = recoveries.Run()
  run.start()  # nothing is lost yet
  assert run.handle(events.StopAsked()) == [actions.Stop(), actions.KillNow()]


def test_a_report_is_written_down_once_all_have_it():
  run = recoveries.Run()
  run.begin()
  first = helpers.make_report(1, 0)
  assert run.says(0, notices.Reported(report=first)) == [
    actions.Merge(report=first, teams=((0,), (0,)))
  ]
  run.reports(1, stages=[1])
  assert run.one.state.recorded == 1
