"""Scripted faults: their text form, their injection, and which have happened.

A fault is real: a signal, an exit, an allocation that fails, a bit in a file.
It happens once in a run. Whoever injects it announces it first, so that a
replacement, or the same command started again, leaves it out: `events.jsonl`
records what has happened.
"""

from __future__ import annotations

import dataclasses
import json
import mmap
import os
import pathlib
import resource
import signal
from collections.abc import Callable, Collection, Sequence
from typing import Any, NoReturn

from moetion_jax import errors

# What happens. The agent performs its own kinds itself: it must note them.
AGENT_KINDS = ('kill_agent', 'kill_all')
SNAPSHOT_KINDS = ('corrupt_snapshot', 'corrupt_weights', 'torn_snapshot')
FINAL_KIND = 'corrupt_final'
READ_KINDS = ('corrupt_read', 'poison_read')
KINDS = (
  'kill',
  'stop',
  'exit',
  'exception',
  'oom',
  *SNAPSHOT_KINDS,
  'corrupt_log',
  FINAL_KIND,
  *READ_KINDS,
  *AGENT_KINDS,
)
# When: phases as the loop names them; START_PHASES, before it is known which
# iteration the worker begins with; REPLAY, anything done again after a failure;
# END_PHASES, after the last iteration: a worker's state is in the store, the
# final checkpoint (by the first worker) is written and not yet read back.
START_PHASES = ('start', 'compile')
END_PHASES = ('hand_over', 'save')
REPLAY = 'replay'
PHASES = (
  *START_PHASES,
  'forward',
  'backward',
  'update',
  'capture',
  'publish',
  REPLAY,
  *END_PHASES,
)

_EXIT_CODE = 3
_OOM_BYTES = 1 << 30


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fault:
  """One fault of a script.

  Attributes:
    number: the fault's position in the script, from 0.
    kind: one of KINDS.
    stage: the stage of the worker that has the fault.
    replica: the replica of that worker.
    iteration: the iteration in which it happens. In START_PHASES the
      replacement of a worker that had begun this iteration has the fault; 0
      means the first worker. In REPLAY 0 means the first replayed iteration,
      in END_PHASES the last one, whichever that is.
    phase: one of PHASES.
  """

  number: int
  kind: str
  stage: int
  replica: int = 0
  iteration: int
  phase: str = 'forward'

  def __str__(self) -> str:
    return (
      f'{self.kind}:stage={self.stage},replica={self.replica},'
      f'iteration={self.iteration},phase={self.phase}'
    )

  def to_json(self) -> dict[str, Any]:
    """Returns plain values; `Fault(**value)` is the inverse."""
    return dataclasses.asdict(self)


def parse(text: str, number: int, stages: int, replicas: int = 1) -> Fault:
  """Parses a fault written as KIND:stage=S,replica=R,iteration=I,phase=P.

  Args:
    text: the fault as the user wrote it.
    number: its position in the script.
    stages: number of stages of the run.
    replicas: number of replicas of each stage.

  Raises:
    errors.ConfigError: the text is wrong; names the flag `fail` and says what
      is allowed.
  """

  def refuse(reason: str) -> NoReturn:
    raise errors.ConfigError('fail', text, reason)

  kind, colon, rest = text.partition(':')
  if kind not in KINDS or not colon:
    refuse(
      'must be KIND:stage=S,replica=R,iteration=I,phase=P with a KIND of '
      + ', '.join(KINDS)
    )
  found: dict[str, str] = {}
  for setting in rest.split(','):
    name, equals, value = setting.partition('=')
    if name not in ('stage', 'replica', 'iteration', 'phase') or not equals:
      refuse(f'{setting!r} is not one of stage=, replica=, iteration=, phase=')
    if name in found:
      refuse(f'{name} is there twice')
    found[name] = value
  phase = found.pop('phase', END_PHASES[0] if kind == FINAL_KIND else 'forward')
  if phase not in PHASES:
    refuse(f'phase must be one of {", ".join(PHASES)}')
  may_be_0 = phase in (*START_PHASES, REPLAY, *END_PHASES)
  fields = {'replica': 0}
  if may_be_0:
    fields['iteration'] = 0
  if kind in AGENT_KINDS:
    fields['stage'] = 0
  limits = {'stage': stages, 'replica': replicas}
  for name, value in found.items():
    if not (value.isascii() and value.isdigit()):
      refuse(f'{name} must be a number')
    fields[name] = int(value)
    if fields[name] >= limits.get(name, fields[name] + 1):
      refuse(f'{name} must be less than {limits[name]}')
  for name in ('stage', 'iteration'):
    if name not in fields:
      refuse(f'{name}= is missing')
  if not fields['iteration'] and not may_be_0:
    refuse(
      'iteration must be at least 1, but for start, compile, replay, hand_over '
      'and save'
    )
  if kind == FINAL_KIND and phase not in END_PHASES:
    refuse(f'{kind} happens in one of {", ".join(END_PHASES)}')
  if phase == 'save' and (fields['stage'] or fields['replica']):
    refuse('stage 0 replica 0 saves, nobody else')
  damages = (*SNAPSHOT_KINDS, 'corrupt_log', *READ_KINDS)
  if kind in damages and phase in START_PHASES:
    refuse(f'nothing is there to corrupt in phase {phase}')
  if kind in AGENT_KINDS and phase in START_PHASES and not fields['iteration']:
    refuse('before the run has begun nobody notes that it happened')
  return Fault(number=number, kind=kind, phase=phase, **fields)


