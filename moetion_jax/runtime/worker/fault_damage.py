"""Damage that scripted faults do to what a run stores."""

from __future__ import annotations

import mmap
import os
import pathlib
from collections.abc import Callable

import numpy as np

from moetion_jax import keys
from moetion_jax.hostmem import segment
from moetion_jax.runtime import faults
from moetion_jax.snapshots import blocks, registry

_CHANNELS = (keys.EntryKind.ACTIVATION, keys.EntryKind.GRADIENT)


def damage_snapshot(
  folder: str | os.PathLike[str], kind: faults.FaultKind
) -> None:
  """Damages the newest snapshot that a replay will use, as a fault says."""
  if kind is faults.FaultKind.TORN_SNAPSHOT:
    tear_snapshot(folder)
  elif kind is faults.FaultKind.CORRUPT_WEIGHTS:
    # The weights of the newest are overwritten before they are used.
    flip_bit_in_snapshot(
      folder, (blocks.COMPUTE, blocks.GRADIENTS), newer=1, every=True
    )
  else:
    flip_bit_in_snapshot(folder, blocks.STATE)


def flip_bit_in_snapshot(
  folder: str | os.PathLike[str],
  prefix: str | tuple[str, ...],
  *,
  newer: int = 0,
  every: bool = False,
) -> int:
  """Flips a bit of a snapshot, and makes its checksums right again.

  Args:
    folder: the folder of one worker's snapshots.
    prefix: the prefix of the buffers' names, or several; the first such buffer
      is hit.
    newer: the number of newer snapshots to pass over; 0 hits the newest.
    every: whether each such buffer is hit, since not every weight is used.

  Returns:
    The iteration of the snapshot; 0 when there is none.
  """
  stored = registry.stored(folder)
  found = stored.iterations()
  if len(found) <= newer:
    return 0

  def flip(arrays: dict[str, np.ndarray]) -> list[str]:
    names = [n for n, a in arrays.items() if n.startswith(prefix) and a.size]
    hits = names if every else names[:1]
    for name in hits:
      hit = arrays[name].reshape(-1).view(np.uint8)
      hit[hit.size // 2] ^= 1
    return hits

  iteration = found[-1 - newer]
  stored.falsify(iteration, flip)
  return iteration


def tear_snapshot(folder: str | os.PathLike[str]) -> int:
  """Tears the newest snapshot; returns its iteration, 0 for none."""
  stored = registry.stored(folder)
  iteration = max(stored.iterations(), default=0)
  if iteration:
    stored.tear(iteration)
  return iteration


def flip_bit_in_largest(folder: str | os.PathLike[str]) -> pathlib.Path:
  """Flips a bit in the middle of the largest file below a folder.

  Returns:
    The path of that file.
  """
  files = [p for p in sorted(pathlib.Path(folder).rglob('*')) if p.is_file()]
  path = max(files, key=lambda file: file.stat().st_size)
  with open(path, 'r+b') as file:
    memory = mmap.mmap(file.fileno(), 0)
    memory[len(memory) // 2] ^= 1
    memory.close()
  return path


def flip_bit_in_log(
  path: str | os.PathLike[str], iteration: int
) -> keys.EntryKey | None:
  """Flips a bit of a committed entry; its checksum stays as it was.

  Args:
    path: the segment's file.
    iteration: the iteration of the entry that is hit: one that a neighbour has
      read, and reads again in a replay.

  Returns:
    The entry's key; None when there is no such entry.
  """
  return _damage_first(
    path, lambda key: key.iteration == iteration and key.kind in _CHANNELS
  )


class ReadDamage:
  """Damages an entry between its verification and the program that reads it.

  On CPU the program reads the very memory of the segment. The entry's producer
  must be on the same host.
  """

  def __init__(self, folder: str | os.PathLike[str]):
    """Stores the store folder."""
    self._folder = folder
    self._armed: faults.Fault | None = None

  def arm(self, fault: faults.Fault, iteration: int) -> None:
    """Has the next activation or gradient that is read be damaged."""
    del iteration
    self._armed = fault

  def after_read(self, key: keys.EntryKey) -> None:
    """Damages an entry that was just read, if it is to be.

    Raises:
      FileNotFoundError: the entry is on another host.
    """
    if self._armed is None or key.kind not in _CHANNELS:
      return
    is_poison = self._armed.kind is faults.FaultKind.POISON_READ
    path = segment.segment_path(self._folder, key.stage, key.replica)
    damage_entry(path, key, is_poison=is_poison)
    self._armed = None


def damage_entry(
  path: str | os.PathLike[str], key: keys.EntryKey, *, is_poison: bool = False
) -> bool:
  """Damages the payload of a committed entry; its checksum stays as it was.

  Args:
    path: the segment's file.
    key: the entry's key.
    is_poison: whether eight bytes become 0xff, which is NaN; else one bit is
      flipped.

  Returns:
    False if there is no such entry.
  """
  hit = _damage_first(path, lambda found: found == key, is_poison=is_poison)
  return hit is not None


def _damage_first(
  path: str | os.PathLike[str],
  is_meant: Callable[[keys.EntryKey], bool],
  *,
  is_poison: bool = False,
) -> keys.EntryKey | None:
  """Damages the first entry that is meant; see `damage_entry`.

  Args:
    path: the segment's file.
    is_meant: whether the entry of a key may be hit.
    is_poison: see `damage_entry`.

  Returns:
    The entry's key; None when there is no such entry.
  """
  with open(path, 'r+b') as file:
    layout = segment.SegmentLayout(file.fileno(), writable=True)
  for header in layout.headers():
    if is_meant(header.key):
      middle = header.offset + header.nbytes // 2 // 8 * 8
      if is_poison:
        layout.ring[middle : middle + 8] = 0xFF
      else:
        layout.ring[middle] ^= 0x10
      return header.key
  return None
