"""Sums have the same bits whoever does what."""

import functools

import chex
import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from launch.lm import transformer_job
from moetion_jax.programs import compilation, mesh, ordered_sum
from tests.support import helpers

# Replicas, those with a worker, devices of each.
_TEAMS = [
  (2, (0, 1), 1),
  (2, (1,), 1),
  (2, (0, 1), 2),
  (2, (1,), 2),
  (3, (0, 1, 2), 1),
  (3, (0, 2), 1),
  (3, (1, 2), 2),
  (3, (2,), 1),
  (3, (1,), 4),
  (4, (0, 1, 2, 3), 1),
  (4, (0, 2, 3), 1),
  (5, (3, 4), 2),
]


def _terms(replicas, devices, shape):
  """f32[replicas, devices, ...] of which other orders have other sums."""
  random = np.random.default_rng(3)
  size = replicas, devices, *shape
  scales = 2.0 ** random.integers(-12, 12, size)
  return (random.standard_normal(size) * scales).astype(np.float32)


def _in_lanes(order, terms):
  """f32[lanes, workers, ...]: NaN where nobody has anything."""
  lanes = np.full((order.lanes, order.workers, *terms.shape[1:]), np.nan)
  for (worker, lane), term in zip(order.places, terms, strict=True):
    lanes[lane, worker] = term
  return lanes.astype(np.float32)


@pytest.mark.parametrize(
  ('replicas', 'team', 'places'),
  [
    (1, [0], ((0, 0),)),
    (3, [2, 0, 1], ((0, 0), (1, 0), (2, 0))),
    (3, [0, 2], ((0, 0), (0, 1), (1, 0))),
    (3, [1], ((0, 1), (0, 0), (0, 2))),
    (5, [3, 4], ((0, 1), (1, 1), (0, 2), (0, 0), (1, 0))),
  ],
)
def test_who_has_what(replicas, team, places):
  order = ordered_sum.Order.of_team(replicas, team)
  assert order.places == places
  assert order.workers == len(team)
  assert order.lanes == -(-replicas // len(team))


@pytest.mark.parametrize(('replicas', 'team', 'devices'), _TEAMS)
@pytest.mark.parametrize('shape', [(), (7,), (3, 8)])
@pytest.mark.parametrize('over_devices', [False, True])
def test_the_sum_is_from_left_to_right(
  replicas, team, devices, shape, over_devices
):
  order = ordered_sum.Order.of_team(replicas, team, devices)
  terms = _terms(replicas, devices, shape)
  world = mesh.make_mesh(jax.devices()[: len(team) * devices], order.workers)
  spec = PartitionSpec(None, *mesh.AXES)

  def sum_of(lanes):
    return order.sum([s[0, 0] for s in lanes], over_devices)[None, None]

  found = jax.jit(
    jax.shard_map(
      sum_of,
      mesh=world,
      in_specs=spec,
      out_specs=PartitionSpec(*mesh.AXES),
    )
  )(_in_lanes(order, terms))
  expected = terms
  if over_devices:
    total = functools.reduce(np.add, np.moveaxis(terms, 1, 0))
    expected = np.broadcast_to(total[:, None], terms.shape)
  expected = functools.reduce(np.add, expected)
  assert found.shape == (order.workers, devices, *shape)
  for of_worker in np.asarray(found):
    chex.assert_trees_all_equal(of_worker, expected)


@pytest.mark.parametrize('devices', [1, 2, 4])
def test_sums_over_devices(devices):
  order = ordered_sum.Order.of_team(2, [1], devices)
  terms = _terms(1, devices, ())[0]
  found = jax.jit(
    jax.shard_map(
      lambda x: order.sum_over_devices(x[0])[None],
      mesh=mesh.make_mesh(jax.devices()[:devices]),
      in_specs=mesh.EXPERT,
      out_specs=mesh.EXPERT,
    )
  )(terms)
  expected = functools.reduce(np.add, terms)
  chex.assert_trees_all_equal(np.asarray(found), np.full(devices, expected))


def _reduced(config, team):
  """What `reduce` makes of terms that depend on replica and shape alone."""
  devices = config.train.local_devices
  declared = transformer_job.of(config).declare_stage(0, team)
  order = declared.functions.order
  own = mesh.make_mesh(jax.devices()[:devices])
  world = mesh.make_mesh(jax.devices()[: len(team) * devices], len(team))
  traced = declared.on(own, world).trace().traced['reduce']

  def fill(like):
    shape = like.shape[0] // order.workers, *like.shape[1:]
    terms = _in_lanes(order, _terms(config.train.replicas, 1, shape)[:, 0])
    with np.errstate(invalid='ignore'):  # NaN as a whole number
      return terms.reshape(order.lanes, *like.shape).astype(like.dtype)

  def lanes(like):
    filled = jax.tree.map(fill, like[0])
    return tuple(
      jax.tree.map(lambda x, lane=lane: x[lane], filled)
      for lane in range(order.lanes)
    )

  one = compilation.TracedPrograms({'reduce': traced})
  lowered = one.lower(compilation.platform_of(own))
  reduce = lowered.compile_each(own, world=world)['reduce']
  return jax.device_get(reduce(*map(lanes, traced.args_info[0])))


@pytest.mark.thorough
@pytest.mark.parametrize('balance', ['loss', 'bias'])
@pytest.mark.parametrize(
  ('replicas', 'devices', 'teams'),
  [
    (2, 2, [(0, 1), (0,), (1,)]),
    (3, 1, [(0, 1, 2), (0, 1), (0, 2), (1, 2), (0,), (2,)]),
  ],
)
def test_an_iteration_comes_to_the_same_whoever_does_the_microbatches(
  replicas, devices, teams, balance
):
  """Gradients, their norm, losses, loads: all that `reduce` returns."""
  config = helpers.micro_run(
    replicas=replicas,
    local_devices=devices,
    microbatches=2,
    model={'balance': balance},
  )
  first, *others = [_reduced(config, team) for team in teams]
  assert np.isfinite(first[1]['squared_norm'])
  for other in others:
    chex.assert_trees_all_equal(other, first)
