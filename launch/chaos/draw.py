"""Random faults from a seed, and a tally of what became of them; pure."""

from __future__ import annotations

import collections
import dataclasses
import random
import re
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from launch.chaos import outside
from moetion_jax import errors
from moetion_jax.policies import settings
from moetion_jax.policies.kinds import registry
from moetion_jax.runtime import faults

# Iterations to the kill: a damaged entry shows only if a neighbour reads it
# again, soon.
_AFTER_DAMAGE = 1
_SHOWN = 5  # differences of one run


# Changes to `tiny`, for a model that compiles in a second.
MICRO_FIELDS = {
  'sequence_length': 16,
  'num_layers': 4,
  'model_dim': 32,
  'num_heads': 2,
  'num_kv_heads': 1,
  'head_dim': 16,
  'num_experts': 4,
  'experts_per_token': 2,
  'expert_dim': 32,
  'shared_dim': 32,
  'dense_dim': 64,
}


def policy_of(more: Sequence[str]) -> settings.Policy:
  """Returns the policy that flags of `launch.train` name.

  Raises:
    errors.ConfigError: its runs end with other bits after a fault, or end.
  """
  found = re.findall(r'(?:^|\n)--?policy[=\n](.*)', '\n'.join(more))
  policy = registry.of_name(found[-1] if found else 'sparse')
  if not policy.is_exact or not policy.takes_snapshots:
    raise errors.ConfigError(
      'policy',
      policy.name,
      'does not come to the bits of an undisturbed run after a fault: there is '
      'nothing to compare',
    )
  return policy


def micro_flags(policy: settings.Policy) -> list[str]:
  """Returns the flags of `launch.train` for a run of the smallest model."""
  often = 'window_length' if policy.has_windows else 'interval'
  return [
    *(f'--model={name}={value}' for name, value in MICRO_FIELDS.items()),
    '--microbatches=4',
    '--microbatch_size=8',
    '--eval_every=5',
    '--eval_microbatches=2',
    '--dropout_rate=0.1',
    f'--{often}=3',
  ]


def draw_script(
  source: random.Random,
  count: int,
  stages: int,
  iterations: int,
  replicas: int = 1,
) -> list[str]:
  """Draws faults for `--fail`.

  A final state, or the checkpoint, is damaged once at most: a run ends with
  words when that happens to it again, since then the disk is to blame.

  Args:
    source: source of randomness.
    count: number of faults.
    stages: stages of the run.
    iterations: iterations of the run.
    replicas: replicas of each stage.
  """
  damaged: set[tuple[faults.Phase, int, int]] = set()
  script: list[str] = []
  kinds, weights = list(faults.TABLE), [r.weight for r in faults.TABLE.values()]
  while len(script) < count:
    kind = source.choices(kinds, weights)[0]
    place = faults.TABLE[kind].place
    phase = source.choice(list(faults.Phase))
    stage = source.randrange(stages)
    iteration = source.randint(1, iterations)
    is_early = phase in faults.START_PHASES
    if is_early and place is not faults.Place.PROCESS:
      phase = faults.Phase.FORWARD
    elif phase is faults.Phase.REPLAY:
      iteration = source.choice((0, iteration))
    if place is faults.Place.LOG:
      phase = faults.Phase.FORWARD
      iteration = source.randint(2, max(2, iterations - 1))
    elif place is faults.Place.FINAL_STATE:
      phase = source.choice(faults.END_PHASES)
    if phase in faults.END_PHASES:
      iteration = 0
    replica = _replica(source, replicas)
    if phase is faults.Phase.SAVE:
      stage, replica = 0, 0  # who saves
    if place is faults.Place.FINAL_STATE:
      if (phase, stage, replica) in damaged:
        continue
      damaged.add((phase, stage, replica))
    of = f'replica={replica},'
    script.append(
      f'{kind}:stage={stage},{of}iteration={iteration},phase={phase}'
    )
    if place is faults.Place.LOG and stages > 1:
      reader = stage + 1 if stage + 1 < stages else stage - 1
      script.append(
        f'kill:stage={reader},{of}iteration={iteration + _AFTER_DAMAGE}'
      )
  return script[:count]


def _replica(source: random.Random, replicas: int) -> int:
  """Draws a replica; where there is only one, nothing is drawn."""
  return source.randrange(replicas) if replicas > 1 else 0


