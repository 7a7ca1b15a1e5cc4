"""The choice between ways of replay: by hand, and by search."""

import dataclasses

import hypothesis
import hypothesis.strategies as st
import pytest

from moetion_jax import keys
from moetion_jax.policies import decision, replay_choice, window


def _stage(bandwidth, sizes=(1,) * 8, *, rest=4, update_seconds=0.0, share=0.5):
  """Experts with 12 bytes of state times their size; iterations of 2 s."""
  order = tuple(keys.OperatorId('a', i) for i in range(len(sizes)))
  return replay_choice.Stage(
    operators=window.StageOperators(
      order=order,
      state_bytes={o: 12 * n for o, n in zip(order, sizes, strict=True)},
      rest_bytes={o: rest * n for o, n in zip(order, sizes, strict=True)},
    ),
    budget=window.CopyBudget(
      iteration_seconds=2.0,
      bandwidth_bytes_per_second=bandwidth,
      overlap_target=share,
    ),
    update_seconds=update_seconds,
    read_bytes_per_second=bandwidth,
  )


def _outlook(mtbf=100.0, *, hides=True, fixed=0.0):
  return replay_choice.Outlook(
    expected_mtbf_seconds=mtbf, hides_copies=hides, fixed_seconds=fixed
  )


def _window(length, mode='rolling', every=1):
  return window.WindowChoice(
    window_length=length, mode=mode, every=every, reason=''
  )


# Eight experts: 96 bytes of state, 32 of gradients, 16 of compute weights. A
# window of 4 has 24 + 24 bytes a snapshot with gradients, 24 + 12 without.
@pytest.mark.parametrize(
  ('replay', 'choice', 'bandwidth', 'hides', 'overhead', 'seconds'),
  [
    # Read four snapshots, three updates, the interrupted iteration, and the
    # part of one that a copy takes.
    ('updates', _window(4), 48.0, True, 0.0, 4 + 3 * 0.1 + 2 + 1),
    # Read four snapshots, three iterations again and those two.
    ('microbatches', _window(4), 36.0, True, 0.0, 4 + 3 * 2 + 2 + 1),
    # The same where copies take the cores' time: all of it counts.
    ('updates', _window(4), 48.0, False, 0.5, 4 + 3 * 0.1 + 2 + 1),
    # A copy longer than an iteration: training waits for a quarter of one.
    ('updates', _window(4), 19.2, True, 0.25, 10 + 3 * 0.1 + 2 + 2.5),
    # 36, 32, 28 and 24 bytes: 1.5 windows less a half are done again.
    ('microbatches', _window(4, 'aligned'), 24.0, True, 0.0, 5 + 6.25 * 2),
    # A whole copy in three iterations: it is one iteration old on average.
    ('microbatches', _window(1, every=3), 48.0, True, 0.0, 2 + 2 * 2 + 2),
    ('microbatches', _window(1, every=3), 48.0, False, 1 / 3, 2 + 2 * 2 + 2),
  ],
)
def test_predictions_by_hand(
  replay, choice, bandwidth, hides, overhead, seconds
):
  stage = _stage(
    bandwidth, rest=4 if replay == 'updates' else 2, update_seconds=0.1
  )
  one = replay_choice.predict(
    replay, choice, [stage], _outlook(hides=hides, fixed=1.5)
  )
  assert one.overhead == pytest.approx(overhead)
  assert one.recovery_seconds == pytest.approx(1.5 + seconds)
  assert one.ettr == pytest.approx(
    1 / ((1 + one.overhead) * (1 + one.recovery_seconds / 100))
  )
  assert one.fields()['ettr'] == one.ettr


def test_the_most_expensive_stage_counts():
  small, large = _stage(48.0, (1,) * 4), _stage(48.0, update_seconds=9.0)
  alone = replay_choice.predict('updates', _window(4), [large], _outlook())
  both = replay_choice.predict(
    'updates', _window(4), [small, large], _outlook()
  )
  assert both == alone


def test_shares_are_copied_but_all_are_read():
  stage = _stage(48.0)
  order = stage.operators.order
  shared = dataclasses.replace(
    stage,
    operators=dataclasses.replace(
      stage.operators, shares=(frozenset(order[::2]), frozenset(order[1::2]))
    ),
  )
  outlook = _outlook(hides=False)
  whole, half = (
    replay_choice.predict('updates', _window(4), [one], outlook)
    for one in (stage, shared)
  )
  assert half.overhead == pytest.approx(whole.overhead / 2)
  # The copy is late by half as much; reads are the same.
  assert half.recovery_seconds == pytest.approx(whole.recovery_seconds - 0.5)


