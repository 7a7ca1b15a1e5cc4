"""Whole runs of `launch.train` for benchmarks: start one, watch its progress.

What a run did is read from the files that it leaves behind (DESIGN section 9),
and from when its lines came.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from launch.benchmark.harness import scratch
from moetion_jax.runtime import linux_process

_POLL_SECONDS = 0.02
_SHOWN_CHARACTERS = 3000


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunOutcome:
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
class MeasuredRecovery:
  """What one failure cost.

  Attributes:
    seconds: from its notice until every stage had caught up.
    stages: how many went back.
    replayed_iterations: by the stage that did most again.
  """

  seconds: float
  stages: int
  replayed_iterations: int


def recoveries(events: Sequence[Mapping[str, Any]]) -> list[MeasuredRecovery]:
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
          MeasuredRecovery(
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
) -> RunOutcome:
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
  with running(flags, hostmem_dir) as run:
    progress = _watch(run)
    if run.process.returncode:
      text = run.output()[-_SHOWN_CHARACTERS:]
      raise RuntimeError(f'launch.train {" ".join(flags)} failed:\n{text}')
    return RunOutcome(
      progress=progress,
      lines=run.lines('metrics.jsonl'),
      events=run.lines('events.jsonl'),
      script=script,
      began=began,
    )


def _watch(run: WatchedRun) -> list[tuple[float, int]]:
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


_TIMEOUT_SECONDS = 300.0
_POLL_SECONDS = 0.002


class WatchedRun:
  """A running `launch.train`; see the module.

  Attributes:
    workdir: of the run.
    process: the agent.
  """

  def __init__(self, folder: pathlib.Path, flags: Sequence[str]):
    self.workdir = folder / 'run'
    self._read: dict[str, tuple[Any, list[dict[str, Any]]]] = {}
    self._output = open(folder / 'output', 'wb')
    self.process = subprocess.Popen(
      [
        sys.executable,
        '-m',
        'launch.train',
        f'--workdir={self.workdir}',
        *flags,
      ],
      stdout=self._output,
      stderr=subprocess.STDOUT,
      preexec_fn=functools.partial(linux_process.die_with, os.getpid()),
    )

  def lines(self, name: str) -> list[dict[str, Any]]:
    """Of a .jsonl file; a line that is being written does not count."""
    path = self.workdir / name
    found = path.stat() if path.exists() else None
    version = (found.st_size, found.st_mtime_ns) if found else None
    known = self._read.get(name)
    # Read again only when it has grown: looking must cost next to nothing.
    if known is None or known[0] != version:
      text = path.read_text() if found else ''
      lines = text[: text.rfind('\n') + 1].splitlines()
      known = self._read[name] = version, [json.loads(line) for line in lines]
    return known[1]

  def output(self) -> str:
    """What it printed so far."""
    self._output.flush()
    return pathlib.Path(self._output.name).read_text()

  def newest(self) -> int:
    """Iteration of the newest line."""
    lines = self.lines('metrics.jsonl')
    return lines[-1]['iteration'] if lines else 0

  def workers(self) -> list[dict[str, Any]]:
    """Of workers.json."""
    path = self.workdir / 'workers.json'
    return json.loads(path.read_text())['workers'] if path.exists() else []

  def wait_for(self, condition: Callable[[], Any]) -> Any:
    """What `condition` returns once that is true.

    Raises:
      RuntimeError: the run ended before, or nothing changed for too long.
    """
    deadline = time.monotonic() + _TIMEOUT_SECONDS
    while not (value := condition()):
      if self.process.poll() is not None or time.monotonic() > deadline:
        raise RuntimeError(f'the run ended or hangs:\n{self.output()[-2000:]}')
      time.sleep(_POLL_SECONDS)
    return value

  def close(self) -> None:
    """Ends it, if it has not ended."""
    self.process.send_signal(signal.SIGINT)
    try:
      self.process.wait(60)
    except subprocess.TimeoutExpired:
      self.process.kill()
      self.process.wait()
    self._output.close()


@contextlib.contextmanager
def running(flags: Sequence[str], hostmem_dir: str) -> Iterator[WatchedRun]:
  """Starts a run in folders of its own; ends it, and they are gone.

  Args:
    flags: of `launch.train`.
    hostmem_dir: in tmpfs.
  """
  with scratch.folder() as folder, scratch.folder(hostmem_dir) as memory:
    run = WatchedRun(folder, [*flags, f'--hostmem_dir={memory}'])
    try:
      yield run
    finally:
      run.close()
