"""Cost of a failure: `launch.benchmark recovery`.

Workers of real runs of `launch.train` are killed with SIGKILL one after
another; the phases are those of events.jsonl. Runs that replay in different
ways take turns, so that a drift of the machine's speed does not decide: in each
turn every worker dies once, at moments that are the same in all of them. The
baseline restarts the whole job from dense Orbax checkpoints.
"""

from __future__ import annotations

import functools
import json
import math
import os
import random
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from launch.benchmark.harness import runs as benchmark_runs, scratch, summary
from moetion_jax.policies import decision
from moetion_jax.runtime import linux_process

_STAGES = 2
_WINDOW = 4
_KEPT_WINDOWS = 2
# Iterations without a fault before each kill: the window is full again.
_QUIET_ITERATIONS = 10
_DENSE_EVERY = 10  # iterations between the baseline's checkpoints


def _kills(
  run: benchmark_runs.WatchedRun,
  victims: Sequence[tuple[int, int]],
  moments: Sequence[float],
  *,
  standbys: int,
) -> Iterator[dict[str, float]]:
  """Kills workers in turn; yields the phases of each recovery, in seconds.

  Args:
    run: the run.
    victims: stage and replica of each worker to kill.
    moments: when each dies, as a share of an iteration.
    standbys: number of warm standbys that a kill waits for.
  """

  def is_ready() -> bool:
    warm = [w for w in run.workers() if w['state'] == 'standby']
    return len(warm) == standbys

  def training_seconds() -> float:
    return statistics.median(
      x['seconds'] for x in run.lines('metrics.jsonl')[2:]
    )

  for victim, moment in zip(victims, moments, strict=True):
    begin = run.newest()
    run.wait_for(lambda begin=begin: run.newest() >= begin + _QUIET_ITERATIONS)
    run.wait_for(is_ready)
    (worker,) = [
      w for w in run.workers() if (w['stage'], w['replica']) == victim
    ]
    time.sleep(moment * training_seconds())
    known = len(run.lines('events.jsonl'))
    killed_at = time.time()
    os.kill(worker['pid'], signal.SIGKILL)
    recovered = run.wait_for(
      lambda known=known: [
        e for e in run.lines('events.jsonl')[known:] if e['kind'] == 'recovered'
      ]
    )[0]
    (failure,) = [
      e for e in run.lines('events.jsonl')[known:] if e['kind'] == 'failure'
    ]
    seconds = recovered['seconds']
    replayed = recovered['replayed_iterations']
    yield {
      'total': recovered['time'] - killed_at,
      'detect': failure['time'] - killed_at,
      'start': seconds['start'],
      'fetch': seconds['fetch'],
      'replay': seconds['replay'],
      'replayed iterations': replayed,
      'applied updates': recovered['applied_updates'],
      'replay per iteration / training': seconds['replay']
      / max(replayed, 1)
      / training_seconds(),
    }


class _DenseJob:
  """The whole job as one process, to be killed and started again."""

  def __init__(self, arguments: dict[str, Any]):
    self.process = subprocess.Popen(
      [
        sys.executable,
        '-m',
        'launch.benchmark.harness.dense_job',
        json.dumps(arguments),
      ],
      stdout=subprocess.PIPE,
      stderr=subprocess.DEVNULL,
      text=True,
      preexec_fn=functools.partial(linux_process.die_with, os.getpid()),
    )

  def read(self) -> tuple[int, str]:
    """Waits for the next finished iteration; returns it and its digest."""
    assert self.process.stdout is not None
    line = self.process.stdout.readline()
    if not line:
      raise RuntimeError(f'the job ended with {self.process.wait()}')
    iteration, digest = line.split()
    return int(iteration), digest

  def kill(self) -> None:
    """Kills the process with SIGKILL and waits for its end."""
    self.process.kill()
    self.process.communicate()


def _restarts(
  preset: str,
  kills: int,
  hostmem_dir: str,
  cache_dir: str,
  microbatches: int | None,
) -> Iterator[dict[str, float]]:
  """Kills the whole job; yields the seconds until it is where it was.

  Kills are spread evenly over the iterations between two checkpoints.

  Raises:
    RuntimeError: an iteration that was done again had other bits.
  """
  with scratch.folder(hostmem_dir) as folder:
    arguments = {
      'preset': preset,
      'folder': str(folder),
      'every': _DENSE_EVERY,
      'cache_dir': cache_dir,
      'microbatches': microbatches,
    }
    job = _DenseJob(arguments)
    try:
      iteration, digests = 0, {}
      for number in range(kills):
        first = iteration + _DENSE_EVERY + _QUIET_ITERATIONS
        phase = (number * 3) % _DENSE_EVERY
        while iteration < first or iteration % _DENSE_EVERY != phase:
          iteration, digest = job.read()
          digests[iteration] = digest
        begin = time.monotonic()
        job.kill()
        job = _DenseJob(arguments)
        again, digest = job.read()
        started, first_again = time.monotonic(), again
        # Until the interrupted iteration is done as well.
        while again <= iteration:
          if digests.get(again) != digest:
            raise RuntimeError(f'iteration {again} came out differently')
          again, digest = job.read()
        iteration = again
        digests[iteration] = digest
        yield {
          'total': time.monotonic() - begin,
          'until the first iteration is done': started - begin,
          'replayed iterations': again - first_again + 1,
        }
    finally:
      job.kill()


