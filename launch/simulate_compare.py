"""Our figures beside others': pure."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

NO_NUMBER = '-'


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
  """A figure of the paper and ours.

  Attributes:
    name: what it is.
    paper: as the issue gives it.
    ours: from the simulation.
    difference: ours less the nearest of the paper's.
    why: where it comes from.
    value: ours as numbers.
  """

  name: str
  paper: str
  ours: str
  difference: str
  why: str
  value: tuple[float, ...]


def difference(values: Sequence[float], low: float, high: float) -> float:
  """By how much the farthest of our values is outside the paper's range."""
  outside = [min(v - low, 0.0) or max(v - high, 0.0) for v in values]
  return max(outside, key=abs)


def lost_seconds(ettr: float, mtbf_seconds: float, overhead: float) -> float:
  """What a failure must cost in all for an ETTR, if it is its only loss."""
  return mtbf_seconds * (1 / (ettr * (1 + overhead)) - 1)


def row(
  name: str,
  paper: str,
  values: Sequence[float],
  low: float,
  high: float,
  why: str,
  text: str = '{:.3f}',
) -> Row:
  """A row.

  Args:
    name: of the figure.
    paper: its numbers, as text.
    values: ours.
    low: of the paper.
    high: of the paper.
    why: they differ.
    text: format of one of ours.
  """
  shown = sorted({text.format(v) for v in values}, key=lambda t: (len(t), t))
  ours = shown[0] if len(shown) == 1 else f'{shown[0]} to {shown[-1]}'
  off = difference(values, low, high)
  where = text.format(off) if off else 'within'
  return Row(
    name=name,
    paper=paper,
    ours=ours,
    difference='' if paper == NO_NUMBER else where,
    why=why,
    value=tuple(values),
  )
