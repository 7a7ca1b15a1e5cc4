"""The agent at work: it runs the workers and writes the files.

One thread runs one loop: it waits for what workers say and print, for their
ends and for signals. All that happens is an event for the coordinator, which
decides; the executor does it. The agent computes nothing and imports no JAX.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import selectors
import signal
import sys
import time

from moetion_jax import errors, job_spec
from moetion_jax.hostmem import run_store, store_folder
from moetion_jax.recovery import actions, events, hang_detection, notices
from moetion_jax.recovery.coordinator import coordinator, state as state_lib
from moetion_jax.runtime import faults, linux_process, messages
from moetion_jax.runtime.agent import (
  executor,
  last_words,
  provisions,
  settings as agent_settings,
)
from moetion_jax.runtime.hosts import (
  child_process,
  crew,
  hosts,
  standbys,
  stores,
)
from moetion_jax.runtime.records import recorder, workdir

_LOOK_SECONDS = 0.25  # between two looks for workers that hang


class Agent:
  """One run's workers, from their start to their end.

  Attributes:
    executor: the state of what was done so far; for others to read.
  """

  def __init__(
    self,
    job: job_spec.JobSpec,
    where: agent_settings.AgentSettings,
    folder: workdir.Workdir,
    store: store_folder.StoreFolder,
    view: recorder.View,
  ):
    """Stores the arguments; `run` does the work.

    Args:
      job: the run's job.
      where: the settings of where it runs.
      folder: the workdir, locked.
      store: the store of this host, started.
      view: the live view.
    """
    train = job.train
    self._where = where
    self._folder = folder
    self._book = faults.FaultBook(where.faults)
    self._recorder = recorder.Recorder(job, folder, view)
    self._hosts = hosts.Hosts(
      train.stages, where.local_hosts, store, train.replicas
    )
    self._selector = selectors.DefaultSelector()
    self._crew = crew.Crew(
      job,
      self._hosts,
      self._selector,
      provisions.worker_spec(job, where, folder, store, self._hosts.secret),
      self._book,
      (folder.lock_fds, store.lock_fds),
    )
    self._stores = stores.Stores(
      train.stages,
      train.replicas,
      self._hosts,
      where.durable_folder(str(folder.path), folder.run_id),
    )
    self._coordinator = coordinator.Coordinator(
      state_lib.Settings(
        job=job,
        captures=where.captures,
        max_failures=where.max_failures,
        max_skipped=where.max_skipped,
        hang_timeout_seconds=where.hang_timeout_seconds,
        full_seconds=where.full_seconds,
        shrinks=where.on_failure == 'shrink',
        max_workers=where.max_workers,
        grow_after=where.grow_after,
        warms_standbys=where.standby and not self._hosts.others,
        workdir=str(folder.path),
        snapshots=self._stores.snapshot_names(),
      )
    )
    self.executor = executor.Executor(
      where, folder, self._hosts, self._crew, self._stores, self._recorder
    )
    self._signal_pipe = linux_process.SignalPipe()
    self._looked_at = 0.0

  def run(self, *, keeps_store: bool) -> int:
    """Runs the workers; when it returns they are gone.

    Args:
      keeps_store: whether an earlier run left something in the host stores.

    Returns:
      The exit code.

    Raises:
      errors.ConfigError: the run cannot begin.
    """
    self.executor.keep(keeps_store)
    with contextlib.ExitStack() as stack:
      stack.callback(self._selector.close)
      stack.enter_context(self._signal_pipe.open())
      stack.enter_context(self._recorder)
      stack.callback(self._crew.close)
      self._selector.register(
        self._signal_pipe.fd,
        selectors.EVENT_READ,
        self._on_signal,
      )
      try:
        self._start()
        self._loop()
      except errors.ConfigError:
        raise
      except errors.MoetionError as error:
        self.executor.fail(error)
      except OSError as error:  # a full disk, most likely
        self.executor.fail(last_words.of_system(error, self._folder))
    assert self.executor.result is not None
    code, state = self.executor.result
    with contextlib.suppress(OSError):
      self._write_workers(state)
    for line in self.executor.last_words:
      print(line, file=sys.stderr)
    return code

  def _start(self) -> None:
    if not self._where.fresh:
      self._book.read(self._folder.path / 'events.jsonl')
    newest = max(map(run_store.newest_generation, self._hosts.stores()))
    self._handle(events.Started(newest_generation=newest))

  def _loop(self) -> None:
    """Reacts to what happens until all workers have ended, or must end."""
    while any(w.exit_code is None for w in self._crew.workers.values()):
      timeout = _LOOK_SECONDS
      if (due_seconds := self._recorder.workers_due_seconds) is not None:
        if due_seconds <= 0:
          self._write_workers()
          continue
        timeout = min(timeout, due_seconds)
      if self.executor.kill_at is not None:
        left_seconds = self.executor.kill_at - time.monotonic()
        if left_seconds <= 0:
          return
        timeout = min(timeout, left_seconds)
      for key, _ in self._selector.select(timeout):
        key.data()
        while self._crew.news:
          self._take(*self._crew.news.popleft())
      self._look()

  def _on_signal(self) -> None:
    if times := self._signal_pipe.take():
      self._handle(events.StopAsked(times=times))

  def _look(self) -> None:
    """Looks now and then who is stopped, and what quiet workers are given."""
    now = time.monotonic()
    if now - self._looked_at < _LOOK_SECONDS:
      return
    self._looked_at = now
    pids = {
      name: worker.pid
      for name, worker in self._crew.workers.items()
      if worker.exit_code is None
    }
    state = self._coordinator.state
    quiet = {
      one.name
      for one in state.workers
      if hang_detection.is_quiet(one, state.watched)
    }
    usage = {n: linux_process.usage(pids[n]) for n in quiet & pids.keys()}
    self._handle(
      events.Looked(
        stopped=frozenset(
          name for name, pid in pids.items() if linux_process.is_stopped(pid)
        ),
        usage={name: one for name, one in usage.items() if one},
        away=self._hosts.away(),
      )
    )

  def _take(
    self,
    worker: child_process.WorkerProcess,
    message: messages.FromWorker | standbys.LostStandby | None,
  ) -> None:
    """Takes in what a process said; None: it has ended."""
    if isinstance(message, standbys.LostStandby):
      if self._coordinator.state.has_ended:
        return  # nobody needs it any more
      fields = dataclasses.asdict(message)
      self._recorder.event('standby_lost', replica=worker.replica, **fields)
      self._recorder.view.note(str(message))
      return
    name = worker.stage, worker.replica
    if worker.is_closed:  # by something else that happened at the same time
      return
    if worker.is_standby:
      if isinstance(message, messages.Warm):
        self._crew.warmed(worker)
        seconds = time.monotonic() - worker.made_at
        self._recorder.event('standby', replica=worker.replica, seconds=seconds)
    elif message is None:
      how = worker.describe_exit()
      self._handle(events.Died(worker=name, pid=worker.pid, how=how))
    elif isinstance(message, messages.FaultHappens):
      self._fault(name, message)
    else:
      self._handle(events.Said(worker=name, message=message))
      if isinstance(message, notices.State):
        workers = self._coordinator.state.workers
        self._recorder.view.stages([f'{w.state} {w.detail}' for w in workers])

  def _handle(self, event: events.Event) -> None:
    """Has an event handled, and done what follows."""
    coming: list[events.Event] = [event]
    while coming:
      self._coordinator.handle(events.Tick(now=time.monotonic()))
      for action in self._coordinator.handle(coming.pop()):
        try:
          answer = self.executor.do(action)
        except errors.MoetionError as error:
          if not isinstance(action, actions.Question):
            raise
          answer = events.Broke(error=error)
        if answer is not None:
          coming.append(answer)
    self._write_workers()

  def _fault(self, name: events.Name, message: messages.FaultHappens) -> None:
    """Notes a scripted fault; performs it if it is one of the agent."""
    fault = self._book.happens(message.number)
    is_early = fault.phase in faults.START_PHASES
    self._handle(
      events.Said(
        worker=name,
        message=notices.Faulted(
          at=message.at,
          iteration=0 if is_early else fault.iteration,
          fields=faults.event_fields(fault),
        ),
      )
    )
    if fault.kind is faults.FaultKind.KILL_ALL:
      for each in self._crew.everyone():
        each.kill()
    if faults.TABLE[fault.kind].place is faults.Place.AGENT:
      os.kill(os.getpid(), signal.SIGKILL)

  def _write_workers(
    self, end: hang_detection.WorkerState | None = None
  ) -> None:
    """Writes `workers.json`, unless it is too new; `end`: how all ended."""
    processes, states = self._crew.workers, hang_detection.WorkerState
    known: list[tuple[child_process.WorkerProcess, tuple[object, ...]]] = [
      (
        processes[w.name],
        (w.stage, w.replica, w.generation, end or w.state, w.iteration),
      )
      for w in self._coordinator.state.workers
      if w.name in processes
    ]
    for standby in () if end else self._crew.standbys:
      state = states.STANDBY if standby.is_warm else states.WARMING
      known.append((standby, (None, None, 0, state, 0)))
    listed = [
      {
        'stage': stage,
        'replica': replica,
        'host': process.host,
        'pid': process.pid,
        'generation': generation,
        'state': state,
        'iteration': iteration,
      }
      for process, (stage, replica, generation, state, iteration) in known
    ]
    self._recorder.write_workers(
      listed, self._hosts.agents(), is_last=bool(end)
    )
