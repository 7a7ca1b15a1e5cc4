"""What a replay would save that skips weight gradients of frozen experts.

`launch.benchmark frozen`. Too little to be built into the product (README).
"""

from __future__ import annotations

import time

import jax
import numpy as np

from launch import local, settings, summary
from launch.benchmark_pipeline import Row
from moetion_jax import stage as stage_lib, stage_model

WARM_UP_ROUNDS = 3


def rows(preset: str, rounds: int) -> list[Row]:
  """What replay would save without weight gradients of frozen experts.

  The bound of it: no expert of the stage has any. CPU seconds, since a busy
  machine stretches the others.
  """

  class Frozen(stage_lib.Stage):
    """Its backward leaves `acc` of experts alone; XLA drops the rest."""

    def _backward(self, compute, residuals, dy, acc):
      dx, new = super()._backward(compute, residuals, dy, acc)
      partition = self.model.partition
      return dx, {n: acc[n] if partition(n).stacked else new[n] for n in new}

  config = settings.make(
    preset,
    model_overrides=[],
    train_overrides={'stages': 1, 'eval_every': 0},
    optimizer_overrides={},
  )
  full = local.build_stage(config, 0)
  without = Frozen(full.model, full._optimizer, full.mesh, full.shape)
  programs = {'full': full.compile(), 'frozen': without.compile()}
  first = programs['full']
  compute = first.compute_of(full.initial_state())
  batch = local.load_data(config).batch(1, 0)
  seconds: dict[str, list[tuple[float, float]]] = {n: [] for n in programs}
  found = {}
  for _ in range(WARM_UP_ROUNDS + rounds):
    for name in programs:
      begin = time.process_time()
      y, residuals, _ = jax.block_until_ready(
        first.forward(
          compute,
          stage_model.Inputs(batch.inputs, batch.labels),
          stage_model.Position(np.uint32(1), np.zeros(1, np.uint32)),
        )
      )
      middle = time.process_time()
      _, found[name] = jax.block_until_ready(
        programs[name].backward(compute, residuals, y, first.zeros())
      )
      end = time.process_time()
      seconds[name].append((middle - begin, end - middle))
  for name in found['full']:
    if not full.model.partition(name).stacked:
      np.testing.assert_array_equal(found['frozen'][name], found['full'][name])
  a, b = (np.array(seconds[n])[WARM_UP_ROUNDS:] for n in ('frozen', 'full'))
  # Forward is one program: its noise is left out.
  forward = np.median(np.concatenate([a, b])[:, 0])
  both = (forward + a[:, 1]) / (forward + b[:, 1])
  return [
    ('backward, CPU s', summary.summarize(b[:, 1]), ''),
    ('frozen / full, backward', summary.summarize(a[:, 1] / b[:, 1]), ''),
    ('frozen / full, forward + backward', summary.summarize(both), ''),
  ]
