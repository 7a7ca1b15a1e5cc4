"""Random faults against the running program: `python -m launch.chaos`.

Runs the real command with scripted faults (`--fail`, `faults.TABLE`) and others
from outside (`outside.TABLE`); when the agent dies, or ends since its disk was
full, the same command is started again. Then does the same run
undisturbed. The exit code is 0 only if every run finished with the same losses
and digests in every iteration, and left neither processes nor files. Flags of
`launch.train` follow after `--`:

  python -m launch.chaos --seed=1 --faults=200 -- --stages=3 --window_length=4
"""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Sequence
from typing import Any

if not __package__:  # run as a file
  sys.path[0] = os.path.abspath(f'{sys.path[0]}/../..')

from absl import flags

from launch.chaos import draw, outside
from launch.lm import command_line
from moetion_jax import errors
from moetion_jax.runtime import linux_process
from moetion_jax.runtime.hosts import child_process

_SEED = flags.DEFINE_integer('seed', 0, 'Of the faults.')
_FAULTS = flags.DEFINE_integer(
  'faults', 0, 'How many at least; 0: no limit.', lower_bound=0
)
_MINUTES = flags.DEFINE_float('minutes', 0.0, 'How long; 0: as --faults says.')
_PRESET = flags.DEFINE_string(
  'preset', 'micro', "Shape of the model: 'micro', or one of launch.train."
)
_STAGES = flags.DEFINE_integer('stages', 3, 'Pipeline stages.')
_REPLICAS = flags.DEFINE_integer('replicas', 1, 'Workers of each stage.')
_ITERATIONS = flags.DEFINE_integer('iterations', 40, 'Of one run.')
_SCRIPTED = flags.DEFINE_integer('scripted', 12, 'Scripted faults of one run.')
_OUTSIDE = flags.DEFINE_integer('outside', 4, 'Faults from outside in one run.')
_EVERY = flags.DEFINE_float('every', 5.0, 'Mean seconds between those.')
_STUCK = flags.DEFINE_float(
  'stuck_seconds', 300.0, 'A run that says nothing for so long hangs.'
)
_HOSTMEM_DIR = flags.DEFINE_string('hostmem_dir', '/dev/shm', 'In tmpfs.')
_WORKDIR = flags.DEFINE_string(
  'workdir', '', "Kept for each run that went wrong; '': a temporary folder."
)

_MARK = 'MOETION_CHAOS'
_POLL_SECONDS = 0.02
_DYING_SECONDS = 10.0
# Of a disk that can be filled, for the smallest model and for others.
_MICRO_MIB, _OTHER_MIB = 64, 2048


def train_flags(more: Sequence[str]) -> list[str]:
  """Returns the flags of the run that all faults are drawn for."""
  is_micro = _PRESET.value == 'micro'
  return [
    f'--preset={"tiny" if is_micro else _PRESET.value}',
    *(draw.micro_flags(draw.policy_of(more)) if is_micro else ()),
    f'--stages={_STAGES.value}',
    f'--replicas={_REPLICAS.value}',
    f'--iterations={_ITERATIONS.value}',
    '--max_failures=1000',
    *more,
  ]


