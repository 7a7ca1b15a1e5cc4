"""The arithmetic of a transformer, as pure functions of arrays.

Nothing here, forward or backward, adds floating-point numbers by scatter: the
order of such sums is undefined on accelerators, and replay must be bit-exact.

Dims: B batch, T sequence, D model, V vocabulary, N tokens, H heads, G key/value
heads, K head dim.
"""

from __future__ import annotations

import functools

import jax
from jax import numpy as jnp

# Rows of the embedding gradient made by one product: bounds the one-hot operand
# to [tokens, 4096] for large vocabularies.
_EMBEDDING_CHUNK = 4096


def _product(spec: str, a: jax.Array, b: jax.Array) -> jax.Array:
  """Einsum with an fp32 result."""
  return jnp.einsum(spec, a, b, preferred_element_type=jnp.float32)


def contract(spec: str, x: jax.Array, w: jax.Array) -> jax.Array:
  """einsum(spec, x, w) with fp32 accumulation, rounded to x's dtype once.

  The input gradient accumulates in fp32 as well. (Autodiff of an einsum with
  `preferred_element_type` would multiply mixed dtypes; on CPU that takes the
  slow path, measured 2-3 times slower in bf16.)

  Args:
    spec: einsum of two operands in which every index of an operand appears in
      the other one or in the output.
    x: activations.
    w: weights, of the same dtype.
  """
  return _contract(spec, x, w)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _contract(spec, x, w):
  return _product(spec, x, w).astype(x.dtype)


def _contract_forward(spec, x, w):
  return contract(spec, x, w), (x, w)


def _contract_backward(spec, residuals, dy):
  x, w = residuals
  operands, out = spec.split('->')
  x_dims, w_dims = operands.split(',')
  dx = contract(f'{out},{w_dims}->{x_dims}', dy, w)
  return dx, _weight_gradient(x_dims, w_dims, out, x, dy).astype(w.dtype)


def _weight_gradient(x_dims, w_dims, out, x, dy):
  """f32 sum over the dims that x and dy share."""
  # XLA's fast bf16 product on CPU wants the summed dims last; left to itself
  # it converts both operands to fp32 instead (measured: 1.7 times slower).
  first = [d for d in w_dims if d in x_dims]
  order = first + [d for d in x_dims if d not in w_dims]

  def summed_last(x, dy):
    turned = jax.lax.optimization_barrier(
      x.transpose([x_dims.index(d) for d in order])
    )
    return _product(f'{"".join(order)},{out}->{w_dims}', turned, dy)

  def plain(x, dy):
    return _product(f'{x_dims},{out}->{w_dims}', x, dy)

  return jax.lax.platform_dependent(x, dy, cpu=summed_last, default=plain)


_contract.defvjp(_contract_forward, _contract_backward)


@jax.custom_vjp
def rms_norm(x: jax.Array, scale: jax.Array) -> jax.Array:
  """RMSNorm over the last dim, computed in fp32.

  Keeps its input and one number per row for the backward pass.
  """
  return _rms_norm_forward(x, scale)[0]


def _rms_norm_forward(x, scale):
  x32 = x.astype(jnp.float32)
  inverse = jax.lax.rsqrt(jnp.mean(x32 * x32, -1, keepdims=True) + 1e-6)
  y = (x32 * inverse * scale.astype(jnp.float32)).astype(x.dtype)
  return y, (x, scale, inverse)


def _rms_norm_backward(residuals, dy):
  x, scale, inverse = residuals
  normal = x.astype(jnp.float32) * inverse
  dy = dy.astype(jnp.float32)
  dscale = jnp.sum(dy * normal, axis=tuple(range(dy.ndim - 1)))
  dnormal = dy * scale.astype(jnp.float32)
  mean = jnp.mean(dnormal * normal, -1, keepdims=True)
  dx = inverse * (dnormal - normal * mean)
  return dx.astype(x.dtype), dscale.astype(scale.dtype)


rms_norm.defvjp(_rms_norm_forward, _rms_norm_backward)


def rotate(x: jax.Array, rope_base: float) -> jax.Array:
  """Rotary position embedding of [B, T, heads, K]; positions count from 0."""
  half = x.shape[-1] // 2
  frequency = rope_base ** (-jnp.arange(half, dtype=jnp.float32) / half)
  angle = jnp.arange(x.shape[1], dtype=jnp.float32)[:, None] * frequency
  cos, sin = jnp.cos(angle)[:, None, :], jnp.sin(angle)[:, None, :]
  a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
  turned = jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
  return turned.astype(x.dtype)


