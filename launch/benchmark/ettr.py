"""Effective training time under failures: `launch.benchmark ettr`.

Each policy has real runs of `launch.train`, whose workers are killed at the
same moments: a Poisson process in iterations, drawn from a seed.
"""

from __future__ import annotations

import itertools
import os
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from launch.benchmark.harness import (
  predict as benchmark_predict,
  runs as benchmark_runs,
  summary,
)
from launch.simulate import predict as simulate_predict
from moetion_jax.policies.kinds import registry

POLICIES = ('sparse', 'dense', 'two_phase', 'partial')
MTBF_ITERATIONS = (100, 50, 25)
_BASE = 'none'
# Time counts from their end: then programs and standbys are warm and intervals
# chosen.
_WARM_UP_ITERATIONS = 30
_MAX_FAILURES = 10_000
_GOAL = 'the highest of all exact policies'
_PREDICTION_GOAL = '<= 2'

# Runs of every round, by (policy, MTBF in iterations; 0 for no failures).
Outcomes = Mapping[tuple[str, int], Sequence[benchmark_runs.RunOutcome]]


def effective_training_time_ratio(
  undisturbed_seconds: float, seconds: float
) -> float:
  """Returns the ETTR, by the definition of all our figures.

  Args:
    undisturbed_seconds: time of some iterations in a run without checkpoints
      and failures.
    seconds: time until the measured run has done the same iterations, with
      everything: checkpoints, failures, recoveries, work done again.
  """
  return undisturbed_seconds / seconds


def measure(
  flags: Sequence[str],
  *,
  iterations: int,
  mtbfs: Sequence[int],
  policies: Sequence[str],
  rounds: int,
  seed: int,
  stages: int,
  hostmem_dir: str,
) -> dict[tuple[str, int], list[benchmark_runs.RunOutcome]]:
  """Runs everything: in every round one policy after the other (A B A B).

  Args:
    flags: flags of every run.
    iterations: iterations of every run.
    mtbfs: mean iterations between failures, one value per case.
    policies: the policies to compare.
    rounds: number of rounds, each with its own moments of failure.
    seed: seed of those moments.
    stages: number of stages of every run.
    hostmem_dir: folder in tmpfs.
  """
  outcomes: dict[tuple[str, int], list[benchmark_runs.RunOutcome]] = {}
  common = [
    *flags,
    f'--stages={stages}',
    f'--iterations={iterations}',
    '--eval_every=0',
    f'--max_failures={_MAX_FAILURES}',
  ]
  for number in range(rounds):
    cases = [(_BASE, 0), *itertools.product(policies, (0, *mtbfs))]
    for policy, mtbf in cases:
      script = []
      if mtbf:
        script = benchmark_runs.draw_failures(
          seed + number, mtbf, _WARM_UP_ITERATIONS, iterations - 1, stages
        )
      print(
        f'round {number + 1}: {policy}, {len(script)} failure(s)', flush=True
      )
      outcome = benchmark_runs.train(
        [*common, f'--policy={policy}'], hostmem_dir, script
      )
      outcomes.setdefault((policy, mtbf), []).append(outcome)
  return outcomes


def rows(outcomes: Outcomes, stages: int) -> list[summary.Row]:
  """Returns the rows of the table.

  Args:
    outcomes: the outcomes of all runs.
    stages: number of stages of each run.
  """
  bases = outcomes[_BASE, 0]
  found: list[summary.Row] = []
  for (policy, mtbf), runs in outcomes.items():
    if policy == _BASE:
      continue
    ratios = [_ratio(base, run) for base, run in zip(bases, runs, strict=True)]
    overheads = _overheads(outcomes, policy)
    if not mtbf:
      found.append((f'{policy}, overhead, %', summary.summarize(overheads), ''))
      continue
    name = f'MTBF {mtbf}, {policy}'
    is_ours = registry.POLICIES[policy].is_local
    goal = _GOAL if is_ours else ''
    found.append((f'{name}, ETTR', summary.summarize(ratios), goal))
    together = _together(outcomes, policy, mtbf)
    failures = sum(len(run.of_kind('failure')) for run in runs)
    found += [
      (
        f'{name}, lost to failures, % of its own pace',
        summary.summarize([100 * _lost(run) / _quiet(run) for run in runs]),
        '',
      ),
      (
        f'{name}, lost by a failure, s',
        summary.summarize([sum(map(_lost, runs)) / max(1, failures)]),
        '',
      ),
      (
        f'{name}, ETTR of all rounds together',
        summary.summarize([together]),
        goal,
      ),
    ]
    if not is_ours and ('sparse', mtbf) in outcomes:
      ours = _together(outcomes, 'sparse', mtbf)
      found.append(
        (
          f'MTBF {mtbf}, sparse / {policy}, ETTR of all rounds together',
          summary.summarize([ours / together]),
          '> 1' if registry.POLICIES[policy].is_exact else '',
        )
      )
    samples = _samples(bases, runs)
    found += [
      (f'{name}, {what}', summary.summarize(values), '')
      for what, values in samples.items()
      if values
    ]
    for pace, errors in _prediction_errors(
      outcomes, policy, mtbf, stages
    ).items():
      found.append(
        (
          f'{name}, simulated from {pace}, off by, %',
          summary.summarize(errors),
          _PREDICTION_GOAL,
        )
      )
  return found


