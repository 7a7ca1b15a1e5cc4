"""Experts that the policy `partial` saves, and losses of a restore.

Pure functions; the leader and the simulator decide by the same ones. The policy
is PEC, the partial experts checkpointing of "MoC-System: Efficient Fault
Tolerance for Sparse Mixture-of-Experts Model Training" (arXiv 2408.04307), and,
for `popularity`, the first preprint of MoEtion (arXiv 2412.15411v1).
"""

from __future__ import annotations

import collections
import math
from collections.abc import Iterable, Mapping, Sequence

from moetion_jax import errors, keys
from moetion_jax.policies import popularity as popularity_lib, slots

# Proportion of lost tokens beyond which PEC saves more experts; MoC-System's
# default.
PLT_BUDGET = 0.0375
# Largest growth of an expert's capacity after a fault, with 'popularity'.
MAX_CAPACITY_FACTOR = 2.0
SELECTIONS = ('sequential', 'load_aware', 'popularity')


# ---- partial -----------------------------------------------------------------


def select_experts(
  kind: str,
  experts: Sequence[keys.OperatorId],
  count: int,
  *,
  number: int = 0,
  unsaved_tokens: popularity_lib.Rates | None = None,
  popularity: popularity_lib.Rates | None = None,
  ages: Mapping[keys.OperatorId, int] | None = None,
  max_age: int | None = None,
) -> frozenset[keys.OperatorId]:
  """Selects the experts of one layer that a checkpoint saves (PEC).

  - 'sequential' takes them in turn: checkpoint n the `count` that follow those
    of checkpoint n - 1, around and around;
  - 'load_aware' takes those that most tokens have trained since they were
    saved (MoC-System);
  - 'popularity' takes those that most tokens choose (MoEtion's first preprint,
    which makes use of skewed popularity).

  Ties go by OperatorId. An expert that was not saved for `max_age` checkpoints
  comes before all others: this rule is ours, since host memory holds only a
  limited number of checkpoints.

  Args:
    kind: one of SELECTIONS.
    experts: all experts of the layer.
    count: number of experts to take; all if there are no more.
    number: number of the checkpoint, from 0, for 'sequential'.
    unsaved_tokens: tokens that trained each expert since it was saved, for
      'load_aware'; 0 where missing.
    popularity: tokens an iteration, for 'popularity'; 0 where missing.
    ages: checkpoints since each expert was saved; 0 where missing.
    max_age: age from which an expert is overdue; None for no limit.
  """
  errors.check_known('partial_select', kind, SELECTIONS)
  if count < 1 or number < 0:
    raise ValueError(f'{count=} of checkpoint {number=}')
  ordered = sorted(experts)
  if count >= len(ordered):
    return frozenset(ordered)
  if kind == 'sequential':
    first = number * count
    turn = range(first, first + count)
    return frozenset(ordered[i % len(ordered)] for i in turn)
  weight = (unsaved_tokens if kind == 'load_aware' else popularity) or {}
  age = ages or {}
  overdue = {
    expert: age.get(expert, 0)
    for expert in ordered
    if max_age is not None and age.get(expert, 0) >= max_age
  }
  ordered.sort(
    key=lambda expert: (-overdue.get(expert, -1), -weight.get(expert, 0.0))
  )
  return frozenset(ordered[:count])