@jax.custom_vjp
def causal_attention(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
  """Causal grouped-query attention of [B, T, H, K] on [B, T, G, K].

  Equals `jax.nn.dot_product_attention(is_causal=True)`. It is written out
  because of what it keeps for the backward pass: the probabilities once, in
  compute dtype, where the library's keeps five tensors of [B, H, T, T]
  (measured at `small` on CPU: half the time, a fifth of the memory).
  """
  return _attention_forward(q, k, v)[0]


def _pack(x: jax.Array, groups: int) -> jax.Array:
  """[B, T, H, K] -> [B, G, (H / G) T, K]: a group's heads are its rows."""
  b, t, h, d = x.shape
  x = x.reshape(b, t, groups, h // groups, d).transpose(0, 2, 3, 1, 4)
  return x.reshape(b, groups, -1, d)


def _unpack(x: jax.Array, t: int) -> jax.Array:
  """The inverse of `_pack`."""
  b, g, rows, d = x.shape
  x = x.reshape(b, g, rows // t, t, d).transpose(0, 3, 1, 2, 4)
  return x.reshape(b, t, -1, d)


def _attention_forward(q, k, v):
  t, groups, d = q.shape[1], k.shape[2], q.shape[3]
  q, k, v = _pack(q, groups), _pack(k, groups), _pack(v, groups)
  scores = _product('bgqd,bgsd->bgqs', q, k) * d**-0.5
  scores = scores.reshape(*scores.shape[:2], -1, t, t)
  causal = jnp.arange(t)[:, None] >= jnp.arange(t)
  p = jax.nn.softmax(jnp.where(causal, scores, -1e30), axis=-1).astype(q.dtype)
  p = p.reshape(*p.shape[:2], -1, t)  # [B, G, (H / G) T, T]
  out = _product('bgqs,bgsd->bgqd', p, v).astype(q.dtype)
  return _unpack(out, t), (q, k, v, p)


def _attention_backward(residuals, dout):
  q, k, v, p = residuals
  t, groups, d = k.shape[2], k.shape[1], q.shape[3]
  dout = _pack(dout, groups)
  dv = _product('bgqs,bgqd->bgsd', p, dout).astype(v.dtype)
  dp = _product('bgqd,bgsd->bgqs', dout, v)
  p = p.astype(jnp.float32)
  mean = jnp.sum(dp * p, axis=-1, keepdims=True)
  dscores = (p * (dp - mean) * d**-0.5).astype(q.dtype)
  dq = _product('bgqs,bgsd->bgqd', dscores, k).astype(q.dtype)
  dk = _product('bgqs,bgqd->bgsd', dscores, q).astype(k.dtype)
  return _unpack(dq, t), _unpack(dk, t), _unpack(dv, t)


causal_attention.defvjp(_attention_forward, _attention_backward)


def swiglu(x: jax.Array, w_gate, w_up, w_down) -> jax.Array:
  """SwiGLU of [N, D], or of [E, C, D] with weights stacked over experts."""
  e = 'e' if w_gate.ndim == 3 else ''
  gate = contract(f'{e}nd,{e}df->{e}nf', x, w_gate)
  up = contract(f'{e}nd,{e}df->{e}nf', x, w_up)
  return contract(f'{e}nf,{e}fd->{e}nd', _gated(gate, up), w_down)


@jax.custom_vjp
def _gated(gate: jax.Array, up: jax.Array) -> jax.Array:
  """silu(gate) * up; keeps the sigmoid, whose exp is the costly part."""
  return _gated_forward(gate, up)[0]


def _gated_forward(gate, up):
  gate32 = gate.astype(jnp.float32)
  sigmoid = jax.nn.sigmoid(gate32)
  y = (gate32 * sigmoid * up.astype(jnp.float32)).astype(gate.dtype)
  return y, (gate, up, sigmoid.astype(gate.dtype))


def _gated_backward(residuals, dy):
  gate, up, sigmoid = (r.astype(jnp.float32) for r in residuals)
  dy32 = dy.astype(jnp.float32)
  silu = gate * sigmoid
  dgate = dy32 * up * (sigmoid + silu * (1 - sigmoid))
  return dgate.astype(dy.dtype), (dy32 * silu).astype(dy.dtype)


_gated.defvjp(_gated_forward, _gated_backward)


def dropout(x: jax.Array, rate: float, key: jax.Array, rows) -> jax.Array:
  """Zeroes a fraction `rate` of x [B, ...] and scales the rest.

  Every row has its own key, `rows` [B] being the row's number in the global
  microbatch, so that the mask does not depend on how rows lie on devices.
  """
  keys = jax.vmap(lambda row: jax.random.fold_in(key, row))(rows)
  keep = jax.vmap(lambda k: jax.random.bernoulli(k, 1.0 - rate, x.shape[1:]))(
    keys
  )
  return jnp.where(keep, x / (1.0 - rate), 0).astype(x.dtype)


@jax.custom_vjp
def embed(table: jax.Array, tokens: jax.Array) -> jax.Array:
  """Looks up the rows `tokens` [B, T] of `table` [V, D].

  The gradient is a product with one-hot rows instead of a scatter-add; it
  costs what the head's weight gradient costs.
  """
  return table[tokens]


def _embed_forward(table, tokens):
  # The table is kept for its shape only; nothing of it is read backward.
  return embed(table, tokens), (table, tokens)


def _embed_backward(residuals, dy):
  table, tokens = residuals
  ids = tokens.reshape(-1)  # [N]
  dy = dy.reshape(-1, dy.shape[-1])  # [N, D]
  vocab = table.shape[0]
  chunk = min(vocab, _EMBEDDING_CHUNK)

  def rows(first):
    one_hot = (ids[:, None] - first == jnp.arange(chunk)).astype(dy.dtype)
    return jnp.einsum(
      'nv,nd->vd', one_hot, dy, preferred_element_type=jnp.float32
    )

  firsts = jnp.arange(0, vocab, chunk)
  dtable = jax.lax.map(rows, firsts).reshape(-1, dy.shape[-1])[:vocab]
  return dtable.astype(table.dtype), None


embed.defvjp(_embed_forward, _embed_backward)


# Recomputed in the backward pass: else the logits would be kept three times.
@functools.partial(jax.checkpoint, prevent_cse=False)
def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
  """Negative log likelihood in nats of labels [...] under logits f32[..., V].

  The label's logit is picked by comparison: the gradient of a gather would be
  a scatter-add.
  """
  picked = jnp.where(
    labels[..., None] == jnp.arange(logits.shape[-1]), logits, 0.0
  )
  return jax.nn.logsumexp(logits, axis=-1) - jnp.sum(picked, axis=-1)