def parse_all(
  texts: Sequence[str], stages: int, replicas: int = 1
) -> tuple[Fault, ...]:
  """Parses a whole script; see `parse`."""
  return tuple(
    parse(text, number, stages, replicas) for number, text in enumerate(texts)
  )


def of_worker(
  script: Collection[Fault], stage: int, begun: int, replica: int = 0
) -> tuple[Fault, ...]:
  """Returns the faults that a worker about to start has to perform.

  Args:
    script: the faults that have not happened yet.
    stage: the worker's stage.
    begun: the iteration that its predecessor had begun; 0 without one.
    replica: the worker's replica of the stage.
  """
  return tuple(
    fault
    for fault in script
    if (fault.stage, fault.replica) == (stage, replica)
    and (
      fault.phase not in START_PHASES
      or min(begun, 1) <= fault.iteration <= begun
    )
  )


class FaultInjector:
  """Performs the faults of one worker when they are due.

  Attributes:
    acts: the action of each kind; kinds that need the worker's stores, or its
      agent, are added by their owner.
    replays_until: the last iteration that had already been begun before.
  """

  def __init__(
    self,
    script: Sequence[Fault] = (),
    announce: Callable[[Fault], None] = lambda fault: None,
  ):
    """Stores the arguments.

    Args:
      script: the faults of this worker.
      announce: called before a fault happens; once it has returned, the agent
        must learn of the fault whatever becomes of this process.
    """
    self.acts: dict[str, Callable[[Fault, int], None]] = {
      'kill': lambda fault, iteration: _signal_self(signal.SIGKILL),
      'stop': lambda fault, iteration: _signal_self(signal.SIGSTOP),
      'exit': lambda fault, iteration: os._exit(_EXIT_CODE),
      'exception': _raise,
      'oom': lambda fault, iteration: run_out_of_memory(),
    }
    self.replays_until = 0
    self._script = list(script)
    self._announce = announce

  def phase(self, phase: str, iteration: int = 0) -> None:
    """Performs the fault that is due; call when a phase begins.

    Args:
      phase: one of PHASES, or another one, which has no faults.
      iteration: the current iteration; 0 in START_PHASES.
    """
    for fault in self._script:
      if self._is_due(fault, phase, iteration):
        self._script.remove(fault)
        self._announce(fault)
        self.acts[fault.kind](fault, iteration)
        return

  def _is_due(self, fault: Fault, phase: str, iteration: int) -> bool:
    if fault.phase in START_PHASES:
      return fault.phase == phase
    if fault.phase == REPLAY:
      is_replayed = 0 < iteration <= self.replays_until
      return is_replayed and fault.iteration in (0, iteration)
    if fault.phase in END_PHASES:
      return fault.phase == phase and fault.iteration in (0, iteration)
    return (fault.phase, fault.iteration) == (phase, iteration)


def _signal_self(number: int) -> None:
  os.kill(os.getpid(), number)


def _raise(fault: Fault, iteration: int) -> None:
  del iteration
  raise RuntimeError(f'scripted: {fault}')


def run_out_of_memory() -> NoReturn:
  """Raises MemoryError: lowers the memory limit, then exceeds it."""
  _, hard = limits = resource.getrlimit(resource.RLIMIT_AS)
  with open('/proc/self/statm', 'rb') as file:
    used_bytes = int(file.read().split()[0]) * mmap.PAGESIZE
  resource.setrlimit(resource.RLIMIT_AS, (used_bytes + _OOM_BYTES // 2, hard))
  try:
    bytearray(_OOM_BYTES)
  finally:
    resource.setrlimit(resource.RLIMIT_AS, limits)
  raise AssertionError('there was memory beyond the limit')


EVENT = 'fault'
_EVENT_FIELDS = ('stage', 'replica', 'iteration', 'phase')


def event_fields(fault: Fault) -> dict[str, object]:
  """Returns the fields of a fault's event."""
  return {
    'number': fault.number,
    'fault': fault.kind,
    **{name: getattr(fault, name) for name in _EVENT_FIELDS},
  }


class FaultBook:
  """The faults of a script that have not happened yet. Call `read` first."""

  def __init__(self, script: Sequence[Fault]):
    """Stores the script."""
    self._coming = {fault.number: fault for fault in script}

  def read(self, path: pathlib.Path) -> None:
    """Strikes out the faults that happened before this agent was started.

    Args:
      path: the run's events file; need not exist.
    """
    try:
      lines = path.read_bytes().splitlines()
    except FileNotFoundError:
      return
    for line in lines:
      try:
        event = json.loads(line)
      except ValueError:
        continue  # a line torn by a death
      fault = self._coming.get(event.get('number', -1))
      if (
        fault is not None
        and event.get('kind') == EVENT
        and event_fields(fault).items() <= event.items()
      ):
        del self._coming[fault.number]

  def of_worker(
    self, stage: int, begun: int, replica: int = 0
  ) -> tuple[Fault, ...]:
    """Returns the faults of a worker that starts now (`faults.of_worker`)."""
    return of_worker(self._coming.values(), stage, begun, replica)

  def happens(self, number: int) -> Fault:
    """Takes an announced fault out of the script and returns it."""
    return self._coming.pop(number)
