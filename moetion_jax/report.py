"""A worker's report of one iteration, and the digest of a whole state."""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any

import numpy as np

from moetion_jax import codec, digest_rule, keys


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
  digests: Annotated[
    dict[keys.OperatorId, np.ndarray],
    codec.Form(digests_to_json, digests_from_json),
  ]
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


def combine(digests: Mapping[keys.OperatorId, np.ndarray]) -> str:
  """Combines a state's operator digests, in any order, into 16 hex digits."""
  lanes = np.zeros(2, np.uint32)
  for operator, digest in digests.items():
    salt = np.uint32(zlib.crc32(str(operator).encode()))
    lanes += digest_rule.mix(np.asarray(digest, np.uint32) ^ salt)
  return f'{lanes[0]:08x}{lanes[1]:08x}'
