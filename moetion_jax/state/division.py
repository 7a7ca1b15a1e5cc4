"""Division of a stage's work among its workers, as pure functions.

All workers have the same state, so a snapshot of it is divided: each captures
its share, and the stage's snapshot exists when all shares do. Another worker
does the microbatches of a replica that has no worker.
"""

from __future__ import annotations

import collections
from collections.abc import Callable, Collection, Mapping

from moetion_jax import keys

# Returns which of a worker's devices, along the axis 'expert', holds an
# operator; None if all do.
DeviceOf = Callable[[keys.OperatorId], int | None]


def on_no_device(operator: keys.OperatorId) -> int | None:
  """Returns None: the only device of a worker holds all its operators."""
  del operator
  return None


def divide(
  sizes: Mapping[keys.OperatorId, int],
  replicas: int,
  device_of: DeviceOf = on_no_device,
) -> tuple[frozenset[keys.OperatorId], ...]:
  """Divides a stage's operators among its replicas, for good.

  Operators are dealt in their order, each to the replica that has the fewest
  bytes of that kind (experts, others) so far. Experts of one layer are alike
  and go round, so that a slot of neighbours is divided as evenly as the whole.
  Operators with the same place on each of a worker's devices go together, so
  that all devices of a replica have equally many.

  Args:
    sizes: bytes of each operator.
    replicas: number of replicas of the stage.
    device_of: places of the operators on a worker's devices.

  Returns:
    The operators of each replica. Every operator is in exactly one set.
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
  """Lists together a group's operators with the same place on their devices."""
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
  """Assigns the replicas without a worker to the workers (SlipStream).

  Args:
    replicas: number of replicas of the stage, all with equally many
      microbatches.
    team: the replicas that have a worker.

  Returns:
    The replicas that each worker stands in for, ascending, by worker. The
    missing replicas go round, so that no worker does much more than another.

  Raises:
    ValueError: the team is empty, or a member of it is no replica.
  """
  workers = sorted(set(team))
  if not workers or not set(workers) <= set(range(replicas)):
    raise ValueError(f'workers {workers} of {replicas} replicas')
  missing = [r for r in range(replicas) if r not in workers]
  return {
    worker: tuple(missing[place :: len(workers)])
    for place, worker in enumerate(workers)
  }
