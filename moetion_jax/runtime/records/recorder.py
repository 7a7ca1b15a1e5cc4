"""The recorder: all that a run shows and leaves behind."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

from moetion_jax import disk, job_spec, report
from moetion_jax.recovery import events, notices, splice as splice_lib
from moetion_jax.runtime import environment as environment_lib
from moetion_jax.runtime.records import (
  files as record_files,
  held_run,
  merge,
  own_files,
  workdir,
)

_WORKERS_FILE_SECONDS = 0.25  # between two versions of workers.json
_KEPT_REPORTS = 256  # iterations, for workers that replay them


class View:
  """View of a run for a person; this one shows notes only.

  A context manager. A subclass shows more.
  """

  def __enter__(self) -> View:
    return self

  def __exit__(self, *unused: object) -> None:
    pass

  def show(self, line: dict[str, Any], busy: Sequence[float]) -> None:
    """Shows one line of `metrics.jsonl`.

    Args:
      line: the line of one iteration.
      busy: by stage, the fraction of the iteration that it did not wait.
    """

  def stages(self, states: Sequence[str]) -> None:
    """Shows what each worker does at this moment."""

  def note(self, text: str) -> None:
    """Prints a line of text."""
    print(text, flush=True)


class Recorder:
  """Merges the stages' reports; writes the files and the live view.

  Use as a context manager. Nothing is written before `accept`.

  Attributes:
    accepted: whether the workdir is this run's.
    iteration: the newest iteration that all stages reported and that is
      written.
    view: the live view.
  """

  def __init__(
    self, job: job_spec.JobSpec, folder: workdir.Workdir, view: View
  ):
    """Stores the arguments; `folder` is locked."""
    self.accepted = False
    self.iteration = 0
    self._job = job
    self._folder = folder
    self.view = view
    self._events = record_files.EventsFile(str(folder.path / 'events.jsonl'))
    self._lines = record_files.MetricsFile(
      str(folder.path / 'metrics.jsonl'), job.train.initial_iteration
    )
    # The number of each stage's operators.
    self._operators: list[int] = []
    self._reports: dict[int, dict[tuple[int, int], report.Report]] = {}
    self._newest = 0  # that was returned by `add`
    self._workers_file_at = 0.0
    self._workers_file_is_old = False

  def __enter__(self) -> Recorder:
    self.view.__enter__()
    return self

  def __exit__(self, *unused: object) -> None:
    self._lines.close()
    self.view.__exit__()

  def accept(
    self,
    ready: Mapping[events.Name, notices.Ready],
    environment: environment_lib.Record,
  ) -> None:
    """Begins the run's files, when every stage can train.

    Args:
      ready: the message of every worker.
      environment: what all workers compute with.

    Raises:
      errors.ConfigError: the workdir holds another run, or two workers read
        different data.
      errors.StoreError: its metrics are damaged.
    """
    first, train = ready[0, 0], self._job.train
    inputs = {held_run.DATA_FINGERPRINT: first.data_fingerprint}
    if self._job.init_from and not self._job.base:  # else nobody has read it
      inputs[held_run.INIT_DIGEST] = self._job.init_digest
    for other in ready.values():
      job_spec.check_data(
        self._job.data, first.data_fingerprint, other.data_fingerprint
      )
    self._operators = [
      len(ready[s, 0].operators.state_bytes) for s in range(train.stages)
    ]
    kept = self._folder.accept(self._job.config | inputs, environment)
    self.accepted = True
    if kept:
      self.view.note(
        f'Kept in {self._folder.path}, since no run made it: '
        f'{own_files.name_some(kept)}.'
      )
    self._lines.start()
    self.event(
      'start',
      stages=train.stages,
      iterations=train.iterations,
      platform=first.platform,
      device=first.device,
    )
    if self._folder.ended_at:
      self.event(
        'extended',
        iterations=train.iterations,
        before=self._folder.ended_at,
        decay_iterations=train.optimizer.decay_iterations,
        earlier=train.optimizer.earlier,
      )

  @property
  def removed_earlier(self) -> bool:
    """True if an earlier run was removed, or a part of it."""
    return self._folder.removed_earlier

  @property
  def last_recorded(self) -> int:
    """Iteration of the newest line that an earlier run wrote; 0 for none."""
    return self._lines.last_iteration

  def digest(self, iteration: int) -> str:
    """Returns the digest of the state after an iteration, as it was written."""
    return self._lines.digest(iteration)

  @property
  def skipped(self) -> int:
    """The number of updates in a row, up to `iteration`, that were left out."""
    return self._lines.skipped(self.iteration)

  @property
  def skipped_in_all(self) -> int:
    """The number of updates of the run that were left out."""
    return self._lines.skipped_in_all

  def event(self, kind: str, **fields: object) -> None:
    """Writes an event, if the run was accepted.

    Raises:
      errors.StoreError: the workdir was moved or removed.
    """
    if self.accepted:
      self._folder.check_in_place()
      self._events.write(kind, **fields)

  def add(
    self, one: report.Report, teams: Sequence[Sequence[int]]
  ) -> list[report.Report] | None:
    """Takes a worker's report; the last one of an iteration writes its line.

    A report that came before, from a worker that replays, is compared.

    Args:
      one: the report.
      teams: by stage, the replicas that have a worker.

    Returns:
      The reports of all stages if the iteration is complete and was never
      before, else None.

    Raises:
      files.MetricsMismatchError: the iteration came out differently before.
      errors.StoreError: the workdir, or its metrics, were moved or removed.
      merge.ReplicaMismatchError: replicas of a stage have different states.
    """
    by_worker = self._reports.setdefault(one.iteration, {})
    by_worker[one.stage, one.replica] = one
    reports = []
    for stage, team in enumerate(teams):
      found = {r: x for (s, r), x in by_worker.items() if s == stage}
      merged = merge.merge_stage(found, team, self._operators[stage])
      if merged is None:
        return None
      reports.append(merged)
    line = merge.make_line(
      reports,
      self._job.tokens_per_iteration,
      self._lines.skipped(one.iteration - 1),
    )
    self._folder.check_in_place()
    self._lines.write(line)
    if one.iteration <= self.iteration:
      return None
    self.iteration = one.iteration
    self._reports.pop(one.iteration - _KEPT_REPORTS, None)
    self.view.show(line, [r.busy_share for r in reports])
    is_new = one.iteration > self._newest
    self._newest = max(one.iteration, self._newest)
    return reports if is_new else None

  def forget_after(self, iteration: int, *, is_replanned: bool = False) -> None:
    """Drops all after an iteration: it will be done again, with other bits.

    Args:
      iteration: the last iteration that counts.
      is_replanned: whether `add` returns later ones again, as if they were new.
    """
    self._lines.cut(iteration)
    self.iteration = min(iteration, self.iteration)
    if is_replanned:
      self._newest = iteration
    self._reports = {i: x for i, x in self._reports.items() if i <= iteration}

  def sync(self) -> None:
    """Returns once all lines are on disk: a loss of power leaves them.

    Call it before what they could be made from again is given up.

    Raises:
      errors.StoreError: the workdir was moved or removed.
      OSError: they cannot be.
    """
    if self.accepted:
      self._folder.check_in_place()
      self._lines.sync()
      disk.sync_folder(self._folder.path)

  @property
  def splices(self) -> tuple[splice_lib.Splice, ...]:
    """The places where the run went on with another environment, in order."""
    return self._folder.changes.splices

  def begin_splice(self, splice: splice_lib.Splice) -> bool:
    """Records a splice, if the run needs one to go on there.

    Returns:
      True if it does: what comes after it is to be removed now, then call
      `finish_splice`.
    """
    if not self._folder.changes.is_due(splice.exact_until):
      return False
    self._folder.changes.begin(splice)
    return True

  def finish_splice(self, splice: splice_lib.Splice) -> None:
    """Cuts what is written of later iterations, and tells of the splice.

    Whoever dies before the end has it done, and told, again by the next start.

    Args:
      splice: the splice that `begin_splice` recorded.
    """
    self.forget_after(splice.exact_until)
    done = self._folder.changes.newest
    self.event('changes_accepted', **done)
    self._folder.changes.finish()
    self.view.note(
      f'Other bits than before from iteration {splice.exact_until + 1} on: '
      f'{", ".join(done["names"])} changed, as --accept_changes allows.'
    )

  @property
  def workers_due_seconds(self) -> float | None:
    """Seconds until `write_workers` is due for what it put off; None: never."""
    if not self._workers_file_is_old:
      return None
    return self._workers_file_at - time.monotonic()

  def write_workers(
    self,
    workers: Sequence[Mapping[str, object]],
    agents: Sequence[Mapping[str, object]],
    *,
    is_last: bool = False,
  ) -> None:
    """Rewrites `workers.json`, not more often than useful.

    Args:
      workers: all workers and standbys, as the file has them.
      agents: the agent of every host: `host`, `pid`, `address` of its store
        server.
      is_last: whether the run is over.
    """
    now = time.monotonic()
    if not self.accepted:
      return
    self._workers_file_is_old = not is_last and now < self._workers_file_at
    if self._workers_file_is_old:
      return
    self._workers_file_at = now + _WORKERS_FILE_SECONDS
    record_files.write_json(
      str(self._folder.path / 'workers.json'),
      {'agents': list(agents), 'workers': list(workers)},
      outlives_power=False,  # it is of processes, which do not either
    )
