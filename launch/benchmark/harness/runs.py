"""Whole runs of `launch.train` for benchmarks: start one, watch its progress.

Results come from the files that a run leaves behind, and from the times at
which its lines appear.
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
  """The outcome of a run.

  Attributes:
    progress: (seconds, iteration) for each change of the newest iteration that
      is written down; seconds since the run was started.
    lines: the lines of metrics.jsonl, in order.
    events: the lines of events.jsonl, in order.
    script: the kills of the run, in the form of `draw_failures`.
    began: start of the run, in seconds since the epoch.
  """

  progress: Sequence[tuple[float, int]]
  lines: Sequence[Mapping[str, Any]]
  events: Sequence[Mapping[str, Any]]
  script: Sequence[str] = ()
  began: float = 0.0

  def seconds(self, first: int, last: int) -> float:
    """Returns the seconds from the end of `first` to the end of `last`.

    A policy that goes back reaches some iterations twice: the time begins when
    `first` was first done, and ends when `last` was done for good.
    """
    begin = next(s for s, i in self.progress if i >= first)
    end = next(
      s
      for number, (s, i) in enumerate(self.progress)
      if i >= last and all(j >= last for _, j in self.progress[number:])
    )
    return end - begin

  def of_kind(self, kind: str) -> list[Mapping[str, Any]]:
    """Returns the events of a kind, in order."""
    return [event for event in self.events if event['kind'] == kind]


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeasuredRecovery:
  """The cost of one failure.

  Attributes:
    seconds: time from the failure's notice until every stage had caught up.
    stages: number of stages that went back.
    replayed_iterations: iterations of the stage that replayed most.
  """

  seconds: float
  stages: int
  replayed_iterations: int


def recoveries(events: Sequence[Mapping[str, Any]]) -> list[MeasuredRecovery]:
  """Returns the recoveries of a run; failures that overlap are one.

  Args:
    events: the run's events, in order.
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
  """Draws kills as a Poisson process in iterations, for `--fail`.

  Args:
    seed: seed of the draw, the same for every policy.
    mtbf_iterations: mean of the exponential gaps between two kills.
    first: the iteration after which kills may happen.
    last: the last iteration in which a kill may happen.
    stages: number of stages of the run, all equally likely.
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
    flags: flags of `launch.train`, without the folders.
    hostmem_dir: folder in tmpfs.
    script: the kills, in the form of `draw_failures`.

  Raises:
    RuntimeError: the run failed; the message has the end of its output.
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
  """Records each change of the newest line until the run ends."""
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
_LOOK_SECONDS = 0.002


class WatchedRun:
  """A running `launch.train`; see the module.

  Attributes:
    workdir: the run's workdir.
    process: the agent's process.
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
    """Returns the lines of a .jsonl file, without one being written."""
    path = self.workdir / name
    found = path.stat() if path.exists() else None
    version = (found.st_size, found.st_mtime_ns) if found else None
    known = self._read.get(name)
    # Read again only when it has changed: polling must cost next to nothing.
    if known is None or known[0] != version:
      text = path.read_text() if found else ''
      lines = text[: text.rfind('\n') + 1].splitlines()
      known = self._read[name] = version, [json.loads(line) for line in lines]
    return known[1]

  def output(self) -> str:
    """Returns the output so far."""
    self._output.flush()
    return pathlib.Path(self._output.name).read_text()

  def newest(self) -> int:
    """Returns the iteration of the newest line; 0 without one."""
    lines = self.lines('metrics.jsonl')
    return lines[-1]['iteration'] if lines else 0

  def workers(self) -> list[dict[str, Any]]:
    """Returns the workers listed in workers.json; none without the file."""
    path = self.workdir / 'workers.json'
    return json.loads(path.read_text())['workers'] if path.exists() else []

  def wait_for(self, condition: Callable[[], Any]) -> Any:
    """Waits until `condition` returns something true, and returns it.

    Raises:
      RuntimeError: the run ended first, or the wait took 300 seconds.
    """
    deadline = time.monotonic() + _TIMEOUT_SECONDS
    while not (value := condition()):
      if self.process.poll() is not None or time.monotonic() > deadline:
        raise RuntimeError(f'the run ended or hangs:\n{self.output()[-2000:]}')
      time.sleep(_LOOK_SECONDS)
    return value

  def close(self) -> None:
    """Ends the run if it has not ended: SIGINT, after 60 seconds SIGKILL."""
    self.process.send_signal(signal.SIGINT)
    try:
      self.process.wait(60)
    except subprocess.TimeoutExpired:
      self.process.kill()
      self.process.wait()
    self._output.close()


@contextlib.contextmanager
def running(flags: Sequence[str], hostmem_dir: str) -> Iterator[WatchedRun]:
  """Starts a run in folders of its own; then ends it and removes them.

  Args:
    flags: flags of `launch.train`, without the folders.
    hostmem_dir: folder in tmpfs.
  """
  with scratch.folder() as folder, scratch.folder(hostmem_dir) as memory:
    run = WatchedRun(folder, [*flags, f'--hostmem_dir={memory}'])
    try:
      yield run
    finally:
      run.close()
