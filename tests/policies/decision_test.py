"""Decisions on what is captured: tables, and all small windows."""

import hypothesis
import hypothesis.strategies as st
import pytest

from moetion_jax.policies import decision as decision_lib, slots
from tests.support import words


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
  decision = words.decision('a0', 'a1', 'e', mode=mode)
  assert decision.slot_index(iteration) == index
  assert decision.captured(iteration) == words.contents(state, compute)


def test_whole_snapshots_may_be_taken_at_times_only():
  decision = words.decision('a0 e', every=3)
  indices = [decision.slot_index(i) for i in range(10, 17)]
  assert indices == [0, None, None, 0, None, None, 0]
  assert decision.captured(13) == words.contents('a0 e')
  assert decision.captured(14) is None


@pytest.mark.parametrize(
  ('every', 'iteration', 'state', 'gradients'),
  [
    (1, 10, 'a0', 'a1 e'),
    (1, 12, 'e', 'a0 a1'),
    (1, 13, 'a0', 'a1 e'),
    (2, 10, 'a0', 'a1 e'),
    (2, 11, '', 'a0 a1 e'),
    (2, 14, 'e', 'a0 a1'),
    (2, 16, 'a0', 'a1 e'),
  ],
)
def test_gradients_are_recorded_in_every_iteration(
  every, iteration, state, gradients
):
  decision = words.decision(
    'a0', 'a1', 'e', every=every, replay=decision_lib.UPDATES
  )
  wanted = words.contents(state, gradients=gradients)
  assert decision.captured(iteration) == wanted


def test_a_decision_says_nothing_of_earlier_iterations():
  for ask in ('slot_index', 'captured'):
    with pytest.raises(ValueError, match='iteration 9 < '):
      getattr(words.decision('a'), ask)(9)


@pytest.mark.parametrize(
  ('fields', 'message'),
  [
    ({'first_iteration': -1}, 'is negative'),
    ({'window_length': 1}, '2 slots, not 1'),
    ({'window_length': 0, 'slots': ()}, '0 slots, not 0'),
    ({'slots': words.slots('a0', 'a0')}, 'come twice: a/0'),
    ({'every': 0}, 'every=0'),
    ({'mode': 'aligned', 'replay': 'updates'}, 'rolling windows only'),
    # Frozen operators would lack the compute weights of iterations between.
    ({'every': 2}, 'every=2 with window_length=2: no replay'),
  ],
)
def test_impossible_decisions_are_refused(fields, message):
  whole = {
    'first_iteration': 1,
    'window_length': 2,
    'mode': 'rolling',
    'slots': words.slots('a0', 'a1'),
  }
  decision_lib.CaptureDecision(**whole)
  with pytest.raises(ValueError, match=message):
    decision_lib.CaptureDecision(**(whole | fields))


def test_a_partial_one_holds_some_and_always_the_same():
  decision = decision_lib.CaptureDecision(
    first_iteration=4,
    window_length=1,
    mode=decision_lib.PARTIAL,
    every=2,
    slots=words.slots('a0'),
    always=words.slots('e')[0],
  )
  assert decision.captured(5) is None
  assert decision.captured(6) == words.contents('a0 e')


@hypothesis.settings(deadline=None)
@hypothesis.given(
  words.stages(), st.sampled_from(decision_lib.MODES), st.integers(0, 20)
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
    state, compute, gradients = captured
    assert not state & compute and not gradients
    done |= state
    # Replay knows of every operator its state or its compute weights.
    assert done | compute == bytes_of.keys()
    if mode == 'rolling':
      assert state | compute == bytes_of.keys()
  assert done == bytes_of.keys()


def test_the_newest_decision_begun_is_active():
  one, two = words.decision('a', first=1), words.decision('b', first=5)
  for decisions in ((one, two), (two, one), (two, one, two)):
    assert decision_lib.active(decisions, 1) == one
    assert decision_lib.active(decisions, 4) == one
    assert decision_lib.active(decisions, 5) == two
    assert decision_lib.active(decisions, 99) == two
  with pytest.raises(ValueError, match='no decision holds at iteration 0'):
    decision_lib.active((one, two), 0)
  with pytest.raises(ValueError, match='two decisions begin with iteration 5'):
    decision_lib.active((two, words.decision('c', first=5)), 6)
