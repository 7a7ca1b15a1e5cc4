"""The transformer as stages: Flax NNX modules, split once, pure from there.

`build_stage` declares every parameter of a stage (shape, initializer, global
name) in NNX modules, splits them into graph definition and leaves, and returns
the `StageModel` the library works with: pure functions of a plain dict from
global parameter name to array. A parameter's name, and its initial bits, do not
depend on how the model is cut.

Dims: B batch, T sequence, D model, V vocabulary, H heads, G key/value heads,
N tokens of this device, E experts, L MoE layers of the stage.
"""

from __future__ import annotations

import dataclasses
import functools
import zlib
from collections.abc import Sequence

import jax
from flax import nnx
from jax import numpy as jnp

from models import config as config_lib
from models import layers, moe
from moetion_jax import base, stage_model

ModelConfig = config_lib.ModelConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class StageSpec:
  """Which part of the model a stage is: layers [first, last)."""

  first_layer: int
  last_layer: int
  has_embedding: bool
  has_head: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class Parameter:
  """One declared parameter; `stddev` 0 means filled with `fill`."""

  shape: tuple[int, ...]
  stddev: float = 0.0
  fill: float = 0.0


class _Scope:
  """Declares parameters under a global name prefix; allocates nothing."""

  def __init__(self, prefix: str, declared: dict[str, Parameter]):
    self._prefix = prefix
    self._declared = declared

  def child(self, name: str) -> _Scope:
    return _Scope(f'{self._prefix}{name}/', self._declared)

  def matrix(self, name: str, *shape: int, scale: float = 1.0) -> nnx.Param:
    """A weight whose second last dim is summed over: stddev 1/sqrt of it."""
    return self._declare(name, Parameter(shape=shape, stddev=scale * shape[-2] ** -0.5))  # fmt: skip # noqa: E501

  def table(self, name: str, *shape: int, stddev: float) -> nnx.Param:
    return self._declare(name, Parameter(shape=shape, stddev=stddev))

  def constant(self, name: str, *shape: int, fill: float) -> nnx.Param:
    return self._declare(name, Parameter(shape=shape, fill=fill))

  def _declare(self, name: str, parameter: Parameter) -> nnx.Param:
    self._declared[self._prefix + name] = parameter
    return nnx.Param(jax.ShapeDtypeStruct(parameter.shape, jnp.float32))


@dataclasses.dataclass(frozen=True)
class _Call:
  """What a block needs besides its input; lives while a program is traced."""

  expert_devices: int
  rows: jax.Array  # i32[B]: each row's number in the global microbatch
  key: jax.Array | None  # dropout key of (seed, iteration, microbatch)


class Attention(nnx.Module):
  """Causal grouped-query attention with rotary positions."""

  def __init__(self, config: ModelConfig, scope: _Scope):
    d, hd = config.model_dim, config.head_dim
    self.config = config
    self.norm = scope.constant('norm', d, fill=1.0)
    self.w_query = scope.matrix('w_query', d, config.num_heads * hd)
    self.w_key = scope.matrix('w_key', d, config.num_kv_heads * hd)
    self.w_value = scope.matrix('w_value', d, config.num_kv_heads * hd)
    self.w_out = scope.matrix(
      'w_out', config.num_heads * hd, d, scale=(2 * config.num_layers) ** -0.5
    )

  def __call__(self, x: jax.Array) -> jax.Array:
    c = self.config
    b, t, _ = x.shape
    h = layers.rms_norm(x, self.norm[...])

    def heads(w, count):
      return layers.contract('btd,dh->bth', h, w[...]).reshape(
        b, t, count, c.head_dim
      )

    q = layers.rotate(heads(self.w_query, c.num_heads), c.rope_base)
    k = layers.rotate(heads(self.w_key, c.num_kv_heads), c.rope_base)
    v = heads(self.w_value, c.num_kv_heads)
    out = layers.causal_attention(q, k, v)
    return layers.contract(
      'bth,hd->btd', out.reshape(b, t, -1), self.w_out[...]
    )


