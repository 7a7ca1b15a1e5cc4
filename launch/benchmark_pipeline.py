"""What a pipeline costs: our programs, whole runs, their start.

`launch.benchmark pipeline` shows these rows: (name, value, goal).
"""

from __future__ import annotations

import functools
import json
import os
import pathlib
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

from launch import parent_death, scratch, summary

Row = tuple[str, summary.Summary, str]

_WARM_UP_ROUNDS = 3
_MICROBATCHES = (4, 8, 16)
_RUN_ITERATIONS = 6


def interleave(
  subjects: Mapping[str, Callable[[int], float | None]], rounds: int
) -> dict[str, list[float]]:
  """Seconds of each subject in each measured round, run in turn.

  A subject that times itself returns its seconds.
  Tells of each round as it goes: a machine may be gone before the last one.
  """
  seconds: dict[str, list[float]] = {name: [] for name in subjects}
  for number in range(_WARM_UP_ROUNDS + rounds):
    is_measured = number >= _WARM_UP_ROUNDS
    took: list[str] = []
    for name, subject in subjects.items():
      begin = time.perf_counter()
      own = subject(number + 1)
      passed = time.perf_counter() - begin if own is None else own
      took.append(f'{name} {passed:.4g} s')
      if is_measured:
        seconds[name].append(passed)
    print(
      f'{"measured" if is_measured else "warm-up"} round: ' + ', '.join(took),
      file=sys.stderr,
      flush=True,
    )
  return seconds


# ---- Programs ----------------------------------------------------------------


def programs(preset: str, rounds: int) -> list[Row]:
  """Split programs against plain single-jit steps; digest against AdamW."""
  import jax
  import numpy as np

  from launch import baseline, local, settings
  from moetion_jax import optimizers

  config = settings.make(
    preset,
    model_overrides=[],
    train_overrides={'stages': 1, 'eval_every': 0, 'iterations': 10_000},
    optimizer_overrides={},
  )
  train = config.train
  data = local.load_data(config)
  (ours,) = local.make_workers(config, data)

  def run_ours(number: int) -> None:
    ours.train(
      config.train,
      lambda _: None,
      stop=_after(1),
      first_iteration=number,
    )

  subjects: dict[str, Callable[[int], None]] = {'ours': run_ours}
  for name, unrolled in (('plain_scan', False), ('plain_unrolled', True)):
    step, initial = baseline.make_step(
      ours.stage.model,
      optimizers.make(train.optimizer),
      clip_norm=train.optimizer.clip_norm,
      microbatches=train.microbatches,
      unrolled=unrolled,
    )
    subjects[name] = _plain(step, initial(), data, train.microbatches)
  seconds = interleave(subjects, rounds)

  # The digest beside a plain AdamW update of the same state.
  adamw, carry = baseline.make_update(
    ours.stage.model, optimizers.make(train.optimizer)
  )
  holder = [carry]
  gradients = jax.tree.map(lambda m: np.full(m.shape, 1e-3, 'f4'), carry[0])
  gradients = jax.device_put(gradients)

  def run_adamw(_: int) -> None:
    holder[0] = jax.block_until_ready(adamw(holder[0], gradients))

  small_parts = interleave(
    {
      'digest': lambda _: jax.block_until_ready(
        ours.programs.digest(ours.state)
      ),
      'adamw': run_adamw,
    },
    max(rounds, 30),
  )
  tokens = (
    train.microbatches * train.microbatch_size * config.model.sequence_length
  )
  fastest = min(
    ('plain_scan', 'plain_unrolled'), key=lambda n: np.median(seconds[n])
  )
  rows: list[Row] = [
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
  """A `stop` that says yes when asked for the (count + 1)-th time."""
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
  """Real runs of `launch.train`, in a folder of their own."""

  def __init__(self, folder: str, hostmem_dir: str, cache_dir: str):
    self._folder = pathlib.Path(folder)
    self._common = [
      f'--hostmem_dir={hostmem_dir}',
      f'--compilation_cache_dir={cache_dir}',
    ]
    self._count = 0

  def start(self, *flags: str) -> tuple[subprocess.Popen[str], pathlib.Path]:
    """Starts one; its output is a pipe."""
    self._count += 1
    workdir = self._folder / f'run-{self._count}'
    process = subprocess.Popen(
      [sys.executable, '-m', 'launch.train', f'--workdir={workdir}']
      + [*self._common, *flags],
      stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT,
      text=True,
      # A benchmark that is killed leaves no run, and the run nothing.
      preexec_fn=functools.partial(
        parent_death.die_with, os.getpid(), signal.SIGTERM
      ),
    )
    return process, workdir

  def lines(self, *flags: str) -> list[dict[str, Any]]:
    """The metrics of one, from beginning to end."""
    process, workdir = self.start(*flags)
    output, _ = process.communicate()
    if process.returncode:
      raise RuntimeError(f'{flags}: exit code {process.returncode}: {output}')
    return [json.loads(x) for x in open(workdir / 'metrics.jsonl')]

  def seconds_to_first_iteration(self, *flags: str) -> float:
    """From the start of the process to the first line of its metrics."""
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
) -> list[Row]:
  """Two stages against one on the same cores; how late entries are read.

  An iteration's `seconds` count, the first one of a run left out; a pair of
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
  rows: list[Row] = []
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


def start(rounds: int, hostmem_dir: str, cache_dir: str) -> list[Row]:
  """Seconds from the command to its first iteration, programs cached."""
  flags = ['--preset=tiny', '--iterations=1', '--eval_every=0']
  with scratch.folder() as folder:
    runs = _Runs(str(folder), hostmem_dir, cache_dir)
    runs.seconds_to_first_iteration(*flags)  # fills the cache
    seconds = [runs.seconds_to_first_iteration(*flags) for _ in range(rounds)]
  value = summary.summarize(seconds)
  return [('start to first iteration, `tiny`, s', value, '<= 4')]
