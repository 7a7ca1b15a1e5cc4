"""Messages between an agent and its workers: JSON, one object a line.

A worker gets its `Spec` on stdin, the agent of a further host its `HostSpec`;
then:

  worker -> agent (`kind` and fields)
    warm      a standby is prepared
    ready     the worker is able to train: `device`, `platform`,
              `lowering_platform` (`compilation.platform_of`),
              `state_bytes`, `operators` (`planner.StageSizes`),
              `environment` (`environment.Record`), `data_fingerprint`
    state     what it does now, a few times a second: `state`, `detail`,
              `iteration`, `steps` (a count of what it did)
    resumed   it trains from now on: `first_iteration`, `start_seconds` (up to
              its programs), `fetch_seconds` (its state)
    caught_up the iteration in which its predecessor died is done: `iteration`
    stored    a snapshot counts: `share` (`folders.share_from_json`)
    report    an iteration is done: `report` (`report.Report.to_json`)
    answer    the reply to `propose`: `limit`, `begun`
    done      the loop ended: `iteration`
    stopped_here  it has stopped, as it was told, and waits for `go`
    handed_over, saved: what `hand_over` or `save` asked for is done
    damaged   not saved: what a worker handed over is not what it had: `stage`
              and `replica` of that worker, `what`; `is_sent_so`: that is what
              it sent (`final_state.DamagedError`)
    rewritten the checkpoint was read back damaged, and is written once more:
              `what`
    fault     a scripted fault happens now: `number`, `at` (`time.monotonic`)
    refused   a setting is wrong: `flag`, `value`, `reason`
    failed    the worker ends now: `error`, `iteration`; `advice`: what to do
              if no damage explains it, or ''; `final`: another
              attempt would end the same way; `suspects`: iterations of
              snapshots that may be damaged; `corrupt`: stage and iteration of
              a damaged log entry, or null; `has_wrong_bits`: a damaged log
              entry may be the cause, though nobody found it
  agent -> worker
    promote   a standby becomes a worker: `spec`, `environment`
    locations where every stage's entries are: `locations`, a list of `stage`,
              `replica`, `host`, `address`, `generation`; sent again on a change
    go        train, once the programs are compiled: `go` (`orders.Go`)
    stop_here stop where you are, and keep process and programs: another `go`
              follows; never sent before the first `go`
    line      the recovery line: `iteration`; older things may be let go of
    decide    what is captured from now on: `decision`
              (`decision.CaptureDecision`)
    propose   wait after iteration `limit` until more is said
    commit    end after iteration `limit`
    hand_over put the training state into the store folder
    save      write everyone's state as the final checkpoint: `path`,
              `iteration`, `digest` (as in metrics.jsonl), `replicas` (per
              stage, those that have put theirs)
    exit      end
  further host's agent -> leader
    serving   its store is open: `address` of its server
    started   a worker runs: `stage`, `pid`
    said      a worker's message: `stage`, `message`
    printed   a line that a worker printed: `stage`, `line`
    exited    a worker, after its last word: `stage`, `exit_code`
    refused, failed: the host cannot be used; fields as from a worker
  leader -> further host's agent
    start     start a worker: `stage`, `generation`, `spec`, `environment`
    tell      pass a message on to a worker: `stage`, `message`
    kill      kill a worker: `stage`
    exit      end once all workers are gone: `keep` the store or remove it
"""

from __future__ import annotations

import dataclasses
import json
import os
from typing import Any

from moetion_jax import job_spec
from moetion_jax.runtime import (
  environment as environment_lib,
  faults as faults_lib,
)

Message = dict[str, Any]

STANDBY = -1  # the stage number of a process that has no stage yet


