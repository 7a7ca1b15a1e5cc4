"""Orders, slots, their bytes and decisions: tables, and all small cuts."""

import collections
import itertools
import json

import hypothesis
import hypothesis.strategies as st
import pytest

from moetion_jax import errors, keys
from moetion_jax.policies import (
  decision as decision_lib,
  popularity as popularity_lib,
  slots,
)

pytestmark = pytest.mark.fast


def _operator(name: str) -> keys.OperatorId:
  """'a0' is expert 0 of group a, 'a' the one operator of group a."""
  return keys.OperatorId(name[0], int(name[1:]) if name[1:] else -1)


def _operators(text: str) -> tuple[keys.OperatorId, ...]:
  return tuple(map(_operator, text.split()))


def _sizes(text: str) -> dict[keys.OperatorId, int]:
  """'a0:3 b:5' in bytes, in that order."""
  pairs = (word.split(':') for word in text.split())
  return {_operator(name): int(size) for name, size in pairs}


def _rates(text: str) -> dict[keys.OperatorId, float]:
  pairs = (word.split(':') for word in text.split())
  return {_operator(name): float(rate) for name, rate in pairs}


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
  operators = _operators('h b1 a2 e a0 b0 a1')
  for given in (operators, operators[::-1], frozenset(operators)):
    made = slots.order_operators(kind, given, _rates(popularity))
    assert made == _operators(ordered)


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
  twice = _operators('a0 e a0')
  with pytest.raises(ValueError, match='come twice: a/0'):
    slots.order_operators('static', twice, {})
  with pytest.raises(ValueError, match='come twice: a/0'):
    slots.make_slots(twice, _sizes('a0:1 e:1'), 2)


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
    seen = popularity_lib.observe(seen, _rates(counts))
  assert popularity_lib.rates(seen) == _rates(rates)


def test_observing_changes_nothing_that_exists():
  before = popularity_lib.Popularity(kind='count')
  counts = _rates('a0:1')
  after = popularity_lib.observe(before, counts)
  counts[_operator('a0')] = 5.0
  assert (before.history, popularity_lib.rates(after)) == ((), _rates('a0:1'))


@pytest.mark.parametrize('count', [-1.0, float('nan'), float('inf')])
def test_counts_that_are_none_are_refused(count):
  popularity = popularity_lib.Popularity(kind='count')
  with pytest.raises(ValueError, match=f'a/0 has a count of {count}'):
    popularity_lib.observe(popularity, {_operator('a0'): count})


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
  assert popularity_lib.should_reorder(_rates(old), _rates(new)) is reorder


def test_reorder_thresholds_can_be_set():
  old, new = _rates('a0:10 a1:10'), _rates('a0:13 a1:10')
  assert popularity_lib.should_reorder(old, new, change=0.2, share=0.5)
  assert not popularity_lib.should_reorder(old, new, change=0.3)
  assert not popularity_lib.should_reorder(old, new, share=0.6)
  for wrong in ({'change': -0.1}, {'share': 0}, {'share': 1.5}):
    with pytest.raises(ValueError, match='change='):
      popularity_lib.should_reorder(old, new, **wrong)


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
  bytes_of = _sizes(sizes)
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
  bytes_of, device_of = _sizes(sizes), _by_index(2)
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
  bytes_of = {_operator('e'): 2**60 + 1, _operator('f'): 2**60}
  made = slots.make_slots(tuple(bytes_of), bytes_of, 2)
  assert slots.busiest_device_bytes(made, bytes_of) == (2**60 + 1, 2**60)


@pytest.mark.parametrize('keep_order', [True, False])
def test_impossible_slots_are_refused(keep_order):
  order = _operators('a0 a1')
  for length in (0, -1):
    with pytest.raises(
      errors.ConfigError, match=f'--window_length={length}: mu'
    ):
      slots.make_slots(
        order, _sizes('a0:1 a1:1'), length, keep_order=keep_order
      )
  for sizes, found in (('a0:1', 'None'), ('a0:1 a1:-2', '-2')):
    with pytest.raises(ValueError, match=f'a/1 has {found} bytes'):
      slots.make_slots(order, _sizes(sizes), 2, keep_order=keep_order)