def partial_bytes(
  state_bytes: slots.Bytes, count: int, kind: str = 'largest'
) -> int:
  """Returns the bytes of a checkpoint of `count` experts a layer and all else.

  Args:
    state_bytes: training state of each operator.
    count: experts a layer.
    kind: 'largest' for the largest experts of each layer, 'mean' for average
      ones, rounded up.
  """
  by_layer: dict[str, list[int]] = collections.defaultdict(list)
  total = 0
  for operator, size in state_bytes.items():
    if operator.expert < 0:
      total += size
    else:
      by_layer[operator.group].append(size)
  for sizes in by_layer.values():
    taken = min(count, len(sizes))
    if kind == 'largest':
      total += sum(sorted(sizes, reverse=True)[:taken])
    else:
      total += -(-sum(sizes) * taken // len(sizes))
  return total


def restored_versions(
  saved: Iterable[tuple[int, Iterable[keys.OperatorId]]],
  experts: Iterable[keys.OperatorId],
  start: int,
) -> dict[keys.OperatorId, int]:
  """Returns the version, an iteration, of each expert in a restored state.

  Args:
    saved: the iteration of each existing checkpoint, and its experts.
    experts: all experts.
    start: iteration of the checkpoint that everything else is taken from;
      newer checkpoints do not count.

  Returns:
    The newest version up to the start; 0, the initial state, for an expert
    that was never saved.
  """
  versions = dict.fromkeys(experts, 0)
  for iteration, held in saved:
    if iteration <= start:
      for expert in held:
        if expert in versions:
          versions[expert] = max(versions[expert], iteration)
  return versions


def lost_tokens(
  loads: Mapping[int, popularity_lib.Rates],
  versions: Mapping[keys.OperatorId, int],
  start: int,
) -> dict[keys.OperatorId, float]:
  """Counts the tokens that trained each expert and that a restore forgets.

  They come after its version and up to the start; later ones are trained again.

  Args:
    loads: tokens of each expert, by iteration.
    versions: see `restored_versions`.
    start: the iteration to which the run goes back.
  """
  lost = dict.fromkeys(versions, 0.0)
  for iteration, load in loads.items():
    for expert, version in versions.items():
      if version < iteration <= start:
        lost[expert] += load.get(expert, 0.0)
  return lost


def proportion_of_lost_tokens(lost: float, processed: float) -> float:
  """Returns the PLT: lost tokens over all that experts have processed so far.

  A token counts once for each expert that it went to, in both. For a whole run
  the PLT is the sum over its restores (MoC-System's measure of what PEC costs).

  Args:
    lost: tokens that all experts lost in all restores.
    processed: tokens that all experts have processed.
  """
  return lost / processed if processed > 0 else 0.0


def raised_experts(
  count: int, experts: int, plt: float, plt_budget: float = PLT_BUDGET
) -> int:
  """Returns the experts a layer to save from now on, after a restore.

  Their number is doubled when the proportion of lost tokens is beyond its
  budget (MoC-System raises it as faults accumulate), up to all experts: then
  nothing is lost.

  Args:
    count: experts a layer so far.
    experts: number of experts of a layer.
    plt: the PLT of all restores so far.
    plt_budget: the PLT that is allowed.
  """
  return min(experts, count * 2 if plt > plt_budget else count)


def possible_counts(count: int, experts: int) -> list[int]:
  """Returns the numbers of experts that restores may raise `count` to."""
  counts = [count]
  while counts[-1] < experts:
    counts.append(raised_experts(counts[-1], experts, math.inf))
  return counts


def capacity_factors(
  lost: popularity_lib.Rates,
  rates: popularity_lib.Rates,
  iterations: int,
  max_factor: float = MAX_CAPACITY_FACTOR,
) -> dict[keys.OperatorId, float]:
  """Returns the factors by which experts' capacities grow after a fault.

  MoEtion's first preprint lets experts that lost tokens take more of them
  after a fault. Here each may take what it lost on top of its rate, spread
  over some iterations.

  Args:
    lost: lost tokens of each expert, see `lost_tokens`.
    rates: tokens an iteration of each expert.
    iterations: number of iterations in which to make up for them.
    max_factor: the largest factor.

  Returns:
    A factor of at least 1 for each expert; the largest where an expert that
    lost tokens has no rate.
  """
  if iterations < 1 or max_factor < 1:
    raise ValueError(f'{iterations=}, {max_factor=}')
  factors = {}
  for expert, tokens in lost.items():
    usual = rates.get(expert, 0.0) * iterations
    factor = 1 + tokens / usual if usual else max_factor if tokens else 1.0
    factors[expert] = min(max_factor, factor)
  return factors
