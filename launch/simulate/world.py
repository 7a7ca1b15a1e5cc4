"""The inputs of a simulation: pace, places, failures, a method. Values; pure.

Time is in seconds from the beginning of the run. *Completed* i means that
update i was done; the state after it is state i.
"""

from __future__ import annotations

import bisect
import dataclasses
import functools
import itertools
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Protocol

import numpy as np

# Share of an iteration; a time that near its end has reached it.
_ROUNDING = 1e-6
WAIT, SHRINK = 'wait', 'shrink'


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pace:
  """The durations of iterations while nothing fails.

  Attributes:
    iteration_seconds: seconds of an iteration without snapshots.
    extra_seconds: seconds by which a policy makes iterations longer; that of
      iteration i is number (i - 1) modulo their count.
  """

  iteration_seconds: float
  extra_seconds: tuple[float, ...] = (0.0,)

  @functools.cached_property
  def _sums(self) -> tuple[float, ...]:
    """Seconds of the first 0, 1, 2, ... iterations of a period."""
    each = (self.iteration_seconds + x for x in self.extra_seconds)
    return tuple(itertools.accumulate(each, initial=0.0))

  @property
  def overhead(self) -> float:
    """Extra seconds as a share of an iteration, on average."""
    extra = sum(self.extra_seconds) / len(self.extra_seconds)
    return extra / self.iteration_seconds

  def until(self, completed: int) -> float:
    """Returns the seconds from state 0 to state `completed`."""
    periods, rest = divmod(completed, len(self.extra_seconds))
    return periods * self._sums[-1] + self._sums[rest]

  def between(self, first: int, last: int) -> float:
    """Returns the seconds from one state to a later one."""
    return self.until(last) - self.until(first)

  def of(self, iteration: int) -> float:
    """Returns the seconds of one iteration."""
    extra = self.extra_seconds[(iteration - 1) % len(self.extra_seconds)]
    return self.iteration_seconds + extra

  def after(self, seconds: float) -> tuple[int, float]:
    """Returns how far a run gets from state 0: completed, and seconds since."""
    rounding = _ROUNDING * self.iteration_seconds
    periods, rest = divmod(seconds + rounding, self._sums[-1])
    place = bisect.bisect_right(self._sums, rest) - 1
    completed = int(periods) * len(self.extra_seconds) + place
    return completed, max(0.0, rest - self._sums[place] - rounding)


