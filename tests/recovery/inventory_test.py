"""What the leader knows of snapshots, and the line that follows from it."""

import pytest

from moetion_jax.policies.kinds import registry
from moetion_jax.recovery import inventory
from moetion_jax.snapshots import coverage
from tests.support import planning, shares


def _inventory(*iterations_by_stage, lag=0):
  found = inventory.Inventory(
    registry.POLICIES['sparse'],
    [shares.OPERATORS] * len(iterations_by_stage),
    lag,
  )
  for stage, iterations in enumerate(iterations_by_stage):
    for iteration in iterations:
      found.stored(stage, shares.rolling_share(iteration))
  return found


def _starts(found, stage=0):
  return [(s.iteration, s.complete_at) for s in found.starts(stage)]


def test_at_first_there_is_the_initial_state():
  found = _inventory([])
  assert _starts(found) == [(0, 0)]
  assert found.newest(0) == found.line == 0
  assert not found.advance(0, frozen=False)


@pytest.mark.parametrize(
  ('iterations', 'starts'),
  [
    ([1, 2], [(0, 0)]),
    ([1, 2, 3], [(0, 0), (1, 3)]),
    ([1, 2, 3, 4, 5], [(0, 0), (1, 3), (2, 4), (3, 5)]),
    ([1, 2, 3, 5, 6, 7], [(0, 0), (1, 3), (5, 7)]),
  ],
)
def test_starts(iterations, starts):
  assert _starts(_inventory(iterations)) == starts
  assert _starts(_inventory(reversed(iterations))) == starts


@pytest.mark.parametrize(
  ('stages', 'lag', 'reported', 'line'),
  [
    ([range(1, 11)], 0, 99, 8),
    ([range(1, 11)], 3, 99, 5),
    ([range(1, 11)], 8, 99, 0),
    # Nothing of what is not written down yet.
    ([range(1, 11)], 0, 7, 7),
    ([range(1, 11)], 3, 7, 4),
    # All stages together.
    ([range(1, 11), range(1, 9)], 0, 99, 6),
    ([range(1, 11), []], 0, 99, 0),
    ([range(1, 11), [1, 2, 3, 4, 6, 7, 8]], 0, 99, 6),
  ],
)
def test_the_line(stages, lag, reported, line):
  found = _inventory(*stages, lag=lag)
  assert not found.advance(reported, frozen=True) and found.line == 0
  assert found.advance(reported, frozen=False) == (line > 0)
  assert found.line == line
  assert not found.advance(reported, frozen=False)


def test_the_line_never_goes_back():
  found = _inventory(range(1, 11))
  found.advance(99, frozen=False)
  found.lag_iterations = 6
  found.stored(0, shares.rolling_share(11))
  assert not found.advance(99, frozen=False)
  found.lose(0, 10)
  assert not found.advance(99, frozen=False)
  assert found.line == 8


def test_gaps_of_several_stages_hold_the_line_back():
  """Each has a start that the other one has not: an older one is given up."""
  gapped = [[1, 2, 3, 4, 6, 7, 8, 9], [1, 2, 3, 4, 5, 6, 8, 9, 10]]
  found = _inventory(*gapped, lag=3)
  assert not found.advance(10, frozen=False)
  found.stored(0, shares.rolling_share(10))
  assert found.advance(10, frozen=False) and found.line == 2
  assert found.advance(10, frozen=False, keeps_older=False)
  assert found.line == 8
  found.lose(1, 9)
  assert found.excluded(1) == (9,) and found.excluded(0) == ()
  found.stored(1, shares.rolling_share(9))
  assert found.excluded(1) == ()


def test_what_is_before_the_line_is_forgotten():
  found = _inventory(range(1, 11), range(1, 11))
  found.advance(6, frozen=False)
  for stage in (0, 1):
    assert _starts(found, stage) == [(0, 0), (6, 8), (7, 9), (8, 10)]


def test_a_lost_snapshot_counts_no_longer():
  found = _inventory(range(1, 9))
  found.lose(0, 5)
  assert _starts(found) == [(0, 0), (1, 3), (2, 4), (6, 8)]
  # Also when its manifest is read again,
  found.rescan(0, map(shares.rolling_share, range(1, 9)))
  assert _starts(found) == [(0, 0), (1, 3), (2, 4), (6, 8)]
  # until it is stored again.
  found.stored(0, shares.rolling_share(5))
  assert _starts(found)[-4:] == [(3, 5), (4, 6), (5, 7), (6, 8)]


def test_a_lost_snapshot_is_one_stages():
  found = _inventory(range(1, 5), range(1, 5))
  found.lose(1, 4)
  assert _starts(found, 0)[-1] == (2, 4)
  assert _starts(found, 1)[-1] == (1, 3)


