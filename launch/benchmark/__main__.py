"""Measures what we claim: `python -m launch.benchmark SUBCOMMAND`.

Runs are paired (A B A B ...), so that a drift of the machine's speed does not
decide; figures are medians with 95 % intervals. `--out` gets a JSON file with
the table and the machine it was measured on.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Any

if not __package__:  # run as a file
  sys.path[0] = os.path.abspath(f'{sys.path[0]}/../..')

from absl import flags

from launch.lm import command_line
from moetion_jax import errors
from moetion_jax.policies import decision

_PRESET = flags.DEFINE_string('preset', 'small', 'Shape of the model.')
_ROUNDS = flags.DEFINE_integer('rounds', 30, 'Measured pairs.')
_RUN_PAIRS = flags.DEFINE_integer('run_pairs', 3, 'Measured pairs of runs.')
_PARTS = flags.DEFINE_multi_enum(
  'part', None, ['programs', 'boundary', 'stages', 'start'],
  'Of `pipeline`; repeatable. All of them by default.',
)  # fmt: skip
_HOSTMEM_DIR = flags.DEFINE_string('hostmem_dir', '/dev/shm', 'As of train.')
_CACHE = flags.DEFINE_string(
  'compilation_cache_dir', '~/.cache/moetion_jax', 'As of train.'
)
_STAGES = flags.DEFINE_integer(
  'stages', 2, 'Stages, for `promotion`, `ettr`, `accuracy`.'
)
_REPLICAS = flags.DEFINE_integer(
  'replicas', 1, 'Of each stage, for `recovery`.'
)
_MICROBATCHES = flags.DEFINE_integer(
  'microbatches',
  None,
  "For `snapshot` and `recovery`; the preset's own by default.",
)
_REPLAYS = flags.DEFINE_multi_enum(
  'replay',
  None,
  decision.REPLAYS,
  'To compare in `recovery` and `snapshot`; repeatable. All by default.',
)
_ITERATIONS = flags.DEFINE_integer(
  'iterations', 200, 'Of each run of `ettr` and `accuracy`.'
)
_MTBF = flags.DEFINE_multi_integer(
  'mtbf', None, 'Mean iterations between failures, for `ettr`; repeatable.'
)
_POLICIES = flags.DEFINE_multi_enum(
  'policy', None, ['sparse', 'dense', 'two_phase', 'partial'],
  'To compare in `ettr` and `accuracy`; repeatable. All by default.',
)  # fmt: skip
_TRAIN_FLAGS = flags.DEFINE_multi_string(
  'train_flag', [], 'A flag for the runs of `ettr` and `accuracy`; repeatable.'
)
_SEED = flags.DEFINE_integer('seed', 0, 'Of failures, for `ettr`.')
_QUICK = flags.DEFINE_bool(
  'quick', False, 'For `all`: small models, few rounds, under 15 minutes.'
)
_WINDOW_MODE = flags.DEFINE_string(
  'window_mode', '', 'Of the sparse snapshots of `snapshot`; empty to choose.'
)
_SUBJECTS = flags.DEFINE_multi_enum(
  'subject',
  None,
  ['often', 'window', 'again', 'nothing'],
  'Of `snapshot`, beside no snapshots and sparse ones: Orbax as often as it '
  'can, once a window (both by default), no snapshots once more, nothing.',
)
_MICROBATCH_SIZE = flags.DEFINE_integer(
  'microbatch_size', None, "For `snapshot`; the preset's own by default."
)
_PROFILE_DIR = flags.DEFINE_string(
  'profile_dir', '', 'Where `snapshot` leaves a JAX profile; empty for none.'
)
_OUT = flags.DEFINE_string('out', '', 'Folder for tables as JSON.')


_TOUCH_BYTES = 300 << 20  # more than a first iteration of `tiny` takes


def pipeline(preset: str, rounds: int) -> dict[str, Any]:
  """Measures the costs of a pipeline, part by part."""
  from launch.benchmark import boundary, pipeline as benchmark_pipeline
  from launch.benchmark.harness import summary

  memory, cache = _HOSTMEM_DIR.value, _CACHE.value
  parts: dict[str, Callable[[], list[summary.Row]]] = {
    'boundary': lambda: [
      *boundary.rows(memory, rounds),
      *boundary.verification_rows(preset, rounds),
    ],
    'start': lambda: benchmark_pipeline.start(5, memory, cache),
    'stages': lambda: benchmark_pipeline.stages(
      preset, _RUN_PAIRS.value, memory, cache
    ),
    # Last, since from here on this process computes as well.
    'programs': lambda: benchmark_pipeline.programs(preset, rounds),
  }
  rows = []
  load_before = os.getloadavg()
  for name, measure in parts.items():
    if name in (_PARTS.value or parts):
      rows += [
        {'name': name, 'goal': goal, **vars(value)}
        for name, value, goal in measure()
      ]
  return {
    'subcommand': 'pipeline',
    'preset': preset,
    'rows': rows,
    'load': {'before': load_before, 'after': os.getloadavg()},
  }


def promotion(preset: str, rounds: int) -> dict[str, Any]:
  """Times a warm standby's promotion, with and without touched memory."""
  from launch.benchmark import promotion as promotion_lib
  from launch.benchmark.harness import scratch, summary
  from launch.lm import settings as run_settings

  config = run_settings.make(
    preset,
    model_overrides=[],
    train_overrides={'stages': _STAGES.value, 'eval_every': 0},
    optimizer_overrides={},
  )
  samples: dict[str, list[float]] = {}
  with scratch.folder() as cache:
    for number in range(rounds + 1):
      for stage in range(_STAGES.value):
        for touch_bytes in (0, _TOUCH_BYTES):
          seconds = promotion_lib.measure(
            config,
            stage,
            compilation_cache_dir=str(cache),
            touch_bytes=touch_bytes,
          )
          touched = '*' if touch_bytes else ''  # memory was touched beforehand
          for phase, value in seconds.items():
            name = f'stage {stage}{touched}, {phase}, s'
            if number:  # the first round fills the cache
              samples.setdefault(name, []).append(value)
  rows = [
    {'name': name, 'goal': '', **vars(summary.summarize(x))}
    for name, x in samples.items()
  ]
  return {'subcommand': 'promotion', 'preset': preset, 'rows': rows}


