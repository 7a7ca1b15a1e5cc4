"""A small snapshot store: a file for each snapshot, without a limit."""

from __future__ import annotations

import os

import numpy as np

from moetion_jax import errors
from moetion_jax.snapshots import (
  file as snapshot_file,
  interface,
  manifest,
  registry,
)


def use():
  """Makes this process save and read with `PlainStore` alone."""
  registry.make = lambda folder, size_bytes, files, durable_folder=None: (
    PlainStore(durable_folder or folder)
  )
  registry.stored = PlainStore


class PlainStore(interface.Store):
  """An `interface.Store`.

  A file has the length of its manifest, the manifest, and the data.
  """

  def __init__(self, folder):
    super().__init__(folder)
    self._first_iteration = 0

  def start(self):
    self.folder.mkdir(exist_ok=True)
    for path in self.folder.glob('*.new'):
      path.unlink()

  def close(self):
    pass

  def paths(self):
    names = os.listdir(self.folder) if self.folder.is_dir() else []
    found = sorted(int(name) for name in names if name.isdecimal())
    return {iteration: self.folder / str(iteration) for iteration in found}

  def forget(self, iteration):
    (self.folder / str(iteration)).unlink(missing_ok=True)

  def falsify(self, iteration, change):
    path = self.folder / str(iteration)
    data = bytearray(path.read_bytes())
    found = self.manifest(iteration)
    start = len(data) - found.used_bytes
    memory = np.frombuffer(data, np.uint8)[start:]
    arrays = snapshot_file.StoredSnapshot(path, found, memory).arrays
    packed = found.with_checksums(arrays, change(arrays)).pack()
    path.write_bytes(
      len(packed).to_bytes(8, 'little') + packed + memory.tobytes()
    )

  def tear(self, iteration):
    size_bytes = self.manifest(iteration).used_bytes
    path = self.folder / str(iteration)
    os.truncate(path, path.stat().st_size - size_bytes // 2)

  def own_names(self):
    return {r'\d+(\.new)?': None}

  def check_is_ours(self):
    for path in self.paths().values():
      if not path.is_file():
        raise errors.StoreError(f'{path}: no snapshot of ours')

  def manifest(self, iteration):
    return self.open(iteration).manifest

  def open(self, iteration, verify=False):
    path = self.folder / str(iteration)
    try:
      data = path.read_bytes()
      split = 8 + int.from_bytes(data[:8], 'little')
      found = manifest.Manifest.unpack(data[8:split])
      memory = np.frombuffer(data, np.uint8)[split:]
      if len(memory) != found.used_bytes:
        raise ValueError(f'{len(memory)} of {found.used_bytes} bytes')
    except (OSError, ValueError) as error:
      raise manifest.SnapshotCorruptError(f'{path}: {error}') from error
    stored = snapshot_file.StoredSnapshot(path, found, memory)
    if verify:
      stored.verify()
    return stored

  def retain(self, first_iteration):
    self._first_iteration = max(self._first_iteration, first_iteration)

  def enlarge(self, size_bytes):
    pass

  def save(self, iteration, metadata, buffers, *, replace=False):
    manifest.check(buffers)
    if iteration in self.iterations() and self._keeps(
      iteration, metadata, buffers, replace
    ):
      return 0
    memory = np.zeros(manifest.data_bytes(b.nbytes for b in buffers), np.uint8)
    packed = manifest.fill(memory, buffers, metadata).pack()
    new = self.folder / f'{iteration}.new'
    new.write_bytes(len(packed).to_bytes(8, 'little') + packed)
    with new.open('ab') as file:
      file.write(memory.data)
    new.rename(self.folder / str(iteration))
    for old in self.iterations():
      if old < self._first_iteration:
        (self.folder / str(old)).unlink()
    return sum(buffer.nbytes for buffer in buffers)
