"""A small training state of a user's own, and its layout."""

from __future__ import annotations

import jax
import numpy as np
from jax import numpy as jnp

from moetion_jax import keys
from moetion_jax.programs import mesh
from moetion_jax.state import layout, model, partition as partition_lib

EXPERTS = 8
# Two stacked groups of equal shapes, one of others, and two operators.
_SHAPES = {
  'a/experts': {'w': (EXPERTS, 3, 4), 'b': (EXPERTS, 5)},
  'b/experts': {'w': (EXPERTS, 3, 4), 'b': (EXPERTS, 5)},
  'c/experts': {'w': (EXPERTS, 2)},
  'head': {'w': (7, 2)},
  'router': {'w': (3,)},
}
SHARED = {'count': (np.int32, ()), 'key': (np.uint32, (2,))}


def make_state(seed=0):
  """A host state: masters, one moment, and leaves of no operator."""
  random = np.random.default_rng(seed)

  def tree():
    return {
      group: {
        name: random.standard_normal(shape).astype(np.float32)
        for name, shape in leaves.items()
      }
      for group, leaves in _SHAPES.items()
    }

  return {
    'moments': tree(),
    'params': tree(),
    **{
      name: random.integers(0, 1 << 30, shape).astype(dtype)
      for name, (dtype, shape) in SHARED.items()
    },
  }


def _rule(path):
  group = next((g for g in _SHAPES if f'/{g}/' in path), 'shared')
  return model.Group(group, group.endswith('experts'))


def make_layout(devices=1):
  """Of `make_state`; its compute weights are bf16, the router's fp32."""
  partition = partition_lib.Partition(make_state(), _rule)
  masters = [x.path for x in partition.leaves if x.path.startswith('params')]
  return layout.Layout(
    partition=partition,
    compute={path: path for path in masters},
    compute_dtypes={
      path: np.dtype(jnp.float32 if 'router' in path else jnp.bfloat16)
      for path in masters
    },
    shared=frozenset(SHARED),
    mesh=mesh.make_mesh(jax.devices()[:devices]) if devices > 1 else None,
  )


def place(of, state):
  """A host state on the layout's devices."""
  if of.mesh is None:
    return jax.tree.map(jnp.array, state)
  spread = jax.sharding.PartitionSpec('expert')
  flat, structure = jax.tree.flatten(state)
  placed = [
    jax.device_put(
      np.array(value),
      jax.sharding.NamedSharding(
        of.mesh, spread if leaf.group.stacked else mesh.SAME
      ),
    )
    for leaf, value in zip(of.leaves, flat, strict=True)
  ]
  # device_put may alias the host's memory; these may be donated.
  return jax.tree.unflatten(structure, [jnp.copy(x) for x in placed])


def compute_of(of, state):
  """Compute weights by name, fresh."""
  leaves = jax.tree.leaves(state)
  return {
    # A copy, also where the dtype is the same: the state is donated.
    of.compute[leaf.path]: jnp.array(
      value, of.compute_dtypes[leaf.path], copy=True
    )
    for leaf, value in zip(of.leaves, leaves, strict=True)
    if leaf.path in of.compute
  }


def operator(text):
  """'a/experts:3' or 'head'."""
  group, _, expert = text.partition(':')
  return keys.OperatorId(group, int(expert) if expert else -1)


def pick(*texts):
  return frozenset(map(operator, texts))


def pointers(tree):
  """Addresses of all devices' buffers of all leaves."""
  return {
    shard.data.unsafe_buffer_pointer()
    for leaf in jax.tree.leaves(tree)
    for shard in leaf.addressable_shards
  }
