"""The state of anyone's loop as plain arrays, and back.

A captured leaf needs a shape and a dtype of its own. Typed random keys and
Python numbers have none. Where an array lies, or that it came from a Python
number, is not in its bits, but it changes what a step computes from it.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import jax
from jax import numpy as jnp

from moetion_jax.state import layout, partition


class Template:
  """Template of a loop's states, read from the initial one.

  Attributes:
    placements: shardings of the leaves that were put somewhere, by path; the
      others are wherever JAX puts them.
  """

  def __init__(self, state: Any):
    """Reads the initial state; keeps none of its arrays.

    Args:
      state: the initial state, a pytree of arrays, random keys and numbers.

    Raises:
      ValueError: a leaf is none of these, or is spread over processes.
    """
    leaves, self._structure = jax.tree.flatten(state)
    self._paths = partition.leaf_paths(state)
    self._keys: dict[int, Any] = {}  # implementation by place
    self._avals: list[tuple[tuple[int, ...], Any]] = []
    self.placements: dict[str, jax.sharding.Sharding] = {}
    for place, leaf in enumerate(leaves):
      if _is_key(leaf):
        self._keys[place] = jax.random.key_impl(leaf)
      try:
        array = self._array(place, leaf)
      except TypeError as error:
        raise ValueError(
          f'{self._paths[place]} is {type(leaf).__name__}, not an array'
        ) from error
      if not array.is_fully_addressable:
        raise ValueError(
          f'{self._paths[place]} lies on devices of other processes: this is '
          'for loops of one process'
        )
      self._avals.append((array.shape, array.dtype))
      if array.committed:
        self.placements[self._paths[place]] = array.sharding
    self._is_spread = layout.is_spread(self.placements)

  def plain(self, state: Any) -> list[jax.Array]:
    """Returns a state's leaves as arrays of numbers, without copies.

    Raises:
      ValueError: the state is not like the initial one.
    """
    leaves, structure = jax.tree.flatten(state)
    if structure != self._structure:
      raise ValueError(self._difference(state))
    arrays = [self._array(place, leaf) for place, leaf in enumerate(leaves)]
    for path, array, aval in zip(self._paths, arrays, self._avals, strict=True):
      if (array.shape, array.dtype) != aval:
        raise ValueError(
          f'{path} is {array.dtype}{array.shape}, in the initial state it was '
          f'{aval[1]}{aval[0]}'
        )
      if not self._is_spread and len(array.sharding.device_set) > 1:
        raise ValueError(
          f'{path} lies on {len(array.sharding.device_set)} devices, nothing '
          'of the initial state on more than one: put that where the step '
          'leaves it (jax.device_put), so that a restored one is put there too'
        )
    return arrays

  def weak(self, arrays: Sequence[jax.Array]) -> list[str]:
    """Lists the paths of arrays with the weak dtype of a Python number."""
    return [
      path
      for path, array in zip(self._paths, arrays, strict=True)
      if array.weak_type
    ]

  def state(self, arrays: Sequence[jax.Array], weak: Collection[str]) -> Any:
    """Rebuilds a state: the inverse of `plain` and `weak`, without copies.

    Only arrays without dims become weakly typed: nothing public makes others
    so.
    """
    leaves = list(arrays)
    for place, path in enumerate(self._paths):
      if path in weak and not leaves[place].shape:
        number = jnp.asarray(leaves[place].item())
        if number.dtype == leaves[place].dtype:
          leaves[place] = number
      if place in self._keys:
        leaves[place] = jax.random.wrap_key_data(
          leaves[place], impl=self._keys[place]
        )
    return jax.tree.unflatten(self._structure, leaves)

  def _difference(self, state: Any) -> str:
    """Says how a state's structure differs from that of the initial one."""
    paths = partition.leaf_paths(state)
    for about, ours, theirs in (
      ('is missing', self._paths, paths),
      ('is new', paths, self._paths),
    ):
      for path in ours:
        if path not in theirs:
          return f'{path} {about}: the initial state was another tree'
    return (
      f'the state is {jax.tree.structure(state)}, the initial one was '
      f'{self._structure}'
    )

  def _array(self, place: int, leaf: Any) -> jax.Array:
    if place in self._keys and _is_key(leaf):
      return jax.random.key_data(leaf)
    return leaf if isinstance(leaf, jax.Array) else jnp.asarray(leaf)


def auto(array: jax.Array) -> jax.Array:
  """Returns the array on a mesh whose axes XLA may use as it likes; no copy.

  On axes of type Explicit JAX refuses most operations that capture needs.
  """
  sharding = array.sharding
  if not isinstance(sharding, jax.sharding.NamedSharding):
    return array
  mesh = sharding.mesh
  kind = jax.sharding.AxisType.Auto
  if all(axis_type == kind for axis_type in mesh.axis_types):
    return array
  assert isinstance(mesh, jax.sharding.Mesh)
  free = jax.sharding.Mesh(
    mesh.devices, mesh.axis_names, axis_types=(kind,) * len(mesh.axis_names)
  )
  return jax.make_array_from_single_device_arrays(
    array.shape,
    jax.sharding.NamedSharding(
      free, sharding.spec, memory_kind=sharding.memory_kind
    ),
    [shard.data for shard in array.addressable_shards],
  )


def _is_key(leaf: Any) -> bool:
  return isinstance(leaf, jax.Array) and jax.dtypes.issubdtype(
    leaf.dtype, jax.dtypes.prng_key
  )
