"""A model as stages: cut by cost, named, initialized, made pure.

A stage's NNX modules are split once into graph definition and leaves; the
library gets a `StageModel`: pure functions of a plain dict from global
parameter name to array. A parameter's name, and its initial bits, do not depend
on how the model is cut.

Dims: D model, L MoE layers of the stage, E experts.
"""

from __future__ import annotations

import functools
import zlib
from collections.abc import Sequence

import jax
from flax import nnx
from jax import numpy as jnp

from models import config as model_config, moe, transformer
from moetion_jax import errors
from moetion_jax.state import model


def layer_cost(config: model_config.ModelConfig, layer: int) -> float:
  """Multiplications per token and forward pass of one layer."""
  d, hd = config.model_dim, config.head_dim
  cost = 2 * d * hd * (config.num_heads + config.num_kv_heads)
  cost += hd * config.num_heads * config.sequence_length  # causal: half of 2
  if not config.is_moe(layer):
    return cost + 3 * d * config.dense_dim
  seats = config.experts_per_token * max(1.0, config.capacity_factor)
  if config.capacity_factor == 0:
    seats = config.num_experts
  return (
    cost
    + d * config.num_experts
    + 3 * d * (config.shared_dim + seats * config.expert_dim)
  )


def cut(
  config: model_config.ModelConfig, num_stages: int
) -> tuple[transformer.StageSpec, ...]:
  """Cuts the model into stages so that the costliest stage is cheapest.

  Raises:
    errors.ConfigError: there are more stages than layers.
  """
  if not 1 <= num_stages <= config.num_layers:
    raise errors.ConfigError(
      'stages', num_stages, f'must be 1 to {config.num_layers} (the layers)'
    )
  costs = [layer_cost(config, i) for i in range(config.num_layers)]
  # The head is a layer of its own kind at the end; the embedding is a lookup.
  costs[-1] += config.model_dim * config.vocab_size

  @functools.cache
  def best(first: int, stages: int) -> tuple[float, tuple[int, ...]]:
    """Returns (cost of the costliest stage, ends) of layers [first, ...)."""
    if stages == 1:
      return sum(costs[first:]), (config.num_layers,)
    options = []
    for end in range(first + 1, config.num_layers - stages + 2):
      rest, ends = best(end, stages - 1)
      options.append((max(sum(costs[first:end]), rest), (end, *ends)))
    return min(options)

  ends = best(0, num_stages)[1]
  return tuple(
    transformer.StageSpec(
      first_layer=first,
      last_layer=last,
      has_embedding=first == 0,
      has_head=last == config.num_layers,
    )
    for first, last in zip((0, *ends[:-1]), ends, strict=True)  # fmt: skip
  )


def partition(name: str) -> model.Group:
  """Returns the operator group of a parameter.

  A group is the experts of one layer, each an operator; the rest of a layer;
  the embedding; or the head.
  """
  parts = name.split('/')
  if parts[0] != 'layers':
    return model.Group(name=parts[0], stacked=False)
  if parts[2] == 'experts':
    return model.Group(name='/'.join(parts[:3]), stacked=True)
  return model.Group(name='/'.join(parts[:2]), stacked=False)


def compute_dtype(config: model_config.ModelConfig, name: str) -> jnp.dtype:
  """Returns the dtype in which forward reads a parameter: fp32 for routers'."""
  last = name.rsplit('/', 1)[-1]
  fp32 = last in ('w_router', 'router_bias')
  return jnp.dtype(jnp.float32 if fp32 else config.compute_dtype)


