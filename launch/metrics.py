"""The files a run leaves behind (DESIGN section 9).

`metrics.jsonl` is written once, in order, by the leader alone. A line that
exists already (the run is being repeated or continued) is compared instead of
written: losses and digests must come out the same, bit for bit.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import tempfile
import time
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np

from moetion_jax import base, report

# Fields in which two runs of one iteration must agree exactly.
_EXACT = ('iteration', 'loss_hex', 'digest', 'tokens')

# What all replicas of a stage compute alike.
_ALIKE = ('loss', 'auxiliary_loss', 'grad_norm', 'dropped', 'updated')


class MetricsMismatchError(base.MoetionError):
  """An iteration came out differently than the line written for it."""


class ReplicaMismatchError(base.MoetionError):
  """Replicas of a stage have different states: one computed wrongly."""


def merge_replicas(reports: Sequence[report.Report]) -> report.Report:
  """What a stage says of an iteration, from what its replicas say.

  Args:
    reports: one a replica, in their order; each has the digests of the
      operators that it has, all or a share.

  Raises:
    ReplicaMismatchError: two have different bits of one operator, or of what
      all have.
  """
  first, *others = reports
  digests, whose = dict(first.digests), dict.fromkeys(first.digests, first)

  def refuse(what: object, one: report.Report, other: report.Report) -> None:
    raise ReplicaMismatchError(
      f'stage {first.stage}, iteration {first.iteration}: replica '
      f'{other.replica} has another {what} than replica {one.replica}: silent '
      'data corruption in one of them. Which one cannot be told from two; the '
      'snapshots before this iteration are of equal replicas: the same command '
      'goes on from them'
    )

  for other in others:
    for operator, digest in other.digests.items():
      if operator not in digests:
        digests[operator], whose[operator] = digest, other
      elif not np.array_equal(digest, digests[operator]):
        refuse(operator, whose[operator], other)
    for name in _ALIKE:
      if float(getattr(first, name)).hex() != float(getattr(other, name)).hex():
        refuse(name, first, other)
  return dataclasses.replace(
    first,
    digests=digests,
    seconds=max(r.seconds for r in reports),
    waited_seconds=max(r.waited_seconds for r in reports),
    late_seconds=max(r.late_seconds for r in reports),
    snapshot_bytes=sum(r.snapshot_bytes for r in reports),
    blocked_seconds=max(r.blocked_seconds for r in reports),
    copy_bytes_per_second=min(r.copy_bytes_per_second for r in reports),
    eval_loss=next(
      (x for r in reports if (x := r.eval_loss) is not None), None
    ),
  )


def merge_stage(
  reports: Mapping[int, report.Report],
  team: Collection[int],
  operators: int,
) -> report.Report | None:
  """What a stage says of an iteration, once it is all there.

  Args:
    reports: by replica, also of those that have no worker any more.
    team: the replicas that have one.
    operators: how many the stage has.

  Returns:
    None as long as a report is missing.

  Raises:
    ReplicaMismatchError: see `merge_replicas`.
  """
  if not reports.keys() >= set(team):
    return None
  merged = merge_replicas([reports[replica] for replica in sorted(team)])
  if len(merged.digests) < operators:
    # Replicas share the training state, and one that left the team had the
    # rest: what it said counts, since nobody may do this iteration again.
    merged = merge_replicas([one for _, one in sorted(reports.items())])
  return merged if len(merged.digests) >= operators else None


def make_line(reports: Sequence[report.Report], tokens: int) -> dict[str, Any]:
  """One iteration's line from all stages' reports.

  Args:
    reports: one a stage, in stage order, of one iteration.
    tokens: of the iteration.
  """
  last = reports[-1]
  digests = {o: d for r in reports for o, d in r.digests.items()}
  line = {
    'iteration': last.iteration,
    'loss': last.loss,
    'loss_hex': float(last.loss).hex(),
    'tokens': tokens,
    'seconds': round(max(r.seconds for r in reports), 6),
    'digest': report.combine(digests),
    'snapshot_bytes': sum(r.snapshot_bytes for r in reports),
    'blocked_seconds': round(max(r.blocked_seconds for r in reports), 6),
    # By stage; see `report.Report`.
    'waited_seconds': [round(r.waited_seconds, 6) for r in reports],
    'late_seconds': [round(r.late_seconds, 6) for r in reports],
    'copy_bytes_per_second': [round(r.copy_bytes_per_second) for r in reports],
    'grad_norm': last.grad_norm,
    'auxiliary_loss': last.auxiliary_loss,
    'dropped': last.dropped,
    'updated': last.updated,
  }
  if last.eval_loss is not None:
    line['eval_loss'] = last.eval_loss
    line['eval_loss_hex'] = float(last.eval_loss).hex()
  return line


def read_lines(path: str | os.PathLike[str]) -> dict[int, dict[str, Any]]:
  """The lines of a `metrics.jsonl` by iteration, for who only looks.

  Damaged lines, and a last one that is not whole yet, are left out.
  """
  lines = {}
  with contextlib.suppress(FileNotFoundError), open(path, 'rb') as f:
    for raw in f:
      with contextlib.suppress(ValueError, KeyError, TypeError):
        line = json.loads(raw)
        lines[line['iteration']] = line
  return lines


class MetricsFile:
  """Appends lines to `metrics.jsonl`, comparing where a line exists.

  A context manager: `start` reads what is there and cuts a torn last line.
  """

  def __init__(self, path: str):
    self._path = path
    self._known: dict[int, dict[str, Any]] = {}
    self._file = None

  def start(self) -> None:
    """Opens the file.

    Raises:
      base.StoreError: a line other than the last one is damaged.
    """
    whole = 0
    if os.path.exists(self._path):
      with open(self._path, 'rb') as f:
        for number, raw in enumerate(f, 1):
          if not raw.endswith(b'\n'):
            break  # torn by a death while it was written
          try:
            line = json.loads(raw)
            self._known[line['iteration']] = line
          except (ValueError, KeyError, TypeError):
            raise base.StoreError(
              f'{self._path}:{number} is damaged; move the file away or pass '
              '--fresh'
            ) from None
          whole += len(raw)
    self._file = open(self._path, 'ab')
    self._file.truncate(whole)

  def close(self) -> None:
    """Closes the file; idempotent."""
    if self._file:
      with contextlib.suppress(OSError):  # `write` has said so
        self._file.close()
      self._file = None

  def __enter__(self) -> MetricsFile:
    self.start()
    return self

  def __exit__(self, *unused: object) -> None:
    self.close()

  @property
  def last_iteration(self) -> int:
    """The newest iteration that has a line; 0 for none."""
    return max(self._known, default=0)

  def write(self, line: dict[str, Any]) -> None:
    """Writes or compares one iteration's line.

    Raises:
      MetricsMismatchError: a line exists and says otherwise.
    """
    assert self._file is not None, 'start() was not called'
    iteration = line['iteration']
    known = self._known.get(iteration)
    if known is None:
      # JSON has no NaN: such losses are written as null, loss_hex says which.
      clean = {k: None if _nonfinite(v) else v for k, v in line.items()}
      self._file.write(json.dumps(clean).encode() + b'\n')
      self._file.flush()
      self._known[iteration] = line
      return
    for field in _EXACT:
      if known.get(field) != line[field]:
        raise MetricsMismatchError(
          f'iteration {iteration}: {field} is {line[field]}, but '
          f'{self._path} has {known.get(field)}: this is not the run that '
          'wrote it (other code, software or hardware?); pass --fresh to '
          'start over'
        )

  def cut(self, iteration: int) -> None:
    """Removes the lines of later iterations: they will be done otherwise."""
    assert self._file is not None, 'start() was not called'
    kept = 0
    with open(self._path, 'rb') as f:
      for raw in f:
        if json.loads(raw)['iteration'] > iteration:
          break
        kept += len(raw)
    self._file.truncate(kept)
    self._known = {i: x for i, x in self._known.items() if i <= iteration}


class EventsFile:
  """Appends to `events.jsonl`: what happened, when, to whom."""

  def __init__(self, path: str):
    self._path = path

  def write(self, kind: str, **fields: Any) -> None:
    """Appends one event; `time` is seconds since the epoch."""
    event = {'time': time.time(), 'kind': kind, 'stage': None, 'replica': None}
    with open(self._path, 'ab') as f:
      f.write(json.dumps(event | fields).encode() + b'\n')


def write_json(path: str, value: Any) -> None:
  """Replaces a JSON file atomically: readers see the old or the new one."""
  folder = os.path.dirname(path) or '.'
  with tempfile.NamedTemporaryFile(
    'w', dir=folder, prefix='.json-', delete=False
  ) as f:
    json.dump(value, f, indent=2)
    f.write('\n')
  os.chmod(f.name, 0o644)
  os.replace(f.name, path)


def _nonfinite(value: Any) -> bool:
  return isinstance(value, float) and (
    value != value or value in (float('inf'), float('-inf'))
  )
