"""Runs of `launch.train` under a policy and failures, and what came of them.

`launch.benchmark ettr` and `accuracy` compare policies with it: every policy
has the same failures at the same moments of its progress.
"""

from __future__ import annotations

import dataclasses
import random
import statistics
import time
from collections.abc import Mapping, Sequence
from typing import Any

from launch import watched_run

_POLL_SECONDS = 0.02
_STUCK_SECONDS = 600.0
# Not counted: programs run for the first time, windows are chosen.
WARM_UP_ITERATIONS = 10
_PHASES = ('forward', 'backward', 'update')


@dataclasses.dataclass(frozen=True, kw_only=True)
class Failure:
  """A worker is killed once.

  Attributes:
    stage: of the worker.
    iteration: in which it dies, the first time that it gets there.
    phase: of `faults.PHASES`.
  """

  stage: int
  iteration: int
  phase: str

  @property
  def flag(self) -> str:
    """As `launch.train` takes it."""
    return (
      f'--fail=kill:stage={self.stage},iteration={self.iteration},'
      f'phase={self.phase}'
    )


def draw_failures(
  seed: int, mtbf_iterations: float, iterations: int, stages: int
) -> tuple[Failure, ...]:
  """Poisson failures of a run, the same for every policy.

  Args:
    seed: of the moments.
    mtbf_iterations: mean number of iterations between two failures.
    iterations: of the run; the first ones and the last one have none.
    stages: whose workers die, each as often.
  """
  source = random.Random(seed)
  failures = []
  moment = float(WARM_UP_ITERATIONS + 1)
  while True:
    moment += source.expovariate(1 / mtbf_iterations)
    if moment >= iterations:
      return tuple(failures)
    failures.append(
      Failure(
        stage=source.randrange(stages),
        iteration=int(moment),
        phase=source.choice(_PHASES),
      )
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outcome:
  """What a run did.

  Attributes:
    progress: (seconds, iteration) of each iteration that was done for the first
      time, seconds since the warm-up ended.
    metrics: lines of metrics.jsonl.
    events: lines of events.jsonl.
  """

  progress: tuple[tuple[float, int], ...]
  metrics: Sequence[Mapping[str, Any]]
  events: Sequence[Mapping[str, Any]]

  @property
  def iterations(self) -> int:
    """That were done after the warm-up, each counted once."""
    return self.progress[-1][1] - WARM_UP_ITERATIONS

  @property
  def wall_seconds(self) -> float:
    """That they took."""
    return self.progress[-1][0]

  def of_kind(self, kind: str) -> list[Mapping[str, Any]]:
    """Events, in order."""
    return [e for e in self.events if e['kind'] == kind]

  def recoveries(self) -> list[dict[str, float]]:
    """Of each failure: seconds by phase, of the stage that took longest.

    Stages that go back together are one recovery: it begins with the first
    `recovery_started` after a time without one under way.
    """
    found: list[dict[str, float]] = []
    open_stages: set[int] = set()
    for event in self.events:
      if event['kind'] == 'recovery_started':
        if not open_stages:
          found.append({'seconds': 0.0, 'iterations': 0})
        open_stages.add(event['stage'])
      elif event['kind'] == 'recovered' and found:
        open_stages.discard(event['stage'])
        seconds = sum(event['seconds'].values())
        if seconds > found[-1]['seconds']:
          found[-1] = {
            'seconds': seconds,
            'iterations': event['replayed_iterations'],
            **event['seconds'],
          }
    return found

  @property
  def recovery_seconds(self) -> float:
    """Of all failures together."""
    return sum(one['seconds'] for one in self.recoveries())

  @property
  def redone_iterations(self) -> int:
    """By the stage, of each failure, that took longest."""
    return int(sum(one['iterations'] for one in self.recoveries()))

  @property
  def lost_tokens(self) -> int:
    """That trained experts whose state was then lost; 0 where all is exact."""
    return sum(e.get('lost_tokens', 0) for e in self.of_kind('rolled_back'))

  @property
  def quiet_seconds(self) -> float:
    """Median time of an iteration."""
    return statistics.median(
      later[0] - earlier[0]
      for earlier, later in zip(self.progress, self.progress[1:], strict=False)
    )

  def loss(self, name: str = 'eval_loss') -> float:
    """The last one."""
    return [x[name] for x in self.metrics if x.get(name) is not None][-1]

  def bits(self) -> list[tuple[str, str]]:
    """Of every loss and state."""
    return [(x['loss_hex'], x['digest']) for x in self.metrics]


def ettr(outcome: Outcome, useful_seconds: float) -> float:
  """Effective training time ratio: useful time / time that passed.

  Args:
    outcome: of the run.
    useful_seconds: that an iteration takes where nothing fails and nothing is
      saved.
  """
  return outcome.iterations * useful_seconds / outcome.wall_seconds


def run(
  flags: Sequence[str],
  policy: str,
  failures: Sequence[Failure],
  hostmem_dir: str,
  *,
  iterations: int,
) -> Outcome:
  """Runs `launch.train` to its end.

  Args:
    flags: that all policies have.
    policy: how it saves its state.
    failures: that happen to it.
    hostmem_dir: in tmpfs.
    iterations: of the run.

  Raises:
    RuntimeError: it hangs, or ended with an error.
  """
  arguments = [
    *flags,
    f'--policy={policy}',
    f'--iterations={iterations}',
    f'--max_failures={len(failures) + 1}',
    *(failure.flag for failure in failures),
  ]
  with watched_run.running(arguments, hostmem_dir) as one:
    progress: list[tuple[float, int]] = []
    begin = heard_at = time.monotonic()
    while one.process.poll() is None:
      now, newest = time.monotonic(), one.newest()
      if newest > (progress[-1][1] if progress else 0):
        heard_at = now
        if newest <= WARM_UP_ITERATIONS:
          begin = now
          progress = [(0.0, newest)]
        else:
          progress.append((now - begin, newest))
      if now - heard_at > _STUCK_SECONDS:
        raise RuntimeError(f'the run hangs:\n{one.output()[-2000:]}')
      time.sleep(_POLL_SECONDS)
    outcome = Outcome(
      progress=tuple(progress),
      metrics=list(one.lines('metrics.jsonl')),
      events=list(one.lines('events.jsonl')),
    )
    if one.process.returncode or outcome.progress[-1][1] != iterations:
      raise RuntimeError(f'the run failed:\n{one.output()[-2000:]}')
  return outcome
