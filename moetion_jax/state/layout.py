"""Layout of a training state, for whoever captures or folds it."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence

import jax
import numpy as np

from moetion_jax import keys
from moetion_jax.state import division, partition as partition_lib

# The dtype in which gradients are summed, and in which `update` reads them.
GRADIENT_DTYPE = np.dtype(np.float32)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layout:
  """Layout of a training state: its leaves, operators and devices.

  Attributes:
    partition: partition of the state into operators.
    compute: name of the compute weight of each leaf that holds masters, by the
      leaf's path.
    compute_dtypes: dtype of each compute weight, by name.
    compute_shapes: shape of each compute weight that may differ from its
      master's, by name: where replicas share the training state, it is that of
      all experts.
    shared: paths of leaves that belong to no operator (step counts, random
      keys): they are part of every snapshot.
    mesh: mesh over whose axis 'expert' the stacked leaves are spread; None for
      the state of a loop that is not ours.
    placements: shardings of the leaves that were put somewhere, by path; used
      without a mesh.
  """

  partition: partition_lib.Partition
  compute: Mapping[str, str]
  compute_dtypes: Mapping[str, np.dtype]
  compute_shapes: Mapping[str, tuple[int, ...]] = dataclasses.field(
    default_factory=dict
  )
  shared: frozenset[str] = frozenset()
  mesh: jax.sharding.Mesh | None = None
  placements: Mapping[str, jax.sharding.Sharding] = dataclasses.field(
    default_factory=dict
  )

  @property
  def is_spread(self) -> bool:
    """True if leaves lie on several devices, in ways that are not ours."""
    return is_spread(self.placements)

  @property
  def expert_devices(self) -> int:
    """Number of devices that a stacked group's operators are spread over."""
    return self.mesh.shape['expert'] if self.mesh is not None else 1

  @property
  def operators(self) -> tuple[keys.OperatorId, ...]:
    """Operators that are captured slot by slot; shared leaves are in none."""
    shared = {x.group.name for x in self.leaves if x.path in self.shared}
    return tuple(o for o in self.partition.operators if o.group not in shared)

  @property
  def leaves(self) -> tuple[partition_lib.Leaf, ...]:
    """Leaves in the order in which the state flattens."""
    return self.partition.leaves

  def leaves_of(self, group: str) -> list[partition_lib.Leaf]:
    """Lists the leaves of a group."""
    return list(self._by_group[group])

  def state_bytes(self) -> dict[keys.OperatorId, int]:
    """Returns the bytes of each operator's training state."""
    return dict(self._state_bytes)

  def compute_bytes(self) -> dict[keys.OperatorId, int]:
    """Returns the bytes of each operator's compute weights."""
    return dict(self._compute_bytes)

  def gradient_bytes(self) -> dict[keys.OperatorId, int]:
    """Returns the bytes of each operator's gradients."""
    return dict(self._gradient_bytes)

  def compute_shape(self, leaf: partition_lib.Leaf) -> tuple[int, ...]:
    """Returns the shape of a master's compute weight."""
    return self.compute_shapes.get(self.compute[leaf.path], leaf.shape)

  def shares(self, replicas: int) -> tuple[frozenset[keys.OperatorId], ...]:
    """Returns the operators that each replica captures; see `divide`."""
    devices = self.partition.devices(self.expert_devices)
    return division.divide(self._state_bytes, replicas, devices.get)

  # Asked for by every block of a snapshot.
  @functools.cached_property
  def _by_group(self) -> Mapping[str, Sequence[partition_lib.Leaf]]:
    found: dict[str, list[partition_lib.Leaf]] = {}
    for leaf in self.leaves:
      found.setdefault(leaf.group.name, []).append(leaf)
    return found

  # Asked for in every iteration.
  @functools.cached_property
  def _state_bytes(self) -> Mapping[keys.OperatorId, int]:
    sizes = self.partition.operator_bytes
    return {o: sizes[o] for o in self.operators}

  @functools.cached_property
  def _compute_bytes(self) -> Mapping[keys.OperatorId, int]:
    return self._bytes_by_master(
      lambda name: self.compute_dtypes[name].itemsize
    )

  @functools.cached_property
  def _gradient_bytes(self) -> Mapping[keys.OperatorId, int]:
    return self._bytes_by_master(lambda name: GRADIENT_DTYPE.itemsize)

  def _bytes_by_master(
    self, width: Callable[[str], int]
  ) -> dict[keys.OperatorId, int]:
    """Sums, over an operator's masters, the bytes of as many other numbers."""
    total = dict.fromkeys(self.operators, 0)
    for leaf in self.leaves:
      if name := self.compute.get(leaf.path):
        numbers = leaf.operator_bytes // leaf.dtype.itemsize
        for operator in self.partition.operators_of(leaf.group.name):
          total[operator] += numbers * width(name)
    return total


def is_spread(placements: Mapping[str, jax.sharding.Sharding]) -> bool:
  """Returns whether one of the placements is on several devices."""
  return any(len(x.device_set) > 1 for x in placements.values())