class Mlp(nnx.Module):
  """A SwiGLU, of one width or stacked over experts."""

  def __init__(self, config: ModelConfig, scope: _Scope, dim: int, *stack: int):
    d = config.model_dim
    self.w_gate = scope.matrix('w_gate', *stack, d, dim)
    self.w_up = scope.matrix('w_up', *stack, d, dim)
    self.w_down = scope.matrix(
      'w_down', *stack, dim, d, scale=(2 * config.num_layers) ** -0.5
    )

  def weights(self) -> dict[str, jax.Array]:
    return {
      'w_gate': self.w_gate[...],
      'w_up': self.w_up[...],
      'w_down': self.w_down[...],
    }

  def __call__(self, x: jax.Array) -> jax.Array:
    return layers.swiglu(x, **self.weights())


class Block(nnx.Module):
  """One layer: attention, then a dense SwiGLU or shared and routed experts."""

  def __init__(self, config: ModelConfig, layer: int, scope: _Scope):
    self.config = config
    self.layer = layer
    self.attention = Attention(config, scope.child('attention'))
    self.norm = scope.constant('norm', config.model_dim, fill=1.0)
    if not config.is_moe(layer):
      self.dense = Mlp(config, scope.child('dense'), config.dense_dim)
      return
    self.w_router = scope.matrix(
      'w_router', config.model_dim, config.num_experts
    )
    if config.balance == 'bias':
      self.router_bias = scope.constant(
        'router_bias', config.num_experts, fill=0.0
      )
    if config.shared_dim:
      self.shared = Mlp(config, scope.child('shared'), config.shared_dim)
    self.experts = Mlp(
      config, scope.child('experts'), config.expert_dim, config.num_experts
    )

  def __call__(self, x: jax.Array, call: _Call):
    """Returns (y, auxiliary f32[], load i32[E], dropped i32[])."""
    x = x + self._dropout(self.attention(x), call, 0)
    h = layers.rms_norm(x, self.norm[...])
    zero = jnp.zeros((), jnp.float32)
    if not self.config.is_moe(self.layer):
      out = self.dense(h.reshape(-1, h.shape[-1])).reshape(h.shape)
      auxiliary, load, dropped = zero, None, None
    else:
      out, auxiliary, load, dropped = self._experts(h, call)
    return x + self._dropout(out, call, 1), auxiliary, load, dropped

  def _experts(self, h: jax.Array, call: _Call):
    c = self.config
    tokens = h.reshape(-1, c.model_dim)
    bias = self.router_bias[...] if c.balance == 'bias' else None
    routing = moe.route(c, tokens, self.w_router[...], bias)
    out, dispatch = moe.experts_forward(
      c, tokens, routing, self.experts.weights(), call.expert_devices
    )
    if c.shared_dim:
      out = out + self.shared(tokens)
    auxiliary = c.z_loss_weight * routing.z_loss
    if c.balance == 'loss':
      load = dispatch.load
      if call.expert_devices > 1:
        load = jax.lax.psum(load, 'expert')
      total = tokens.shape[0] * c.experts_per_token * call.expert_devices
      auxiliary += c.balance_rate * moe.balance_loss(routing, load, total)
    return out.reshape(h.shape), auxiliary, dispatch.load, dispatch.dropped

  def _dropout(self, x: jax.Array, call: _Call, part: int) -> jax.Array:
    if call.key is None:
      return x
    key = jax.random.fold_in(call.key, 2 * self.layer + part)
    return layers.dropout(x, self.config.dropout_rate, key, call.rows)


