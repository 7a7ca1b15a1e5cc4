"""Loops of several kinds, as users of the library may have them."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import optax
from flax.training import train_state
from jax import numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from moetion_jax.loop import (
  checkpointer as checkpointer_lib,
  settings as loop_settings,
)
from moetion_jax.state import model

EXPERTS, _MODEL, _HIDDEN, _BATCH = 8, 16, 32, 64
_OPTIMIZER = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))


def batch(iteration: int) -> jax.Array:
  """bf16[B, D], a function of the iteration."""
  key = jax.random.key(iteration)
  return jax.random.normal(key, (_BATCH, _MODEL), jnp.bfloat16)


def rule(path: str) -> model.Group | None:
  """Eight experts and a router; all else belongs to none of them."""
  if 'experts' in path:
    return model.Group('experts', stacked=True)
  return model.Group('rest', False) if 'router' in path else None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
  """A user's loop.

  Attributes:
    step: jitted, donates its state.
    state: the initial one.
    batch: of an iteration.
  """

  step: checkpointer_lib.Step
  state: Any
  batch: Callable[[int], jax.Array] = batch

  def checkpointer(
    self, folder: pathlib.Path, **settings: Any
  ) -> checkpointer_lib.SparseCheckpointer:
    """One for this loop, not started; it may be used once."""
    made = loop_settings.LoopSettings(folder=folder, **settings)
    # The step donates what it is given.
    state = jax.tree.map(
      lambda x: x.copy() if isinstance(x, jax.Array) else x, self.state
    )
    return checkpointer_lib.SparseCheckpointer(
      self.step, state, self.batch, rule, made
    )


def train(
  case: Case, checkpointer: checkpointer_lib.SparseCheckpointer, last: int
) -> tuple[dict[int, str], Any]:
  """Goes on to an iteration; losses by iteration, and the state."""
  losses = {}
  for iteration in range(checkpointer.iteration + 1, last + 1):
    state, loss = case.step(checkpointer.state, case.batch(iteration))
    checkpointer.capture(iteration, state)
    losses[iteration] = float(loss).hex()
  return losses, jax.tree.map(_on_host, checkpointer.state)


def _on_host(leaf: Any) -> np.ndarray:
  if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
    leaf = jax.random.key_data(leaf)
  return np.array(leaf)


# ---- their parts -------------------------------------------------------------


def _parameters() -> dict[str, Any]:
  def normal(seed: int, *shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape) / 4

  return {
    'experts': {
      'up': normal(0, EXPERTS, _MODEL, _HIDDEN),
      'down': normal(1, EXPERTS, _HIDDEN, _MODEL),
    },
    'router': normal(2, _MODEL, EXPERTS),
  }


def _loss(parameters: Any, x: jax.Array, dtype: Any = jnp.bfloat16) -> Any:
  w = jax.tree.map(lambda p: p.astype(dtype), parameters)
  h = jax.nn.relu(jnp.einsum('bd,edf->ebf', x, w['experts']['up']))
  weights = jax.nn.softmax(x @ w['router'])
  y = jnp.einsum('ebf,efd,be->bd', h, w['experts']['down'], weights)
  return jnp.mean((y - x[:, ::-1]).astype(jnp.float32) ** 2)


def _update(
  state: dict[str, Any],
  x: jax.Array,
  *,
  masters: str = 'params',
  dtype: Any = jnp.bfloat16,
) -> tuple[dict[str, Any], jax.Array]:
  loss, gradients = jax.value_and_grad(_loss)(state[masters], x, dtype)
  updates, optimizer = _OPTIMIZER.update(
    gradients, state['optimizer'], state[masters]
  )
  new: Any = optax.apply_updates(state[masters], updates)
  return {**state, masters: new, 'optimizer': optimizer}, loss


def _state(masters: str = 'params', **more: Any) -> dict[str, Any]:
  parameters = _parameters()
  optimizer = _OPTIMIZER.init(parameters)
  return {masters: parameters, 'optimizer': optimizer, **more}


def _jitted(step: Callable[..., Any]) -> Callable[..., Any]:
  return jax.jit(step, donate_argnums=0)


# ---- loops whose state comes back --------------------------------------------


def key_and_number() -> Case:
  """A typed random key, and a number of Python's, weakly typed."""

  def step(state, x):
    key, used = jax.random.split(state['key'])
    kept = jax.random.bernoulli(used, 0.9, x.shape).astype(x.dtype)
    scale = state['scale']  # bf16 times it is bf16, were it f32 it would be f32
    new, loss = _update(state, x * kept * scale)
    return {**new, 'key': key, 'scale': scale * 0.99}, loss

  state = _state(key=jax.random.key(3, impl='rbg'), scale=1.0)
  return Case(step=_jitted(step), state=state)


def flax_train_state() -> Case:
  """A registered class, whose step count begins as a number of Python's."""

  def step(state, x):
    loss, gradients = jax.value_and_grad(_loss)(state.params, x)
    return state.apply_gradients(grads=gradients), loss

  state = train_state.TrainState.create(
    apply_fn=_loss, params=_parameters(), tx=_OPTIMIZER
  )
  return Case(step=_jitted(step), state=state)


