"""Proof of a checkpoint: digests of its operators, and their run.

It travels in Orbax's custom metadata, as plain JSON:

  'moetion_config': the run's settings
  'moetion_digests': {'iteration',
     'state' (as in metrics.jsonl if all stages are in it, else of those that
     are: `launch.convert` writes one stage alone),
     'operators': [[group, expert or -1, lane, lane], ...],
     'leaves': {group: {leaf: [dtype, shape]}}}
  'moetion_checksum': of both, written as sorted JSON: BLAKE2b, 128 bits

A leaf 'master/NAME' is the parameter NAME, any other one is in 'optimizer'.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from moetion_jax import report
from moetion_jax.runtime.records import checkpoint_folder
from moetion_jax.state import host_digest

CONFIG = checkpoint_folder.CONFIG
_CHECKSUM = 'moetion_checksum'
MASTER = 'master/'

_MAX_NAMED = 3  # operators in a message

Tree = Mapping[str, Any]
LeafShape = tuple[str, tuple[int, ...]]  # dtype and shape


@dataclasses.dataclass(frozen=True, kw_only=True)
class Proof:
  """Content of a checkpoint when it was saved.

  Attributes:
    iteration: the iteration of its state.
    leaves: dtype and shape of each leaf, by group and name in the state.
    digests: the digest of each operator.
  """

  iteration: int
  leaves: Mapping[str, Mapping[str, LeafShape]]
  digests: host_digest.Digests

  @property
  def state(self) -> str:
    """Digest of all that the checkpoint holds.

    If those are all stages, it is the one in metrics.jsonl.
    """
    return report.combine(self.digests)

  def damage(self, tree: Tree) -> str:
    """Returns what is wrong with a tree that was read; '' if nothing is."""
    if (found := int(np.asarray(tree['iteration']))) != self.iteration:
      return f'it is of iteration {found}, but {self.iteration} was saved'
    wanted = {
      _place(group, leaf): shape
      for group, leaves in self.leaves.items()
      for leaf, shape in leaves.items()
    }
    there = {place: _shape(value) for place, value in _leaves_of(tree)}
    for place in sorted(wanted.keys() | there.keys()):
      if there.get(place) != wanted.get(place):
        was, now = (
          f'{x[place][0]}{list(x[place][1])}' if place in x else 'missing'
          for x in (wanted, there)
        )
        return f'{"/".join(place)} is {now}, but was {was} when it was saved'
    found = host_digest.digest_state(
      {
        group: {leaf: _get(tree, _place(group, leaf)) for leaf in leaves}
        for group, leaves in self.leaves.items()
      },
      host_digest.stacked_groups(self.digests),
    )
    wrong = host_digest.differences(found, self.digests)
    if not wrong:
      return ''
    names = ', '.join(map(str, wrong[:_MAX_NAMED]))
    more = len(wrong) - _MAX_NAMED
    return (
      names
      + (f' and {more} more operators' if more > 0 else '')
      + (' have' if len(wrong) > 1 else ' has')
      + ' other bits than were saved'
    )


def of_states(
  states: Sequence[Mapping[str, Mapping[str, Any]]],
  iteration: int,
  digests: host_digest.Digests,
) -> Proof:
  """Makes the proof of all stages' states.

  Args:
    states: the leaves by group, of each stage.
    iteration: the iteration of the states.
    digests: the digests of all their operators.
  """
  return Proof(
    iteration=iteration,
    leaves={
      group: {leaf: _shape(value) for leaf, value in leaves.items()}
      for state in states
      for group, leaves in state.items()
    },
    digests=digests,
  )


def to_metadata(config: Mapping[str, Any], proof: Proof) -> dict[str, Any]:
  """Makes the custom metadata of a checkpoint.

  Args:
    config: the run's settings, as JSON.
    proof: the checkpoint's proof.
  """
  value = {
    CONFIG: config,
    checkpoint_folder.DIGESTS: {
      'iteration': proof.iteration,
      'state': proof.state,
      'operators': report.digests_to_json(proof.digests),
      'leaves': {
        group: {
          leaf: [dtype, list(shape)] for leaf, (dtype, shape) in x.items()
        }
        for group, x in proof.leaves.items()
      },
    },
  }
  value = json.loads(json.dumps(value))  # as it will be read
  return {**value, _CHECKSUM: _checksum(value)}


def from_metadata(metadata: Any) -> Proof | None:
  """Returns a checkpoint's proof; None if it was saved before there was one.

  Args:
    metadata: the checkpoint's custom metadata.

  Raises:
    ValueError: the metadata is damaged, or is not that of a checkpoint of ours.
  """
  if not isinstance(metadata, Mapping) or CONFIG not in metadata:
    raise ValueError(f"there is no '{CONFIG}' in it")
  if metadata.keys() == {CONFIG}:
    return None
  value = {k: v for k, v in metadata.items() if k != _CHECKSUM}
  if metadata.get(_CHECKSUM) != _checksum(value):
    raise ValueError('it does not have its own checksum')
  try:
    fields = metadata[checkpoint_folder.DIGESTS]
    proof = Proof(
      iteration=fields['iteration'],
      leaves={
        group: {
          leaf: (dtype, tuple(shape)) for leaf, (dtype, shape) in x.items()
        }
        for group, x in fields['leaves'].items()
      },
      digests=report.digests_from_json(fields['operators']),
    )
  except (KeyError, TypeError, AttributeError) as error:
    raise ValueError(f'it is of another version: {error!r}') from error
  if proof.state != fields['state']:
    raise ValueError('its digests are not those of its state')
  return proof


def _checksum(value: Mapping[str, Any]) -> str:
  data = json.dumps(value, sort_keys=True).encode()
  return hashlib.blake2b(data, digest_size=16).hexdigest()


def _place(group: str, leaf: str) -> tuple[str, ...]:
  """Returns the keys that lead to a leaf in a checkpoint's tree."""
  if leaf.startswith(MASTER):
    return 'parameters', leaf.removeprefix(MASTER)
  return 'optimizer', group, leaf


def _leaves_of(tree: Tree) -> Iterator[tuple[tuple[str, ...], Any]]:
  """Yields all leaves of a checkpoint's tree but the iteration."""
  for name, value in tree['parameters'].items():
    yield ('parameters', name), value
  for group, leaves in tree['optimizer'].items():
    for leaf, value in leaves.items():
      yield ('optimizer', group, leaf), value


def _get(tree: Tree, place: Sequence[str]) -> np.ndarray:
  value: Any = tree
  for key in place:
    value = value[key]
  return np.asarray(value)


def _shape(value: Any) -> LeafShape:
  return np.dtype(value.dtype).name, tuple(value.shape)