class Stage(nnx.Module):
  """A stage's modules, under the names they have in the whole model."""

  def __init__(self, config: ModelConfig, spec: StageSpec, scope: _Scope):
    d, v = config.model_dim, config.vocab_size
    self.config = config
    if spec.has_embedding:
      self.embedding = scope.table('embedding/table', v, d, stddev=1.0)
    self.layers = nnx.Dict(
      {
        str(i): Block(config, i, scope.child(f'layers/{i}'))
        for i in range(spec.first_layer, spec.last_layer)
      }
    )
    if spec.has_head:
      self.head_norm = scope.constant('head/norm', d, fill=1.0)
      self.head = scope.matrix('head/table', d, v)

  def __call__(
    self, inputs: stage_model.Inputs, call: _Call
  ) -> stage_model.Outputs:
    x = inputs.x
    if hasattr(self, 'embedding'):
      x = layers.embed(self.embedding[...], x)
    objective = jnp.zeros((), jnp.float32)
    loads, drops = [], []
    # nnx.merge sorts the keys of a Dict as strings: '10' comes before '2'.
    for block in sorted(self.layers.values(), key=lambda b: b.layer):
      x, auxiliary, load, dropped = self._apply(block, x, call)
      objective += auxiliary
      if load is not None:
        loads.append(load)
        drops.append(dropped)
    counts = {
      'auxiliary_loss': objective,
      'load': jnp.stack(loads)
      if loads
      else jnp.zeros((0, self.config.num_experts), jnp.int32),  # fmt: skip # noqa: E501
      'dropped': jnp.stack(drops) if drops else jnp.zeros((0,), jnp.int32),
    }
    if not hasattr(self, 'head'):
      return stage_model.Outputs(y=x, objective=objective, counts=counts)
    logits = self.logits(x)
    if inputs.labels is None:
      return stage_model.Outputs(y=logits, objective=objective, counts=counts)
    loss = jnp.mean(layers.cross_entropy(logits, inputs.labels))
    counts['loss'] = loss
    return stage_model.Outputs(
      y=None, objective=objective + loss, counts=counts
    )

  def logits(self, x: jax.Array) -> jax.Array:
    """f32[B, T, V] of the residual stream [B, T, D]."""
    h = layers.rms_norm(x, self.head_norm[...])
    return layers.contract('btd,dv->btv', h, self.head[...]).astype(jnp.float32)

  def _apply(self, block: Block, x: jax.Array, call: _Call):
    if not self.config.remat:
      return block(x, call)
    # The block's weights are arguments, not captured values: a checkpoint
    # saves its arguments, and the caller leaves weights out of what is saved.
    graph, state = nnx.split(block)

    @jax.checkpoint
    def apply(state, x):
      return nnx.merge(graph, state)(x, call)

    return apply(state, x)


def layer_cost(config: ModelConfig, layer: int) -> float:
  """Multiplications per token and forward pass of one layer."""
  d, hd = config.model_dim, config.head_dim
  cost = 2 * d * hd * (config.num_heads + config.num_kv_heads)
  cost += hd * config.num_heads * config.sequence_length  # causal: half of 2
  if not config.is_moe(layer):
    return cost + 3 * d * config.dense_dim
  slots = config.experts_per_token * max(1.0, config.capacity_factor)
  if config.capacity_factor == 0:
    slots = config.num_experts
  return (
    cost
    + d * config.num_experts
    + 3 * d * (config.shared_dim + slots * config.expert_dim)
  )


def cut(config: ModelConfig, num_stages: int) -> tuple[StageSpec, ...]:
  """Cuts the model into stages so that the costliest stage is cheapest.

  Raises:
    base.ConfigError: there are more stages than layers.
  """
  if not 1 <= num_stages <= config.num_layers:
    raise base.ConfigError(
      'stages', num_stages, f'must be 1 to {config.num_layers} (the layers)'
    )
  costs = [layer_cost(config, i) for i in range(config.num_layers)]
  # The head is a layer of its own kind at the end; the embedding is a lookup.
  costs[-1] += config.model_dim * config.vocab_size

  @functools.cache
  def best(first: int, stages: int) -> tuple[float, tuple[int, ...]]:
    """(cost of the costliest stage, ends) of layers [first, ...)."""
    if stages == 1:
      return sum(costs[first:]), (config.num_layers,)
    options = []
    for end in range(first + 1, config.num_layers - stages + 2):
      rest, ends = best(end, stages - 1)
      options.append((max(sum(costs[first:end]), rest), (end, *ends)))
    return min(options)

  ends = best(0, num_stages)[1]
  return tuple(
    StageSpec(
      first_layer=first,
      last_layer=last,
      has_embedding=first == 0,
      has_head=last == config.num_layers,
    )
    for first, last in zip((0, *ends[:-1]), ends, strict=True)  # fmt: skip
  )


