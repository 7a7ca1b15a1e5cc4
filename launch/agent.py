"""The process that a user starts: it runs the workers and writes the files.

One thread, one loop: it waits for what workers say and print, for their ends
and for signals (DESIGN section 3). It computes nothing and imports no JAX.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import pathlib
import selectors
import sys
import time
from collections.abc import Callable

from launch import (
  host_store,
  leader,
  log_size,
  placement,
  processes,
  protocol,
  settings,
  signals,
  stopping,
  workdir,
)
from moetion_jax import base, hostmem, report

# A worker that was told to end may take so long, then it is killed.
_GRACE_SECONDS = 10.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class AgentSettings:
  """Where a run runs; none of it changes what comes out.

  Attributes:
    workdir: its folder.
    fresh: whether an earlier run in it is removed.
    hostmem_dir: existing directory in tmpfs.
    log_iterations: of how many iterations the boundary logs keep the entries.
    compilation_cache_dir: see `runtime.configure`.
  """

  workdir: str
  fresh: bool = False
  hostmem_dir: str = '/dev/shm'
  log_iterations: int = 4
  compilation_cache_dir: str = ''

  def __post_init__(self) -> None:
    if self.log_iterations < 1:
      raise base.ConfigError(
        'log_iterations', self.log_iterations, 'must be at least 1'
      )
    host_store.check_hostmem_dir(self.hostmem_dir)


def run(config: settings.RunConfig, where: AgentSettings) -> int:
  """Trains from beginning to end, and leaves nothing but the workdir.

  Args:
    config: of the run.
    where: it runs.

  Returns:
    The exit code.

  Raises:
    base.ConfigError: the run cannot begin; nothing was written.
  """
  log_size.check_shape(config)
  folder = workdir.Workdir(where.workdir, fresh=where.fresh)
  folder.lock()
  try:
    folder.check(config.to_json())
    if folder.is_finished():
      print(
        f'This run is finished: {folder.checkpoint}. Pass --fresh to start '
        'over.'
      )
      return 0
    store = host_store.open_store(where.hostmem_dir, str(folder.path))
    try:
      return Agent(config, where, folder, store).run()
    finally:
      store.remove()
  finally:
    folder.close()


class Agent:
  """One run's workers, from their start to their end."""

  def __init__(
    self,
    config: settings.RunConfig,
    where: AgentSettings,
    folder: workdir.Workdir,
    store: hostmem.StoreFolder,
  ):
    """Stores; `run` does the work."""
    self._config = config
    self._where = where
    self._folder = folder
    self._store = store
    self._leader = leader.Leader(config, folder)
    self._sizes = [
      log_size.log_size(config, s, where.log_iterations)
      for s in range(config.train.stages)
    ]
    self._workers = [
      processes.WorkerProcess(s) for s in range(config.train.stages)
    ]
    self._selector = selectors.DefaultSelector()
    self._ready: dict[int, protocol.Message] = {}
    self._answers: dict[int, int] = {}
    self._limit: int | None = None  # proposed or committed
    self._done: dict[int, int] = {}
    self._handed_over: set[int] = set()
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
      stack.callback(self._end_workers)
      self._selector.register(
        self._signal_pipe.fd, selectors.EVENT_READ, self._on_signal
      )
      try:
        self._spawn()
        self._loop()
      except base.ConfigError:
        raise
      except base.MoetionError as error:
        self._failed(error)
    assert self._result is not None
    code, state = self._result
    self._leader.write_workers(self._workers, state)
    return code

  def _loop(self) -> None:
    """Reacts to what happens until all workers ended, or must."""
    while any(w.exit_code is None for w in self._workers):
      timeout = None
      if self._kill_at is not None:
        timeout = self._kill_at - time.monotonic()
        if timeout <= 0:
          return
      for key, _ in self._selector.select(timeout):
        key.data()

  # ---- processes -----------------------------------------------------------

  def _spawn(self) -> None:
    train = self._config.train
    host_store.check_room(
      self._where.hostmem_dir, sum(s.ring_bytes for s in self._sizes)
    )
    self._leader.view.note(f'Starting {train.stages} stage(s) ...')
    places = placement.place(
      train.stages,
      local_devices=train.local_devices,
      cores=placement.usable_cores(),
      gpus=placement.visible_gpus(os.environ),
      environment=os.environ,
    )
    for worker, place, size in zip(
      self._workers, places, self._sizes, strict=True
    ):
      spec = protocol.Spec(
        config=self._config,
        stage=worker.stage,
        generation=worker.generation,
        agent_pid=os.getpid(),
        cores=place.cores,
        compilation_cache_dir=self._where.compilation_cache_dir,
        folder=str(self._store.path),
        ring_bytes=size.ring_bytes,
        slots=size.slots,
        log_iterations=self._where.log_iterations,
        status_fd=-1,
        control_fd=-1,
      )
      worker.start(
        spec.to_json(),
        {**os.environ, **_import_path(), **place.environment},
        (self._folder.lock_fd, self._store.lock_fd),
      )
      for fd, react in (
        (worker.status_fd, self._on_status),
        (worker.output_fd, self._on_output),
        (worker.pid_fd, self._on_exit),
      ):
        self._selector.register(fd, selectors.EVENT_READ, _bind(react, worker))

  def _end_workers(self) -> None:
    for worker in self._workers:
      worker.kill()
    for worker in self._workers:
      worker.close()

  def _on_output(self, worker: processes.WorkerProcess) -> None:
    if worker.read_output():
      self._forget(worker.output_fd)

  def _on_status(self, worker: processes.WorkerProcess) -> None:
    messages, ended = worker.read_status()
    if ended:
      self._forget(worker.status_fd)
    for message in messages:
      getattr(self, f'_on_{message["kind"]}')(worker, message)

  def _on_exit(self, worker: processes.WorkerProcess) -> None:
    worker.reap()
    self._forget(worker.pid_fd)
    self._on_status(worker)  # its last words say more than its exit code
    if self._result is None:
      raise processes.WorkerError(
        worker.stage,
        worker.iteration,
        f'the worker (pid {worker.pid}) {worker.describe_exit()} while '
        f'{worker.state} {worker.detail}'.rstrip(),
      )

  def _forget(self, fd: int) -> None:
    if fd in self._selector.get_map():
      self._selector.unregister(fd)

  # ---- what workers say ----------------------------------------------------

  def _on_ready(self, worker, message: protocol.Message) -> None:
    self._ready[worker.stage] = message
    if len(self._ready) < len(self._workers):
      return
    # In the end the logs and everyone's state are in it (`handover`).
    host_store.check_room(
      self._where.hostmem_dir,
      sum(s.ring_bytes for s in self._sizes)
      + sum(m['state_bytes'] for m in self._ready.values()),
    )
    self._leader.accept(self._ready)
    for each in self._workers:
      each.open_log(self._folder.path / 'logs' / f'stage-{each.stage}.log')
      each.send('go')
    self._leader.write_workers(self._workers)

  def _on_state(self, worker, message: protocol.Message) -> None:
    worker.state, worker.detail = message['state'], message['detail']
    worker.iteration = max(worker.iteration, message['iteration'])
    self._leader.view.stages([f'{w.state} {w.detail}' for w in self._workers])
    self._leader.write_workers(self._workers)

  def _on_report(self, worker, message: protocol.Message) -> None:
    one = report.Report.from_json(message['report'])
    worker.iteration = max(worker.iteration, one.iteration)
    self._leader.add(one)
    self._leader.write_workers(self._workers)

  def _on_done(self, worker, message: protocol.Message) -> None:
    self._done[worker.stage] = message['iteration']
    if len(self._done) < len(self._workers):
      return
    if message['iteration'] < self._config.train.iterations:
      self._stopped()
      return
    for each in self._workers:
      each.send('hand_over')

  def _on_handed_over(self, worker, message: protocol.Message) -> None:
    del message
    self._handed_over.add(worker.stage)
    if len(self._handed_over) == len(self._workers):
      self._workers[0].send(
        'save',
        path=str(self._folder.checkpoint),
        iteration=self._leader.iteration,
      )

  def _on_saved(self, worker, message: protocol.Message) -> None:
    del worker, message
    self._leader.event('finished', iteration=self._leader.iteration)
    self._end(0, 'finished')
    self._leader.view.note(f'Finished: {self._folder.checkpoint}')

  def _on_refused(self, worker, message: protocol.Message) -> None:
    error = base.ConfigError(
      message['flag'], message['value'], message['reason']
    )
    if self._leader.accepted:
      raise processes.WorkerError(worker.stage, worker.iteration, str(error))
    raise error

  def _on_failed(self, worker, message: protocol.Message) -> None:
    if self._result is None:
      raise processes.WorkerError(
        worker.stage, message['iteration'], message['error']
      )

  # ---- ends ----------------------------------------------------------------

  def _on_signal(self) -> None:
    self._signals += self._signal_pipe.take()
    if self._result is not None:
      self._kill_at = time.monotonic()
      return
    is_training = all(w.iteration for w in self._workers)
    if self._signals > 1 or not is_training:
      self._stopped()
      self._kill_at = time.monotonic()
      return
    self._leader.view.note(
      'Stopping after this iteration; again to stop at once.'
    )
    newest = max(w.iteration for w in self._workers)
    self._tell(stopping.first_proposal(newest, self._config.train.iterations))

  def _on_answer(self, worker, message: protocol.Message) -> None:
    if message['limit'] != self._limit:
      return  # to an earlier proposal
    self._answers[worker.stage] = message['begun']
    train = self._config.train
    decision = stopping.decide(
      message['limit'], self._answers, train.stages, train.iterations
    )
    if decision:
      self._tell(decision)

  def _tell(self, decision: stopping.Decision) -> None:
    self._limit = decision.limit
    self._answers.clear()
    for worker in self._workers:
      kind = 'commit' if decision.commit else 'propose'
      worker.send(kind, limit=decision.limit)

  def _stopped(self) -> None:
    self._leader.event('stopped', iteration=self._leader.iteration)
    self._end(0, 'stopped')
    self._leader.view.note(
      f'Stopped after iteration {self._leader.iteration}. The same command '
      f'starts again and compares what it finds in {self._folder.path}; '
      '--fresh removes it.'
    )

  def _failed(self, error: base.MoetionError) -> None:
    self._end_workers()  # and pass on what they still had to print
    self._result = 1, 'failed'
    fields = {'error': str(error)}
    if isinstance(error, processes.WorkerError):
      fields |= {'stage': error.stage, 'iteration': error.iteration}
    self._leader.event('failure', **fields)
    print(f'The run ended: {error}', file=sys.stderr)
    if self._leader.accepted and isinstance(error, processes.WorkerError):
      log = self._folder.path / 'logs' / f'stage-{error.stage}.log'
      print(f'What it printed is in {log}', file=sys.stderr)

  def _end(self, code: int, state: str) -> None:
    """Ends the run: workers are told, later killed."""
    self._result = code, state
    self._kill_at = time.monotonic() + _GRACE_SECONDS
    for worker in self._workers:
      worker.send('exit')


def _bind(
  react: Callable[[processes.WorkerProcess], None],
  worker: processes.WorkerProcess,
) -> Callable[[], None]:
  return lambda: react(worker)


def _import_path() -> dict[str, str]:
  """Lets a worker import what the agent was imported from."""
  root = str(pathlib.Path(__file__).resolve().parent.parent)
  paths = [root, *filter(None, [os.environ.get('PYTHONPATH')])]
  return {'PYTHONPATH': os.pathsep.join(paths)}
