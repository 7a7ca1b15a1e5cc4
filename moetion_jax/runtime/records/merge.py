"""Merges the reports of all replicas and stages into one line of metrics: pure.

Replicas are compared on the way: they must agree bit for bit.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import numpy as np

from moetion_jax import errors, report

# Fields that all replicas of a stage compute alike.
_ALIKE = ('loss', 'auxiliary_loss', 'grad_norm', 'dropped', 'updated')
_SAME = ('iteration', 'stage', 'replica', 'load', *_ALIKE)
_LONGEST = ('seconds', 'waited_seconds', 'late_seconds', 'blocked_seconds')
# How one field's values of all replicas become one value: each field has a
# rule, or else the first replica's would count and nobody would know.
_RULES: Mapping[str, Callable[[list[Any]], Any]] = {
  **dict.fromkeys(_SAME, lambda values: values[0]),
  **dict.fromkeys(_LONGEST, max),
  'snapshot_bytes': sum,
  'copy_bytes_per_second': min,
  'eval_loss': lambda values: next((x for x in values if x is not None), None),
  'digests': lambda values: {o: d for one in values for o, d in one.items()},
}


class ReplicaMismatchError(errors.WrongBitsError):
  """Replicas of a stage have different states: one computed wrongly."""

  is_passing = True


def merge_replicas(reports: Sequence[report.Report]) -> report.Report:
  """Merges the replicas' reports of an iteration into their stage's report.

  Args:
    reports: one report per replica, in replica order; each has the digests of
      the operators that its replica has, all or a share.

  Raises:
    ReplicaMismatchError: two replicas have different bits of one operator, or
      of a field that all compute alike.
  """
  first, *others = reports
  whose = dict.fromkeys(first.digests, first)

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
      one = whose.setdefault(operator, other)
      if not np.array_equal(digest, one.digests[operator]):
        refuse(operator, one, other)
    for name in _ALIKE:
      if float(getattr(first, name)).hex() != float(getattr(other, name)).hex():
        refuse(name, first, other)
  values = {
    field.name: [getattr(one, field.name) for one in reports]
    for field in dataclasses.fields(report.Report)
  }
  return report.Report(**{n: _RULES[n](v) for n, v in values.items()})


def merge_stage(
  reports: Mapping[int, report.Report],
  team: Collection[int],
  operators: int,
) -> report.Report | None:
  """Merges a stage's reports of an iteration, once all are there.

  Args:
    reports: the reports by replica, also of replicas that have no worker any
      more.
    team: the replicas that have a worker.
    operators: the number of the stage's operators.

  Returns:
    The stage's report; None as long as a report is missing.

  Raises:
    ReplicaMismatchError: see `merge_replicas`.
  """
  if not reports.keys() >= set(team):
    return None
  merged = merge_replicas([reports[replica] for replica in sorted(team)])
  if len(merged.digests) < operators:
    # Replicas share the training state, and one that left the team had the
    # rest: its report counts, since nobody may do this iteration again.
    merged = merge_replicas([one for _, one in sorted(reports.items())])
  return merged if len(merged.digests) >= operators else None


def make_line(
  reports: Sequence[report.Report], tokens: int, skipped_before: int = 0
) -> dict[str, Any]:
  """Makes one iteration's line from all stages' reports.

  Args:
    reports: one report per stage, in stage order, all of one iteration.
    tokens: the number of tokens of the iteration.
    skipped_before: updates that were left out in a row just before it.
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
    'skipped': 0 if last.updated else skipped_before + 1,
  }
  if last.eval_loss is not None:
    line['eval_loss'] = last.eval_loss
    line['eval_loss_hex'] = float(last.eval_loss).hex()
  return line