def test_a_rescan_finds_what_nobody_told_of_and_misses_what_is_gone():
  found = _inventory([1, 2, 3], [1, 2, 3])
  found.rescan(0, map(shares.rolling_share, [2, 3, 4]))
  assert _starts(found, 0) == [(0, 0), (2, 4)]
  assert _starts(found, 1) == [(0, 0), (1, 3)]
  assert found.newest(0) == 4
  found.rescan(0, [])
  assert _starts(found, 0) == [(0, 0)] and found.newest(0) == 0


def test_shares_of_replicas_make_a_snapshot_together():
  found = _inventory([])
  for iteration in (1, 2):
    for replica, state in ((0, [0]), (1, [1, 2])):
      assert _starts(found) == (
        [(0, 0)] if iteration == 1 else [(0, 0), (1, 1)]
      )
      found.stored(
        0, shares.rolling_share(iteration, state, replica=replica, replicas=2)
      )
  assert _starts(found) == [(0, 0), (1, 1), (2, 2)]


def test_a_new_beginning():
  found = _inventory(range(1, 11), range(1, 11))
  found.advance(99, frozen=False)
  found.lose(0, 9)
  found.lose_entry(0, 9)
  found.go_back(0)
  assert found.line == 0
  for one in found.stage_inventories([1, 1]):
    assert [s.iteration for s in one.starts] == [0]
    assert one.log_first == 1 and not one.corrupt
  for iteration in range(1, 12):
    found.stored(0, shares.rolling_share(iteration))
    found.stored(1, shares.rolling_share(iteration))
  assert found.advance(99, frozen=False) and found.line == 9


def test_inventories_for_a_plan():
  found = _inventory(range(1, 11), range(1, 9))
  found.advance(4, frozen=False)
  found.lose_entry(1, 7)
  first, second = found.stage_inventories([11, 9], lost=[0])
  assert (first.stage, second.stage) == (0, 1)
  assert (first.newest, second.newest) == (11, 9)
  assert (first.log_first, second.log_first) == (5, 5)
  assert (first.log_lost, second.log_lost) == (True, False)
  assert (first.corrupt, second.corrupt) == (frozenset(), {7})
  assert first.starts == found.starts(0)
  found.published_again(1)
  assert not found.stage_inventories([11, 9])[1].corrupt


# ---- snapshots that hold some experts only -----------------------------------


def _partial_inventory():
  return inventory.Inventory(
    registry.POLICIES['partial'], [planning.sizes().state_bytes], 4
  )


def _stored_partly(found, iteration, experts):
  state = frozenset({planning.other(), *(planning.expert(i) for i in experts)})
  found.stored(
    0,
    coverage.Share(iteration=iteration, state=state, compute=frozenset()),
  )


def test_partial_snapshots_are_kept_that_the_line_needs():
  found = _partial_inventory()

  def starts():
    return [s.iteration for s in found.starts(0)]

  assert starts() == [0]
  for number, iteration in enumerate(range(4, 24, 4)):
    _stored_partly(found, iteration, [number % planning.EXPERTS])
  assert starts() == [0, 4, 8, 12, 16, 20]
  assert found.versions(12) == {
    planning.expert(0): 4,
    planning.expert(1): 8,
    planning.expert(2): 12,
    planning.expert(3): 0,
  }
  # Nothing may go while an expert is the initial one.
  assert found.advance(9, frozen=False) and found.kept_from == 0
  assert starts() == [0, 4, 8, 12, 16, 20]
  assert not found.advance(9, frozen=False)
  # At 16 expert 0 is of iteration 4: that is kept, though no start any more.
  assert found.advance(20, frozen=False) and found.kept_from == 4
  assert starts() == [0, 16, 20]
  assert found.versions(16)[planning.expert(0)] == 4
  _stored_partly(found, 24, [1])
  assert found.advance(24, frozen=False) and found.kept_from == 8
  assert not found.advance(24, frozen=True)
  _stored_partly(found, 28, [2])
  found.lose(0, 28)
  assert starts() == [0, 20, 24]


def test_what_is_kept_never_grows():
  found = _partial_inventory()
  for number, iteration in enumerate(range(4, 28, 4)):
    _stored_partly(found, iteration, [number % planning.EXPERTS])
  assert found.advance(20, frozen=False) and found.kept_from == 4
  # The only version of expert 1 is damaged, and no older one is there.
  found.lose(0, 8)
  assert found.advance(24, frozen=False) and found.line == 20
  assert found.versions(20)[planning.expert(1)] == 0
  assert found.kept_from == 4


def test_a_run_that_begins_with_partial_snapshots():
  found = _partial_inventory()
  for number, iteration in enumerate(range(4, 28, 4)):
    _stored_partly(found, iteration, [number % planning.EXPERTS])
  found.begin_at(20)
  assert (found.line, found.kept_from) == (20, 8)
  assert [s.iteration for s in found.starts(0)] == [0, 20, 24]
