"""Does what the coordinator decides, and answers its questions."""

from __future__ import annotations

import contextlib
import pathlib
import time

from moetion_jax import errors
from moetion_jax.recovery import actions, events, failures, hang_detection
from moetion_jax.runtime import environment as environment_lib, messages
from moetion_jax.runtime.agent import last_words, provisions, settings
from moetion_jax.runtime.hosts import (
  crew as crew_lib,
  hosts as hosts_lib,
  stores as stores_lib,
)
from moetion_jax.runtime.records import recorder as recorder_lib, workdir

# How long a worker that was told to end may take before it is killed.
_GRACE_SECONDS = 10.0


class Executor:
  """Acts on processes, stores and files; decides nothing.

  Attributes:
    has_begun: whether the workers were told to train.
    keeps_store: whether the host stores stay, for a run that goes on from them.
    result: the exit code, and the state for `workers.json`; None while the run
      goes on.
    last_words: lines for people and schedulers, to be printed when all else has
      ended.
    kill_at: the time at which workers that live on are killed, of
      `time.monotonic`; None: they are not.
  """

  def __init__(
    self,
    where: settings.AgentSettings,
    folder: workdir.Workdir,
    hosts: hosts_lib.Hosts,
    crew: crew_lib.Crew,
    stores: stores_lib.Stores,
    recorder: recorder_lib.Recorder,
  ):
    """Stores the arguments.

    Args:
      where: the settings of where the run runs.
      folder: the workdir, locked.
      hosts: the run's hosts.
      crew: the processes.
      stores: the host stores with logs and snapshots.
      recorder: the writer of the run's files.
    """
    self.has_begun = False
    self.keeps_store = False
    self.result: tuple[errors.ExitCode, hang_detection.WorkerState] | None = (
      None
    )
    self.last_words: list[str] = []
    self.kill_at: float | None = None
    self._where = where
    self._folder = folder
    self._hosts = hosts
    self._crew = crew
    self._stores = stores
    self._recorder = recorder
    self._starts_over = folder.begins_anew  # until the earlier run is removed

  def do(self, action: actions.Action) -> events.Event | None:
    """Does one thing.

    Args:
      action: what to do.

    Returns:
      The answer to a question; None for anything else.

    Raises:
      errors.MoetionError: the run has to end.
      OSError: the same; a disk is full, most likely.
    """
    match action:
      case actions.Open():
        self._crew.open()
      case actions.Replace():
        for new in self._crew.replace(action):
          if action.has_begun:
            new.open_log(self._folder.log_path(new.name))
      case actions.Kill():
        self._crew.workers[action.worker].kill()
      case actions.Send():
        self._crew.workers[action.worker].send(action.order)
      case actions.Locate():
        if self._hosts.others:
          workers = self._crew.workers.values()
          self._tell_all(self._hosts.locations(workers, action.generations))
      case actions.Warm():
        self._crew.warm_standbys(action.platform)
      case actions.CheckRoom():
        provisions.check_room(self._where, self._folder, action.needed_bytes)
      case actions.Keep():
        self.keep(action.keeps)
      case actions.MakeStores():
        self._hosts.make_stores()
      case actions.Scan():
        return self._stores.scan(action.stages)
      case actions.ReadDigests():
        return events.DigestsRead(
          stored=self._stores.digests(action.iterations, action.operators),
          recorded={i: self._recorder.digest(i) for i in action.iterations},
        )
      case actions.CheckLogs():
        return self._stores.check_logs(action.drops_unreadable)
      case actions.DropDamaged():
        return self._stores.drop_damaged(action.stage, action.first_iteration)
      case actions.DropLogs():
        self._stores.drop_logs()
      case actions.ForgetSnapshots():
        self._stores.forget_snapshots(action.stages)
      case actions.ForgetNewer():
        self._stores.forget_newer(action.iterations)
      case actions.Orphan():
        self._stores.orphan(action.stage, action.team)
      case actions.MoveLine():
        if self._stores.is_durable:
          # Snapshots on disk that begin at the line are of use only with the
          # lines of metrics up to it.
          self._recorder.sync()
        self._stores.line_moved(action.kept_from)
        self._tell_all(
          messages.Line(
            iteration=action.kept_from, entry_line=action.entry_line
          )
        )
      case actions.Accept():
        return self._accept(action)
      case actions.Splice():
        return self._splice(action)
      case actions.Merge():
        return self._merge(action)
      case actions.ForgetAfter():
        self._recorder.forget_after(
          action.iteration, is_replanned=action.is_replanned
        )
      case actions.Record():
        self._recorder.event(action.kind, **action.fields)
      case actions.Note():
        self._recorder.view.note(action.text)
      case actions.Begin():
        self._recorder.iteration, self.has_begun = action.iteration, True
        for worker in self._crew.workers.values():
          worker.open_log(self._folder.log_path(worker.name))
      case _:
        self._end(action)
    return None

  def _end(self, action: actions.Action) -> None:
    """Does what belongs to the end of the run."""
    match action:
      case actions.Save():
        # Where a checkpoint is the run counts as finished, and its store goes.
        self._recorder.sync()
        self._crew.workers[action.worker].send(
          messages.Save(
            path=str(self._folder.checkpoint),
            iteration=action.iteration,
            digest=self._recorder.digest(action.iteration),
            replicas=action.replicas,
          )
        )
      case actions.Finish():
        self._let_end(
          errors.ExitCode.FINISHED,
          hang_detection.WorkerState.FINISHED,
          action.iteration,
        )
        self.keep(False)
        note = f'Finished: {self._folder.checkpoint}'
        if skipped := self._recorder.skipped_in_all:
          note += f' ({skipped} updates were left out: they were not finite)'
        self._recorder.view.note(note)
      case actions.Stop():
        self._let_end(
          errors.ExitCode.STOPPED,
          hang_detection.WorkerState.STOPPED,
          action.iteration,
        )
        note = 'Stopped before training began.'
        if self.has_begun:
          note = f'Stopped after iteration {action.iteration}.'
        how = self._how_to_go_on(cause_stays=False)
        self.last_words = [f'{note} {how}'.rstrip()]
      case actions.KillNow():
        self.kill_at = time.monotonic()
      case actions.Fail():
        raise action.error
      case _:
        raise TypeError(f'nobody does {action}')

  def _tell_all(self, message: messages.ToWorker) -> None:
    for worker in self._crew.workers.values():
      worker.send(message)

  def _accept(self, action: actions.Accept) -> events.Accepted:
    """Begins the run's files; all workers have to compute with the same."""
    records = {
      f'stage {stage} replica {replica}': message.environment
      for (stage, replica), message in sorted(action.ready.items())
    }
    environment_lib.check_same_everywhere(records)
    environment = environment_lib.joined(list(records.values()))
    self._recorder.accept(action.ready, environment)
    self._crew.expect(environment, action.ready[0, 0].data_fingerprint)
    return events.Accepted(
      last_recorded=self._recorder.last_recorded,
      splices=self._recorder.splices,
    )

  def _merge(self, action: actions.Merge) -> events.Merged:
    reports, wrong = None, None
    try:
      reports = self._recorder.add(action.report, action.teams)
    except errors.WrongBitsError as error:
      wrong = error
    return events.Merged(
      iteration=self._recorder.iteration,
      reports=tuple(reports or ()),
      skipped=self._recorder.skipped,
      wrong=wrong,
    )

  def _splice(self, action: actions.Splice) -> events.Spliced:
    is_due = self._recorder.begin_splice(action.splice)
    if is_due:
      self._stores.drop_logs()
      self._stores.forget_newer(dict(enumerate(action.splice.complete_at)))
      self._recorder.finish_splice(action.splice)
    return events.Spliced(is_due=is_due, splices=self._recorder.splices)

  # ---- the end ---------------------------------------------------------------

  def keep(self, keeps: bool) -> None:
    """Sets whether the host stores stay, whatever ends the run from now on."""
    self.keeps_store = keeps
    self._hosts.keep(keeps)

  def _let_end(
    self,
    code: errors.ExitCode,
    state: hang_detection.WorkerState,
    iteration: int,
  ) -> None:
    """Has all processes end by themselves; they are killed later."""
    self._recorder.event(state, iteration=iteration)
    self.result = code, state
    self.kill_at = time.monotonic() + _GRACE_SECONDS
    for worker in self._crew.everyone():
      worker.send(messages.Exit())

  def fail(self, error: errors.MoetionError) -> None:
    """Ends a run that cannot go on; `last_words` say why and what can be done.

    Args:
      error: the reason.
    """
    self._crew.close()  # and passes on what workers still had to print
    self.result = error.exit_code, hang_detection.WorkerState.FAILED
    fields, logs = {'error': str(error)}, list[pathlib.Path]()
    if isinstance(error, failures.WorkerError):
      fields |= {'stage': error.stage, 'iteration': error.iteration}
      logs = [
        self._folder.log_path(worker.name)
        for worker in self._crew.workers.values()
        if worker.stage == error.stage
      ]
    # Which may be why the run failed.
    with contextlib.suppress(OSError, errors.StoreError):
      self._recorder.event('failed', **fields)
    self.last_words = [f'The run ended: {error}']
    if logs and self._recorder.accepted:
      names = ' and '.join(map(str, logs))
      self.last_words.append(f'What it printed is in {names}')
    if how := self._how_to_go_on(cause_stays=not error.is_passing):
      self.last_words.append(how)

  def _how_to_go_on(self, *, cause_stays: bool) -> str:
    is_kept = self.keeps_store and not self._hosts.gone()
    if self._stores.is_durable:
      is_kept = self.keeps_store
    return last_words.how_to_go_on(
      self._stores.snapshot_names() if is_kept else '',
      self._folder.base.path if self._folder.base else '',
      has_begun=self.has_begun,
      starts_over=self._starts_over,
      is_removed=self._recorder.removed_earlier,
      cause_stays=cause_stays,
      is_lost=self._folder.is_gone,
    )