def draw_outside(
  source: random.Random,
  count: int,
  stages: int,
  mean_seconds: float,
  replicas: int = 1,
  kinds: Sequence[outside.Kind] = tuple(outside.TABLE),
) -> list[outside.Fault]:
  """Draws faults from outside, one after the other.

  Args:
    source: source of randomness.
    count: number of faults.
    stages: stages of the run.
    mean_seconds: mean time between two faults.
    replicas: replicas of each stage.
    kinds: what can happen.
  """
  weights = [outside.TABLE[kind].weight for kind in kinds]
  return [
    outside.Fault(
      kind=(kind := source.choices(kinds, weights)[0]),
      stage=source.randrange(stages),
      after_seconds=source.expovariate(1 / mean_seconds),
      replica=_replica(source, replicas),
      for_seconds=source.uniform(*outside.TABLE[kind].for_seconds),
    )
    for _ in range(count)
  ]


@dataclasses.dataclass
class Tally:
  """A tally of what happened in all runs so far.

  Attributes:
    happened: faults by kind and phase.
    recovered: those of them after which the stage, or the run, came back.
    seconds: seconds of every recovery of a stage, from the failure until it
      caught up.
    resumed: number of times that the same command went on with a run.
    problems: everything that went wrong.
  """

  happened: collections.Counter[tuple[str, str]] = dataclasses.field(
    default_factory=collections.Counter
  )
  recovered: collections.Counter[tuple[str, str]] = dataclasses.field(
    default_factory=collections.Counter
  )
  seconds: list[float] = dataclasses.field(default_factory=list)
  resumed: int = 0
  problems: list[str] = dataclasses.field(default_factory=list)

  def add(self, events: Sequence[Mapping[str, Any]]) -> None:
    """Adds the events of a run, those of `outside` among them.

    Args:
      events: the events in order. Those of kind 'outside' have `fault` and
        `stage` (None if it was no worker).
    """
    for number, event in enumerate(events):
      if event['kind'] == 'recovered':
        self.seconds.append(sum(event['seconds'].values()))
      self.resumed += event['kind'] == 'resumed'
      if event['kind'] not in ('fault', 'outside'):
        continue
      name = event['fault'], event.get('phase', 'outside')
      self.happened[name] += 1
      if any(
        later['kind'] in ('resumed', 'finished')
        or (later['kind'] == 'recovered' and later['stage'] == event['stage'])
        for later in events[number + 1 :]
      ):
        self.recovered[name] += 1

  def compare(
    self,
    runs: Mapping[str, Sequence[Mapping[str, Any]]],
    expected: Sequence[Mapping[str, Any]],
    iterations: int,
  ) -> int:
    """Compares runs with an undisturbed one; adds what is wrong to `problems`.

    Nothing to compare is wrong, too.

    Args:
      runs: by name, the lines of each run.
      expected: the lines of the undisturbed one.
      iterations: the number of lines that it should have.

    Returns:
      The number of runs that are equal.
    """
    if not self.count:
      self.problems.append('no fault happened')
    if len(expected) != iterations:
      what = f'{len(expected)} iterations, not {iterations}'
      self.problems.append(f'undisturbed: {what}: there is nothing to compare')
      return 0
    equal = 0
    for name, lines in runs.items():
      found = differences(lines, expected)
      equal += not found
      self.problems += [f'{name}: {text}' for text in found[:_SHOWN]]
    return equal

  @property
  def count(self) -> int:
    """Number of all faults that happened."""
    return self.happened.total()

  def table(self) -> str:
    """Returns the tally as a table for people."""
    rows = [('fault', 'phase', 'happened', 'recovered')]
    for name in sorted(self.happened):
      counts = str(self.happened[name]), str(self.recovered[name])
      rows.append((*name, *counts))
    rows.append(('all', '', str(self.count), str(self.recovered.total())))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
      '  '.join(
        cell.ljust(width) if index < 2 else cell.rjust(width)
        for index, (cell, width) in enumerate(zip(row, widths, strict=True))
      ).rstrip()
      for row in rows
    ]
    if self.seconds:
      lines.append(
        f'recoveries of one stage: {len(self.seconds)}, median '
        f'{statistics.median(self.seconds):.2f} s, longest '
        f'{max(self.seconds):.2f} s; whole runs gone on with: {self.resumed}'
      )
    lines += self.problems
    return '\n'.join(lines)


def differences(
  found: Sequence[Mapping[str, Any]], expected: Sequence[Mapping[str, Any]]
) -> list[str]:
  """Describes where two runs' lines differ in what must be equal."""
  names = ('iteration', 'loss_hex', 'digest', 'eval_loss_hex')
  problems = []
  if len(found) != len(expected):
    problems.append(f'{len(found)} iterations, not {len(expected)}')
  for line, wanted in zip(found, expected, strict=False):
    for name in names:
      if line.get(name) != wanted.get(name):
        problems.append(
          f'iteration {wanted["iteration"]}: {name} is {line.get(name)}, not '
          f'{wanted.get(name)}'
        )
  return problems
