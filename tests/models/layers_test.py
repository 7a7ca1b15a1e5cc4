import chex
import jax
import numpy as np
import optax
import pytest
from jax import numpy as jnp

from models import layers

# Every contraction that the model uses, with shapes that differ in every dim.
_CONTRACTIONS = {
  'btd,dh->bth': ((2, 3, 5), (5, 7)),
  'bth,hd->btd': ((2, 3, 7), (7, 5)),
  'btd,dv->btv': ((2, 3, 5), (5, 11)),
  'nd,df->nf': ((4, 5), (5, 7)),
  'nf,fd->nd': ((4, 7), (7, 5)),
  'end,edf->enf': ((3, 4, 5), (3, 5, 7)),
  'enf,efd->end': ((3, 4, 7), (3, 7, 5)),
}


def _integers(seed: int, *shape: int, dtype=jnp.float32) -> jax.Array:
  values = np.random.default_rng(seed).integers(-4, 5, shape)
  return jnp.asarray(values, dtype)


def _normals(seed: int, *shape: int, dtype=jnp.float32) -> jax.Array:
  values = np.random.default_rng(seed).standard_normal(shape)
  return jnp.asarray(values, dtype)


def _with_gradients(function, *args, dy):
  @jax.jit
  def run(args, dy):
    y, vjp = jax.vjp(function, *args)
    return y, *vjp(dy)

  return run(args, dy)


def _contractions_with_gradients(contract, make, *, scale=1, dtype):
  """{spec: (y, dx, dw)} of all contractions, by one compiled program."""

  @jax.jit
  def run(operands):
    out = {}
    for spec, (x, w, dy) in operands.items():
      y, vjp = jax.vjp(lambda x, w, spec=spec: contract(spec, x, w), x, w)
      out[spec] = y, *vjp(dy)
    return out

  operands = {}
  for spec, (x_shape, w_shape) in _CONTRACTIONS.items():
    x, w = make(0, *x_shape), make(1, *w_shape)
    dy = make(2, *np.einsum(spec, x, w).shape)
    operands[spec] = (scale * x, scale * w, dy)
  return run(jax.tree.map(lambda a: a.astype(dtype), operands))


def test_contract_is_einsum_forward_and_backward_bitwise():
  chex.assert_trees_all_equal(
    _contractions_with_gradients(layers.contract, _integers, dtype=jnp.float32),
    _contractions_with_gradients(jnp.einsum, _integers, dtype=jnp.float32),
  )


def test_contract_is_einsum_but_for_the_order_of_sums():
  # Of at most 24 terms of order 1 each.
  chex.assert_trees_all_close(
    _contractions_with_gradients(layers.contract, _normals, dtype=jnp.float32),
    _contractions_with_gradients(jnp.einsum, _normals, dtype=jnp.float32),
    rtol=1e-5,
    atol=1e-5,
  )


def test_contract_in_bf16_rounds_the_exact_sum_once():
  # Scaled by 63, products need more bits than bf16 holds, and fewer than fp32.
  exact = _contractions_with_gradients(
    jnp.einsum, _integers, scale=63, dtype=jnp.float32
  )
  rounded = jax.tree.map(lambda a: a.astype(jnp.bfloat16), exact)
  assert np.any(rounded['nd,df->nf'][0] != exact['nd,df->nf'][0])
  chex.assert_trees_all_equal(
    _contractions_with_gradients(
      layers.contract, _integers, scale=63, dtype=jnp.bfloat16
    ),
    rounded,
  )


def test_contract_accumulates_all_three_products_in_fp32():
  # In bf16 a running sum of ones stops at 256.
  n = 1024

  def run(rows, inner, columns):
    return _with_gradients(
      lambda x, w: layers.contract('nd,df->nf', x, w),
      jnp.ones((rows, inner), jnp.bfloat16),
      jnp.ones((inner, columns), jnp.bfloat16),
      dy=jnp.ones((rows, columns), jnp.bfloat16),
    )

  y, _, _ = run(1, n, 1)
  _, dx, _ = run(1, 1, n)
  _, _, dw = run(n, 1, 1)
  assert [float(a[0, 0]) for a in (y, dx, dw)] == [n, n, n]


# 4096 rows are one chunk of the gradient.
@pytest.mark.parametrize('vocab', [5, 4096, 4097, 9001])
@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
def test_embedding_gradient_is_its_one_hot_definition(vocab, dtype):
  edges = [0, vocab - 1, min(4095, vocab - 1), min(4096, vocab - 1)]
  tokens = np.random.default_rng(0).integers(0, vocab, (2, 7)).astype(np.int32)
  tokens[0, :4] = edges
  tokens[1, :2] = tokens[0, 0]  # a token that occurs more than once
  table = _integers(1, vocab, 3, dtype=dtype)
  dy = _integers(2, 2, 7, 3, dtype=dtype)
  y, dtable = _with_gradients(
    lambda table: layers.embed(table, jnp.asarray(tokens)), table, dy=dy
  )
  one_hot = np.eye(vocab, dtype=np.float32)[tokens.reshape(-1)]  # [N, V]
  assert y.dtype == dtable.dtype == dtype
  chex.assert_trees_all_equal(
    (y.astype(jnp.float32), dtable.astype(jnp.float32)),
    (
      (one_hot @ np.asarray(table, np.float32)).reshape(2, 7, 3),
      one_hot.T @ np.asarray(dy, np.float32).reshape(-1, 3),
    ),
  )


