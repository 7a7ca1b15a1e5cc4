"""Trains a Mixture-of-Experts language model: `python -m launch.train`.

Flags become a `settings.RunConfig`; everything below reads that. The README
lists the exit codes, `errors.ExitCode`.
"""

from __future__ import annotations

import json
import os
import sys

if not __package__:  # run as a file
  sys.path[0] = os.path.abspath(f'{sys.path[0]}/..')

from absl import flags

from launch.lm import (
  command_line,
  progress,
  settings as run_settings,
  streams,
)
from moetion_jax import codec, errors
from moetion_jax.policies import (
  decision,
  intervals,
  partial,
  popularity,
  settings as capture_settings,
)
from moetion_jax.policies.kinds import registry
from moetion_jax.runtime import environment, faults, linux_process
from moetion_jax.runtime.agent import (
  run as agent_run,
  settings as agent_settings,
)

_PRESET = flags.DEFINE_string('preset', 'tiny', 'Shape of the model.')
_MODEL = flags.DEFINE_multi_string(
  'model', [], 'FIELD=VALUE: changes one field of the shape; repeatable.'
)
_REMAT = flags.DEFINE_bool(
  'remat', None, 'Recompute activations in the backward pass.'
)
_DROPOUT = flags.DEFINE_float('dropout_rate', None, 'Share of zeroed outputs.')
_WORKDIR = flags.DEFINE_string(
  'workdir', 'run', 'Folder for everything that the run leaves behind.'
)
_FRESH = flags.DEFINE_bool('fresh', False, 'Remove an earlier run, start over.')
_SEED = flags.DEFINE_integer('seed', 0, 'Of weights, data order, dropout.')
_DATA = flags.DEFINE_string(
  'data', '', "Text: file, folder, glob or .bin; '' for Python's own sources."
)
_DATA_DTYPE = flags.DEFINE_string(
  'data_dtype', 'uint16', 'Token type of a .bin: uint16 or uint32.'
)
_INIT_FROM = flags.DEFINE_string(
  'init_from', '', 'A final checkpoint (WORKDIR/checkpoint) to start from.'
)
_INIT_WEIGHTS_ONLY = flags.DEFINE_bool(
  'init_weights_only', False, 'Take no optimizer state from --init_from.'
)
_INIT_POSITION = flags.DEFINE_bool(
  'init_position',
  False,
  "Go on with the iteration after that of --init_from, its data and its run's "
  'schedule of the learning rate, but for what flags say of that.',
)
_STAGES = flags.DEFINE_integer('stages', 2, 'Pipeline stages.')
_REPLICAS = flags.DEFINE_integer(
  'replicas', None, 'Workers of each stage, which share its microbatches.'
)
_SHARD_OPTIMIZER = flags.DEFINE_bool(
  'shard_optimizer',
  None,
  "Each replica has its share only of its stage's training state (ZeRO-1).",
)
_LOCAL_DEVICES = flags.DEFINE_integer(
  'local_devices', 1, "A worker's devices; experts are spread over them."
)
_ITERATIONS = flags.DEFINE_integer('iterations', None, 'Optimizer updates.')
_EXTEND = flags.DEFINE_enum(
  'extend',
  '',
  ('', 'pin', 'stretch'),
  "Allow more --iterations than the run in --workdir has. 'pin': its schedule "
  "stays; 'stretch': from its old end on, that of a run of so many iterations.",
)
_MICROBATCHES = flags.DEFINE_integer(
  'microbatches', None, 'Per replica and iteration.'
)
_MICROBATCH_SIZE = flags.DEFINE_integer(
  'microbatch_size', None, 'Sequences of one microbatch.'
)
_EVAL_EVERY = flags.DEFINE_integer(
  'eval_every', None, 'Iterations between evaluations; 0 for none.'
)
_EVAL_MICROBATCHES = flags.DEFINE_integer(
  'eval_microbatches', None, 'Held-out microbatches of one evaluation.'
)
_SKIP_NONFINITE = flags.DEFINE_bool(
  'skip_nonfinite', False, 'Leave non-finite updates out, do not stop.'
)
_OPTIMIZER = flags.DEFINE_string('optimizer', None, 'adamw, lion, sgd, ...')
_LEARNING_RATE = flags.DEFINE_float('learning_rate', None, 'Its peak.')
_WARMUP = flags.DEFINE_integer('warmup_iterations', None, 'Linear warm-up.')
_DECAY = flags.DEFINE_integer('decay_iterations', None, 'End of the cosine.')
_FINAL_FRACTION = flags.DEFINE_float('final_fraction', None, 'Of the peak.')
_WEIGHT_DECAY = flags.DEFINE_float('weight_decay', None, 'On matrices.')
_B1 = flags.DEFINE_float('b1', None, 'First moment decay, or momentum.')
_B2 = flags.DEFINE_float('b2', None, 'Second moment decay.')
_CLIP_NORM = flags.DEFINE_float('clip_norm', None, '0 for no clipping.')
_CACHE = flags.DEFINE_string(
  'compilation_cache_dir',
  '~/.cache/moetion_jax',
  "Compiled programs are kept here; '' for nowhere.",
)
_ACCEPT_CHANGES = flags.DEFINE_list(
  'accept_changes',
  [],
  'Names of what may differ from what the run was begun with: libraries, '
  'options of JAX, flags, variables. Other bits follow.',
)
_HOSTMEM_DIR = flags.DEFINE_string(
  'hostmem_dir', '/dev/shm', 'Folder in tmpfs for logs and snapshots.'
)
_POLICY = flags.DEFINE_enum(
  'policy', 'sparse', [*registry.POLICIES], 'What is captured; none: nothing.'
)
_INTERVAL = flags.DEFINE_integer(
  'interval', 0, 'Iterations between whole snapshots; 0: as measured.'
)
_DURABLE_DIR = flags.DEFINE_string(
  'durable_dir', '', "For snapshots on disk (two_phase); '': in the workdir."
)
_OVERHEAD_BUDGET = flags.DEFINE_float(
  'overhead_budget', intervals.OVERHEAD_BUDGET, 'Of two_phase, share of time.'
)
_PARTIAL_EXPERTS = flags.DEFINE_integer(
  'partial_experts', 1, 'Of each layer that a snapshot of partial holds.'
)
_PARTIAL_SELECT = flags.DEFINE_enum(
  'partial_select', partial.SELECTIONS[0], partial.SELECTIONS, 'Which ones.'
)
_PLT_BUDGET = flags.DEFINE_float(
  'plt_budget', partial.PLT_BUDGET, 'Of lost tokens, until more are held.'
)
_WINDOW_LENGTH = flags.DEFINE_integer(
  'window_length', 0, 'Iterations that capture everything; 0: as measured.'
)
_MAX_WINDOW_LENGTH = flags.DEFINE_integer(
  'max_window_length', 8, 'Of windows that may be chosen.'
)
_WINDOW_MODE = flags.DEFINE_enum(
  'window_mode', '', ('', *decision.MODES), "'': rolling, if that fits."
)
_REPLAY = flags.DEFINE_enum(
  'replay',
  decision.MICROBATCHES,
  capture_settings.REPLAYS,
  'What recovery does again. auto: what leaves more of the time for training, '
  'as predicted after the warm-up from measurements and --expected_mtbf.',
)
_EXPECTED_MTBF = flags.DEFINE_float(
  'expected_mtbf',
  capture_settings.EXPECTED_MTBF_SECONDS,
  'Seconds between failures of the whole job; --replay=auto goes by it.',
)
_ORDER = flags.DEFINE_enum(
  'order', 'static', popularity.ORDERS, 'Of operators in a window.'
)
_OVERLAP_TARGET = flags.DEFINE_float(
  'overlap_target', 0.0, 'Share of an iteration for a copy; 0: by platform.'
)
_KEEP_WINDOWS = flags.DEFINE_integer(
  'keep_windows', 2, 'Of snapshots, in case that the newest are damaged.'
)
_LOG_ITERATIONS = flags.DEFINE_integer(
  'log_iterations', 0, 'That boundary logs have room for; 0: as windows need.'
)
_LOG_LAG = flags.DEFINE_integer(
  'log_lag', 2, 'Iterations that logs keep behind the newest records.'
)
_MAX_SKIPPED = flags.DEFINE_integer(
  'max_skipped', 10, 'Updates in a row that --skip_nonfinite leaves out.'
)
_MAX_FAILURES = flags.DEFINE_integer(
  'max_failures', 3, 'Failures without progress that end the run.'
)
_HANG_TIMEOUT = flags.DEFINE_float(
  'hang_timeout', 600.0, 'Seconds after which a running program hangs.'
)
_STANDBY = flags.DEFINE_bool(
  'standby', True, "Keep a process warm that takes a dead worker's place."
)
_ON_FAILURE = flags.DEFINE_enum(
  'on_failure', 'stop', ('stop', 'shrink'),
  'When a worker cannot be replaced: end the run, or go on without it.',
)  # fmt: skip
_MAX_WORKERS = flags.DEFINE_integer(
  'max_workers', 0, 'Processes that may become workers in all; 0: no limit.'
)
_GROW_AFTER = flags.DEFINE_integer(
  'grow_after', 0, 'Iterations until a shrunk stage is whole again; 0: never.'
)
_FULL_SECONDS = flags.DEFINE_float(
  'full_seconds', 60.0, 'How long a full boundary log waits, then fails.'
)
_LOCAL_HOSTS = flags.DEFINE_integer(
  'local_hosts', 1, 'Virtual hosts on this machine that talk over TCP.'
)
_DRY_RUN = flags.DEFINE_bool(
  'dry_run', False, 'Print how much host memory the run would take, and exit.'
)
_FAIL = flags.DEFINE_multi_string(
  'fail',
  [],
  'KIND:stage=S,replica=R,iteration=I,phase=P: a fault that happens once; '
  'repeatable. KIND: '
  + ', '.join(faults.FaultKind)
  + '. P: '
  + ', '.join(faults.Phase)
  + '. I may be left out in start, compile, replay, hand_over and save.',
)
_PRINT_CONFIG = flags.DEFINE_bool(
  'print_config', False, 'Print the configuration as JSON and exit.'
)


