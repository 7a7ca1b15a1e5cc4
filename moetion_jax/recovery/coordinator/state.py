"""The state of the coordinator: what it was told, and what it has decided."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Generator
from typing import Any, TypeVar

from moetion_jax import config, job_spec
from moetion_jax.hostmem import segment_check
from moetion_jax.logs import size
from moetion_jax.policies import (
  decision as decision_lib,
  planner as planner_lib,
  settings as capture_settings,
)
from moetion_jax.recovery import (
  actions,
  events,
  failures as failures_lib,
  hang_detection,
  inventory as inventory_lib,
  notices,
  stopping,
)

# The longest time between two events that counts as watched.
_UNWATCHED_SECONDS = 1.0

T = TypeVar('T')
# What may ask: it yields questions, is sent their answers, and returns a T.
Asking = Generator[actions.Question, Any, T]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
  """Facts of a run that the coordinator has to know.

  Attributes:
    job: the run's job.
    captures: the settings of how snapshots are taken.
    max_failures: failures of one stage, without progress, that the run bears.
    max_skipped: updates in a row that may be left out as not finite.
    hang_timeout_seconds: seconds after which a program that runs hangs.
    full_seconds: seconds that a full log waits before the run ends.
    shrinks: whether a stage goes on without a worker that has no successor.
    max_workers: the number of processes that may become workers; 0: any.
    grow_after: iterations after which a shrunk stage gets its workers back; 0:
      never.
    warms_standbys: whether standbys are kept.
    workdir: the run's folder, for people.
    snapshots: the names of the folders of snapshots, for people.
  """

  job: job_spec.JobSpec
  captures: capture_settings.CaptureSettings
  max_failures: int = 3
  max_skipped: int = 10
  hang_timeout_seconds: float = 600.0
  full_seconds: float = 60.0
  shrinks: bool = False
  max_workers: int = 0
  grow_after: int = 0
  warms_standbys: bool = False
  workdir: str = ''
  snapshots: str = ''


@dataclasses.dataclass(kw_only=True)
class Worker(hang_detection.Seen):
  """A worker, as far as its messages tell.

  Attributes:
    generation: its generation.
    steps: a count of what it did.
    iteration: the iteration that it works on.
    reason: why it has to be killed; '' for no reason.
    hangs: whether that is because it hangs.
    suspects: iterations of snapshots that it found to be damaged.
    corrupt: stage and iteration of a log entry that it found to be damaged.
    is_unmet: whether its world did not come together.
    usage: what it used of its machine when it was found to be quiet; None while
      it speaks.
    usage_at: the time of that.
    has_caught_up: whether it has caught up with its predecessor, if any.
    is_idle: whether it has nothing to do until it is told to go.
    is_going_back: whether it was told to stop, and has not said that it did.
    fault_at: time of its scripted fault; None without one.
  """

  generation: int
  steps: int = 0
  iteration: int = 0
  reason: str = ''
  hangs: bool = False
  suspects: tuple[int, ...] = ()
  corrupt: tuple[int, int] | None = None
  is_unmet: bool = False
  usage: hang_detection.Usage | None = None
  usage_at: float = 0.0
  has_caught_up: bool = False
  is_idle: bool = True
  is_going_back: bool = False
  fault_at: float | None = None

  @property
  def name(self) -> events.Name:
    """Its name in events and actions."""
    return self.stage, self.replica

  def heard(self, watched: float) -> None:
    """Takes in that it speaks, after so many seconds that were watched."""
    self.heard_at, self.usage, self.is_starved = watched, None, False

  def uses(self, usage: hang_detection.Usage, now: float) -> None:
    """Takes in what it uses of its machine, since it is quiet."""
    if self.usage is None:
      self.usage, self.usage_at = usage, now
    self.is_starved = hang_detection.is_starved(
      self.usage, usage, now - self.usage_at
    )

  def reached(self, iteration: int) -> None:
    """Takes in that it has begun an iteration, if that is news."""
    self.iteration = max(self.iteration, iteration)


@dataclasses.dataclass(kw_only=True)
class State:
  """The part of the state that there is from the start on.

  Attributes:
    settings: the settings.
    out: the actions that are to be returned.
    now: the time.
    watched: seconds in which it was seen what happens, see `tick`.
    away: the agent of another host that is stopped, for people; '' for none.
    away_seconds: seconds in which it was seen that it is.
    crew: by stage, the workers by replica.
    started: the number of workers that were started.
    signals: how often the user asked to stop.
    has_ended: whether the end of the run is decided.
  """

  settings: Settings
  out: list[actions.Action] = dataclasses.field(default_factory=list)
  now: float = 0.0
  watched: float = 0.0
  away: str = ''
  away_seconds: float = 0.0
  crew: list[dict[int, Worker]] = dataclasses.field(default_factory=list)
  started: int = 0
  signals: int = 0
  has_ended: bool = False

  def tick(self, now: float) -> None:
    """Takes in the time.

    An agent looks several times a second. If it says nothing for longer, it was
    stopped, or the machine gave it no time: then workers that it did not hear
    were not silent, and those of the same machine had no time either. So it is
    while the agent of another host is stopped: nobody hears its workers, and
    the others may wait for what it serves.

    Args:
      now: the time, in seconds.
    """
    seconds = min(now - self.now, _UNWATCHED_SECONDS)
    self.now = now
    if self.away:
      self.away_seconds += seconds
    else:
      self.watched += seconds

  def do(self, action: actions.Action) -> None:
    """Has something done, after all that was decided before."""
    self.out.append(action)

  def note(self, text: str) -> None:
    """Shows a line to the user."""
    self.do(actions.Note(text=text))

  def record(self, kind: str, **fields: object) -> None:
    """Writes an event."""
    self.do(actions.Record(kind=kind, fields=fields))

  @property
  def train(self) -> config.TrainConfig:
    """Settings of the training and of its spread."""
    return self.settings.job.train

  @property
  def stages(self) -> range:
    """The numbers of all stages."""
    return range(self.train.stages)

  def log_size(self, stage: int) -> size.LogSize:
    """Returns the size of a stage's log: what the line keeps, and some more."""
    kept_iterations = self.settings.captures.kept_iterations
    return size.log_size(self.settings.job, stage, kept_iterations)

  @property
  def workers(self) -> list[Worker]:
    """All workers, by stage, then replica."""
    return [worker for team in self.crew for worker in team.values()]

  def worker(self, name: events.Name) -> Worker:
    """Returns a worker by its name."""
    stage, replica = name
    return self.crew[stage][replica]

  def name_of(self, worker: Worker) -> str:
    """Returns a worker's name for people."""
    of_replica = f' replica {worker.replica}'
    return f'stage {worker.stage}{of_replica * (self.train.replicas > 1)}'

  def team(self, stage: int) -> tuple[int, ...]:
    """Returns the replicas of a stage that have a worker."""
    return tuple(self.crew[stage])

  def begun(self, stage: int) -> int:
    """Returns the newest iteration that a stage's workers have begun."""
    return max(worker.iteration for worker in self.crew[stage].values())

  def start(self, start: actions.Replace) -> None:
    """Starts workers of a stage, in the place of those that it has."""
    self.do(start)
    self.started += len(start.team)
    self.crew[start.stage] = {
      replica: Worker(
        stage=start.stage,
        replica=replica,
        generation=start.generation,
        heard_at=self.watched,
        state_since=self.watched,
      )
      for replica in start.team
    }

  def replace(
    self, stage: int, team: tuple[int, ...] = (), *, has_begun: bool = True
  ) -> None:
    """Replaces a stage's workers; `team`: those that it has then, () as now."""
    generation = max(w.generation for w in self.crew[stage].values()) + 1
    self.start(
      actions.Replace(
        stage=stage,
        team=team or self.team(stage),
        generation=generation,
        begun=self.begun(stage),
        has_begun=has_begun,
      )
    )

  def kill(self, worker: Worker, reason: str, *, hangs: bool = False) -> None:
    """Ends a worker, which is then a death like others."""
    worker.reason, worker.hangs = reason, hangs
    self.do(actions.Kill(worker=worker.name))

  def describe(self, worker: Worker, death: events.Died) -> str:
    """Says how a worker died, and what it was doing."""
    what = f'the worker (pid {death.pid}) {worker.reason or death.how}'
    if self.train.replicas > 1:
      what = f'replica {worker.replica}: {what}'
    if worker.reason:
      return what
    is_waiting = worker.state is hang_detection.WorkerState.WAITING
    doing = 'waiting for' if is_waiting else worker.state
    return f'{what} while {doing} {worker.detail}'.rstrip()


