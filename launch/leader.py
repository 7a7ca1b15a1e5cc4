"""The leader: what a run shows and leaves behind (DESIGN section 9)."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Mapping, Sequence

from launch import metrics, processes, progress, protocol, settings, workdir
from moetion_jax import report

_WORKERS_FILE_SECONDS = 0.25  # between two versions of workers.json


class Leader:
  """Merges what the stages say, writes the files and the live view.

  Use as a context manager. Nothing is written before `accept`.

  Attributes:
    accepted: whether the workdir is this run's.
    iteration: the newest one that all stages reported and that is written.
    view: what a person sees.
  """

  def __init__(self, config: settings.RunConfig, folder: workdir.Workdir):
    """Stores; `folder` is locked."""
    train = config.train
    self.accepted = False
    self.iteration = 0
    self._config = config
    self._folder = folder
    self._tokens = (
      train.global_microbatches
      * train.microbatch_size
      * config.model.sequence_length
    )
    self.view = progress.Progress(train.iterations, self._tokens)
    self._events = metrics.EventsFile(str(folder.path / 'events.jsonl'))
    self._lines = metrics.MetricsFile(str(folder.path / 'metrics.jsonl'))
    self._reports: dict[int, dict[int, report.Report]] = {}
    self._workers_file_at = 0.0

  def __enter__(self) -> Leader:
    self.view.__enter__()
    return self

  def __exit__(self, *unused: object) -> None:
    self._lines.close()
    self.view.__exit__()

  def accept(self, ready: Mapping[int, protocol.Message]) -> None:
    """Begins the run's files, when every stage can train.

    Args:
      ready: the message of every stage.

    Raises:
      base.ConfigError: the workdir holds another run.
      base.StoreError: its metrics are damaged.
    """
    first, train = ready[0], self._config.train
    self._folder.accept(
      self._config.to_json()
      | {k: first[k] for k in ('data_fingerprint', 'software')}
    )
    self.accepted = True
    self._lines.start()
    if self._lines.last_iteration:
      self.view.note(
        f'{self._folder.path} has {self._lines.last_iteration} iterations of '
        'this run; they are done again and compared.'
      )
    self.event(
      'start',
      stages=train.stages,
      iterations=train.iterations,
      platform=first['platform'],
      device=first['device'],
    )

  def event(self, kind: str, **fields: object) -> None:
    """Writes an event, if the run was accepted."""
    if self.accepted:
      self._events.write(kind, **fields)

  def add(self, one: report.Report) -> None:
    """Takes one stage's report; the last one of an iteration writes its line.

    Raises:
      metrics.MetricsMismatchError: the iteration came out differently before.
    """
    stages = self._config.train.stages
    by_stage = self._reports.setdefault(one.iteration, {})
    by_stage[one.stage] = one
    if len(by_stage) < stages:
      return
    del self._reports[one.iteration]
    reports = [by_stage[stage] for stage in range(stages)]
    line = metrics.make_line(reports, self._tokens)
    self._lines.write(line)
    self.iteration = one.iteration
    self.view.show(line, [progress.busy_share(r) for r in reports])

  def write_workers(
    self,
    workers: Sequence[processes.WorkerProcess],
    state: str | None = None,
  ) -> None:
    """Rewrites `workers.json`; without `state` not more often than useful.

    Args:
      workers: all that were started.
      state: of all of them, when the run is over.
    """
    now = time.monotonic()
    if not self.accepted or (state is None and now < self._workers_file_at):
      return
    self._workers_file_at = now + _WORKERS_FILE_SECONDS
    host = socket.gethostname()
    metrics.write_json(
      str(self._folder.path / 'workers.json'),
      {
        'agents': [{'host': host, 'pid': os.getpid(), 'address': None}],
        'workers': [
          {
            'stage': w.stage,
            'replica': 0,
            'host': host,
            'pid': w.pid,
            'generation': w.generation,
            'state': state or w.state,
            'iteration': w.iteration,
          }
          for w in workers
        ],
      },
    )
