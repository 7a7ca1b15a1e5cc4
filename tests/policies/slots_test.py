"""Orders, slots and their bytes: tables, and all small cuts."""

import collections
import itertools

import hypothesis
import hypothesis.strategies as st
import pytest

from moetion_jax import errors, keys
from moetion_jax.policies import (
  decision as decision_lib,
  popularity as popularity_lib,
  slots,
)
from moetion_jax.state import division
from tests.support import words


def _in_words(made: decision_lib.Slots) -> list[str]:
  return [
    ' '.join(o.group + str(max(o.expert, 0)) * (o.expert >= 0) for o in slot)
    for slot in map(sorted, made)
  ]


def _by_index(experts: int):
  """Experts in equal runs on devices; anything else on all of them."""
  return lambda o: o.expert // experts if o.expert >= 0 else None


# --- Orders ------------------------------------------------------------------


@pytest.mark.parametrize(
  ('kind', 'popularity', 'ordered'),
  [
    pytest.param('static', '', 'a0 b0 a1 b1 a2 e h', id='layers in turn'),
    pytest.param('static', 'a0:9', 'a0 b0 a1 b1 a2 e h', id='static is static'),
    pytest.param('count', '', 'a0 a1 a2 b0 b1 e h', id='nothing known'),
    pytest.param(
      'count',
      'a0:5 a1:0.5 a2:7 b0:5 b1:6',
      'a1 a0 b0 b1 a2 e h',
      id='least popular first, equals by id',
    ),
    pytest.param(
      'time_decayed', 'a0:1 a1:2 b1:1', 'a2 b0 a0 b1 a1 e h', id='missing is 0'
    ),
    pytest.param(
      'soft_count', 'e:0 h:0 a0:1', 'a1 a2 b0 b1 a0 e h', id='others stay last'
    ),
    pytest.param(
      'capacity_aware', 'a0:1 a1:.5', 'a2 b0 b1 a1 a0 e h', id='shares'
    ),
  ],
)
def test_orders_by_hand(kind, popularity, ordered):
  operators = words.operators('h b1 a2 e a0 b0 a1')
  for given in (operators, operators[::-1], frozenset(operators)):
    made = slots.order_operators(kind, given, words.rates(popularity))
    assert made == words.operators(ordered)


def test_an_unknown_order_is_refused():
  for make in (
    lambda: slots.order_operators('best', (), {}),
    lambda: popularity_lib.Popularity(kind='best'),
  ):
    with pytest.raises(
      errors.ConfigError, match='--order=best: known are stat'
    ):
      make()


def test_operators_that_come_twice_are_refused():
  twice = words.operators('a0 e a0')
  with pytest.raises(ValueError, match='come twice: a/0'):
    slots.order_operators('static', twice, {})
  with pytest.raises(ValueError, match='come twice: a/0'):
    slots.make_slots(twice, words.sizes('a0:1 e:1'), 2)


# --- Slots -------------------------------------------------------------------


@pytest.mark.parametrize(
  ('sizes', 'window_length', 'kept', 'free'),
  [
    pytest.param('a0:1 a1:1', 1, ['a0 a1'], ['a0 a1'], id='one slot'),
    pytest.param(
      'a0:1 a1:1 a2:1 a3:1',
      2,
      ['a0 a1', 'a2 a3'],
      ['a0 a2', 'a1 a3'],
      id='equal',
    ),
    pytest.param(
      'a0:1 a1:1 a2:1 a3:1 a4:1 a5:1 e:4',
      3,
      ['a0 a1 a2 a3', 'a4 a5', 'e'],
      ['e', 'a0 a2 a4', 'a1 a3 a5'],
      id='one that is big, last',
    ),
    pytest.param(
      'a0:1 a1:9 a2:1 a3:1',
      3,
      ['a0', 'a1', 'a2 a3'],
      ['a1', 'a0 a3', 'a2'],
      id='one that is big, within',
    ),
    pytest.param(
      'a0:5 a1:1 a2:5 a3:1',
      2,
      ['a0 a1', 'a2 a3'],
      ['a0 a1', 'a2 a3'],
      id='order and balance agree',
    ),
    pytest.param(
      'a0:1 a1:1 a2:5 a3:5',
      2,
      ['a0 a1 a2', 'a3'],
      ['a0 a2', 'a1 a3'],
      id='order costs balance',
    ),
    pytest.param(
      'a0:3 a1:3 a2:2 a3:2 a4:2',
      2,
      ['a0 a1', 'a2 a3 a4'],
      ['a0 a1', 'a2 a3 a4'],
      id='the greedy is worse than the cut: 7',
    ),
    pytest.param(
      'a0:2 a1:3', 4, ['a0', 'a1', '', ''], ['a1', 'a0', '', ''], id='too few'
    ),
    pytest.param(
      'a0:0 a1:0 a2:0 a3:1',
      3,
      ['a0 a1', 'a2', 'a3'],
      ['a3', 'a0 a2', 'a1'],
      id='no bytes',
    ),
    pytest.param('', 2, ['', ''], ['', ''], id='no operators'),
  ],
)
def test_slots_by_hand(sizes, window_length, kept, free):
  bytes_of = words.sizes(sizes)
  order = tuple(bytes_of)
  for keep_order, wanted in ((True, kept), (False, free)):
    made = slots.make_slots(
      order, bytes_of, window_length, keep_order=keep_order
    )
    assert _in_words(made) == wanted


