"""What holds whatever happens, and in whatever order.

A small model of the world: workers that live, train, wait for entries, hang and
die; stores that are read; time that passes. Faults are drawn, and how far the
workers come between them. Then no more happen, and the run must end.
"""

import dataclasses

import hypothesis
import pytest
from hypothesis import strategies as st

from moetion_jax.hostmem import segment_check
from moetion_jax.recovery import (
  actions,
  events,
  hang_detection,
  notices,
  orders,
)
from moetion_jax.recovery.coordinator import coordinator
from moetion_jax.snapshots import coverage
from tests.support import helpers, recoveries

_State = hang_detection.WorkerState
_ENDS = (actions.Fail, actions.Stop, actions.Finish)
_MAX_FAILURES = 3
_ITERATIONS = 9
_HANG_SECONDS = 5
# Every round is a second; all that is done again is done in far fewer.
_LAST_ROUNDS = 400
_POLICIES = {
  'sparse': {},
  'updates': {'replay': 'updates'},
  'dense': {'interval': 2},
  'two_phase': {'interval': 3},
  'partial': {'interval': 2},
  'none': {},
}
_LOCAL = ('sparse', 'updates')  # only who lost something goes back


@dataclasses.dataclass(kw_only=True)
class _Process:
  """A worker's process."""

  stage: int
  replica: int
  generation: int
  lives: bool = True
  is_stopped: bool = False  # by SIGSTOP
  hangs: bool = False
  is_ready: bool = False
  go: orders.Go | None = None
  has_resumed: bool = False
  must_stop: bool = False
  iteration: int = 0  # the newest one that it has begun
  completed: int = 0
  reported: int = 0
  is_done: bool = False
  is_asked: bool = False
  must_save: bool = False
  limit: int = _ITERATIONS
  is_committed: bool = True
  is_waiting: bool = False
  steps: int = 0

  @property
  def name(self):
    return self.stage, self.replica

  @property
  def is_active(self):
    return self.lives and not self.is_stopped and not self.hangs


