"""Operators, slots and decisions: written in words, or drawn at random."""

from __future__ import annotations

import hypothesis.strategies as st

from moetion_jax import keys
from moetion_jax.policies import decision as decision_lib
from moetion_jax.snapshots import coverage


def operator(name: str) -> keys.OperatorId:
  """'a0' is expert 0 of group a, 'a' the one operator of group a."""
  return keys.OperatorId(name[0], int(name[1:]) if name[1:] else -1)


def operators(text: str) -> tuple[keys.OperatorId, ...]:
  """'a0 a1 e', in that order."""
  return tuple(map(operator, text.split()))


def sizes(text: str) -> dict[keys.OperatorId, int]:
  """'a0:3 b:5' in bytes, in that order."""
  pairs = (word.split(':') for word in text.split())
  return {operator(name): int(size) for name, size in pairs}


def rates(text: str) -> dict[keys.OperatorId, float]:
  """'a0:.5 a1:2', in that order."""
  pairs = (word.split(':') for word in text.split())
  return {operator(name): float(rate) for name, rate in pairs}


def slots(*texts: str) -> decision_lib.Slots:
  """One slot from each text of operators."""
  return tuple(frozenset(operators(t)) for t in texts)


def contents(
  state: str = '', compute: str = '', gradients: str = ''
) -> coverage.Contents:
  """What a snapshot holds of operators, each given as a text."""
  return coverage.Contents(*slots(state, compute, gradients))


def decision(
  *texts: str,
  first: int = 10,
  mode: str = 'rolling',
  every: int = 1,
  replay: str = decision_lib.MICROBATCHES,
) -> decision_lib.CaptureDecision:
  """The decision for the slots of these texts, from an iteration on."""
  return decision_lib.CaptureDecision(
    first_iteration=first,
    window_length=len(texts),
    mode=mode,
    every=every,
    slots=slots(*texts),
    replay=replay,
  )


@st.composite
def stages(draw, most_operators=8, most_slots=4):
  """(bytes by operator, in order; window length; device_of)."""
  devices = draw(st.sampled_from([1, 2, 3]))
  drawn = draw(st.lists(st.integers(0, 12), max_size=most_operators))
  bytes_of, homes = {}, {}
  for i, size in enumerate(drawn):
    expert = draw(st.booleans())
    name = keys.OperatorId('a', i) if expert else keys.OperatorId(f'e{i}')
    bytes_of[name] = size
    homes[name] = draw(st.integers(0, devices - 1)) if expert else None
  return bytes_of, draw(st.integers(1, most_slots)), homes.get
