"""What the leader knows of snapshots, and the line that follows from it."""

import pytest

from moetion_jax import keys
from moetion_jax.recovery import inventory
from moetion_jax.snapshots import coverage, file as snapshot_file, folders
from tests.support import captures

pytestmark = pytest.mark.fast

_OPERATORS = tuple(keys.OperatorId('a', i) for i in range(3))


def _share(iteration, state=None, *, replica=0, replicas=1):
  """A rolling one: by default operator iteration % 3 is in the slot."""
  slot = frozenset(
    _OPERATORS[i] for i in ([iteration % 3] if state is None else state)
  )
  return coverage.Share(
    iteration=iteration,
    replica=replica,
    replicas=replicas,
    state=slot,
    compute=frozenset(_OPERATORS) - slot,
  )


def _inventory(*iterations_by_stage, lag=0):
  found = inventory.Inventory([_OPERATORS] * len(iterations_by_stage), lag)
  for stage, iterations in enumerate(iterations_by_stage):
    for iteration in iterations:
      found.stored(stage, _share(iteration))
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
  found.stored(0, _share(11))
  assert not found.advance(99, frozen=False)
  found.lose(0, 10)
  assert not found.advance(99, frozen=False)
  assert found.line == 8


def test_gaps_of_several_stages_hold_the_line_back():
  """Each has a start that the other one has not: an older one is given up."""
  gapped = [[1, 2, 3, 4, 6, 7, 8, 9], [1, 2, 3, 4, 5, 6, 8, 9, 10]]
  found = _inventory(*gapped, lag=3)
  assert not found.advance(10, frozen=False)
  found.stored(0, _share(10))
  assert found.advance(10, frozen=False) and found.line == 2
  assert found.advance(10, frozen=False, keeps_older=False)
  assert found.line == 8
  found.lose(1, 9)
  assert found.excluded(1) == (9,) and found.excluded(0) == ()
  found.stored(1, _share(9))
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
  found.rescan(0, map(_share, range(1, 9)))
  assert _starts(found) == [(0, 0), (1, 3), (2, 4), (6, 8)]
  # until it is stored again.
  found.stored(0, _share(5))
  assert _starts(found)[-4:] == [(3, 5), (4, 6), (5, 7), (6, 8)]


def test_a_lost_snapshot_is_one_stages():
  found = _inventory(range(1, 5), range(1, 5))
  found.lose(1, 4)
  assert _starts(found, 0)[-1] == (2, 4)
  assert _starts(found, 1)[-1] == (1, 3)


def test_a_rescan_finds_what_nobody_told_of_and_misses_what_is_gone():
  found = _inventory([1, 2, 3], [1, 2, 3])
  found.rescan(0, map(_share, [2, 3, 4]))
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
      found.stored(0, _share(iteration, state, replica=replica, replicas=2))
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
    found.stored(0, _share(iteration))
    found.stored(1, _share(iteration))
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


# ---- what is read ------------------------------------------------------------


def _write(folder, iteration, **metadata):
  path = folders.snapshots_folder(folder, 1, 0) / str(iteration)
  path.mkdir(parents=True)
  share = _share(iteration)
  snapshot_file.write(
    path,
    [],
    {
      'iteration': iteration,
      'replica': 0,
      'replicas': 1,
      'state': keys.operators_to_json(share.state),
      'compute': keys.operators_to_json(share.compute),
      **metadata,
    },
  )
  return path


def test_shares_are_read_from_manifests(shm_folder):
  assert folders.read_shares(shm_folder, 1) == []
  for iteration in (12, 9, 10, 11):
    _write(shm_folder, iteration, stage=1, clip_factor='0x1p0')
  (shm_folder / 'stage-1.replica-0.snapshots' / '9' / 'manifest.json').unlink()
  torn = shm_folder / 'stage-1.replica-0.snapshots' / '11' / 'manifest.json'
  torn.write_bytes(torn.read_bytes()[:-5])
  wanted = [_share(10), _share(12)]
  wrong = []
  assert folders.read_shares(shm_folder, 1, wrong.append) == wanted
  assert len(wrong) == 1 and wrong[0].startswith(f'{torn}: torn')
  wrong.clear()
  assert folders.read_shares(shm_folder, 0, wrong.append) == []
  assert wrong == []


def test_shares_in_json():
  share = coverage.Share(
    iteration=3,
    replica=1,
    replicas=2,
    state=captures.pick('a/experts:1', 'head'),
    compute=captures.pick('router'),
  )
  value = {
    'iteration': 3,
    'replica': 1,
    'replicas': 2,
    'state': [['a/experts', 1], ['head', -1]],
    'compute': [['router', -1]],
  }
  assert set(folders.SHARE_FIELDS) == value.keys()
  assert folders.share_from_json(value) == share
