"""The window's length: every way the choice can go, by hand and by search."""

import dataclasses

import hypothesis
import hypothesis.strategies as st
import pytest

from moetion_jax import errors, keys
from moetion_jax.policies import decision, window


def _stage(*sizes: int, state=6, compute=1, keep_order=True):
  """A stage of experts; expert i has state * sizes[i] bytes of state."""
  order = tuple(keys.OperatorId('a', i) for i in range(len(sizes)))
  return window.StageOperators(
    order=order,
    state_bytes={o: state * n for o, n in zip(order, sizes, strict=True)},
    rest_bytes={o: compute * n for o, n in zip(order, sizes, strict=True)},
    keep_order=keep_order,
  )


def _budget(target: float, overlap_target=0.5):
  """One whose target is that many bytes."""
  return window.CopyBudget(
    iteration_seconds=2.0,
    bandwidth_bytes_per_second=target / overlap_target / 2.0,
    overlap_target=overlap_target,
  )


# Eight equal operators: state 48, compute weights 8. The largest slots have 8 4
# 3 2 2 2 2 1 of them, by window length.
_EIGHT = _stage(*[1] * 8)


@pytest.mark.parametrize(
  ('target', 'chosen'),
  [
    pytest.param(1000, (1, 'rolling', 1), id='everything at once'),
    pytest.param(48, (1, 'rolling', 1), id='just everything'),
    pytest.param(47, (2, 'rolling', 1), id='not quite everything'),
    pytest.param(28, (2, 'rolling', 1), id='half'),
    pytest.param(27.9, (3, 'rolling', 1), id='less than half'),
    pytest.param(22, (4, 'rolling', 1), id='a quarter'),
    pytest.param(17, (8, 'rolling', 1), id='longer ones are no better'),
    pytest.param(13, (8, 'rolling', 1), id='one by one'),
    pytest.param(12.9, (5, 'aligned', 1), id='no rolling window'),
    pytest.param(9.5, (8, 'aligned', 1), id='the longest aligned one'),
    pytest.param(9.4, (1, 'rolling', 6), id='neither'),
    pytest.param(8, (1, 'rolling', 6), id='48 in six iterations'),
    pytest.param(4.8, (1, 'rolling', 10), id='48 in ten iterations'),
  ],
)
def test_choices_by_hand(target, chosen):
  choice = window.choose_window(_EIGHT, _budget(target))
  assert (choice.window_length, choice.mode, choice.every) == chosen
  assert not choice.pinned


def test_bytes_of_windows_by_hand():
  rolling = [max(_EIGHT.snapshot_bytes(w, 'rolling')) for w in range(1, 9)]
  assert rolling == [48, 28, 23, 18, 18, 18, 18, 13]
  average = [sum(_EIGHT.snapshot_bytes(w, 'aligned')) / w for w in range(1, 9)]
  assert average == pytest.approx(
    [
      48,
      (28 + 24) / 2,
      (23 + 20 + 12) / 3,
      (18 + 16 + 14 + 12) / 4,
      (18 + 16 + 14 + 7 + 6) / 5,
      (18 + 16 + 9 + 8 + 7 + 6) / 6,
      (18 + 11 + 10 + 9 + 8 + 7 + 6) / 7,
      (13 + 12 + 11 + 10 + 9 + 8 + 7 + 6) / 8,
    ]
  )