@pytest.mark.parametrize(
  ('sizes', 'kept', 'free', 'busiest'),
  [
    # Devices 0 and 1 hold experts 0-1 and 2-3.
    pytest.param(
      'a0:4 a1:4 a2:4 a3:4',
      ['a0 a1 a2', 'a3'],
      ['a0 a2', 'a1 a3'],
      (8, 4),
      id='experts spread over devices',
    ),
    pytest.param(
      'a0:4 a2:4 a1:4 a3:4',
      ['a0 a2', 'a1 a3'],
      ['a0 a3', 'a1 a2'],
      (4, 4),
      id='the order spreads them',
    ),
    pytest.param(
      'a0:4 a2:4 e:8',
      ['a0 a2', 'e'],
      ['e', 'a0 a2'],
      (4, 4),
      id='half of what all devices hold comes from each',
    ),
    pytest.param(
      'a0:6 e:6 a2:6 f:6',
      ['a0 e', 'a2 f'],
      ['a0 a2', 'e f'],
      (6, 6),
      id='what all devices hold fills the other device',
    ),
  ],
)
def test_slots_on_two_devices_by_hand(sizes, kept, free, busiest):
  bytes_of, device_of = words.sizes(sizes), _by_index(2)
  made = [
    slots.make_slots(
      tuple(bytes_of), bytes_of, 2, device_of, keep_order=keep_order
    )
    for keep_order in (True, False)
  ]
  assert [_in_words(m) for m in made] == [kept, free]
  loads = slots.busiest_device_bytes(made[0], bytes_of, device_of)
  assert sorted(loads) == sorted(busiest)


def test_bytes_are_exact_where_floats_are_not():
  bytes_of = {words.operator('e'): 2**60 + 1, words.operator('f'): 2**60}
  made = slots.make_slots(tuple(bytes_of), bytes_of, 2)
  assert slots.busiest_device_bytes(made, bytes_of) == (2**60 + 1, 2**60)


@pytest.mark.parametrize('keep_order', [True, False])
def test_impossible_slots_are_refused(keep_order):
  order = words.operators('a0 a1')
  for length in (0, -1):
    with pytest.raises(
      errors.ConfigError, match=f'--window_length={length}: mu'
    ):
      slots.make_slots(
        order, words.sizes('a0:1 a1:1'), length, keep_order=keep_order
      )
  for sizes, found in (('a0:1', 'None'), ('a0:1 a1:-2', '-2')):
    with pytest.raises(ValueError, match=f'a/1 has {found} bytes'):
      slots.make_slots(order, words.sizes(sizes), 2, keep_order=keep_order)


def _largest(made, bytes_of, device_of) -> int:
  return max(slots.busiest_device_bytes(made, bytes_of, device_of))


def _all_cuts(order, length):
  for inner in itertools.combinations_with_replacement(
    range(len(order) + 1), length - 1
  ):
    bounds = itertools.pairwise((0, *inner, len(order)))
    yield tuple(frozenset(order[a:b]) for a, b in bounds)


def _all_assignments(order, length):
  for indices in itertools.product(range(length), repeat=len(order)):
    members = collections.defaultdict(set)
    for operator, index in zip(order, indices, strict=True):
      members[index].add(operator)
    yield tuple(frozenset(members[i]) for i in range(length))