@st.composite
def _stages(draw, most_operators=8, most_slots=4):
  """(bytes by operator, in order; window length; device_of)."""
  devices = draw(st.sampled_from([1, 2, 3]))
  sizes = draw(st.lists(st.integers(0, 12), max_size=most_operators))
  bytes_of, homes = {}, {}
  for i, size in enumerate(sizes):
    expert = draw(st.booleans())
    operator = keys.OperatorId('a', i) if expert else keys.OperatorId(f'e{i}')
    bytes_of[operator] = size
    homes[operator] = draw(st.integers(0, devices - 1)) if expert else None
  return bytes_of, draw(st.integers(1, most_slots)), homes.get


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
@hypothesis.given(_stages(most_operators=40, most_slots=12), st.booleans())
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
@hypothesis.given(_stages())
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
@hypothesis.given(_stages(most_operators=6, most_slots=3))
def test_slots_without_an_order_are_near_the_best(stage):
  bytes_of, length, _ = stage
  order = tuple(bytes_of)
  best = min(
    _largest(some, bytes_of, slots.on_no_device)
    for some in _all_assignments(order, length)
  )
  free = slots.make_slots(order, bytes_of, length, keep_order=False)
  # Graham's bound of the greedy, 4/3 - 1/(3 w), in integers.
  largest = _largest(free, bytes_of, slots.on_no_device)
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


def _slots(*texts: str) -> decision_lib.Slots:
  return tuple(frozenset(_operators(t)) for t in texts)


@pytest.mark.parametrize(
  ('made', 'mode', 'wanted'),
  [
    pytest.param(_slots('a0 a1 e'), 'rolling', (84,), id='whole'),
    pytest.param(_slots('a0 a1 e'), 'aligned', (84,), id='whole, aligned'),
    # 12 + 2 + 8, 24 + 2 + 8 ... of 1, 2 and 4 parameters.
    pytest.param(_slots('a0', 'a1', 'e'), 'rolling', (24, 34, 54), id='three'),
    pytest.param(
      _slots('a0', 'a1', 'e'), 'aligned', (24, 32, 48), id='three, aligned'
    ),
    pytest.param(
      _slots('e', 'a0 a1', ''), 'rolling', (54, 44, 14), id='an empty slot'
    ),
    pytest.param(
      _slots('e', 'a0 a1', ''), 'aligned', (54, 36, 0), id='empty, aligned'
    ),
  ],
)
def test_snapshot_bytes_by_hand(made, mode, wanted):
  state, compute = _sizes('a0:12 a1:24 e:48'), _sizes('a0:2 a1:4 e:8')
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
    lambda: _decision('a', mode='fast'),
  ):
    with pytest.raises(
      errors.ConfigError, match='--window_mode=fast: known are'
    ):
      make()


# --- Decisions ---------------------------------------------------------------


def _decision(*texts: str, first=10, mode='rolling', every=1):
  return decision_lib.CaptureDecision(
    first_iteration=first,
    window_length=len(texts),
    mode=mode,
    every=every,
    slots=_slots(*texts),
  )


@pytest.mark.parametrize(
  ('mode', 'iteration', 'index', 'state', 'compute'),
  [
    ('rolling', 10, 0, 'a0', 'a1 e'),
    ('rolling', 11, 1, 'a1', 'a0 e'),
    ('rolling', 12, 2, 'e', 'a0 a1'),
    ('rolling', 13, 0, 'a0', 'a1 e'),
    ('aligned', 10, 0, 'a0', 'a1 e'),
    ('aligned', 11, 1, 'a1', 'e'),
    ('aligned', 12, 2, 'e', ''),
    ('aligned', 16, 0, 'a0', 'a1 e'),
  ],
)
def test_captured_by_hand(mode, iteration, index, state, compute):
  decision = _decision('a0', 'a1', 'e', mode=mode)
  assert decision.slot_index(iteration) == index
  assert decision.captured(iteration) == _slots(state, compute)


def test_whole_snapshots_may_be_taken_at_times_only():
  decision = _decision('a0 e', every=3)
  indices = [decision.slot_index(i) for i in range(10, 17)]
  assert indices == [0, None, None, 0, None, None, 0]
  assert decision.captured(13) == _slots('a0 e', '')
  assert decision.captured(14) is None


def test_a_decision_says_nothing_of_earlier_iterations():
  for ask in ('slot_index', 'captured'):
    with pytest.raises(ValueError, match='iteration 9 < '):
      getattr(_decision('a'), ask)(9)


