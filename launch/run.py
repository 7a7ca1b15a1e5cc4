"""One run from its configuration to the final checkpoint, in one process."""

from __future__ import annotations

import os
import platform
import socket
import sys
from collections.abc import Callable, Sequence
from typing import Any

import flax
import grain
import jax
import optax
from orbax import checkpoint as ocp

from launch import checkpoint, local, metrics, progress, settings
from moetion_jax import base, worker


def software() -> dict[str, str]:
  """Versions on which the bits of a run depend."""
  return {
    'python': platform.python_version(),
    'jax': jax.__version__,
    'jaxlib': jax.lib.__version__,
    'flax': flax.__version__,
    'optax': optax.__version__,
    'orbax': ocp.__version__,
    'grain': getattr(grain, '__version__', 'unknown'),
    'platform': jax.default_backend(),
    'device': jax.devices()[0].device_kind,
  }


def run(
  config: settings.RunConfig,
  workdir: str,
  *,
  prepare: Callable[[dict[str, Any]], None],
  stop: Callable[[], bool],
) -> int:
  """Trains in this process and leaves the files of DESIGN section 9.

  Args:
    config: of the run.
    workdir: its folder, absolute.
    prepare: called with the full content of config.json, when data and model
      are known to be good and before anything is written.
    stop: asked between iterations.

  Returns:
    The exit code.
  """
  train = config.train
  data = local.load_data(config)
  if train.local_devices > len(jax.devices()):
    raise base.ConfigError(
      'local_devices', train.local_devices, f'{len(jax.devices())} are there'
    )
  for index in range(train.stages):  # errors of shape before any file
    local.build_stage(config, index)
  initial = local.load_initial(config)
  prepare(
    config.to_json()
    | {'data_fingerprint': data.fingerprint(), 'software': software()}
  )
  events = metrics.EventsFile(os.path.join(workdir, 'events.jsonl'))
  final = os.path.join(workdir, 'checkpoint')
  if os.path.isdir(final):
    print(f'This run is finished: {final}. Pass --fresh to start over.')
    return 0
  with metrics.MetricsFile(os.path.join(workdir, 'metrics.jsonl')) as lines:
    if lines.last_iteration:
      print(
        f'{workdir} has {lines.last_iteration} iterations of this run; they '
        'are done again and compared.'
      )
    return _train(config, workdir, data, initial, lines, events, stop)


def _train(
  config: settings.RunConfig,
  workdir: str,
  data: worker.Data,
  initial: dict[str, Any] | None,
  lines: metrics.MetricsFile,
  events: metrics.EventsFile,
  stop: Callable[[], bool],
) -> int:
  train = config.train
  tokens = (
    train.global_microbatches
    * train.microbatch_size
    * config.model.sequence_length
  )
  print(f'Compiling {train.stages} stage(s) of {config.preset} ...', flush=True)
  _write_workers(workdir, config, 'compiling', 0)
  workers = local.make_workers(config, data, initial)
  events.write('start', stages=train.stages, iterations=train.iterations)
  _write_workers(workdir, config, 'running', 0)
  view = progress.Progress(train.iterations, tokens)

  def on_iteration(reports: Sequence[worker.Report]) -> None:
    line = metrics.make_line(reports, tokens)
    lines.write(line)
    _write_workers(workdir, config, 'running', line['iteration'])
    view.show(line)

  last = 0
  try:
    with view:
      last = local.train(config, workers, on_iteration, stop)
  except base.MoetionError as e:
    events.write('failure', error=str(e))
    _write_workers(workdir, config, 'failed', last)
    print(f'The run ended: {e}', file=sys.stderr)
    return 1
  if last < train.iterations:
    events.write('stopped', iteration=last)
    _write_workers(workdir, config, 'stopped', last)
    print(
      f'Stopped after iteration {last}. The same command starts again and '
      f'compares what it finds in {workdir}; --fresh removes it.'
    )
    return 0
  path = os.path.join(workdir, 'checkpoint')
  checkpoint.save(path, [w.state for w in workers], last, config)
  events.write('finished', iteration=last)
  _write_workers(workdir, config, 'finished', last)
  print(f'Finished: {path}')
  return 0


def _write_workers(
  workdir: str, config: settings.RunConfig, state: str, iteration: int
) -> None:
  host, pid = socket.gethostname(), os.getpid()
  metrics.write_json(
    os.path.join(workdir, 'workers.json'),
    {
      'agents': [{'host': host, 'pid': pid, 'address': None}],
      'workers': [
        {
          'stage': stage,
          'replica': 0,
          'host': host,
          'pid': pid,
          'generation': 1,
          'state': state,
          'iteration': iteration,
        }
        for stage in range(config.train.stages)
      ],
    },
  )
