"""A coordinator without processes, and stages that store and report to it."""

from __future__ import annotations

import dataclasses

from moetion_jax import job_spec, keys
from moetion_jax.hostmem import segment_check
from moetion_jax.policies import planner, settings as capture_settings
from moetion_jax.policies.kinds import registry
from moetion_jax.recovery import (
  actions,
  events,
  hang_detection,
  notices,
  orders,
)
from moetion_jax.recovery.coordinator import coordinator, state
from moetion_jax.snapshots import coverage
from tests.support import helpers

_EXPERTS = 6


def operators(stage):
  """The operators of a stage: experts of one layer."""
  return [keys.OperatorId(f'layers/{stage}', e) for e in range(_EXPERTS)]


def share(
  stage, iteration, length=3, replica=0, replicas=1, replay='microbatches'
):
  """A worker's share of a rolling snapshot."""
  mine = operators(stage)
  slot = frozenset(mine[iteration % length :: length][replica::replicas])
  rest = frozenset(mine[replica::replicas]) - slot
  is_recorded = replay == 'updates'
  return coverage.Share(
    iteration=iteration,
    replica=replica,
    replicas=replicas,
    state=slot,
    compute=frozenset() if is_recorded else rest,
    gradients=rest if is_recorded else frozenset(),
    is_record=True,  # as every worker says
  )


