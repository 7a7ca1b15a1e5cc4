"""Which calls capture a slot."""

import hypothesis
import hypothesis.strategies as st
import pytest

from moetion_jax import keys
from moetion_jax.capture import sources


def _queues(*counts):
  """Of each source, as many operators of each device."""
  return [
    [
      [keys.OperatorId(f'g{s}', 100 * d + k) for k in range(count)]
      for d, count in enumerate(of_source)
    ]
    for s, of_source in enumerate(counts)
  ]


@pytest.mark.parametrize(
  ('counts', 'expected'),
  [
    # One source: the next size if it is half full, or the one below.
    ([[1]], [((0,), 1)]),
    ([[2]], [((0,), 4)]),
    ([[5]], [((0,), 4), ((0,), 1)]),
    ([[8]], [((0,), 16)]),
    ([[20]], [((0,), 16), ((0,), 4)]),
    # All of a family, or the one that has most.
    ([[4], [4], [4]], [((0, 1, 2), 4)]),
    ([[5], [4], [4]], [((0, 1, 2), 4), ((0,), 1)]),
    ([[5], [5], [4]], [((0, 1, 2), 4), ((0, 1, 2), 1)]),
    ([[0], [0], [4]], [((2,), 4)]),
    ([[1], [0], [9]], [((2,), 16), ((0,), 1)]),
    # Devices have rows each: who has fewer leaves some empty.
    ([[1, 1, 0, 1]], [((0,), 1)]),
    ([[4, 0, 0, 0]], [((0,), 4)]),
    ([[2, 2], [0, 2]], [((0, 1), 1), ((0, 1), 1)]),
  ],
)
def test_calls(counts, expected):
  calls = sources.deal(_queues(*counts), (16, 4, 1), may_pad=True)
  assert [(call.sources, call.rows) for call in calls] == expected


@pytest.mark.parametrize(
  ('counts', 'expected'),
  [
    ([1], [1]),
    ([3], [1, 1, 1]),
    ([5], [4, 1]),
    ([20], [16, 4]),
    ([4, 0, 1], [4]),
  ],
)
def test_calls_without_padding(counts, expected):
  calls = sources.deal(_queues(counts), (16, 4, 1), may_pad=False)
  assert [call.rows for call in calls] == expected


@hypothesis.given(
  st.integers(1, 4).flatmap(
    lambda devices: st.lists(
      st.lists(st.integers(0, 40), min_size=devices, max_size=devices),
      min_size=1,
      max_size=5,
    )
  )
)
def test_every_operator_is_in_one_call(counts):
  queues = _queues(*counts)
  found = []
  for call in sources.deal(queues, (16, 4, 1), may_pad=True):
    assert call.picked
    if len(call.sources) > 1:
      everything = call.rows * len(call.sources) * len(counts[0])
      assert 2 * len(call.picked) >= everything
    for (place, device, row), operator in call.picked.items():
      assert row < call.rows
      assert operator in queues[call.sources[place]][device]
      found.append(operator)
  expected = [o for of_source in queues for queue in of_source for o in queue]
  assert sorted(found) == sorted(expected)
