"""The mask of the operators whose training state an iteration captures.

The training step takes it and returns it: what the returned mask says is what
a snapshot holds. The copies are dispatched by the plan while the mask is still
on its way, so that nothing waits for it; a snapshot counts only if both agree.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import jax
import numpy as np

from moetion_jax import errors, keys

Mask = Mapping[str, jax.Array | np.ndarray]  # bool[operators], by group


class SelectionError(errors.WrongBitsError):
  """The training step selected other operators than were planned."""


def make_mask(
  operators: Sequence[keys.OperatorId], slot: frozenset[keys.OperatorId]
) -> dict[str, np.ndarray]:
  """Makes a mask for each group: True for operators that the slot captures."""
  masks: dict[str, list[bool]] = {}
  for operator in operators:
    masks.setdefault(operator.group, []).append(operator in slot)
  return {group: np.array(mask) for group, mask in masks.items()}


def check(
  iteration: int,
  mask: Mask | None,
  operators: Sequence[keys.OperatorId],
  slot: frozenset[keys.OperatorId],
) -> None:
  """Holds the mask that the training step returned against the plan.

  Args:
    iteration: the iteration of the step.
    mask: the returned mask, which is waited for; None if the step is one that
      returns none.
    operators: the operators of this worker, in the order of the mask.
    slot: the planned operators, those of other workers included.

  Raises:
    SelectionError: they are not those of the mask.
  """
  if mask is None:
    return
  rows = {group: iter(row) for group, row in jax.device_get(mask).items()}
  if wrong := {o for o in operators if next(rows[o.group]) != (o in slot)}:
    names = ', '.join(map(str, sorted(wrong)))
    raise SelectionError(
      f'iteration {iteration}: the training step and the plan disagree on '
      f'capturing {names}'
    )
