"""Operators are letters: 'ab/cd' has states of a and b, weights of c and d.

'ab//cd' has gradients of c and d instead.
"""

import time

import hypothesis
import hypothesis.strategies as st
import pytest

from moetion_jax import keys
from moetion_jax.snapshots import coverage


def _operators(letters: str) -> frozenset[keys.OperatorId]:
  return frozenset(keys.OperatorId(x) for x in letters)


def _record(iteration: int, text: str) -> coverage.SnapshotRecord:
  state, compute, gradients = [*text.split('/'), '', ''][:3]
  return coverage.SnapshotRecord(
    iteration=iteration,
    state=_operators(state),
    compute=_operators(compute),
    gradients=_operators(gradients),
    is_record=text.count('/') == 2,
  )


def _records(first: int, *texts: str | None):
  return [_record(i, t) for i, t in enumerate(texts, first) if t is not None]


def _share(iteration: int, replica: int, replicas: int, text: str):
  state, _, compute = text.partition('/')
  return coverage.Share(
    iteration=iteration,
    replica=replica,
    replicas=replicas,
    state=_operators(state),
    compute=_operators(compute),
  )


def _starts(records, operators='abc') -> dict[int, int]:
  starts = coverage.valid_starts(records, _operators(operators))
  assert list(starts) == sorted(starts)
  return {s.iteration: s.complete_at for s in starts}


_ROLLING = ('a/bc', 'b/ac', 'c/ab')


@pytest.mark.parametrize(
  ('texts', 'expected'),
  [
    pytest.param([], {}, id='nothing'),
    pytest.param(['abc'], {1: 1}, id='dense'),
    pytest.param(['abc/abc'], {1: 1}, id='dense, weights as well'),
    pytest.param(['abc', 'abc'], {1: 1, 2: 2}, id='dense every iteration'),
    pytest.param(['ab/c'], {}, id='one operator is never captured'),
    pytest.param(_ROLLING, {1: 3}, id='one rolling window'),
    pytest.param(_ROLLING[:2], {}, id='window not finished'),
    pytest.param(
      _ROLLING * 2, {1: 3, 2: 4, 3: 5, 4: 6}, id='rolling: start anywhere'
    ),
    pytest.param(
      ['a/bc', 'b/c', 'c/'] * 2, {1: 3, 4: 6}, id='aligned: windows only'
    ),
    pytest.param(
      ['a/b', 'b/c', 'c/'], {}, id='weights of c are not in the first'
    ),
    pytest.param(
      ['a/bc', 'b/', 'c/'], {}, id='frozen operator without its weights'
    ),
    pytest.param(
      ['a/bc', 'b/c', 'c/', 'abc'], {1: 3, 4: 4}, id='aligned, then dense'
    ),
    pytest.param(
      ['a/bc', 'b/', 'abc'], {3: 3}, id='a later snapshot does not mend it'
    ),
    pytest.param(
      ['a/bc', 'b/ac', None, 'c/ab', 'a/bc', 'b/ac'],
      {4: 6},
      id='missing in the middle',
    ),
    pytest.param(
      [*_ROLLING, None, *_ROLLING], {1: 3, 5: 7}, id='gap between windows'
    ),
    pytest.param(
      ['a/bc', None, 'b/ac', None, 'c/ab'], {}, id='every second: none'
    ),
    pytest.param(
      ['abc', None, 'abc', None, 'a/bc'], {1: 1, 3: 3}, id='every second: dense'
    ),
    pytest.param(
      ['a/bc', 'b/ac', 'a/bc', 'c/ab', 'b/ac'],
      {1: 4, 2: 4, 3: 5},
      id='the order changes inside',
    ),
    pytest.param(
      ['a/bc', 'b/ac', 'c/ab', 'ab/c', 'c/ab', 'ab/c'],
      {1: 3, 2: 4, 3: 4, 4: 5, 5: 6},
      id='the window becomes shorter',
    ),
    pytest.param(
      ['ab/c', 'c/ab', 'a/bc', 'b/ac', 'c/ab'],
      {1: 2, 2: 4, 3: 5},
      id='the window becomes longer',
    ),
    pytest.param(
      ['a/bc', 'b/c', 'c/ab', 'a/bc', 'b/ac'],
      {1: 3, 3: 5},
      id='active ones need no weights afterwards',
    ),
    pytest.param(['abcx/y'], {1: 1}, id='strangers do not matter'),
  ],
)
def test_valid_starts(texts, expected):
  assert _starts(_records(1, *texts)) == expected