def vmapped_adafactor() -> Case:
  """An optimizer that looks at a whole leaf, an expert at a time."""
  optimizer = optax.adafactor(1e-2, min_dim_size_to_factor=8)

  def step(state, x):
    params, old = state['params'], state['optimizer']
    loss, gradients = jax.value_and_grad(_loss)(params, x)
    updates, new = {}, {}
    for name, update in (
      ('experts', jax.vmap(optimizer.update)),
      ('router', optimizer.update),
    ):
      updates[name], new[name] = update(
        gradients[name], old[name], params[name]
      )
    params = optax.apply_updates(params, updates)
    return {'params': params, 'optimizer': new}, loss

  params = _parameters()
  made = {
    'experts': jax.vmap(optimizer.init)(params['experts']),
    'router': optimizer.init(params['router']),
  }
  return Case(step=_jitted(step), state={'params': params, 'optimizer': made})


def norm_of_all() -> Case:
  """What belongs to no operator is made of the masters of all."""

  def step(state, x):
    new, loss = _update(state, x * (1 + state['norm'] / 1024).astype(x.dtype))
    squares = [jnp.sum(p**2) for p in jax.tree.leaves(new['params'])]
    return {**new, 'norm': jnp.sqrt(sum(squares))}, loss

  return Case(step=_jitted(step), state=_state(norm=jnp.float32(0)))


def odd_leaves() -> Case:
  """Leaves of many dtypes, one of -0.0, and of none at all."""

  def step(state, x):
    new, loss = _update(state, x)
    old = state['experts']
    return {
      **new,
      'experts': {
        **old,
        'complex': old['complex'] * 1j,
        'flags': ~old['flags'],
        'zeros': -old['zeros'],
        'bytes': old['bytes'] + 1,
      },
    }, loss

  experts = {
    'complex': jnp.ones((EXPERTS, 3), jnp.complex64),
    'flags': jnp.zeros((EXPERTS, 2), bool),
    'zeros': jnp.zeros((EXPERTS, 4)),
    'bytes': jnp.zeros((EXPERTS,), jnp.int8),
    'eighths': jnp.ones((EXPERTS, 4), jnp.float8_e4m3fn),
    'nothing': jnp.zeros((EXPERTS, 0)),
  }
  state = _state(experts=experts, empty=jnp.zeros((0, 3)), none=None)
  return Case(step=_jitted(step), state=state)


def on_devices(axis_type: str, spec: tuple[str | None, ...] = ('x',)) -> Case:
  """`odd_leaves` with experts spread over four devices.

  Args:
    axis_type: as JAX calls it, of the axes.
    spec: of leaves with three dims; that of others is its first item.
  """
  case = odd_leaves()
  kind = getattr(jax.sharding.AxisType, axis_type)
  shape = {1: (4,), 2: (2, 2)}[len(set(spec) - {None})]
  names = ('x', 'y')[: len(shape)]
  mesh = jax.make_mesh(shape, names, axis_types=(kind,) * len(shape))

  def place(path, leaf):
    is_expert = 'experts' in jax.tree_util.keystr(path)
    used = spec if leaf.ndim == 3 else spec[:1]
    its = PartitionSpec(*used) if is_expert else PartitionSpec()
    return jax.device_put(leaf, NamedSharding(mesh, its))

  state = jax.tree_util.tree_map_with_path(place, case.state)
  return dataclasses.replace(case, state=state)


def on_another_device() -> Case:
  """All of it on a device that is not the first."""
  case = odd_leaves()
  state = jax.device_put(case.state, jax.devices()[2])
  return dataclasses.replace(case, state=state)


# ---- loops whose state does not ----------------------------------------------


def read_as_fp32() -> Case:
  """The step reads more of a master than its compute weight."""
  step = lambda state, x: _update(state, x, dtype=jnp.float32)  # noqa: E731
  return Case(step=_jitted(step), state=_state())


def unnamed_masters() -> Case:
  """Parameters that `is_master` does not know."""
  step = lambda state, x: _update(state, x, masters='weights')  # noqa: E731
  return Case(step=_jitted(step), state=_state('weights'))


def coupled_rows() -> Case:
  """An update in which one expert's gradient scales that of others."""

  def step(state, x):
    new, loss = _update(state, x)
    down = new['params']['experts']['down']
    scaled = down / jnp.sqrt(jnp.sum(down**2))
    experts = {**new['params']['experts'], 'down': scaled}
    return {**new, 'params': {**new['params'], 'experts': experts}}, loss

  return Case(step=_jitted(step), state=_state())


def other_batches() -> Case:
  """Batches that depend on how often one was asked for."""
  asked = iter(range(10**9))
  return dataclasses.replace(
    Case(step=_jitted(_update), state=_state()),
    batch=lambda _: batch(next(asked)),
  )


def plain() -> Case:
  """Masters and an optimizer."""
  return Case(step=_jitted(_update), state=_state())
