"""Mixture-of-Experts feed-forward: route, dispatch by sort, combine.

A token's copies go to seats: every expert has `capacity` of them. The two maps
between (token, choice) and seat are integer permutations found by one stable
sort, so that both directions of both passes are gathers; no floating-point
number is ever scattered. Earlier tokens have priority when an expert is full.

Dims: N tokens of this device, D model, E experts, K experts per token,
C capacity, F expert hidden, A devices along the mesh axis 'expert'.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
from jax import numpy as jnp

from models import config as model_config, layers


class Routing(NamedTuple):
  """The experts that each token goes to, and their weights."""

  experts: jax.Array  # i32[N, K]
  gates: jax.Array  # f32[N, K]
  probabilities: jax.Array  # f32[N, E]
  z_loss: jax.Array  # f32[]: mean squared logsumexp of the router's logits


class Dispatch(NamedTuple):
  """Both maps between choices (token, k) and seats (expert, position)."""

  seat_of_choice: jax.Array  # i32[N, K]; E * C where the choice was dropped
  choice_of_seat: jax.Array  # i32[E * C]; N * K where the seat is empty
  load: jax.Array  # i32[E]: choices of each expert before dropping
  dropped: jax.Array  # i32[]


def route(
  config: model_config.ModelConfig,
  x: jax.Array,
  w_router: jax.Array,
  bias: jax.Array | None,
) -> Routing:
  """Scores tokens x [N, D] in fp32 and chooses K experts for each.

  A bias (f32[E]) steers the choice only; gates come from the unbiased
  probabilities (DeepSeek-V3, arXiv 2412.19437 section 2.1.2).
  """
  logits = x.astype(jnp.float32) @ w_router  # [N, E]
  probabilities = jax.nn.softmax(logits, axis=-1)
  score = probabilities if bias is None else probabilities + bias
  # top_k's own gradient scatters; the gates are picked by comparison instead.
  _, experts = jax.lax.top_k(
    jax.lax.stop_gradient(score), config.experts_per_token
  )
  chosen = experts[..., None] == jnp.arange(config.num_experts)  # [N, K, E]
  gates = jnp.sum(jnp.where(chosen, probabilities[:, None, :], 0.0), axis=-1)
  if config.normalize_gates:
    gates = gates / jnp.sum(gates, axis=-1, keepdims=True)
  z = jax.nn.logsumexp(logits, axis=-1)
  return Routing(experts, gates, probabilities, jnp.mean(z * z))


class Capacity(NamedTuple):
  """Capacities of a layer's experts as multiples of the usual capacity."""

  factors: jax.Array  # f32[E]
  max_factor: float  # no factor exceeds it: there are no more seats


def plan_dispatch(
  experts: jax.Array,
  num_experts: int,
  capacity: int,
  limits: jax.Array | None = None,
) -> Dispatch:
  """Assigns seats to choices `experts` i32[N, K], first come first served.

  Args:
    experts: the expert of each choice.
    num_experts: E.
    capacity: C, the number of seats of each expert.
    limits: i32[E], the number of seats that each expert may use; None: all.
  """
  flat = experts.reshape(-1)
  n = flat.shape[0]
  order = jnp.argsort(flat, stable=True)
  by_expert = flat[order]
  edges = jnp.searchsorted(by_expert, jnp.arange(num_experts + 1))
  start, load = edges[:-1], edges[1:] - edges[:-1]
  position = jnp.arange(n) - start[by_expert]
  empty = num_experts * capacity
  limit = capacity if limits is None else limits[by_expert]
  seats = jnp.where(position < limit, by_expert * capacity + position, empty)
  seats = seats.astype(flat.dtype)  # wider where 64 bits are enabled
  seat_of_choice = (
    jnp.zeros_like(flat).at[order].set(seats, unique_indices=True)
  )
  within = jnp.arange(capacity)
  source = jnp.minimum(start[:, None] + within, n - 1)  # [E, C]
  used = jnp.minimum(load, capacity if limits is None else limits)
  choice_of_seat = jnp.where(within < used[:, None], order[source], n)
  return Dispatch(
    seat_of_choice=seat_of_choice.reshape(experts.shape),
    choice_of_seat=choice_of_seat.reshape(-1),
    load=load,
    dropped=jnp.sum(load - used),
  )


