"""The snapshot folders of a stage's replicas, and the shares in them."""

from __future__ import annotations

import os
import pathlib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from moetion_jax import codec, errors, keys
from moetion_jax.snapshots import coverage, interface, registry

# Name of the digests among a snapshot's buffers. Where replicas divide the
# training state, each share has the digests of some operators, and metadata of
# the same name lists these operators.
DIGESTS = 'digests'


def snapshots_folder(
  folder: str | os.PathLike[str], stage: int, replica: int
) -> pathlib.Path:
  """Returns the folder of one worker's snapshots inside a store folder."""
  return pathlib.Path(folder) / f'stage-{stage}.replica-{replica}.snapshots'


def own_names() -> Mapping[str, Any]:
  """Returns the names in a store folder of all that is of snapshots on disk.

  Returns:
    As of `interface.StoredSnapshots.own_names`.
  """
  inside = registry.stored('').own_names()
  return {r'stage-\d+\.replica-\d+\.snapshots': inside}


def share_of(metadata: Mapping[str, Any]) -> coverage.Share:
  """Makes the share that a snapshot's metadata describes, among other things.

  Raises:
    ValueError: a field has a wrong type.
  """
  return codec.decode_part(coverage.Share, metadata)


def snapshots_folders(
  folder: str | os.PathLike[str], stage: int
) -> list[pathlib.Path]:
  """Finds the folders of all workers that a stage has or had, by replica."""
  pattern = f'stage-{stage}.replica-*.snapshots'
  found = pathlib.Path(folder).glob(pattern)
  return sorted(found, key=lambda path: int(re.findall(r'\d+', path.name)[1]))


def read_shares(
  folder: str | os.PathLike[str],
  stage: int,
  on_unreadable: Callable[[str], None] = lambda reason: None,
) -> list[coverage.Share]:
  """Reads a stage's shares with whole manifests, by replica and iteration.

  Args:
    folder: the store folder.
    stage: the stage.
    on_unreadable: called for each other share, with the reason.
  """
  shares = []
  for of_replica in snapshots_folders(folder, stage):
    stored = registry.stored(of_replica)
    for iteration in stored.iterations():
      try:
        shares.append(share_of(stored.manifest(iteration).metadata))
      except errors.StoreError as error:
        on_unreadable(str(error))
  return shares


def find_shares(
  folder: str | os.PathLike[str], stage: int, iteration: int
) -> list[interface.StoredSnapshots]:
  """Finds the shares that make a stage's snapshot, see `coverage.whole_teams`.

  Returns:
    Those who have them, by replica; [] if there is no such snapshot.
  """
  found: dict[coverage.ShareName, interface.StoredSnapshots] = {}
  for of_replica in snapshots_folders(folder, stage):
    stored = registry.stored(of_replica)
    if iteration in stored.iterations():
      found[share_of(stored.manifest(iteration).metadata).name] = stored
  return [
    found[name] for name in coverage.whole_teams(found).get(iteration, ())
  ]


def read_digests(
  folder: str | os.PathLike[str],
  stage: int,
  iteration: int,
  operators: Iterable[keys.OperatorId],
) -> dict[keys.OperatorId, np.ndarray]:
  """Reads the digests of a stage's operators that a snapshot carries.

  Args:
    folder: the store folder.
    stage: the stage.
    iteration: the iteration of the snapshot.
    operators: the operators of the stage.

  Returns:
    The digests; {} if there is no such snapshot, it has others, or it is
    damaged, which whoever loads it finds out.
  """
  names, rows = sorted(operators), []
  divided: list[Sequence[Any]] = []
  try:
    for stored in find_shares(folder, stage, iteration):
      with stored.open(iteration) as snapshot:
        snapshot.verify(DIGESTS)
        rows.append(np.array(snapshot.arrays[DIGESTS]))
        divided += snapshot.metadata.get(DIGESTS, ())
  except (errors.StoreError, KeyError):
    return {}
  if divided:
    found = [keys.OperatorId(group, expert) for group, expert in divided]
    rows = [np.concatenate(rows)]
  else:
    found = names  # each share has the digests of all, in their order
  if not rows or len(rows[0]) != len(names) or sorted(found) != names:
    return {}
  return dict(zip(found, rows[0], strict=True))
