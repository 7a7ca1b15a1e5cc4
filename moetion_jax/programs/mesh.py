"""Meshes of a worker and of its stage world, with devices or before any.

Axes: 'data' (replicas), 'expert' (a worker's devices). A worker's own mesh has
one replica, itself; `widen` and `narrow` lead from it to the stage world's and
back without a copy.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

AXES = ('data', 'expert')
# Stated, since it is not the default of every release of JAX: shardings belong
# to a program's arguments and to `shard_map`, not to array types.
_TYPES = (jax.sharding.AxisType.Auto,) * len(AXES)
OWN = PartitionSpec(AXES)  # a leading dim over all devices
EXPERT = PartitionSpec('expert')  # a leading dim over a worker's devices
SAME = PartitionSpec()  # the same on every device


def make_mesh(devices: Sequence[Any], replicas: int = 1) -> jax.sharding.Mesh:
  """Makes the stage world's mesh: replicas x devices of each worker."""
  return jax.sharding.Mesh(
    np.array(devices).reshape(replicas, -1), AXES, axis_types=_TYPES
  )


def abstract_mesh(
  local_devices: int, replicas: int = 1
) -> jax.sharding.AbstractMesh:
  """Makes an abstract mesh in the shape of `make_mesh`; needs no backend."""
  return jax.sharding.AbstractMesh(
    (replicas, local_devices), AXES, axis_types=_TYPES
  )


def shardings(
  mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh, specs: Any
) -> Any:
  """Makes the NamedShardings of a tree of specs."""
  return jax.tree.map(
    lambda s: NamedSharding(mesh, s),
    specs,
    is_leaf=lambda s: isinstance(s, PartitionSpec),
  )


def widen(tree: Any, world: jax.sharding.Mesh) -> Any:
  """Makes arrays on a worker's own mesh its shares of arrays over the world.

  Args:
    tree: tree of arrays, sharded over both axes along their first dim or, where
      that is of size 1, over 'data' there and 'expert' along the second.
    world: mesh of which the arrays' mesh is one row.
  """
  replicas = world.shape['data']

  def one(x: jax.Array) -> jax.Array:
    return jax.make_array_from_single_device_arrays(
      (x.shape[0] * replicas, *x.shape[1:]),
      NamedSharding(world, _spec(x)),
      [shard.data for shard in x.addressable_shards],
    )

  return jax.tree.map(one, tree)


def narrow(tree: Any, mesh: jax.sharding.Mesh) -> Any:
  """Puts arrays that are the same in all replicas on a worker's own mesh."""

  def one(x: jax.Array) -> jax.Array:
    return jax.make_array_from_single_device_arrays(
      x.shape,
      NamedSharding(mesh, _spec(x)),
      [shard.data for shard in x.addressable_shards],
    )

  return jax.tree.map(one, tree)


def _spec(x: jax.Array) -> PartitionSpec:
  assert isinstance(x.sharding, NamedSharding)
  return x.sharding.spec