def test_an_update_takes_no_longer_than_its_bytes_over_the_link():
  stage = _stage(48.0)
  bound = replay_choice.update_seconds(stage.operators, stage.budget)
  assert bound == pytest.approx((2 * 96 + 32) / 48)


@pytest.mark.parametrize(
  ('bandwidth', 'hides', 'room', 'length'),
  [
    (96.0, True, None, 1),  # all fits: nothing is applied, and least is read
    (95.0, True, None, 2),
    (64.0, True, None, 2),
    (63.0, True, None, 3),
    (96.0, True, 63.0, 3),  # host memory has room for less
    (96.0, False, None, 8),  # a longer window copies less
    (40.0, True, None, 8),
    (39.0, True, None, None),  # 32 + 8 bytes do not fit one second
    (96.0, True, 39.0, None),
  ],
)
def test_windows_of_updates(bandwidth, hides, room, length):
  stage = _stage(bandwidth, update_seconds=0.01)
  found = replay_choice.of_updates(
    [stage], _outlook(1e3, hides=hides), range(1, 9), room and [room] or ()
  )
  assert (found and found.choice.window_length) == length


def test_failures_that_are_rare_are_not_worth_larger_copies():
  # Where copies cost time.
  chosen = []
  for mtbf in (10.0, 1e3, 1e7):
    outlook = _outlook(mtbf, hides=False)
    ways = [
      replay_choice.predict(
        replay,
        _window(4),
        [_stage(1e4, rest=4 if replay == 'updates' else 2)],
        outlook,
      )
      for replay in decision.REPLAYS
    ]
    chosen.append(replay_choice.best(ways).replay)
  assert chosen == ['updates', 'updates', 'microbatches']


def test_of_equal_ones_the_first():
  one = replay_choice.predict(
    'microbatches', _window(2), [_stage(48.0)], _outlook()
  )
  other = dataclasses.replace(one, replay='updates')
  assert replay_choice.best([one, other]) == one


@hypothesis.settings(deadline=None)
@hypothesis.given(
  st.lists(
    st.tuples(
      st.lists(st.integers(1, 9), min_size=2, max_size=6),
      st.floats(1.0, 1e4),
      st.floats(0.0, 10.0),
    ),
    min_size=1,
    max_size=3,
  ),
  st.floats(1.0, 1e6),
  st.booleans(),
  st.integers(1, 8),
  st.one_of(st.none(), st.floats(1.0, 500.0)),
  st.sampled_from([0.02, 0.5, 1.0]),
)
def test_nothing_that_fits_is_better(
  stages, mtbf, hides, longest, room, target
):
  made = [
    _stage(bandwidth, sizes, update_seconds=seconds, share=target)
    for sizes, bandwidth, seconds in stages
  ]
  outlook = _outlook(mtbf, hides=hides)
  rooms = [room] * len(made) if room else ()
  found = replay_choice.of_updates(made, outlook, range(1, longest + 1), rooms)
  fitting = [
    replay_choice.predict('updates', _window(length), made, outlook)
    for length in range(1, longest + 1)
    if all(
      max(one.operators.snapshot_bytes(length, 'rolling'))
      <= min(one.budget.target_bytes, room or 1e9)
      for one in made
    )
  ]
  assert (found is None) == (not fitting)
  if found is None:
    return
  assert found.ettr == max(one.ettr for one in fitting)
  again = replay_choice.predict(
    'microbatches',
    _window(longest),
    [
      dataclasses.replace(
        one,
        operators=dataclasses.replace(
          one.operators,
          rest_bytes={o: n // 6 for o, n in one.operators.state_bytes.items()},
        ),
      )
      for one in made
    ],
    outlook,
  )
  chosen = replay_choice.best([again, found])
  assert chosen.ettr == max(again.ettr, found.ettr)
  assert 0 < chosen.ettr <= 1
  # More failures never make it more.
  worse = replay_choice.predict(
    found.replay, found.choice, made, _outlook(mtbf / 2, hides=hides)
  )
  assert worse.ettr <= found.ettr
