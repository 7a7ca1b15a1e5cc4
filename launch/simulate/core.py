"""A discrete-event simulation of training under failures: the core, pure.

Training between two events follows a `Pace`, which says in closed form how far
it gets, so that only failures, recoveries and repairs cost time to simulate.
A `Method` (methods.py) says what a failure costs; it decides by the functions
that the system itself runs on.
"""

from __future__ import annotations

import collections
import dataclasses
import heapq
import itertools
import math
from collections.abc import Sequence
from typing import Any

from launch.simulate import world as world_lib
from moetion_jax import errors


@dataclasses.dataclass(frozen=True, kw_only=True)
class Result:
  """The result of a simulated run.

  Attributes:
    wall_seconds: seconds that it took.
    iterations: iterations that were done, the last one in part.
    useful_seconds: seconds that they take without snapshots and failures.
    overhead_seconds: seconds by which snapshots made them longer.
    degraded_seconds: seconds by which missing workers made them longer.
    failures: number of failures that happened.
    recovering_seconds: seconds with everybody waiting for a recovery.
    waited_for_repair_seconds: those of them without a spare.
    replayed_iterations: iterations done again, by stages and by everybody.
    lost_tokens: see `world.Outcome`.
    curve: (seconds, iterations) at all events; straight in between.
  """

  wall_seconds: float
  iterations: float
  useful_seconds: float
  overhead_seconds: float
  degraded_seconds: float
  failures: int
  recovering_seconds: float
  waited_for_repair_seconds: float
  replayed_iterations: int
  lost_tokens: float
  curve: tuple[tuple[float, float], ...]

  @property
  def ettr(self) -> float:
    """The effective training time ratio: useful time / all time."""
    return self.useful_seconds / self.wall_seconds

  @property
  def overhead(self) -> float:
    """Overhead of snapshots, as a share of useful time."""
    return self.overhead_seconds / max(self.useful_seconds, 1e-300)

  @property
  def recovery_seconds(self) -> float:
    """Seconds that failures cost: waiting, replay, lost iterations."""
    first_time = (
      self.useful_seconds + self.overhead_seconds + self.degraded_seconds
    )
    return max(0.0, self.wall_seconds - first_time)


def simulate(
  method: world_lib.Method,
  world: world_lib.World,
  failures: world_lib.Failures = (),
  *,
  moments: Sequence[world_lib.Moment] = (),
  horizon_seconds: float = math.inf,
  iterations: int | None = None,
) -> Result:
  """Simulates a run until its horizon, or until it has done its iterations.

  Args:
    method: the policy that answers failures.
    world: the world in which it runs.
    failures: failures by time, ascending; may be endless if there is a horizon.
    moments: failures by iteration, ascending.
    horizon_seconds: time at which to stop.
    iterations: number of iterations after which the run is done.

  Raises:
    ValueError: neither horizon nor iterations are given.
  """
  if horizon_seconds == math.inf and iterations is None:
    raise ValueError('a run needs an end')
  run = _Run(method, world, failures, moments)
  run.go(horizon_seconds, iterations)
  return run.result()


