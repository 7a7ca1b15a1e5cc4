"""A worker process: one stage of a run. Started by the agent, by nobody else.

Reads a `protocol.Spec` from stdin. Exit codes as of `launch.train`.
"""

from __future__ import annotations

import ctypes
import json
import os
import queue
import signal
import sys
import threading
import time
import traceback
from typing import Any

from launch import protocol, stopping
from moetion_jax import base

_PR_SET_PDEATHSIG = 1
_STATE_SECONDS = 0.25  # between two looks at what the worker does


def _die_with(agent_pid: int) -> None:
  """Lets the kernel kill this process when its agent dies, however."""
  ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
  if os.getppid() != agent_pid:  # it died before that
    os.kill(os.getpid(), signal.SIGKILL)


class _Link:
  """The worker's side of its pipes; what it reads, two threads act on."""

  def __init__(self, spec: protocol.Spec):
    """Stores the pipes; `start` starts the thread."""
    self.limit = stopping.IterationLimit()
    self._status_fd = spec.status_fd
    self._control_fd = spec.control_fd
    self._lock = threading.Lock()  # one message at a time
    self._commands: queue.Queue[protocol.Message] = queue.Queue()
    self._program = 'starting'
    self._worker: Any = None

  def start(self) -> None:
    """Starts to read and to tell what the worker does."""
    for target in (self._read, self._tell):
      threading.Thread(target=target, daemon=True).start()

  def send(self, kind: str, **fields: Any) -> None:
    """Sends a message to the agent."""
    data = protocol.encode(kind, **fields)
    with self._lock:
      while data:
        data = data[os.write(self._status_fd, data) :]

  def command(self) -> protocol.Message:
    """Waits for the agent's next command."""
    return self._commands.get()

  def compiling(self, program: str) -> None:
    """Notes the program that is compiled now."""
    self._program = program

  def training(self, worker: Any) -> None:
    """From now on `worker` is asked what it does."""
    self._worker = worker

  @property
  def iteration(self) -> int:
    """That the worker works on; 0 before the first one."""
    return self._worker.iteration if self._worker else 0

  def _read(self) -> None:
    with open(self._control_fd, 'rb') as pipe:
      for line in pipe:
        message = json.loads(line)
        if message['kind'] == 'propose':
          limit = message['limit']
          begun = self.limit.propose(limit)
          self.send('answer', limit=limit, begun=begun)
        elif message['kind'] == 'commit':
          self.limit.commit(message['limit'])
        else:
          self._commands.put(message)

  def _tell(self) -> None:
    told = None
    while True:
      state = self._state()
      if state != told:
        told = state
        self.send('state', **state)
      time.sleep(_STATE_SECONDS)

  def _state(self) -> dict[str, Any]:
    worker = self._worker
    if worker is None:
      return {'state': 'compiling', 'detail': self._program, 'iteration': 0}
    waiting_for = worker.log.waiting_for
    state = 'waiting' if waiting_for else 'running'
    detail = str(waiting_for) if waiting_for else worker.program
    return {'state': state, 'detail': detail, 'iteration': worker.iteration}


def _work(spec: protocol.Spec, link: _Link) -> None:
  """Everything from the backend to the end of the run."""
  from launch import runtime

  config = spec.config
  runtime.configure(
    local_devices=config.train.local_devices,
    compilation_cache_dir=spec.compilation_cache_dir,
  )
  import jax

  from launch import handover, local
  from moetion_jax import boundary_log, hostmem, logs, worker

  data = local.load_data(config)
  devices = jax.devices()
  if config.train.local_devices > len(devices):
    raise base.ConfigError(
      'local_devices', config.train.local_devices, f'{len(devices)} are there'
    )
  stage = local.build_stage(config, spec.stage)
  initial = local.load_initial(config, stage)
  link.send(
    'ready',
    platform=jax.default_backend(),
    device=devices[0].device_kind,
    state_bytes=sum(
      leaf.size * leaf.dtype.itemsize
      for leaf in jax.tree.leaves(stage.state_shapes)
    ),
    software=runtime.software(),
    data_fingerprint=data.fingerprint() if spec.stage == 0 else None,
  )
  state = local.initial_state(config, stage, initial)
  programs = stage.compile(link.compiling)
  link.compiling('')
  assert link.command()['kind'] == 'go'
  log = boundary_log.BoundaryLog(
    hostmem.WorkerId(spec.stage, 0, spec.generation),
    logs.LogSettings(
      folder=spec.folder,
      size_bytes=spec.ring_bytes,
      slots=spec.slots,
      fresh=True,
    ),
  )
  log.start()
  trainer = worker.Worker(spec.stage, stage, programs, state, log, data)
  link.training(trainer)
  last = trainer.train(
    config.train,
    lambda report: link.send('report', report=report.to_json()),
    link.limit.stop,
    log_iterations=spec.log_iterations,
  )
  log.flush()
  link.send('done', iteration=last)
  while (command := link.command())['kind'] != 'exit':
    if command['kind'] == 'hand_over':
      handover.put(spec.folder, spec.stage, trainer.state)
      link.send('handed_over')
    elif command['kind'] == 'save':
      from launch import checkpoint

      states = [
        handover.get(spec.folder, s) for s in range(config.train.stages)
      ]
      checkpoint.save(command['path'], states, command['iteration'], config)
      link.send('saved')
  log.close()


def main() -> int:
  """Works as stdin says; returns the exit code."""
  spec = protocol.Spec.from_json(json.load(sys.stdin))
  _die_with(spec.agent_pid)
  if spec.cores:
    os.sched_setaffinity(0, spec.cores)
  link = _Link(spec)
  link.start()
  try:
    _work(spec, link)
  except base.ConfigError as error:
    link.send(
      'refused', flag=error.flag, value=str(error.value), reason=error.reason
    )
    return 2
  except Exception as error:
    if not isinstance(error, base.MoetionError):
      traceback.print_exc()
    name = '' if isinstance(error, base.MoetionError) else type(error).__name__
    text = ': '.join(x for x in (name, str(error)) if x)
    link.send('failed', error=text, iteration=link.iteration)
    return 1
  return 0


if __name__ == '__main__':
  sys.exit(main())