class Run:
  """A coordinator, and a world that answers it as one does that has no faults.

  Attributes:
    done: all actions, in order.
    shares: by stage, what its store holds.
    newest: by stage, the newest iteration of its log.
    length: the number of snapshots that together hold everything.
    interval: iterations between snapshots.
    replays: what a snapshot holds of the operators outside its slot, by the
      iteration from which on it does.
    missing: the stages that miss a log.
    gone: the store that somebody has removed; '' for none.
    small: the stages whose log is smaller than the run needs.
    last_recorded: the newest line that an earlier run wrote.
    splices: those of the run.
    damage: what a check of the logs finds.
    foreign: iterations whose snapshots have another digest than their lines.
    begun: by stage, the iteration that it works on.
  """

  def __init__(
    self,
    stages=2,
    iterations=60,
    replicas=1,
    settings=None,
    policy='sparse',
    base=0,
    **captures,
  ):
    self.one = coordinator.Coordinator(
      state.Settings(
        job=dataclasses.replace(
          helpers.micro_run(
            stages=stages, iterations=iterations, replicas=replicas
          ).job_spec(),
          expert_capacity=100,
          base=base
          and job_spec.Base(path='CHECKPOINT', iteration=base, digest='d')
          or None,
        ),
        captures=capture_settings.CaptureSettings(
          policy=registry.of_name(policy),
          **(captures or {'window_length': 3 * (policy == 'sparse')}),
        ),
        **(settings or {}),
      )
    )
    self.stages = stages
    self.replicas = replicas
    self.iterations = iterations
    self.now = 100.0
    self.done = []
    self.shares = [{} for _ in range(stages)]
    self.newest = [0] * stages
    lengths = {'sparse': 3, 'partial': _EXPERTS}
    self.length = captures.get('window_length') or lengths.get(policy, 1)
    self.interval = captures.get('interval', 1)
    self.replays = {0: self.one.state.settings.captures.replays[0]}
    self.missing = set()
    self.gone = ''
    self.small = set()
    self.last_recorded = 0
    self.splices = ()
    self.damage = ()
    self.foreign = ()
    self.begun = [0] * stages
    self._skipped = 0
    self._recorded = base
    self._reports = {}

  # ---- the world -------------------------------------------------------------

  def handle(self, event):
    """Has an event handled and all questions answered; returns what is done."""
    done, coming = [], [event]
    while coming:
      self.one.handle(events.Tick(now=self.now))
      for action in self.one.handle(coming.pop()):
        done.append(action)
        if isinstance(action, actions.Question):
          coming.append(self._answer(action))
        elif isinstance(action, actions.ForgetSnapshots):
          for stage in action.stages:
            self.shares[stage].clear()
        elif isinstance(action, actions.ForgetNewer):
          for stage, newest in action.iterations.items():
            self._forget_newer(stage, newest)
        elif isinstance(action, actions.ForgetAfter):
          self._recorded = min(self._recorded, action.iteration)
          self.last_recorded = min(self.last_recorded, action.iteration)
        elif isinstance(action, actions.Begin):
          self._recorded = action.iteration
        elif isinstance(action, actions.MakeStores):
          self.gone = ''
        elif isinstance(action, actions.DropLogs):
          self._drop_logs()
        elif isinstance(action, actions.MoveLine):
          for shares in self.shares:
            for name in [n for n in shares if n[0] < action.kept_from]:
              del shares[name]
        elif isinstance(action, actions.Send):
          self._sent(action.worker[0], action.order)
    self.done += done
    return done

  def _sent(self, stage, order):
    if isinstance(order, orders.Decide):
      self.replays[order.decision.first_iteration] = order.decision.replay
    if not isinstance(order, orders.Go):
      return
    self.begun[stage] = order.start + 1
    if order.is_fresh:
      self.missing.discard(stage)
      self.small.discard(stage)
      self.newest[stage] = 0

  def _replay(self, iteration):
    return self.replays[max(i for i in self.replays if i <= iteration)]

  def _drop_logs(self):
    self.damage = ()
    self.missing = set(range(self.stages))
    self.newest = [0] * self.stages

  def _forget_newer(self, stage, newest):
    for name in [n for n in self.shares[stage] if n[0] > newest]:
      del self.shares[stage][name]

  def _answer(self, question):
    match question:
      case actions.Accept():
        return events.Accepted(
          last_recorded=self.last_recorded, splices=self.splices
        )
      case actions.Scan():
        return events.Scanned(
          shares={s: tuple(self.shares[s].values()) for s in question.stages},
          log_bytes=tuple(
            (s not in self.missing)
            * (self.one.state.log_size(s).file_bytes - (s in self.small))
            for s in range(self.stages)
          ),
          newest={s: self.newest[s] for s in question.stages},
          whole_from={s: self.whole_from(s) for s in question.stages},
          gone=self.gone,
        )
      case actions.ReadDigests():
        recorded = {i: f'digest-{i}' for i in question.iterations}
        foreign = recorded.keys() & self.foreign
        stored = recorded | dict.fromkeys(foreign, 'another')
        return events.DigestsRead(stored=stored, recorded=recorded)
      case actions.CheckLogs():
        check = segment_check.SegmentCheck(10, tuple(self.damage))
        return events.LogsChecked(checks=(check,), newest=tuple(self.newest))
      case actions.DropDamaged():
        dropped = tuple(
          d
          for d in self.damage
          if d.stage == question.stage
          and d.iteration >= question.first_iteration
        )
        self.damage = tuple(d for d in self.damage if d not in dropped)
        return events.Dropped(entries=dropped)
      case actions.Splice():
        return events.Spliced(is_due=False, splices=self.splices)
      case actions.Merge():
        return self._merge(question)
    raise TypeError(question)

  def whole_from(self, stage):
    """The first iteration of which a stage's log surely has all entries."""
    del stage
    return 0

  def _merge(self, question):
    one = question.report
    known = self._reports.setdefault(one.iteration, {})
    known[one.stage, one.replica] = one
    wanted = {(s, r) for s, team in enumerate(question.teams) for r in team}
    if wanted - known.keys() or one.iteration <= self._recorded:
      return events.Merged(iteration=self._recorded)
    self._recorded = one.iteration
    self._skipped = 0 if one.updated else self._skipped + 1
    return events.Merged(
      iteration=one.iteration,
      skipped=self._skipped,
      reports=tuple(known[s, t[0]] for s, t in enumerate(question.teams)),
    )

  # ---- what happens ----------------------------------------------------------

  def says(self, stage, message, replica=0):
    """A worker says something."""
    return self.handle(events.Said(worker=(stage, replica), message=message))

  def start(self):
    """The workers are started; none can train yet."""
    return self.handle(events.Started(newest_generation=0))

  def ready(self, stage, replica=0):
    """A worker can train."""
    sizes = planner.StageSizes(
      state_bytes=dict.fromkeys(operators(stage), 12),
      compute_bytes=dict.fromkeys(operators(stage), 2),
      gradient_bytes=dict.fromkeys(operators(stage), 4),
      device=dict.fromkeys(operators(stage)),
    )
    message = notices.Ready(
      device='cpu',
      platform='cpu',
      lowering_platform='cpu',
      state_bytes=12 * _EXPERTS,
      operators=sizes,
      environment={},
    )
    return self.says(stage, message, replica)

  def begin(self, last_recorded=0, newest=0):
    """All workers can train; returns the orders by stage."""
    self.last_recorded = last_recorded
    self.newest = [newest] * self.stages
    self.start()
    for stage in range(self.stages):
      for replica in range(self.replicas):
        done = self.ready(stage, replica)
    for stage in range(self.stages):
      for replica in range(self.replicas):
        self.resumes(stage, replica)
    return orders_in(done)

  def resumes(self, stage, replica=0):
    """A worker begins with what it was told."""
    first = self.begun[stage]
    message = notices.Resumed(first_iteration=first, fetch_seconds=0.0)
    return self.says(stage, message, replica)

  def keeps(self, stage, iteration, length=0, team=()):
    """A stage's store has a snapshot; returns the shares by replica."""
    team = team or tuple(range(self.replicas))
    shares = {
      replica: share(
        stage,
        iteration,
        length or self.length,
        place,
        len(team),
        self._replay(iteration),
      )
      for place, replica in enumerate(team)
    }
    self.shares[stage] |= {one.name: one for one in shares.values()}
    return shares

  def stores_one(self, stage, iteration, replica=0, length=0):
    """One worker of a stage stores its share of a snapshot."""
    team = self.one.state.team(stage)
    place, length = team.index(replica), length or self.length
    one = share(
      stage, iteration, length, place, len(team), self._replay(iteration)
    )
    self.shares[stage][one.name] = one
    return self.says(stage, notices.Stored(share=one), replica)

  def stores(self, stage, iteration, length=0):
    """All workers of a stage store a snapshot."""
    done = []
    for replica in self.one.state.team(stage):
      done += self.stores_one(stage, iteration, replica, length)
    return done

  def reports(self, iteration, stages=None, **fields):
    """All workers report an iteration."""
    done = []
    for stage in stages or range(self.stages):
      for replica in self.one.state.team(stage):
        report = helpers.make_report(
          iteration, stage, replica=replica, **fields
        )
        done += self.says(stage, notices.Reported(report=report), replica)
    return done

  def train(self, until, length=0, **fields):
    """All stages do the next iterations: they store, then they report."""
    for iteration in range(min(self.begun), until + 1):
      for stage in range(self.stages):
        if iteration % self.interval == 0:
          self.stores(stage, iteration, length)
      self.reports(iteration, **fields)
      self.newest = [iteration] * self.stages
    newest = min(until + 1, self.iterations)
    self.begun = [newest] * self.stages
    for stage in range(self.stages):
      self.works_on(stage, newest)

  def works_on(self, stage, iteration, replica=0, **fields):
    """A worker says what it does."""
    fields = {'detail': 'forward', 'steps': 1, **fields}
    fields.setdefault('state', hang_detection.WorkerState.RUNNING)
    return self.says(
      stage, notices.State(iteration=iteration, **fields), replica
    )

  def dies(self, stage, replica=0, how='was killed by SIGKILL', **failed):
    """A worker dies, after its last words, if any; returns orders by stage."""
    if failed:
      fields = {'iteration': self.begun[stage], **failed}
      self.says(stage, notices.Failed(**fields), replica)
    done = self.handle(events.Died(worker=(stage, replica), pid=1, how=how))
    return orders_in(done)

  def comes_back(self, *stages):
    """Workers resume and catch up."""
    for stage in stages:
      for replica in self.one.state.team(stage):
        self.resumes(stage, replica)
      for replica in self.one.state.team(stage):
        self.says(stage, notices.CaughtUp(), replica)

  # ---- what came of it -------------------------------------------------------

  @property
  def line(self):
    """The recovery line."""
    return self.one.state.line

  def of_kind(self, kind):
    """The fields of all events of a kind."""
    return [
      a.fields
      for a in self.done
      if isinstance(a, actions.Record) and a.kind == kind
    ]

  def of(self, kind):
    """All actions of a kind."""
    return [a for a in self.done if isinstance(a, kind)]

  def error(self):
    """The error that ended the run."""
    (one,) = self.of(actions.Fail)
    return one.error


def orders_in(done):
  """The orders to begin, by stage."""
  return {
    a.worker[0]: a.order
    for a in done
    if isinstance(a, actions.Send) and isinstance(a.order, orders.Go)
  }
