"""What may be folded together when a run went on with other software."""

import pytest

from moetion_jax import codec
from moetion_jax.policies.kinds import registry
from moetion_jax.recovery import inventory, splice
from tests.support import recoveries, shares


def _splice(exact_until, *complete_at):
  return splice.Splice(exact_until=exact_until, complete_at=complete_at)


def test_json():
  one, value = _splice(4, 6, 7), {'exact_until': 4, 'complete_at': [6, 7]}
  assert codec.encode(one) == value
  assert codec.decode_part(splice.Splice, {'names': ['jax']} | value) == one


@pytest.mark.parametrize(
  ('splices', 'in_force'),
  [
    ([], []),
    ([(4, 6)], [(4, 6)]),
    ([(4, 6), (9, 11)], [(4, 6), (9, 11)]),
    ([(4, 6), (4, 6)], [(4, 6)]),  # accepted again before it had come far
    ([(4, 6), (9, 11), (3, 5)], [(3, 5)]),  # nothing newer was left
    ([(4, 6), (9, 11), (9, 11)], [(4, 6), (9, 11)]),
    ([(4, 6), (0, 0)], [(0, 0)]),
  ],
)
def test_splices_in_force(splices, in_force):
  found = splice.in_force([_splice(*one) for one in splices])
  assert list(found) == [_splice(*one) for one in in_force]


@pytest.mark.parametrize(
  ('splices', 'at_first', 'running'),
  [
    ([], {0, 3, 4, 5, 6, 7, 8}, {0, 3, 4, 5, 6, 7, 8}),
    ([(4, 6)], {0, 3, 4, 7, 8}, {4, 7, 8}),
    ([(4, 4)], {0, 3, 4, 5, 6, 7, 8}, {4, 5, 6, 7, 8}),  # whole snapshots
    ([(0, 0)], {0, 3, 4, 5, 6, 7, 8}, {0, 3, 4, 5, 6, 7, 8}),
    ([(3, 5), (6, 7)], {0, 3, 6, 8}, {6, 8}),
  ],
)
def test_starts_that_are_allowed(splices, at_first, running):
  made = [_splice(*one) for one in splices]
  for is_running, allowed in ((False, at_first), (True, running)):
    assert allowed == {
      start
      for start in (0, 3, 4, 5, 6, 7, 8)
      if splice.allows(made, 0, start, is_running=is_running)
    }


def test_each_stage_has_its_own_end():
  one = _splice(4, 5, 7)
  assert [one.bars(stage, 6) for stage in (0, 1)] == [False, True]
  assert [splice.unverified_until([one], stage) for stage in (0, 1)] == [5, 7]
  assert splice.unverified_until([], 0) == 0


def test_no_conversion_folds_both_trajectories():
  """Windows of three: whatever has landed, no start reaches over a splice."""
  old, one = range(1, 7), _splice(4, 6)
  for newest in range(6, 14):
    found = inventory.Inventory(
      registry.POLICIES['sparse'], [shares.OPERATORS], 3
    )
    for iteration in (*old, *range(7, newest + 1)):
      found.stored(0, shares.rolling_share(iteration))
    found.splices, found.is_running = (one,), True
    starts = [(s.iteration, s.complete_at) for s in found.starts(0)]
    new = [(i, i + 2) for i in range(7, newest - 1)]
    assert starts == [(4, 6), *new]


def test_a_final_checkpoint_from_within_a_splice_is_whole():
  """The run ended while nothing of the new software was a start yet."""
  found = inventory.Inventory(
    registry.POLICIES['sparse'], [shares.OPERATORS], 3, initial=6
  )
  found.splices, found.is_running = (_splice(4, 6),), True
  assert [(s.iteration, s.complete_at) for s in found.starts(0)] == [(6, 6)]
  for iteration in range(3, 10):  # those up to it do not count any more
    found.stored(0, shares.rolling_share(iteration))
  starts = [(s.iteration, s.complete_at) for s in found.starts(0)]
  assert starts == [(6, 6), (7, 9)]
  found.splices += (_splice(7, 9),)  # from then on nobody goes back to before
  assert [s.iteration for s in found.starts(0)] == [7]


def test_the_first_line_behind_a_splice_does_not_lag():
  found = inventory.Inventory(
    registry.POLICIES['sparse'], [shares.OPERATORS], 3
  )
  found.splices, found.is_running = (_splice(4, 6),), True
  found.begin_at(4)
  lines = []
  for iteration in range(4, 15):
    found.stored(0, shares.rolling_share(iteration))
    found.advance(iteration, frozen=False)
    lines.append(found.line)
  # At once with the first window of its own, which begins with 7.
  assert lines == [4, 4, 4, 4, 4, 7, 7, 7, 7, 8, 9]


def test_a_run_that_goes_on_behind_a_splice():
  run = recoveries.Run()
  for stage in range(2):
    run.shares[stage] = {
      (i, 0): recoveries.share(stage, i) for i in (4, 5, 6, 7, 8)
    }
  run.splices = (_splice(4, 6, 6),)
  assert run.begin(last_recorded=6, newest=9)[0].start == 4
  go = run.dies(0)[0]
  assert (go.start, go.complete_at, go.unverified_until) == (4, 6, 6)


def test_behind_a_splice_nothing_older_is_taken():
  run = recoveries.Run(stages=1)
  run.shares[0] = {(i, 0): recoveries.share(0, i) for i in range(1, 7)}
  run.splices = (_splice(4, 6),)
  assert run.begin(last_recorded=9, newest=9)[0].start == 4
  run.dies(0, error='snapshot 4 is lost', suspects=(4,))
  said = str(run.error())
  assert 'no common start is left' in said and said.endswith('with --fresh')
  # Which leaves nothing of it.
  go = recoveries.Run(stages=1).begin()[0]
  assert go.is_fresh and go.start == 0


@pytest.mark.parametrize(
  ('iteration', 'expected'),
  [(9, [9, 9]), (10, [13, 12]), (12, [13, 12]), (13, [13, 13]), (20, [20, 20])],
)
def test_damaged_entries_leave_what_the_old_software_captured(
  iteration, expected
):
  """Only entries of the new software are in the logs."""
  one = splice.Splice(exact_until=10, complete_at=(13, 12))
  found = splice.trusted([one], iteration, 2)
  assert found == dict(enumerate(expected))
  assert splice.trusted([], iteration, 2) == {0: iteration, 1: iteration}
