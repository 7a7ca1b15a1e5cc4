"""The optimizer, applied operator by operator.

The training state of a group is one plain dict with the leaves
'master/<parameter>' (fp32) and 'optimizer/<path in the optax state>'.

The optimizer is vmapped over a stacked group, and applied once to any other. On
stacked leaves as a whole, transforms that look at a leaf's shape or norm
(adafactor, muon) would couple experts, and a frozen expert would reach an
active one during replay.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import optax
from jax import numpy as jnp

from moetion_jax.state import partition


def init_group(
  optimizer: optax.GradientTransformation,
  masters: Mapping[str, jax.Array],
  *,
  stacked: bool,
  buffers: frozenset[str],
) -> dict[str, jax.Array]:
  """Makes the training state of one group from its fp32 masters."""
  trained = {n: m for n, m in masters.items() if n not in buffers}
  init = jax.vmap(optimizer.init) if stacked else optimizer.init
  return {
    **{f'master/{name}': master for name, master in masters.items()},
    **_flatten_optimizer_state(init(trained)),
  }


def update_group(
  optimizer: optax.GradientTransformation,
  state: Mapping[str, jax.Array],
  gradients: Mapping[str, jax.Array],
  *,
  stacked: bool,
  buffers: frozenset[str],
) -> dict[str, jax.Array]:
  """Computes a group's next training state; no operator reaches another.

  Args:
    optimizer: a transform of one operator's parameters {name: array}.
    state: the group's training state, as made by `init_group`.
    gradients: f32 gradients by parameter name, clipped; for a buffer, what is
      added to it.
    stacked: see `model.Group`.
    buffers: parameters that the optimizer does not see.
  """
  prefix = 'master/'
  masters = {
    k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)
  }
  trained = {n: m for n, m in masters.items() if n not in buffers}
  make = jax.vmap(optimizer.init) if stacked else optimizer.init
  template = jax.eval_shape(make, trained)
  update = jax.vmap(optimizer.update) if stacked else optimizer.update
  updates, optimizer_state = update(
    {n: gradients[n] for n in trained},
    _unflatten_optimizer_state(template, state),
    trained,
  )
  updated: Any = optax.apply_updates(trained, updates)
  new = dict(updated)
  for name in masters.keys() & buffers:
    new[name] = masters[name] + gradients[name]
  return {
    **{f'master/{name}': new[name] for name in masters},
    **_flatten_optimizer_state(optimizer_state),
  }


def masters_of(state: partition.State) -> dict[str, jax.Array]:
  """Returns the fp32 masters of a training state by parameter name."""
  return {
    leaf.removeprefix('master/'): value
    for leaves in state.values()
    for leaf, value in leaves.items()
    if leaf.startswith('master/')
  }


def _optimizer_paths(tree: Any) -> list[str]:
  return ['optimizer/' + path for path in partition.leaf_paths(tree)]


def _flatten_optimizer_state(tree: Any) -> dict[str, jax.Array]:
  paths, leaves = _optimizer_paths(tree), jax.tree.leaves(tree)
  return {p: jnp.asarray(x) for p, x in zip(paths, leaves, strict=True)}


def _unflatten_optimizer_state(
  template: Any, state: Mapping[str, jax.Array]
) -> Any:
  leaves = [state[path] for path in _optimizer_paths(template)]
  return jax.tree.unflatten(jax.tree.structure(template), leaves)