@dataclasses.dataclass(frozen=True, kw_only=True)
class Spec:
  """Everything that a worker process is told when it starts.

  Attributes:
    job: the run's job.
    stage: the stage that the worker trains; STANDBY for none yet.
    replica: the worker's replica of the stage.
    generation: the worker's generation.
    world: address of the stage world's coordinator; '' for a worker alone, and
      for a standby that joins no world ahead.
    team: the replicas of the stage that have a worker, in the world's order.
    stands_for: replicas without a worker, whose microbatches this worker does.
    agent_pid: pid of the process with which the worker dies.
    cores: the cores on which the worker runs; empty for any.
    compilation_cache_dir: see `xla_setup.configure`.
    folder: the store folder of the worker's host.
    durable_folder: the folder of snapshots on disk; '' for none.
    handover_folder: the leader's store folder, into which everyone puts the
      final state. So a host of `--local_hosts` is on the leader's machine.
    host: name of the worker's host in the location map.
    secret: the job's secret, in hex; '' where all stages share one host.
    platform: for a standby, the platform as named by `compilation.platform_of`,
      where it is known.
    full_seconds: seconds that the log waits for room before the run ends.
    is_replacement: whether the run had begun before this worker.
    grows_capacity: whether an `orders.Go` may have a `capacity`.
    environment: the record that the worker's own must equal, see
      `environment.check_replacement`; {} for any.
    faults: the scripted faults that the worker performs.
    status_fd: the descriptor to which the worker writes.
    control_fd: the descriptor from which the worker reads.
  """

  job: job_spec.JobSpec
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
  environment: environment_lib.Record = dataclasses.field(default_factory=dict)
  faults: tuple[faults_lib.Fault, ...] = ()
  status_fd: int
  control_fd: int

  @property
  def loads_ahead(self) -> bool:
    """True if a standby creates a backend and loads its programs.

    On an accelerator it would take memory from the workers; and a backend on
    CPU has as many threads as cores that it may use at its creation.
    """
    return self.platform == 'cpu' and bool(self.cores)

  def to_json(self) -> Message:
    """Returns plain dicts; `from_json` is the inverse."""
    return dataclasses.asdict(self)

  @classmethod
  def from_json(cls, value: Message) -> Spec:
    """Inverts `to_json`."""
    return cls(
      **{
        **value,
        'job': job_spec.JobSpec(**value['job']),
        'cores': tuple(value['cores']),
        'team': tuple(value['team']),
        'stands_for': tuple(value['stands_for']),
        'faults': tuple(faults_lib.Fault(**x) for x in value['faults']),
      }
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class HostSpec:
  """Everything that the agent of a further host is told when it starts.

  Attributes:
    name: the host's name in the location map.
    run_id: the name of its store folder.
    hostmem_dir: the directory of that folder.
    workdir: the run's workdir, absolute, for the folder's owner file.
    secret: the job's secret, in hex.
    agent_pid: pid of the leader, with which this process dies.
    lock_fds: descriptors of locks that it holds and hands on to its workers.
    status_fd: the descriptor to which it writes.
    control_fd: the descriptor from which it reads.
  """

  name: str
  run_id: str
  hostmem_dir: str
  workdir: str
  secret: str = dataclasses.field(repr=False)
  agent_pid: int
  lock_fds: tuple[int, ...]
  status_fd: int
  control_fd: int

  def to_json(self) -> Message:
    """Returns plain dicts; `from_json` is the inverse."""
    return dataclasses.asdict(self)

  @classmethod
  def from_json(cls, value: Message) -> HostSpec:
    """Inverts `to_json`."""
    return cls(**{**value, 'lock_fds': tuple(value['lock_fds'])})


def write(fd: int, data: bytes) -> None:
  """Writes all of `data` to a blocking pipe, whatever interrupts it."""
  while data:
    data = data[os.write(fd, data) :]


def encode(kind: str, **fields: Any) -> bytes:
  """Encodes one message as a line."""
  return json.dumps({'kind': kind, **fields}).encode() + b'\n'


class Lines:
  """Joins the pieces that a pipe delivers into lines."""

  def __init__(self):
    """Starts with no data."""
    self._rest = b''

  def feed(self, data: bytes) -> list[bytes]:
    """Returns the lines that `data` completes, without their ends."""
    *lines, self._rest = (self._rest + data).split(b'\n')
    return lines

  def flush(self) -> list[bytes]:
    """Returns the unfinished last line, if any; call after the last data."""
    rest, self._rest = self._rest, b''
    return [rest] if rest else []
