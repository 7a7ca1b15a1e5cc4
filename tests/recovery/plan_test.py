import itertools
from typing import Any

import hypothesis
import hypothesis.strategies as st
import pytest

from moetion_jax.recovery import plan as recovery_plan
from moetion_jax.snapshots import coverage

_WINDOW = 4


def _starts(*iterations: int, window: int = _WINDOW):
  """Rolling windows; snapshot 0 is complete by definition."""
  return tuple(
    coverage.Start(iteration=i, complete_at=i + window - 1 if i else 0)
    for i in iterations
  )


# In iteration 20 the snapshots of 8 to 19 exist, and the line is 8.
_VALID = _starts(0, *range(8, 17))


def _inventory(stage: int, **changes) -> recovery_plan.StageInventory:
  defaults: dict[str, Any] = dict(
    stage=stage, starts=_VALID, log_first=9, newest=20
  )
  return recovery_plan.StageInventory(**(defaults | changes))


def _run(stages: int, changes=None) -> list[recovery_plan.StageInventory]:
  """A run of some stages in iteration 20; changes by stage."""
  changes = changes or {}
  return [_inventory(s, **changes.get(s, {})) for s in range(stages)]


_STORE_LOST = dict(starts=_starts(0), log_lost=True)
_LOG_LOST = dict(log_lost=True)
_FIRST = dict(starts=_starts(0), log_first=1)  # nothing was captured yet
_DONE = dict(starts=_starts(0, *range(8, 18)), newest=20)


def _corrupt(*iterations: int) -> dict:
  return dict(corrupt=frozenset(iterations))