class ChaosRun:
  """One run in folders of its own, however often it is started.

  Attributes:
    workdir: the run's folder.
    outside: faults done to it from outside, as events.
  """

  def __init__(self, workdir: pathlib.Path, arguments: Sequence[str]):
    """Stores the run's folder and flags; `finish` does the work."""
    self.workdir = workdir
    self.outside: list[dict[str, Any]] = []
    self._mark = uuid.uuid4().hex
    self.hostmem = pathlib.Path(_HOSTMEM_DIR.value, f'chaos-{self._mark}')
    self._arguments = [
      *arguments,
      f'--workdir={workdir}',
      f'--hostmem_dir={self.hostmem}',
    ]
    self.agent: subprocess.Popen[bytes]
    self.reader: subprocess.Popen[bytes]

  def finish(self, coming: Sequence[outside.Fault]) -> str:
    """Runs to the end, whatever dies; returns what went wrong, or ''."""
    self.workdir.mkdir(parents=True)
    self.hostmem.mkdir(mode=0o700)
    with contextlib.ExitStack() as stack:
      if any(fault.kind is outside.Kind.FILL_DISK for fault in coming):
        size_mib = _MICRO_MIB if _PRESET.value == 'micro' else _OTHER_MIB
        stack.enter_context(outside.own_disk(self.workdir, size_mib))
      stack.callback(shutil.rmtree, self.hostmem, ignore_errors=True)
      stack.callback(self._kill)
      return self._finish(list(coming)) or self._left()

  def _kill(self) -> None:
    for pid in self.living():
      linux_process.send_signal(pid, signal.SIGKILL)
    self._are_gone()

  def _finish(self, coming: list[outside.Fault]) -> str:
    while True:
      code, was_full = self._once(coming)
      if code is None:
        return f'said nothing for {_STUCK.value:g} s'
      if code == errors.ExitCode.FINISHED:
        return ''
      # On a full disk it ends, and says to make room and start it again.
      is_allowed = was_full and code == errors.ExitCode.FAILED
      if code != -signal.SIGKILL and not is_allowed:
        return f'ended with exit code {code}'
      if not self._are_gone():
        return 'workers outlived their agent'

  def _once(self, coming: list[outside.Fault]) -> tuple[int | None, bool]:
    """Starts the command.

    Returns:
      Its exit code, None if it hangs; and whether its disk was full meanwhile.
    """
    with open(self.workdir / 'output', 'ab') as output:
      self.reader = subprocess.Popen(
        ['cat'], stdin=subprocess.PIPE, stdout=output
      )
    assert self.reader.stdin is not None
    with self.reader, self.reader.stdin as printed:
      self.agent = subprocess.Popen(
        [sys.executable, '-m', 'launch.train', *self._arguments],
        stdout=printed,
        stderr=printed,
        env=os.environ | {_MARK: self._mark},
      )
      printed.close()  # so that the reader ends with the run
      try:
        return self._watch(coming)
      finally:
        if self.agent.poll() is None:
          self._kill()
          self.agent.wait()

  def _watch(self, coming: list[outside.Fault]) -> tuple[int | None, bool]:
    """Does faults to the run until it ends; see `_once`."""
    heard, heard_at, due_at, was_full = 0, time.monotonic(), 0.0, False
    while self.agent.poll() is None:
      time.sleep(_POLL_SECONDS)
      now = time.monotonic()
      if (size := self._said_bytes()) != heard:
        heard, heard_at = size, now
      if now - heard_at > _STUCK.value:
        return None, was_full
      if coming and self._trains():
        due_at = due_at or now + coming[0].after_seconds
        if now >= due_at:
          due_at = 0.0
          was_full |= coming[0].kind is outside.Kind.FILL_DISK
          self._do(coming.pop(0))
    return self.agent.returncode, was_full

  def _said_bytes(self) -> int:
    """Returns the size of all that the run has said, wherever."""
    names = 'output', 'metrics.jsonl', 'events.jsonl'
    paths = [self.workdir / name for name in names]
    return sum(path.stat().st_size for path in paths if path.exists())

  def _trains(self) -> bool:
    """Returns whether workers.json is of the processes that run now."""
    agents = self._read_workers().get('agents', [])
    return any(agent['pid'] == self.agent.pid for agent in agents)

  def _read_workers(self) -> dict[str, Any]:
    try:
      return json.loads((self.workdir / 'workers.json').read_text())
    except FileNotFoundError:
      return {}

  def workers(self) -> list[dict[str, Any]]:
    """Reads the workers of workers.json."""
    return self._read_workers()['workers']

  def _do(self, fault: outside.Fault) -> None:
    """Does a fault, if there is what it is done to."""
    event = {'time': time.time(), 'kind': 'outside', 'fault': fault.kind}
    rule = outside.TABLE[fault.kind]
    if rule.act(self, fault):
      stage = fault.stage if rule.of_stage else None
      self.outside.append(event | {'stage': stage})

  def events(self) -> list[dict[str, Any]]:
    """Returns everything that happened, in order."""
    written = read_lines(self.workdir / 'events.jsonl')
    return sorted([*written, *self.outside], key=lambda event: event['time'])

  def metrics(self) -> list[dict[str, Any]]:
    """Returns the lines of metrics.jsonl, one for each iteration."""
    return read_lines(self.workdir / 'metrics.jsonl')

  def living(self) -> list[int]:
    """Returns the processes of this run, zombies left out."""
    return child_process.marked(_MARK, self._mark)

  def _are_gone(self) -> bool:
    deadline = time.monotonic() + _DYING_SECONDS
    while living := self.living():
      if time.monotonic() > deadline:
        return not living
      time.sleep(_POLL_SECONDS)
    return True

  def _left(self) -> str:
    if not self._are_gone():
      return 'left processes'
    files = os.listdir(self.hostmem)
    return f'left {", ".join(files)} in host memory' if files else ''


