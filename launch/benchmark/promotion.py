"""Times the promotion of a warm standby, each time in a fresh process.

`python -m launch.benchmark promotion` makes the table; this module's `main` is
one such process: it warms up as a standby does, is promoted, runs two
iterations of one stage without neighbours, and prints the seconds of each
phase.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Mapping
from typing import Any

from launch.lm import settings as run_settings
from moetion_jax import codec


def measure(
  config: run_settings.RunConfig,
  stage: int,
  *,
  compilation_cache_dir: str,
  touch_bytes: int,
) -> Mapping[str, float]:
  """Measures one promotion in a new process.

  Args:
    config: the run's settings.
    stage: the stage that the standby takes over.
    compilation_cache_dir: folder of the compiled programs.
    touch_bytes: bytes of memory that the standby touches beforehand.

  Returns:
    Seconds of each phase, and of loading each program.
  """
  result = subprocess.run(
    [sys.executable, '-m', 'launch.benchmark.promotion'],
    input=json.dumps(
      {
        'config': codec.encode(config),
        'stage': stage,
        'cache': compilation_cache_dir,
        'touch_bytes': touch_bytes,
      }
    ),
    stdout=subprocess.PIPE,
    text=True,
    check=True,
  )
  return json.loads(result.stdout)


class _Watch:
  def __init__(self):
    self.seconds: dict[str, float] = {}
    self._last = time.perf_counter()

  def lap(self, name: str) -> None:
    now = time.perf_counter()
    self.seconds[name] = now - self._last
    self._last = now


def main() -> None:
  """Reads the task from stdin; prints the seconds of each phase."""
  watch = _Watch()
  task: dict[str, Any] = json.load(sys.stdin)
  import jax
  import numpy as np

  from launch.lm import transformer_job
  from moetion_jax.programs import compilation, jax_internals, mesh
  from moetion_jax.runtime import xla_setup
  from moetion_jax.training import worker

  del worker  # only imported, as a standby does
  config = codec.decode(run_settings.RunConfig, task['config'])
  xla_setup.configure(
    local_devices=config.train.local_devices,
    compilation_cache_dir=task['cache'],
  )
  watch.lap('imports')
  stage = transformer_job.of(config).declare_stage(task['stage'])
  watch.lap('declare')
  traced = stage.trace()
  watch.lap('trace')
  lowered = traced.lower('cpu')
  watch.lap('lower')
  assert not jax_internals.has_backend()
  host = jax.tree.map(
    lambda s: np.full(s.shape, 1e-3, s.dtype), stage.state_shapes
  )
  xla_setup.touch_memory(task['touch_bytes'])
  watch.lap('touch memory')

  begin = time.perf_counter()
  devices = jax.devices()[: config.train.local_devices]
  stage = stage.on(mesh.make_mesh(devices))
  watch.lap('backend')
  loads = _Watch()
  names = [*compilation.ORDER]

  def on_program(name: str) -> None:
    if name != names[0]:
      loads.lap(f'load {names[names.index(name) - 1]}')

  programs = lowered.compile(stage.mesh, on_program)
  loads.lap(f'load {names[-1]}')
  watch.lap('load programs')
  state = stage.place_state(host, programs.place)
  watch.lap('place state')
  watch.seconds['promotion'] = time.perf_counter() - begin
  for iteration in (1, 2):
    state = _iterate(config, stage, programs, state)
    watch.lap(f'iteration {iteration}')
  print(json.dumps(watch.seconds | loads.seconds))


def _iterate(config: run_settings.RunConfig, stage, programs, state):
  """Runs one iteration on constant data; returns the new state."""
  import jax
  import numpy as np

  from moetion_jax.state import model as model_lib

  model, train = stage.model, config.train
  rows = train.microbatch_size
  tokens = np.zeros((rows, config.model.sequence_length), np.int32)
  hidden = jax.device_put(
    np.full((rows, *model.hidden_shape), 0.1, model.hidden_dtype),
    stage.rows_sharding,
  )
  inputs = model_lib.Inputs(
    tokens if model.has_embedding else hidden,
    tokens if model.has_head else None,
  )
  compute, acc, counts = programs.compute_of(state), programs.zeros(), []
  for m in range(train.microbatches):
    position = model_lib.Position(np.uint32(1), np.array([m], np.uint32))
    y, residuals, count = programs.forward(compute, inputs, position)
    dy = y if model.has_head else hidden
    _, acc = programs.backward(compute, residuals, dy, acc)
    counts.append(count)
  gradients, _ = jax.block_until_ready(stage.reduce(programs, acc, counts))
  slot = {
    g: np.zeros(len(stage.partition.operators_of(g)), bool)
    for g in stage.partition.groups
  }
  state, _, _ = programs.update(state, gradients, np.float32(1), slot)
  return jax.block_until_ready((state, programs.digest(state)))[0]


if __name__ == '__main__':
  main()
