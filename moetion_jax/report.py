"""A worker's report of one iteration, and the digest of a whole state."""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from moetion_jax import digest_rule, keys

_FLOATS = ('loss', 'auxiliary_loss', 'grad_norm', 'eval_loss')


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
  """Report of one worker on one iteration that is done.

  Attributes:
    iteration: number of the iteration.
    stage: stage of the reporting worker.
    replica: replica of the reporting worker.
    loss: mean cross-entropy in nats a token, all stages alike.
    auxiliary_loss: mean over microbatches, summed over stages.
    grad_norm: global norm before clipping.
    dropped: choices of an expert that found no seat, over all stages.
    updated: False when a non-finite update was skipped.
    digests: digests of this stage's operators in the state after the update.
    eval_loss: mean cross-entropy of held-out text after the update, from the
      last stage in iterations that evaluate; else None.
    seconds: time from the iteration's start to the next one's (for the last
      one, to its end), evaluation included.
    waited_seconds: part of `seconds` spent waiting for entries while no program
      of the stage ran: it had nothing to do.
    late_seconds: part of `seconds` spent waiting for entries that existed (see
      `logs.interface.Log.late_seconds`), whatever ran meanwhile.
    snapshot_bytes: size of the iteration's snapshot; 0 for none.
    blocked_seconds: part of `seconds` spent waiting for the last snapshot's
      copy.
    copy_bytes_per_second: rate at which the last snapshots were stored; 0 if
      none was.
    load: number of tokens that chose each expert.
  """

  iteration: int
  stage: int
  loss: float
  auxiliary_loss: float
  grad_norm: float
  dropped: int
  updated: bool
  digests: dict[keys.OperatorId, np.ndarray]
  eval_loss: float | None
  seconds: float
  waited_seconds: float
  late_seconds: float = 0.0
  snapshot_bytes: int = 0
  blocked_seconds: float = 0.0
  copy_bytes_per_second: float = 0.0
  load: Mapping[keys.OperatorId, int] = dataclasses.field(default_factory=dict)
  replica: int = 0

  @property
  def busy_share(self) -> float:
    """Share of the iteration in which the stage did not wait for entries."""
    return max(0.0, 1 - self.waited_seconds / max(self.seconds, 1e-9))

  def to_json(self) -> dict[str, Any]:
    """Converts to plain JSON without rounding: floats in hex."""
    value = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
    for name in _FLOATS:
      if value[name] is not None:
        value[name] = float(value[name]).hex()
    value['digests'] = digests_to_json(self.digests)
    value['load'] = [[o.group, o.expert, n] for o, n in self.load.items()]
    return value

  @classmethod
  def from_json(cls, value: Mapping[str, Any]) -> Report:
    """Inverts `to_json`."""
    fields = dict(value)
    for name in _FLOATS:
      if fields[name] is not None:
        fields[name] = float.fromhex(fields[name])
    fields['digests'] = digests_from_json(fields['digests'])
    fields['load'] = {
      keys.OperatorId(group, expert): count
      for group, expert, count in fields['load']
    }
    return cls(**fields)


def digests_to_json(
  digests: Mapping[keys.OperatorId, np.ndarray],
) -> list[list[str | int]]:
  """Lists operators' digests as [group, expert, lane, lane], lanes in hex."""
  return [
    [operator.group, operator.expert, *(f'{lane:08x}' for lane in lanes)]
    for operator, lanes in digests.items()
  ]


def digests_from_json(
  value: Iterable[Sequence[Any]],
) -> dict[keys.OperatorId, np.ndarray]:
  """Inverts `digests_to_json`."""
  return {
    keys.OperatorId(group, expert): np.array(
      [int(lane, 16) for lane in lanes], np.uint32
    )
    for group, expert, *lanes in value
  }


def combine(digests: Mapping[keys.OperatorId, np.ndarray]) -> str:
  """Combines a state's operator digests, in any order, into 16 hex digits."""
  lanes = np.zeros(2, np.uint32)
  for operator, digest in digests.items():
    salt = np.uint32(zlib.crc32(str(operator).encode()))
    lanes += digest_rule.mix(np.asarray(digest, np.uint32) ^ salt)
  return f'{lanes[0]:08x}{lanes[1]:08x}'
