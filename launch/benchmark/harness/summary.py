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
  """Median of a sample with its 95 % interval and quartiles.

  Attributes:
    median: the sample's median.
    low: lower end of the 95 % interval of the median.
    high: upper end of that interval.
    quartile_1: the first quartile.
    quartile_3: the third quartile.
    count: size of the sample.
  """

  median: float
  low: float
  high: float
  quartile_1: float
  quartile_3: float
  count: int


# Name of a figure, its summary, and its goal ('' for none).
Row = tuple[str, Summary, str]


def interleave(
  subjects: Mapping[str, Callable[[int], float | None]], rounds: int
) -> dict[str, list[float]]:
  """Runs the subjects in turn; returns seconds by subject and measured round.

  A subject that times itself returns its seconds. Every round is printed when
  it is done: the machine may be gone before the last one.

  Args:
    subjects: functions of the round's number, from 1, by name.
    rounds: measured rounds; WARM_UP_ROUNDS come before them.
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
  """Computes a bootstrap summary (fixed seed: a report can be repeated)."""
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
  """Summarizes a/b, pair by pair: drift from pair to pair cancels."""
  return summarize(np.asarray(a, np.float64) / np.asarray(b, np.float64))
