"""Which experts are saved, and what a restore loses, by hand."""

import pytest

from moetion_jax import errors, keys
from moetion_jax.policies import partial


def _expert(index, layer=0):
  return keys.OperatorId(f'layers/{layer}/experts', index)


E = [_expert(i) for i in range(8)]


def _indices(selected):
  return sorted(o.expert for o in selected)


def test_experts_in_turn():
  turns = [
    _indices(partial.select_experts('sequential', E, 3, number=n))
    for n in range(4)
  ]
  assert turns == [[0, 1, 2], [3, 4, 5], [0, 6, 7], [1, 2, 3]]


def test_experts_by_load_and_by_popularity():
  unsaved = {E[2]: 9.0, E[5]: 7.0, E[0]: 7.0}
  popular = {E[7]: 3.0, E[2]: 1.0}
  case: dict = {'unsaved_tokens': unsaved, 'popularity': popular}
  select = partial.select_experts
  assert _indices(select('load_aware', E, 2, **case)) == [0, 2]
  assert _indices(select('load_aware', E, 4, **case)) == [0, 1, 2, 5]
  assert _indices(select('popularity', E, 2, **case)) == [2, 7]
  assert _indices(select('popularity', E, 2)) == [0, 1]
  # 6 was not saved for longest; 1 and 4 are due as well, 3 is not yet.
  case |= {'ages': {E[1]: 4, E[3]: 3, E[4]: 4, E[6]: 5}, 'max_age': 4}
  assert _indices(select('load_aware', E, 2, **case)) == [1, 6]
  assert _indices(select('popularity', E, 4, **case)) == [1, 4, 6, 7]
  for kind in partial.SELECTIONS:
    assert select(kind, E, 9) == frozenset(E)
  with pytest.raises(errors.ConfigError, match='partial_select'):
    select('random', E, 1)
  with pytest.raises(ValueError, match='count=0'):
    select('sequential', E, 0)


def test_bytes_of_a_partial_checkpoint():
  state_bytes = {
    keys.OperatorId('layers/0'): 100,
    keys.OperatorId('head'): 50,
    **{_expert(i, 0): 10 + i for i in range(4)},
    **{_expert(i, 1): 20 for i in range(4)},
  }
  # 150 and the largest of layer 0 (13), one of layer 1 (20).
  assert partial.partial_bytes(state_bytes, 1) == 183
  assert partial.partial_bytes(state_bytes, 2) == 150 + 13 + 12 + 40
  # A mean of 11.5 is 12.
  assert partial.partial_bytes(state_bytes, 1, 'mean') == 150 + 12 + 20
  assert partial.partial_bytes(state_bytes, 9) == sum(state_bytes.values())


def test_what_a_restore_puts_together_and_loses():
  saved = [(2, E[:2]), (4, E[2:4]), (6, E[:1]), (8, E[1:2])]
  versions = partial.restored_versions(saved, E[:5], 6)
  assert versions == {E[0]: 6, E[1]: 2, E[2]: 4, E[3]: 4, E[4]: 0}
  # Expert i has i + 1 tokens an iteration, of 8 that were done.
  loads = {i: {e: e.expert + 1.0 for e in E[:5]} for i in range(1, 9)}
  lost = partial.lost_tokens(loads, versions, 6)
  assert lost == {E[0]: 0.0, E[1]: 8.0, E[2]: 6.0, E[3]: 8.0, E[4]: 30.0}
  total = sum(lost.values())
  assert partial.proportion_of_lost_tokens(total, 120.0) == 52 / 120
  assert partial.proportion_of_lost_tokens(0.0, 0.0) == 0.0


@pytest.mark.parametrize(
  ('count', 'plt', 'raised'),
  [(1, 0.01, 1), (1, 0.02, 1), (1, 0.03, 2), (3, 0.03, 6), (6, 0.03, 8)],
)
def test_more_experts_when_the_budget_is_spent(count, plt, raised):
  assert partial.raised_experts(count, 8, plt, 0.02) == raised


def test_capacities_after_a_fault():
  lost = {E[0]: 0.0, E[1]: 50.0, E[2]: 500.0, E[3]: 5.0}
  rates = {E[0]: 10.0, E[1]: 10.0, E[2]: 10.0}
  assert partial.capacity_factors(lost, rates, 10) == {
    E[0]: 1.0,
    E[1]: 1.5,
    E[2]: 2.0,
    E[3]: 2.0,
  }