@pytest.mark.parametrize(
  ('target', 'overlap_target', 'chosen'),
  [
    # A copy hardly takes any time: 2 iterations are done again with a rolling
    # window of 2, 1.5 with every second state as a whole.
    pytest.param(48, 0.01, (1, 'rolling', 1), id='everything every time'),
    pytest.param(28, 0.01, (1, 'rolling', 2), id='2 or 1.5'),
    pytest.param(13, 0.01, (1, 'rolling', 4), id='8 or 2.5'),
    pytest.param(12, 0.01, (1, 'rolling', 4), id='5 aligned or 2.5'),
    # It takes all the time there is: 2 + 1 or 1.5 + 48 / 28.
    pytest.param(28, 1.0, (2, 'rolling', 1), id='3 or 3.2'),
    pytest.param(27.9, 1.0, (1, 'rolling', 2), id='3.8 or 3.2'),
    pytest.param(9.5, 0.01, (1, 'rolling', 6), id='logs for 6'),
    pytest.param(9.5, 0.4, (1, 'rolling', 6), id='8 aligned or 6'),
  ],
)
def test_whole_snapshots_if_less_is_done_again(target, overlap_target, chosen):
  budget = _budget(target, overlap_target)
  for may_be_whole in (False, True):
    choice = window.choose_common_window(
      [_EIGHT, _EIGHT],
      [budget, _budget(1000, overlap_target)],
      may_be_whole=may_be_whole,
    )
    if may_be_whole:
      assert (choice.window_length, choice.mode, choice.every) == chosen
    else:
      assert choice == window.choose_window(_EIGHT, budget)


def test_a_share_is_what_has_to_fit():
  """Each of two replicas captures half of 48 bytes."""
  order = list(_EIGHT.order)
  shared = dataclasses.replace(
    _EIGHT, shares=(frozenset(order[:4]), frozenset(order[4:]))
  )
  assert window.choose_window(shared, _budget(24)).window_length == 1
  assert window.choose_window(shared, _budget(23.9)).window_length > 1
  assert window.choose_window(_EIGHT, _budget(24)).window_length > 1


def test_whole_snapshots_that_logs_have_no_room_for_are_not_chosen():
  budget = _budget(9.5, 0.01)  # one in 6
  for limit, chosen in ((6, 6), (5, 5)):
    choice = window.choose_common_window(
      [_EIGHT], [budget], max_window_length=limit, may_be_whole=True
    )
    assert choice.every == chosen


@pytest.mark.parametrize(
  ('length', 'mode', 'every', 'expected'),
  [
    (1, 'rolling', 1, 1 + 0.48),
    (4, 'rolling', 1, 4 + 0.18),
    (4, 'aligned', 1, 5.5 + 0.18),
    (1, 'rolling', 5, 3 + 0.48),
  ],
)
def test_iterations_that_are_done_again(length, mode, every, expected):
  choice = window.WindowChoice(
    window_length=length, mode=mode, every=every, reason=''
  )
  found = window.done_again(choice, _EIGHT, _budget(50, 0.5))
  assert found == pytest.approx(expected)
  # With records only the interrupted one, and what the copy is late by.
  largest = max(_EIGHT.snapshot_bytes(length, mode))
  found = window.done_again(choice, _EIGHT, _budget(50, 0.5), decision.UPDATES)
  assert found == pytest.approx(1 + largest / 100)


def test_an_aligned_copy_is_never_late():
  # The average fits (12.9), but a copy may not take a whole iteration: then
  # the next capture would wait for it.
  for overlap_target, chosen in ((0.9, 'aligned'), (1.0, 'rolling')):
    choice = window.choose_window(_EIGHT, _budget(12.9, overlap_target))
    assert choice.mode == chosen
  assert (choice.window_length, choice.every) == (1, 4)


def test_choices_follow_the_balance():
  # One operator is as large as all others: no slot is below 30.
  stage = _stage(1, 1, 1, 1, 1, 5)
  assert window.choose_window(stage, _budget(35)).window_length == 2
  choice = window.choose_window(stage, _budget(34.9, 1.0))
  assert (choice.window_length, choice.mode) == (3, 'aligned')
  free = _stage(1, 5, 1, keep_order=False)
  assert window.choose_window(free, _budget(32)).window_length == 2
  kept = _stage(1, 5, 1)
  assert window.choose_window(kept, _budget(32)).window_length == 3