@pytest.mark.parametrize(
  ('fields', 'message'),
  [
    ({'first_iteration': -1}, 'is negative'),
    ({'window_length': 1}, '2 slots, not 1'),
    ({'window_length': 0, 'slots': ()}, '0 slots, not 0'),
    ({'slots': _slots('a0', 'a0')}, 'come twice: a/0'),
    ({'every': 0}, 'every=0'),
    # Frozen operators would lack the compute weights of iterations between.
    ({'every': 2}, 'every=2 with window_length=2: no replay'),
  ],
)
def test_impossible_decisions_are_refused(fields, message):
  whole = {
    'first_iteration': 1,
    'window_length': 2,
    'mode': 'rolling',
    'slots': _slots('a0', 'a1'),
  }
  decision_lib.CaptureDecision(**whole)
  with pytest.raises(ValueError, match=message):
    decision_lib.CaptureDecision(**(whole | fields))


def test_json_by_hand():
  assert _decision('e a1 a0', '', mode='aligned').to_json() == {
    'first_iteration': 10,
    'window_length': 2,
    'mode': 'aligned',
    'every': 1,
    'slots': [[['a', 0], ['a', 1], ['e', -1]], []],
    'always': [],
  }


def test_a_partial_one_holds_some_and_always_the_same():
  decision = decision_lib.CaptureDecision(
    first_iteration=4,
    window_length=1,
    mode=decision_lib.PARTIAL,
    every=2,
    slots=_slots('a0'),
    always=_slots('e')[0],
  )
  assert decision.captured(5) is None
  assert decision.captured(6) == (_slots('a0 e')[0], frozenset())
  value = json.loads(json.dumps(decision.to_json()))
  assert value['always'] == [['e', -1]]
  assert decision_lib.CaptureDecision.from_json(value) == decision


@hypothesis.settings(deadline=None)
@hypothesis.given(
  _stages(),
  st.integers(0, 10**9),
  st.sampled_from(decision_lib.MODES),
  st.data(),
)
def test_json_is_exact(stage, first, mode, data):
  bytes_of, length, device_of = stage
  decision = decision_lib.CaptureDecision(
    first_iteration=first,
    window_length=length,
    mode=mode,
    every=1 if length > 1 else data.draw(st.integers(1, 9)),
    slots=slots.make_slots(tuple(bytes_of), bytes_of, length, device_of),
  )
  value = decision.to_json()
  assert (
    decision_lib.CaptureDecision.from_json(json.loads(json.dumps(value)))
    == decision
  )
  assert decision_lib.CaptureDecision.from_json(value).to_json() == value


def test_json_with_other_fields_is_refused():
  value = _decision('a').to_json()
  for wrong in (value | {'more': 1}, {'mode': 'rolling'}, {}):
    with pytest.raises(ValueError, match='no decision has the fields'):
      decision_lib.CaptureDecision.from_json(wrong)


@hypothesis.settings(deadline=None)
@hypothesis.given(
  _stages(), st.sampled_from(decision_lib.MODES), st.integers(0, 20)
)
def test_every_window_captures_every_operator(stage, mode, passed):
  bytes_of, length, device_of = stage
  decision = decision_lib.CaptureDecision(
    first_iteration=7,
    window_length=length,
    mode=mode,
    slots=slots.make_slots(tuple(bytes_of), bytes_of, length, device_of),
  )
  # A rolling window may begin anywhere, an aligned one with slot 0.
  start = 7 + (passed if mode == 'rolling' else passed * length)
  done = set()
  for iteration in range(start, start + length):
    captured = decision.captured(iteration)
    assert captured is not None
    state, compute = captured
    assert not state & compute
    done |= state
    # Replay knows of every operator its state or its compute weights.
    assert done | compute == bytes_of.keys()
    if mode == 'rolling':
      assert state | compute == bytes_of.keys()
  assert done == bytes_of.keys()


def test_the_newest_decision_begun_is_active():
  one, two = _decision('a', first=1), _decision('b', first=5)
  for decisions in ((one, two), (two, one), (two, one, two)):
    assert decision_lib.active(decisions, 1) == one
    assert decision_lib.active(decisions, 4) == one
    assert decision_lib.active(decisions, 5) == two
    assert decision_lib.active(decisions, 99) == two
  with pytest.raises(ValueError, match='no decision holds at iteration 0'):
    decision_lib.active((one, two), 0)
  with pytest.raises(ValueError, match='two decisions begin with iteration 5'):
    decision_lib.active((two, _decision('c', first=5)), 6)
