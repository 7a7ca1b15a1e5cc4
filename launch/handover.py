"""Training states on their way from all stages into one checkpoint.

Each worker puts its state into the store folder, one `.npy` file of bytes a
leaf and an index; one worker maps them all and writes the checkpoint.
"""

from __future__ import annotations

import json
import os
import pathlib

import jax
import numpy as np

from moetion_jax import base, entry, operators

_MAPPED_BYTES = 1 << 16  # smaller files are read


def put(
  folder: str | os.PathLike[str], stage: int, state: operators.State
) -> None:
  """Writes a stage's state.

  Raises:
    base.StoreError: there is no room.
  """
  path = _folder(folder, stage)
  index = []
  try:
    path.mkdir()
    for group, leaves in state.items():
      for leaf, value in leaves.items():
        host = np.asarray(jax.device_get(value))
        np.save(path / f'{len(index)}.npy', entry.as_bytes(host))
        index.append([group, leaf, host.dtype.name, list(host.shape)])
    (path / 'index.json').write_text(json.dumps(index))
  except OSError as error:
    raise base.StoreError(f'{path}: {error.strerror}') from error


def get(folder: str | os.PathLike[str], stage: int) -> operators.State:
  """A state that `put` wrote; large leaves are mapped, not read."""
  path = _folder(folder, stage)
  state: dict[str, dict[str, np.ndarray]] = {}
  index = json.loads((path / 'index.json').read_text())
  for number, (group, leaf, dtype, shape) in enumerate(index):
    file = path / f'{number}.npy'
    is_large = file.stat().st_size > _MAPPED_BYTES
    data = np.load(file, mmap_mode='r' if is_large else None)
    value = np.asarray(data).view(np.dtype(dtype)).reshape(shape)
    state.setdefault(group, {})[leaf] = value
  return state  # type: ignore[return-value]


def _folder(folder: str | os.PathLike[str], stage: int) -> pathlib.Path:
  return pathlib.Path(folder) / f'state-stage-{stage}'