@pytest.mark.parametrize(
  ('stages', 'changes', 'failed', 'members', 'start'),
  [
    # Who died recovers; from the newest start.
    pytest.param(1, {}, {0}, (0,), 16, id='single stage'),
    pytest.param(3, {}, {0}, (0,), 16, id='first'),
    pytest.param(3, {}, {1}, (1,), 16, id='middle'),
    pytest.param(3, {}, {2}, (2,), 16, id='last'),
    pytest.param(4, {}, {1, 2}, (1, 2), 16, id='adjacent'),
    pytest.param(4, {}, {0, 3}, (0, 3), 16, id='not adjacent'),
    pytest.param(3, {}, {0, 1, 2}, (0, 1, 2), 16, id='all'),
    pytest.param(3, {}, set(), (), 0, id='none'),
    # The set has one common start, valid for each member.
    pytest.param(
      3, {2: dict(starts=_starts(0, 8, 9, 13))}, {1, 2}, (1, 2), 13, id='common'
    ),
    pytest.param(
      3,
      {1: dict(starts=_starts(0, 12, 14)), 2: dict(starts=_starts(0, 12, 15))},
      {1, 2},
      (1, 2),
      12,
      id='the newest of each is not common',
    ),
    pytest.param(
      2, {0: dict(starts=_starts(0))}, {1}, (1,), 16, id='live: starts are free'
    ),
    # Own store corrupt: older starts only.
    pytest.param(
      2, {0: dict(starts=_starts(0, 8, 9))}, {0}, (0,), 9, id='store corrupt'
    ),
    # A stage joins when its log was lost and a member needs its entries.
    pytest.param(
      4, {2: _LOG_LOST}, {1}, (1, 2), 16, id='log of a neighbour is lost'
    ),
    pytest.param(
      4, {3: _LOG_LOST}, {0}, (0, 3), 16, id='everybody needs scalars'
    ),
    pytest.param(
      4,
      {3: dict(log_lost=True, newest=19)},
      {0},
      (0,),
      16,
      id='not the scalars of the iterations of a conversion',
    ),
    pytest.param(
      4,
      {1: dict(log_lost=True, newest=19)},
      {0},
      (0, 1),
      16,
      id='but all of a neighbour',
    ),
    pytest.param(
      5,
      {2: _LOG_LOST, 3: _LOG_LOST},
      {1},
      (1, 2, 3),
      16,
      id='the log of the neighbour of one that joined',
    ),
    pytest.param(
      3,
      {1: _LOG_LOST},
      set(),
      (1,),
      16,
      id='nobody died, the others wait for its entries',
    ),
    pytest.param(
      2,
      {0: dict(newest=0, log_lost=True, **_FIRST), 1: dict(newest=1, **_FIRST)},
      {1},
      (1,),
      0,
      id='one that has not begun has lost nothing',
    ),
    # A stage joins when an entry of it that a member needs is corrupt.
    pytest.param(
      3, {0: _corrupt(18)}, {1}, (0, 1), 16, id='entry of a live sender'
    ),
    pytest.param(
      3, {0: _corrupt(16)}, {1}, (1,), 16, id='corrupt, but not needed'
    ),
    pytest.param(
      4, {3: _corrupt(20)}, {0}, (0, 3), 16, id='corrupt scalars, far away'
    ),
    pytest.param(
      4, {3: _corrupt(18)}, {0}, (0,), 16, id='corrupt scalars, recorded'
    ),
    pytest.param(
      4,
      {0: {'unrecorded_until': 19}, 3: _corrupt(18)},
      {0},
      (0, 3),
      16,
      id='corrupt scalars, recorded by other software',
    ),
    pytest.param(
      4, {3: _corrupt(19)}, {0}, (0,), 16, id='conversion needs no scalars'
    ),
    pytest.param(
      3, {0: _corrupt(20)}, set(), (0,), 16, id='a live stage needs it'
    ),
    pytest.param(
      3, {0: _corrupt(19)}, set(), (), 0, id='no live stage needs it any more'
    ),
    pytest.param(
      3,
      {0: _corrupt(15), 1: dict(starts=_starts(0, 14, 16))},
      {1},
      (1,),
      16,
      id='a newer start avoids it',
    ),
    # Stores lost.
    pytest.param(2, {1: _STORE_LOST}, {1}, (0, 1), 0, id='store lost'),
    pytest.param(
      3,
      {1: dict(log_lost=True)},
      {1},
      (1,),
      16,
      id='store lost, but a peer has the snapshots',
    ),
    pytest.param(
      4,
      {1: _LOG_LOST, 2: _LOG_LOST},
      {1, 2},
      (1, 2),
      16,
      id='the store of two adjacent stages lost, peers have them',
    ),
    # A member whose log is lost publishes again what the slowest needs.
    pytest.param(
      3,
      {0: dict(newest=14), 1: _LOG_LOST},
      {1},
      (1,),
      13,
      id='starts before what the slowest works on',
    ),
    pytest.param(
      4,
      {0: dict(newest=14), 3: _LOG_LOST},
      {3},
      (3,),
      13,
      id='scalars: of any other',
    ),
    pytest.param(
      3, {0: dict(newest=14)}, {1}, (1,), 16, id='not if its log is there'
    ),
    pytest.param(
      3,
      {0: dict(newest=14), 1: _corrupt(15)},
      {1},
      (1,),
      14,
      id='starts before its corrupt entry that one needs',
    ),
    pytest.param(
      3,
      {0: dict(newest=14), 1: _corrupt(13)},
      {1},
      (1,),
      16,
      id='a corrupt entry that nobody needs',
    ),
    pytest.param(
      3,
      {
        0: dict(newest=14, starts=_starts(0, 15)),
        1: dict(log_lost=True, starts=_starts(0, 15)),
      },
      {1},
      (0, 1),
      15,
      id='or who needs it joins',
    ),
    pytest.param(
      3,
      {1: dict(newest=16, starts=_starts(16, 15, 14, window=1))},
      {1},
      (1,),
      16,
      id='the newest may be half published, but nobody works on it',
    ),
    pytest.param(
      2,
      {
        0: dict(newest=16),
        1: dict(newest=16, starts=_starts(14, 15, 16, window=1)),
      },
      {1},
      (1,),
      15,
      id='the newest may be half published',
    ),
    # The live stages' entries exist from the start on.
    pytest.param(
      2, {1: dict(starts=_starts(0, 8))}, {1}, (1,), 8, id='the line'
    ),
    pytest.param(
      3,
      {1: dict(starts=_starts(0, 7))},
      {1},
      (0, 1, 2),
      0,
      id='older than the line: all, if that is valid for all',
    ),
    pytest.param(
      3,
      {
        0: dict(starts=_starts(0, 7, 16)),
        1: dict(starts=_starts(0, 7)),
        2: dict(starts=_starts(0, 16), log_first=3),
      },
      {1},
      (0, 1),
      7,
      id='one whose log goes further back stays',
    ),
    # First iterations, last iteration, the end.
    pytest.param(
      2,
      {s: dict(newest=0, **_FIRST) for s in range(2)},
      {0},
      (0,),
      0,
      id='before the first iteration',
    ),
    pytest.param(
      2,
      {s: dict(newest=1, **_FIRST) for s in range(2)},
      {0},
      (0,),
      0,
      id='first iteration',
    ),
    pytest.param(
      2,
      {0: dict(newest=3, **_FIRST), 1: dict(newest=2, log_lost=True, **_FIRST)},
      {1},
      (1,),
      0,
      id='first iterations, log lost',
    ),
    pytest.param(
      3, {s: _DONE for s in range(3)}, {1}, (1,), 17, id='after done'
    ),
    pytest.param(
      2,
      {0: dict(newest=20), 1: _DONE | _LOG_LOST},
      {1},
      (1,),
      17,
      id='done, its log is lost and another has not finished',
    ),
    pytest.param(
      2,
      {s: dict(newest=21, starts=_starts(0, 20, window=1)) for s in range(2)},
      {1},
      (1,),
      20,
      id='all have finished the last iteration, which is 20',
    ),
    pytest.param(
      2, {s: _DONE for s in range(2)}, {0, 1}, (0, 1), 17, id='both'
    ),
    # The smallest set, then the newest start.
    pytest.param(
      3,
      {
        0: dict(newest=14),
        1: dict(log_lost=True, starts=_starts(0, 13, 16)),
      },
      {1},
      (1,),
      13,
      id='older, so that nobody joins',
    ),
    # A failure during a recovery is a new plan. Stage 1 was replaying 17.
    pytest.param(
      4,
      {1: dict(newest=17)},
      {1, 2},
      (1, 2),
      16,
      id='a neighbour dies during a recovery',
    ),
    pytest.param(
      4, {1: dict(newest=17)}, {1}, (1,), 16, id='it dies again, log kept'
    ),
    pytest.param(
      4,
      {1: dict(newest=17, log_first=17)},
      {1},
      (1,),
      16,
      id='it dies again, of its log the replayed part is there',
    ),
    pytest.param(
      3,
      {1: dict(newest=17), 2: _LOG_LOST},
      {2},
      (2,),
      16,
      id='another dies: the replaying one goes on and waits for it',
    ),
    pytest.param(
      3,
      {1: dict(newest=14), 2: _LOG_LOST},
      {2},
      (2,),
      13,
      id='another dies: it regenerates what the replaying one needs',
    ),
    pytest.param(
      3,
      {1: dict(newest=14, log_first=14), 2: {}},
      {2},
      (2,),
      16,
      id='the replaying one will have published what another needs',
    ),
  ],
)
def test_plan(stages, changes, failed, members, start):
  inventories = _run(stages, changes)
  plan = recovery_plan.plan(inventories, failed)
  assert (plan.stages, plan.start) == (members, start)
  valid = {
    m: {s.iteration: s.complete_at for s in inventories[m].starts}
    for m in members
  }
  assert plan.complete_at == {m: valid[m][start] for m in members}
  assert plan.sources == {m: 'own' if start else 'initial' for m in members}
  assert list(plan.reasons) == list(members)
  assert {m for m, r in plan.reasons.items() if r == 'died'} == failed
  assert recovery_plan.plan(inventories[::-1], failed) == plan