_RECORDED = ('a//bc', 'b//ac', 'c//ab')


@pytest.mark.parametrize(
  ('texts', 'expected'),
  [
    pytest.param(_RECORDED, {1: (3, 3)}, id='one window'),
    pytest.param(
      _RECORDED * 2,
      {1: (3, 6), 2: (4, 6), 3: (5, 6), 4: (6, 6)},
      id='start anywhere',
    ),
    pytest.param(
      ['a//bc', '//abc', 'b//ac', '//abc', 'c//ab', '//abc'],
      {1: (5, 6)},
      id='slots of every second iteration',
    ),
    pytest.param(
      ['abc', '//abc', '//abc'], {1: (1, 3)}, id='whole, then gradients alone'
    ),
    pytest.param(
      ['a//', 'b//ac', 'c//ab'], {1: (3, 3)}, id='nothing of frozen'
    ),
    pytest.param(['a//bc', 'b//a', 'c//ab'], {}, id='a gradient is missing'),
    pytest.param(
      ['a//bc', 'b//ac', None, *_RECORDED], {4: (6, 6)}, id='one is missing'
    ),
    pytest.param(
      [*_RECORDED, None, '//abc'], {1: (3, 3)}, id='nothing leads over a gap'
    ),
    pytest.param(
      [*_ROLLING, *_RECORDED],
      {1: (3, 0), 2: (4, 0), 3: (5, 6), 4: (6, 6)},
      id='from microbatches to updates',
    ),
    pytest.param(
      [*_RECORDED, *_ROLLING],
      {1: (3, 3), 4: (6, 0)},
      id='from updates to microbatches',
    ),
    pytest.param(
      [*_RECORDED, 'abc//', 'abc//'],
      {1: (3, 5), 2: (4, 5), 3: (4, 5), 4: (4, 5), 5: (5, 0)},
      id='whole ones need no gradients',
    ),
    pytest.param(
      [*_RECORDED, 'abc', 'abc'],
      {1: (3, 3), 4: (4, 0), 5: (5, 0)},
      id='whole ones that do not say what the report said',
    ),
  ],
)
def test_starts_of_updates(texts, expected):
  found = coverage.valid_starts(_records(1, *texts), _operators('abc'))
  assert {
    s.iteration: (s.complete_at, s.applied_until) for s in found
  } == expected


def test_records_may_come_in_any_order():
  records = _records(5, *_ROLLING * 2)
  assert _starts(records[::-1]) == {5: 7, 6: 8, 7: 9, 8: 10}


def test_snapshot_0_is_a_start_at_once_and_begins_no_window_alone():
  initial = coverage.initial_record(_operators('abc'))
  assert _starts([initial]) == {0: 0}
  assert _starts([initial, *_records(1, 'a/bc', 'b/ac')]) == {0: 0}
  assert _starts([initial, *_records(1, *_ROLLING)]) == {0: 0, 1: 3}


def test_two_records_of_one_iteration():
  with pytest.raises(ValueError, match='two records of iteration 4'):
    _starts([_record(4, 'abc'), _record(4, 'abc')])


def test_a_stage_without_operators():
  assert _starts(_records(3, '', ''), operators='') == {3: 3, 4: 4}


@pytest.mark.parametrize(
  ('shares', 'expected'),
  [
    pytest.param([], [], id='nothing'),
    pytest.param([(1, 0, 1, 'a/b')], [(1, 1, 'a/b')], id='one replica'),
    pytest.param(
      [(1, 1, 2, 'b/d'), (1, 0, 2, 'a/c')], [(1, 2, 'ab/cd')], id='two shares'
    ),
    pytest.param([(1, 0, 2, 'a/c')], [], id='a share is missing'),
    pytest.param(
      [(1, 0, 2, 'a/'), (1, 0, 2, 'a/')], [], id='two copies are no two shares'
    ),
    pytest.param(
      [(1, 0, 2, 'a/'), (1, 1, 3, 'b/')], [], id='shares of different worlds'
    ),
    pytest.param(
      [(1, 0, 2, 'a/'), (1, 0, 1, 'ab/'), (1, 1, 3, 'b/')],
      [(1, 1, 'ab/')],
      id='one of three worlds is complete',
    ),
    pytest.param(
      [(1, 0, 2, 'a/b'), (1, 1, 2, 'b/a'), (1, 0, 1, 'ab/')],
      [(1, 1, 'ab/')],
      id='the fewest shares',
    ),
    pytest.param(
      [(9, 0, 1, 'a/'), (2, 0, 2, 'a/'), (10, 0, 1, 'a/'), (2, 1, 2, 'b/')],
      [(2, 2, 'ab/'), (9, 1, 'a/'), (10, 1, 'a/')],
      id='ascending',
    ),
  ],
)
def test_complete_records(shares, expected):
  found = [_share(*s) for s in shares]
  assert coverage.complete_records(found) == tuple(
    _record(i, text) for i, _, text in expected
  )
  teams = coverage.whole_teams(share.name for share in found)
  assert {i: len(team) for i, team in teams.items()} == {
    i: replicas for i, replicas, _ in expected
  }


