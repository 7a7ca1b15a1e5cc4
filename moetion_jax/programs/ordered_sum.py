"""Sums over a stage's replicas whose bits do not depend on who does what.

Floating-point addition is not associative, and collectives add in an order of
their own, another one for every size of the world. A stage may go on with fewer
workers, each doing several replicas' microbatches, and has to come to the same
bits. Therefore terms of replicas are added in the order of the replicas'
numbers, and terms of one replica's devices in that of the devices'. A worker
brings the terms of its replicas in *lanes*, one each.

An exchange gives every device one part of the numbers, with everybody's terms
of that part; the device adds them, and the parts are gathered. A ring moves as
many bytes.

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
  """Order of a sum over replicas, and the worker and lane of each term.

  Attributes:
    workers: number of workers in the stage world.
    devices: number of devices of each worker.
    places: worker and lane of each replica, in the order of their numbers.
  """

  workers: int
  devices: int
  places: tuple[tuple[int, int], ...]

  @classmethod
  def of_team(
    cls, replicas: int, team: Sequence[int], devices: int = 1
  ) -> Order:
    """Makes the order for a team: the replicas that have a worker.

    Workers are numbered by their position in the stage world.

    Raises:
      ValueError: the team is empty, or a member of it is no replica.
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
    """Number of lanes of each worker; those beyond its replicas are unread."""
    return 1 + max(lane for _, lane in self.places)

  def sum(
    self, lanes: Sequence[jax.Array], over_devices: bool = True
  ) -> jax.Array:
    """Sums over all replicas; the result is the same in all workers.

    Args:
      lanes: this device's lanes, arrays of one shape.
      over_devices: whether to sum over each worker's devices too.
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
    """Sums over a worker's devices; all workers have the same terms."""
    if len(self.places) == 1 or self.devices <= 2:  # of two: in any order
      return jax.lax.psum(x, 'expert')
    parts = _exchange(x.reshape(1, -1), 'expert', self.devices)
    return _gathered(_left_to_right(list(parts))[0], 'expert', x.shape)

  def _over_workers(self, x: jax.Array) -> jax.Array:
    """Sums over replicas: [lanes, numbers] of this worker -> [numbers]."""
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
  """Gets its part of all lanes: [lanes, numbers] -> [size, lanes, part].

  Args:
    x: this device's lanes.
    axis: mesh axis to exchange over.
    size: size of the axis.
  """
  part = -(-x.shape[1] // size)
  x = jnp.pad(x, ((0, 0), (0, part * size - x.shape[1])))
  x = x.reshape(x.shape[0], size, part)
  return jax.lax.all_to_all(x, axis, split_axis=1, concat_axis=0)


def _gathered(part: jax.Array, axis: str, shape: Sequence[int]) -> jax.Array:
  """Gathers everybody's part: all numbers, in a shape."""
  numbers = jax.lax.all_gather(part, axis, tiled=True)
  return numbers[: math.prod(shape)].reshape(shape)