@pytest.mark.parametrize(
  ('changes', 'excluded', 'start'),
  [
    ({}, set(), 16),
    ({}, {(1, 16)}, 15),
    ({}, {(0, 16)}, 16),  # of a live stage
    ({}, {(1, s) for s in range(10, 17)}, 9),
    ({1: dict(starts=_starts(0, 10, 16))}, {(1, 16)}, 10),
  ],
)
def test_a_start_that_was_found_to_be_corrupt_is_not_used_again(
  changes, excluded, start
):
  plan = recovery_plan.plan(_run(2, changes), {1}, excluded)
  assert (plan.stages, plan.start) == ((1,), start)


@pytest.mark.parametrize(
  ('changes', 'failed', 'reasons'),
  [
    ({}, {1}, {1: 'died'}),
    (
      {2: dict(log_lost=True, newest=19)},
      {1},
      {1: 'died', 2: 'its log is lost and stage 1 needs it'},
    ),
    ({2: _LOG_LOST}, set(), {2: 'its log is lost and stage 0 needs it'}),
    (
      {0: _corrupt(17, 19)},
      {1},
      {
        0: 'an entry of iteration 17 is corrupt and stage 1 needs it',
        1: 'died',
      },
    ),
    (
      {
        0: dict(starts=_starts(0, 7)),
        1: dict(starts=_starts(0, 7)),
        2: dict(log_first=1),
      },
      {1},
      {
        0: 'its entries before iteration 9 are gone and stage 1 needs them',
        1: 'died',
      },
    ),
    (
      {
        0: dict(newest=14),
        1: dict(log_lost=True, starts=_starts(15)),
      },
      {1},
      {
        0: 'it needs entries of iteration 14, which stage 1 has not and does '
        'not publish again from iteration 15',
        1: 'died',
      },
    ),
  ],
)
def test_reasons(changes, failed, reasons):
  assert recovery_plan.plan(_run(3, changes), failed).reasons == reasons


