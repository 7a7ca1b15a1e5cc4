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

from launch.lm import (
  checkpoint_damage,
  checkpoint_proof,
  settings as run_settings,
)
from moetion_jax import disk, errors
from moetion_jax.programs import stage as stage_lib
from moetion_jax.runtime.records import checkpoint_folder, own_files
from moetion_jax.snapshots import file as snapshot_file, orbax_handler
from moetion_jax.state import host_digest, partition

_MASTER = checkpoint_proof.MASTER
_ATTEMPTS = 2
_PARTS = frozenset(('iteration', 'parameters', 'optimizer'))
_ENDS = ('embedding', 'head')  # groups that the first and last stage have
_ADVICE = 'use a copy of it, or train again'
_NAME_ONE = "name a finished run's WORKDIR/checkpoint"
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
  on_damaged: Callable[[str], None] = lambda what: None,
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
    on_damaged: called with what is wrong when it was read back with other bits
      and is written once more.

  Raises:
    errors.DamagedDiskError: they were read back with other bits each time.
    errors.StoreError: they cannot be written, or are not those of the digests.
  """
  proof = checkpoint_proof.of_states(states, iteration, digests)
  tree = _tree(states, iteration)
  metadata = checkpoint_proof.to_metadata(config.to_json(), proof)
  path = os.path.abspath(path)
  with checkpoint_folder.replacing(path) as aside:
    damage = ''
    for attempt in range(1, _ATTEMPTS + 1):
      try:
        _write(aside, tree, metadata)
      except Exception as error:  # Orbax and TensorStore raise many kinds
        why = checkpoint_damage.first_line(error)
        raise errors.StoreError(
          f'{path}: the checkpoint cannot be written: {why}; make that '
          'possible, then start again'
        ) from error
      on_written(aside)
      try:
        _read(aside)
        return
      except _UnusableError as error:
        damage = str(error)
      checkpoint_folder.clear(aside)
      if of_memory := proof.damage(tree):
        raise errors.StoreError(
          f'{path}: the state that was to be saved has changed in host memory: '
          f'{of_memory}. Have that memory tested'
        )
      if attempt < _ATTEMPTS:
        on_damaged(
          f'{path}: the checkpoint was read back otherwise than it was written '
          f'to {disk.device_of(path)}: {damage}'
        )
    raise errors.DamagedDiskError(
      f'{path}: the checkpoint was written {_ATTEMPTS} times and read back '
      f'otherwise each time, the last time: {damage}. What is in memory still '
      f'has its digests: {disk.device_of(path)} is damaged, or the way to it. '
      'Have it tested, or move the workdir to another disk'
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
  try:
    tree, is_proven = _read(path)
  except _UnusableError as error:
    raise error.of_flag(flag, path) from error
  if not is_proven:
    print(
      f'{path}: is of an earlier version and carries no digests: whether it is '
      'what was saved cannot be told.',
      file=sys.stderr,
      flush=True,
    )
  return tree


class _UnusableError(Exception):
  """A checkpoint cannot be used; the message is the end of a sentence."""

  def __init__(self, what: str, advice: str = _ADVICE):
    """Stores what is wrong, and what the user can do."""
    super().__init__(what)
    self._advice = advice

  def of_flag(self, flag: str, path: str) -> errors.ConfigError:
    """Returns the error for the user who named the checkpoint by a flag."""
    return errors.ConfigError(flag, path, f'{self}; {self._advice}')


def _read(path: str) -> tuple[dict[str, Any], bool]:
  """Reads a checkpoint; returns it, and whether it could be compared.

  Raises:
    _UnusableError: it is missing, damaged or not one of ours.
  """
  proof = _metadata(path)[1]
  try:
    with _checkpointer() as checkpointer, checkpoint_damage.quiet():
      tree = checkpointer.restore(os.path.abspath(path))
  except Exception as error:  # Orbax and TensorStore raise many kinds
    raise _UnusableError(
      f'cannot be restored: {checkpoint_damage.explain(path, error)}'
    ) from error
  try:
    if not tree.keys() >= _PARTS:
      reason = f'not a checkpoint of ours (no {", ".join(sorted(_PARTS))})'
    else:
      reason = proof.damage(tree) if proof else ''
      reason = reason and f'is damaged: {reason}'
  except (AttributeError, KeyError, TypeError, ValueError) as error:
    reason = 'is damaged, or not a checkpoint of ours: '
    reason += checkpoint_damage.first_line(error)
  if reason:
    raise _UnusableError(reason)
  return tree, proof is not None


def load_config(path: str, flag: str) -> run_settings.RunConfig:
  """Reads the configuration that a checkpoint carries.

  Raises:
    errors.ConfigError: it is missing, damaged or not one of ours.
  """
  try:
    config, _ = _metadata(path)
  except _UnusableError as error:
    raise error.of_flag(flag, path) from error
  try:
    return run_settings.RunConfig.from_json(config)
  except Exception as error:  # fields of another version, of whatever type
    raise errors.ConfigError(
      flag,
      path,
      f'carries no configuration of ours: {checkpoint_damage.first_line(error)}'
      f'; use it with the version that wrote it, else {_ADVICE}',
    ) from error


def _metadata(path: str) -> tuple[Any, checkpoint_proof.Proof | None]:
  """Reads the configuration and the proof that a checkpoint carries.

  Raises:
    _UnusableError: they are missing, damaged or not ours.
  """
  name = snapshot_file.ORBAX_METADATA_NAME
  file = os.path.join(path, name)
  try:
    # Not by Orbax, which logs what is wrong and then returns none.
    with open(file, 'rb') as opened:
      metadata = json.load(opened)['custom_metadata']
    proof = checkpoint_proof.from_metadata(metadata)
  except FileNotFoundError as error:
    raise _no_metadata(path) from error
  except NotADirectoryError as error:
    raise _UnusableError('is no folder', _NAME_ONE) from error
  except (OSError, ValueError, KeyError, TypeError) as error:
    raise _UnusableError(
      f'its {name} is damaged, or not that of a checkpoint of ours: '
      f'{checkpoint_damage.first_line(error)}'
    ) from error
  return metadata[checkpoint_proof.CONFIG], proof


def _no_metadata(path: str) -> _UnusableError:
  """Says what a folder is that lacks the file each checkpoint of ours has."""
  name = snapshot_file.ORBAX_METADATA_NAME
  if not os.path.isdir(path):
    return _UnusableError('no such folder', _NAME_ONE)
  inside = os.path.join(path, own_files.CHECKPOINT_NAME)
  if os.path.isfile(os.path.join(inside, name)):
    return _UnusableError('is a workdir, not a checkpoint', f'name {inside}')
  return _UnusableError(
    f'its {name} is missing: it is damaged, or not a checkpoint of ours'
  )


def check_all_stages(tree: Mapping[str, Any], path: str, flag: str) -> None:
  """Checks that a checkpoint is of a whole model.

  Args:
    tree: the checkpoint, as `load` returned it.
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
      f'model, as launch.convert writes it; {_NAME_ONE}',
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
