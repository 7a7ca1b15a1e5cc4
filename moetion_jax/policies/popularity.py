"""Popularity of experts, and the check whether it asks for a new order.

The paper is arXiv 2412.15411 (section 3.5, appendix B).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

from moetion_jax import errors, keys

ORDERS = ('static', 'count', 'soft_count', 'time_decayed', 'capacity_aware')

Rates = Mapping[keys.OperatorId, float]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Popularity:
  """Experts' counts in the last iterations (paper, appendix B).

  Attributes:
    kind: one of ORDERS; 'static' counts nothing. 'count' takes routed tokens,
      'soft_count' sums of router probabilities; in 'time_decayed' an iteration
      n ago weighs decay**n; 'capacity_aware' takes routed tokens in shares of
      the capacity: those beyond it are dropped and do not train the expert.
    window_iterations: number of iterations to look back on.
    decay: factor per iteration of 'time_decayed', in (0, 1].
    capacity: tokens that an expert takes in one iteration at most (all its
      microbatches), for 'capacity_aware'.
    history: counts of the last iterations, oldest first.
  """

  kind: str
  window_iterations: int = 100
  decay: float = 0.95
  capacity: float | None = None
  history: tuple[Rates, ...] = ()

  def __post_init__(self) -> None:
    errors.check_known('order', self.kind, ORDERS)
    if self.window_iterations < 1 or not 0 < self.decay <= 1:
      raise ValueError(f'{self.window_iterations=}, {self.decay=}')
    if self.kind == 'capacity_aware' and not (self.capacity or 0) > 0:
      raise ValueError(f'{self.capacity=} must be positive')


def observe(popularity: Popularity, counts: Rates) -> Popularity:
  """Takes one iteration's counts in; a missing expert had none."""
  for operator, count in counts.items():
    if not 0 <= count < math.inf:
      raise ValueError(f'{operator} has a count of {count}')
  if popularity.kind == 'static':
    return popularity
  history = (*popularity.history, dict(counts))
  history = history[-popularity.window_iterations :]
  return dataclasses.replace(popularity, history=history)


def rates(popularity: Popularity) -> dict[keys.OperatorId, float]:
  """Returns the weighted mean per iteration of each observed expert."""
  decay = popularity.decay if popularity.kind == 'time_decayed' else 1.0
  share = popularity.kind == 'capacity_aware'
  capacity = (popularity.capacity or 1.0) if share else 1.0
  total: dict[keys.OperatorId, float] = {}
  weights = 0.0
  for counts in popularity.history:
    weights = weights * decay + 1.0
    for expert in sorted(total.keys() | counts.keys()):
      count = counts.get(expert, 0.0) / capacity
      count = min(count, 1.0) if share else count
      total[expert] = total.get(expert, 0.0) * decay + count
  return {expert: count / weights for expert, count in total.items()}


def should_reorder(
  old_rates: Rates, new_rates: Rates, change: float = 0.10, share: float = 0.25
) -> bool:
  """Returns True if popularity moved enough for a new order (section 3.5).

  Args:
    old_rates: the rates from which the order in force was made.
    new_rates: the present rates. An expert that one of the two lacks has 0
      there.
    change: fraction of the old rate by which an expert's rate must move to
      count as changed; from 0, any move counts.
    share: least share of all experts that must have changed.
  """
  if change < 0 or not 0 < share <= 1:
    raise ValueError(f'change={change}, share={share}')
  experts = old_rates.keys() | new_rates.keys()
  pairs = [(old_rates.get(e, 0.0), new_rates.get(e, 0.0)) for e in experts]
  changed = sum(abs(new - old) > change * old for old, new in pairs)
  return changed > 0 and changed >= share * len(experts)
