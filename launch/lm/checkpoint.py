"""The dense checkpoint at the end of a run: plain Orbax, plain names.

Anyone can read it with `ocp.StandardCheckpointer().restore(path)`:

  {'iteration': i64[],
   'parameters': {parameter name: f32 master},
   'optimizer': {group: {path in its optax state: array}}}

The run's configuration, and the digests of all operators (`checkpoint_proof`),
travel along as Orbax custom metadata.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from orbax import checkpoint as ocp

from launch.lm import checkpoint_proof, settings as run_settings
from moetion_jax import errors
from moetion_jax.programs import stage as stage_lib
from moetion_jax.runtime.records import checkpoint_folder
from moetion_jax.snapshots import file as snapshot_file, orbax_handler
from moetion_jax.state import host_digest, partition

_MASTER = checkpoint_proof.MASTER
_ATTEMPTS = 2
_PARTS = frozenset(('iteration', 'parameters', 'optimizer'))
_OTHER_OPTIMIZER = (
  ': it is of a run with another optimizer; --init_weights_only begins with a '
  'new state of this one'
)


def save(
  path: str,
  states: Sequence[Mapping[str, Mapping[str, Any]]],
  iteration: int,
  config: run_settings.RunConfig,
  digests: host_digest.Digests,
  on_written: Callable[[str], None] = lambda path: None,
) -> None:
  """Writes all stages' training states, replacing what is at the path.

  When it returns, they have been read back and compared. Until then they lie
  beside the path: a checkpoint that is there is a proven one. Files of others
  at the path stay.

  Args:
    path: the checkpoint's folder.
    states: the state of every stage, on devices or on the host.
    iteration: the iteration of the states.
    config: the run's settings.
    digests: the digests of all operators, as the devices computed them.
    on_written: called with the folder before it is read back.

  Raises:
    errors.StoreError: they cannot be written, or read back as they were.
  """
  proof = checkpoint_proof.of_states(states, iteration, digests)
  tree = _tree(states, iteration)
  metadata = checkpoint_proof.to_metadata(config.to_json(), proof)
  path = os.path.abspath(path)
  with checkpoint_folder.replacing(path) as aside:
    damage = ''
    for _ in range(_ATTEMPTS):
      try:
        _write(aside, tree, metadata)
      except Exception as error:  # Orbax and TensorStore raise many kinds
        raise errors.StoreError(
          f'{path}: the checkpoint cannot be written: {_first_line(error)}; '
          'make that possible, then start again'
        ) from error
      on_written(aside)
      try:
        _read(aside, 'out')
      except errors.ConfigError as error:
        damage = error.reason
        checkpoint_folder.clear(aside)
      else:
        return
    raise errors.StoreError(
      f'{path}: the checkpoint was written {_ATTEMPTS} times and read back '
      f'with other bits each time, the last time: {damage}. The disk is '
      'damaged, or memory: name a folder on another disk, or have them tested'
    )


def _tree(
  states: Sequence[Mapping[str, Mapping[str, Any]]], iteration: int
) -> dict[str, Any]:
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
  return {
    'iteration': np.int64(iteration),
    'parameters': parameters,
    'optimizer': optimizer,
  }


def _write(
  path: str, tree: Mapping[str, Any], metadata: dict[str, Any]
) -> None:
  """Writes a checkpoint; when this returns, it is committed."""
  with _checkpointer() as checkpointer:
    # With `force` Orbax removes what it finds, a file of somebody else's too.
    checkpointer.save(path, tree, custom_metadata=metadata)
    checkpointer.wait_until_finished()


def _checkpointer() -> ocp.StandardCheckpointer:
  return ocp.StandardCheckpointer(
    # The other workers of a stage world know nothing of it.
    multiprocessing_options=orbax_handler.alone('final'),
    async_options=ocp.AsyncOptions(create_directories_asynchronously=False),
  )


def load(path: str, flag: str) -> dict[str, Any]:
  """Reads a checkpoint written by `save`, and compares it with its digests.

  One of an earlier version carries none: then a line says so.

  Args:
    path: the checkpoint's folder.
    flag: the flag that named it, for errors.

  Raises:
    errors.ConfigError: it is missing, damaged or not one of ours.
  """
  tree, is_proven = _read(path, flag)
  if not is_proven:
    print(
      f'{path}: is of an earlier version and carries no digests: whether it is '
      'what was saved cannot be told.',
      file=sys.stderr,
      flush=True,
    )
  return tree


def _read(path: str, flag: str) -> tuple[dict[str, Any], bool]:
  """Reads a checkpoint; returns it, and whether it could be compared."""
  proof = _metadata(path, flag)[1]
  try:
    with _checkpointer() as checkpointer:
      tree = checkpointer.restore(os.path.abspath(path))
  except Exception as e:  # as above
    raise errors.ConfigError(
      flag, path, f'cannot be restored: {_first_line(e)}'
    ) from e
  try:
    if not tree.keys() >= _PARTS:
      reason = f'not a checkpoint of ours (no {", ".join(sorted(_PARTS))})'
    elif reason := proof.damage(tree) if proof else '':
      reason = f'is damaged: {reason}; use a copy of it, or another one'
  except (AttributeError, KeyError, TypeError, ValueError) as e:
    reason = f'is damaged, or not a checkpoint of ours: {_first_line(e)}'
  if reason:
    raise errors.ConfigError(flag, path, reason)
  return tree, proof is not None


def load_config(path: str, flag: str) -> run_settings.RunConfig:
  """Reads the configuration that a checkpoint carries.

  Raises:
    errors.ConfigError: it is missing, damaged or not one of ours.
  """
  config, _ = _metadata(path, flag)
  try:
    return run_settings.RunConfig.from_json(config)
  except Exception as e:  # fields of another version, of whatever type
    raise errors.ConfigError(
      flag, path, f'carries no configuration of ours: {_first_line(e)}'
    ) from e


def _metadata(
  path: str, flag: str
) -> tuple[Any, checkpoint_proof.Proof | None]:
  """Reads the configuration and the proof that a checkpoint carries."""
  if not os.path.isdir(path):
    raise errors.ConfigError(flag, path, 'no such folder')
  try:
    # Not by Orbax, which logs what is wrong and then returns none.
    with open(
      os.path.join(path, snapshot_file.ORBAX_METADATA_NAME), 'rb'
    ) as file:
      metadata = json.load(file)['custom_metadata']
    proof = checkpoint_proof.from_metadata(metadata)
  except (OSError, ValueError, KeyError, TypeError) as e:
    raise errors.ConfigError(
      flag,
      path,
      f'its {snapshot_file.ORBAX_METADATA_NAME} is damaged, or not '
      f'that of a checkpoint of ours: {_first_line(e)}',
    ) from e
  return metadata[checkpoint_proof.CONFIG], proof


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


def _first_line(e: Exception) -> str:
  return (str(e).splitlines() or [type(e).__name__])[0][:200]