def test_shares_of_one_name_that_differ():
  with pytest.raises(ValueError, match='two different shares 1 of 2'):
    coverage.complete_records([_share(3, 1, 2, 'a/b'), _share(3, 1, 2, 'b/a')])


@pytest.mark.parametrize('name', [(1, 2, 2), (1, -1, 1), (1, 0, 0), (-1, 0, 1)])
def test_a_share_that_cannot_be(name):
  with pytest.raises(ValueError, match='share'):
    _share(*name, text='a/')


def _by_definition(by_iteration, operators, s):
  """The iteration with which a conversion from `s` is complete, or None.

  Does what a conversion does: fold, replay, fold, ...
  """
  active = frozenset()
  while True:
    if s not in by_iteration:
      return None
    active |= by_iteration[s].state
    frozen = operators - active
    if not frozen:
      return s
    if not frozen <= by_iteration[s].compute:
      return None
    s += 1


@hypothesis.settings(deadline=None, max_examples=300)
@hypothesis.given(st.data())
def test_valid_starts_are_their_definition(data):
  letters = 'abcd'[: data.draw(st.integers(1, 4))]
  operators = _operators(letters)
  iterations = data.draw(st.sets(st.integers(0, 12)))
  # Mostly all weights, as rolling windows have them, or nothing is valid.
  some = st.sets(st.sampled_from(letters)).map(''.join)
  compute = st.one_of(st.just(letters), st.just(letters), some)
  by_iteration = {
    i: _record(i, f'{data.draw(some)}/{data.draw(compute)}') for i in iterations
  }
  expected = {
    s: end
    for s in iterations
    if (end := _by_definition(by_iteration, operators, s)) is not None
  }
  assert _starts(by_iteration.values(), letters) == expected


@hypothesis.settings(deadline=None, max_examples=300)
@hypothesis.given(st.data())
def test_starts_of_updates_are_their_definition(data):
  letters = 'abcd'[: data.draw(st.integers(1, 4))]
  operators = _operators(letters)
  some = st.sets(st.sampled_from(letters)).map(''.join)
  gradients = st.one_of(st.just(letters), st.just(letters), some)
  by_iteration = {
    i: _record(i, f'{data.draw(some)}//{data.draw(gradients)}')
    for i in data.draw(st.sets(st.integers(0, 12)))
  }

  def end(s):
    """Applies one after the other, as long as it goes: (complete, until)."""
    active, complete_at = by_iteration[s].state, None
    while True:
      if complete_at is None and operators <= active:
        complete_at = s
      newer = by_iteration.get(s + 1)
      is_record = newer is not None and newer.is_record
      if not is_record or not operators <= newer.gradients | newer.state:
        return complete_at, s
      s, active = s + 1, active | newer.state

  found = coverage.valid_starts(by_iteration.values(), operators)
  assert {
    s.iteration: (s.complete_at, s.applied_until)
    for s in found
    if s.applied_until
  } == {
    s: end(s) for s in by_iteration if end(s)[0] is not None and end(s)[1] > s
  }


@pytest.mark.parametrize('window', [20, 1000])
def test_many_snapshots_of_many_operators(window):
  operators = [keys.OperatorId('experts', e) for e in range(5000)]
  everything = frozenset(operators)
  slots = [frozenset(operators[i::window]) for i in range(window)]
  records = [
    coverage.SnapshotRecord(
      iteration=i,
      state=slots[i % window],
      compute=everything - slots[i % window],
    )
    for i in range(1000)
  ]
  begin = time.process_time()
  starts = coverage.valid_starts(records, operators)
  seconds = time.process_time() - begin
  assert [(s.iteration, s.complete_at) for s in starts] == [
    (i, i + window - 1) for i in range(1001 - window)
  ]
  assert seconds < 30  # below one; operator by operator for each start: hours