class _Run:
  """The state of a simulation; every change happens at an event."""

  def __init__(
    self,
    method: world_lib.Method,
    world: world_lib.World,
    failures: world_lib.Failures,
    moments: Sequence[world_lib.Moment],
  ):
    self._method, self._world = method, world
    self._failures, self._moments = iter(failures), list(moments)[::-1]
    self._order = itertools.count()
    self._events: list[tuple[float, int, str, Any]] = []
    self.now = 0.0
    self._pace = method.pace
    self._completed, self._since = 0, 0.0  # `_since`: seconds at the pace
    self._failed_since = 0.0  # `_since` when recovery began
    self._high = self._resumed_from = self._line = 0
    self._memory: Any = None
    self._recovering: dict[int, tuple[float, float, world_lib.Recovery]] = {}
    self._replaced_at: dict[int, float] = {}  # of stages that lost a worker
    self._generation = 0
    self._lost_hosts: frozenset[int] = frozenset()
    self._log_first: dict[int, int] = {}
    self._spares = world.spare_hosts
    self._broken: list[float] = []  # repair times of those nobody waits for
    self._missing: list[frozenset[int]] = []  # workers without a host
    self._first_time = self._degraded = self._lost_tokens = 0.0
    self._recovering_seconds = self._waited = 0.0
    self._count = self._replayed = 0
    self._curve = [(0.0, 0.0)]

  # -- time

  def go(self, horizon: float, iterations: int | None) -> None:
    self._push_failure()
    while True:
      time = min(self._events[0][0] if self._events else math.inf, horizon)
      done = moment = math.inf
      if not self._recovering:
        if iterations is not None:
          done = self.now + self._seconds_to(iterations, 0.0)
        if self._moments:
          next_moment = self._moments[-1]
          moment = self.now + self._seconds_to(
            next_moment.iteration - 1, next_moment.fraction
          )
      time = min(time, done, moment)
      self._advance(time)
      if time == done or time == horizon:
        break
      if time == moment:
        self._fail(self._moments.pop().failure)
        continue
      _, _, kind, value = heapq.heappop(self._events)
      if kind == 'failure':
        self._push_failure()
        self._fail(value)
      elif kind == 'recovered' and value == self._generation:
        self._recovered()
      elif kind == 'repaired':
        self._repaired()
    self._note()

  def _push(self, time: float, kind: str, value: Any) -> None:
    heapq.heappush(self._events, (time, next(self._order), kind, value))

  def _push_failure(self) -> None:
    if (following := next(self._failures, None)) is not None:
      self._push(following[0], 'failure', following[1])

  @property
  def _slowdown(self) -> float:
    """Factor by which missing workers make every iteration longer."""
    if not self._missing:
      return 1.0
    replicas = self._world.replicas
    gone = frozenset().union(*self._missing)
    stages = collections.Counter(w // replicas for w in gone)
    return replicas / (replicas - max(stages.values()))

  def _seconds_to(self, completed: int, fraction: float) -> float:
    """Returns the seconds from now on, at the present pace."""
    begun = fraction * self._pace.of(completed + 1)
    seconds = self._pace.between(self._completed, completed)
    return max(0.0, (seconds + begun - self._since) * self._slowdown)

  def _advance(self, time: float) -> None:
    seconds, self.now = time - self.now, time
    if self._recovering:
      self._recovering_seconds += seconds
      return
    slowdown = self._slowdown
    before = self._pace.until(self._completed) + self._since
    self._completed, self._since = self._pace.after(before + seconds / slowdown)
    if self._completed > self._high:
      new = self._pace.between(self._high, self._completed)
      self._first_time += new * slowdown
      self._degraded += new * (slowdown - 1)
      self._high = self._completed

  def _note(self) -> None:
    part = self._since / self._pace.of(self._completed + 1)
    self._curve.append((self.now, self._completed + part))

  # -- events

  def _fail(self, failure: world_lib.Failure) -> None:
    self._count += 1
    self._note()
    if not self._recovering:
      self._failed_since = self._since
    world = self._world
    workers = world.workers_of(failure)
    stages = frozenset(w // world.replicas for w in workers)
    if failure.whole_host:
      self._lost_hosts |= {world.host_of(failure.gpu)}
    wait = self._replace(workers) if failure.needs_spare else 0.0
    for stage in stages:
      self._replaced_at[stage] = max(
        self.now + wait, self._replaced_at.get(stage, 0.0)
      )
    outcome = self._method.recover(
      world,
      world_lib.Situation(
        completed=self._completed,
        since_seconds=self._failed_since,
        resumed_from=self._resumed_from,
        failed=stages,
        recovering={s: self._position(s) for s in self._recovering},
        lost_hosts=self._lost_hosts,
        log_first=self._log_first,
        line=self._line,
        pace=self._pace,
        memory=self._memory,
      ),
    )
    goes_back = outcome.completed < self._completed
    if goes_back:
      self._replayed += self._completed - outcome.completed
      self._recovering.clear()
      self._resumed_from, self._failed_since = outcome.completed, 0.0
      self._log_first = {}
    together = len(outcome.stages) == world.stages
    for stage, recovery in outcome.stages.items():
      replaced = self._replaced_at.get(stage, 0.0)
      if together:  # nobody begins before all are there
        replaced = max(self._replaced_at.values(), default=0.0)
      ready = max(self.now, replaced)
      ready += self._method.detect_seconds + self._method.start_seconds
      replay = ready + recovery.fetch_seconds
      end = replay + recovery.replay_seconds
      self._recovering[stage] = (replay, end, recovery)
    if not goes_back:
      self._replayed += max(
        (outcome.completed - r.known_until for r in outcome.stages.values()),
        default=0,
      )
    self._completed, self._since = outcome.completed, outcome.since_seconds
    self._line, self._memory = outcome.line, outcome.memory
    self._lost_tokens += outcome.lost_tokens
    self._pace = outcome.pace or self._pace
    self._waited += wait
    self._generation += 1
    end = max((e for _, e, _ in self._recovering.values()), default=self.now)
    self._push(end, 'recovered', self._generation)

  def _position(self, stage: int) -> int:
    """Returns the iteration that a stage replays now."""
    replay, end, recovery = self._recovering[stage]
    if self.now >= end:
      return self._completed + 1
    if self.now <= replay:
      return recovery.known_until + 1
    share = (self.now - replay) / (end - replay)
    count = self._completed - recovery.known_until
    return recovery.known_until + 1 + int(share * count)

  def _replace(self, workers: frozenset[int]) -> float:
    """Takes a spare host; returns the seconds to wait for one."""
    world = self._world
    if self._spares > 0:
      self._spares -= 1
      self._push_repair(frozenset())
      return 0.0
    if world.on_no_spare == world_lib.SHRINK and self._can_shrink(workers):
      self._push_repair(workers)
      return 0.0
    self._push_repair(frozenset())
    first = heapq.heappop(self._broken)
    if first == math.inf:
      raise errors.ConfigError(
        'spare_hosts', world.spare_hosts, 'ran out, and nothing is repaired'
      )
    self._spares -= 1  # it is spoken for
    return first - self.now

  def _can_shrink(self, workers: frozenset[int]) -> bool:
    replicas = self._world.replicas
    gone = frozenset(workers).union(*self._missing)
    stages = {w // replicas for w in workers}
    return all(sum(w // replicas == s for w in gone) < replicas for s in stages)

  def _push_repair(self, workers: frozenset[int]) -> None:
    time = self.now + self._world.repair_seconds
    heapq.heappush(self._broken, time)
    if workers:
      self._missing.append(workers)
    if time < math.inf:
      self._push(time, 'repaired', None)

  def _repaired(self) -> None:
    """Makes a host a spare one, unless it is waited for or workers lack one."""
    if self._broken and self._broken[0] <= self.now:
      heapq.heappop(self._broken)
    if self._spares >= 0 and self._missing:
      del self._missing[0]
    else:
      self._spares += 1

  def _recovered(self) -> None:
    # A stage that replayed has published again what its host's death took.
    for stage, (_, _, recovery) in self._recovering.items():
      if any(h in self._lost_hosts for h in self._world.hosts_of_stage(stage)):
        self._log_first[stage] = recovery.known_until + 1
    self._recovering.clear()
    self._replaced_at.clear()
    self._lost_hosts = frozenset()
    self._resumed_from = self._completed
    self._note()

  # -- result

  def result(self) -> Result:
    pace = self._pace
    useful = self._high * pace.iteration_seconds
    first_time, degraded = self._first_time, self._degraded
    iterations = float(self._high)
    if self._completed == self._high:
      part = self._since / pace.of(self._completed + 1)
      iterations += part
      useful += part * pace.iteration_seconds
      first_time += self._since * self._slowdown
      degraded += self._since * (self._slowdown - 1)
    return Result(
      wall_seconds=self.now,
      iterations=iterations,
      useful_seconds=useful,
      overhead_seconds=max(0.0, first_time - degraded - useful),
      degraded_seconds=degraded,
      failures=self._count,
      recovering_seconds=self._recovering_seconds,
      waited_for_repair_seconds=self._waited,
      replayed_iterations=self._replayed,
      lost_tokens=self._lost_tokens,
      curve=tuple(self._curve),
    )
