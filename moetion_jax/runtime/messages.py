"""What an agent and its workers tell each other: JSON, one object a line.

A worker gets its `Spec` on stdin, the agent of a further host its `HostSpec`;
then:

  worker -> agent (`kind` and fields)
    warm      a standby is prepared
    ready     it is known to be able to train: `device`, `platform`,
              `lowering_platform` (`programs.platform_of`),
              `state_bytes`, `operators` (`capture_plan.StageSizes`),
              `software`, `data_fingerprint`
    state     what it does now, a few times a second: `state`, `detail`,
              `iteration`, `steps` (a count of what it did)
    resumed   it trains from now on: `first_iteration`, `start_seconds` (up to
              its programs), `fetch_seconds` (its state)
    caught_up the iteration in which its predecessor died is done: `iteration`
    stored    a snapshot counts: `share` (`inventory.share_from_json`)
    report    an iteration is done: `report` (`report.Report.to_json`)
    answer    to a proposal: `limit`, `begun`
    done      the loop ended: `iteration`
    rolled_back  it has stopped, as it was told, and waits for `go`
    handed_over, saved
    fault     a scripted fault happens now: `number`, `at` (`time.monotonic`)
    refused   a setting is wrong: `flag`, `value`, `reason`
    failed    the worker ends now: `error`, `iteration`; `final`: done again it
              would come to the same end; `suspects`: iterations of snapshots
              that may be damaged; `corrupt`: stage and iteration of an entry
              that is, or null
  agent -> worker
    promote   a standby becomes a worker: `spec`, `environment`
    locations where every stage's entries are: `locations`, a list of `stage`,
              `replica`, `host`, `address`, `generation`; again when it changed
    go        train, once the programs are compiled: `go` (`Go`)
    roll_back stop where you are, and keep process and programs: another `go`
              follows; never before the first one
    line      the recovery line: `iteration`; older things may be let go of
    decide    what is captured from now on: `decision` (`decision.CaptureDecision`)
    propose   wait after iteration `limit` until more is said
    commit    end after iteration `limit`
    hand_over put the training state into the store folder
    save      write everyone's state as the final checkpoint: `path`,
              `iteration`, `replicas` (of each stage, those that have put it)
    exit
  further host's agent -> leader
    serving   its store is open: `address` of its server
    started   a worker: `stage`, `pid`
    said      by a worker: `stage`, `message`
    printed   by a worker: `stage`, `line`
    exited    a worker, after its last word: `stage`, `exit_code`
    refused, failed: the host cannot be used: as of a worker
  leader -> further host's agent
    start     a worker: `stage`, `generation`, `spec`, `environment`
    tell      a worker: `stage`, `message`
    kill      a worker: `stage`
    exit      once all workers are gone: `keep` the store or remove it
"""

from __future__ import annotations

import dataclasses
import json
import os
from typing import Any

from launch.lm import settings as run_settings
from moetion_jax.runtime import faults as faults_lib

Message = dict[str, Any]

STANDBY = -1  # a stage's number that stands for none


@dataclasses.dataclass(frozen=True, kw_only=True)
class Spec:
  """What a worker process is told when it starts.

  Attributes:
    config: of the run.
    stage: that the worker trains; STANDBY for none yet.
    replica: of the stage.
    generation: of the worker.
    world: address of the stage world's coordinator; '' for a worker alone, and
      for a standby that joins none ahead.
    team: the replicas that the stage's workers are, in the order of the world.
    stands_for: replicas without a worker, whose microbatches this one does.
    agent_pid: of the process whose death is the worker's.
    cores: on which the worker runs; empty for wherever it likes.
    compilation_cache_dir: see `runtime.configure`.
    folder: the store folder of the worker's host.
    durable_folder: in which snapshots lie that are on disk; '' for none.
    handover_folder: the leader's store folder, into which everyone puts the
      final state. So a host of `--local_hosts` is on the leader's machine.
    host: name of the worker's host in the location map.
    secret: of the job, in hex; '' where all stages share one host.
    platform: as `programs.platform_of` calls it, where it is known; for a
      standby.
    full_seconds: how long the log waits for room before the run ends.
    grows_capacity: whether a `Go` may have a `capacity`.
    faults: that it has to do (`faults.Fault`).
    status_fd: to which the worker writes.
    control_fd: from which it reads.
  """

  config: run_settings.RunConfig
  stage: int
  replica: int = 0
  generation: int
  world: str = ''
  team: tuple[int, ...] = (0,)
  stands_for: tuple[int, ...] = ()
  agent_pid: int
  cores: tuple[int, ...]
  compilation_cache_dir: str
  folder: str
  durable_folder: str = ''
  handover_folder: str
  host: str
  secret: str = dataclasses.field(repr=False)
  platform: str
  full_seconds: float
  is_replacement: bool = False
  grows_capacity: bool = False
  faults: tuple[faults_lib.Fault, ...] = ()
  status_fd: int
  control_fd: int

  @property
  def loads_ahead(self) -> bool:
    """Whether a standby has a backend, and loads its programs.

    On an accelerator it would take memory from the workers; and the threads of
    a backend on CPU are as many as the cores that it may use by then.
    """
    return self.platform == 'cpu' and bool(self.cores)

  def to_json(self) -> Message:
    """Plain dicts; `from_json` is the inverse."""
    return dataclasses.asdict(self)

  @classmethod
  def from_json(cls, value: Message) -> Spec:
    """The inverse of `to_json`."""
    return cls(
      **{
        **value,
        'config': run_settings.RunConfig.from_json(value['config']),
        'cores': tuple(value['cores']),
        'team': tuple(value['team']),
        'stands_for': tuple(value['stands_for']),
        'faults': tuple(faults_lib.Fault(**x) for x in value['faults']),
      }
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class HostSpec:
  """What the agent of a further host is told when it starts.

  Attributes:
    name: of the host in the location map.
    run_id: of its store folder.
    hostmem_dir: in which that lies.
    secret: of the job, in hex.
    agent_pid: of the leader, whose death is this process's.
    lock_fds: locks that it holds and hands on to its workers.
    status_fd: to which it writes.
    control_fd: from which it reads.
  """

  name: str
  run_id: str
  hostmem_dir: str
  secret: str = dataclasses.field(repr=False)
  agent_pid: int
  lock_fds: tuple[int, ...]
  status_fd: int
  control_fd: int

  def to_json(self) -> Message:
    """Plain dicts; `from_json` is the inverse."""
    return dataclasses.asdict(self)

  @classmethod
  def from_json(cls, value: Message) -> HostSpec:
    """The inverse of `to_json`."""
    return cls(**{**value, 'lock_fds': tuple(value['lock_fds'])})


def write(fd: int, data: bytes) -> None:
  """Writes all of `data` to a blocking pipe, whatever interrupts."""
  while data:
    data = data[os.write(fd, data) :]


def encode(kind: str, **fields: Any) -> bytes:
  """One message as a line."""
  return json.dumps({'kind': kind, **fields}).encode() + b'\n'


class Lines:
  """Puts the lines together that a pipe delivers in pieces."""

  def __init__(self):
    """Nothing came yet."""
    self._rest = b''

  def feed(self, data: bytes) -> list[bytes]:
    """The lines that `data` completes, without their ends."""
    *lines, self._rest = (self._rest + data).split(b'\n')
    return lines

  def flush(self) -> list[bytes]:
    """What stands after the last line end, when nothing more comes."""
    rest, self._rest = self._rest, b''
    return [rest] if rest else []