def read_lines(path: pathlib.Path) -> list[dict[str, Any]]:
  """Reads the lines of a .jsonl file; [] if there is none."""
  if not path.exists():
    return []
  return [json.loads(line) for line in path.read_text().splitlines()]


def _is_over(tally: draw.Tally, begin: float) -> bool:
  if tally.problems:
    return True
  if _MINUTES.value and time.monotonic() - begin > 60 * _MINUTES.value:
    return True
  return bool(_FAULTS.value) and tally.count >= _FAULTS.value


def _disturb(folder: pathlib.Path, more: Sequence[str]):
  """Runs until there were enough faults; returns tally and all metrics."""
  source = random.Random(_SEED.value)
  tally, begin, results = draw.Tally(), time.monotonic(), []
  folder.mkdir(parents=True, exist_ok=True)
  kinds = outside.possible(folder)
  for kind in outside.TABLE.keys() - set(kinds):
    print(f'Left out: {kind}, since nobody but root may mount one.')
  while not _is_over(tally, begin):
    number = len(results) + 1
    script = draw.draw_script(
      source,
      _SCRIPTED.value,
      _STAGES.value,
      _ITERATIONS.value,
      _REPLICAS.value,
    )
    coming = draw.draw_outside(
      source,
      _OUTSIDE.value,
      _STAGES.value,
      _EVERY.value,
      _REPLICAS.value,
      kinds,
    )
    run = ChaosRun(
      folder / f'run-{number}',
      [*train_flags(more), *(f'--fail={fault}' for fault in script)],
    )
    problem = run.finish(coming)
    tally.add(run.events())
    results.append((str(run.workdir), run.metrics()))
    print(
      f'run {number}: {problem or "finished"}; {tally.count} faults so far, '
      f'{time.monotonic() - begin:.0f} s',
      flush=True,
    )
    if problem:
      tally.problems.append(f'{run.workdir}: {problem}')
  return tally, results


def main(argv: list[str]) -> int:
  """Breaks runs until there were enough faults, then prints the verdict."""
  if not _FAULTS.value and not _MINUTES.value:
    raise errors.ConfigError('faults', 0, 'say how many, or --minutes')
  draw.policy_of(argv[1:])
  made = None if _WORKDIR.value else tempfile.mkdtemp(prefix='chaos-')
  folder = pathlib.Path(_WORKDIR.value or str(made)).absolute()
  tally, results = _disturb(folder, argv[1:])
  run = ChaosRun(folder / 'undisturbed', train_flags(argv[1:]))
  if problem := run.finish(()):
    tally.problems.append(f'undisturbed: {problem}')
  equal = tally.compare(dict(results), run.metrics(), _ITERATIONS.value)
  print(tally.table())
  print(
    f'seed {_SEED.value}: {equal} of {len(results)} runs equal to the '
    f'undisturbed one in every bit of {_ITERATIONS.value} losses and digests'
  )
  if tally.problems:
    print(f'What they left is in {folder}')
    return 1
  # By name: with --workdir the folder may hold more than these runs.
  for workdir in (run.workdir, *(workdir for workdir, _ in results)):
    shutil.rmtree(workdir)
  with contextlib.suppress(OSError):
    folder.rmdir()
  print('Left over: nothing.')
  return 0


if __name__ == '__main__':
  command_line.run_main('launch.chaos', main)
