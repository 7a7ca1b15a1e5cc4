"""Bit digests of operators.

An operator's digest is two uint32 lanes computed from every bit of its training
state. It depends on the operator's own words, their leaf's name and their
position inside the operator, and on nothing else: neither on how the model is
cut nor on how its leaves are sharded over experts.

A leaf of n words is laid out as `rows` x n / rows, each column is folded into
one word with powers of an odd constant, and the columns of all leaves, in order
of their names, stand in one row. Each column word is mixed with its position
(and all leaves' names) by an invertible function; the lanes are the sum of the
results and their sum weighted by position: integer sums, exact in any order.
Any single changed bit changes a column word and thereby its mixed term. Against
other changes the lanes are about 32 bits strong; no more is claimed.

Reductions run over a middle dim: XLA's CPU backend vectorizes those and no
others (measured: 17 ms for 440 MB, against 110 ms for a plain sum of all
words).
"""

from __future__ import annotations

from collections.abc import Mapping

import jax
from jax import numpy as jnp

from moetion_jax import digest_rule


def digest_leaves(leaves: Mapping[str, jax.Array], stacked: bool) -> jax.Array:
  """Digests the operators of one group; pure, traceable.

  Args:
    leaves: the group's leaves by name; with `stacked` all share the leading
      dim, one row an operator. Any dtype whose numbers are whole bytes.
    stacked: see `model.Group`.

  Returns:
    u32[operators, 2].
  """
  if not leaves:
    raise ValueError('a group without leaves has no digest')
  names = sorted(leaves)
  columns = []
  for name in names:
    count = leaves[name].shape[0] if stacked else 1
    words = _words(leaves[name])
    columns.append(_columns(words.reshape(count, words.size // max(count, 1))))
  u = jnp.concatenate(columns, axis=1)  # u32[operators, columns]
  u = jnp.pad(u, ((0, 0), (0, digest_rule.padded(u.shape[1]) - u.shape[1])))
  position = jnp.arange(u.shape[1], dtype=jnp.uint32)
  mixed = digest_rule.mix_columns(u, position, names)
  return jnp.stack(
    [_sum(mixed), _sum(mixed * digest_rule.weights(position))], axis=-1
  )


def _words(leaf: jax.Array) -> jax.Array:
  """Returns the bits of `leaf` as uint32: a word an element, two if larger."""
  if leaf.dtype == jnp.bool_:
    return leaf.astype(jnp.uint32)
  if jnp.issubdtype(leaf.dtype, jnp.complexfloating):
    return _words(jnp.stack([leaf.real, leaf.imag], axis=-1))
  width = leaf.dtype.itemsize
  unsigned = {1: jnp.uint8, 2: jnp.uint16}.get(width, jnp.uint32)
  return jax.lax.bitcast_convert_type(leaf, unsigned).astype(jnp.uint32)


def _columns(words: jax.Array) -> jax.Array:
  """Folds u32[operators, n] into u32[operators, n / rows]."""
  count, n = words.shape
  if not n:
    return words
  rows = digest_rule.rows_of(n)
  powers = digest_rule.powers(rows)
  return jnp.sum(
    digest_rule.blend(words).reshape(count, rows, -1) * powers[None, :, None],
    axis=1,
    dtype=jnp.uint32,
  )


def _sum(x: jax.Array) -> jax.Array:
  """Sums u32[operators, n] over n, mostly along a middle dim."""
  partial = jnp.sum(
    x.reshape(x.shape[0], digest_rule.SUM_ROWS, -1), axis=1, dtype=jnp.uint32
  )
  return jnp.sum(partial, axis=1, dtype=jnp.uint32)
