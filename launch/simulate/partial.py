"""Partial experts checkpointing (PEC, MoC-System) in a simulation; pure.

`moetion_jax.policies.partial` tells which experts are saved, what a restore
loses and when k is raised.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from launch.simulate import methods, world as world_lib
from moetion_jax import keys
from moetion_jax.policies import partial
from moetion_jax.recovery import plan as recovery_plan


@dataclasses.dataclass(frozen=True, kw_only=True)
class PartialMemory:
  """The memory of PEC.

  Attributes:
    counts: (first iteration, experts a layer from there on), ascending.
    restored: iteration that the last restore went back to.
    lost: lost tokens of one layer's experts, of all restores.
  """

  counts: tuple[tuple[int, int], ...]
  restored: int = 0
  lost: float = 0.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Partial(methods.Whole):
  """PEC: k experts of each layer; stale ones on restore; k may be raised.

  All experts get equally many tokens here, so that they are saved in turn
  whether the selection is sequential or goes by load.

  Attributes:
    experts: experts of a layer.
    count: experts a layer in the first checkpoints.
    tokens: tokens of an iteration.
    choices_per_token: experts of a layer that a token goes to.
    plt_budget: proportion of lost tokens beyond which k is doubled.
    paces: the run's pace, by k.
    landings: `landing_seconds`, by k.
  """

  experts: int
  count: int
  tokens: float
  choices_per_token: int
  plt_budget: float = partial.PLT_BUDGET
  paces: Mapping[int, world_lib.Pace]
  landings: Mapping[int, float]

  def recover(
    self, world: world_lib.World, situation: world_lib.Situation
  ) -> world_lib.Outcome:
    """See `world.Method`."""
    memory = situation.memory or PartialMemory(counts=((0, self.count),))
    count = memory.counts[-1][1]
    now = dataclasses.replace(self, landing_seconds=self.landings[count])
    start, where = now.start(world, situation)
    operators = [keys.OperatorId('experts', e) for e in range(self.experts)]
    choices = self.tokens * self.choices_per_token
    lost = 0.0
    if start and where != recovery_plan.DURABLE:
      versions = self._versions(memory, operators, start)
      # What a restore before this one lost is not lost again.
      since = {o: max(v, memory.restored) for o, v in versions.items()}
      first = min(since.values()) + 1
      load = dict.fromkeys(operators, choices / self.experts)
      loads = dict.fromkeys(range(first, start + 1), load)
      lost = sum(partial.lost_tokens(loads, since, start).values())
    total = memory.lost + lost
    plt = partial.proportion_of_lost_tokens(
      total, choices * max(1, situation.completed)
    )
    raised = partial.raised_experts(count, self.experts, plt, self.plt_budget)
    counts = memory.counts
    if raised != count:
      counts = (*counts, (start + 1, raised))
    outcome = methods.everybody(world, start, self.reads.of(where))
    return dataclasses.replace(
      outcome,
      # Tokens, not choices: each of a token's choices is one of its parts.
      lost_tokens=lost / self.choices_per_token,
      memory=PartialMemory(counts=counts, restored=start, lost=total),
      pace=self.paces[raised],
    )

  def _versions(
    self,
    memory: PartialMemory,
    operators: list[keys.OperatorId],
    start: int,
  ) -> dict[keys.OperatorId, int]:
    """Returns the iteration that each expert is of after a restore."""
    saved: list[tuple[int, frozenset[keys.OperatorId]]] = []
    missing = set(operators)
    for iteration in range(start, 0, -self.interval):
      if not missing:
        break
      count = next(k for i, k in reversed(memory.counts) if i <= iteration)
      held = partial.select_experts(
        'sequential',
        operators,
        count,
        number=iteration // self.interval - 1,
      )
      saved.append((iteration, held))
      missing -= held
    return partial.restored_versions(saved, operators, start)