@hypothesis.settings(deadline=None)
@hypothesis.given(words.stages(most_operators=40, most_slots=12), st.booleans())
def test_slots_are_disjoint_and_cover_every_operator(stage, keep_order):
  bytes_of, length, device_of = stage
  order = tuple(bytes_of)
  made = slots.make_slots(
    order, bytes_of, length, device_of, keep_order=keep_order
  )
  assert len(made) == length
  assert sorted(o for slot in made for o in slot) == sorted(order)
  assert sum(map(bool, made)) == min(length, len(order))
  if keep_order:
    rank = {o: i for i, o in enumerate(order)}
    assert [sorted(rank[o] for o in slot) for slot in made] == [
      list(run) for run in _runs(list(map(len, made)))
    ]


def _runs(lengths):
  ends = list(itertools.accumulate(lengths, initial=0))
  return [range(a, b) for a, b in itertools.pairwise(ends)]


@hypothesis.settings(deadline=None)
@hypothesis.given(words.stages())
def test_no_contiguous_cut_is_better(stage):
  bytes_of, length, device_of = stage
  order = tuple(bytes_of)
  best = min(
    _largest(cut, bytes_of, device_of) for cut in _all_cuts(order, length)
  )
  kept = slots.make_slots(order, bytes_of, length, device_of)
  assert _largest(kept, bytes_of, device_of) == best
  free = slots.make_slots(order, bytes_of, length, device_of, keep_order=False)
  assert _largest(free, bytes_of, device_of) <= best


@hypothesis.settings(deadline=None)
@hypothesis.given(words.stages(most_operators=6, most_slots=3))
def test_slots_without_an_order_are_near_the_best(stage):
  bytes_of, length, _ = stage
  order = tuple(bytes_of)
  best = min(
    _largest(some, bytes_of, division.on_no_device)
    for some in _all_assignments(order, length)
  )
  free = slots.make_slots(order, bytes_of, length, keep_order=False)
  # Graham's bound of the greedy, 4/3 - 1/(3 w), in integers.
  largest = _largest(free, bytes_of, division.on_no_device)
  assert 3 * length * largest <= (4 * length - 1) * best


def test_slots_of_the_same_operators_are_the_same():
  bytes_of = {keys.OperatorId('a', i): 5 for i in range(30)}
  order = slots.order_operators('count', bytes_of, {})
  again = slots.order_operators('count', frozenset(bytes_of), {})
  for keep_order in (True, False):
    assert slots.make_slots(
      order, bytes_of, 7, keep_order=keep_order
    ) == slots.make_slots(again, bytes_of, 7, keep_order=keep_order)


# --- Bytes -------------------------------------------------------------------


@pytest.mark.parametrize(
  ('made', 'mode', 'wanted'),
  [
    pytest.param(words.slots('a0 a1 e'), 'rolling', (84,), id='whole'),
    pytest.param(words.slots('a0 a1 e'), 'aligned', (84,), id='whole, aligned'),
    # 12 + 2 + 8, 24 + 2 + 8 ... of 1, 2 and 4 parameters.
    pytest.param(
      words.slots('a0', 'a1', 'e'), 'rolling', (24, 34, 54), id='three'
    ),
    pytest.param(
      words.slots('a0', 'a1', 'e'), 'aligned', (24, 32, 48), id='three, aligned'
    ),
    pytest.param(
      words.slots('e', 'a0 a1', ''), 'rolling', (54, 44, 14), id='an empty slot'
    ),
    pytest.param(
      words.slots('e', 'a0 a1', ''), 'aligned', (54, 36, 0), id='empty, aligned'
    ),
  ],
)
def test_snapshot_bytes_by_hand(made, mode, wanted):
  state, compute = words.sizes('a0:12 a1:24 e:48'), words.sizes('a0:2 a1:4 e:8')
  assert slots.snapshot_bytes(made, state, compute, mode) == wanted
  decision = decision_lib.CaptureDecision(
    first_iteration=1, window_length=len(made), mode=mode, slots=made
  )
  for index, count in enumerate(wanted):
    captured = decision.captured(1 + index)
    assert captured is not None
    assert count == sum(state[o] for o in captured[0]) + sum(
      compute[o] for o in captured[1]
    )


def test_an_unknown_mode_is_refused():
  for make in (
    lambda: slots.snapshot_bytes((), {}, {}, 'fast'),
    lambda: words.decision('a', mode='fast'),
  ):
    with pytest.raises(
      errors.ConfigError, match='--window_mode=fast: known are'
    ):
      make()