def test_sources_are_the_best_of_each_member():
  changes = {
    0: dict(sources={16: ('replica of 2', 'own'), 15: ('own',)}),
    1: dict(sources={15: ('replica of 0',), 16: ()}),
  }
  plan = recovery_plan.plan(_run(3, changes), {0, 1, 2})
  assert plan.sources == {0: 'replica of 2', 1: 'own', 2: 'own'}
  plan = recovery_plan.plan(_run(3, changes), {0, 1, 2}, {(2, 16)})
  assert plan.sources == {0: 'own', 1: 'replica of 0', 2: 'own'}


@pytest.mark.parametrize(
  ('changes', 'failed', 'words'),
  [
    (
      {1: dict(starts=())},
      {1},
      ['stage 1 (died)', 'to recover: none. ', 'Start over with --fresh'],
    ),
    (
      {1: dict(starts=_starts(14)), 2: dict(starts=_starts(15))},
      {1, 2},
      ['stage 1 (died) has to recover: 14', 'stage 2 (died)', ': 15.'],
    ),
    (
      {2: dict(log_lost=True, newest=19, starts=())},
      {1},
      [
        'stage 2 (its log is lost and stage 1 needs it)',
        'with the others from iteration 16: none',
      ],
    ),
  ],
)
def test_unrecoverable(changes, failed, words):
  with pytest.raises(recovery_plan.UnrecoverableError) as error:
    recovery_plan.plan(_run(3, changes), failed)
  for word in words:
    assert word in str(error.value)


def test_a_failure_during_a_recovery_is_a_new_plan():
  before = _run(4)
  first = recovery_plan.plan(before, {1})
  assert (first.stages, first.start) == ((1,), 16)
  # Stage 1 replays 18 when 2 dies; the line is frozen, so all is still there.
  during = _run(4, {1: dict(newest=18)})
  second = recovery_plan.plan(during, {1, 2})
  assert (second.stages, second.start) == ((1, 2), 16)
  # A snapshot of stage 2 turns out to be corrupt, then everything dies.
  third = recovery_plan.plan(during, {1, 2}, {(2, 16)})
  assert (third.stages, third.start) == ((1, 2), 15)
  fourth = recovery_plan.plan(during, range(4), {(2, 16)})
  assert (fourth.stages, fourth.start) == ((0, 1, 2, 3), 15)


@pytest.mark.parametrize('stages', [[0, 2], [0, 0], [1], []])
def test_inventories_of_all_stages(stages):
  with pytest.raises(ValueError, match='stages'):
    recovery_plan.plan([_inventory(s) for s in stages], {0})


def test_failed_stages_exist():
  with pytest.raises(ValueError, match='failed'):
    recovery_plan.plan(_run(2), {2})


@pytest.mark.parametrize(
  ('newest', 'replayed'),
  [
    (20, 4),  # w - 1 and the interrupted one
    (21, 5),  # and one whose copy had not landed
    (16, 0),
    (0, 0),  # a stage that has begun less
  ],
)
def test_replayed_iterations(newest, replayed):
  plan = recovery_plan.plan(_run(2), {1})
  assert plan.first_iteration == 17
  assert recovery_plan.replayed_iterations(plan, 1, newest) == replayed


