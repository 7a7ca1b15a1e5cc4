"""Turns and tables of `launch.benchmark recovery`; the runs are not made."""

import pytest

from launch.benchmark import recovery


@pytest.mark.parametrize(
  ('kills', 'replicas', 'lengths'),
  [(1, 1, [1]), (2, 1, [2]), (5, 1, [2, 2, 1]), (9, 2, [4, 4, 1])],
)
def test_each_worker_dies_once_in_a_turn(kills, replicas, lengths):
  turns = list(recovery._turns(kills, replicas))
  assert [len(victims) for victims, _ in turns] == lengths
  assert turns == list(recovery._turns(kills, replicas))
  for victims, moments in turns:
    assert len(set(victims)) == len(victims) == len(moments)
    assert all(s < 2 and r < replicas for s, r in victims)
    assert all(0 <= x < 1 for x in moments)
  moments = [x for _, of_turn in turns for x in of_turn]
  assert len(set(moments)) == kills


def test_ways_of_replay_are_compared_kill_by_kill():
  samples = {
    'microbatches': {'total': [1.0, 2.0, 4.0], 'applied updates': [0, 0, 0]},
    'updates': {'total': [0.5, 0.8, 1.6], 'applied updates': [3, 4, 3]},
  }
  found = {
    name: (value.median, goal)
    for name, value, goal in recovery.table('standby', samples, 1)
  }
  assert found == {
    'standby, microbatches, total, s': (2.0, '<= 1.0'),
    'standby, microbatches, applied updates': (0, ''),
    'standby, updates, total, s': (0.8, '<= 1.0'),
    'standby, updates, applied updates': (3, ''),
    'standby, total, updates / microbatches': (0.4, '<= 0.45'),
  }


def test_one_way_of_replay_alone_is_compared_with_nothing():
  samples = {'updates': {'total': [0.5]}}
  ((name, _, goal),) = recovery.table('no standby', samples, 2)
  assert (name, goal) == ('no standby, updates, total, s', '<= 2.5')
