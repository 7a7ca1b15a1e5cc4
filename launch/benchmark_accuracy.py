"""Does a fault show in the model? `launch.benchmark accuracy`.

The same run under `none` without faults, and under `sparse`, `dense` and
`partial` with a worker killed at 20, 40, 60 and 80 % of it: held-out losses,
and whether the end is the same in every bit.
"""

from __future__ import annotations

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from launch import policy_runs, summary
from launch.benchmark_pipeline import Row

POLICIES = ('none', 'sparse', 'dense', 'partial')
_SHARES = (0.2, 0.4, 0.6, 0.8)
_STAGES = 2
_EVALUATIONS = 20
_EXACT = ('sparse', 'dense')


def measure(
  flags: Sequence[str], iterations: int, hostmem_dir: str
) -> dict[str, policy_runs.Outcome]:
  """Runs every policy once.

  Args:
    flags: of `launch.train`.
    iterations: of each run.
    hostmem_dir: in tmpfs.
  """
  failures = [
    policy_runs.Failure(
      stage=number % _STAGES,
      iteration=max(2, round(share * iterations)),
      phase='backward',
    )
    for number, share in enumerate(_SHARES)
  ]
  found = {}
  for policy in POLICIES:
    found[policy] = policy_runs.run(
      [
        *flags,
        f'--stages={_STAGES}',
        f'--eval_every={max(1, iterations // _EVALUATIONS)}',
      ],
      policy,
      () if policy == 'none' else failures,
      hostmem_dir,
      iterations=iterations,
    )
    print(f'{policy}: held-out loss {found[policy].loss():.4f}', flush=True)
  return found


def rows(outcomes: Mapping[str, policy_runs.Outcome]) -> list[Row]:
  """The table; see the module."""
  none = outcomes['none']
  out: list[Row] = []
  for policy, outcome in outcomes.items():
    out.append(
      (
        f'{policy}: final held-out loss, nats a byte',
        summary.summarize([outcome.loss()]),
        '',
      )
    )
    if policy != 'none':
      out.append(
        (
          f'{policy}: share of iterations equal in every bit to none',
          summary.summarize(
            [
              sum(
                a == b for a, b in zip(outcome.bits(), none.bits(), strict=True)
              )
              / len(none.metrics)
            ]
          ),
          '1' if policy in _EXACT else '< 1',
        )
      )
  return out


def to_json(outcomes: Mapping[str, policy_runs.Outcome]) -> dict[str, Any]:
  """The curves."""
  return {
    policy: [
      (m['iteration'], m['eval_loss'])
      for m in outcome.metrics
      if m.get('eval_loss') is not None
    ]
    for policy, outcome in outcomes.items()
  }


def plot(
  outcomes: Mapping[str, policy_runs.Outcome], path: pathlib.Path
) -> None:
  """Held-out loss over iterations."""
  import matplotlib

  matplotlib.use('agg')
  from matplotlib import pyplot

  figure, axis = pyplot.subplots(figsize=(7, 4.5))
  styles = dict(zip(POLICIES, ('-', '--', ':', '-.'), strict=True))
  for policy, curve in to_json(outcomes).items():
    iterations, losses = zip(*curve, strict=True)
    axis.plot(iterations, losses, styles[policy], label=policy)
  for share in _SHARES:
    axis.axvline(share * len(outcomes['none'].metrics), color='0.8', zorder=0)
  axis.set_xlabel('iteration')
  axis.set_ylabel('held-out loss, nats a byte')
  axis.legend()
  figure.tight_layout()
  figure.savefig(path, dpi=120)
  pyplot.close(figure)