@functools.partial(jax.jit, static_argnums=(1,))
def _normal(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
  return jax.random.normal(key, shape, jnp.float32)


def initialize(
  parameters: dict[str, transformer.Parameter], seed: int
) -> dict[str, jax.Array]:
  """Makes fp32 masters; their bits depend on seed, name and shape alone.

  Each is drawn by a program of its own (one per shape): fused into one program
  with others, its last bits could depend on the stage it lies in.
  """
  key = jax.random.key(seed)
  masters = {}
  for name, p in parameters.items():
    if p.stddev:
      own = jax.random.fold_in(key, zlib.crc32(name.encode()))
      masters[name] = _normal(own, p.shape) * jnp.float32(p.stddev)
    else:
      masters[name] = jnp.full(p.shape, p.fill, jnp.float32)
  return masters


def build_stage(
  config: model_config.ModelConfig,
  spec: transformer.StageSpec,
  *,
  seed: int,
  expert_devices: int = 1,
  max_capacity_factor: float | None = None,
) -> model.StageModel:
  """Declares one stage and returns it as pure functions.

  Args:
    config: the model's shape.
    spec: one element of `cut(config, ...)`.
    seed: seed of the initial masters and of dropout.
    expert_devices: size of the mesh axis 'expert'.
    max_capacity_factor: upper bound of `Position.capacity`, which then scales
      how many tokens each expert takes; None: nothing scales it.

  Raises:
    errors.ConfigError: the experts do not divide among the devices.
  """
  if config.num_experts % expert_devices:
    raise errors.ConfigError(
      'local_devices',
      expert_devices,
      f'must divide num_experts={config.num_experts}',
    )
  declared: dict[str, transformer.Parameter] = {}
  graph, state = nnx.split(
    transformer.TransformerStage(config, spec, transformer.Scope('', declared))
  )
  names = _leaf_names(state, declared)
  structure = jax.tree.structure(state)
  moe_layers = [
    i for i in range(spec.first_layer, spec.last_layer) if config.is_moe(i)
  ]

  def forward(
    params: dict[str, jax.Array],
    inputs: model.Inputs,
    position: model.Position | None,
  ) -> model.Outputs:
    module = nnx.merge(
      graph, jax.tree.unflatten(structure, [params[n] for n in names])
    )
    rows = jnp.arange(inputs.x.shape[0])
    if expert_devices > 1:
      rows += jax.lax.axis_index('expert') * rows.shape[0]
    key = None
    if position is not None and config.dropout_rate:
      key = jax.random.fold_in(jax.random.key(seed), position.iteration)
      key = jax.random.fold_in(key, position.microbatch)
    capacity = {}
    if position is not None and max_capacity_factor is not None:
      capacity = {
        layer: moe.Capacity(position.capacity[i], max_capacity_factor)
        for i, layer in enumerate(moe_layers)
      }
    return module(inputs, transformer.Call(expert_devices, rows, key, capacity))

  biases = [n for n in declared if n.endswith('/router_bias')]

  def buffer_steps(counts: dict[str, jax.Array]) -> dict[str, jax.Array]:
    load = counts['load'].astype(jnp.float32)  # [L, E], of the iteration
    step = jnp.sign(jnp.mean(load, axis=1, keepdims=True) - load)
    return {n: config.balance_rate * step[i] for i, n in enumerate(biases)}

  return model.StageModel(
    shapes={
      n: jax.ShapeDtypeStruct(p.shape, jnp.float32) for n, p in declared.items()
    },
    compute_dtypes={n: compute_dtype(config, n) for n in declared},
    partition=partition,
    initialize=lambda: initialize(declared, seed),
    forward=forward,
    buffers=frozenset(biases),
    buffer_steps=buffer_steps,
    has_embedding=spec.has_embedding,
    has_head=spec.has_head,
    hidden_shape=(config.sequence_length, config.model_dim),
    hidden_dtype=jnp.dtype(config.compute_dtype),
    capacity_shape=(len(moe_layers), config.num_experts)
    if max_capacity_factor is not None and moe_layers
    else None,
    scaled=(
      lambda factor: build_stage(
        config,
        spec,
        seed=seed,
        expert_devices=expert_devices,
        max_capacity_factor=factor,
      )
    )
    if moe_layers and config.capacity_factor
    else None,
  )


def _leaf_names(
  state: nnx.State, declared: dict[str, transformer.Parameter]
) -> Sequence[str]:
  """Returns the global names in the order of `state`'s leaves.

  Attribute paths and declared names differ in the two places where a module
  groups things for itself (embedding, head); shapes are compared so that a
  slip cannot pass.
  """
  renamed = {
    'embedding': 'embedding/table',
    'head': 'head/table',
    'head_norm': 'head/norm',
  }
  names = []
  for path, variable in nnx.to_flat_state(state):
    name = '/'.join(str(p) for p in path)
    name = renamed.get(name, name)
    if variable.get_value().shape != declared[name].shape:
      raise AssertionError(f'{name} was declared with another shape')
    names.append(name)
  if set(names) != set(declared):
    raise AssertionError('a declared parameter is no leaf of the stage')
  return names
