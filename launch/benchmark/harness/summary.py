"""Medians and intervals of paired measurements."""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Callable, Mapping, Sequence

import numpy as np

WARM_UP_ROUNDS = 3


@dataclasses.dataclass(frozen=True, kw_only=True)
class Summary:
  """Median of a sample with its 95 % interval and quartiles."""

  median: float
  low: float
  high: float
  quartile_1: float
  quartile_3: float
  count: int


# A name, what was measured of it, and a word on it.
Row = tuple[str, Summary, str]


def interleave(
  subjects: Mapping[str, Callable[[int], float | None]], rounds: int
) -> dict[str, list[float]]:
  """Seconds of each subject in each measured round, run in turn.

  A subject that times itself returns its seconds.
  Tells of each round as it goes: a machine may be gone before the last one.
  """
  seconds: dict[str, list[float]] = {name: [] for name in subjects}
  for number in range(WARM_UP_ROUNDS + rounds):
    is_measured = number >= WARM_UP_ROUNDS
    took: list[str] = []
    for name, subject in subjects.items():
      begin = time.perf_counter()
      own = subject(number + 1)
      passed = time.perf_counter() - begin if own is None else own
      took.append(f'{name} {passed:.4g} s')
      if is_measured:
        seconds[name].append(passed)
    print(
      f'{"measured" if is_measured else "warm-up"} round: ' + ', '.join(took),
      file=sys.stderr,
      flush=True,
    )
  return seconds


def summarize(sample: Sequence[float] | np.ndarray) -> Summary:
  """Median and bootstrap interval (fixed seed: a report can be repeated)."""
  values = np.asarray(sample, np.float64)
  random = np.random.default_rng(0)
  draws = random.integers(0, len(values), (2000, len(values)))
  medians = np.median(values[draws], axis=1)
  low, high = np.quantile(medians, [0.025, 0.975])
  quartile_1, quartile_3 = np.quantile(values, [0.25, 0.75])
  return Summary(
    median=float(np.median(values)),
    low=float(low),
    high=float(high),
    quartile_1=float(quartile_1),
    quartile_3=float(quartile_3),
    count=len(values),
  )


def paired_ratio(a: Sequence[float], b: Sequence[float]) -> Summary:
  """Of a/b, pair by pair: what drifts from pair to pair cancels."""
  return summarize(np.asarray(a, np.float64) / np.asarray(b, np.float64))
