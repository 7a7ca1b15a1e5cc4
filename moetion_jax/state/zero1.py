"""Training state divided among a stage's replicas (ZeRO-1).

Each replica owns whole operators, which it holds and updates: its share by
`division`. Of a stacked group these are some rows, the same ones on each of its
devices. Every replica needs all compute weights: `pack` makes one flat array of
a replica's own, and `unpack` puts those of all replicas together. Bits travel
as unsigned integers and nothing is computed with them: -0.0, NaNs and their
payloads arrive as they are. (A sum of weights with zeros elsewhere would move
twice as much, and lose the sign of -0.0; one collective for all weights is
quicker than one for each.)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import numpy as jnp

from moetion_jax import errors, keys
from moetion_jax.state import (
  division,
  model as model_lib,
  partition as partition_lib,
)

Groups = Mapping[model_lib.Group, Sequence[str]]


class _Piece(NamedTuple):
  """A replica's part of one parameter, on one device."""

  name: str
  rows: tuple[int, ...] | None  # of a stacked parameter; None: whole
  shape: tuple[int, ...]
  kind: str  # unsigned dtype as which its bits travel

  @property
  def size(self) -> int:
    return int(np.prod(self.shape, dtype=np.int64))


class Ownership:
  """Which operators each replica of a stage owns, seen by one of them.

  Attributes:
    position: position of this replica in the stage world.
    owned: operators of each replica, by position.
    experts: indices of this replica's experts, ascending, by stacked group;
      groups of which it owns none are left out.
  """

  def __init__(
    self,
    model: model_lib.StageModel,
    groups: Groups,
    partition: partition_lib.Partition,
    *,
    replicas: int,
    position: int,
    expert_devices: int,
  ):
    """Divides the operators among the replicas.

    Args:
      model: the stage's model.
      groups: parameter names by group.
      partition: partition of the whole training state.
      replicas: number of replicas that share the state.
      position: position of this replica among them.
      expert_devices: number of devices of each replica.

    Raises:
      errors.ConfigError: there are more replicas than can own something.
    """
    self.position = position
    self.owned = division.divide(
      partition.operator_bytes, replicas, partition.devices(expert_devices).get
    )
    if not all(self.owned):
      most = sum(map(bool, self.owned))
      raise errors.ConfigError(
        'shard_optimizer',
        True,
        f'a stage has no more than {most} parts for its replicas: with '
        f'--replicas={replicas} some would have nothing to update; use '
        f'--replicas={most} or fewer, or fewer --stages',
      )
    self._model = model
    self._groups = groups
    self._local = {
      name: len(partition.operators_of(name)) // expert_devices
      for name in partition.stacked_groups
    }
    self.experts = {
      name: tuple(o.expert for o in own)
      for name in partition.stacked_groups
      if (own := self._of_group(position, name))
    }
    # Most words of each kind that a replica has on one device.
    self._sizes: dict[str, int] = {}
    for each in range(replicas):
      totals: dict[str, int] = {}
      for piece in self._pieces(each):
        totals[piece.kind] = totals.get(piece.kind, 0) + piece.size
      for kind, size in totals.items():
        self._sizes[kind] = max(self._sizes.get(kind, 0), size)

  def _of_group(self, position: int, group: str) -> list[keys.OperatorId]:
    return sorted(o for o in self.owned[position] if o.group == group)

  def has(self, group: model_lib.Group) -> bool:
    """Returns whether this replica owns anything of a group."""
    return bool(self._of_group(self.position, group.name))

  def rows(self, group: model_lib.Group, array: Any) -> Any:
    """Selects this replica's rows of a parameter, given from all devices."""
    if not group.stacked:
      return array
    return array[np.array(self.experts[group.name])]

  def rows_of_device(self, group: model_lib.Group, array: Any) -> Any:
    """Selects this replica's rows of a parameter, given from one device.

    Computation on the rows must not be fused with the selection: an addition
    may then be contracted with another product, and come to other bits than
    without ZeRO-1 (measured on CPU: sgd).
    """
    if not group.stacked:
      return array
    rows = self._rows(self.position, group.name)
    return jax.lax.optimization_barrier(array[np.array(rows)])

  def _rows(self, position: int, group: str) -> tuple[int, ...]:
    """Rows that a replica owns of a group, the same on each of its devices."""
    local = self._local[group]
    own = self._of_group(position, group)
    return tuple(o.expert for o in own if o.expert < local)

  # ---- compute weights -----------------------------------------------------

  @property
  def words(self) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes and dtypes of what `pack` returns."""
    return {
      kind: jax.ShapeDtypeStruct((1, size), kind)
      for kind, size in self._sizes.items()
    }

  def pack(self, compute: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """Packs the bits of this replica's compute weights on one device.

    Args:
      compute: this replica's rows of each compute weight, by name.

    Returns:
      u[1, n] by the name of the unsigned dtype, as long as the longest
      replica's.
    """
    parts: dict[str, list[jax.Array]] = {kind: [] for kind in self._sizes}
    for piece in self._pieces(self.position):
      bits = jax.lax.bitcast_convert_type(compute[piece.name], piece.kind)
      parts[piece.kind].append(bits.reshape(-1))
    words = {}
    for kind, size in self._sizes.items():
      missing = size - sum(part.size for part in parts[kind])
      rest = jnp.zeros(missing, kind)
      words[kind] = jnp.concatenate([*parts[kind], rest])[None]
    return words

  def gather(self, words: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """Gathers and unpacks what all replicas packed; over axis 'data'."""
    return self.unpack(
      {kind: jax.lax.all_gather(x[0], 'data') for kind, x in words.items()}
    )

  def unpack(self, words: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """Unpacks all compute weights on one device.

    Args:
      words: u[replicas, n] by the name of the dtype: what every replica packed,
        by position.
    """
    found: dict[str, list[tuple[_Piece, jax.Array]]] = {}
    for position in range(len(self.owned)):
      offsets = dict.fromkeys(self._sizes, 0)
      for piece in self._pieces(position):
        begin = offsets[piece.kind]
        offsets[piece.kind] += piece.size
        bits = words[piece.kind][position, begin : begin + piece.size]
        parts = found.setdefault(piece.name, [])
        parts.append((piece, bits.reshape(piece.shape)))
    whole = {}
    for name, parts in found.items():
      bits = parts[0][1]
      if parts[0][0].rows is not None:
        rows = [row for piece, _ in parts for row in piece.rows or ()]
        bits = jnp.concatenate([bits for _, bits in parts])[np.argsort(rows)]
      whole[name] = jax.lax.bitcast_convert_type(
        bits, self._model.compute_dtypes[name]
      )
    return whole

  def _pieces(self, position: int) -> Iterator[_Piece]:
    """Yields what a replica packs, in this order."""
    for group, names in self._groups.items():
      if not self._of_group(position, group.name):
        continue
      rows = self._rows(position, group.name) if group.stacked else None
      for name in names:
        shape = self._model.shapes[name].shape
        if rows is not None:
          shape = (len(rows), *shape[1:])
        width = np.dtype(self._model.compute_dtypes[name]).itemsize
        yield _Piece(name, rows, shape, f'uint{8 * width}')