def _prediction_errors(
  outcomes: Outcomes, policy: str, mtbf: int, stages: int
) -> dict[str, list[float]]:
  """Returns the simulator's errors in percent, by the source of its pace."""
  runs = outcomes[policy, mtbf]
  costs = benchmark_predict.costs(runs, _WARM_UP_ITERATIONS)
  beside = zip(outcomes[_BASE, 0], outcomes[policy, 0], runs, strict=True)
  found: dict[str, list[float]] = {}
  for base, quiet, run in beside:
    seconds = run.seconds(_WARM_UP_ITERATIONS, run.lines[-1]['iteration'])
    paces = {
      'its own pace': benchmark_predict.own_pace(run, _WARM_UP_ITERATIONS),
      'the pace of other runs': benchmark_predict.pace_beside(
        base, quiet, _WARM_UP_ITERATIONS
      ),
    }
    for name, pace in paces.items():
      predicted = benchmark_predict.predicted_seconds(
        run,
        policy=policy,
        stages=stages,
        first=_WARM_UP_ITERATIONS,
        pace=pace,
        costs=costs,
      )
      error = 100 * simulate_predict.error(predicted, seconds)
      found.setdefault(name, []).append(error)
  return found


def _samples(
  bases: Sequence[benchmark_runs.RunOutcome],
  runs: Sequence[benchmark_runs.RunOutcome],
) -> dict[str, list[float]]:
  """Returns the figures of one policy's runs, by name."""
  found: dict[str, list[float]] = {}
  for base, run in zip(bases, runs, strict=True):
    recovered = benchmark_runs.recoveries(run.events)
    one = {
      'failures': [float(len(run.of_kind('failure')))],
      'recovery, s': [r.seconds for r in recovered],
      'iterations done again': [
        float(r.replayed_iterations) for r in recovered
      ],
      'lost tokens, %': [
        100 * event['plt'] for event in run.of_kind('rolled_back')[-1:]
      ],
      'final loss against undisturbed': [
        run.lines[-1]['loss'] - base.lines[-1]['loss']
      ],
    }
    for name, values in one.items():
      found.setdefault(name, []).extend(values)
  return found


def _together(outcomes: Outcomes, policy: str, mtbf: int) -> float:
  """Returns the ETTR of all rounds, without most of the noise between runs.

  The cost of failures is measured against the quiet iterations of the run
  itself, and the length of those in all runs of the policy against all runs
  without one.
  """
  runs = outcomes[policy, mtbf]
  ours = [
    r for (name, _), all_ in outcomes.items() if name == policy for r in all_
  ]
  overhead = statistics.fmean(map(_pace, ours)) / statistics.fmean(
    map(_pace, outcomes[_BASE, 0])
  )
  quiet = sum(map(_quiet, runs))
  return quiet / (quiet + sum(map(_lost, runs))) / overhead


def _overheads(outcomes: Outcomes, policy: str) -> list[float]:
  """Returns the overhead of quiet iterations in percent, by run of a policy.

  The baseline is the undisturbed run of the same round.
  """
  return [
    100 * (_pace(run) / _pace(base) - 1)
    for (name, _), runs in outcomes.items()
    if name == policy
    for base, run in zip(outcomes[_BASE, 0], runs, strict=True)
  ]


