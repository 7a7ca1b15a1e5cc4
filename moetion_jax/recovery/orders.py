"""Orders to workers: the start of training, and the sizes of their stores."""

from __future__ import annotations

import dataclasses

from moetion_jax.policies import decision as decision_lib


@dataclasses.dataclass(frozen=True, kw_only=True)
class Go:
  """An order to train: from which start, and with how large stores.

  Attributes:
    start: the iteration from which the conversion starts.
    complete_at: iteration of the last snapshot of the conversion.
    applied_until: the last iteration whose recorded gradients are applied; 0 if
      all after the start is done again.
    newest: iteration of the newest existing snapshot.
    excluded: iterations of damaged snapshots, to be taken again.
    target: iteration that the worker's predecessor had begun; 0 without one.
    replays_until: the last iteration that had already been begun before.
    line: the recovery line.
    entry_line: the last iteration of which nobody needs entries any more.
    is_fresh: whether the log begins empty.
    ring_bytes: size of the log.
    cells: number of entries that the log can hold.
    pool_files: number of snapshots that there is room for; 0 if none are taken.
    pool_bytes: size of each of them.
    decisions: what is captured when.
    generation: the worker's generation from now on; 0 for that of its `Spec`.
    keeps_entries: whether the log keeps what comes after the line; otherwise it
      keeps only what neighbours may still read.
    merges: whether the state of the start is put together from snapshots of it
      and before, of which none holds everything.
    capacity: experts that take more tokens than usual: group, number, and
      factor of the usual capacity.
    capacity_until: the last iteration in which they do.
    unverified_until: the last iteration whose snapshot was taken with other
      software, see `conversion.Conversion`; 0 for none.
  """

  start: int
  complete_at: int
  applied_until: int = 0
  newest: int
  excluded: tuple[int, ...] = ()
  target: int
  replays_until: int
  line: int
  entry_line: int = 0
  is_fresh: bool
  ring_bytes: int
  cells: int
  pool_files: int
  pool_bytes: int
  decisions: tuple[decision_lib.CaptureDecision, ...]
  generation: int = 0
  keeps_entries: bool = True
  merges: bool = False
  capacity: tuple[tuple[str, int, float], ...] = ()
  capacity_until: int = 0
  unverified_until: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class StopHere:
  """Stop where you are, and keep process and programs: an order follows.

  It is never sent before the first `orders.Go`.
  """


@dataclasses.dataclass(frozen=True, kw_only=True)
class Decide:
  """Decision on the captures from now on."""

  decision: decision_lib.CaptureDecision


@dataclasses.dataclass(frozen=True, kw_only=True)
class Propose:
  """Wait after an iteration until more is said."""

  limit: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Commit:
  """End after an iteration."""

  limit: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class HandOver:
  """Put the training state into the store folder."""


Order = Go | StopHere | Decide | Propose | Commit | HandOver