def partition(name: str) -> stage_model.Group:
  """The operator group of a parameter (DESIGN section 2).

  One expert of one layer; the rest of a layer; the embedding; the head.
  """
  parts = name.split('/')
  if parts[0] != 'layers':
    return stage_model.Group(name=parts[0], stacked=False)
  if parts[2] == 'experts':
    return stage_model.Group(name='/'.join(parts[:3]), stacked=True)
  return stage_model.Group(name='/'.join(parts[:2]), stacked=False)


def compute_dtype(config: ModelConfig, name: str) -> jnp.dtype:
  """The dtype forward reads a parameter in: fp32 for everything of routers."""
  last = name.rsplit('/', 1)[-1]
  fp32 = last in ('w_router', 'router_bias')
  return jnp.dtype(jnp.float32 if fp32 else config.compute_dtype)


@functools.partial(jax.jit, static_argnums=(1,))
def _normal(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
  return jax.random.normal(key, shape, jnp.float32)


def initialize(
  parameters: dict[str, Parameter], seed: int
) -> dict[str, jax.Array]:
  """fp32 masters; a parameter's bits depend on seed, name and shape alone.

  Each is drawn by a program of its own (one a shape): fused into one program
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
  config: ModelConfig, spec: StageSpec, *, seed: int, expert_devices: int = 1
) -> stage_model.StageModel:
  """Declares one stage and returns it as pure functions.

  Args:
    config: the model's shape.
    spec: one element of `cut(config, ...)`.
    seed: of the initial masters and of dropout.
    expert_devices: size of the mesh axis 'expert'.

  Raises:
    base.ConfigError: the experts do not divide among the devices.
  """
  if config.num_experts % expert_devices:
    raise base.ConfigError(
      'local_devices',
      expert_devices,
      f'must divide num_experts={config.num_experts}',
    )
  declared: dict[str, Parameter] = {}
  graph, state = nnx.split(Stage(config, spec, _Scope('', declared)))
  names = _leaf_names(state, declared)
  structure = jax.tree.structure(state)

  def forward(
    params: dict[str, jax.Array],
    inputs: stage_model.Inputs,
    position: stage_model.Position | None,
  ) -> stage_model.Outputs:
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
    return module(inputs, _Call(expert_devices, rows, key))

  biases = [n for n in declared if n.endswith('/router_bias')]

  def buffer_steps(counts: dict[str, jax.Array]) -> dict[str, jax.Array]:
    load = counts['load'].astype(jnp.float32)  # [L, E], of the iteration
    step = jnp.sign(jnp.mean(load, axis=1, keepdims=True) - load)
    return {n: config.balance_rate * step[i] for i, n in enumerate(biases)}

  return stage_model.StageModel(
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
  )


def num_parameters(config: ModelConfig, *, active: bool = False) -> int:
  """Parameters of the whole model, or those that one token meets."""
  (spec,) = cut(config, 1)
  total = 0
  for name, leaf in build_stage(config, spec, seed=0).shapes.items():
    size = leaf.size
    if active and partition(name).stacked:
      size = size // config.num_experts * config.experts_per_token
    total += size
  return total


def _leaf_names(
  state: nnx.State, declared: dict[str, Parameter]
) -> Sequence[str]:
  """Global names in the order of `state`'s leaves.

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
