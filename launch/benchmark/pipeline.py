"""Costs of a pipeline: our programs, whole runs, their start.

`launch.benchmark pipeline` shows these rows: (name, value, goal).
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import pathlib
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

from launch.benchmark.harness import scratch, summary
from moetion_jax.runtime import linux_process

_MICROBATCHES = (4, 8, 16)
_RUN_ITERATIONS = 6


# ---- Programs ----------------------------------------------------------------


def programs(preset: str, rounds: int) -> list[summary.Row]:
  """Compares split programs with plain steps, and the digest with AdamW."""
  import jax
  import numpy as np

  from launch.benchmark.harness import one_stage, plain_step
  from launch.lm import settings as run_settings, transformer_job
  from moetion_jax.state import optimizers

  config = run_settings.make(
    preset,
    model_overrides=[],
    train_overrides={'stages': 1, 'eval_every': 0, 'iterations': 10_000},
    optimizer_overrides={},
  )
  train = config.train
  data = transformer_job.of(config).data()
  ours = one_stage.make_worker(config, data)

  def run_ours(number: int) -> None:
    ours.train(
      config.train,
      lambda _: None,
      stop=_after(1),
      first_iteration=number,
    )

  subjects: dict[str, Callable[[int], None]] = {'ours': run_ours}
  for name, unrolled in (('plain_scan', False), ('plain_unrolled', True)):
    step, initial = plain_step.make_step(
      ours.stage.model,
      optimizers.make(train.optimizer),
      clip_norm=train.optimizer.clip_norm,
      microbatches=train.microbatches,
      unrolled=unrolled,
    )
    subjects[name] = _plain(step, initial(), data, train.microbatches)
  seconds = summary.interleave(subjects, rounds)

  # The digest beside a plain AdamW update of the same state.
  adamw, carry = plain_step.make_update(
    ours.stage.model, optimizers.make(train.optimizer)
  )
  holder = [carry]
  gradients = jax.tree.map(lambda m: np.full(m.shape, 1e-3, 'f4'), carry[0])
  gradients = jax.device_put(gradients)

  def run_adamw(_: int) -> None:
    holder[0] = jax.block_until_ready(adamw(holder[0], gradients))

  def run_digest(_: int) -> None:
    jax.block_until_ready(ours.programs.digest(ours.state))

  small_parts = summary.interleave(
    {'digest': run_digest, 'adamw': run_adamw}, max(rounds, 30)
  )
  tokens = (
    train.microbatches * train.microbatch_size * config.model.sequence_length
  )
  fastest = min(
    ('plain_scan', 'plain_unrolled'), key=lambda n: np.median(seconds[n])
  )
  rows: list[summary.Row] = [
    (f'tokens/s, {name}', summary.summarize(tokens / np.array(values)), '')
    for name, values in seconds.items()
  ]
  rows += [
    (
      f'ours / faster plain step ({fastest})',
      summary.paired_ratio(seconds[fastest], seconds['ours']),
      '>= 0.95',
    ),
    (
      'digest / plain AdamW update',
      summary.paired_ratio(small_parts['digest'], small_parts['adamw']),
      '<= 0.7',
    ),
  ]
  return rows


def _after(count: int) -> Callable[[], bool]:
  """Makes a `stop` that returns True from its (count + 1)-th call on."""
  asked = 0

  def stop() -> bool:
    nonlocal asked
    asked += 1
    return asked > count

  return stop


def _plain(step, carry, data, microbatches: int) -> Callable[[int], None]:
  import numpy as np

  holder = [carry]

  def run(number: int) -> None:
    batches = [data.batch(number, m) for m in range(microbatches)]
    holder[0], loss = step(
      holder[0],
      np.stack([b.inputs for b in batches]),
      np.stack([b.labels for b in batches]),
    )
    import jax

    jax.block_until_ready((holder[0], loss))

  return run


# ---- Runs --------------------------------------------------------------------


class _Runs:
  """Starts real runs of `launch.train`, in a folder of their own."""

  def __init__(self, folder: str, hostmem_dir: str, cache_dir: str):
    self._folder = pathlib.Path(folder)
    self._common = [
      f'--hostmem_dir={hostmem_dir}',
      f'--compilation_cache_dir={cache_dir}',
    ]
    self._count = 0

  def start(self, *flags: str) -> tuple[subprocess.Popen[str], pathlib.Path]:
    """Starts a run; returns its process, with output piped, and its workdir."""
    self._count += 1
    workdir = self._folder / f'run-{self._count}'
    process = subprocess.Popen(
      [sys.executable, '-m', 'launch.train', f'--workdir={workdir}']
      + [*self._common, *flags],
      stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT,
      text=True,
      # A killed benchmark leaves no run behind, and the run leaves nothing.
      preexec_fn=functools.partial(
        linux_process.die_with, os.getpid(), signal.SIGTERM
      ),
    )
    return process, workdir

  def lines(self, *flags: str) -> list[dict[str, Any]]:
    """Does a whole run; returns the lines of its metrics."""
    process, workdir = self.start(*flags)
    output, _ = process.communicate()
    if process.returncode:
      raise RuntimeError(f'{flags}: exit code {process.returncode}: {output}')
    return [json.loads(x) for x in open(workdir / 'metrics.jsonl')]

  def seconds_to_first_iteration(self, *flags: str) -> float:
    """Times a run from the start of its process to its first iteration."""
    begin = time.monotonic()
    process, _ = self.start(*flags)
    seconds, output = None, []
    assert process.stdout is not None
    for line in process.stdout:
      output.append(line)
      if seconds is None and line.startswith('iteration 1/'):
        seconds = time.monotonic() - begin
    process.wait()
    if seconds is None:
      raise RuntimeError(f'{flags}: {"".join(output)}')
    return seconds


def stages(
  preset: str, pairs: int, hostmem_dir: str, cache_dir: str
) -> list[summary.Row]:
  """Compares two stages with one on the same cores; shows late reads.

  The `seconds` of iterations count, without the first one of a run; a pair of
  runs gives one ratio of their medians.
  """
  ratios: dict[int, list[float]] = {m: [] for m in _MICROBATCHES}
  late: dict[int, list[float]] = {m: [] for m in _MICROBATCHES}
  with scratch.folder() as folder:
    runs = _Runs(str(folder), hostmem_dir, cache_dir)
    for _ in range(pairs):
      for microbatches in _MICROBATCHES:
        seconds = []
        for count in (1, 2):
          lines = runs.lines(
            f'--preset={preset}',
            f'--stages={count}',
            f'--microbatches={microbatches}',
            f'--iterations={_RUN_ITERATIONS}',
            '--eval_every=0',
          )[1:]
          seconds.append(statistics.median(x['seconds'] for x in lines))
          if count > 1:
            late[microbatches] += [
              max(x['late_seconds']) / x['seconds'] for x in lines
            ]
        ratios[microbatches].append(seconds[0] / seconds[1])
  rows: list[summary.Row] = []
  for microbatches in _MICROBATCHES:
    name = f'{microbatches} microbatches'
    rows.append(
      (
        f'tokens/s of 2 stages / 1 stage, {name}',
        summary.summarize(ratios[microbatches]),
        '>= 0.9' if microbatches == 16 else '',
      )
    )
    rows.append(
      (
        f'share waited for input that exists, {name}',
        summary.summarize(late[microbatches]),
        '<= 0.02',
      )
    )
  return rows


def start(rounds: int, hostmem_dir: str, cache_dir: str) -> list[summary.Row]:
  """Times a command until its first iteration, with programs cached."""
  flags = ['--preset=tiny', '--iterations=1', '--eval_every=0']
  with scratch.folder() as folder:
    runs = _Runs(str(folder), hostmem_dir, cache_dir)
    runs.seconds_to_first_iteration(*flags)  # fills the cache
    seconds = [runs.seconds_to_first_iteration(*flags) for _ in range(rounds)]
  value = summary.summarize(seconds)
  return [('start to first iteration, `tiny`, s', value, '<= 4')]


FROZEN_WARM_UP_ROUNDS = 3


def frozen_rows(preset: str, rounds: int) -> list[summary.Row]:
  """Measures the saving of a replay without frozen experts' weight gradients.

  This is its upper bound: no expert of the stage has any. The unit is CPU
  seconds, since a busy machine stretches wall time.
  """
  import jax
  import numpy as np

  from launch.lm import settings as run_settings, transformer_job
  from moetion_jax.programs import functions
  from moetion_jax.state import model, optimizers

  class Frozen(functions.Functions):
    """Functions whose backward keeps experts' `acc`; XLA drops the rest."""

    def backward(self, recipe, compute, residuals, dy, acc):
      dx, new = super().backward(recipe, compute, residuals, dy, acc)
      partition = self.model.partition
      return dx, {n: acc[n] if partition(n).stacked else new[n] for n in new}

  config = run_settings.make(
    preset,
    model_overrides=[],
    train_overrides={'stages': 1, 'eval_every': 0},
    optimizer_overrides={},
  )
  full = transformer_job.of(config).build_stage(0)
  frozen = Frozen(
    full.model,
    optimizers.make(config.train.optimizer),
    full.shape,
    config.train.local_devices,
  )
  without = dataclasses.replace(full, functions=frozen)
  programs = {'full': full.compile(), 'frozen': without.compile()}
  first = programs['full']
  compute = first.compute_of(full.initial_state())
  batch = transformer_job.of(config).data().batch(1, 0)
  seconds: dict[str, list[tuple[float, float]]] = {n: [] for n in programs}
  found = {}
  for _ in range(FROZEN_WARM_UP_ROUNDS + rounds):
    for name in programs:
      begin = time.process_time()
      y, residuals, _ = jax.block_until_ready(
        first.forward(
          compute,
          model.Inputs(batch.inputs, batch.labels),
          model.Position(np.uint32(1), np.zeros(1, np.uint32)),
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
  a, b = (
    np.array(seconds[n])[FROZEN_WARM_UP_ROUNDS:] for n in ('frozen', 'full')
  )
  # Both cases share one forward program: its noise is left out.
  forward = np.median(np.concatenate([a, b])[:, 0])
  both = (forward + a[:, 1]) / (forward + b[:, 1])
  return [
    ('backward, CPU s', summary.summarize(b[:, 1]), ''),
    ('frozen / full, backward', summary.summarize(a[:, 1] / b[:, 1]), ''),
    ('frozen / full, forward + backward', summary.summarize(both), ''),
  ]
