"""The dense checkpoint at the end of a run: plain Orbax, plain names.

Anyone can read it with `ocp.StandardCheckpointer().restore(path)`:

  {'iteration': i64[],
   'parameters': {parameter name: f32 master},
   'optimizer': {group: {path in its optax state: array}}}

The run's configuration travels along as Orbax custom metadata.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from orbax import checkpoint as ocp

from launch.lm import settings as run_settings
from moetion_jax import errors
from moetion_jax.programs import stage as stage_lib
from moetion_jax.runtime.records import checkpoint_folder
from moetion_jax.snapshots import orbax_handler
from moetion_jax.state import partition

_MASTER = 'master/'
_OTHER_OPTIMIZER = (
  ': it is of a run with another optimizer; --init_weights_only begins with a '
  'new state of this one'
)


def save(
  path: str,
  states: Sequence[partition.State],
  iteration: int,
  config: run_settings.RunConfig,
) -> None:
  """Writes all stages' training states; returns when they are committed.

  An earlier checkpoint at `path` is replaced; files of others in it stay.
  """
  parameters: dict[str, np.ndarray] = {}
  optimizer: dict[str, dict[str, np.ndarray]] = {}
  for state in states:
    for group, leaves in state.items():
      host = {k: np.asarray(v) for k, v in jax.device_get(leaves).items()}
      for leaf, value in host.items():
        if leaf.startswith(_MASTER):
          parameters[leaf.removeprefix(_MASTER)] = value
        else:
          optimizer.setdefault(group, {})[leaf] = value
  tree = {
    'iteration': np.int64(iteration),
    'parameters': parameters,
    'optimizer': optimizer,
  }
  with (
    checkpoint_folder.replacing(path) as place,
    ocp.StandardCheckpointer(
      # The other workers of a stage world know nothing of it.
      multiprocessing_options=orbax_handler.alone('final'),
      async_options=ocp.AsyncOptions(create_directories_asynchronously=False),
    ) as checkpointer,
  ):
    checkpointer.save(
      place, tree, custom_metadata={'moetion_config': config.to_json()}
    )
    checkpointer.wait_until_finished()


def load(path: str, flag: str) -> dict[str, Any]:
  """Reads a checkpoint written by `save`.

  Args:
    path: the checkpoint's folder.
    flag: the flag that named it, for errors.

  Raises:
    errors.ConfigError: it is missing, damaged or not one of ours.
  """
  _require_folder(path, flag)
  try:
    with ocp.StandardCheckpointer() as checkpointer:
      tree = checkpointer.restore(os.path.abspath(path))
  except Exception as e:  # Orbax and TensorStore raise many kinds
    raise errors.ConfigError(
      flag, path, f'cannot be restored: {_first_line(e)}'
    ) from e
  if not isinstance(tree, dict) or not {'parameters', 'optimizer'} <= set(tree):
    raise errors.ConfigError(
      flag, path, "not a checkpoint of ours (no 'parameters', 'optimizer')"
    )
  return tree


def load_config(path: str, flag: str) -> run_settings.RunConfig:
  """Reads the configuration that a checkpoint carries.

  Raises:
    errors.ConfigError: it is missing, damaged or not one of ours.
  """
  _require_folder(path, flag)
  try:
    with ocp.StandardCheckpointer() as checkpointer:
      metadata = checkpointer.metadata(os.path.abspath(path)).custom_metadata
    return run_settings.RunConfig.from_json(metadata['moetion_config'])
  except Exception as e:  # as above
    raise errors.ConfigError(
      flag, path, f'carries no configuration of ours: {_first_line(e)}'
    ) from e


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
        if not leaf.startswith(_MASTER):
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
            parameters[leaf.removeprefix(_MASTER)]
            if leaf.startswith(_MASTER)
            else optimizer[group][leaf]
          ),
        )
        for leaf in leaves
      }
      for group, leaves in stage.state_shapes.items()
    }
  )


def _require_folder(path: str, flag: str) -> None:
  if not os.path.isdir(path):
    raise errors.ConfigError(flag, path, 'no such folder')


def _first_line(e: Exception) -> str:
  return (str(e).splitlines() or [type(e).__name__])[0][:200]