@pytest.mark.parametrize(
  ('starts', 'previous', 'lag', 'expected'),
  [
    ([[0]], 0, 4, 0),
    ([[0, 1, 2, 3]], 0, 4, 0),  # nothing is old enough
    ([[0, 1, 2, 3, 4, 5]], 0, 4, 1),
    ([[0, 1, 2, 3, 4, 5]], 0, 0, 5),
    ([[0, 1, 2, 3], [0, 1, 2]], 0, 0, 2),  # of every stage
    ([[0, 1, 2, 3], [0, 1, 2]], 0, 1, 1),  # lags behind the newest such
    ([[0, 4, 8, 12], [0, 4, 8, 12]], 0, 4, 8),  # aligned
    ([[0, 4, 8, 12], [0, 4, 8, 12]], 0, 5, 4),
    ([[0, 4, 8], [0, 3, 6]], 0, 0, 0),
    ([[9, 3, 6], [6, 9, 3]], 3, 2, 6),  # any order
    ([[0, 1, 2, 3]], 5, 0, 5),  # monotone, whatever was lost
    ([[0, 5], []], 3, 0, 3),
    ([[7], [8]], 3, 0, 3),
    ([], 3, 0, 3),
  ],
)
def test_recovery_line(starts, previous, lag, expected):
  assert recovery_plan.recovery_line(starts, previous, lag) == expected
  assert (
    recovery_plan.recovery_line(starts, previous, lag, frozen=True) == previous
  )


# ---- properties --------------------------------------------------------------

_iterations = st.frozensets(st.integers(0, 8))


@hypothesis.settings(deadline=None)
@hypothesis.given(
  st.lists(st.lists(_iterations, min_size=1, max_size=3), max_size=6),
  st.integers(0, 4),
)
def test_the_line_is_monotone_and_valid(history, lag):
  line = 0
  for starts in history:
    following = recovery_plan.recovery_line(
      [list(s) for s in starts], line, lag
    )
    assert following >= line
    if following > line:
      assert all(following in s for s in starts)
      assert any(
        all(newer in s for s in starts)
        for newer in range(following + lag, 9 + lag)
      )
    line = following


@st.composite
def _a_start(draw, iteration, stored):
  """Perhaps one from which gradients lead to what is stored, or less far."""
  complete_at = iteration + draw(st.integers(0, 2))
  applied_until = 0
  if complete_at <= stored and iteration < stored:
    least = max(complete_at, iteration + 1)
    applied_until = draw(st.sampled_from([0, *range(least, stored + 1)]))
  return coverage.Start(
    iteration=iteration, complete_at=complete_at, applied_until=applied_until
  )


@st.composite
def _inventories(draw, with_gradients=False):
  """Small runs in which anything may have been lost, of up to 4 stages."""
  inventories = []
  for stage in range(draw(st.integers(1, 3 if with_gradients else 4))):
    newest = draw(st.integers(0, 6))
    stored = draw(st.integers(0, newest)) if with_gradients else 0
    inventories.append(
      recovery_plan.StageInventory(
        stage=stage,
        stored=stored,
        starts=tuple(
          draw(_a_start(i, stored))
          for i in sorted(draw(st.frozensets(st.integers(0, 6), min_size=2)))
        ),
        log_first=draw(st.integers(1, newest + 1)),
        log_lost=draw(st.integers(0, 3)) == 0,
        corrupt=draw(
          st.frozensets(st.integers(1, newest), max_size=1)
          if newest
          else st.just(frozenset())
        ),
        newest=newest,
      )
    )
  return inventories


def _failures(inventories):
  return st.frozensets(st.sampled_from(range(len(inventories))))


def _begun(inventory) -> int:
  """A snapshot counts when all entries of its iteration can be read."""
  return max(inventory.newest, inventory.stored + 1 if inventory.stored else 0)


def _will_exist(producer, iteration, until) -> bool:
  """Whether entries of an iteration are there, or will be."""
  is_member = producer.stage in until
  if iteration > (until[producer.stage] if is_member else producer.newest):
    return is_member or iteration not in producer.corrupt
  return (
    not producer.log_lost
    and iteration >= producer.log_first
    and iteration not in producer.corrupt
    and not (is_member and iteration >= _begun(producer))
  )


