"""Scripted faults: their text form, their injection, and which have happened.

A fault is real: a signal, an exit, an allocation that fails, a bit in a file.
It happens once in a run. Whoever injects it announces it first, so that a
replacement, or the same command started again, leaves it out: `events.jsonl`
records what has happened.
"""

from __future__ import annotations

import dataclasses
import enum
import mmap
import os
import pathlib
import resource
import signal
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import NoReturn

from moetion_jax import codec, errors

_EXIT_CODE = 3
_OOM_BYTES = 1 << 30


class Phase(enum.StrEnum):
  """When a fault happens: phases as the loop names them, and some more."""

  START = 'start'  # it is not yet known which iteration the worker begins with
  COMPILE = 'compile'  # the same
  FORWARD = 'forward'
  BACKWARD = 'backward'
  UPDATE = 'update'
  CAPTURE = 'capture'
  PUBLISH = 'publish'
  REPLAY = 'replay'  # anything done again after a failure
  HAND_OVER = 'hand_over'  # a worker's final state is in the store
  SAVE = 'save'  # the final checkpoint is written and not yet read back


START_PHASES = (Phase.START, Phase.COMPILE)
END_PHASES = (Phase.HAND_OVER, Phase.SAVE)
_WITH_DATA = tuple(phase for phase in Phase if phase not in START_PHASES)


class Place(enum.Enum):
  """Place that a fault damages; its owner has an act in the injector."""

  PROCESS = enum.auto()  # of the worker itself
  SNAPSHOTS = enum.auto()  # of the worker, in host memory; it dies of it
  LOG = enum.auto()  # of the worker
  READS = enum.auto()  # an entry between its check and the program
  FINAL_STATE = enum.auto()  # what was just written for the checkpoint
  AGENT = enum.auto()  # it performs these itself: it must note them


class FaultKind(enum.StrEnum):
  """Kind of a scripted fault; `TABLE` says where and how it happens."""

  KILL = 'kill'
  STOP = 'stop'
  EXIT = 'exit'
  EXCEPTION = 'exception'
  OOM = 'oom'
  CORRUPT_SNAPSHOT = 'corrupt_snapshot'
  CORRUPT_WEIGHTS = 'corrupt_weights'
  TORN_SNAPSHOT = 'torn_snapshot'
  CORRUPT_LOG = 'corrupt_log'
  CORRUPT_FINAL = 'corrupt_final'
  CORRUPT_READ = 'corrupt_read'
  POISON_READ = 'poison_read'
  KILL_AGENT = 'kill_agent'
  KILL_ALL = 'kill_all'


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fault:
  """One fault of a script.

  Attributes:
    number: the fault's position in the script, from 0.
    kind: what happens.
    stage: the stage of the worker that has the fault.
    replica: the replica of that worker.
    iteration: the iteration in which it happens. In START_PHASES the
      replacement of a worker that had begun this iteration has the fault; 0
      means the first worker. In REPLAY 0 means the first replayed iteration,
      in END_PHASES the last one, whichever that is.
    phase: when it happens.
  """

  number: int
  kind: FaultKind
  stage: int
  replica: int = 0
  iteration: int
  phase: Phase = Phase.FORWARD

  def __str__(self) -> str:
    return (
      f'{self.kind}:stage={self.stage},replica={self.replica},'
      f'iteration={self.iteration},phase={self.phase}'
    )


Act = Callable[[Fault, int], None]  # of the fault and the current iteration


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rule:
  """Place, phases and act of the faults of one kind.

  Attributes:
    place: what they damage.
    phases: when they may happen.
    weight: how often `launch.chaos` draws them.
    act: performs one; None: that is up to the owner of what is damaged.
  """

  place: Place
  phases: tuple[Phase, ...] = tuple(Phase)
  weight: int = 1
  act: Act | None = None


def signal_self(number: signal.Signals) -> None:
  """Sends a signal to this process."""
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


