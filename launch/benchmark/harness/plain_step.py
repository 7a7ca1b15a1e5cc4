"""Plain single-jit training steps of the same model, as a baseline.

This is the code of somebody without MoEtion: one jitted function that takes the
gradients of all microbatches, clips them, applies the optax transform to the
whole parameter tree and casts. It uses none of the library's programs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import optax
from jax import numpy as jnp

from moetion_jax.state import model as model_lib

Step = Callable[..., Any]


def make_step(
  model: model_lib.StageModel,
  optimizer: optax.GradientTransformation,
  *,
  clip_norm: float,
  microbatches: int,
  unrolled: bool,
) -> tuple[Step, Callable[[], Any]]:
  """Makes a step, and the function that makes its initial carry.

  The step is (carry, tokens, labels) -> (carry, loss).

  Args:
    model: the whole model, one stage.
    optimizer: the transform; applied to the parameter tree as a whole.
    clip_norm: limit of the global gradient norm.
    microbatches: M; tokens and labels are i32[M, B, T].
    unrolled: True for a Python loop over microbatches, False for `lax.scan`.
  """
  transform = optax.chain(optax.clip_by_global_norm(clip_norm), optimizer)

  def objective(compute, tokens, labels):
    out = model.forward(compute, model_lib.Inputs(tokens, labels), None)
    return out.objective, out.counts['loss']

  def cast(masters):
    return {n: m.astype(model.compute_dtypes[n]) for n, m in masters.items()}

  def gradients(compute, tokens, labels):
    zeros = {n: jnp.zeros(w.shape, jnp.float32) for n, w in compute.items()}

    def add(carry, batch):
      acc, loss = carry
      grads, more = jax.grad(objective, has_aux=True)(compute, *batch)
      acc = {n: a + grads[n].astype(jnp.float32) for n, a in acc.items()}
      return (acc, loss + more), None

    carry = (zeros, jnp.float32(0))
    if unrolled:
      for m in range(microbatches):
        carry, _ = add(carry, (tokens[m], labels[m]))
    else:
      carry, _ = jax.lax.scan(add, carry, (tokens, labels))
    acc, loss = carry
    return {n: a / microbatches for n, a in acc.items()}, loss / microbatches

  def step(carry, tokens, labels):
    masters, state = carry
    grads, loss = gradients(cast(masters), tokens, labels)
    updates, state = transform.update(grads, state, masters)
    masters = optax.apply_updates(masters, updates)
    return (masters, state), loss

  def initial():
    masters = model.initialize()
    return masters, transform.init(masters)

  return jax.jit(step, donate_argnums=(0,)), initial


def make_update(
  model: model_lib.StageModel, optimizer: optax.GradientTransformation
) -> tuple[Step, Any]:
  """Makes a plain update and returns it with its initial carry.

  The update is ((masters, state), gradients) -> (masters, state).
  """

  def update(carry, gradients):
    masters, state = carry
    updates, state = optimizer.update(gradients, state, masters)
    return optax.apply_updates(masters, updates), state

  masters = model.initialize()
  return jax.jit(update, donate_argnums=(0,)), (
    masters,
    optimizer.init(masters),
  )
