"""Medians and intervals of paired measurements."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np


@dataclasses.dataclass(frozen=True, kw_only=True)
class Summary:
  """Median of a sample with its 95 % interval and quartiles."""

  median: float
  low: float
  high: float
  quartile_1: float
  quartile_3: float
  count: int


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