def _pace(run: benchmark_runs.RunOutcome) -> float:
  return benchmark_predict.own_pace(run, _WARM_UP_ITERATIONS).iteration_seconds


def _quiet(run: benchmark_runs.RunOutcome) -> float:
  """Returns the seconds that a run would take if all iterations were quiet."""
  return (run.lines[-1]['iteration'] - _WARM_UP_ITERATIONS) * _pace(run)


def _lost(run: benchmark_runs.RunOutcome) -> float:
  """Returns the seconds that failures add to a run, whatever its pace."""
  last = run.lines[-1]['iteration']
  return run.seconds(_WARM_UP_ITERATIONS, last) - _quiet(run)


def _ratio(
  base: benchmark_runs.RunOutcome, run: benchmark_runs.RunOutcome
) -> float:
  last = base.lines[-1]['iteration']
  return effective_training_time_ratio(
    base.seconds(_WARM_UP_ITERATIONS, last),
    run.seconds(_WARM_UP_ITERATIONS, last),
  )


def details(outcomes: Outcomes) -> list[dict[str, Any]]:
  """Returns the figures of every run, for the JSON file."""
  bases = outcomes[_BASE, 0]
  found = []
  for (policy, mtbf), runs in outcomes.items():
    for number, run in enumerate(runs):
      base = bases[number]
      rolled_back = run.of_kind('rolled_back')
      found.append(
        {
          'policy': policy,
          'mtbf_iterations': mtbf,
          'round': number,
          'ettr': _ratio(base, run),
          'lost_seconds': _lost(run),
          'quiet_iteration_seconds': _pace(run),
          'standby_seconds': [e['seconds'] for e in run.of_kind('standby')],
          'failures': len(run.of_kind('failure')),
          'recoveries': [
            vars(r) for r in benchmark_runs.recoveries(run.events)
          ],
          'recovered': [
            {k: e[k] for k in ('stage', 'seconds', 'replayed_iterations')}
            for e in run.of_kind('recovered')
          ],
          'lost_tokens': sum(e['lost_tokens'] for e in rolled_back),
          'plt': rolled_back[-1]['plt'] if rolled_back else 0.0,
          'intervals': [
            {
              k: e.get(k)
              for k in ('kind', 'interval', 'window_length', 'every')
            }
            for e in run.events
            if e['kind'] in ('interval', 'window')
          ],
          'is_bit_equal': [x['digest'] for x in run.lines]
          == [x['digest'] for x in base.lines],
          'loss': run.lines[-1]['loss'],
          'snapshot_bytes': sum(x['snapshot_bytes'] for x in run.lines),
          'blocked_seconds': sum(x['blocked_seconds'] for x in run.lines),
          'iteration_seconds': statistics.median(
            x['seconds'] for x in run.lines
          ),
          'progress': run.progress,
        }
      )
  return found


def plot(outcomes: Outcomes, path: str | os.PathLike[str]) -> None:
  """Plots iterations over time in the first round, one panel per MTBF."""
  import matplotlib

  matplotlib.use('Agg')
  from matplotlib import pyplot

  mtbfs = sorted({mtbf for _, mtbf in outcomes if mtbf}, reverse=True)
  figure, axes = pyplot.subplots(
    1, len(mtbfs), figsize=(5 * len(mtbfs), 4), squeeze=False, sharey=True
  )
  for axis, mtbf in zip(axes[0], mtbfs, strict=True):
    for (policy, of_mtbf), runs in outcomes.items():
      if of_mtbf != mtbf and policy != _BASE:
        continue
      progress = runs[0].progress
      begin = next(s for s, i in progress if i >= _WARM_UP_ITERATIONS)
      points = [(s - begin, i) for s, i in progress if s >= begin]
      label = 'undisturbed' if policy == _BASE else policy
      axis.step(*zip(*points, strict=True), where='post', label=label)
    axis.set_title(f'MTBF {mtbf} iterations')
    axis.set_xlabel('seconds')
  axes[0][0].set_ylabel('iterations done')
  axes[0][0].legend()
  figure.tight_layout()
  figure.savefig(path, dpi=120)
  pyplot.close(figure)