@dataclasses.dataclass(kw_only=True)
class Beginning(State):
  """The state until all workers can train.

  Attributes:
    ready: what the workers said that can.
    deaths: the number of deaths.
    unmet: the number of those that are no failures, see `Worker.is_unmet`.
  """

  ready: dict[events.Name, notices.Ready] = dataclasses.field(
    default_factory=dict
  )
  deaths: int = 0
  unmet: int = 0


@dataclasses.dataclass(kw_only=True)
class Rollback:
  """All stages go back together, once nobody works any more.

  Attributes:
    trusted: the newest state that is made of nothing damaged; None: every one.
    failed: by stage of which a worker died, the reason.
    newest: the iteration that each stage had begun.
    failed_at: time at which the first death was noticed.
    detect_seconds: time between the failure and that, where known.
  """

  trusted: int | None = None
  failed: dict[int, str] = dataclasses.field(default_factory=dict)
  newest: collections.Counter[int] = dataclasses.field(
    default_factory=collections.Counter
  )
  failed_at: float = 0.0
  detect_seconds: float = 0.0


@dataclasses.dataclass(kw_only=True)
class Run(State):
  """The state of a run whose workers train.

  Attributes:
    lowering_platform: the platform for which programs are lowered.
    planner: decides what is captured.
    inventory: what the stores hold, and the recovery line.
    failures: counts failures.
    decisions: by stage, what is captured, in order, from the line on.
    recorded: the newest iteration that all stages reported and that is written.
    replays_until: the newest iteration that had begun before this start.
    loss: what the last recovery lost; None for nothing.
    trained: the stages of which a worker began to train.
    recoveries: the stages on their way back.
    unbegun: who was told to begin its log anew, and has not said that it did.
    rollback: what all stages go back for.
    dropped: damaged entries that were written again; readers may be wrong.
    shrunk_at: by stage without all of its workers, the iteration since when.
    stop: when to stop, as all workers were told; None: at the end.
    answers: what they answered to that.
    done: who has trained to the end.
    asked: who was asked for its state.
    handed_over: who has put it into the store.
    damaged: how often that arrived damaged.
  """

  lowering_platform: str
  planner: planner_lib.Planner
  inventory: inventory_lib.Inventory
  failures: failures_lib.Failures
  decisions: list[list[decision_lib.CaptureDecision]] = dataclasses.field(
    default_factory=list
  )
  recorded: int = 0
  replays_until: int = 0
  loss: planner_lib.Loss | None = None
  trained: set[int] = dataclasses.field(default_factory=set)
  recoveries: dict[int, failures_lib.OngoingRecovery] = dataclasses.field(
    default_factory=dict
  )
  unbegun: set[events.Name] = dataclasses.field(default_factory=set)
  rollback: Rollback = dataclasses.field(default_factory=Rollback)
  dropped: list[segment_check.Damage] = dataclasses.field(default_factory=list)
  shrunk_at: dict[int, int] = dataclasses.field(default_factory=dict)
  stop: stopping.StopDecision | None = None
  answers: dict[events.Name, int] = dataclasses.field(default_factory=dict)
  done: set[events.Name] = dataclasses.field(default_factory=set)
  asked: set[events.Name] = dataclasses.field(default_factory=set)
  handed_over: set[events.Name] = dataclasses.field(default_factory=set)
  damaged: collections.Counter[events.Name] = dataclasses.field(
    default_factory=collections.Counter
  )

  @property
  def line(self) -> int:
    """The recovery line."""
    return self.inventory.line

  def scan(self, stages: tuple[int, ...] = ()) -> Asking[events.Scanned]:
    """Takes in what the stores hold of stages; (): of all."""
    found = yield actions.Scan(stages=stages or tuple(self.stages))
    for stage, shares in found.shares.items():
      self.inventory.rescan(stage, shares)
    return found

  def forget_after(self, iteration: int, *, is_replanned: bool = False) -> None:
    """Drops what is written of later iterations; they are done again."""
    self.recorded = min(self.recorded, iteration)
    self.do(actions.ForgetAfter(iteration=iteration, is_replanned=is_replanned))

  def forget_snapshots(self) -> None:
    """Removes all snapshots, since all stages begin anew."""
    self.do(actions.ForgetSnapshots(stages=tuple(self.stages)))
    for stage in self.stages:
      self.inventory.rescan(stage, ())
