"""Simulates training under failures: `python -m launch.simulate`.

Takes a cluster and a job from a table (`launch/simulate/clusters`, or a file of
one's own) and any of the policies; prints effective training time, overhead,
recovery and lost tokens. `--paper` prints ours beside the paper's numbers.
"""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import sys
import time
from collections.abc import Sequence
from typing import Any

if not __package__:  # run as a file
  sys.path[0] = os.path.abspath(f'{sys.path[0]}/../..')

from absl import flags

from launch.lm import command_line
from moetion_jax import errors
from moetion_jax.policies import (
  decision,
  popularity,
  settings as capture_settings,
)
from moetion_jax.policies.kinds import registry

_CLUSTER = flags.DEFINE_string(
  'cluster',
  'paper',
  'A table of launch/simulate/clusters, or the path of another.',
)
_JOB = flags.DEFINE_string('job', '', 'Of the table; its last one by default.')
_POLICY = flags.DEFINE_multi_enum(
  'policy', None, [*registry.POLICIES], 'Repeatable. All by default.'
)
_HOURS = flags.DEFINE_float('hours', 12.0, 'That a run takes.', 0.01)
_SEEDS = flags.DEFINE_integer('seeds', 10, 'Runs with random failures.', 1)
_TRACE = flags.DEFINE_string(
  'trace', '', 'JSON with the seconds of failures, in place of random ones.'
)
_SET = flags.DEFINE_multi_string(
  'set', [], "FIELD=VALUE of the cluster or the job, not the table's."
)
_ON_NO_SPARE = flags.DEFINE_enum(
  'on_no_spare', 'wait', ['wait', 'shrink'], 'When spare hosts ran out.'
)
_PEERS = flags.DEFINE_integer('peers', 1, 'Hosts with copies of snapshots.', 0)
_INTERVAL = flags.DEFINE_integer(
  'interval', 0, 'Of dense, two_phase, partial; 0 to choose it.', 0
)
_WINDOW_LENGTH = flags.DEFINE_integer(
  'window_length', 0, 'Of sparse; 0 to choose it.', 0
)
_WINDOW_MODE = flags.DEFINE_enum(
  'window_mode', '', ['', *decision.MODES], "Of sparse; '' to choose it."
)
_REPLAY = flags.DEFINE_multi_enum(
  'replay',
  [decision.MICROBATCHES],
  [*capture_settings.REPLAYS],
  'What recovery of sparse does again. Repeatable.',
)
_ORDER = flags.DEFINE_enum('order', 'static', popularity.ORDERS, 'Of sparse.')
_LOGS = flags.DEFINE_bool('logs', True, 'Upstream logging, of sparse.')
_REPLICATED_LOGS = flags.DEFINE_bool(
  'replicated_logs', False, 'Logs at peers as well, of sparse.'
)
_SKIP_FROZEN = flags.DEFINE_bool(
  'skip_frozen', False,
  'Replays of sparse leave out weight gradients of frozen operators.',
)  # fmt: skip
_PARTIAL_EXPERTS = flags.DEFINE_integer(
  'partial_experts', 1, 'Experts a layer at first, of partial.', 1
)
_DURABLE_HOURS = flags.DEFINE_float(
  'durable_hours', 0.0, 'Between whole states in storage; 0 for none.', 0.0
)
_PAPER = flags.DEFINE_bool('paper', False, "Beside the paper's numbers.")
_OUT = flags.DEFINE_string('out', '', 'Folder for JSON and PNG.')


def settings_of(policy: str) -> list[Any]:
  """Makes a policy's settings from the flags, those of each way of replay."""
  from launch.simulate import policies

  one = policies.PolicySettings(
    policy=policy,
    peers=_PEERS.value,
    interval=_INTERVAL.value,
    window_length=_WINDOW_LENGTH.value,
    window_mode=_WINDOW_MODE.value,
    order=_ORDER.value,
    logs=_LOGS.value,
    replicated_logs=_REPLICATED_LOGS.value,
    skip_frozen=_SKIP_FROZEN.value,
    partial_experts=_PARTIAL_EXPERTS.value,
    durable_seconds=_DURABLE_HOURS.value * 3600,
  )
  if not registry.of_name(policy).may_record_gradients:
    return [one]
  return [dataclasses.replace(one, replay=replay) for replay in _REPLAY.value]


def run() -> None:
  """Simulates one job."""
  import rich.console

  from launch.simulate import (
    cluster,
    costs as costs_lib,
    runs as simulate_runs,
  )

  table = cluster.load(_CLUSTER.value)
  name = _JOB.value or list(table.jobs)[-1]
  if name not in table.jobs:
    raise errors.ConfigError('job', name, f'known are {", ".join(table.jobs)}')
  table = cluster.override(table, name, _SET.value)
  costs = costs_lib.of(table.cluster, table.jobs[name])
  trace = None
  if _TRACE.value:
    trace = simulate_runs.read_trace(_TRACE.value, costs.job.gpus)
  begin = time.monotonic()
  studies = [
    simulate_runs.study(
      costs,
      settings,
      horizon_seconds=_HOURS.value * 3600,
      seeds=1 if trace is not None else _SEEDS.value,
      trace=trace,
      on_no_spare=_ON_NO_SPARE.value,
    )
    for policy in _POLICY.value or registry.POLICIES
    for settings in settings_of(policy)
  ]
  seconds = time.monotonic() - begin
  title = (
    f'{name} on {_CLUSTER.value}: {costs.job.gpus} GPUs, iterations of '
    f'{costs.iteration_seconds:.3g} s, {_HOURS.value:g} h'
  )
  console = rich.console.Console(width=130)
  console.print(simulate_runs.table(title, studies))
  print(f'Simulated in {seconds:.1f} s.')
  if _OUT.value:
    result = {
      'title': title,
      'iteration_seconds': costs.iteration_seconds,
      'inputs': simulate_runs.inputs(table, name),
      'policies': [one.to_json() for one in studies],
    }
    _write('simulate.json', result)
    path = pathlib.Path(_OUT.value) / 'simulate.png'
    simulate_runs.plot(path, studies)
    print(f'Written: {path}')


def paper() -> None:
  """Prints our figures beside the paper's."""
  import rich.console
  import rich.table

  from launch.simulate import paper as paper_lib

  rows = paper_lib.rows(_SEEDS.value, _SET.value)
  table = rich.table.Table(title="Ours beside the paper's", show_lines=True)
  for column in ('figure', 'paper', 'ours', 'difference', 'why'):
    table.add_column(column, justify='left')
  for row in rows:
    table.add_row(row.name, row.paper, row.ours, row.difference, row.why)
  rich.console.Console(width=150).print(table)
  if _OUT.value:
    _write('paper.json', [dataclasses.asdict(row) for row in rows])


def _write(name: str, value: Any) -> None:
  os.makedirs(_OUT.value, exist_ok=True)
  path = pathlib.Path(_OUT.value) / name
  path.write_text(json.dumps(value, indent=2))
  print(f'Written: {path}')


def main(argv: Sequence[str]) -> None:
  """Simulates what the flags say."""
  if len(argv) > 1:
    raise errors.ConfigError('arguments', ' '.join(argv[1:]), 'flags only')
  if _PAPER.value:
    paper()
  else:
    run()


if __name__ == '__main__':
  command_line.run_main('launch.simulate', main)