@dataclasses.dataclass(frozen=True, kw_only=True)
class World:
  """The places of workers, which lie on GPUs by stage, then by replica.

  Attributes:
    stages: stages of the pipeline.
    replicas: workers of each stage.
    expert_devices: GPUs of one worker.
    gpus_per_host: GPUs of one host.
    peers: number of hosts that hold copies of a host's snapshots: those that
      follow it.
    spare_hosts: number of hosts that can take a broken one's place at once.
    repair_seconds: seconds until a broken host is a spare one.
    on_no_spare: WAIT for a repair, or SHRINK: the stage's other replicas do the
      work, where there are any.
  """

  stages: int
  replicas: int = 1
  expert_devices: int = 1
  gpus_per_host: int = 1
  peers: int = 1
  spare_hosts: int = 1 << 30
  repair_seconds: float = math.inf
  on_no_spare: str = WAIT

  @property
  def gpus(self) -> int:
    """Number of GPUs that train."""
    return self.stages * self.replicas * self.expert_devices

  @property
  def hosts(self) -> int:
    """Number of hosts that train."""
    return -(-self.gpus // self.gpus_per_host)

  def host_of(self, gpu: int) -> int:
    """Returns the host that a GPU is in."""
    return gpu // self.gpus_per_host

  def workers_of(self, failure: Failure) -> frozenset[int]:
    """Returns the workers that die of a failure, numbered in order."""
    if not failure.whole_host:
      return frozenset({failure.gpu // self.expert_devices})
    first = self.host_of(failure.gpu) * self.gpus_per_host
    last = min(first + self.gpus_per_host, self.gpus)
    return frozenset(g // self.expert_devices for g in range(first, last))

  def hosts_of_stage(self, stage: int) -> range:
    """Returns the hosts that a stage's snapshots and logs are on."""
    gpus = self.replicas * self.expert_devices
    return range(
      self.host_of(stage * gpus), self.host_of((stage + 1) * gpus - 1) + 1
    )

  def has_copy(self, host: int, lost: frozenset[int]) -> bool:
    """Returns whether a host's snapshots outlive the stores of `lost` hosts."""
    places = range(host, host + self.peers + 1)
    return any(place % self.hosts not in lost for place in places)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Failure:
  """A failure of a GPU or a host.

  Attributes:
    gpu: the GPU that dies.
    whole_host: whether all GPUs of its host die, and what is in the host's
      memory is lost.
    needs_spare: whether its host has to be repaired.
  """

  gpu: int
  whole_host: bool = False
  needs_spare: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Moment:
  """A failure in a given iteration, when that is begun the first time.

  Attributes:
    iteration: the iteration in which it happens.
    fraction: share of the iteration that is done by then, in [0, 1).
    failure: the failure that happens.
  """

  iteration: int
  fraction: float
  failure: Failure


Failures = Iterable[tuple[float, Failure]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Situation:
  """The situation of a run at a failure, as a method is told it.

  Attributes:
    completed: last completed iteration; completed + 1 was interrupted.
    since_seconds: seconds that the run was in that one (at its pace).
    resumed_from: `completed` when the run last began or went on after a
      recovery: what was captured up to there had landed by then.
    failed: stages that lost a worker.
    recovering: by stage that is in a recovery, the iteration it replays.
    lost_hosts: hosts whose stores are lost.
    log_first: by stage, the first iteration that its log has, if not 1.
    line: the recovery line.
    pace: the run's pace.
    memory: the memory that the method asked to keep.
  """

  completed: int
  since_seconds: float
  resumed_from: int
  failed: frozenset[int]
  recovering: Mapping[int, int] = dataclasses.field(default_factory=dict)
  lost_hosts: frozenset[int] = frozenset()
  log_first: Mapping[int, int] = dataclasses.field(default_factory=dict)
  line: int = 0
  pace: Pace
  memory: Any = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recovery:
  """The recovery of a stage after a failure.

  Attributes:
    start: iteration from whose snapshot it goes on.
    fetch_seconds: seconds until it has the snapshots.
    replay_seconds: seconds from then until it is where the run was.
    applied_until: iteration up to which recorded gradients lead it; 0 if they
      do not.
  """

  start: int
  fetch_seconds: float
  replay_seconds: float
  applied_until: int = 0

  @property
  def known_until(self) -> int:
    """Iteration after which all is done again, and published again."""
    return max(self.start, self.applied_until)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outcome:
  """A method's answer to a failure.

  Attributes:
    completed: completed iteration with which training goes on: as before if
      only stages replay, less if everybody goes back.
    since_seconds: seconds of the interrupted iteration that are done by then:
      stages that only wait keep what they have of it.
    stages: recovery of each stage of the recovering set.
    lost_tokens: tokens whose training is lost for good, on average over
      experts.
    line: the recovery line.
    memory: the memory that the method asks to keep.
    pace: the run's pace from now on, if it changes.
  """

  completed: int
  since_seconds: float = 0.0
  stages: Mapping[int, Recovery]
  lost_tokens: float = 0.0
  line: int = 0
  memory: Any = None
  pace: Pace | None = None


class Method(Protocol):
  """A policy with its costs; a value."""

  @property
  def name(self) -> str:
    """The policy's name."""
    ...

  @property
  def label(self) -> str:
    """The policy and what it chose."""
    ...

  @property
  def pace(self) -> Pace:
    """The pace with which a run begins."""
    ...

  @property
  def detect_seconds(self) -> float:
    """Seconds from a death until it is known."""
    ...

  @property
  def start_seconds(self) -> float:
    """Seconds from then until what died is replaced and can read snapshots."""
    ...

  def recover(self, world: World, situation: Situation) -> Outcome:
    """Decides what a failure costs; pure."""
    ...


def poisson(
  source: np.random.Generator,
  world: World,
  *,
  mtbf_seconds: float,
  host_share: float = 0.0,
  hardware_share: float = 0.0,
) -> Iterator[tuple[float, Failure]]:
  """Yields failures without end: of random GPUs, at exponential intervals.

  Args:
    source: source of randomness.
    world: the world in which they happen.
    mtbf_seconds: mean time between failures of the whole job.
    host_share: share of failures that take the whole host along.
    hardware_share: share of failures after which the host has to be repaired.
  """
  seconds = 0.0
  while True:
    seconds += source.exponential(mtbf_seconds)
    yield seconds, draw(source, world, host_share, hardware_share)


def draw(
  source: np.random.Generator,
  world: World,
  host_share: float,
  hardware_share: float,
) -> Failure:
  """Draws one failure of a random GPU."""
  return Failure(
    gpu=int(source.integers(world.gpus)),
    whole_host=bool(source.random() < host_share),
    needs_spare=bool(source.random() < hardware_share),
  )