class _World(recoveries.Run):
  """Workers and stores; looks at all that the coordinator has done.

  Attributes:
    processes: the processes of workers, by name.
    published: by stage, the iterations of which its log has entries.
    deaths: how many were told.
    others: the faults that may end a run after few deaths.
    ended: how the run ended; None while it goes on.
  """

  def __init__(self, policy, stages, replicas, window):
    super().__init__(
      stages=stages,
      replicas=replicas,
      iterations=_ITERATIONS,
      policy='sparse' if policy == 'updates' else policy,
      settings={
        'max_failures': _MAX_FAILURES,
        'hang_timeout_seconds': _HANG_SECONDS,
        'shrinks': replicas > 1,
        'grow_after': 2 * (replicas > 1),
      },
      **_POLICIES[policy],
      **({'window_length': window} if policy in _LOCAL else {}),
    )
    if policy in _LOCAL:
      self.length = window
    self.policy = policy
    self.processes = {}
    self.coming = []
    self.published = [set() for _ in range(stages)]
    self.damaged_snapshots = set()
    self.generations = [0] * stages
    self.kept_from = 0
    self.deaths = 0
    self.others = 0
    self.asked = 0
    self.ended = None
    self.begin_agent()

  def begin_agent(self):
    """An agent starts, the first one or another; its workers are new."""
    self.one = coordinator.Coordinator(self.one.state.settings)
    self.processes.clear()
    self.last_recorded = max(self.last_recorded, self._recorded)
    self._reports.clear()
    self.deaths = self.asked = self.kept_from = 0
    self.handle(events.Started(newest_generation=max(self.generations)))

  # ---- what the stores do ----------------------------------------------------

  def _drop_logs(self):
    super()._drop_logs()
    for entries in self.published:
      entries.clear()

  def whole_from(self, stage):
    """See `recoveries.Run`: of the oldest one, some may be gone."""
    return min(self.published[stage], default=-1) + 1

  def publish(self, stage, iteration):
    self.published[stage].add(iteration)
    self.newest[stage] = max(self.published[stage])

  def _merge(self, question):
    before = self._recorded
    answer = super()._merge(question)
    # A line that is skipped is never written.
    assert answer.iteration in (before, before + 1), (before, answer)
    return answer

  # ---- what is done, and whether it may be -----------------------------------

  def handle(self, event):
    line = self.line_if_any
    before = {n: dataclasses.replace(p) for n, p in self.processes.items()}
    done = super().handle(event)
    gone = {}
    for action in done:
      self._act(action, gone)
    if self.ended is None:
      self._check(event, done, before, gone)
      if gone and (now := self.line_if_any) < line:
        # It fell: all go back, to that very state.
        assert {go.start for go in gone.values()} == {now}
        assert {stage for stage, _ in gone} == set(range(self.stages))
      else:
        assert self.line_if_any >= line, event
      if self.line_if_any > line:
        if isinstance(event, events.Died):  # it is frozen, unless logs are new
          assert {stage for stage, _ in gone} == set(range(self.stages))
        # It is a start of every stage, unless its store is gone, untold yet.
        for stage, shares in enumerate(self.shares):
          records = coverage.complete_records(shares.values())
          found = {one.iteration for one in records}
          assert self.line_if_any in found or stage in self.missing
    return done

  @property
  def line_if_any(self):
    return self.one.state.line if hasattr(self.one.state, 'recorded') else 0

  def _act(self, action, gone):
    match action:
      case actions.Replace():
        assert action.generation > self.generations[action.stage]
        self.generations[action.stage] = action.generation
        for name in [n for n in self.processes if n[0] == action.stage]:
          del self.processes[name]
        for replica in action.team:
          one = _Process(
            stage=action.stage, replica=replica, generation=action.generation
          )
          self.processes[one.name] = one
      case actions.Kill():
        self.processes[action.worker].lives = False
      case actions.Send(order=orders.Go()):
        gone[action.worker] = action.order
        self._go(self.processes[action.worker], action.order)
      case actions.Send():
        self._obey(self.processes[action.worker], action.order)
      case actions.Save():
        self.processes[action.worker].must_save = True
      case actions.MoveLine():
        assert action.kept_from >= self.kept_from
        self.kept_from = action.kept_from
        assert action.entry_line >= action.kept_from
        for entries in self.published:
          entries -= {i for i in entries if i <= action.entry_line}
      case _ if isinstance(action, _ENDS):
        self.ended = action

  def _go(self, process, go):
    if go.is_fresh:
      self.published[process.stage].clear()
    self.kept_from = min(self.kept_from, go.line)
    assert process.go is None, 'it works'
    records = coverage.complete_records(self.shares[process.stage].values())
    assert go.start in {0, *(r.iteration for r in records)}
    assert go.generation == process.generation
    process.go = go
    process.has_resumed = process.is_done = process.is_asked = False
    process.iteration = process.completed = process.reported = go.start

  def _obey(self, process, order):
    match order:
      case orders.StopHere():
        process.must_stop = True
      case orders.HandOver():
        process.is_asked = True
      case orders.Propose():
        process.limit, process.is_committed = order.limit, False
        begun = process.iteration
        if begun > order.limit:
          process.limit = _ITERATIONS
        answer = notices.Answer(limit=order.limit, begun=begun)
        self.coming.append((process, answer))
      case orders.Commit():
        process.limit, process.is_committed = order.limit, True

  def _check(self, event, done, before, gone):
    """Checks what was done because of an event."""
    of_stage = {a.stage: a for a in done if isinstance(a, actions.Replace)}
    kinds = {a.kind for a in done if isinstance(a, actions.Record)}
    members = {
      a.fields['stage']
      for a in done
      if isinstance(a, actions.Record) and a.kind == 'recovery_started'
    }
    if isinstance(event, events.Died):
      stage, replica = event.worker
      assert of_stage[stage].generation > before[event.worker].generation
      if replica not in of_stage[stage].team:
        assert 'shrunk' in kinds
    for stage in of_stage:
      may_hang = self.replicas > 1 and self.goes_together
      assert (
        isinstance(event, events.Started)
        or (isinstance(event, events.Died) and stage == event.worker[0])
        or stage in members
        or (isinstance(event, events.Died) and may_hang)
      ), (event, stage)
    for action in done:
      if isinstance(action, actions.Kill):
        one = before[action.worker]
        is_ill = one.is_stopped or one.hangs or not one.lives
        assert is_ill or self.damage, (event, action)
      if isinstance(action, actions.Send):
        stops = isinstance(action.order, orders.StopHere)
        assert not stops or self.goes_together, action
    known = {w.name: w.generation for w in self.one.state.workers}
    assert known == {n: p.generation for n, p in self.processes.items()}
    for name, go in gone.items():
      assert self.processes[name].go is go

  @property
  def goes_together(self):
    return self.policy not in _LOCAL or self.others > 0

  # ---- what workers do -------------------------------------------------------

  def say(self, process, message):
    """A worker says something, if it still is the one."""
    if self.processes.get(process.name) is process and self.ended is None:
      self.says(process.stage, message, process.replica)

  def step(self, process):
    """A worker does one thing."""
    while self.coming:
      self.say(*self.coming.pop(0))
    if not process.is_active or self.processes.get(process.name) is not process:
      return
    process.is_waiting = False
    if process.must_stop:
      process.must_stop, process.go = False, None
      process.generation += 1
      self.generations[process.stage] += 1
      self.say(process, notices.StoppedHere())
    elif process.go is None:
      if not process.is_ready and self.line_if_any == 0:
        process.is_ready = True
        self.ready(*process.name)
    elif not process.has_resumed:
      self._resume(process)
    elif process.is_done:
      self._finish(process)
    elif process.completed >= process.limit:
      if process.is_committed:
        self._end(process)
    elif process.iteration == process.completed:
      process.iteration += 1
      process.steps += 1
      if process.iteration > process.go.applied_until:
        self.publish(process.stage, process.iteration)
    else:
      self._complete(process)

  def _resume(self, process):
    go = process.go
    used = range(go.start, max(go.complete_at, go.applied_until) + 1)
    bad = [i for i in used if (process.stage, i) in self.damaged_snapshots]
    here = {name[0] for name in self.shares[process.stage]}
    missing = [i for i in used if i and i not in here]
    if bad or missing:
      process.lives = False
      suspects = (*bad, *missing)
      self.say(process, self._failed(process, suspects=suspects))
      return
    process.has_resumed = True
    first = max(go.start, go.applied_until) + 1
    self.say(process, notices.Resumed(first_iteration=first, fetch_seconds=0.0))
    if go.start and go.start == go.target:
      self.say(process, notices.CaughtUp())

  def _complete(self, process):
    iteration = process.iteration
    is_applied = iteration <= process.go.applied_until
    for stage in range(0 if is_applied else self.stages):
      distance = abs(stage - process.stage)
      # Of stages that are no neighbours it needs scalars, which the snapshots
      # of its conversion have.
      if not distance or distance > 1 and iteration <= process.go.complete_at:
        continue
      if iteration not in self.published[stage]:
        process.is_waiting = True
        return
    process.completed = iteration
    process.steps += 1
    takes = self.policy != 'none' and iteration % self.interval == 0
    if takes and not is_applied:
      self.damaged_snapshots.discard((process.stage, iteration))
      if process.replica in self.one.state.team(process.stage):
        self.stores_one(process.stage, iteration, process.replica)
    self._report(process, iteration - 1)
    if iteration == process.go.target:
      self.say(process, notices.CaughtUp())

  def _report(self, process, iteration):
    if iteration > process.reported:
      process.reported = iteration
      report = helpers.make_report(
        iteration, process.stage, replica=process.replica
      )
      self.say(process, notices.Reported(report=report))

  def _end(self, process):
    self._report(process, process.completed)
    process.is_done = True
    self.say(process, notices.Done(iteration=process.completed))

  def _finish(self, process):
    if process.is_asked:
      process.is_asked = False
      self.say(process, notices.HandedOver())
    elif process.must_save:
      self.say(process, notices.Saved())

  def _failed(self, process, **fields):
    return notices.Failed(
      error='it failed', iteration=process.iteration, **fields
    )

  def bury(self):
    """The deaths so far are told."""
    for process in [*self.processes.values()]:
      is_there = self.processes.get(process.name) is process
      if not process.lives and is_there and self.ended is None:
        self.deaths += 1
        self.dies(*process.name)

  def round(self):
    """All do one thing, a second passes, and somebody looks."""
    self.bury()
    for process in [*self.processes.values()]:
      self.step(process)
    self.now += 1
    for process in [*self.processes.values()]:
      if process.lives and not process.is_stopped:
        self.say(process, self._state_of(process))
    stopped = {p.name for p in self.processes.values() if p.is_stopped}
    if self.ended is None:
      self.handle(events.Looked(stopped=frozenset(stopped)))

  def _state_of(self, process):
    state = _State.RUNNING
    if process.go is None or not process.has_resumed:
      state = _State.COMPILING
    elif process.is_done:
      state = _State.DONE
    elif process.is_waiting:
      state = _State.WAITING
    if process.hangs:
      state = _State.RUNNING
    return notices.State(
      state=state,
      detail='x',
      iteration=process.iteration if process.has_resumed else 0,
      steps=process.steps,
    )

  # ---- faults ----------------------------------------------------------------

  def fault(self, kind, number):
    """Something happens to a worker or its store."""
    names = sorted(self.processes)
    process = self.processes[names[number % len(names)]]
    stage = process.stage
    match kind:
      case 'kill':
        process.lives = False
      case 'stop':
        process.is_stopped = True
      case 'hang' if process.has_resumed:  # else nobody could tell
        process.hangs = True
      # Until then it ends the run: another one would not begin either.
      case 'exception' if process.is_active and process.go:
        process.lives = False
        self.say(process, self._failed(process))
      case 'wrong_bits' if process.is_active and process.has_resumed:
        self.others += 1
        process.lives = False
        entry = (
          max(process.iteration - number % 3, 1),
          (stage + 1) % self.stages,
        )
        if number % 2 and entry[0] in self.published[entry[1]]:
          self.damage = (segment_check.Damage(*entry, 0, 'E'),)
        failed = self._failed(process, has_wrong_bits=True, is_final=True)
        self.say(process, failed)
      case 'corrupt_entry' if process.is_active and process.has_resumed:
        process.lives = False
        other = (stage + 1) % self.stages
        if self.published[other] and other != stage:
          corrupt = (other, max(self.published[other]))
          self.say(process, self._failed(process, corrupt=corrupt))
      case 'lose_store':
        process.lives = False
        self.missing.add(stage)
        self.published[stage].clear()
        self.shares[stage].clear()
      case 'lose_all':
        process.lives = False
        self.gone = 'STORE'
        for each in range(self.stages):
          self.missing.add(each)
          self.published[each].clear()
          self.shares[each].clear()
      case 'lose_log':
        self.missing.add(stage)
        self.published[stage].clear()
        process.lives = False
      case 'damage_snapshot' if self.shares[stage]:
        self.others += 1
        newest = max(name[0] for name in self.shares[stage])
        self.damaged_snapshots.add((stage, newest))
        process.lives = False
      case 'ask':
        if self.asked == 0:
          self.asked += 1
          self.handle(events.StopAsked())
      case 'kill_agent':
        self.begin_agent()


