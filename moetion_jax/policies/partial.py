"""Which experts the policy `partial` saves, and what a restore loses.

Pure functions; the leader decides by them, and the simulator asks the same ones.
The policy is PEC, the partial experts checkpointing of "MoC-System: Efficient
Fault Tolerance for Sparse Mixture-of-Experts Model Training" (arXiv
2408.04307), and, for `popularity`, the first preprint of MoEtion (arXiv
2412.15411v1).
"""

from __future__ import annotations

import collections
from collections.abc import Iterable, Mapping, Sequence

from moetion_jax import keys
from moetion_jax.policies import popularity as popularity_lib, rules, slots

# Of lost tokens, after which PEC saves more experts; MoC-System's default.
PLT_BUDGET = 0.0375
# Of an expert after a fault, with 'popularity'.
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
  """The experts of one layer that a checkpoint saves (PEC).

  - 'sequential' takes them in turn: checkpoint n the `count` that follow those
    of checkpoint n - 1, around and around;
  - 'load_aware' takes those that most tokens have trained since they were
    saved (MoC-System);
  - 'popularity' takes those that most tokens choose (MoEtion's first preprint:
    it makes use of that popularity is skewed).

  Equals go by OperatorId. Whoever was not saved for `max_age` checkpoints comes
  before all others: that is ours, since host memory holds so many of them only.

  Args:
    kind: one of SELECTIONS.
    experts: of the layer.
    count: how many to take; all if there are no more.
    number: of the checkpoint, from 0, for 'sequential'.
    unsaved_tokens: of each expert, for 'load_aware'; 0 where missing.
    popularity: tokens an iteration, for 'popularity'; 0 where missing.
    ages: checkpoints since each expert was saved; 0 where missing.
    max_age: None for no limit.
  """
  rules.check_known('partial_select', kind, SELECTIONS)
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
  """Bytes of a checkpoint of `count` experts a layer and all else whole.

  Args:
    state_bytes: training state of all operators.
    count: experts a layer.
    kind: 'largest' experts of each layer, or the 'mean' of them, rounded up.
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
  """Of which iteration each expert is that a restore puts together.

  Args:
    saved: iteration of every checkpoint that there is, and its experts.
    experts: all.
    start: iteration of the checkpoint that everything else is taken from:
      what is newer does not count.

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
  """Tokens that trained each expert and that a restore forgets.

  Those after its version and up to the start: what comes later is done again.

  Args:
    loads: by iteration, tokens of each expert.
    versions: see `restored_versions`.
    start: to which the run goes back.
  """
  lost = dict.fromkeys(versions, 0.0)
  for iteration, load in loads.items():
    for expert, version in versions.items():
      if version < iteration <= start:
        lost[expert] += load.get(expert, 0.0)
  return lost


def proportion_of_lost_tokens(lost: float, processed: float) -> float:
  """PLT: lost tokens over all that experts have processed so far.

  A token counts once for each expert that it went to, in both. Of a whole run
  it is the sum over its restores (MoC-System's measure of what PEC costs).

  Args:
    lost: by all experts, in all restores.
    processed: by all experts.
  """
  return lost / processed if processed > 0 else 0.0


def raised_experts(
  count: int, experts: int, plt: float, plt_budget: float = PLT_BUDGET
) -> int:
  """Experts a layer from the next checkpoint on, after a restore.

  Doubled when the proportion of lost tokens is beyond its budget (MoC-System
  raises it as faults accumulate), up to all experts: then nothing is lost.

  Args:
    count: so far.
    experts: that a layer has.
    plt: of all restores so far.
    plt_budget: that may be lost.
  """
  return min(experts, count * 2 if plt > plt_budget else count)


def capacity_factors(
  lost: popularity_lib.Rates,
  rates: popularity_lib.Rates,
  iterations: int,
  max_factor: float = MAX_CAPACITY_FACTOR,
) -> dict[keys.OperatorId, float]:
  """By how much experts' capacities grow after a fault.

  MoEtion's first preprint lets experts that lost tokens take more of them
  after a fault. Here each may take what it lost on top of its rate, spread
  over some iterations.

  Args:
    lost: tokens of each expert, see `lost_tokens`.
    rates: tokens an iteration of each expert.
    iterations: in which to make up for them.
    max_factor: of a capacity.

  Returns:
    A factor from 1 on for each expert; the largest where it has no rate.
  """
  if iterations < 1 or max_factor < 1:
    raise ValueError(f'{iterations=}, {max_factor=}')
  factors = {}
  for expert, tokens in lost.items():
    usual = rates.get(expert, 0.0) * iterations
    factor = 1 + tokens / usual if usual else max_factor if tokens else 1.0
    factors[expert] = min(max_factor, factor)
  return factors
