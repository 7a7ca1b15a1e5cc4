"""The agent at work: it runs the workers and writes the files.

One thread, one loop: it waits for what workers say and print, for their ends
and for signals (DESIGN section 3). It computes nothing and imports no JAX.
"""

from __future__ import annotations

import contextlib
import os
import pathlib
import selectors
import signal
import sys
import time

from launch import (
  agent_settings,
  comeback,
  crew as crew_lib,
  durable,
  fault_book,
  final_state,
  host_store,
  hosts,
  inventory,
  leader,
  processes,
  protocol,
  recoverer,
  settings,
  signals,
  stopper,
  stores,
  teams,
  watcher,
  workdir,
)
from moetion_jax import base, faults, hostmem, report

# A worker that was told to end may take so long, then it is killed.
_GRACE_SECONDS = 10.0
# So long a worker may wait until the line has freed a snapshot.
_FULL_SECONDS = 1.0
# What a worker says of what it did before it stopped, to go back.
_PAST = ('report', 'stored', 'resumed', 'caught_up', 'done', 'handed_over')


class Agent:
  """One run's workers, from their start to their end.

  Attributes:
    keeps_store: whether what is in the host stores will be gone on with.
    has_begun: whether the workers were told to train.
  """

  def __init__(
    self,
    config: settings.RunConfig,
    where: agent_settings.AgentSettings,
    folder: workdir.Workdir,
    store: hostmem.StoreFolder,
    *,
    keeps_store: bool,
  ):
    """Stores; `run` does the work.

    Args:
      config: of the run.
      where: it runs.
      folder: locked.
      store: of this host, started.
      keeps_store: whether an earlier run left something in the host stores.
    """
    self.has_begun = False
    self._config = config
    self._where = where
    self._folder = folder
    self._store = store
    self._leader = leader.Leader(config, folder)
    self._recoverer = recoverer.Recoverer(
      config, where.captures, where.max_failures, self._leader.event
    )
    self._hosts = hosts.Hosts(
      config.train.stages,
      where.local_hosts,
      store,
      str(folder.path),
      config.train.replicas,
    )
    self._keep(keeps_store)
    self._early_deaths = 0
    self._trained: set[int] = set()  # stages of which somebody began to
    self._selector = selectors.DefaultSelector()
    self._book = fault_book.FaultBook(where.faults)
    self._crew = crew_lib.Crew(
      config, self._hosts, self._selector, self, self._spec(), self._book
    )
    self._ready: dict[tuple[int, int], protocol.Message] = {}
    self._stores = stores.Stores(
      config.train.stages,
      config.train.replicas,
      self._hosts,
      self._recoverer,
      self._leader,
      durable.folder_of(where, str(folder.path)),
    )
    self._stopper = stopper.Stopper(
      config.train.iterations, lambda: self._crew.workers
    )
    self._watcher = watcher.Watcher(where.hang_timeout_seconds)
    self._teams = teams.Teams(
      config.train.replicas,
      where,
      self._crew,
      self._recoverer,
      self._stores,
      self._leader,
    )
    self._final = final_state.FinalState(folder.checkpoint)
    self._comeback = comeback.Comeback(
      config.train.stages,
      where.captures.rules,
      self._crew,
      self._hosts,
      self._recoverer,
      self._stores,
      self._leader,
      self._final,
      self._stopper,
      lambda new: new.open_log(self._log_file(new)),
    )
    self._signal_pipe = signals.SignalPipe()
    self._signals = 0
    self._result: tuple[int, str] | None = None  # exit code, for workers.json
    self._kill_at: float | None = None

  def run(self) -> int:
    """Runs the workers; when it returns they are gone."""
    with contextlib.ExitStack() as stack:
      stack.callback(self._selector.close)
      stack.enter_context(self._signal_pipe.open())
      stack.enter_context(self._leader)
      stack.callback(self._crew.close)
      self._selector.register(
        self._signal_pipe.fd, selectors.EVENT_READ, self._on_signal
      )
      try:
        self._start()
        self._loop()
      except base.ConfigError:
        raise
      except base.MoetionError as error:
        self._failed(error)
      except OSError as error:  # a full disk, most likely
        self._failed(
          base.StoreError(
            f'{error.filename or self._folder.path}: {error.strerror}; make '
            'that possible, then start again'
          )
        )
    assert self._result is not None
    code, state = self._result
    with contextlib.suppress(OSError):
      self._write_workers(state)
    return code

  def _loop(self) -> None:
    """Reacts to what happens until all workers ended, or must."""
    while any(w.exit_code is None for w in self._crew.workers):
      timeout = watcher.WATCH_SECONDS
      if (due_seconds := self._leader.workers_due_seconds) is not None:
        if due_seconds <= 0:
          self._write_workers()
          continue
        timeout = min(timeout, due_seconds)
      if self._kill_at is not None:
        left_seconds = self._kill_at - time.monotonic()
        if left_seconds <= 0:
          return
        timeout = min(timeout, left_seconds)
      for key, _ in self._selector.select(timeout):
        key.data()
      if self.has_begun:
        self._watcher.look(self._crew.workers, excused=self._result is not None)

  # ---- the beginning ---------------------------------------------------------

  def _spec(self) -> protocol.Spec:
    """Of every worker, but for what the crew knows."""
    return protocol.Spec(
      config=self._config,
      stage=protocol.STANDBY,
      generation=0,
      agent_pid=os.getpid(),
      cores=(),
      compilation_cache_dir=self._where.compilation_cache_dir,
      folder=str(self._store.path),
      durable_folder=durable.folder_of(self._where, str(self._folder.path)),
      handover_folder=str(self._store.path),
      host='',
      secret=self._hosts.secret,
      platform='',
      full_seconds=self._where.full_seconds,
      # Where nothing limits them they take all that come.
      grows_capacity=self._where.captures.grows_capacity
      and self._config.model.capacity_factor > 0,
      status_fd=-1,
      control_fd=-1,
    )

  def _start(self) -> None:
    stages, replicas = self._config.train.stages, self._config.train.replicas
    if not self._where.fresh:
      self._book.read(self._folder.path / 'events.jsonl')
    host_store.check_room(
      self._where.hostmem_dir,
      sum(self._recoverer.log_size(s).file_bytes for s in range(stages))
      * replicas
      - hostmem.used_bytes(self._store.path),
    )
    each = f' of {replicas} replicas' if replicas > 1 else ''
    self._leader.view.note(f'Starting {stages} stage(s){each} ...')
    newest = max(
      host_store.newest_generation(self._hosts.store_of(s))
      for s in range(stages)
    )
    self._crew.start((self._folder.lock_fd, self._store.lock_fd), newest + 1)

  def _on_ready(self, worker, message: protocol.Message) -> None:
    if self.has_begun:
      return
    self._ready[worker.stage, worker.replica] = message
    if len(self._ready) < len(self._crew.workers):
      return
    by_stage = {s: m for (s, replica), m in self._ready.items() if not replica}
    self._recoverer.begin(by_stage)
    # In the end the logs and everyone's state are in it (`handover`).
    host_store.check_room(
      self._where.hostmem_dir,
      self._recoverer.room_bytes()
      + sum(m['state_bytes'] for m in by_stage.values())
      - hostmem.used_bytes(self._store.path),
    )
    self._leader.accept(by_stage)
    self._begin()

  def _begin(self) -> None:
    """Lets everybody train: from what an earlier run left, if it did."""
    wrong: list[str] = []
    # A log that is too small now is not needed: everybody goes back alike.
    lost = self._stores.rescan(on_unreadable=wrong.append)
    lost |= self._stores.too_small()
    if wrong:
      self._leader.view.note(
        f'{len(wrong)} snapshot(s) cannot be read and will be written again, '
        f'the first of them: {wrong[0]}'
      )
    plan = self._recoverer.first_plan(
      self._leader.last_line, self._stores.newest_entry()
    )
    self._leader.iteration = plan.start
    self.has_begun = True
    self._keep(bool(plan.start))
    if plan.start:
      self._leader.event('resumed', first_iteration=plan.first_iteration)
      self._leader.view.note(
        f'Going on with iteration {plan.first_iteration}, from the snapshots '
        f'in {self._store_names()}.'
      )
    elif self._leader.last_line:
      self._leader.view.note(
        f'{self._folder.path} has {self._leader.last_line} iterations of this '
        'run; they are done again and compared.'
      )
    for worker in self._crew.workers:
      worker.open_log(self._log_file(worker))
    self._comeback.begin(plan, lost, self._leader.last_line)
    self._write_workers()

  def _log_file(self, worker: processes.WorkerProcess) -> pathlib.Path:
    """Where the file is that what a worker prints is kept in."""
    name = worker.name.replace(' ', '-').replace('-replica', '.replica')
    return self._folder.path / 'logs' / f'{name}.log'

  # ---- failures --------------------------------------------------------------

  def on_exit(self, worker: processes.WorkerProcess) -> None:
    """A worker is dead: only its stage goes back."""
    if self._result is not None:
      return
    lost: frozenset[int] = frozenset()
    if self.has_begun:
      # A stage that never trained in this run may not have made its log yet.
      lost = self._stores.rescan([worker.stage]) & self._trained
      self._find_iteration(worker)
    what = (
      f'the worker (pid {worker.pid}) {worker.reason or worker.describe_exit()}'
    )
    if not worker.reason:
      doing = 'waiting for' if worker.state == 'waiting' else worker.state
      what += f' while {doing} {worker.detail}'.rstrip()
    if self._config.train.replicas > 1:
      what = f'replica {worker.replica}: {what}'
    error = processes.WorkerError(worker.stage, worker.iteration, what)
    if not self.has_begun:
      self._start_again(error)
      return
    self._leader.event(
      'failure',
      stage=worker.stage,
      replica=worker.replica,
      iteration=worker.iteration,
      generation=worker.generation,
      error=str(error),
    )
    if self._where.captures.policy == 'none':
      what += '; with --policy=none there is nothing to recover from'
      raise processes.WorkerError(worker.stage, worker.iteration, what)
    try:
      team = self._teams.without(worker, what)
      if not self._where.captures.rules.is_local:
        self._leader.view.note(f'{error}; all stages go back together.')
      plan = self._comeback.after(worker, what, lost, team)
    except base.MoetionError as why:
      raise processes.WorkerError(
        worker.stage, worker.iteration, str(why)
      ) from why
    self._write_workers()
    if plan is None:
      return
    stages = ', '.join(map(str, plan.stages))
    self._leader.view.note(
      f'{error}; stage(s) {stages} recover(s) from iteration '
      f'{plan.first_iteration} on, the others wait.'
    )

  def _start_again(self, error: processes.WorkerError) -> None:
    """Replaces a worker that died before there was anything to recover."""
    self._early_deaths += 1
    if self._early_deaths > self._where.max_failures:
      raise error
    self._leader.view.note(f'{error}; it is started again.')
    for new in self._crew.replace(error.stage, has_begun=False):
      self._ready.pop((new.stage, new.replica), None)

  def _find_iteration(self, worker: processes.WorkerProcess) -> None:
    """A dead worker may have come further than it could say."""
    if worker.stage in self._recoverer.recovering:
      return  # what is there is of its predecessor
    worker.iteration = max(
      worker.iteration,
      self._stores.newest_entry([worker.stage]),
      self._recoverer.newest_snapshot(worker.stage),
    )

  def _on_rolled_back(self, worker, message: protocol.Message) -> None:
    del message
    worker.rolled_back()
    if self._result is None:
      self._comeback.together()
      self._write_workers()

  def _grow(self) -> None:
    """Gives shrunk stages their workers back, when it is time."""
    everybody = tuple(range(self._config.train.replicas))
    for stage in self._teams.grow() if not self._signals else ():
      first, *_ = self._crew.of_stage(stage)
      why = 'its replicas return'
      self._comeback.after(first, why, frozenset(), everybody)

  # ---- what workers say ------------------------------------------------------

  def on_message(
    self, worker: processes.WorkerProcess, message: protocol.Message
  ) -> None:
    """Reacts to one message of a worker or the standby."""
    worker.heard_at = time.monotonic()
    if worker.is_going_back and message['kind'] in _PAST:
      return
    getattr(self, f'_on_{message["kind"]}')(worker, message)

  def _on_warm(self, worker, message: protocol.Message) -> None:
    del message
    seconds = time.monotonic() - worker.state_since
    self._crew.warmed(worker)
    self._leader.event('standby', replica=worker.replica, seconds=seconds)
    self._write_workers()

  def _on_state(self, worker, message: protocol.Message) -> None:
    if worker.stage == protocol.STANDBY:
      return
    if message['detail'] == base.SNAPSHOTS_FULL:
      # With gaps in the stores the line may stay behind, and nothing would free
      # them: to go on is worth more than an older start.
      if time.monotonic() - worker.state_since > _FULL_SECONDS:
        self._advance(keeps_older=False)
    elif message['state'] == 'blocked' != worker.state:
      self._leader.view.note(
        f'{worker.name} is blocked: {message["detail"]}; the run ends '
        f'if that lasts {self._where.full_seconds:g} s'
      )
    worker.says(
      message['state'],
      message['detail'],
      max(worker.iteration, message['iteration']),
      message['steps'],
    )
    workers = self._crew.workers
    self._leader.view.stages([f'{w.state} {w.detail}' for w in workers])
    self._write_workers()

  def _on_resumed(self, worker, message: protocol.Message) -> None:
    self._trained.add(worker.stage)
    worker.iteration = message['first_iteration']
    self._recoverer.resumed(worker.stage, message)

  def _on_caught_up(self, worker, message: protocol.Message) -> None:
    del message
    worker.has_caught_up = True
    if not all(w.has_caught_up for w in self._crew.of_stage(worker.stage)):
      return
    if note := self._recoverer.caught_up(worker.stage):
      self._leader.view.note(note)
    self._advance()

  def _on_stored(self, worker, message: protocol.Message) -> None:
    share = inventory.share_from_json(message['share'])
    worker.iteration = max(worker.iteration, share.iteration)
    self._recoverer.stored(worker.stage, share)
    if not self.keeps_store and self._result is None:
      self._keep(True)  # now there is something to go on with
    self._advance()

  def _advance(self, *, keeps_older: bool = True) -> None:
    """Moves the recovery line on, if it can."""
    if self._recoverer.advance(self._leader.iteration, keeps_older=keeps_older):
      for each in self._crew.workers:
        each.send('line', iteration=self._recoverer.line)
      self._stores.retain_orphans(self._recoverer.line)

  def _on_report(self, worker, message: protocol.Message) -> None:
    one = report.Report.from_json(message['report'])
    worker.iteration = max(worker.iteration, one.iteration)
    stages = range(self._config.train.stages)
    reports = self._leader.add(one, [self._crew.team(s) for s in stages])
    if reports:
      self._advance()
      self._warm_standby()
    decisions = self._recoverer.add(reports) if reports else None
    if decisions:
      for each in self._crew.workers:
        each.send('decide', decision=decisions[each.stage].to_json())
    if reports:
      self._grow()
    self._write_workers()

  def _warm_standby(self) -> None:
    """Between iterations only: starts and recoveries need the cores."""
    if (
      self._where.standby
      and not self._hosts.others
      and not self._signals
      and not self._recoverer.recovering
    ):
      self._crew.warm_standbys(self._ready[0, 0]['lowering_platform'])

  def _on_done(self, worker, message: protocol.Message) -> None:
    if not self._final.done(worker, len(self._crew.workers)):
      return
    if message['iteration'] < self._config.train.iterations:
      self._stopped()
      return
    self._final.hand_over(self._givers())

  def _on_handed_over(self, worker, message: protocol.Message) -> None:
    del message
    self._final.handed_over(worker, self._givers(), self._leader.iteration)

  def _givers(self) -> list[processes.WorkerProcess]:
    """Of every stage as many workers as it takes to have all of its state."""
    if self._config.train.shard_optimizer:
      return self._crew.workers
    stages = range(self._config.train.stages)
    return [self._crew.of_stage(stage)[0] for stage in stages]

  def _on_saved(self, worker, message: protocol.Message) -> None:
    del worker, message
    self._leader.event('finished', iteration=self._leader.iteration)
    self._end(0, 'finished')
    self._keep(False)
    self._leader.view.note(f'Finished: {self._folder.checkpoint}')

  def _on_refused(self, worker, message: protocol.Message) -> None:
    error = base.ConfigError(
      message['flag'], message['value'], message['reason']
    )
    if self._leader.accepted:
      raise processes.WorkerError(worker.stage, worker.iteration, str(error))
    raise error

  def _on_failed(self, worker, message: protocol.Message) -> None:
    if self._result is not None:
      return
    if message['final'] or not self.has_begun:
      raise processes.WorkerError(
        worker.stage, message['iteration'], message['error']
      )
    worker.reason = f'failed: {message["error"]}'
    worker.iteration = max(worker.iteration, message['iteration'])
    worker.suspects = tuple(message['suspects'])
    if message['corrupt']:
      worker.corrupt = message['corrupt'][0], message['corrupt'][1]
    worker.kill()  # that is quicker than its own end, and cannot hang

  def _on_fault(self, worker, message: protocol.Message) -> None:
    fault = self._book.happens(message['number'])
    self._leader.event(fault_book.EVENT, **fault_book.event_fields(fault))
    worker.fault_at = message['at']
    if fault.phase not in faults.START_PHASES:
      worker.iteration = max(worker.iteration, fault.iteration)
    if fault.kind == 'kill_all':
      for each in self._crew.everyone():
        each.kill()
    if fault.kind in faults.AGENT_KINDS:
      os.kill(os.getpid(), signal.SIGKILL)

  # ---- ends ------------------------------------------------------------------

  def _on_signal(self) -> None:
    self._signals += self._signal_pipe.take()
    if self._result is not None:
      self._kill_at = time.monotonic()
      return
    if self._signals > 1 or len(self._trained) < self._config.train.stages:
      self._stopped()
      self._kill_at = time.monotonic()
      return
    self._leader.view.note(
      'Stopping after this iteration; again to stop at once.'
    )
    self._stopper.begin()

  def _on_answer(self, worker, message: protocol.Message) -> None:
    self._stopper.answer(worker, message['limit'], message['begun'])

  def _stopped(self) -> None:
    self._leader.event('stopped', iteration=self._leader.iteration)
    self._end(0, 'stopped')
    note = 'Stopped before training began.'
    if self.has_begun:
      note = f'Stopped after iteration {self._leader.iteration}.'
    self._leader.view.note(f'{note} {self._how_to_go_on()}'.rstrip())

  def _failed(self, error: base.MoetionError) -> None:
    self._crew.close()  # and pass on what they still had to print
    self._result = 1, 'failed'
    fields = {'error': str(error)}
    if isinstance(error, processes.WorkerError):
      fields |= {'stage': error.stage, 'iteration': error.iteration}
    with contextlib.suppress(OSError):  # that may be why it failed
      self._leader.event('failed', **fields)
    print(f'The run ended: {error}', file=sys.stderr)
    if self._leader.accepted and isinstance(error, processes.WorkerError):
      logs = [self._log_file(w) for w in self._crew.of_stage(error.stage)]
      names = ' and '.join(map(str, logs))
      print(f'What it printed is in {names}', file=sys.stderr)
    if how := self._how_to_go_on():
      print(how, file=sys.stderr)

  def _how_to_go_on(self) -> str:
    if self.keeps_store:
      return (
        'The same command goes on from the snapshots in '
        f'{self._store_names()}; --fresh, or removing them, starts over.'
      )
    return 'The same command starts over.' if self.has_begun else ''

  def _store_names(self) -> str:
    """The host stores' folders, for people."""
    return ' and '.join(map(str, self._hosts.stores()))

  def _keep(self, keep: bool) -> None:
    """Whether the host stores stay, whatever ends the run from now on."""
    self.keeps_store = keep
    self._hosts.keep(keep)

  def _end(self, code: int, state: str) -> None:
    """Ends the run: workers are told, later killed."""
    self._result = code, state
    self._kill_at = time.monotonic() + _GRACE_SECONDS
    for worker in self._crew.everyone():
      worker.send('exit')

  def _write_workers(self, state: str | None = None) -> None:
    everyone = self._crew.everyone() if state is None else self._crew.workers
    self._leader.write_workers(everyone, self._hosts.agents(), state)