_faults = st.tuples(
  st.sampled_from(
    [
      'kill',
      'stop',
      'hang',
      'exception',
      'wrong_bits',
      'corrupt_entry',
      'lose_store',
      'lose_all',
      'lose_log',
      'damage_snapshot',
      'ask',
      'kill_agent',
    ]
  ),
  st.integers(0, 7),
  st.integers(0, 12),  # rounds before it
  st.integers(0, 4),  # steps before it, in the middle of a round
)


def _live_through(policy, stages, replicas, window, faults):
  world = _World(policy, stages, replicas, window)
  for kind, number, rounds, steps in faults:
    for _ in range(rounds):
      world.round()
    for process in [*world.processes.values()][:steps]:
      world.step(process)
    if world.ended is not None:
      break
    world.fault(kind, number)
  for _ in range(_LAST_ROUNDS):
    if world.ended is not None:
      break
    world.round()
  _check_end(world)


def _check_end(world):
  assert world.ended is not None, 'it never ends'
  if isinstance(world.ended, actions.Fail):
    text = str(world.ended.error)
    assert 'defect' not in text and 'no common start' not in text, text
    is_due = world.deaths > _MAX_FAILURES or world.others
    assert is_due or world.policy == 'none', text
    return
  state = world.one.state
  ends = {process.completed for process in world.processes.values()}
  if isinstance(world.ended, actions.Finish):
    # One that dies after it handed over may be on its way back still.
    assert state.recorded == _ITERATIONS
    assert ends == {_ITERATIONS} or state.recoveries
  else:  # all after the same iteration, unless some did not train yet
    assert world.asked and (len(ends) == 1 or world.of(actions.KillNow))


