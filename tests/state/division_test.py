"""Who of a stage's replicas captures what."""

import hypothesis
import hypothesis.strategies as st
import pytest

from moetion_jax import keys
from moetion_jax.state import division


def _stage(layers, experts, expert=100, rest=70):
  sizes = {}
  for layer in range(layers):
    sizes[keys.OperatorId(f'layers/{layer}')] = rest
    for number in range(experts):
      sizes[keys.OperatorId(f'layers/{layer}/experts', number)] = expert
  return sizes


def _bytes(sizes, share):
  return sum(sizes[o] for o in share)


def test_experts_of_a_layer_go_round():
  sizes = _stage(1, 4)
  first, second = division.divide(sizes, 2)
  assert {o.expert for o in first} == {-1, 1, 3}
  assert {o.expert for o in second} == {0, 2}


def test_one_replica_takes_everything():
  sizes = _stage(2, 3)
  assert division.divide(sizes, 1) == (frozenset(sizes),)


@pytest.mark.parametrize('replicas', [2, 3, 4])
def test_bytes_fall_as_one_over_the_replicas(replicas):
  sizes = _stage(6, 16)
  shares = division.divide(sizes, replicas)
  whole = sum(sizes.values())
  for share in shares:
    assert _bytes(sizes, share) == pytest.approx(whole / replicas, rel=0.05)


@hypothesis.given(
  st.dictionaries(
    st.tuples(st.integers(0, 5), st.integers(-1, 5)), st.integers(1, 1000)
  ),
  st.integers(1, 5),
)
def test_every_operator_has_one_owner(found, replicas):
  sizes = {keys.OperatorId(f'g{g}', e): n for (g, e), n in found.items()}
  shares = division.divide(sizes, replicas)
  assert len(shares) == replicas
  assert sorted(o for share in shares for o in share) == sorted(sizes)
  for kind in (False, True):
    of_kind = [
      _bytes(sizes, [o for o in share if (o.expert >= 0) is kind])
      for share in shares
    ]
    most = max(
      (n for o, n in sizes.items() if (o.expert >= 0) is kind), default=0
    )
    assert max(of_kind) - min(of_kind) <= most


@pytest.mark.parametrize(
  ('experts', 'devices', 'replicas'),
  [(4, 2, 2), (6, 2, 2), (12, 4, 2), (9, 3, 3)],
)
def test_every_device_has_as_many_experts(experts, devices, replicas):
  """Those with the same place on each of them go together."""
  local = experts // devices
  sizes = _stage(2, experts)
  shares = division.divide(
    sizes, replicas, lambda o: None if o.expert < 0 else o.expert // local
  )
  assert sorted(o for share in shares for o in share) == sorted(sizes)
  for share in shares:
    for layer in range(2):
      held = [o.expert for o in share if o.group == f'layers/{layer}/experts']
      places = [
        {e % local for e in held if e // local == d} for d in range(devices)
      ]
      assert places == [places[0]] * devices
      assert len(held) == devices * len(places[0])


def test_the_order_in_which_sizes_are_given_does_not_matter():
  sizes = _stage(3, 5)
  reverse = dict(reversed(list(sizes.items())))
  assert division.divide(sizes, 3) == division.divide(reverse, 3)


@pytest.mark.parametrize(
  ('replicas', 'team', 'expected'),
  [
    (1, [0], {0: ()}),
    (2, [0, 1], {0: (), 1: ()}),
    (2, [0], {0: (1,)}),
    (2, [1], {1: (0,)}),
    (3, [2, 0], {0: (1,), 2: ()}),
    (5, [1, 3], {1: (0, 4), 3: (2,)}),
  ],
)
def test_who_stands_for_whom(replicas, team, expected):
  assert division.stand_ins(replicas, team) == expected


@pytest.mark.parametrize('team', [[], [2], [-1, 0]])
def test_nobody_stands_for_all(team):
  with pytest.raises(ValueError, match='of 2 replicas'):
    division.stand_ins(2, team)