@pytest.mark.parametrize(
  ('target', 'limit', 'chosen'),
  [
    pytest.param(28, 2, (2, 'rolling', 1), id='within'),
    pytest.param(26, 2, (2, 'aligned', 1), id='a longer one would roll'),
    pytest.param(13, 3, (1, 'rolling', 3), id='48 in four is too long'),
    pytest.param(13, 4, (1, 'rolling', 4), id='48 in four'),
    pytest.param(13, 99, (8, 'rolling', 1), id='more than operators'),
  ],
)
def test_logs_bound_the_window(target, limit, chosen):
  choice = window.choose_window(
    _EIGHT, _budget(target, 0.9), max_window_length=limit
  )
  assert (choice.window_length, choice.mode, choice.every) == chosen
  assert ('more than it may' in choice.reason) == (chosen[2] == 3)


@pytest.mark.parametrize(
  ('target', 'mode', 'chosen'),
  [
    pytest.param(28, 'rolling', (2, 'rolling', 1), id='rolling'),
    pytest.param(28, 'aligned', (2, 'aligned', 1), id='aligned'),
    pytest.param(12, 'rolling', (1, 'rolling', 4), id='only rolling'),
    pytest.param(8, 'aligned', (1, 'aligned', 6), id='only aligned'),
  ],
)
def test_a_pinned_mode_leaves_out_the_other(target, mode, chosen):
  choice = window.choose_window(_EIGHT, _budget(target), pinned_mode=mode)
  assert (choice.window_length, choice.mode, choice.every) == chosen
  assert 'no rolling or aligned' not in choice.reason


@pytest.mark.parametrize('budget', [None, _budget(0.1), _budget(1000)])
def test_a_pinned_length_wins(budget):
  for mode, chosen in ((None, 'rolling'), *((m, m) for m in decision.MODES)):
    choice = window.choose_window(
      _EIGHT, budget, pinned_length=5, pinned_mode=mode
    )
    assert choice == window.WindowChoice(
      window_length=5, mode=chosen, reason='pinned', pinned=True
    )
    assert window.enlarge(choice, _EIGHT) is choice


@pytest.mark.parametrize(
  ('pinned', 'message'),
  [
    ({'pinned_length': 0}, '--window_length=0: must be at least 1'),
    ({'pinned_length': -3}, '--window_length=-3: must be at least 1'),
    (
      {'pinned_length': 5, 'max_window_length': 4},
      '--window_length=5: the logs have room for 4 iterations only',
    ),
    ({'pinned_mode': 'fast'}, '--window_mode=fast: known are rolling, aligned'),
  ],
)
def test_impossible_pins_are_refused(pinned, message):
  with pytest.raises(errors.ConfigError, match=message):
    window.choose_window(_EIGHT, _budget(1), **pinned)


def test_impossible_measurements_are_refused():
  for wrong in (0.0, -1.0, float('inf'), float('nan')):
    with pytest.raises(ValueError, match='iteration_seconds='):
      window.CopyBudget(iteration_seconds=wrong, bandwidth_bytes_per_second=1)
    with pytest.raises(ValueError, match='bandwidth_bytes_per_second='):
      window.CopyBudget(iteration_seconds=1, bandwidth_bytes_per_second=wrong)
  for wrong in (-0.5, 1.1):
    with pytest.raises(errors.ConfigError, match='--overlap_target='):
      window.CopyBudget(
        iteration_seconds=1,
        bandwidth_bytes_per_second=1,
        overlap_target=wrong,
      )


def test_missing_arguments_are_refused():
  with pytest.raises(ValueError, match='needs a measured budget'):
    window.choose_window(_EIGHT, None)
  with pytest.raises(ValueError, match='without operators'):
    window.choose_window(_stage(), _budget(1))
  with pytest.raises(ValueError, match='max_window_length=0'):
    window.choose_window(_EIGHT, _budget(1), max_window_length=0)


def test_a_reason_has_the_bytes():
  def reason(target):
    stage = _stage(*[10**6] * 8)
    return window.choose_window(stage, _budget(target * 1e6)).reason

  assert reason(28) == (
    'largest snapshot 28 MB, average 28 MB; 0.5 of an iteration copies 28 MB'
  )
  assert reason(12.9) == (
    'largest snapshot 18 MB, average 12.2 MB; 0.5 of an iteration copies 12.9 '
    'MB; no rolling window fits'
  )
  assert reason(8).startswith(
    'no rolling or aligned window fits; whole snapshots: largest snapshot 48 MB'
  )


