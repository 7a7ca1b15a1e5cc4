"""What an agent and its workers tell each other: JSON, one object a line.

A worker gets its `Spec` on stdin, then:

  worker -> agent (`kind` and fields)
    ready     it is known to be able to train: `device`, `platform`,
              `state_bytes`, `software`, `data_fingerprint`
    state     what it does now: `state`, `detail`, `iteration`
    report    an iteration is done: `report` (`report.Report.to_json`)
    answer    to a proposal: `limit`, `begun`
    done      the loop ended: `iteration`
    handed_over, saved
    refused   a setting is wrong: `flag`, `value`, `reason`
    failed    the worker ends now: `error`, `iteration`
  agent -> worker
    go        train, once the programs are compiled
    propose   wait after iteration `limit` until more is said
    commit    end after iteration `limit`
    hand_over put the training state into the store folder
    save      write everyone's state as the final checkpoint: `path`,
              `iteration`
    exit

No JAX here: the agent uses this module and never creates a JAX backend.
"""

from __future__ import annotations

import dataclasses
import json
from typing import Any

from launch import settings

Message = dict[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Spec:
  """What a worker process is told when it starts.

  Attributes:
    config: of the run.
    stage: that the worker trains.
    generation: of the worker.
    agent_pid: of the process whose death is the worker's.
    cores: on which the worker runs; empty for wherever it likes.
    compilation_cache_dir: see `runtime.configure`.
    folder: the store folder.
    ring_bytes: size of the worker's log.
    slots: entries of the worker's log.
    log_iterations: of how many iterations the log keeps the entries.
    status_fd: to which the worker writes.
    control_fd: from which it reads.
  """

  config: settings.RunConfig
  stage: int
  generation: int
  agent_pid: int
  cores: tuple[int, ...]
  compilation_cache_dir: str
  folder: str
  ring_bytes: int
  slots: int
  log_iterations: int
  status_fd: int
  control_fd: int

  def to_json(self) -> Message:
    """Plain dicts; `from_json` is the inverse."""
    return dataclasses.asdict(self)

  @classmethod
  def from_json(cls, value: Message) -> Spec:
    """The inverse of `to_json`."""
    return cls(
      **{
        **value,
        'config': settings.RunConfig.from_json(value['config']),
        'cores': tuple(value['cores']),
      }
    )


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
