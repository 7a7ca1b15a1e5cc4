"""The transformer in Flax NNX; a `TransformerStage` holds a part of it.

Modules declare their parameters (shape, initializer, global name) and allocate
nothing; `stages.build_stage` splits them once into graph definition and leaves
and makes pure functions of them.

Dims: B batch, T sequence, D model, V vocabulary, H heads, G key/value heads,
N tokens of this device, E experts, L MoE layers of the stage.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import jax
from flax import nnx
from jax import numpy as jnp

from models import config as model_config, layers, moe
from moetion_jax.state import model


@dataclasses.dataclass(frozen=True, kw_only=True)
class StageSpec:
  """The part of the model that a stage is: layers [first, last)."""

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


class Scope:
  """Declares parameters under a global name prefix; allocates nothing."""

  def __init__(self, prefix: str, declared: dict[str, Parameter]):
    self._prefix = prefix
    self._declared = declared

  def child(self, name: str) -> Scope:
    """Returns the scope of a module called `name` inside this one."""
    return Scope(f'{self._prefix}{name}/', self._declared)

  def matrix(self, name: str, *shape: int, scale: float = 1.0) -> nnx.Param:
    """Declares a weight; its stddev is `scale` / sqrt(its second last dim).

    The second last dim is the one that is summed over.
    """
    stddev = scale * shape[-2] ** -0.5
    return self._declare(name, Parameter(shape=shape, stddev=stddev))

  def table(self, name: str, *shape: int, stddev: float) -> nnx.Param:
    """Declares a parameter of normal numbers with the given deviation."""
    return self._declare(name, Parameter(shape=shape, stddev=stddev))

  def constant(self, name: str, *shape: int, fill: float) -> nnx.Param:
    """Declares a parameter with the same number everywhere."""
    return self._declare(name, Parameter(shape=shape, fill=fill))

  def _declare(self, name: str, parameter: Parameter) -> nnx.Param:
    self._declared[self._prefix + name] = parameter
    return nnx.Param(jax.ShapeDtypeStruct(parameter.shape, jnp.float32))


@dataclasses.dataclass(frozen=True)
class Call:
  """A block's arguments besides its input; lives while a program is traced."""

  expert_devices: int
  rows: jax.Array  # i32[B]: each row's number in the global microbatch
  key: jax.Array | None  # dropout key of (seed, iteration, microbatch)
  capacity: Mapping[int, moe.Capacity]  # by layer; the usual one if absent


class Attention(nnx.Module):
  """Causal grouped-query attention with rotary positions."""

  def __init__(self, config: model_config.ModelConfig, scope: Scope):
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
    """Maps [B, T, D] to [B, T, D], before the residual sum."""
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

  def __init__(
    self, config: model_config.ModelConfig, scope: Scope, dim: int, *stack: int
  ):
    d = config.model_dim
    self.w_gate = scope.matrix('w_gate', *stack, d, dim)
    self.w_up = scope.matrix('w_up', *stack, d, dim)
    self.w_down = scope.matrix(
      'w_down', *stack, dim, d, scale=(2 * config.num_layers) ** -0.5
    )

  def weights(self) -> dict[str, jax.Array]:
    """Returns its three matrices by name."""
    return {
      'w_gate': self.w_gate[...],
      'w_up': self.w_up[...],
      'w_down': self.w_down[...],
    }

  def __call__(self, x: jax.Array) -> jax.Array:
    """Maps [N, D] to [N, D]."""
    return layers.swiglu(x, **self.weights())


class TransformerBlock(nnx.Module):
  """One layer: attention, then a dense SwiGLU or shared and routed experts."""

  def __init__(
    self, config: model_config.ModelConfig, layer: int, scope: Scope
  ):
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

  def __call__(self, x: jax.Array, call: Call):
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

  def _experts(self, h: jax.Array, call: Call):
    c = self.config
    tokens = h.reshape(-1, c.model_dim)
    bias = self.router_bias[...] if c.balance == 'bias' else None
    routing = moe.route(c, tokens, self.w_router[...], bias)
    out, dispatch = moe.experts_forward(
      c,
      tokens,
      routing,
      self.experts.weights(),
      call.expert_devices,
      call.capacity.get(self.layer),
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

  def _dropout(self, x: jax.Array, call: Call, part: int) -> jax.Array:
    if call.key is None:
      return x
    key = jax.random.fold_in(call.key, 2 * self.layer + part)
    return layers.dropout(x, self.config.dropout_rate, key, call.rows)


class TransformerStage(nnx.Module):
  """A stage's modules, under the names they have in the whole model."""

  def __init__(
    self, config: model_config.ModelConfig, spec: StageSpec, scope: Scope
  ):
    d, v = config.model_dim, config.vocab_size
    self.config = config
    if spec.has_embedding:
      self.embedding = scope.table('embedding/table', v, d, stddev=1.0)
    self.layers = nnx.Dict(
      {
        str(i): TransformerBlock(config, i, scope.child(f'layers/{i}'))
        for i in range(spec.first_layer, spec.last_layer)
      }
    )
    if spec.has_head:
      self.head_norm = scope.constant('head/norm', d, fill=1.0)
      self.head = scope.matrix('head/table', d, v)

  def __call__(self, inputs: model.Inputs, call: Call) -> model.Outputs:
    """See `model.StageModel.forward`; gives logits when there are no labels."""
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
    experts = self.config.num_experts
    counts = {
      'auxiliary_loss': objective,
      'load': jnp.asarray(loads, jnp.int32).reshape(-1, experts),
      'dropped': jnp.asarray(drops, jnp.int32).reshape(-1),
    }
    if not hasattr(self, 'head'):
      return model.Outputs(y=x, objective=objective, counts=counts)
    logits = self.logits(x)
    if inputs.labels is None:
      return model.Outputs(y=logits, objective=objective, counts=counts)
    loss = jnp.mean(layers.cross_entropy(logits, inputs.labels))
    counts['loss'] = loss
    return model.Outputs(y=None, objective=objective + loss, counts=counts)

  def logits(self, x: jax.Array) -> jax.Array:
    """Computes f32[B, T, V] from the residual stream [B, T, D]."""
    h = layers.rms_norm(x, self.head_norm[...])
    return layers.contract('btd,dv->btv', h, self.head[...]).astype(jnp.float32)

  def _apply(self, block: TransformerBlock, x: jax.Array, call: Call):
    if not self.config.remat:
      return block(x, call)
    # The block's weights are arguments, not captured values: a checkpoint
    # saves its arguments, and the caller leaves weights out of what is saved.
    graph, state = nnx.split(block)

    @jax.checkpoint
    def apply(state, x):
      return nnx.merge(graph, state)(x, call)

    return apply(state, x)