@hypothesis.settings(deadline=None)
@hypothesis.given(
  st.lists(st.integers(1, 9), min_size=1, max_size=7),
  st.floats(1, 200),
  st.floats(0.05, 1),
  st.integers(1, 9),
  st.integers(0, 7),
  st.booleans(),
)
def test_no_shorter_window_would_do(
  sizes, target, overlap_target, limit, compute, keep_order
):
  stage = _stage(*sizes, compute=compute, keep_order=keep_order)
  budget = _budget(target, overlap_target)
  fitting = {mode: [] for mode in decision.MODES}
  for length in range(1, min(limit, len(sizes)) + 1):
    if max(stage.snapshot_bytes(length, 'rolling')) <= budget.target_bytes:
      fitting['rolling'].append(length)
    copied = stage.snapshot_bytes(length, 'aligned')
    if (
      sum(copied) <= length * budget.target_bytes
      and max(copied) <= budget.iteration_bytes
    ):
      fitting['aligned'].append(length)
  choice = window.choose_window(stage, budget, max_window_length=limit)
  for mode, lengths in fitting.items():
    if lengths:
      assert (choice.window_length, choice.mode) == (lengths[0], mode)
      assert choice.every == 1
      return
  assert (choice.window_length, choice.mode) == (1, 'rolling')
  whole = sum(stage.state_bytes.values())
  assert choice.every == limit or whole <= choice.every * budget.target_bytes
  assert whole > (choice.every - 1) * budget.target_bytes


# --- Enlarge -----------------------------------------------------------------


def _choice(length, mode='rolling', every=1):
  return window.WindowChoice(
    window_length=length, mode=mode, every=every, reason='test'
  )


@pytest.mark.parametrize(
  ('length', 'mode', 'limit', 'longer'),
  [
    pytest.param(1, 'rolling', None, 2, id='from one'),
    pytest.param(2, 'rolling', None, 3, id='from two'),
    pytest.param(4, 'rolling', None, 8, id='to one whose largest is smaller'),
    pytest.param(4, 'aligned', None, 8, id='aligned'),
    pytest.param(8, 'rolling', None, None, id='one operator a slot'),
    pytest.param(4, 'rolling', 7, None, id='nothing helps within the logs'),
    pytest.param(2, 'rolling', 3, 3, id='up to what the logs hold'),
    pytest.param(3, 'rolling', 3, None, id='logs are full'),
    pytest.param(5, 'rolling', 3, None, id='logs are more than full'),
  ],
)
def test_longer_windows_by_hand(length, mode, limit, longer):
  choice = _choice(length, mode)
  larger = window.enlarge(choice, _EIGHT, max_window_length=limit)
  if longer is None:
    assert larger is choice
  else:
    assert (larger.window_length, larger.mode, larger.every) == (
      longer,
      mode,
      1,
    )
    assert f'copies ran late with window_length={length}' in larger.reason


def test_windows_grow_by_a_quarter():
  stage, choice, lengths = _stage(*[1] * 40), _choice(8), []
  while (larger := window.enlarge(choice, stage)) is not choice:
    choice = larger
    lengths.append(choice.window_length)
  # 8 has slots of 5, 10 of 4, 14 of 3, 20 of 2; the last step is to all.
  assert lengths == [10, 14, 20, 40]
  assert (
    window.enlarge(
      _choice(36), _stage(*[1] * 38), max_window_length=38
    ).window_length
    == 38
  )


@pytest.mark.parametrize(
  ('every', 'limit', 'larger'),
  [(2, None, 3), (4, None, 5), (10, None, 13), (10, 12, 12), (10, 10, 10)],
)
def test_whole_snapshots_get_rarer(every, limit, larger):
  choice = _choice(1, every=every)
  rarer = window.enlarge(choice, _EIGHT, max_window_length=limit)
  assert (rarer.window_length, rarer.every) == (1, larger)
  assert (rarer is choice) == (every == larger)