def snapshot(preset: str, rounds: int) -> dict[str, Any]:
  """Measures the cost of snapshots; computes their bytes for every preset."""
  from launch.benchmark import sizes, snapshot as benchmark_snapshot

  chosen = _SUBJECTS.value or benchmark_snapshot.SUBJECTS
  load_before = os.getloadavg()
  measured = benchmark_snapshot.rows(
    preset,
    rounds,
    _HOSTMEM_DIR.value,
    subjects=[x for x in chosen if x != 'nothing'],
    train={
      'microbatches': _MICROBATCHES.value,
      'microbatch_size': _MICROBATCH_SIZE.value,
    },
    window_mode=_WINDOW_MODE.value,
    replays=_REPLAYS.value or _replays(_WINDOW_MODE.value),
    profile_dir=_PROFILE_DIR.value,
  )
  measured += sizes.rows()
  return _result('snapshot', preset, measured, load_before)


def _replays(window_mode: str) -> tuple[str, ...]:
  """Returns the ways of replay that there are with a mode of windows."""
  is_rolling = window_mode in ('', decision.MODES[0])
  return decision.REPLAYS if is_rolling else (decision.MICROBATCHES,)


def recovery(preset: str, rounds: int) -> dict[str, Any]:
  """Measures the cost of a worker's death, by phase."""
  from launch.benchmark import recovery as benchmark_recovery

  load_before = os.getloadavg()
  measured = benchmark_recovery.rows(
    preset,
    rounds,
    _HOSTMEM_DIR.value,
    _CACHE.value,
    _REPLICAS.value,
    _MICROBATCHES.value,
    _REPLAYS.value or decision.REPLAYS,
  )
  return _result('recovery', preset, measured, load_before)


def _train_flags(preset: str) -> list[str]:
  return [
    f'--preset={preset}',
    f'--compilation_cache_dir={_CACHE.value}',
    *_TRAIN_FLAGS.value,
  ]


def _plot_path(name: str) -> str:
  os.makedirs(_OUT.value, exist_ok=True)
  return os.path.join(_OUT.value, f'{name}.png')


def ettr(preset: str, rounds: int) -> dict[str, Any]:
  """Measures effective training time under failures, policy by policy."""
  from launch.benchmark import ettr as benchmark_ettr

  load_before = os.getloadavg()
  outcomes = benchmark_ettr.measure(
    _train_flags(preset),
    iterations=_ITERATIONS.value,
    mtbfs=_MTBF.value or benchmark_ettr.MTBF_ITERATIONS,
    policies=_POLICIES.value or benchmark_ettr.POLICIES,
    rounds=rounds,
    seed=_SEED.value,
    stages=_STAGES.value,
    hostmem_dir=_HOSTMEM_DIR.value,
  )
  if _OUT.value:
    benchmark_ettr.plot(outcomes, _plot_path('ettr'))
  measured = benchmark_ettr.rows(outcomes, _STAGES.value)
  result = _result('ettr', preset, measured, load_before)
  return result | {
    'iterations': _ITERATIONS.value,
    'seed': _SEED.value,
    'train_flags': _TRAIN_FLAGS.value,
    'runs': benchmark_ettr.details(outcomes),
  }


def accuracy(preset: str, rounds: int) -> dict[str, Any]:
  """Measures the effect of failures on the model, with one run per policy."""
  del rounds
  from launch.benchmark import accuracy as accuracy_lib

  load_before = os.getloadavg()
  outcomes = accuracy_lib.measure(
    _train_flags(preset),
    iterations=_ITERATIONS.value,
    policies=_POLICIES.value or accuracy_lib.POLICIES,
    stages=_STAGES.value,
    hostmem_dir=_HOSTMEM_DIR.value,
  )
  if _OUT.value:
    accuracy_lib.plot(outcomes, _plot_path('accuracy'))
  found = accuracy_lib.rows(outcomes)
  return _result('accuracy', preset, found, load_before) | {
    'curves': accuracy_lib.details(outcomes)
  }


