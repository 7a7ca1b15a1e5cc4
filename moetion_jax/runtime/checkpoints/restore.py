"""A final checkpoint as the state from which a run begins, or goes on."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from moetion_jax import errors
from moetion_jax.programs import stage as stage_lib
from moetion_jax.runtime.checkpoints import proof
from moetion_jax.state import partition

_OTHER_OPTIMIZER = (
  ': it is of a run with another optimizer; --init_weights_only begins with a '
  'new state of this one'
)


def initial(
  stage: stage_lib.Stage,
  tree: Mapping[str, Any],
  path: str,
  flag: str,
  *,
  weights_only: bool = False,
) -> Callable[[], partition.State]:
  """Checks that a checkpoint holds what a stage needs; moves nothing.

  Args:
    stage: the stage, bound to devices.
    tree: the checkpoint, as `file.load` returned it.
    path: its folder.
    flag: the flag that named it, for errors.
    weights_only: whether its optimizer state is left out.

  Returns:
    The function that makes the worker's part of its state, on the devices.

  Raises:
    errors.ConfigError: a leaf that the stage needs is missing or has another
      shape or dtype, or there is a leaf of another optimizer.
  """
  wanted: dict[tuple[str, ...], jax.ShapeDtypeStruct] = {
    ('parameters', n): s for n, s in stage.model.shapes.items()
  }
  if not weights_only:
    for group, leaves in stage.whole.state_shapes.items():
      for leaf, shape in leaves.items():
        if not leaf.startswith(proof.MASTER):
          wanted['optimizer', group, leaf] = shape
      for leaf in tree['optimizer'].get(group, {}):
        if leaf not in leaves:
          raise errors.ConfigError(
            flag, path, f'has {leaf} of {group}{_OTHER_OPTIMIZER}'
          )
  for keys, shape in wanted.items():
    found = tree
    for key in keys:
      found = found.get(key) if isinstance(found, Mapping) else None
    name = ' of '.join(reversed(keys[1:]))
    if found is None:
      reason = f'has no {name}'
      if keys[0] == 'optimizer':
        reason += _OTHER_OPTIMIZER
      raise errors.ConfigError(flag, path, reason)
    found = np.asarray(found)
    if found.shape != shape.shape or found.dtype != shape.dtype:
      raise errors.ConfigError(
        flag,
        path,
        f'{name} is {found.dtype}{list(found.shape)}, the run needs '
        f'{shape.dtype}{list(shape.shape)}',
      )
  return functools.partial(_state_of, stage, tree, weights_only=weights_only)


def _state_of(
  stage: stage_lib.Stage, tree: Mapping[str, Any], *, weights_only: bool
) -> partition.State:
  """Returns a worker's part of the state in a checkpoint that fits."""
  parameters, optimizer = tree['parameters'], tree['optimizer']
  if weights_only:
    return stage.state_from_masters(
      {n: np.asarray(parameters[n]) for n in stage.model.shapes}
    )
  return stage.place_state(
    {
      group: {
        leaf: stage.own_rows(
          group,
          np.asarray(
            parameters[leaf.removeprefix(proof.MASTER)]
            if leaf.startswith(proof.MASTER)
            else optimizer[group][leaf]
          ),
        )
        for leaf in leaves
      }
      for group, leaves in stage.state_shapes.items()
    }
  )
