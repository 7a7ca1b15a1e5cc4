"""Pure functions of a stage, on one device's share.

They take plain dicts and tuples of arrays, and are traced inside `shard_map`
over axes 'data' (replicas) and 'expert' (a worker's devices). What is local to
a device has a leading dim of size 1, so that outside it is one array over the
mesh.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeAlias

import jax
import optax
from jax import numpy as jnp

from moetion_jax.programs import (
  compilation,
  mesh as mesh_lib,
  ordered_sum,
  residuals as residuals_lib,
)
from moetion_jax.state import (
  digest as digest_lib,
  model as model_lib,
  optimizer_update,
  partition as partition_lib,
  zero1,
)

Compute = dict[str, jax.Array]
Tree: TypeAlias = Any


class Functions:
  """Functions of one stage, as one of its workers runs them.

  Attributes:
    model: the stage's model.
    shape: sizes that the programs are compiled for.
    expert_devices: number of devices of the worker.
    ownership: operators that each replica owns, where the replicas share the
      training state; None where each has all of it.
    order: order in which sums over replicas are taken.
    groups: parameter names by group.
    own_groups: parameter names of the groups of which this worker has training
      state.
    state_shapes: shapes of the training state that this worker has.
    partition: operators of that state.
  """

  def __init__(
    self,
    model: model_lib.StageModel,
    optimizer: optax.GradientTransformation,
    shape: compilation.ProgramShape,
    expert_devices: int,
    ownership: zero1.Ownership | None = None,
  ):
    """Stores the arguments and derives shapes and operators from them."""
    self.model = model
    self.shape = shape
    self.expert_devices = expert_devices
    self.ownership = ownership
    self.optimizer = optimizer
    self.order = ordered_sum.Order.of_team(
      shape.replicas, shape.workers, expert_devices
    )
    self.groups = partition_lib.group_parameters(
      list(model.shapes), model.partition
    )
    self.own_groups = {
      g: names
      for g, names in self.groups.items()
      if ownership is None or ownership.has(g)
    }
    self.state_shapes = jax.eval_shape(self.init, dict(model.shapes))
    self.partition = partition_lib.Partition(
      self.state_shapes,
      partition_lib.state_rule(model.partition, list(model.shapes)),
      ownership.experts if ownership else None,
    )

  def sharded(self, position: int) -> Functions:
    """Makes the functions of worker `position`, which owns only its share.

    Raises:
      errors.ConfigError: there are more workers than can own something.
    """
    ownership = zero1.Ownership(
      self.model,
      self.groups,
      self.partition,
      replicas=self.shape.world_size,
      position=position,
      expert_devices=self.expert_devices,
    )
    return type(self)(
      self.model, self.optimizer, self.shape, self.expert_devices, ownership
    )

  def init(self, masters: Mapping[str, jax.Array]) -> partition_lib.State:
    """Makes this worker's state 0 from the fp32 masters of all parameters."""
    if self.ownership:
      masters = {
        n: self.ownership.rows(g, masters[n])
        for g, names in self.own_groups.items()
        for n in names
      }
    return {
      g.name: optimizer_update.init_group(
        self.optimizer,
        {n: masters[n] for n in names},
        stacked=g.stacked,
        buffers=self.model.buffers,
      )
      for g, names in self.own_groups.items()
    }

  def _trained(self, compute: Compute) -> Compute:
    return {n: w for n, w in compute.items() if n not in self.model.buffers}

  def forward(self, on_recipe, compute, inputs, position):
    """Runs forward: (compute, inputs, position) -> (y, residuals, counts).

    While it is traced, `on_recipe` is called with what `backward` needs to put
    the vjp function together again.
    """
    trained = self._trained(compute)
    position = position._replace(microbatch=position.microbatch[0])

    def objective(trained, x):
      out = self.model.forward(
        {**compute, **trained}, inputs._replace(x=x), position
      )
      y = () if out.y is None else out.y
      return (y, out.objective), out.counts

    if self.model.has_embedding:  # tokens have no gradient
      function = lambda trained: objective(trained, inputs.x)  # noqa: E731
      (y, _), vjp, counts = jax.vjp(function, trained, has_aux=True)
    else:
      (y, _), vjp, counts = jax.vjp(objective, trained, inputs.x, has_aux=True)
    residuals, recipe = residuals_lib.split(vjp, compute)
    on_recipe(recipe)
    return y, jax.tree.map(lambda r: r[None], residuals), _own(counts)

  def backward(self, recipe, compute, residuals, dy, acc):
    """Runs backward: (compute, residuals, dy, acc) -> (dx, acc)."""
    vjp = recipe.join(compute, [r[0] for r in residuals])
    # The objective is the mean over all replicas' devices and microbatches.
    share = 1.0 / self._terms
    cotangents = vjp((dy, jnp.float32(share)))
    acc = {
      n: a + cotangents[0][n][None].astype(jnp.float32) for n, a in acc.items()
    }
    dx = () if self.model.has_embedding else cotangents[1]
    return dx, acc

  @property
  def _terms(self) -> int:
    """Number of terms of the mean that is an iteration's loss."""
    devices = self.expert_devices * self.shape.replicas
    return devices * self.shape.microbatches

  def reduce(self, accs, counts):
    """Sums over all replicas: (accs, counts) -> (gradients, scalars)."""
    gradients, squares = {}, {True: [], False: []}
    for group, names in self.groups.items():
      for name in names:
        if name in self.model.buffers:
          continue
        gradients[name] = self.order.sum(
          [acc[name][0] for acc in accs], over_devices=not group.stacked
        )
        squares[group.stacked].append(jnp.sum(gradients[name] ** 2))
    norm = sum(squares[False], jnp.float32(0))
    norm += self.order.sum_over_devices(sum(squares[True], jnp.float32(0)))
    by_lane = [
      jax.tree.map(lambda *c: sum(x[0] for x in c), *of_lane)
      for of_lane in counts
    ]
    total = jax.tree.map(lambda *c: self.order.sum(c), *by_lane)
    gradients |= self.model.buffer_steps(total)
    scalars = {
      'squared_norm': norm,
      'loss': total.get('loss', jnp.float32(0)) / self._terms,
      'auxiliary_loss': total['auxiliary_loss'] / self._terms,
      'dropped': jnp.sum(total['dropped']),
      'load': total['load'],
    }
    return gradients, scalars

  def compute_of(self, state: partition_lib.State) -> Tree:
    """Casts masters to compute weights, packed where replicas share them."""
    compute = {
      n: m.astype(self.model.compute_dtypes[n])
      for n, m in optimizer_update.masters_of(state).items()
    }
    return self.ownership.pack(compute) if self.ownership else compute

  def update(self, state, gradients, clip_factor, slot):
    """Clips and applies gradients; returns (state, compute, selection)."""
    new = {}
    for group, names in self.own_groups.items():
      own = {n: gradients[n] for n in names}
      if self.ownership:
        own = {n: self.ownership.rows_of_device(group, own[n]) for n in names}
      own = {
        n: own[n] if n in self.model.buffers else own[n] * clip_factor
        for n in names
      }
      new[group.name] = optimizer_update.update_group(
        self.optimizer,
        state[group.name],
        own,
        stacked=group.stacked,
        buffers=self.model.buffers,
      )
    # The mask is returned as the device computed it, at one with the step.
    selection = {g: jnp.asarray(mask) for g, mask in slot.items()}
    compute = () if self.ownership else self.compute_of(new)
    return new, compute, selection

  def digest(self, state):
    """Digests a state: state -> u32[operators, 2], in `partition`'s order."""
    found = []
    for name, group in self.partition.groups.items():
      rows = digest_lib.digest_leaves(state[name], group.stacked)
      if group.stacked and self.expert_devices > 1:
        rows = jax.lax.all_gather(rows, 'expert', tiled=True)
      found.append(rows)
    return jnp.concatenate(found)  # one array: each that is read costs the host

  def evaluate(self, compute, inputs):
    """Evaluates: (compute, inputs) -> y, in the last stage mean loss f32[]."""
    out = self.model.forward(compute, inputs, None)
    if out.y is not None:
      return out.y
    return jax.lax.pmean(out.counts['loss'], mesh_lib.AXES)

  def zeros(self):
    """Makes acc, zeros f32[1, ...] by parameter name."""
    acc = {}
    for group, names in self.groups.items():
      for name in names:
        shape = self.model.shapes[name].shape
        if group.stacked:
          shape = (shape[0] // self.expert_devices, *shape[1:])
        if name not in self.model.buffers:
          acc[name] = jnp.zeros((1, *shape), jnp.float32)
    return acc


def copied(tree: Tree) -> Tree:
  """Copies every leaf; under jit, into buffers that nobody else holds."""
  return jax.tree.map(jnp.copy, tree)


def _own(counts: dict[str, jax.Array]) -> dict[str, jax.Array]:
  return {k: v[None] for k, v in counts.items()}
