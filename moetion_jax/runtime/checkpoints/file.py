"""The dense checkpoint at the end of a run: plain Orbax, plain names.

Anyone can read it with `ocp.StandardCheckpointer().restore(path)`:

  {'iteration': i64[],
   'parameters': {parameter name: f32 master},
   'optimizer': {group: {path in its optax state: array}}}

The run's configuration, and the digests of all operators (`proof`),
travel along as Orbax custom metadata.
"""

from __future__ import annotations

import hashlib
import os
import pathlib
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import xxhash
from orbax import checkpoint as ocp

from moetion_jax import disk, errors, job_spec
from moetion_jax.runtime.checkpoints import (
  damage as damage_lib,
  proof as proof_lib,
)
from moetion_jax.runtime.records import checkpoint_folder, own_files
from moetion_jax.snapshots import file as snapshot_file, orbax_handler
from moetion_jax.state import host_digest

_ATTEMPTS = 2
_PARTS = frozenset(('iteration', 'parameters', 'optimizer'))
ADVICE = 'use a copy of it, or train again'
NAME_ONE = "name a finished run's WORKDIR/checkpoint"


def save(
  path: str,
  states: Sequence[Mapping[str, Mapping[str, Any]]],
  iteration: int,
  config: Mapping[str, Any],
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
    config: the job's settings.
    digests: the digests of all operators, as the devices computed them.
    on_written: called with the folder before it is read back.
    on_damaged: called with what is wrong when it was read back with other bits
      and is written once more.

  Raises:
    errors.DamagedDiskError: they were read back with other bits each time.
    errors.StoreError: they cannot be written, or are not those of the digests.
  """
  proof = proof_lib.of_states(states, iteration, digests)
  tree = _tree(states, iteration)
  metadata = proof_lib.to_metadata(config, proof)
  path = os.path.abspath(path)
  with checkpoint_folder.replacing(path) as aside:
    damage, is_of_disk = '', False
    for attempt in range(1, _ATTEMPTS + 1):
      try:
        _write(aside, tree, metadata)
        written = _checksums(aside)
      except Exception as error:  # Orbax and TensorStore raise many kinds
        why = damage_lib.first_line(error)
        raise errors.StoreError(
          f'{path}: the checkpoint cannot be written: {why}; make that '
          'possible, then start again'
        ) from error
      on_written(aside)
      checkpoint_folder.bring_to_disk(aside)
      try:
        _, found = _read(aside)
        if found:
          return
        damage = 'it carries no digests'
      except _UnusableError as error:
        damage = str(error)
      is_of_disk = _checksums(aside) != written
      checkpoint_folder.clear(aside)
      if of_memory := proof.damage(tree):
        raise errors.StoreError(
          f'{path}: the state that was to be saved has changed in host memory: '
          f'{of_memory}. Have that memory tested'
        )
      if attempt < _ATTEMPTS:
        what = 'could not be read back'
        if is_of_disk:
          device = disk.device_of(path)
          what = f'was read back otherwise than it was written to {device}'
        on_damaged(f'{path}: the checkpoint {what}: {damage}')
    if not is_of_disk:
      raise errors.StoreError(
        f'{path}: the checkpoint was written {_ATTEMPTS} times and could not '
        f'be read back, the last time: {damage}. Its files are as they were '
        'written; make that possible, then start again'
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
        if leaf.startswith(proof_lib.MASTER):
          parameters[leaf.removeprefix(proof_lib.MASTER)] = value
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


def _checksums(path: str) -> dict[pathlib.Path, str]:
  """Returns the checksums of all files of a checkpoint, by their paths."""
  found = {}
  for file in sorted(pathlib.Path(path).rglob('*')):
    if file.is_file():
      with open(file, 'rb') as opened:
        digest = hashlib.file_digest(opened, xxhash.xxh3_128)
      found[file] = digest.hexdigest()
  return found


def _checkpointer() -> ocp.StandardCheckpointer:
  return ocp.StandardCheckpointer(
    # The other workers of a stage world know nothing of it.
    multiprocessing_options=orbax_handler.alone('final'),
    async_options=ocp.AsyncOptions(create_directories_asynchronously=False),
  )


def load(path: str, flag: str, digest: str = '') -> dict[str, Any]:
  """Reads a checkpoint written by `save`, and compares it with its digests.

  One of an earlier version carries none: then a line says so.

  Args:
    path: the checkpoint's folder.
    flag: the flag that named it, for errors.
    digest: the digest that its state must have; '' for any.

  Raises:
    errors.ConfigError: it is missing, damaged, another one or not one of ours.
  """
  try:
    tree, proof = _read(path)
  except _UnusableError as error:
    raise error.of_flag(flag, path) from error
  found = proof.state if proof else ''
  if digest not in ('', found):
    what = f'its state had digest {digest}, and has {found or "none"}'
    raise job_spec.changed_input(flag, path, what)
  if not proof:
    print(
      f'{path}: is of an earlier version and carries no digests: whether it is '
      'what was saved cannot be told.',
      file=sys.stderr,
      flush=True,
    )
  return tree


class _UnusableError(Exception):
  """A checkpoint cannot be used; the message is the end of a sentence."""

  def __init__(self, what: str, advice: str = ADVICE):
    """Stores what is wrong, and what the user can do."""
    super().__init__(what)
    self._advice = advice

  def of_flag(self, flag: str, path: str) -> errors.ConfigError:
    """Returns the error for the user who named the checkpoint by a flag."""
    return errors.ConfigError(flag, path, f'{self}; {self._advice}')


def _read(path: str) -> tuple[dict[str, Any], proof_lib.Proof | None]:
  """Reads a checkpoint and its proof, with which it was compared.

  Raises:
    _UnusableError: it is missing, damaged or not one of ours.
  """
  proof = _metadata(path)[1]
  try:
    with _checkpointer() as checkpointer, damage_lib.quiet():
      tree = checkpointer.restore(os.path.abspath(path))
  except Exception as error:  # Orbax and TensorStore raise many kinds
    raise _UnusableError(
      f'cannot be restored: {damage_lib.explain(path, error)}'
    ) from error
  try:
    if not tree.keys() >= _PARTS:
      reason = f'not a checkpoint of ours (no {", ".join(sorted(_PARTS))})'
    else:
      reason = proof.damage(tree) if proof else ''
      reason = reason and f'is damaged: {reason}'
  except (AttributeError, KeyError, TypeError, ValueError) as error:
    reason = 'is damaged, or not a checkpoint of ours: '
    reason += damage_lib.first_line(error)
  if reason:
    raise _UnusableError(reason)
  return tree, proof


def load_config(path: str, flag: str) -> dict[str, Any]:
  """Reads the settings of the job that a checkpoint is of.

  Raises:
    errors.ConfigError: it is missing, damaged or not one of ours.
  """
  try:
    return _metadata(path)[0]
  except _UnusableError as error:
    raise error.of_flag(flag, path) from error


def _metadata(path: str) -> tuple[Any, proof_lib.Proof | None]:
  """Reads the configuration and the proof that a checkpoint carries.

  Raises:
    _UnusableError: they are missing, damaged or not ours.
  """
  name = snapshot_file.ORBAX_METADATA_NAME
  try:
    metadata = checkpoint_folder.read_metadata(path)['custom_metadata']
    proof = proof_lib.from_metadata(metadata)
  except FileNotFoundError as error:
    raise _no_metadata(path) from error
  except NotADirectoryError as error:
    raise _UnusableError('is no folder', NAME_ONE) from error
  except OSError as error:
    raise _UnusableError(
      f'its {name} cannot be read: {error.strerror}',
      'make that possible, or name another one',
    ) from error
  except (ValueError, KeyError, TypeError) as error:
    raise _UnusableError(
      f'its {name} is damaged, or not that of a checkpoint of ours: '
      f'{damage_lib.first_line(error)}'
    ) from error
  return metadata[proof_lib.CONFIG], proof


def _no_metadata(path: str) -> _UnusableError:
  """Says what a folder is that lacks the file each checkpoint of ours has."""
  name = snapshot_file.ORBAX_METADATA_NAME
  if not os.path.isdir(path):
    return _UnusableError('no such folder', NAME_ONE)
  inside = os.path.join(path, own_files.CHECKPOINT_NAME)
  if os.path.isfile(os.path.join(inside, name)):
    return _UnusableError('is a workdir, not a checkpoint', f'name {inside}')
  return _UnusableError(
    f'its {name} is missing: it is damaged, or not a checkpoint of ours'
  )