def _rows(x: jax.Array, index: jax.Array) -> jax.Array:
  """Rows `index` of x; zeros where the index is one past the end."""
  return jnp.take(x, index, axis=0, mode='fill', fill_value=0)


@jax.custom_vjp
def to_seats(x: jax.Array, dispatch: Dispatch) -> jax.Array:
  """Copies tokens [N, D] into seats [E * C, D]; empty seats are zero."""
  k = dispatch.seat_of_choice.shape[1]
  return _rows(x, dispatch.choice_of_seat // k)


def _to_seats_forward(x, dispatch):
  return to_seats(x, dispatch), dispatch


def _to_seats_backward(dispatch, dseats):
  copies = _rows(dseats, dispatch.seat_of_choice)  # [N, K, D]
  dx = jnp.sum(copies.astype(jnp.float32), axis=1).astype(dseats.dtype)
  return dx, None


to_seats.defvjp(_to_seats_forward, _to_seats_backward)


@jax.custom_vjp
def from_seats(seats: jax.Array, dispatch: Dispatch) -> jax.Array:
  """Reads seats [E * C, D] back per choice [N, K, D]; zero where dropped."""
  return _rows(seats, dispatch.seat_of_choice)


def _from_seats_forward(seats, dispatch):
  return from_seats(seats, dispatch), dispatch


def _from_seats_backward(dispatch, dchoices):
  flat = dchoices.reshape(-1, dchoices.shape[-1])
  return _rows(flat, dispatch.choice_of_seat), None


from_seats.defvjp(_from_seats_forward, _from_seats_backward)


def experts_forward(
  config: model_config.ModelConfig,
  x: jax.Array,
  routing: Routing,
  weights: dict[str, jax.Array],
  expert_devices: int,
  capacity: Capacity | None = None,
) -> tuple[jax.Array, Dispatch]:
  """Sends x [N, D] through its experts.

  Args:
    config: the model's shape.
    x: tokens of this device.
    routing: routing of these tokens, over all E experts.
    weights: w_gate, w_up [E/A, D, F] and w_down [E/A, F, D] of this device.
    expert_devices: A; above 1 the call stands inside a `shard_map` with an axis
      'expert' of that size, and seats travel by `all_to_all`.
    capacity: capacities of the experts; None: those of the model's shape.

  Returns:
    The gated sum over each token's experts [N, D], and the dispatch.
  """
  n, d = x.shape
  usual = each = config.capacity(n)
  limits = None
  if capacity is not None:
    each = min(n, math.ceil(usual * capacity.max_factor))
    wanted = (usual * capacity.factors).astype(jnp.int32)  # rounded down
    limits = jnp.minimum(wanted, each)
  dispatch = plan_dispatch(routing.experts, config.num_experts, each, limits)
  seats = to_seats(x, dispatch).reshape(config.num_experts, each, d)
  if expert_devices > 1:
    seats = jax.lax.all_to_all(seats, 'expert', 0, 1, tiled=True)
  seats = layers.swiglu(
    seats, weights['w_gate'], weights['w_up'], weights['w_down']
  )
  if expert_devices > 1:
    seats = jax.lax.all_to_all(seats, 'expert', 1, 0, tiled=True)
  choices = from_seats(seats.reshape(-1, d), dispatch)  # [N, K, D]
  gated = routing.gates[..., None] * choices.astype(jnp.float32)
  return jnp.sum(gated, axis=1).astype(x.dtype), dispatch


def balance_loss(
  routing: Routing, load: jax.Array, total_choices: int
) -> jax.Array:
  """The Switch Transformer's auxiliary loss (arXiv 2101.03961, section 2.2).

  Args:
    routing: routing of this device's tokens.
    load: i32[E], choices of the whole microbatch per expert.
    total_choices: number of choices of the whole microbatch.

  Returns:
    f32[]; 1 when balanced. The mean over devices is the loss of the whole
    microbatch, since only `load` crosses devices and it carries no gradient.
  """
  share = load.astype(jnp.float32) / total_choices
  mean = jnp.mean(routing.probabilities, axis=0)
  return mean.shape[0] * jnp.sum(jax.lax.stop_gradient(share) * mean)