def test_embedding_gradient_accumulates_in_fp32():
  tokens = jnp.zeros((1, 1024), jnp.int32)
  dy = jnp.ones((1, 1024, 1), jnp.bfloat16)
  _, dtable = _with_gradients(
    lambda table: layers.embed(table, tokens),
    jnp.zeros((2, 1), jnp.bfloat16),
    dy=dy,
  )
  np.testing.assert_array_equal(dtable.astype(jnp.float32), [[1024], [0]])


@pytest.mark.parametrize('scale', [1.0, 1e4])
def test_cross_entropy_equals_optax_with_its_gradient(scale):
  logits = scale * _normals(0, 3, 5, 17)
  labels = jnp.asarray(np.random.default_rng(1).integers(0, 17, (3, 5)))
  labels = labels.at[0, 0].set(0).at[0, 1].set(16)
  dy = _normals(2, 3, 5)
  ours = _with_gradients(
    lambda x: layers.cross_entropy(x, labels), logits, dy=dy
  )
  expected = _with_gradients(
    lambda x: optax.softmax_cross_entropy_with_integer_labels(x, labels),
    logits,
    dy=dy,
  )
  chex.assert_tree_all_finite(ours)
  chex.assert_trees_all_close(ours, expected, rtol=1e-5, atol=1e-6 * scale)


def test_cross_entropy_of_uniform_logits_is_log_of_the_vocabulary():
  loss = layers.cross_entropy(jnp.zeros((2, 256)), jnp.array([0, 255]))
  np.testing.assert_allclose(loss, np.log(256), rtol=1e-6)


def _plain_rms_norm(x, scale):
  mean_square = jnp.mean(x**2, axis=-1, keepdims=True)
  return x / jnp.sqrt(mean_square + 1e-6) * scale


def test_rms_norm_is_its_definition_with_its_gradient():
  x, scale, dy = _normals(0, 2, 3, 8), _normals(1, 8), _normals(2, 2, 3, 8)
  ours = _with_gradients(layers.rms_norm, x, scale, dy=dy)
  expected = _with_gradients(_plain_rms_norm, x, scale, dy=dy)
  chex.assert_trees_all_close(ours, expected, rtol=1e-5, atol=1e-5)


def test_rms_norm_computes_in_fp32_whatever_it_reads():
  x, scale = 100 * _normals(0, 4, 512), _normals(1, 512)
  x, scale = x.astype(jnp.bfloat16), scale.astype(jnp.bfloat16)
  exact = _plain_rms_norm(x.astype(jnp.float32), scale.astype(jnp.float32))
  ours = layers.rms_norm(x, scale)
  assert ours.dtype == jnp.bfloat16
  # At most one rounding to bf16 (8 bits) apart.
  chex.assert_trees_all_close(ours.astype(jnp.float32), exact, rtol=2**-8)


def test_rms_norm_of_zeros_is_zero_with_finite_gradients():
  y, dx, dscale = _with_gradients(
    layers.rms_norm, jnp.zeros((1, 4)), jnp.ones(4), dy=jnp.ones((1, 4))
  )
  np.testing.assert_array_equal(y, 0)
  chex.assert_tree_all_finite((dx, dscale))


def test_rotation_turns_pairs_by_position_times_frequency():
  x = _normals(0, 2, 6, 3, 8)
  pairs = np.asarray(x[..., :4]) + 1j * np.asarray(x[..., 4:])
  frequency = 100.0 ** (-np.arange(4) / 4)
  angle = np.arange(6)[:, None, None] * frequency
  expected = pairs * np.exp(1j * angle)
  turned = layers.rotate(x, 100.0)
  np.testing.assert_allclose(turned[..., :4], expected.real, atol=1e-5)
  np.testing.assert_allclose(turned[..., 4:], expected.imag, atol=1e-5)
  np.testing.assert_array_equal(turned[:, 0], x[:, 0])


def test_rotation_keeps_norms():
  x = _normals(0, 2, 64, 3, 8)
  chex.assert_trees_all_close(
    jnp.linalg.norm(layers.rotate(x, 1e4), axis=-1),
    jnp.linalg.norm(x, axis=-1),
    rtol=1e-5,
  )


