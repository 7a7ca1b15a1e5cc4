"""Digests of operators whose training state lies on the host, in NumPy.

The same numbers as `digest`, which the device computes, by the same rule
(`digest_rule`): here nothing is compiled, no JAX is needed, and the temporaries
are a fraction of the largest leaf.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

import numpy as np

from moetion_jax import digest_rule, keys

Digests = Mapping[keys.OperatorId, np.ndarray]


def digest_leaves(
  leaves: Mapping[str, np.ndarray], stacked: bool
) -> np.ndarray:
  """Digests the operators of one group; see `digest.digest_leaves`.

  Returns:
    u32[operators, 2].
  """
  if not leaves:
    raise ValueError('a group without leaves has no digest')
  names = sorted(leaves)
  columns = []
  for name in names:
    leaf = np.asarray(leaves[name])
    columns.append(_columns(_words(leaf), leaf.shape[0] if stacked else 1))
  u = np.concatenate(columns, axis=1)  # u32[operators, columns]
  u = np.pad(u, ((0, 0), (0, digest_rule.padded(u.shape[1]) - u.shape[1])))
  position = np.arange(u.shape[1], dtype=np.uint32)
  mixed = digest_rule.mix_columns(u, position, names)
  weighted = mixed * digest_rule.weights(position)
  return np.stack([_sum(mixed), _sum(weighted)], axis=-1)


def digest_state(
  state: Mapping[str, Mapping[str, np.ndarray]], stacked: Collection[str]
) -> dict[keys.OperatorId, np.ndarray]:
  """Digests all operators of a state.

  Args:
    state: the leaves by group; of a stacked group all operators, in order.
    stacked: the names of the stacked groups.
  """
  found = {}
  for group, leaves in state.items():
    is_stacked = group in stacked
    for row, lanes in enumerate(digest_leaves(leaves, is_stacked)):
      found[keys.OperatorId(group, row if is_stacked else -1)] = lanes
  return found


def stacked_groups(operators: Iterable[keys.OperatorId]) -> frozenset[str]:
  """Returns the groups that are stacked, by their operators' names."""
  return frozenset(o.group for o in operators if o.expert >= 0)


def differences(found: Digests, wanted: Digests) -> list[keys.OperatorId]:
  """Lists the operators that only one has, or that have unequal digests."""
  return sorted(
    operator
    for operator in found.keys() | wanted.keys()
    if operator not in found
    or operator not in wanted
    or not np.array_equal(found[operator], wanted[operator])
  )


def _words(leaf: np.ndarray) -> np.ndarray:
  """Returns the bits of a leaf, flat: a word an element, two if larger.

  Elements of less than 32 bits stay what they are: `_columns` widens them.
  """
  if leaf.dtype == np.bool_:
    leaf = leaf.astype(np.uint8)  # any other byte than 0 is one
  width = min(leaf.dtype.itemsize, 4)
  return np.ascontiguousarray(leaf).reshape(-1).view(f'<u{width}')


def _columns(words: np.ndarray, count: int) -> np.ndarray:
  """Folds the words of `count` operators into u32[count, columns]."""
  n = words.size // max(count, 1)
  if not n:
    return np.zeros((count, 0), np.uint32)
  rows = digest_rule.rows_of(n)
  strips = words.reshape(count, rows, -1)
  folded = np.zeros((count, n // rows), np.uint32)
  for row, power in enumerate(digest_rule.powers(rows)):
    folded += digest_rule.blend(strips[:, row].astype(np.uint32)) * power
  return folded


def _sum(x: np.ndarray) -> np.ndarray:
  return np.asarray(np.sum(x, axis=1, dtype=np.uint32))