def _property(max_examples):
  def wrap(test):
    given = hypothesis.given(
      policy=st.sampled_from([*_POLICIES, 'sparse', 'sparse', 'updates']),
      stages=st.integers(1, 4),
      replicas=st.integers(1, 3),
      window=st.integers(1, 4),
      faults=st.lists(_faults, max_size=6),
    )(test)
    return hypothesis.settings(
      deadline=None,
      max_examples=max_examples,
      derandomize=True,
      phases=[
        hypothesis.Phase.explicit,
        hypothesis.Phase.generate,
        hypothesis.Phase.shrink,
      ],
      database=None,
      suppress_health_check=[hypothesis.HealthCheck.too_slow],
    )(given)

  return wrap


@_property(120)
@hypothesis.example(  # one that is ready when its world has gone on already
  policy='dense',
  stages=2,
  replicas=1,
  window=1,
  faults=[('stop', 1, 1, 0), ('kill', 0, 0, 0)],
)
@hypothesis.example(  # a record that is older than the log, which began anew
  policy='updates',
  stages=2,
  replicas=1,
  window=1,
  faults=[('kill', 1, 2, 2), ('lose_log', 0, 0, 1), ('kill', 0, 1, 0)],
)
@hypothesis.example(  # records lead from before the line to where logs begin
  policy='updates',
  stages=2,
  replicas=1,
  window=2,
  faults=[('damage_snapshot', 0, 6, 0), ('kill_agent', 0, 0, 0)],
)
def test_whatever_happens_it_goes_on_or_ends(
  policy, stages, replicas, window, faults
):
  _live_through(policy, stages, replicas, window, faults)


@pytest.mark.thorough
@_property(1000)
def test_whatever_happens_for_longer(policy, stages, replicas, window, faults):
  _live_through(policy, stages, replicas, window, faults)
