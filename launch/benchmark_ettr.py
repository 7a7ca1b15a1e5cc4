"""Effective training time under failures: `launch.benchmark ettr`.

Real runs of `launch.train`, two stages, workers killed at the same moments of
everybody's progress, for each policy. Useful time is what the same iterations
take in a run that fails nowhere and saves nothing (policy `none`).
"""

from __future__ import annotations

import pathlib
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from launch import policy_runs, summary
from launch.benchmark_pipeline import Row

POLICIES = ('sparse', 'dense', 'two_phase', 'partial')
MTBF_ITERATIONS = (100.0, 50.0, 25.0)
_STAGES = 2
_NONE = 'none'

# By policy and MTBF (infinity: nothing fails).
Outcomes = Mapping[tuple[str, float], Sequence[policy_runs.Outcome]]
_NEVER = float('inf')


def measure(
  flags: Sequence[str],
  iterations: int,
  rounds: int,
  hostmem_dir: str,
  mtbf_iterations: Sequence[float] = MTBF_ITERATIONS,
) -> dict[tuple[str, float], list[policy_runs.Outcome]]:
  """Runs every policy at every MTBF, in turn.

  Args:
    flags: of `launch.train`.
    iterations: of each run.
    rounds: how often all of it is repeated, each time with other moments.
    hostmem_dir: in tmpfs.
    mtbf_iterations: mean iterations between failures.
  """
  found: dict[tuple[str, float], list[policy_runs.Outcome]] = {}
  for number in range(rounds):
    for mtbf in (_NEVER, *mtbf_iterations):
      failures = ()
      if mtbf < _NEVER:
        failures = policy_runs.draw_failures(number, mtbf, iterations, _STAGES)
      # One without anything before each group: the machine's speed drifts.
      for policy in (_NONE, *POLICIES):
        outcome = policy_runs.run(
          [*flags, f'--stages={_STAGES}'],
          policy,
          () if policy == _NONE else failures,
          hostmem_dir,
          iterations=iterations,
        )
        found.setdefault((policy, mtbf), []).append(outcome)
        print(
          f'{policy}, MTBF {mtbf:g} iterations, {len(failures)} failure(s): '
          f'{outcome.wall_seconds:.1f} s',
          flush=True,
        )
  return found


def rows(outcomes: Outcomes) -> list[Row]:
  """The table; see the module."""
  out: list[Row] = []
  for (policy, mtbf), runs in outcomes.items():
    if policy == _NONE:
      continue
    undisturbed = outcomes[_NONE, mtbf]
    label = f'{policy}, MTBF {mtbf:g}'

    def add(what: str, values: Sequence[float], label: str = label) -> None:
      out.append((f'{label}: {what}', summary.summarize(values), ''))

    add('ETTR', ettrs(runs, undisturbed))
    if mtbf == _NEVER:
      add(
        'iteration / none',
        [
          a.quiet_seconds / b.quiet_seconds
          for a, b in zip(runs, undisturbed, strict=True)
        ],
      )
      continue
    add('failures', [len(x.of_kind('failure')) for x in runs])
    add('recovery, s in all', [x.recovery_seconds for x in runs])
    add('iterations done again', [x.redone_iterations for x in runs])
    add('lost tokens', [x.lost_tokens for x in runs])
    add(
      'final held-out loss - undisturbed',
      [a.loss() - b.loss() for a, b in zip(runs, undisturbed, strict=True)],
    )
    add(
      'bit-equal to undisturbed',
      [
        float(a.bits() == b.bits())
        for a, b in zip(runs, undisturbed, strict=True)
      ],
    )
  return out


def ettrs(
  runs: Sequence[policy_runs.Outcome],
  undisturbed: Sequence[policy_runs.Outcome],
) -> list[float]:
  """Of each run, held against the one without anything of the same round."""
  return [
    policy_runs.ettr(a, b.wall_seconds / b.iterations)
    for a, b in zip(runs, undisturbed, strict=True)
  ]


def to_json(outcomes: Outcomes) -> list[dict[str, Any]]:
  """Everything that the plot and the simulator need."""
  return [
    {
      'policy': policy,
      'mtbf_iterations': mtbf if mtbf < _NEVER else None,
      'progress': [x.progress for x in runs],
      'recoveries': [x.recoveries() for x in runs],
      'ettr': ettrs(runs, outcomes[_NONE, mtbf]),
      'blocked_seconds': [
        statistics.fmean(m['blocked_seconds'] for m in x.metrics) for x in runs
      ],
    }
    for (policy, mtbf), runs in outcomes.items()
  ]


def plot(outcomes: Outcomes, path: pathlib.Path) -> None:
  """Goodput over time: iterations done for the first time, per MTBF."""
  import matplotlib

  matplotlib.use('agg')
  from matplotlib import pyplot

  columns = sorted({mtbf for _, mtbf in outcomes}, reverse=True)
  figure, axes = pyplot.subplots(
    1, len(columns), figsize=(4.5 * len(columns), 4), sharey=True, squeeze=False
  )
  for axis, mtbf in zip(axes[0], columns, strict=True):
    for (policy, of), runs in outcomes.items():
      if of == mtbf:
        seconds, done = zip(*runs[0].progress, strict=True)
        axis.plot(seconds, done, label=policy)
    axis.set_title(
      'nothing fails' if mtbf == _NEVER else f'MTBF {mtbf:g} iterations'
    )
    axis.set_xlabel('seconds')
    axis.grid(alpha=0.3)
  axes[0][0].set_ylabel('iterations done')
  axes[0][0].legend()
  figure.tight_layout()
  figure.savefig(path, dpi=120)
  pyplot.close(figure)