def test_rotated_products_depend_on_relative_position_only():
  q, k = _normals(0, 8), _normals(1, 8)
  everywhere = lambda v: jnp.broadcast_to(v, (1, 16, 1, 8))  # noqa: E731
  turned_q = layers.rotate(everywhere(q), 100.0)[0, :, 0]
  turned_k = layers.rotate(everywhere(k), 100.0)[0, :, 0]
  scores = np.asarray(turned_q @ turned_k.T)  # [T, T]
  for offset in range(-15, 16):
    diagonal = np.diagonal(scores, offset)
    np.testing.assert_allclose(diagonal, diagonal[0], atol=1e-4)
  assert np.ptp(scores[:, 0]) > 0.1


@pytest.mark.parametrize('experts', [None, 3])
def test_swiglu_is_its_definition(experts):
  stack = () if experts is None else (experts,)
  x = _normals(0, *stack, 5, 4)
  w_gate, w_up = _normals(1, *stack, 4, 6), _normals(2, *stack, 4, 6)
  w_down = _normals(3, *stack, 6, 4)

  def plain(x, w_gate, w_up, w_down):
    return (jax.nn.silu(x @ w_gate) * (x @ w_up)) @ w_down

  dy = _normals(4, *stack, 5, 4)
  args = (x, w_gate, w_up, w_down)
  chex.assert_trees_all_close(
    _with_gradients(layers.swiglu, *args, dy=dy),
    _with_gradients(plain, *args, dy=dy),
    rtol=1e-4,
    atol=1e-4,
  )


@pytest.mark.parametrize(
  ('rate', 'dtype'), [(0.25, jnp.bfloat16), (0.5, jnp.float32)]
)
def test_dropout_zeroes_a_share_and_scales_the_rest(rate, dtype):
  x = _normals(0, 64, 64).astype(dtype)
  y = layers.dropout(x, rate, jax.random.key(1), jnp.arange(64))
  assert y.dtype == dtype
  kept = np.asarray(y != 0)
  # 4096 independent draws: five standard deviations are below 0.04.
  assert abs(kept.mean() - (1 - rate)) < 0.04
  scaled = np.asarray((x / (1 - rate)).astype(dtype), np.float32)
  np.testing.assert_array_equal(
    np.asarray(y, np.float32), np.where(kept, scaled, 0)
  )


def test_dropout_of_a_row_depends_on_its_number_alone():
  x = jnp.ones((6, 5, 4))
  key, rows = jax.random.key(3), jnp.array([9, 4, 7, 0, 1, 2])
  whole = layers.dropout(x, 0.5, key, rows)
  order = jnp.array([5, 2, 0, 1, 4, 3])
  chex.assert_trees_all_equal(
    layers.dropout(x, 0.5, key, rows[order]), whole[order]
  )
  halves = [
    layers.dropout(x[:3], 0.5, key, rows[:3]),
    layers.dropout(x[3:], 0.5, key, rows[3:]),
  ]
  chex.assert_trees_all_equal(jnp.concatenate(halves), whole)
  masks = {np.asarray(row).tobytes() for row in whole}
  assert len(masks) == 6  # no two rows share a mask


def test_dropout_mask_depends_on_the_key():
  x, rows = jnp.ones((2, 32)), jnp.arange(2)
  first = layers.dropout(x, 0.5, jax.random.key(0), rows)
  second = layers.dropout(x, 0.5, jax.random.key(1), rows)
  assert np.any(first != second)


def test_dropout_passes_gradients_where_it_kept():
  x, rows = _normals(0, 4, 16), jnp.arange(4)
  y, dx = _with_gradients(
    lambda x: layers.dropout(x, 0.5, jax.random.key(0), rows),
    x,
    dy=jnp.ones((4, 16)),
  )
  np.testing.assert_array_equal(dx, np.where(y != 0, 2.0, 0.0))


@pytest.mark.parametrize(('heads', 'kv_heads'), [(4, 4), (4, 2), (6, 1)])
def test_causal_attention_equals_the_library(heads, kv_heads):
  keys = jax.random.split(jax.random.key(0), 4)
  shapes = [(2, 9, heads, 8), (2, 9, kv_heads, 8), (2, 9, kv_heads, 8)]
  q, k, v = (
    jax.random.normal(key, s) for key, s in zip(keys, shapes, strict=False)
  )
  dout = jax.random.normal(keys[3], q.shape)

  def library(q, k, v):
    return jax.nn.dot_product_attention(q, k, v, is_causal=True)

  ours, our_vjp = jax.vjp(layers.causal_attention, q, k, v)
  theirs, their_vjp = jax.vjp(library, q, k, v)
  np.testing.assert_allclose(ours, theirs, atol=2e-6)
  for a, b in zip(our_vjp(dout), their_vjp(dout), strict=True):
    np.testing.assert_allclose(a, b, atol=1e-5)