def frozen(preset: str, rounds: int) -> dict[str, Any]:
  """Measures what replay saves without frozen experts' weight gradients."""
  from launch.benchmark import pipeline as benchmark_pipeline

  load_before = os.getloadavg()
  measured = benchmark_pipeline.frozen_rows(preset, rounds)
  return _result('frozen', preset, measured, load_before)


def _result(
  subcommand: str,
  preset: str,
  measured: Sequence[tuple[str, Any, str]],
  load_before: tuple[float, ...],
) -> dict[str, Any]:
  return {
    'subcommand': subcommand,
    'preset': preset,
    'rows': [
      {'name': name, 'goal': goal, **vars(value)}
      for name, value, goal in measured
    ],
    'load': {'before': load_before, 'after': os.getloadavg()},
  }


def show(result: dict[str, Any]) -> None:
  """Prints the table; writes it to `--out`, if given."""
  import rich.console
  import rich.table

  from moetion_jax.runtime import read_environment

  table = rich.table.Table(title=f'{result["subcommand"]}, {result["preset"]}')
  for column in ('figure', 'median', '95 % interval', 'quartiles', 'n', 'goal'):
    table.add_column(column)
  for row in result['rows']:
    table.add_row(
      row['name'],
      f'{row["median"]:.4g}',
      f'{row["low"]:.4g} .. {row["high"]:.4g}',
      f'{row["quartile_1"]:.4g} .. {row["quartile_3"]:.4g}',
      str(row['count']),
      row['goal'],
    )
  rich.console.Console(width=110).print(table)
  if 'load' in result:
    loads = [f'{load[0]:.1f}' for load in result['load'].values()]
    print(f'Load of the machine: {loads[0]} before, {loads[1]} after.')
  if _OUT.value:
    os.makedirs(_OUT.value, exist_ok=True)
    path = os.path.join(_OUT.value, f'{result["subcommand"]}.json')
    with open(path, 'w') as f:
      json.dump(
        result
        | {'environment': read_environment.read(), 'cores': os.cpu_count()},
        f,
        indent=2,
      )
    print(f'Written: {path}')


_SUBCOMMANDS: dict[str, Callable[[str, int], dict[str, Any]]] = {
  'pipeline': pipeline,
  'promotion': promotion,
  'snapshot': snapshot,
  'recovery': recovery,
  'frozen': frozen,
  'ettr': ettr,
  'accuracy': accuracy,
}
# The subcommands of `all`, with their flags: (with --quick, without).
_ALL = {
  'pipeline': (
    ['--preset=tiny', '--rounds=5', '--part=programs', '--part=boundary'],
    [],
  ),
  'snapshot': (
    ['--preset=tiny', '--rounds=3', '--microbatches=2'],
    ['--rounds=10'],
  ),
  'recovery': (
    ['--preset=tiny', '--rounds=2'],
    ['--preset=tiny', '--rounds=10'],
  ),
  'ettr': (
    ['--preset=tiny', '--rounds=1', '--iterations=80', '--mtbf=25'],
    ['--preset=tiny', '--rounds=2'],
  ),
  'accuracy': (['--preset=tiny', '--iterations=50'], []),
}


def _run_all() -> int:
  """Runs each subcommand in its own process; returns the worst exit code."""
  worst = 0
  for name, (quick, full) in _ALL.items():
    worst = max(
      worst,
      subprocess.run(
        [
          sys.executable,
          '-m',
          'launch.benchmark',
          name,
          *(quick if _QUICK.value else full),
          f'--hostmem_dir={_HOSTMEM_DIR.value}',
          f'--compilation_cache_dir={_CACHE.value}',
          f'--out={_OUT.value}',
        ]
      ).returncode,
    )
  return worst


def main(argv: Sequence[str]) -> int:
  """Runs one subcommand, or all; returns the exit code.

  Raises:
    errors.ConfigError: the subcommand is missing or unknown.
  """
  if len(argv) != 2 or argv[1] not in (*_SUBCOMMANDS, 'all'):
    raise errors.ConfigError(
      'subcommand', ' '.join(argv[1:]), f'one of {", ".join(_SUBCOMMANDS)}, all'
    )
  if argv[1] == 'all':
    return _run_all()
  from launch.benchmark.harness import scratch
  from moetion_jax.runtime import xla_setup

  # A cache of its own: a subcommand that compiles a program twice loads it the
  # second time, and never loads what an earlier subcommand left.
  with scratch.folder() as cache:
    xla_setup.configure(local_devices=1, compilation_cache_dir=str(cache))
    show(_SUBCOMMANDS[argv[1]](_PRESET.value, _ROUNDS.value))
  return 0


if __name__ == '__main__':
  command_line.run_main('launch.benchmark', main)
