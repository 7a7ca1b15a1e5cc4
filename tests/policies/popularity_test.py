"""Rates of experts, and when they are another order: tables."""

import pytest

from moetion_jax.policies import popularity as popularity_lib
from tests.support import words


@pytest.mark.parametrize(
  ('popularity', 'stream', 'rates'),
  [
    pytest.param({'kind': 'static'}, ['a0:1'], '', id='static'),
    pytest.param({'kind': 'count'}, [], '', id='nothing yet'),
    pytest.param(
      {'kind': 'count'}, ['a0:1 a1:6', 'a0:3'], 'a0:2 a1:3', id='mean'
    ),
    pytest.param(
      {'kind': 'count', 'window_iterations': 2},
      ['a0:99 a1:8', 'a0:1', 'a0:3 b0:1'],
      'a0:2 b0:.5',
      id='the last window only',
    ),
    pytest.param(
      {'kind': 'soft_count'}, ['a0:.25', 'a0:.5'], 'a0:.375', id='probabilities'
    ),
    pytest.param(
      {'kind': 'time_decayed', 'decay': 0.5},
      ['a0:8 a1:7', 'a0:4', 'a0:2'],
      # (8/4 + 4/2 + 2) / (1/4 + 1/2 + 1), and 7/4 over the same.
      f'a0:{6 / 1.75} a1:1',
      id='decayed, without a bias at the start',
    ),
    pytest.param(
      {'kind': 'time_decayed', 'decay': 0.5, 'window_iterations': 1},
      ['a0:8', 'a0:4'],
      'a0:4',
      id='decayed within its window',
    ),
    pytest.param(
      {'kind': 'capacity_aware', 'capacity': 8},
      ['a0:80 a1:2', 'a0:4 a1:8'],
      'a0:.75 a1:.625',
      id='beyond the capacity nothing counts',
    ),
  ],
)
def test_rates_by_hand(popularity, stream, rates):
  seen = popularity_lib.Popularity(**popularity)
  for counts in stream:
    seen = popularity_lib.observe(seen, words.rates(counts))
  assert popularity_lib.rates(seen) == words.rates(rates)


def test_observing_changes_nothing_that_exists():
  before = popularity_lib.Popularity(kind='count')
  counts = words.rates('a0:1')
  after = popularity_lib.observe(before, counts)
  counts[words.operator('a0')] = 5.0
  assert (before.history, popularity_lib.rates(after)) == (
    (),
    words.rates('a0:1'),
  )


@pytest.mark.parametrize('count', [-1.0, float('nan'), float('inf')])
def test_counts_that_are_none_are_refused(count):
  popularity = popularity_lib.Popularity(kind='count')
  with pytest.raises(ValueError, match=f'a/0 has a count of {count}'):
    popularity_lib.observe(popularity, {words.operator('a0'): count})


@pytest.mark.parametrize(
  'settings',
  [
    {'kind': 'count', 'window_iterations': 0},
    {'kind': 'time_decayed', 'decay': 0},
    {'kind': 'time_decayed', 'decay': 1.5},
    {'kind': 'capacity_aware'},
    {'kind': 'capacity_aware', 'capacity': 0},
  ],
)
def test_impossible_popularity_is_refused(settings):
  with pytest.raises(ValueError, match='self'):
    popularity_lib.Popularity(**settings)


@pytest.mark.parametrize(
  ('old', 'new', 'reorder'),
  [
    pytest.param('', '', False, id='no experts'),
    pytest.param('', 'a0:0', False, id='nothing happened'),
    pytest.param('', 'a0:1', True, id='first counts'),
    pytest.param('a0:100', 'a0:110', False, id='10 % is not more than 10 %'),
    pytest.param('a0:100', 'a0:111', True, id='up'),
    pytest.param('a0:100', 'a0:89', True, id='down'),
    pytest.param('a0:0', 'a0:1e-9', True, id='from zero any change counts'),
    pytest.param('a0:0', 'a0:0', False, id='zero stays zero'),
    pytest.param('a0:3', '', True, id='gone'),
    pytest.param(
      'a0:1 a1:1 a2:1 a3:1', 'a0:2 a1:1 a2:1 a3:1', True, id='a quarter'
    ),
    pytest.param(
      'a0:1 a1:1 a2:1 a3:1 a4:1',
      'a0:2 a1:1 a2:1 a3:1 a4:1',
      False,
      id='less than a quarter',
    ),
  ],
)
def test_reorder_by_hand(old, new, reorder):
  assert (
    popularity_lib.should_reorder(words.rates(old), words.rates(new)) is reorder
  )


def test_reorder_thresholds_can_be_set():
  old, new = words.rates('a0:10 a1:10'), words.rates('a0:13 a1:10')
  assert popularity_lib.should_reorder(old, new, change=0.2, share=0.5)
  assert not popularity_lib.should_reorder(old, new, change=0.3)
  assert not popularity_lib.should_reorder(old, new, share=0.6)
  for wrong in ({'change': -0.1}, {'share': 0}, {'share': 1.5}):
    with pytest.raises(ValueError, match='change='):
      popularity_lib.should_reorder(old, new, **wrong)
