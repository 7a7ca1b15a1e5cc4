"""Final checkpoints of language models: what begins or samples from them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from launch.lm import settings as run_settings
from moetion_jax import codec, errors
from moetion_jax.programs import stage as stage_lib
from moetion_jax.runtime.checkpoints import damage, file, proof
from moetion_jax.state import partition

_ENDS = ('embedding', 'head')  # groups that the first and last stage have
_OTHER_OPTIMIZER = (
  ': it is of a run with another optimizer; --init_weights_only begins with a '
  'new state of this one'
)


def load_config(path: str, flag: str) -> run_settings.RunConfig:
  """Reads the configuration that a checkpoint carries.

  Raises:
    errors.ConfigError: it is missing, damaged or not one of ours.
  """
  config = file.load_config(path, flag)
  try:
    return codec.decode(run_settings.RunConfig, config)
  except Exception as error:  # fields of another version, of whatever type
    raise errors.ConfigError(
      flag,
      path,
      f'carries no configuration of ours: {damage.first_line(error)}'
      f'; use it with the version that wrote it, else {file.ADVICE}',
    ) from error


def check_all_stages(tree: Mapping[str, Any], path: str, flag: str) -> None:
  """Checks that a checkpoint is of a whole model.

  Args:
    tree: the checkpoint, as `file.load` returned it.
    path: its folder.
    flag: the flag that named it, for errors.

  Raises:
    errors.ConfigError: it is of one stage, as `launch.convert` writes it.
  """
  names = tree['parameters']
  missing = [p for p in _ENDS if not any(n.startswith(f'{p}/') for n in names)]
  if missing:
    raise errors.ConfigError(
      flag,
      path,
      f'is the state of one stage, without {" and ".join(missing)} of the '
      f'model, as launch.convert writes it; {file.NAME_ONE}',
    )


def check(
  stage: stage_lib.Stage,
  tree: Mapping[str, Any],
  path: str,
  *,
  weights_only: bool,
) -> None:
  """Checks that a checkpoint holds what a stage needs; moves nothing.

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
            'init_from', path, f'has {leaf} of {group}{_OTHER_OPTIMIZER}'
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
      raise errors.ConfigError('init_from', path, reason)
    found = np.asarray(found)
    if found.shape != shape.shape or found.dtype != shape.dtype:
      raise errors.ConfigError(
        'init_from',
        path,
        f'{name} is {found.dtype}{list(found.shape)}, the run needs '
        f'{shape.dtype}{list(shape.shape)}',
      )


def state_of(
  stage: stage_lib.Stage, tree: Mapping[str, Any], *, weights_only: bool
) -> partition.State:
  """Returns a worker's part of the state in a checkpoint `check` passed."""
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
