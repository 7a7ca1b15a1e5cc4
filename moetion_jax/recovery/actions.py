"""Actions: all that the coordinator ever has done, as plain values.

They are done in order. A `Question` is the last one of its list, and its answer
is the next event.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from moetion_jax import errors, keys, report as report_lib
from moetion_jax.recovery import events, notices, orders, splice as splice_lib


class Action:
  """Something to do."""


class Question(Action):
  """Something to do that has an answer, one of `events`."""


# ---- processes ---------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class Open(Action):
  """Start the agents of further hosts."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Replace(Action):
  """End a stage's workers, if it has any, and start the next generation.

  Attributes:
    stage: the stage.
    team: the replicas that have a worker from now on.
    generation: the new workers' generation.
    begun: the iteration that the old ones had begun; 0 for none.
    has_begun: whether the run has begun.
  """

  stage: int
  team: tuple[int, ...]
  generation: int
  begun: int = 0
  has_begun: bool = True


@dataclasses.dataclass(frozen=True, kw_only=True)
class Kill(Action):
  """End a worker's process; `events.Died` follows."""

  worker: events.Name


@dataclasses.dataclass(frozen=True, kw_only=True)
class Send(Action):
  """Tell a worker something."""

  worker: events.Name
  order: orders.Order


@dataclasses.dataclass(frozen=True, kw_only=True)
class Locate(Action):
  """Tell all workers where all entries are, if they have several hosts.

  Attributes:
    generations: the generation of every worker.
  """

  generations: Mapping[events.Name, int]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Warm(Action):
  """Start the standbys that are missing, for programs of a platform."""

  platform: str


# ---- stores ------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckRoom(Action):
  """End the run if host memory has no room for so much."""

  needed_bytes: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Keep(Action):
  """Keep the stores, or not, whatever ends the run from now on."""

  keeps: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class MakeStores(Action):
  """Make the stores anew that somebody removed, or end the run."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scan(Question):
  """Read what the stores hold of stages; `events.Scanned`."""

  stages: tuple[int, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReadDigests(Question):
  """Read what snapshots and lines say of states; `events.DigestsRead`.

  Attributes:
    iterations: the iterations of the states.
    operators: by stage, all operators.
  """

  iterations: tuple[int, ...]
  operators: tuple[frozenset[keys.OperatorId], ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckLogs(Question):
  """Read all entries of all logs; `events.LogsChecked`.

  Attributes:
    drops_unreadable: whether a log that cannot be read at all is removed.
  """

  drops_unreadable: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class DropDamaged(Question):
  """Drop a stage's damaged entries from an iteration on; `events.Dropped`."""

  stage: int
  first_iteration: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class DropLogs(Action):
  """Remove all logs."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ForgetSnapshots(Action):
  """Remove all snapshots of stages."""

  stages: tuple[int, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ForgetNewer(Action):
  """Remove snapshots newer than an iteration, by stage."""

  iterations: Mapping[int, int]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Orphan(Action):
  """Note that only the replicas of a team write a stage's snapshots now."""

  stage: int
  team: tuple[int, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class MoveLine(Action):
  """Let go of what is older than the two lines need; tell all workers.

  Attributes:
    kept_from: the first iteration whose snapshots are kept.
    entry_line: the last iteration of which nobody needs entries any more.
  """

  kept_from: int
  entry_line: int


# ---- what is written and said ------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class Accept(Question):
  """Begin the run's files; `events.Accepted`.

  Attributes:
    ready: what every worker said when it was able to train.
  """

  ready: Mapping[events.Name, notices.Ready]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Splice(Question):
  """Go on with other bits, if the run has to; `events.Spliced`.

  If so, all that comes after the splice is removed from stores and files.
  """

  splice: splice_lib.Splice


@dataclasses.dataclass(frozen=True, kw_only=True)
class Merge(Question):
  """Write a report down, with those of others; `events.Merged`.

  Attributes:
    report: the report.
    teams: by stage, the replicas that have a worker.
  """

  report: report_lib.Report
  teams: tuple[tuple[int, ...], ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ForgetAfter(Action):
  """Cut the metrics: what comes after an iteration is done again.

  Attributes:
    iteration: the last one that counts.
    is_replanned: whether later ones are new to the planner, too.
  """

  iteration: int
  is_replanned: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Record(Action):
  """Write one line of `events.jsonl`."""

  kind: str
  fields: Mapping[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Note(Action):
  """Show a line to the user."""

  text: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Begin(Action):
  """Begin to train: files go on after an iteration, and output has logs."""

  iteration: int


# ---- the end -----------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class Save(Action):
  """Have a worker write the final checkpoint.

  Attributes:
    worker: the worker.
    iteration: the last iteration, of which all is written down.
    replicas: by stage, the replicas whose states are in the store.
  """

  worker: events.Name
  iteration: int
  replicas: tuple[tuple[int, ...], ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Finish(Action):
  """End the run: its final checkpoint, of `iteration`, is written."""

  iteration: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stop(Action):
  """End the run, as the user asked; the newest line written is `iteration`."""

  iteration: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class KillNow(Action):
  """Kill all processes of a run that ends."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fail(Action):
  """End the run with an error."""

  error: errors.MoetionError
