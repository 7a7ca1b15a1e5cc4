"""Orders to workers: from where to train, and how large their stores are."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class Go:
  """From where a worker trains, and how large its stores are.

  Attributes:
    start: of its conversion: iteration 0 is the initial state.
    complete_at: last snapshot of the conversion.
    newest: snapshot that there is.
    excluded: iterations of snapshots that are damaged, to be taken again.
    target: iteration that its predecessor had begun; 0: there was none.
    verify_until: entries up to this iteration are older than this worker.
    line: the recovery line.
    is_fresh: whether its log begins empty.
    ring_bytes: size of its log.
    cells: entries that its log can hold.
    pool_files: how many snapshots there is room for; 0: none are taken.
    pool_bytes: of each of them.
    decisions: what is captured when (`decision.CaptureDecision`).
    generation: of the worker, from now on; 0: as in its `Spec`.
    keeps_entries: whether its log keeps what comes after the line; otherwise
      only what neighbours may still read.
    merges: whether the state of the start is put together from snapshots of it
      and before, of which none holds everything.
    capacity: of experts that take more tokens than usual: group, number, and
      factor of the usual capacity.
    capacity_until: last iteration in which they do.
  """

  start: int
  complete_at: int
  newest: int
  excluded: tuple[int, ...] = ()
  target: int
  verify_until: int
  line: int
  is_fresh: bool
  ring_bytes: int
  cells: int
  pool_files: int
  pool_bytes: int
  decisions: tuple[Mapping[str, Any], ...]
  generation: int = 0
  keeps_entries: bool = True
  merges: bool = False
  capacity: tuple[tuple[str, int, float], ...] = ()
  capacity_until: int = 0

  def to_json(self) -> dict[str, Any]:
    """Plain dicts; `from_json` is the inverse."""
    return dataclasses.asdict(self)

  @classmethod
  def from_json(cls, value: Mapping[str, Any]) -> Go:
    """The inverse of `to_json`."""
    lists = {k: tuple(value[k]) for k in ('decisions', 'excluded')}
    lists['capacity'] = tuple(tuple(x) for x in value['capacity'])
    return cls(**{**value, **lists})