def run_config() -> run_settings.RunConfig:
  """Makes the run's settings from the flags.

  Raises:
    errors.ConfigError: a value is not allowed; names flag and value.
  """
  overrides = list(_MODEL.value)
  for flag, field in ((_REMAT, 'remat'), (_DROPOUT, 'dropout_rate')):
    if flag.value is not None:
      overrides.append(f'{field}={flag.value}')
  first, schedule = 0, {}
  if _INIT_POSITION.value:
    if not _INIT_FROM.value or _INIT_WEIGHTS_ONLY.value:
      raise errors.ConfigError(
        'init_position',
        True,
        'needs --init_from, without --init_weights_only: the position is in '
        "the optimizer's state, too",
      )
    first, schedule = run_settings.position_of(_INIT_FROM.value)
  optimizer = {
    'optimizer': _OPTIMIZER.value,
    'learning_rate': _LEARNING_RATE.value,
    'warmup_iterations': _WARMUP.value,
    'decay_iterations': _DECAY.value,
    'final_fraction': _FINAL_FRACTION.value,
    'weight_decay': _WEIGHT_DECAY.value,
    'b1': _B1.value,
    'b2': _B2.value,
    'clip_norm': _CLIP_NORM.value,
  }
  given = {name: x for name, x in optimizer.items() if x is not None}
  return run_settings.make(
    _PRESET.value,
    model_overrides=overrides,
    train_overrides={
      'seed': _SEED.value,
      'iterations': _ITERATIONS.value,
      'initial_iteration': first,
      'stages': _STAGES.value,
      'replicas': _REPLICAS.value,
      'shard_optimizer': _SHARD_OPTIMIZER.value,
      'local_devices': _LOCAL_DEVICES.value,
      'microbatches': _MICROBATCHES.value,
      'microbatch_size': _MICROBATCH_SIZE.value,
      'eval_every': _EVAL_EVERY.value,
      'eval_microbatches': _EVAL_MICROBATCHES.value,
      'skip_nonfinite': _SKIP_NONFINITE.value,
    },
    optimizer_overrides=schedule | given,
    data=_DATA.value,
    data_dtype=_DATA_DTYPE.value,
    init_from=_INIT_FROM.value,
    init_weights_only=_INIT_WEIGHTS_ONLY.value,
  )


