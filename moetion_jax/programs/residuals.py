"""Residuals from `forward` to `backward`: a vjp function's leaves, each once.

A `jax.vjp` function is a pytree. Compute weights among its leaves are left out
(`backward` has them as an argument; returned, they would be copied for every
microbatch in flight) and found again by identity of tracers, also under scan.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax


@dataclasses.dataclass(frozen=True)
class _Leaf:
  """Source of one leaf of the vjp function."""

  weight: str | None  # a compute weight, by name
  index: int = 0  # else a residual


@dataclasses.dataclass(frozen=True)
class Recipe:
  """Recipe to put a vjp function together again."""

  structure: Any
  leaves: tuple[_Leaf, ...]

  def join(
    self, compute: Mapping[str, jax.Array], residuals: Sequence[jax.Array]
  ) -> Callable[..., Any]:
    """Makes the vjp function of these weights and residuals."""
    leaves = [
      compute[leaf.weight] if leaf.weight is not None else residuals[leaf.index]
      for leaf in self.leaves
    ]
    return jax.tree.unflatten(self.structure, leaves)


def split(
  vjp: Callable[..., Any], compute: Mapping[str, jax.Array]
) -> tuple[tuple[jax.Array, ...], Recipe]:
  """Splits a vjp function into its residuals and the recipe to join them."""
  leaves, structure = jax.tree.flatten(vjp)
  weights = {id(w): n for n, w in compute.items()}
  places: dict[int, int] = {}
  kept, residuals = [], []
  for leaf in leaves:
    if id(leaf) in weights:
      kept.append(_Leaf(weights[id(leaf)]))
      continue
    if id(leaf) not in places:
      places[id(leaf)] = len(residuals)
      residuals.append(leaf)
    kept.append(_Leaf(None, places[id(leaf)]))
  return tuple(residuals), Recipe(structure, tuple(kept))
