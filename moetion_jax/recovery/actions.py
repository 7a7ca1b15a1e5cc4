"""Actions: all that the coordinator ever has done, as plain values.

They are done in order. A `Question` is the last one of its list, and its answer
is the next event.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from moetion_jax import errors, report as report_lib
from moetion_jax.policies import decision as decision_lib
from moetion_jax.recovery import events, orders, splice as splice_lib

_value = dataclasses.dataclass(frozen=True, kw_only=True)


class Action:
  """Something to do."""


class Question(Action):
  """Something to do that has an answer, one of `events`."""


# ---- processes ---------------------------------------------------------------


@_value
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


@_value
class Kill(Action):
  """End a worker's process; `events.Died` follows."""

  worker: events.Name


@_value
class StopHere:
  """An order: stop where you are, and keep process and programs.

  It is never sent before the first `orders.Go`; another one follows.
  """


@_value
class Decide:
  """An order: what is captured from now on."""

  decision: decision_lib.CaptureDecision


@_value
class Propose:
  """An order: wait after an iteration until more is said."""

  limit: int


@_value
class Commit:
  """An order: end after an iteration."""

  limit: int


@_value
class HandOver:
  """An order: put the training state into the store folder."""


@_value
class Send(Action):
  """Tell a worker something."""

  worker: events.Name
  order: orders.Go | StopHere | Decide | Propose | Commit | HandOver


@_value
class Locate(Action):
  """Tell all workers where every stage's entries are, if hosts differ."""


@_value
class Warm(Action):
  """Start the standbys that are missing, for programs of a platform."""

  platform: str


# ---- stores ------------------------------------------------------------------


@_value
class CheckRoom(Action):
  """End the run if host memory has no room for so much."""

  needed_bytes: int


@_value
class Keep(Action):
  """Keep the stores, or not, whatever ends the run from now on."""

  keeps: bool


@_value
class Scan(Question):
  """Read what the stores hold of stages; `events.Scanned`."""

  stages: tuple[int, ...]


@_value
class CheckLogs(Question):
  """Read all entries of all logs; `events.LogsChecked`.

  Attributes:
    drops_unreadable: whether a log that cannot be read at all is removed.
  """

  drops_unreadable: bool = False


@_value
class DropDamaged(Question):
  """Drop a stage's damaged entries from an iteration on; `events.Dropped`."""

  stage: int
  first_iteration: int


@_value
class DropLogs(Action):
  """Remove all logs."""


@_value
class ForgetSnapshots(Action):
  """Remove all snapshots of stages."""

  stages: tuple[int, ...]


@_value
class ForgetNewer(Action):
  """Remove snapshots newer than an iteration, by stage."""

  iterations: Mapping[int, int]


@_value
class Orphan(Action):
  """Note that only the replicas of a team write a stage's snapshots now."""

  stage: int
  team: tuple[int, ...]


@_value
class MoveLine(Action):
  """Let go of what lies before the recovery line, and tell all workers."""

  line: int


# ---- what is written and said ------------------------------------------------


@_value
class Accept(Question):
  """Begin the run's files; `events.Accepted`.

  Attributes:
    ready: what every worker said when it was able to train.
  """

  ready: Mapping[events.Name, events.Ready]


@_value
class Splice(Question):
  """Go on with other bits, if the run has to; `events.Spliced`.

  If so, all that comes after the splice is removed from stores and files.
  """

  splice: splice_lib.Splice


@_value
class Merge(Question):
  """Write a report down, with those of others; `events.Merged`.

  Attributes:
    report: the report.
    teams: by stage, the replicas that have a worker.
  """

  report: report_lib.Report
  teams: tuple[tuple[int, ...], ...]


@_value
class ForgetAfter(Action):
  """Cut the metrics: what comes after an iteration is done again.

  Attributes:
    iteration: the last one that counts.
    is_replanned: whether later ones are new to the planner, too.
  """

  iteration: int
  is_replanned: bool = False


@_value
class Record(Action):
  """Write one line of `events.jsonl`."""

  kind: str
  fields: Mapping[str, Any]


@_value
class Note(Action):
  """Show a line to the user."""

  text: str


# ---- the end -----------------------------------------------------------------


@_value
class Save(Action):
  """Have a worker write the final checkpoint.

  Attributes:
    worker: the worker.
    replicas: by stage, the replicas whose states are in the store.
  """

  worker: events.Name
  replicas: tuple[tuple[int, ...], ...]


@_value
class Finish(Action):
  """End the run: its final checkpoint is written."""


@_value
class Stop(Action):
  """End the run, as the user asked."""

  has_begun: bool


@_value
class KillNow(Action):
  """Kill all processes of a run that ends."""


@_value
class Fail(Action):
  """End the run with an error."""

  error: errors.MoetionError
