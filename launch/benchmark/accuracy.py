"""Effect of failures on the model: `launch.benchmark accuracy`.

Each policy has a real run of `launch.train`, whose workers are killed when a
fifth, two fifths, ... of the iterations are done. Under an exact policy every
bit must equal that of the undisturbed run.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from launch.benchmark.harness import runs as benchmark_runs, summary
from moetion_jax.policies.kinds import registry

POLICIES = ('sparse', 'dense', 'partial')
_BASE = 'none'
_FAULTS_AT = (0.2, 0.4, 0.6, 0.8)
_EVALUATIONS = 20

Outcomes = Mapping[str, benchmark_runs.RunOutcome]


def measure(
  flags: Sequence[str],
  *,
  iterations: int,
  policies: Sequence[str],
  stages: int,
  hostmem_dir: str,
) -> dict[str, benchmark_runs.RunOutcome]:
  """Runs every policy, the undisturbed run first.

  Args:
    flags: flags of every run.
    iterations: iterations of every run.
    policies: the policies to compare.
    stages: number of stages of every run.
    hostmem_dir: folder in tmpfs.

  Returns:
    Outcomes by policy; 'none' is the undisturbed run.

  Raises:
    RuntimeError: an exact policy came to other bits.
  """
  script = [
    f'kill:stage={number % stages},iteration={round(share * iterations)},'
    'phase=backward'
    for number, share in enumerate(_FAULTS_AT)
  ]
  outcomes: dict[str, benchmark_runs.RunOutcome] = {}
  for policy in (_BASE, *policies):
    print(f'{policy} ...', flush=True)
    faults = [] if policy == _BASE else [f'--fail={x}' for x in script]
    outcomes[policy] = benchmark_runs.train(
      [
        *flags,
        f'--stages={stages}',
        f'--iterations={iterations}',
        f'--eval_every={max(1, iterations // _EVALUATIONS)}',
        f'--policy={policy}',
        *faults,
      ],
      hostmem_dir,
    )
    is_exact = registry.POLICIES[policy].is_exact
    if is_exact and not is_bit_equal(outcomes[policy], outcomes[_BASE]):
      raise RuntimeError(f'--policy={policy} came to other bits')
  return outcomes


def is_bit_equal(
  one: benchmark_runs.RunOutcome, other: benchmark_runs.RunOutcome
) -> bool:
  """Returns True if all losses and state digests of two runs are equal."""
  names = ('iteration', 'loss_hex', 'digest', 'eval_loss_hex')
  bits = [[[x.get(n) for n in names] for x in o.lines] for o in (one, other)]
  return bits[0] == bits[1]


def curve(outcome: benchmark_runs.RunOutcome) -> list[tuple[int, float]]:
  """Returns (iteration, held-out loss) of every evaluation."""
  return [
    (x['iteration'], x['eval_loss']) for x in outcome.lines if 'eval_loss' in x
  ]


def rows(outcomes: Outcomes) -> list[summary.Row]:
  """Returns the rows of the table."""
  base = outcomes[_BASE]
  found: list[summary.Row] = []
  for policy, outcome in outcomes.items():
    last = curve(outcome)[-1][1]
    values = {'final held-out loss': (last, '')}
    if policy != _BASE:
      is_exact = registry.POLICIES[policy].is_exact
      goal = 'yes' if is_exact else 'no'
      equal = float(is_bit_equal(outcome, base))
      values['bits of the undisturbed run'] = equal, goal
      values['against undisturbed'] = last - curve(base)[-1][1], ''
    for event in outcome.of_kind('rolled_back')[-1:]:
      values['lost tokens, %'] = 100 * event['plt'], ''
    found += [
      (f'{policy}, {name}', summary.summarize([value]), goal)
      for name, (value, goal) in values.items()
    ]
  return found


def details(outcomes: Outcomes) -> dict[str, Any]:
  """Returns every policy's curve, for the JSON file."""
  return {policy: curve(outcome) for policy, outcome in outcomes.items()}


def plot(outcomes: Outcomes, path: str | os.PathLike[str]) -> None:
  """Plots the held-out loss over iterations, with the failures marked."""
  import matplotlib

  matplotlib.use('Agg')
  from matplotlib import pyplot

  figure, axis = pyplot.subplots(figsize=(7, 4.5))
  styles = ('-', '--', '-.', ':')
  for number, (policy, outcome) in enumerate(outcomes.items()):
    axis.plot(
      *zip(*curve(outcome), strict=True),
      linestyle=styles[number % len(styles)],
      label='undisturbed' if policy == _BASE else policy,
    )
  last = outcomes[_BASE].lines[-1]['iteration']
  for share in _FAULTS_AT:
    axis.axvline(share * last, color='0.8', zorder=0)
  axis.set_xlabel('iteration')
  axis.set_ylabel('held-out loss, nats a token')
  axis.legend()
  figure.tight_layout()
  figure.savefig(path, dpi=120)
  pyplot.close(figure)
