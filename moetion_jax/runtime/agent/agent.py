"""The agent at work: it runs the workers and writes the files.

One thread runs one loop: it waits for what workers say and print, for their
ends and for signals (DESIGN section 3). It computes nothing and imports no JAX.
"""

from __future__ import annotations

import contextlib
import selectors
import time

from moetion_jax import errors, job_spec, report
from moetion_jax.hostmem import run_store, store_folder
from moetion_jax.recovery import hang_detection, recoverer
from moetion_jax.runtime import (
  faults,
  linux_process,
  messages,
  spec as spec_lib,
)
from moetion_jax.runtime.agent import (
  beginning,
  comeback,
  ending,
  final_checkpoint,
  scripted,
  settings as agent_settings,
  stopper,
  teams,
  watcher,
)
from moetion_jax.runtime.hosts import child_process, crew, hosts, stores
from moetion_jax.runtime.records import recorder, workdir
from moetion_jax.snapshots import coverage

# How long a worker may wait until the line has freed a snapshot.
_FULL_SECONDS = 1.0


class Agent:
  """One run's workers, from their start to their end.

  Attributes:
    has_begun: whether the workers were told to train.
  """

  def __init__(
    self,
    job: job_spec.JobSpec,
    where: agent_settings.AgentSettings,
    folder: workdir.Workdir,
    store: store_folder.StoreFolder,
    view: recorder.View,
    *,
    keeps_store: bool,
  ):
    """Stores the arguments; `run` does the work.

    Args:
      job: the run's job.
      where: the settings of where it runs.
      folder: the workdir, locked.
      store: the store of this host, started.
      view: the live view.
      keeps_store: whether an earlier run left something in the host stores.
    """
    self.has_begun = False
    self._job = job
    self._where = where
    self._folder = folder
    self._store = store
    self._recorder = recorder.Recorder(job, folder, view)
    self._recoverer = recoverer.Recoverer(
      job, where.captures, where.max_failures, self._recorder.event
    )
    self._hosts = hosts.Hosts(
      job.train.stages,
      where.local_hosts,
      store,
      job.train.replicas,
    )
    self._trained: set[int] = set()  # stages of which a worker began to train
    self._selector = selectors.DefaultSelector()
    self._book = faults.FaultBook(where.faults)
    self._crew = crew.Crew(
      job,
      self._hosts,
      self._selector,
      self,
      beginning.worker_spec(job, where, folder, store, self._hosts.secret),
      self._book,
    )
    self._ending = ending.Ending(
      self._recorder,
      self._hosts,
      self._crew,
      keeps_store=keeps_store,
      starts_over=folder.begins_anew,
      durable_folder=where.durable_folder(str(folder.path), folder.run_id),
    )
    self._ready = beginning.Readiness(where.max_failures)
    self._stores = stores.Stores(
      job.train.stages,
      job.train.replicas,
      self._hosts,
      self._recoverer,
      self._recorder,
      where.durable_folder(str(folder.path), folder.run_id),
    )
    self._stopper = stopper.Stopper(
      job.train.iterations, lambda: self._crew.workers
    )
    self._watcher = watcher.Watcher(
      where.hang_timeout_seconds, lambda why: self._comeback.suspect(why)
    )
    self._teams = teams.Teams(
      job.train.replicas,
      where,
      self._crew,
      self._recoverer,
      self._stores,
      self._recorder,
    )
    self._final = final_checkpoint.FinalCheckpoint(folder.checkpoint)
    self._comeback = comeback.Comeback(
      job.train.stages,
      where.captures.policy,
      self._crew,
      self._hosts,
      self._recoverer,
      self._stores,
      self._recorder,
      self._final,
      self._stopper,
      lambda new: new.open_log(folder.log_path(new.name)),
    )
    self._signal_pipe = linux_process.SignalPipe()
    self._signals = 0

  @property
  def keeps_store(self) -> bool:
    """True if the host stores stay, for a run that goes on from them."""
    return self._ending.keeps_store

  def run(self) -> int:
    """Runs the workers; when it returns they are gone.

    Returns:
      The exit code.

    Raises:
      errors.ConfigError: the run cannot begin.
    """
    self._hosts.keep(self.keeps_store)
    with contextlib.ExitStack() as stack:
      stack.callback(self._selector.close)
      stack.enter_context(self._signal_pipe.open())
      stack.enter_context(self._recorder)
      stack.callback(self._crew.close)
      self._selector.register(
        self._signal_pipe.fd, selectors.EVENT_READ, self._on_signal
      )
      try:
        self._start()
        self._loop()
      except errors.ConfigError:
        raise
      except errors.MoetionError as error:
        self._failed(error)
      except OSError as error:  # a full disk, most likely
        self._failed(ending.of_system(error, self._folder.path))
    assert self._ending.result is not None
    code, state = self._ending.result
    with contextlib.suppress(OSError):
      self._write_workers(state)
    return code

  def _loop(self) -> None:
    """Reacts to what happens until all workers have ended, or must end."""
    while any(w.exit_code is None for w in self._crew.workers):
      timeout = watcher.WATCH_SECONDS
      if (due_seconds := self._recorder.workers_due_seconds) is not None:
        if due_seconds <= 0:
          self._write_workers()
          continue
        timeout = min(timeout, due_seconds)
      if self._ending.kill_at is not None:
        left_seconds = self._ending.kill_at - time.monotonic()
        if left_seconds <= 0:
          return
        timeout = min(timeout, left_seconds)
      for key, _ in self._selector.select(timeout):
        key.data()
      if self.has_begun:
        self._watcher.look(
          self._crew.workers, excused=self._ending.result is not None
        )

  # ---- the beginning ---------------------------------------------------------

  def _start(self) -> None:
    stages, replicas = self._job.train.stages, self._job.train.replicas
    if not self._where.fresh:
      self._book.read(self._folder.path / 'events.jsonl')
    sizes = (self._recoverer.log_size(s).file_bytes for s in range(stages))
    beginning.check_room(self._where, self._folder, sum(sizes) * replicas)
    each = f' of {replicas} replicas' if replicas > 1 else ''
    self._recorder.view.note(f'Starting workers of {stages} stage(s){each} ...')
    newest = max(
      run_store.newest_generation(self._hosts.store_of(s))
      for s in range(stages)
    )
    self._crew.start((self._folder.lock_fd, self._store.lock_fd), newest + 1)

  def _on_ready(self, worker, message: messages.Ready) -> None:
    if self.has_begun:
      return
    by_stage = self._ready.add(worker, message, len(self._crew.workers))
    if by_stage is None:
      return
    ready = [message for _, message in sorted(by_stage.items())]
    self._recoverer.begin([m.operators for m in ready], ready[0].platform)
    # In the end the stores hold the logs and all states (`final_state`).
    states = sum(m.state_bytes for m in ready)
    beginning.check_room(
      self._where, self._folder, self._recoverer.room_bytes() + states
    )
    environment = self._ready.environment()
    self._recorder.accept(by_stage, environment)
    self._crew.expect(environment)
    self._recoverer.splice(self._recorder.splices, is_running=False)
    self._begin()

  def _begin(self) -> None:
    """Lets everybody train: from what an earlier run left, if it left any."""
    wrong: list[str] = []
    self._comeback.check_stored()
    # A log that is too small now is not needed: everybody goes back alike.
    lost = self._stores.rescan(on_unreadable=wrong.append)
    lost |= self._stores.too_small()
    if wrong:
      self._recorder.view.note(
        f'{len(wrong)} snapshot(s) cannot be read and will be written again, '
        f'the first of them: {wrong[0]}'
      )
    plan = self._recoverer.first_plan(
      self._recorder.last_recorded, self._stores.newest_entry()
    )
    if self._comeback.splice(plan):
      lost = frozenset(plan.stages)
    self._recorder.iteration = plan.start
    self.has_begun = True
    self._ending.keep(bool(plan.start))
    if plan.start:
      self._recorder.event('resumed', first_iteration=plan.first_iteration)
      self._recorder.view.note(
        f'Going on with iteration {plan.first_iteration}, from the snapshots '
        f'in {self._ending.snapshot_names()}.'
      )
    elif self._recorder.last_recorded:
      self._recorder.view.note(
        f'{self._folder.path} has {self._recorder.last_recorded} iterations of '
        'this run; they are done again and compared.'
      )
    for worker in self._crew.workers:
      worker.open_log(self._folder.log_path(worker.name))
    self._comeback.begin(plan, lost, self._recorder.last_recorded)
    self._write_workers()

  # ---- failures --------------------------------------------------------------

  def on_exit(self, worker: child_process.WorkerProcess) -> None:
    """Handles a worker's death: its stage goes back, or all stages do."""
    if self._ending.result is not None:
      return
    lost: frozenset[int] = frozenset()
    if self.has_begun:
      # A stage that never trained in this run may not have made its log yet.
      lost = self._stores.rescan([worker.stage]) & self._trained
      if worker.stage not in self._recoverer.recovering:  # else: of another
        reached = self._stores.reached(worker.stage)
        worker.iteration = max(worker.iteration, reached)
    what = worker.describe_death()
    error = child_process.WorkerError(worker.stage, worker.iteration, what)
    if not self.has_begun:
      self._start_again(error)
      return
    self._recorder.event(
      'failure',
      **worker.event_fields(),
      error=str(error),
    )
    try:
      team = self._teams.without(worker, what)
      if self._comeback.goes_together:
        self._recorder.view.note(f'{error}; all stages go back together.')
      plan = self._comeback.after(worker, what, lost, team)
    except errors.MoetionError as why:
      raise child_process.WorkerError(
        worker.stage, worker.iteration, str(why), is_passing=why.is_passing
      ) from why
    self._write_workers()
    if plan is None:
      return
    stages = ', '.join(map(str, plan.stages))
    self._recorder.view.note(
      f'{error}; stage(s) {stages} recover(s) from iteration '
      f'{plan.first_iteration} on, the others wait.'
    )

  def _start_again(self, error: child_process.WorkerError) -> None:
    """Replaces a worker that died before there was anything to recover."""
    self._ready.count_death(error)
    self._recorder.view.note(f'{error}; it is started again.')
    for new in self._crew.replace(error.stage, has_begun=False):
      self._ready.forget(new)

  def _grow(self) -> None:
    """Gives shrunk stages their workers back, when it is time."""
    everybody = tuple(range(self._job.train.replicas))
    for stage in self._teams.grow() if not self._signals else ():
      first, *_ = self._crew.of_stage(stage)
      why = 'its replicas return'
      self._comeback.after(first, why, frozenset(), everybody)

  # ---- what workers say ------------------------------------------------------

  def on_message(
    self, worker: child_process.WorkerProcess, message: messages.FromWorker
  ) -> None:
    """Reacts to one message of a worker or the standby."""
    worker.heard_at = time.monotonic()
    if worker.is_going_back and isinstance(message, messages.OfFinishedWork):
      return
    match message:
      case messages.Warm():
        self._on_warm(worker)
      case messages.Ready():
        self._on_ready(worker, message)
      case messages.State():
        self._on_state(worker, message)
      case messages.Resumed():
        self._trained.add(worker.stage)
        worker.iteration = message.first_iteration
        self._recoverer.resumed(worker.stage, message.fetch_seconds)
      case messages.CaughtUp():
        self._on_caught_up(worker)
      case messages.Stored():
        self._on_stored(worker, message.share)
      case messages.Reported():
        self._on_report(worker, message.report)
      case messages.Answer():
        self._stopper.answer(worker, message)
      case messages.Done():
        self._on_done(worker, message)
      case messages.StoppedHere():
        worker.stopped_here()
        if self._ending.result is None:
          self._comeback.together()
          self._write_workers()
      case messages.HandedOver():
        self._final.handed_over(worker, self._crew.givers(), self._recorder)
      case messages.Damaged():
        givers = self._crew.givers()
        self._final.damaged(worker, message, givers, self._recorder)
      case messages.Rewritten():
        self._final.rewritten(worker, message, self._recorder)
      case messages.Saved():
        self._ending.finished(self._folder.checkpoint)
      case messages.FaultHappens():
        book, everyone = self._book, self._crew.everyone
        scripted.happens(book, worker, message, self._recorder.event, everyone)
      case messages.Refused():
        self._on_refused(worker, message)
      case messages.Failed():
        self._on_failed(worker, message)

  def _on_warm(self, worker) -> None:
    seconds = time.monotonic() - worker.state_since
    self._crew.warmed(worker)
    self._recorder.event('standby', replica=worker.replica, seconds=seconds)
    self._write_workers()

  def _on_state(self, worker, message: messages.State) -> None:
    if worker.stage == spec_lib.STANDBY:
      return
    blocked = hang_detection.WorkerState.BLOCKED
    if message.shortage is hang_detection.Shortage.SNAPSHOTS:
      # With gaps in the stores the line may stay behind, and nothing would free
      # snapshots: to go on is worth more than an older start.
      if time.monotonic() - worker.state_since > _FULL_SECONDS:
        self._advance(keeps_older=False)
    elif message.state is blocked and worker.state is not blocked:
      self._recorder.view.note(
        f'{worker.name} is blocked: {message.detail}; the run ends '
        f'if that lasts {self._where.full_seconds:g} s'
      )
    worker.says(message)
    workers = self._crew.workers
    self._recorder.view.stages([f'{w.state} {w.detail}' for w in workers])
    self._write_workers()

  def _on_caught_up(self, worker) -> None:
    worker.has_caught_up = True
    if not all(w.has_caught_up for w in self._crew.of_stage(worker.stage)):
      return
    if note := self._recoverer.caught_up(worker.stage):
      self._recorder.view.note(note)
    self._advance()

  def _on_stored(self, worker, share: coverage.Share) -> None:
    worker.iteration = max(worker.iteration, share.iteration)
    self._recoverer.stored(worker.stage, share)
    if not self._ending.keeps_store and self._ending.result is None:
      self._ending.keep(True)  # now there is something to go on with
    self._advance()

  def _advance(self, *, keeps_older: bool = True) -> None:
    """Moves the recovery line on, if it can."""
    if self._recoverer.advance(
      self._recorder.iteration, keeps_older=keeps_older
    ):
      kept_from = self._recoverer.kept_from
      self._stores.line_moved(kept_from)
      for each in self._crew.workers:
        each.send(messages.Line(iteration=kept_from))

  def _on_report(self, worker, one: report.Report) -> None:
    worker.iteration = max(worker.iteration, one.iteration)
    if reports := self._comeback.record(worker, one):
      self._advance()
      self._warm_standby()
      if decisions := self._recoverer.add(reports):
        for each in self._crew.workers:
          each.send(messages.Decide(decision=decisions[each.stage]))
      self._grow()
    self._write_workers()

  def _warm_standby(self) -> None:
    """Warms standbys between iterations: starts, recoveries need the cores."""
    is_quiet = not self._signals and not self._recoverer.recovering
    if self._where.standby and not self._hosts.others and is_quiet:
      self._crew.warm_standbys(self._ready.lowering_platform)

  def _on_done(self, worker, message: messages.Done) -> None:
    if not self._final.done(worker, len(self._crew.workers)):
      return
    if message.iteration < self._job.train.iterations:
      self._ending.stopped(has_begun=self.has_begun)
      return
    if not self._comeback.is_wrong_at_end(worker):
      self._final.hand_over(self._crew.givers())

  def _on_refused(self, worker, message: messages.Refused) -> None:
    error = message.error()
    if self._recorder.accepted:
      raise child_process.WorkerError(
        worker.stage, worker.iteration, str(error)
      )
    raise error

  def _on_failed(self, worker, message: messages.Failed) -> None:
    if self._ending.result is not None:
      return
    if message.has_wrong_bits and self.has_begun:
      message = self._comeback.weigh(message)
    if message.is_final or not self.has_begun:
      raise child_process.WorkerError(
        worker.stage, message.iteration, message.error
      )
    worker.failed(message)

  # ---- ends ------------------------------------------------------------------

  def _on_signal(self) -> None:
    self._signals += self._signal_pipe.take()
    if self._ending.result is not None:
      self._ending.end_now()
      return
    if self._signals > 1 or len(self._trained) < self._job.train.stages:
      self._ending.stopped(has_begun=self.has_begun)
      self._ending.end_now()
      return
    self._recorder.view.note(
      'Stopping after this iteration; again to stop at once.'
    )
    self._stopper.begin()

  def _failed(self, error: errors.MoetionError) -> None:
    logs = []
    if self._recorder.accepted and isinstance(error, child_process.WorkerError):
      logs = [
        self._folder.log_path(w.name) for w in self._crew.of_stage(error.stage)
      ]
    self._ending.failed(error, logs, has_begun=self.has_begun)

  def _write_workers(self, state: str | None = None) -> None:
    everyone = self._crew.everyone() if state is None else self._crew.workers
    self._recorder.write_workers(everyone, self._hosts.agents(), state)
