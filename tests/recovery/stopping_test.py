import pytest

from moetion_jax.recovery import stopping


@pytest.mark.parametrize(
  ('limit', 'begun', 'expected'),
  [
    (5, {}, None),
    (5, {0: 4}, None),  # an answer is missing
    (5, {0: 4, 1: 3}, stopping.StopDecision(5, True)),
    (5, {0: 5, 1: 5}, stopping.StopDecision(5, True)),
    (5, {0: 6, 1: 5}, stopping.StopDecision(8, False)),  # one is beyond
    (
      5,
      {0: 9, 1: 9},
      stopping.StopDecision(10, False),
    ),  # no more than there are
    (10, {0: 10, 1: 9}, stopping.StopDecision(10, True)),
  ],
)
def test_decide(limit, begun, expected):
  assert stopping.decide(limit, begun, workers=2, iterations=10) == expected


def test_first_proposal():
  assert stopping.first_proposal(3, 10) == stopping.StopDecision(5, False)
  assert stopping.first_proposal(9, 10) == stopping.StopDecision(10, False)
