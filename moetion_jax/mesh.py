"""A stage world's mesh, with devices or before there are any.

Axes: 'data' (replicas), 'expert' (a worker's devices).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

AXES = ('data', 'expert')
OWN = PartitionSpec(AXES)  # a leading dim over all devices
SAME = PartitionSpec()  # the same on every device


def make_mesh(devices: Sequence[Any], replicas: int = 1) -> jax.sharding.Mesh:
  """The stage world's mesh: replicas x devices of each worker."""
  return jax.sharding.Mesh(np.array(devices).reshape(replicas, -1), AXES)


def abstract_mesh(
  local_devices: int, replicas: int = 1
) -> jax.sharding.AbstractMesh:
  """The shape of `make_mesh`; needs no backend."""
  return jax.sharding.AbstractMesh((replicas, local_devices), AXES)


def shardings(
  mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh, specs: Any
) -> Any:
  """NamedShardings of a tree of specs."""
  return jax.tree.map(
    lambda s: NamedSharding(mesh, s),
    specs,
    is_leaf=lambda s: isinstance(s, PartitionSpec),
  )