def main(argv: list[str]) -> int:
  """Trains as the flags say; returns the exit code."""
  if len(argv) > 1:
    raise errors.ConfigError('', argv[1], 'is no flag; flags begin with --')
  config = run_config()
  if _PRINT_CONFIG.value:
    print(json.dumps(codec.encode(config), indent=2))
    return 0
  captures = capture_settings.CaptureSettings(
    policy=registry.of_name(_POLICY.value),
    window_length=_WINDOW_LENGTH.value,
    window_mode=_WINDOW_MODE.value,
    replay=_REPLAY.value,
    expected_mtbf_seconds=_EXPECTED_MTBF.value,
    order=_ORDER.value,
    max_window_length=_MAX_WINDOW_LENGTH.value,
    overlap_target=_OVERLAP_TARGET.value,
    keep_windows=_KEEP_WINDOWS.value,
    log_iterations=_LOG_ITERATIONS.value,
    log_lag=_LOG_LAG.value,
    interval=_INTERVAL.value,
    overhead_budget=_OVERHEAD_BUDGET.value,
    partial_experts=_PARTIAL_EXPERTS.value,
    partial_select=_PARTIAL_SELECT.value,
    plt_budget=_PLT_BUDGET.value,
  )
  if _DRY_RUN.value:
    from launch.lm import dry_run

    dry_run.show(
      config,
      captures,
      hostmem_dir=_HOSTMEM_DIR.value,
      local_hosts=_LOCAL_HOSTS.value,
    )
    return 0
  streams.outlive('launch.train')
  linux_process.exit_when_stopped(errors.ExitCode.STOPPED, streams.hurry)
  code = agent_run.run(
    config.job_spec(),
    agent_settings.AgentSettings(
      workdir=_WORKDIR.value,
      fresh=_FRESH.value,
      hostmem_dir=_HOSTMEM_DIR.value,
      captures=captures,
      durable_dir=_DURABLE_DIR.value,
      max_skipped=_MAX_SKIPPED.value,
      max_failures=_MAX_FAILURES.value,
      hang_timeout_seconds=_HANG_TIMEOUT.value,
      standby=_STANDBY.value,
      on_failure=_ON_FAILURE.value,
      max_workers=_MAX_WORKERS.value,
      grow_after=_GROW_AFTER.value,
      compilation_cache_dir=_CACHE.value,
      accept_changes=environment.canonical(_ACCEPT_CHANGES.value),
      extend=_EXTEND.value,
      local_hosts=_LOCAL_HOSTS.value,
      full_seconds=_FULL_SECONDS.value,
      faults=faults.parse_faults(
        _FAIL.value, config.train.stages, config.train.replicas
      ),
    ),
    progress.Progress(config.train.iterations, config.tokens_per_iteration),
  )
  if code == errors.ExitCode.STOPPED:
    streams.hurry()
  return code


if __name__ == '__main__':
  command_line.run_main('launch.train', main)
