"""Sums over a stage's replicas whose bits do not depend on who does what.

Floating-point addition is not associative, and collectives add in an order of
their own, another one for every size of the world. So that a stage may go on
with fewer workers, each doing several replicas' microbatches, and come to the
same bits: what replicas have is added in the order of their numbers, and what
one replica's devices have in theirs. A worker brings what its replicas have in
*lanes*, one each.

As a ring would, an exchange gives every device a part of the numbers to add, in
which it has everybody's, and the parts are gathered: as many bytes on the wire.

The functions are for use inside `shard_map`.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import operator
from collections.abc import Sequence

import jax
from jax import numpy as jnp

from moetion_jax.programs import mesh
from moetion_jax.state import division


@dataclasses.dataclass(frozen=True)
class Order:
  """Who has what, and in which order it is added.

  Attributes:
    workers: of the stage world.
    devices: of each.
    places: of each replica, in the order of their numbers: worker and lane.
  """

  workers: int
  devices: int
  places: tuple[tuple[int, int], ...]

  @classmethod
  def of_team(
    cls, replicas: int, team: Sequence[int], devices: int = 1
  ) -> Order:
    """Of the replicas that have a worker, by position in the stage world.

    Raises:
      ValueError: nobody is left, or somebody is no replica.
    """
    place_of = {}
    stand_ins = division.stand_ins(replicas, team)
    for position, worker in enumerate(sorted(stand_ins)):
      for lane, replica in enumerate((worker, *stand_ins[worker])):
        place_of[replica] = position, lane
    return cls(
      len(stand_ins), devices, tuple(place_of[r] for r in range(replicas))
    )

  @property
  def lanes(self) -> int:
    """Of each worker; those beyond its replicas are not read."""
    return 1 + max(lane for _, lane in self.places)

  def sum(
    self, lanes: Sequence[jax.Array], over_devices: bool = True
  ) -> jax.Array:
    """The sum of what all replicas have, the same in all workers.

    Args:
      lanes: of this device, arrays of one shape.
      over_devices: whether it is also that of what a worker's devices have.
    """
    if len(self.places) == 1:  # the usual collective: nothing to stand in for
      return jax.lax.psum(lanes[0], mesh.AXES if over_devices else 'data')
    shape = lanes[0].shape
    x = jnp.stack([s.reshape(-1) for s in lanes])  # [lanes, numbers]
    if not over_devices or self.devices == 1:
      return self._over_workers(x).reshape(shape)
    parts = _exchange(x, 'expert', self.devices)
    part = self._over_workers(_left_to_right(list(parts)))
    return _gathered(part, 'expert', shape)

  def sum_over_devices(self, x: jax.Array) -> jax.Array:
    """The sum of what a worker's devices have; all workers have the same."""
    if len(self.places) == 1 or self.devices <= 2:  # of two: in any order
      return jax.lax.psum(x, 'expert')
    parts = _exchange(x.reshape(1, -1), 'expert', self.devices)
    return _gathered(_left_to_right(list(parts))[0], 'expert', x.shape)

  def _over_workers(self, x: jax.Array) -> jax.Array:
    """[lanes, numbers] of this worker -> [numbers] of all replicas."""
    if self.workers == 1:
      return _left_to_right([x[lane] for _, lane in self.places])
    if len(self.places) == self.workers == 2:  # of two: in any order
      return jax.lax.psum(x[0], 'data')
    parts = _exchange(x, 'data', self.workers)
    part = _left_to_right([parts[w, lane] for w, lane in self.places])
    return _gathered(part, 'data', x.shape[1:])


def _left_to_right(terms: Sequence[jax.Array]) -> jax.Array:
  return functools.reduce(operator.add, terms)


def _exchange(x: jax.Array, axis: str, size: int) -> jax.Array:
  """[lanes, numbers] -> [size, lanes, part]: everybody's, of this one's part.

  Args:
    x: of this device.
    axis: of the mesh.
    size: of the axis.
  """
  part = -(-x.shape[1] // size)
  x = jnp.pad(x, ((0, 0), (0, part * size - x.shape[1])))
  x = x.reshape(x.shape[0], size, part)
  return jax.lax.all_to_all(x, axis, split_axis=1, concat_axis=0)


def _gathered(part: jax.Array, axis: str, shape: Sequence[int]) -> jax.Array:
  """Everybody's part -> all numbers, in a shape."""
  numbers = jax.lax.all_gather(part, axis, tiled=True)
  return numbers[: math.prod(shape)].reshape(shape)