TABLE: Mapping[FaultKind, Rule] = {
  FaultKind.KILL: Rule(
    place=Place.PROCESS,
    weight=10,
    act=lambda *_: signal_self(signal.SIGKILL),
  ),
  FaultKind.STOP: Rule(
    place=Place.PROCESS,
    weight=2,
    act=lambda *_: signal_self(signal.SIGSTOP),
  ),
  FaultKind.EXIT: Rule(
    place=Place.PROCESS, weight=2, act=lambda *_: os._exit(_EXIT_CODE)
  ),
  FaultKind.EXCEPTION: Rule(place=Place.PROCESS, weight=2, act=_raise),
  FaultKind.OOM: Rule(place=Place.PROCESS, act=lambda *_: run_out_of_memory()),
  FaultKind.CORRUPT_SNAPSHOT: Rule(place=Place.SNAPSHOTS, phases=_WITH_DATA),
  FaultKind.CORRUPT_WEIGHTS: Rule(place=Place.SNAPSHOTS, phases=_WITH_DATA),
  FaultKind.TORN_SNAPSHOT: Rule(place=Place.SNAPSHOTS, phases=_WITH_DATA),
  FaultKind.CORRUPT_LOG: Rule(place=Place.LOG, phases=_WITH_DATA),
  FaultKind.CORRUPT_FINAL: Rule(place=Place.FINAL_STATE, phases=END_PHASES),
  FaultKind.CORRUPT_READ: Rule(place=Place.READS, phases=_WITH_DATA),
  FaultKind.POISON_READ: Rule(place=Place.READS, phases=_WITH_DATA),
  FaultKind.KILL_AGENT: Rule(place=Place.AGENT, weight=2),
  FaultKind.KILL_ALL: Rule(place=Place.AGENT),
}


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

  name, colon, rest = text.partition(':')
  if name not in TABLE or not colon:
    refuse(
      'must be KIND:stage=S,replica=R,iteration=I,phase=P with a KIND of '
      + ', '.join(TABLE)
    )
  kind = FaultKind(name)
  rule = TABLE[kind]
  found: dict[str, str] = {}
  for setting in rest.split(','):
    name, equals, value = setting.partition('=')
    if name not in ('stage', 'replica', 'iteration', 'phase') or not equals:
      refuse(f'{setting!r} is not one of stage=, replica=, iteration=, phase=')
    if name in found:
      refuse(f'{name} is there twice')
    found[name] = value
  usual = Phase.FORWARD if Phase.FORWARD in rule.phases else rule.phases[0]
  phase = found.pop('phase', usual)
  if phase not in list(Phase):
    refuse(f'phase must be one of {", ".join(Phase)}')
  phase = Phase(phase)
  may_be_0 = phase in (*START_PHASES, Phase.REPLAY, *END_PHASES)
  fields = {'replica': 0}
  if may_be_0:
    fields['iteration'] = 0
  if rule.place is Place.AGENT:
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
  if phase not in rule.phases and rule.place is Place.FINAL_STATE:
    refuse(f'{kind} happens in one of {", ".join(rule.phases)}')
  if phase is Phase.SAVE and (fields['stage'] or fields['replica']):
    refuse('stage 0 replica 0 saves, nobody else')
  if phase not in rule.phases:
    refuse(f'nothing is there to corrupt in phase {phase}')
  is_first = phase in START_PHASES and not fields['iteration']
  if rule.place is Place.AGENT and is_first:
    refuse('before the run has begun nobody notes that it happened')
  return Fault(number=number, kind=kind, phase=phase, **fields)


def parse_faults(
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
    acts: the act at each place where it is not that of `TABLE`; added by the
      owner of what is damaged.
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
    self.acts: dict[Place, Act] = {}
    self.replays_until = 0
    self._script = list(script)
    self._announce = announce

  def phase(self, phase: str, iteration: int = 0) -> None:
    """Performs the fault that is due; call when a phase begins.

    Args:
      phase: a `Phase`, or another program's name, which has no faults.
      iteration: the current iteration; 0 in START_PHASES.
    """
    for fault in self._script:
      if self._is_due(fault, phase, iteration):
        self._script.remove(fault)
        self._announce(fault)
        rule = TABLE[fault.kind]
        act = self.acts.get(rule.place, rule.act)
        assert act is not None, fault
        act(fault, iteration)
        return

  def _is_due(self, fault: Fault, phase: str, iteration: int) -> bool:
    if fault.phase in START_PHASES:
      return fault.phase == phase
    if fault.phase is Phase.REPLAY:
      is_replayed = 0 < iteration <= self.replays_until
      return is_replayed and fault.iteration in (0, iteration)
    if fault.phase in END_PHASES:
      return fault.phase == phase and fault.iteration in (0, iteration)
    return (fault.phase, fault.iteration) == (phase, iteration)


EVENT = 'fault'


def event_fields(fault: Fault) -> dict[str, object]:
  """Returns the fields of a fault's event."""
  return {
    'number': fault.number,
    'fault': fault.kind,
    'stage': fault.stage,
    'replica': fault.replica,
    'iteration': fault.iteration,
    'phase': fault.phase,
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
      event = codec.read_object(line)
      if type(event.get('number')) is not int:
        continue
      fault = self._coming.get(event['number'])
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
