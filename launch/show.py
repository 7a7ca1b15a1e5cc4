"""Shows what a run left in its host store: `python -m launch.show WORKDIR`.

Exit codes: 0 all was shown, 1 something is damaged, 2 there is nothing to show.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from typing import Any

if not __package__:  # run as a file
  sys.path[0] = os.path.abspath(f'{sys.path[0]}/..')

from absl import flags

from launch.lm import command_line
from launch.offline import run_flags, scan, stored_run
from moetion_jax import errors
from moetion_jax.hostmem import memory_limits, run_store

flags.adopt_module_key_flags(run_flags)
_VERIFY = flags.DEFINE_bool(
  'verify', False, 'Read everything and compare the checksums.'
)
_JSON = flags.DEFINE_bool('json', False, 'Print one JSON object.')


def describe(
  run: stored_run.StoredRun,
  damaged: Sequence[stored_run.Damage],
  *,
  in_use: bool,
  verified: bool,
) -> dict[str, Any]:
  """Describes a stored run: returns all that is shown, as plain JSON.

  Args:
    run: the stored run.
    damaged: the damage that was found.
    in_use: whether a living run uses the stores.
    verified: whether all checksums were compared.
  """
  return {
    'workdir': str(run.workdir),
    'stores': [str(folder) for folder in run.folders],
    'in_use': in_use,
    'iterations': run.train.iterations,
    'initial_iteration': run.initial,
    'last_line': max(run.metrics, default=0),
    'newest_common_start': run.newest_common_start,
    'only_start': run.only_start,
    'verified': verified,
    'damaged': [
      {
        'stage': d.stage,
        'kind': d.kind,
        'iteration': d.iteration,
        'message': d.message,
      }
      for d in damaged
    ],
    'stages': [_describe_stage(run, one) for one in run.stages],
  }


def _describe_stage(
  run: stored_run.StoredRun, one: stored_run.StoredStage
) -> dict[str, Any]:
  whole = stored_run.whole_iterations(run.train, one)
  return {
    'stage': one.stage,
    'store': str(one.folder),
    'generation': one.generation,
    'operators': len(one.operators),
    'snapshots': [
      {
        'iteration': iteration,
        'bytes': info.size_bytes,
        'slot': [str(o) for o in sorted(info.state)],
        'slot_operators': len(info.state),
        'compute_operators': len(info.compute),
        'gradient_operators': len(info.gradients),
        'covered_operators': len(info.covered),
        'is_whole': bool(info.shares),
        'shares': [_describe_share(one) for one in info.found],
      }
      for iteration, info in one.snapshots.items()
    ],
    'starts': [
      {
        'iteration': c.start.iteration,
        'complete_at': c.start.complete_at,
        'applied_until': c.start.applied_until,
        'reaches': c.reaches,
        'usable': c.is_usable,
      }
      for c in run.candidates(one.stage)
    ],
    'log': {
      'whole_iterations': [list(r) for r in whole],
      'entries': len(one.entries),
      'bytes': sum(header.nbytes for header in one.entries.values()),
      'segment_bytes': one.segment_bytes,
    },
  }


def _describe_share(one: stored_run.ShareInfo) -> dict[str, Any]:
  return {
    'path': str(one.path),
    'replica': one.share.replica,
    'replicas': one.share.replicas,
    'bytes': one.size_bytes,
    'slot_operators': len(one.share.state),
    'compute_operators': len(one.share.compute),
    'gradient_operators': len(one.share.gradients),
  }


def _shares(snapshot: dict[str, Any]) -> str:
  """Names how many shares are there, of as many as make the snapshot."""
  teams: dict[int, int] = {}
  for one in snapshot['shares']:
    teams[one['replicas']] = teams.get(one['replicas'], 0) + 1
  return ', '.join(f'{n} of {team}' for team, n in sorted(teams.items()))


def _lines(value: dict[str, Any]) -> list[str]:
  """Returns the lines that a person reads."""
  state = 'in use by a living run' if value['in_use'] else 'of a stopped run'
  common, first = value['newest_common_start'], value['initial_iteration']
  lines = [
    f'{value["workdir"]}: {len(value["stages"])} stage(s), iteration '
    f'{value["last_line"]} of {value["iterations"]}',
    f'{", ".join(value["stores"])}: {state}',
    'newest common start: '
    + ('none' if common is None else _name(common, first)),
  ]
  for stage in value['stages']:
    lines += ['', *_stage_lines(stage, first)]
  if value['damaged']:
    lines += ['', f'{len(value["damaged"])} damaged:']
    lines += [f'  {d["message"]}' for d in value['damaged']]
  elif value['verified']:
    lines += ['', 'All checksums are right.']
  return lines


def _stage_lines(stage: dict[str, Any], initial: int) -> list[str]:
  operators, log = stage['operators'], stage['log']
  starts = {s['iteration']: s for s in stage['starts']}
  rows = [('snapshot', 'bytes', 'shares', 'slot', 'covers', 'valid start')]
  if initial in starts:
    rows.append(('initial', '', '', '', '', _start(starts[initial])))
  for s in stage['snapshots']:
    rows.append(
      (
        str(s['iteration']),
        memory_limits.format_bytes(s['bytes']),
        _shares(s),
        f'{s["slot_operators"]} of {operators}',
        f'{s["covered_operators"]} of {operators}',
        _start(starts[s['iteration']])
        if s['iteration'] in starts.keys() - {initial}
        else '-',
      )
    )
  teams = {one['replicas'] for s in stage['snapshots'] for one in s['shares']}
  if teams <= {1}:
    rows = [(*row[:2], *row[3:]) for row in rows]
  widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
  table = [
    '  '
    + '  '.join(
      [cell.rjust(w) for cell, w in zip(row[:-1], widths[:-1], strict=True)]
      + [row[-1]]
    )
    for row in rows
  ]
  whole = stored_run.format_runs(log['whole_iterations'])
  return [
    f'stage {stage["stage"]}, generation {stage["generation"]}, {operators} '
    f'operators, {stage["store"]}',
    *table,
    f'  log: iterations {whole or "none"} whole; {log["entries"]} entries, '
    f'{memory_limits.format_bytes(log["bytes"])} of '
    f'{memory_limits.format_bytes(log["segment_bytes"])}',
  ]


def _name(iteration: int, initial: int) -> str:
  is_initial = iteration == initial
  return 'the initial state' if is_initial else f'snapshot {iteration}'


def _start(start: dict[str, Any]) -> str:
  if not start['usable']:
    return (
      f'complete at {start["complete_at"]}, but the logs lead to '
      f'{start["reaches"]} only'
    )
  how = ''
  if start['applied_until']:
    how = f', to {start["applied_until"]} by updates'
  return f'complete at {start["complete_at"]}, leads to {start["reaches"]}{how}'


def main(argv: list[str]) -> int:
  """Shows what the flags name; returns the exit code."""
  run = run_flags.find_run(argv)
  try:
    with run_store.hold(run.folders, wait_seconds=0):
      in_use = False
  except errors.StoreError:
    in_use = True
  run = scan.scan(run, in_use=in_use)
  damaged = [d for one in run.stages for d in one.damage]
  if _VERIFY.value:
    found = list(scan.verify(run))
    damaged += found
    run = run.without(
      {
        (d.stage, d.iteration)
        for d in found
        if d.kind is stored_run.DamageKind.SNAPSHOT
      },
      {d.key for d in found if d.key},
    )
  value = describe(run, damaged, in_use=in_use, verified=_VERIFY.value)
  lines = [*_lines(value), *filter(None, [run.caution])]
  print(json.dumps(value) if _JSON.value else '\n'.join(lines))
  return 1 if damaged else 0


if __name__ == '__main__':
  command_line.run_main('launch.show', main)