def rows(
  preset: str,
  kills: int,
  hostmem_dir: str,
  cache_dir: str,
  replicas: int = 1,
  microbatches: int | None = None,
  replays: Sequence[str] = decision.REPLAYS,
) -> list[summary.Row]:
  """Measures recoveries and returns the rows; see the module.

  Args:
    preset: name of the model's shape.
    kills: number of kills with a standby and without one, for each way of
      replay, and of the whole job.
    hostmem_dir: folder in tmpfs.
    cache_dir: folder of the compiled programs.
    replicas: replicas of each stage; with several, the whole job is not
      restarted.
    microbatches: microbatches of a replica's iteration; None for the preset's
      own.
    replays: ways of replay to compare, of `decision.REPLAYS`.
  """
  flags = [
    f'--preset={preset}',
    f'--stages={_STAGES}',
    f'--replicas={replicas}',
    '--iterations=100000',
    f'--window_length={_WINDOW}',
    f'--keep_windows={_KEPT_WINDOWS}',
    '--eval_every=0',
    f'--compilation_cache_dir={cache_dir}',
    *([f'--microbatches={microbatches}'] if microbatches else []),
  ]
  out: list[summary.Row] = []
  for name in ('standby', 'no standby'):
    more = [] if name == 'standby' else ['--nostandby']
    standbys = replicas if name == 'standby' else 0
    samples: dict[str, dict[str, list[float]]] = {x: {} for x in replays}
    for victims, moments in _turns(kills, replicas):
      for replay in replays:
        its = [f'--replay={replay}', f'--max_failures={len(victims) + 1}']
        with benchmark_runs.running([*flags, *its, *more], hostmem_dir) as run:
          for one in _kills(run, victims, moments, standbys=standbys):
            _tell(f'{name}, {replay}', one)
            for phase, value in one.items():
              samples[replay].setdefault(phase, []).append(value)
    out += table(name, samples, replicas)
  if replicas > 1:
    return out
  restarts = []
  for one in _restarts(preset, kills, hostmem_dir, cache_dir, microbatches):
    _tell('whole job', one)
    restarts.append(one)
  for phase in restarts[0]:
    unit = '' if 'iterations' in phase else ', s'
    values = [one[phase] for one in restarts]
    label = f'whole job, Orbax every {_DENSE_EVERY} iterations, {phase}{unit}'
    out.append((label, summary.summarize(values), ''))
  return out


def _turns(
  kills: int, replicas: int
) -> Iterator[tuple[list[tuple[int, int]], list[float]]]:
  """Yields the turns of a run: its victims, and the moments at which they die.

  The moments are drawn with a fixed seed, so that a report can be repeated.
  """
  draw = random.Random(0)
  everyone = [(s, r) for r in range(replicas) for s in range(_STAGES)]
  for turn in range(math.ceil(kills / len(everyone))):
    victims = everyone[: kills - turn * len(everyone)]
    yield victims, [draw.random() for _ in victims]


def table(
  name: str, samples: Mapping[str, Mapping[str, Sequence[float]]], replicas: int
) -> list[summary.Row]:
  """Returns the rows of recoveries with or without standbys.

  Args:
    name: 'standby' or 'no standby'.
    samples: the values of each phase, kill by kill, by way of replay.
    replicas: replicas of each stage.
  """
  goals = {
    'standby, total': '<= 1.0' if replicas == 1 else '<= 2.0',
    'standby, detect': '<= 0.1',
    'standby, replay per iteration / training': '<= 1',
    'no standby, total': '<= 2.5',
  }
  out: list[summary.Row] = []
  for replay, phases in samples.items():
    for phase, values in phases.items():
      unit = '' if 'iteration' in phase or 'updates' in phase else ', s'
      out.append(
        (
          f'{name}, {replay}, {phase}{unit}',
          summary.summarize(values),
          goals.get(f'{name}, {phase}', ''),
        )
      )
  if set(decision.REPLAYS) <= samples.keys():
    old, new = (samples[x]['total'] for x in decision.REPLAYS)
    goal = '<= 0.45' if replicas == 1 else '<= 0.5'
    out.append(
      (
        f'{name}, total, {decision.UPDATES} / {decision.MICROBATCHES}',
        summary.paired_ratio(new, old),
        goal if name == 'standby' else '',
      )
    )
  return out


def _tell(name: str, phases: Mapping[str, float]) -> None:
  """Prints one recovery at once: all of them together take long."""
  text = ', '.join(f'{phase} {value:.2f}' for phase, value in phases.items())
  print(f'{name}: {text}', flush=True)
