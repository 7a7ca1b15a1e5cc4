"""Whole runs of `launch.train` for benchmarks: start one, watch its progress.

What a run did is read from the files that it leaves behind (DESIGN section 9),
and from when its lines came.
"""

from __future__ import annotations

import dataclasses
import random
import time
from collections.abc import Mapping, Sequence
from typing import Any

from launch import watched_run

_POLL_SECONDS = 0.02
_SHOWN_CHARACTERS = 3000


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outcome:
  """What came of a run.

  Attributes:
    progress: (seconds, iteration) whenever another iteration was the newest
      one that is written down; seconds since the run was started.
    lines: of metrics.jsonl, in order.
    events: of events.jsonl, in order.
    script: what was to die, as `draw_failures` has it.
    began: when the run was started, in seconds since the epoch.
  """

  progress: Sequence[tuple[float, int]]
  lines: Sequence[Mapping[str, Any]]
  events: Sequence[Mapping[str, Any]]
  script: Sequence[str] = ()
  began: float = 0.0

  def seconds(self, first: int, last: int) -> float:
    """From the end of one iteration to the end of a later one, for the first.

    A policy that goes back reaches some iterations twice; what counts is when
    the run was done with `last` for good.
    """
    begin = next(s for s, i in self.progress if i >= first)
    end = next(
      s
      for number, (s, i) in enumerate(self.progress)
      if i >= last and all(j >= last for _, j in self.progress[number:])
    )
    return end - begin

  def of_kind(self, kind: str) -> list[Mapping[str, Any]]:
    """Events, in order."""
    return [event for event in self.events if event['kind'] == kind]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recovery:
  """What one failure cost.

  Attributes:
    seconds: from its notice until every stage had caught up.
    stages: how many went back.
    replayed_iterations: by the stage that did most again.
  """

  seconds: float
  stages: int
  replayed_iterations: int


def recoveries(events: Sequence[Mapping[str, Any]]) -> list[Recovery]:
  """The recoveries of a run; failures that overlap are one.

  Args:
    events: in order.
  """
  found = []
  began: float | None = None
  on_their_way: set[int] = set()
  recovered: list[Mapping[str, Any]] = []
  for event in events:
    if event['kind'] == 'failure' and began is None:
      began = event['time']
    elif event['kind'] == 'recovery_started':
      on_their_way.add(event['stage'])
    elif event['kind'] == 'recovered' and began is not None:
      on_their_way.discard(event['stage'])
      recovered.append(event)
      if not on_their_way:
        found.append(
          Recovery(
            seconds=event['time'] - began,
            stages=len({e['stage'] for e in recovered}),
            replayed_iterations=max(
              e['replayed_iterations'] for e in recovered
            ),
          )
        )
        began, recovered = None, []
  return found


def draw_failures(
  seed: int, mtbf_iterations: float, first: int, last: int, stages: int
) -> list[str]:
  """Kills as a Poisson process in iterations, for `--fail`.

  Args:
    seed: of the draw: the same for every policy.
    mtbf_iterations: mean of the exponential gaps between two.
    first: no iteration up to this one has a failure.
    last: nor has one after this.
    stages: of the run; each as likely as the others.
  """
  source = random.Random(seed)
  script = []
  moment = float(first)
  while True:
    moment += source.expovariate(1 / mtbf_iterations)
    stage = source.randrange(stages)
    phase = source.choice(('forward', 'backward', 'update'))
    iteration = int(moment) + 1
    if iteration > last:
      return script
    script.append(f'kill:stage={stage},iteration={iteration},phase={phase}')


def train(
  flags: Sequence[str], hostmem_dir: str, script: Sequence[str] = ()
) -> Outcome:
  """Runs `launch.train` to its end, in folders of its own.

  Args:
    flags: but for the folders.
    hostmem_dir: in tmpfs.
    script: of `draw_failures`: what dies.

  Raises:
    RuntimeError: it failed; with the end of its output.
  """
  flags = [*flags, *(f'--fail={x}' for x in script)]
  began = time.time()
  with watched_run.running(flags, hostmem_dir) as run:
    progress = _watch(run)
    if run.process.returncode:
      text = run.output()[-_SHOWN_CHARACTERS:]
      raise RuntimeError(f'launch.train {" ".join(flags)} failed:\n{text}')
    return Outcome(
      progress=progress,
      lines=run.lines('metrics.jsonl'),
      events=run.lines('events.jsonl'),
      script=script,
      began=began,
    )


def _watch(run: watched_run.WatchedRun) -> list[tuple[float, int]]:
  """Notes when the newest line is another one, until the run ends."""
  begin = time.monotonic()
  progress: list[tuple[float, int]] = []
  while True:
    is_over = run.process.poll() is not None
    newest = run.newest()
    if newest and (not progress or progress[-1][1] != newest):
      progress.append((time.monotonic() - begin, newest))
    if is_over:
      return progress
    time.sleep(_POLL_SECONDS)
