"""Stories of the coordinator, told in text: what happens, and what is done.

A line of a story is something that happens; the indented lines below it are the
actions that follow, each question with its answer behind `->`. Lines that begin
with # tell the story. `python -m tests.support.scenarios` writes the indented
lines anew: read the difference.

  run FIELD=VALUE ...      the settings; `max_failures` and the like too
  quietly LINE             the actions of LINE are not shown, but for an end
  time 3                   three seconds pass
  wait 30 [without 1]      so many seconds pass; all workers but those named say
                           each second what they do, until one has to end
  begin / train 10         all workers start / do the iterations up to 10; their
                           reports may have fields: copy_bytes_per_second=1e6
  fault KILL:...           a worker announces a scripted fault, as in --fail
  died 1/0 how="..."       a process ended; other events likewise
  stored 1/0 11            a worker says something; here: iteration 11
  next wrong "..."         the next report is found to be wrong
  next broke "..."         the next question finds no answer
  next splice              the next start is with other software
  starve 1                 as found from now on: it gets no time; none: all do
  away NAME                from now on the agent of that host is stopped; nobody
  lose log 2               as found from now on: a stage's log is gone
  small log 2              it is smaller than the run needs
  lose store               all of them, and the folder that they were in
  lose snapshots 2 [9]     so are its snapshots, or one of them
  damage 9 stage=0         as found from now on: an entry of iteration 9
  foreign 9                the snapshots of iteration 9 have another digest than
                           their line
  left recorded=9 newest=9 snapshots=[4,9]    by an earlier run; `run base=9`
                           says that it was finished then, and goes on from its
                           checkpoint

1 stands for 1/0: replica 0 of stage 1. Left out are fields that have their
usual value; of an order to go also those that are 0, and the sizes of files.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
import re
import shlex

from moetion_jax import codec, errors
from moetion_jax.hostmem import segment_check
from moetion_jax.policies import decision
from moetion_jax.recovery import (
  actions,
  events,
  hang_detection,
  notices,
  orders,
  splice as splice_lib,
)
from moetion_jax.runtime import faults
from tests.support import helpers, recoveries

FOLDER = pathlib.Path(__file__).resolve().parents[1] / 'recovery' / 'scenarios'

_EVENTS = {'started': events.Started, 'stop_asked': events.StopAsked}
_SAID = {
  'state': notices.State,
  'answer': notices.Answer,
  'done': notices.Done,
  'stopped_here': notices.StoppedHere,
  'handed_over': notices.HandedOver,
  'saved': notices.Saved,
  'damaged': notices.Damaged,
  'rewritten': notices.Rewritten,
  'refused': notices.Refused,
  'failed': notices.Failed,
  'resumed': notices.Resumed,
  'caught_up': notices.CaughtUp,
}
_ENDS = (actions.Fail, actions.Stop, actions.Finish, actions.KillNow)
_SIZES = ('ring_bytes', 'cells', 'pool_files', 'pool_bytes')
_CAPTURES = (
  'window_length', 'interval', 'order', 'keep_windows', 'replay',
  'expected_mtbf_seconds',
)  # fmt: skip
_SHAPE = ('stages', 'replicas', 'iterations', 'policy', 'base')


class _World(recoveries.Run):
  """A world that keeps its answers, and can be told what comes next."""

  def __init__(self, **fields):
    shape = {n: fields.pop(n) for n in _SHAPE if n in fields}
    captures = {n: fields.pop(n) for n in _CAPTURES if n in fields}
    super().__init__(settings=fields, **shape, **captures)
    self.answers = []
    self.wrong = ''
    self.broken = ''
    self.is_other = False
    self.starved, self.usage = frozenset(), {}
    self.away = ''

  def look(self, stopped=()):
    """Somebody looks at the processes."""
    usage = hang_detection.Usage(
      worked_seconds=0.0, queued_seconds=self.now, is_held=False
    )
    self.usage |= dict.fromkeys(self.starved, usage)
    return self.handle(
      events.Looked(
        stopped=frozenset(stopped), usage=self.usage, away=self.away
      )
    )

  def _answer(self, question):
    if self.broken:
      answer = events.Broke(error=errors.MoetionError(self.broken))
      self.broken = ''
    elif self.wrong and isinstance(question, actions.Merge):
      answer = events.Merged(
        iteration=self._recorded, wrong=errors.WrongBitsError(self.wrong)
      )
      self.wrong = ''
    elif self.is_other and isinstance(question, actions.Splice):
      for stage, newest in enumerate(question.splice.complete_at):
        self._forget_newer(stage, newest)
      self._drop_logs()
      self.splices += (question.splice,)
      answer = events.Spliced(is_due=True, splices=self.splices)
    else:
      answer = super()._answer(question)
    self.answers.append(answer)
    return answer


def play(text: str) -> str:
  """Tells a story again; what is indented is what the coordinator does now."""
  told, world = [], None
  for line in text.splitlines():
    if line.startswith(' '):
      continue
    told.append(line)
    if not line or line.startswith('#'):
      continue
    words = shlex.split(line)
    if words[0] == 'run':
      world = _World(**_fields(words[1:]))
      continue
    assert world is not None, 'a story begins with a line of its settings'
    begun, world.answers = len(world.done), []
    is_quiet = words[0] == 'quietly'
    try:
      _happens(world, words[is_quiet:])
    except Exception as error:
      error.add_note(f'in the story: {line}')
      raise
    answers = iter(world.answers)
    for action in world.done[begun:]:
      shown = _tell(action)
      if isinstance(action, actions.Question):
        shown += f' -> {_tell_answer(next(answers))}'
      if not is_quiet or isinstance(action, _ENDS):
        told.append(f'  {shown}'.rstrip())
  return '\n'.join(told) + '\n'


# ---- what happens ------------------------------------------------------------


def _fields(words):
  found = {}
  for word in words:
    name, _, value = word.partition('=')
    try:
      found[name] = json.loads(value) if value else True
    except ValueError:
      found[name] = value
  return found


def _name(word):
  stage, _, replica = word.partition('/')
  return int(stage), int(replica or 0)


def _happens(world, words):
  kind, *rest = words
  match kind:
    case 'time':
      world.now += float(rest[0])
    case 'wait':
      _wait(world, int(rest[0]), {*map(_name, rest[2:])})
    case 'left':
      _left(world, **_fields(rest))
    case 'small':
      world.small.add(int(rest[1]))
    case 'lose':
      _lose(world, rest[0], *map(int, rest[1:] or '0'))
    case 'damage':
      known = {'stage': 0, 'replica': 0, 'entry': 'E', **_fields(rest[1:])}
      one = segment_check.Damage(iteration=int(rest[0]), **known)
      world.damage = (*world.damage, one)
    case 'foreign':
      world.foreign = (*world.foreign, *map(int, rest))
    case 'next':
      world.wrong = rest[1] if rest[0] == 'wrong' else ''
      world.broken = rest[1] if rest[0] == 'broke' else ''
      world.is_other = rest[0] == 'splice'
    case 'begin':
      world.begin(world.last_recorded, max(world.newest))
    case 'train':
      world.train(int(rest[0]), **_fields(rest[1:]))
    case 'looked':
      world.look(map(_name, rest))
    case 'starve':
      world.starved = frozenset(map(_name, rest))
    case 'away':
      world.away = ' '.join(rest)
    case 'died':
      how = 'was killed by SIGKILL'
      world.dies(*_name(rest[0]), **{'how': how, **_fields(rest[1:])})
    case 'fault':
      _fault(world, faults.parse(rest[0], 0, world.stages, world.replicas))
    case _ if kind in _EVENTS:
      fields = {'newest_generation': 0} if kind == 'started' else {}
      world.handle(codec.decode(_EVENTS[kind], fields | _fields(rest)))
    case _:
      _says(world, kind, _name(rest[0]), rest[1:])


def _says(world, kind, name, rest):
  stage, replica = name
  iteration = int(rest.pop(0)) if rest and rest[0].isdigit() else 0
  fields = _fields(rest)
  if kind in ('stored', 'caught_up'):  # so its log has the entries
    world.newest[stage] = max(world.newest[stage], iteration)
  match kind:
    case 'ready':
      world.ready(stage, replica)
    case 'stored':
      world.stores_one(stage, iteration, replica)
    case 'reported':
      report = helpers.make_report(iteration, stage, replica=replica, **fields)
      world.says(stage, notices.Reported(report=report), replica)
    case 'resumed':
      world.resumes(stage, replica)
    case _:
      if iteration and kind != 'caught_up':
        fields['iteration'] = iteration
      if kind == 'state':
        fields = {'detail': 'forward', 'steps': 1, **fields}
      message = codec.decode(_SAID[kind], fields)
      world.says(stage, message, replica)


def _wait(world, seconds, silent):
  for _ in range(seconds):
    world.now += 1
    for one in world.one.state.workers:
      if one.name not in silent:
        message = notices.State(
          state=one.state,
          detail=one.detail,
          shortage=one.shortage,
          iteration=one.iteration,
          steps=one.steps,
        )
        world.says(one.stage, message, one.replica)
    done = world.look()
    if any(isinstance(action, (actions.Kill, *_ENDS)) for action in done):
      return


def _fault(world, fault):
  is_early = fault.phase in faults.START_PHASES
  message = notices.Faulted(
    at=world.now,
    iteration=0 if is_early else fault.iteration,
    fields=faults.event_fields(fault),
  )
  world.says(fault.stage, message, fault.replica)


def _left(world, recorded, newest=0, snapshots=(1, 0)):
  world.last_recorded = recorded
  world.newest = [newest] * world.stages
  first, last = snapshots
  for stage in range(world.stages):
    for iteration in range(first, last + 1):
      world.keeps(stage, iteration)


def _lose(world, what, stage, *iterations):
  if what == 'store':
    world.gone = 'STORE'
    world.missing = set(range(world.stages))
    for shares in world.shares:
      shares.clear()
    return
  if what == 'log':
    world.missing.add(stage)
    return
  for name in [*world.shares[stage]]:
    if not iterations or name[0] in iterations:
      del world.shares[stage][name]


# ---- what is done ------------------------------------------------------------


def _snake(kind):
  return re.sub(r'(?<=.)([A-Z])', r'_\1', kind.__name__).lower()


def _value(value):
  match value:
    case bool():
      return 'yes' if value else 'no'
    case dict():
      items = (f'{_value(k)}: {_value(v)}' for k, v in value.items())
      return f'{{{", ".join(items)}}}'
    case tuple() | list():
      return f'[{", ".join(map(_value, value))}]'
    case float():
      return f'{value:g}'
    case splice_lib.Splice():
      return f'{value.exact_until} to {_value(value.complete_at)}'
    case str() if ' ' in value or not value:
      return json.dumps(value)
  return str(value)


def _listed(fields):
  shown = []
  for name, value in fields.items():
    if name == 'worker':
      shown.insert(0, '/'.join(map(str, value)))
    else:
      shown.append(name if value is True else f'{name}={_value(value)}')
  return ' '.join(shown)


def _unusual(one):
  fields = {
    f.name: getattr(one, f.name)
    for f in dataclasses.fields(one)
    if f.default is dataclasses.MISSING or f.default != getattr(one, f.name)
  }
  if isinstance(one, orders.Go):
    windows = [f'{d.window_length}@{d.first_iteration}' for d in one.decisions]
    fields |= {'decisions': windows}
    fields = {n: v for n, v in fields.items() if v and n not in _SIZES}
  return fields


def _tell(action):
  kind = _snake(type(action))
  match action:
    case actions.Record():
      return f'record {action.kind} {_listed(action.fields)}'
    case actions.Note():
      return f'note {json.dumps(action.text)}'
    case actions.Fail():
      name = type(action.error).__name__
      if (code := action.error.exit_code) != errors.ExitCode.FAILED:
        name += f' {code.name.lower()}'
      return f'fail {name} {json.dumps(str(action.error))}'
    case actions.Send():
      order = action.order
      name = '/'.join(map(str, action.worker))
      if isinstance(order, orders.Decide):
        one = order.decision
        told = f'send {name} decide {one.window_length}@{one.first_iteration}'
        return told + (' updates' if one.replay == decision.UPDATES else '')
      return f'send {name} {_snake(type(order))} {_listed(_unusual(order))}'
    case actions.Merge():
      one = action.report
      return f'merge {one.stage}/{one.replica} {one.iteration}'
    case actions.Accept():
      return 'accept'
    case actions.ReadDigests():
      return f'read_digests {_listed({"iterations": action.iterations})}'
    case actions.CheckRoom():
      return 'check_room'
    case actions.Locate():
      of = {f'{s}/{r}': n for (s, r), n in action.generations.items()}
      return f'locate generations={_value(of)}'
  return f'{kind} {_listed(_unusual(action))}'.rstrip()


def _tell_answer(answer):
  match answer:
    case events.Accepted():
      return f'written until {answer.last_recorded}'
    case events.Scanned():
      found = []
      for stage, shares in answer.shares.items():
        iterations = sorted({one.iteration for one in shares})
        found.append(
          f'stage {stage}: snapshots {_ranges(iterations) or "none"}, log '
          + (f'until {answer.newest[stage]}')
        )
      found += [
        f'no log of stage {s}' for s, n in enumerate(answer.log_bytes) if not n
      ]
      found += [f'{answer.gone} is gone'] * bool(answer.gone)
      return '; '.join(found)
    case events.DigestsRead():
      wrong = [i for i, x in answer.stored.items() if x != answer.recorded[i]]
      return f'other ones of {_ranges(wrong)}' if wrong else 'all equal'
    case events.LogsChecked():
      damaged = [d for check in answer.checks for d in check.damaged]
      return _damage(damaged) or 'all whole'
    case events.Dropped():
      return _damage(answer.entries) or 'none'
    case events.Merged(wrong=None):
      return f'written until {answer.iteration}'
    case events.Merged():
      return f'wrong {json.dumps(str(answer.wrong))}'
    case events.Spliced():
      return 'due' if answer.is_due else 'not due'
    case events.Broke():
      return f'broke {json.dumps(str(answer.error))}'
  raise TypeError(answer)


def _damage(entries):
  return ', '.join(
    f'{one.entry} of stage {one.stage}, iteration {one.iteration}'
    for one in entries
  )


def _ranges(numbers):
  found = []
  for number in numbers:
    if found and found[-1][1] == number - 1:
      found[-1][1] = number
    else:
      found.append([number, number])
  return ', '.join(f'{a}-{b}' if a < b else str(a) for a, b in found)


def main() -> None:
  """Writes what is done in all stories anew."""
  for path in sorted(FOLDER.glob('*.txt')):
    path.write_text(play(path.read_text()))


if __name__ == '__main__':
  main()
