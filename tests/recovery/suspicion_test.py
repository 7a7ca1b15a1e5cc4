"""What damaged entries make doubtful."""

import pytest

from moetion_jax.hostmem import segment_check
from moetion_jax.recovery import suspicion


def _damage(iteration, stage=0):
  what = f'entry of {stage} in {iteration}'
  return segment_check.Damage(iteration, stage, 0, what)


def _check(*iterations, stage=0, entries=10):
  return segment_check.SegmentCheck(
    entries, tuple(_damage(i, stage) for i in iterations)
  )


@pytest.mark.parametrize(
  ('checks', 'dropped', 'line', 'trusted', 'count'),
  [
    pytest.param([], [], 0, None, 0, id='no log'),
    pytest.param([_check(), _check(stage=1)], [], 0, None, 0, id='all whole'),
    pytest.param([_check(7)], [], 0, 6, 1, id='one'),
    pytest.param([_check(1)], [], 0, 0, 1, id='only the initial state is left'),
    pytest.param([_check(9, 8), _check(7, stage=1)], [], 0, 6, 3, id='first'),
    pytest.param([_check(9)], [_damage(5)], 4, 4, 2, id='written again'),
    pytest.param([_check()], [_damage(5)], 4, 4, 1, id='only written again'),
    pytest.param([_check()], [_damage(5)], 5, None, 0, id='before the line'),
    pytest.param([_check(5)], [_damage(5)], 4, 4, 1, id='the same twice'),
  ],
)
def test_find(checks, dropped, line, trusted, count):
  found = suspicion.find(checks, dropped, line)
  assert found.trusted == trusted
  assert len(found.damaged) == count
  assert list(found.damaged) == sorted(found.damaged)


@pytest.mark.parametrize(
  ('damaged', 'reported', 'trusted'),
  [
    pytest.param(9, 9, 8, id='just read'),
    pytest.param(9, 14, 8, id='a writer may not have looked back yet'),
    pytest.param(9, 15, None, id='damaged after everybody had read it'),
    pytest.param(1, 6, 0, id='at the beginning nothing is settled'),
  ],
)
def test_damage_that_nobody_read(damaged, reported, trusted):
  settled = suspicion.settled(reported)
  found = suspicion.find([_check(damaged)], settled_until=settled)
  assert found.trusted == trusted
  # What was read before it was written again counts all the same.
  again = suspicion.find([], [_damage(damaged)], 0, settled)
  assert again.trusted == damaged - 1


def test_words():
  whole = suspicion.find([_check(), _check(stage=1, entries=7)])
  assert str(whole) == 'all 17 entries of the logs were checked and are whole'
  found = str(suspicion.find([_check(9, 4, 6, 5, 8)]))
  assert found.startswith('5 of the 10 entries of the logs are damaged: ')
  assert 'in 4; entry of 0 in 5; entry of 0 in 6; and 2 more' in found