def _untils(inventories, members, start):
  """All that the members may do nothing again up to, the most first."""
  choices = []
  for member in members:
    starts = {s.iteration: s for s in inventories[member].starts}
    if start not in starts:
      return
    one = starts[start]
    if one.applied_until:
      choices.append(range(one.applied_until, one.complete_at - 1, -1))
    else:
      choices.append([start])
  for chosen in sorted(itertools.product(*choices), key=sum, reverse=True):
    yield dict(zip(members, chosen, strict=True))


def _works(inventories, failed, until, start) -> bool:
  """Whether a set and a start lead to a run that goes on: by definition."""
  complete_at = {
    member: {s.iteration: s.complete_at for s in inventories[member].starts}
    for member in until
  }
  for reader, producer in itertools.permutations(inventories, 2):
    needed = []
    if reader.stage in until:
      first = until[reader.stage]
      if abs(reader.stage - producer.stage) > 1:
        first = max(first, complete_at[reader.stage][start])
      needed.append(1 + first)
    if (
      reader.stage not in failed
      and not {
        reader.stage,
        producer.stage,
      }
      <= until.keys()
    ):
      needed.append(max(_begun(reader), 1))
    if not all(_will_exist(producer, i, until) for i in range(min(needed), 12)):
      return False
  return True


def _brute_force(inventories, failed):
  """(number of members, -start, until by member) of the best plan, or None."""
  everyone = range(len(inventories))
  for size in range(len(inventories) + 1):
    for start in range(6, -1, -1):
      for members in itertools.combinations(everyone, size):
        if set(members) >= failed:
          for until in _untils(inventories, members, start):
            if _works(inventories, failed, until, start):
              return size, -start, until
  return None


@pytest.mark.parametrize('with_gradients', [False, True])
@hypothesis.settings(deadline=None, max_examples=1000)
@hypothesis.given(data=st.data())
def test_a_plan_is_the_best_that_works(data, with_gradients):
  inventories = data.draw(_inventories(with_gradients))
  failed = data.draw(_failures(inventories))
  best = _brute_force(inventories, failed)
  try:
    plan = recovery_plan.plan(inventories, failed)
  except recovery_plan.UnrecoverableError:
    hypothesis.event('unrecoverable')
    assert best is None
    return
  hypothesis.event(f'{len(plan.stages)} of {len(inventories)}')
  assert best is not None
  assert plan.applied_until == best[2]
  if plan.stages:
    assert plan.start == -best[1]


@hypothesis.settings(deadline=None, max_examples=300)
@hypothesis.given(st.data())
def test_the_line_always_qualifies(data):
  lag, window = 4, data.draw(st.integers(1, 4))
  newest = data.draw(st.integers(1, 12))
  inventories = []
  for stage in range(data.draw(st.integers(1, 4))):
    begun = newest - data.draw(st.integers(0, 1))
    landed = max(begun - data.draw(st.integers(1, 3)), 0)
    starts = _starts(*range(max(landed - window + 2, 1)), window=window)
    inventories.append(
      recovery_plan.StageInventory(stage=stage, starts=starts, newest=begun)
    )
  line = recovery_plan.recovery_line(
    [[s.iteration for s in i.starts] for i in inventories], 0, lag
  )
  # What is kept: the line's snapshots and later ones, and the entries of the
  # iterations after it, which are those that may be replayed.
  inventories = [
    recovery_plan.StageInventory(
      stage=i.stage,
      starts=tuple(s for s in i.starts if s.iteration >= line),
      log_first=line + 1,
      log_lost=data.draw(st.booleans()),
      newest=i.newest,
    )
    for i in inventories
  ]
  failed = data.draw(_failures(inventories))
  plan = recovery_plan.plan(inventories, failed)
  assert plan.start >= line or not plan.stages
  # Were all newer snapshots corrupt, it would be the line.
  excluded = {
    (i.stage, s.iteration)
    for i in inventories
    for s in i.starts
    if s.iteration > line
  }
  assert recovery_plan.plan(inventories, failed, excluded).start == (
    line if plan.stages else 0
  )
