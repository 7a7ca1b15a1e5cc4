"""Who of a stage's workers does what: pure.

All have the same state, so a snapshot of it is divided: each captures its
share, and the stage's snapshot exists when all shares do (DESIGN section 5).
The microbatches of a replica that has no worker are another one's to do.
"""

from __future__ import annotations

import collections
from collections.abc import Callable, Collection, Mapping

from moetion_jax import keys


def on_no_device(operator: keys.OperatorId) -> int | None:
  """Where the operators are of a worker with one device."""
  del operator
  return None


def divide(
  sizes: Mapping[keys.OperatorId, int],
  replicas: int,
  device_of: Callable[[keys.OperatorId], int | None] = on_no_device,
) -> tuple[frozenset[keys.OperatorId], ...]:
  """Divides a stage's operators among its replicas, for good.

  Operators are dealt in their order, each to who has the least of that kind
  (experts, others) by then: experts of one layer, which are alike, go round, so
  that a slot of neighbours is divided as evenly as the whole. Those with the
  same place on each of a worker's devices go together: so all devices of a
  replica have as many.

  Args:
    sizes: bytes of each operator.
    replicas: of the stage.
    device_of: of a worker, which one holds an operator; None: all do.

  Returns:
    By replica; together they are all, no two share one.
  """
  shares: list[set[keys.OperatorId]] = [set() for _ in range(replicas)]
  loads = [[0, 0] for _ in range(replicas)]
  for dealt in _dealt_together(sizes, device_of):
    is_expert = int(dealt[0].expert >= 0)
    taker = min(
      range(replicas), key=lambda r: (loads[r][is_expert], sum(loads[r]), r)
    )
    shares[taker].update(dealt)
    loads[taker][is_expert] += sum(sizes[operator] for operator in dealt)
  return tuple(map(frozenset, shares))


def _dealt_together(
  operators: Collection[keys.OperatorId],
  device_of: Callable[[keys.OperatorId], int | None],
) -> list[list[keys.OperatorId]]:
  """Operators of one group that have the same place on their devices."""
  places: collections.Counter[tuple[str, int | None]] = collections.Counter()
  found: dict[tuple[str, int], list[keys.OperatorId]] = {}
  for operator in sorted(operators):
    where = operator.group, device_of(operator)
    found.setdefault((operator.group, places[where]), []).append(operator)
    places[where] += 1
  return list(found.values())


def stand_ins(
  replicas: int, team: Collection[int]
) -> dict[int, tuple[int, ...]]:
  """Which replicas without a worker each worker stands for (SlipStream).

  Args:
    replicas: of the stage, each with as many microbatches as any other.
    team: the replicas that have a worker.

  Returns:
    By worker, ascending. Nobody does much more than another: the replicas that
    are missing go round.

  Raises:
    ValueError: nobody is left, or somebody is no replica.
  """
  workers = sorted(set(team))
  if not workers or not set(workers) <= set(range(replicas)):
    raise ValueError(f'workers {workers} of {replicas} replicas')
  missing = [r for r in range(replicas) if r not in workers]
  return {
    worker: tuple(missing[place :: len(workers)])
    for place, worker in enumerate(workers)
  }
