"""The hosts of a run, as its leader sees them.

Host 0 is the agent that the user started. With `--local_hosts=N` each further
one is an agent process of its own on this machine (`host_agent`), with its own
store; its workers look to the leader like workers here. Entries of other hosts
are read over TCP, encrypted with a secret that is drawn for each run.

No JAX here: the agent uses this module and never creates a JAX backend.
"""

from __future__ import annotations

import functools
import os
import pathlib
import secrets
import selectors
import socket
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from launch import (
  host_store,
  parent_death,
  placement,
  processes,
  protocol,
)
from moetion_jax import base, hostmem

# A host's agent that was told to end its workers or itself may take so long.
_GRACE_SECONDS = 5.0
_SECRET_BYTES = 32


class HostError(base.MoetionError):
  """A host's agent ended, or cannot go on."""


class RemoteWorker(processes.WorkerProcess):
  """A worker that another host's agent started; speaks through that one.

  It has no descriptors to poll: `RemoteHost.read` says when there is news.

  Attributes:
    ended: whether the process did, and all that it said is here.
  """

  def __init__(self, agent: RemoteHost, stage: int, generation: int = 1):
    """Stores who it is; nothing runs before `start`."""
    super().__init__(stage, generation, agent.name)
    self.ended = False
    self._agent = agent
    self._pid = 0
    self._messages: list[protocol.Message] = []
    self._ended_with: int | None = None

  def start(
    self,
    spec: Mapping[str, object],
    environment: Mapping[str, str],
    lock_fds: tuple[int, ...],
  ) -> None:
    """See `ChildProcess.start`; the locks are those of the other agent."""
    del lock_fds
    self._agent.start_worker(self, spec, environment)

  @property
  def pid(self) -> int:
    """Of the process; 0 while it is not known."""
    return self._pid

  def take(self, message: protocol.Message) -> None:
    """Takes in what the host's agent says about this worker."""
    kind = message['kind']
    if kind == 'started':
      self._pid = message['pid']
    elif kind == 'said':
      self._messages.append(message['message'])
    elif kind == 'printed':
      self._transcript.add(message['line'].encode())
    elif kind == 'exited':
      self.ended, self._ended_with = True, message['exit_code']

  def send(self, kind: str, **fields: object) -> None:
    """See `ChildProcess.send`."""
    message = {'kind': kind, **fields}
    self._agent.send('tell', stage=self.stage, message=message)

  def read_status(self) -> tuple[list[protocol.Message], bool]:
    """See `ChildProcess.read_status`."""
    messages, self._messages = self._messages, []
    return messages, False

  def reap(self) -> None:
    """See `ChildProcess.reap`."""
    self.exit_code = self._ended_with

  def kill(self) -> None:
    """See `ChildProcess.kill`."""
    if self._pid and self.exit_code is None:
      self._agent.send('kill', stage=self.stage)

  def close(self) -> None:
    """See `ChildProcess.close`; nobody waits for an agent that hangs."""
    if self._pid and self.exit_code is None:
      self._agent.wait_for(self)
      self.reap()
    super().close()


class RemoteHost:
  """The agent of another host. `start` first, `close` last.

  Attributes:
    name: of the host in the location map.
    address: of its store server; '' until it serves.
    store: its store folder.
    keeps_store: whether that stays when it is closed.
  """

  def __init__(self, name: str, hostmem_dir: str, run_id: str):
    """Stores who it is and where its store lies."""
    self.name = name
    self.address = ''
    self.store = hostmem.StoreFolder(hostmem_dir, run_id).path
    self.keeps_store = False
    self._hostmem_dir = hostmem_dir
    self._run_id = run_id
    self._transcript = processes.Transcript(name)
    self._process = processes.ChildProcess(
      'launch.host_agent', self._transcript.add
    )
    self._workers: dict[int, RemoteWorker] = {}
    self._pids: set[int] = set()
    self._gone = True

  def start(self, secret: str, lock_fds: tuple[int, ...]) -> None:
    """Starts the agent.

    Args:
      secret: of the job, in hex.
      lock_fds: that it and its workers inherit.
    """
    spec = protocol.HostSpec(
      name=self.name,
      run_id=self._run_id,
      hostmem_dir=self._hostmem_dir,
      secret=secret,
      agent_pid=os.getpid(),
      lock_fds=lock_fds,
      status_fd=-1,
      control_fd=-1,
    )
    self._process.start(spec.to_json(), {}, lock_fds)
    self._gone = False

  def sources(self) -> tuple[tuple[int, Callable[[], Any]], ...]:
    """Descriptors to poll, and what to call when they are readable.

    `read`, which belongs to the first one, returns workers with news.
    """
    return (
      (self._process.status_fd, self.read),
      (self._process.output_fd, self._process.read_output),
    )

  @property
  def pid(self) -> int:
    """Of the agent."""
    return self._process.pid

  def start_worker(
    self,
    worker: RemoteWorker,
    spec: Mapping[str, object],
    environment: Mapping[str, str],
  ) -> None:
    """Has a worker started; `spec` as of `ChildProcess.start`."""
    self._workers[worker.stage] = worker
    self.send(
      'start',
      stage=worker.stage,
      generation=worker.generation,
      spec=spec,
      environment=environment,
    )

  def send(self, kind: str, **fields: object) -> None:
    """Sends a message; one that a dead agent does not get is lost."""
    if not self._gone:
      self._process.send(kind, **fields)

  def read(self) -> list[RemoteWorker]:
    """Takes in what the agent said; the workers with something new.

    Raises:
      base.ConfigError: the host cannot be used.
      HostError: the agent ended.
    """
    news = self._take()
    if self._gone:
      stages = ', '.join(map(str, sorted(self._workers)))
      raise HostError(
        f'{self.name}: its agent (pid {self.pid}) '
        f'{self._process.describe_exit()}, and with it the workers of '
        f'stage(s) {stages}'
      )
    return news

  def wait_for(self, worker: RemoteWorker) -> None:
    """Waits until a worker that was told to end did, or the agent is dead."""
    if not self._wait(lambda: worker.ended):
      self._process.kill()
      self._wait(lambda: False)

  def close(self) -> None:
    """Ends the agent; whatever it was doing, nothing is left of it."""
    if self._process.status_fd < 0:
      return
    self.send('exit', keep=self.keeps_store)
    self._wait(lambda: False)
    self._process.kill()
    self._process.close()
    self._transcript.close()
    if self._process.exit_code:
      # Its workers died with it, and are our children now.
      parent_death.reap_orphans(self._pids)
    if self._process.exit_code and self.keeps_store:
      host_store.tidy(self.store)
    elif self._process.exit_code:
      try:
        host_store.remove_store(self._hostmem_dir, self._run_id)
      except base.StoreError as error:
        print(f'Not removed: {error}', file=sys.stderr)

  def _wait(self, is_enough: Callable[[], bool]) -> bool:
    """Whether so much was said in time, or the agent has ended."""
    if self._gone:
      return True
    deadline = time.monotonic() + _GRACE_SECONDS
    with selectors.DefaultSelector() as selector:
      for fd in (self._process.status_fd, self._process.output_fd):
        selector.register(fd, selectors.EVENT_READ)
      while not self._gone and not is_enough():
        timeout_seconds = deadline - time.monotonic()
        if timeout_seconds <= 0:
          return False
        if selector.select(timeout_seconds):
          self._process.read_output()
          self._take(is_end=True)
    return True

  def _take(self, is_end: bool = False) -> list[RemoteWorker]:
    """`read`, but that the agent ended is only noted."""
    messages, ended = self._process.read_status()
    news: dict[RemoteWorker, None] = {}
    for message in messages:
      kind = message['kind']
      if kind == 'serving':
        self.address = message['address']
      elif kind == 'refused' and not is_end:
        raise base.ConfigError(
          message['flag'], message['value'], message['reason']
        )
      elif kind == 'failed' and not is_end:
        raise HostError(f'{self.name}: {message["error"]}')
      elif worker := self._workers.get(message.get('stage', -1)):
        worker.take(message)
        if kind == 'started':
          self._pids.add(message['pid'])
        elif kind == 'exited':
          self._pids.discard(worker.pid)
        news[worker] = None
    if ended:
      self._gone = True
      self._process.reap()
    return list(news)


class Hosts:
  """All hosts of a run. `start` first, `close` last.

  Attributes:
    secret: of the job, in hex; '' where there is one host.
    names: of the host of every stage.
    others: all but the first one.
  """

  def __init__(
    self,
    stages: int,
    local_hosts: int,
    store: hostmem.StoreFolder,
    workdir: str,
    replicas: int = 1,
  ):
    """Stores; nothing runs before `start`.

    Args:
      stages: of the run.
      local_hosts: how many hosts.
      store: of the first one, started.
      workdir: of the run, absolute.
      replicas: of each stage.

    Raises:
      base.ConfigError: there are more hosts than stages, or replicas.
    """
    self._replicas = replicas
    here = socket.gethostname()
    self._of_stage = placement.host_of_stages(stages, local_hosts, replicas)
    names = [here, *(f'{here}-host{h}' for h in range(1, local_hosts))]
    self.names = [names[host] for host in self._of_stage]
    self.secret = secrets.token_hex(_SECRET_BYTES) if local_hosts > 1 else ''
    self.others = [
      RemoteHost(name, str(store.path.parent), host_store.run_id(workdir, host))
      for host, name in enumerate(names[1:], 1)
    ]
    self._name = here
    self._store = store
    self._server: Any = None
    self._address: str | None = None

  def start(self, lock_fds: tuple[int, ...]) -> None:
    """Starts the other hosts' agents, and to serve this one's store.

    Args:
      lock_fds: of the run, which all its processes inherit.
    """
    if not self.others:
      return
    from moetion_jax import store_server  # one host needs no network

    parent_death.adopt_orphans()
    for host in self.others:
      host.start(self.secret, lock_fds)
    self._server = store_server.StoreServer(
      self._store.path, secret=bytes.fromhex(self.secret)
    )
    self._server.start()
    self._address = self._server.address

  def close(self) -> None:
    """Ends the other hosts' agents, with all that is theirs."""
    for host in self.others:
      host.close()
    if self._server:
      self._server.close()
      self._server = None

  def worker(
    self, stage: int, replica: int, generation: int = 1
  ) -> processes.WorkerProcess:
    """A worker of the host of its stage, to be started."""
    host = self._of_stage[stage]
    if host:
      return RemoteWorker(self.others[host - 1], stage, generation)
    return processes.WorkerProcess(
      stage,
      generation,
      self._name,
      replica=replica,
      is_alone=self._replicas == 1,
    )

  def standby(self, replica: int) -> processes.WorkerProcess:
    """A process of this host that may become any of its workers.

    Args:
      replica: that it is if it has joined a world by then.
    """
    return processes.WorkerProcess(
      protocol.STANDBY,
      0,
      self._name,
      replica=replica,
      is_alone=self._replicas == 1,
    )

  def store_of(self, stage: int) -> pathlib.Path:
    """The store folder of a stage's host; all hosts are on this machine."""
    host = self._of_stage[stage]
    return self.others[host - 1].store if host else self._store.path

  def stores(self) -> list[pathlib.Path]:
    """The store folders of all hosts."""
    return [self._store.path, *(host.store for host in self.others)]

  def keep(self, keep: bool) -> None:
    """Whether the other hosts' stores stay when they are closed."""
    for host in self.others:
      host.keeps_store = keep

  def register(
    self,
    selector: selectors.BaseSelector,
    react: Callable[[RemoteWorker], None],
  ) -> None:
    """Has `react` called with workers of other hosts that have news."""
    for host in self.others:
      for fd, call in host.sources():
        selector.register(
          fd, selectors.EVENT_READ, functools.partial(_pass_on, call, react)
        )

  def locations(
    self, workers: Sequence[processes.WorkerProcess]
  ) -> list[protocol.Message]:
    """Where their entries are, as in the message `locations`."""
    addresses = {host['host']: host['address'] for host in self.agents()}
    return [
      {
        'stage': worker.stage,
        'replica': worker.replica,
        'host': worker.host,
        'address': addresses[worker.host] or '',
        'generation': worker.generation,
      }
      for worker in workers
    ]

  def agents(self) -> list[dict[str, Any]]:
    """Who they are, as in `workers.json`."""
    return [
      {'host': self._name, 'pid': os.getpid(), 'address': self._address},
      *(
        {'host': host.name, 'pid': host.pid, 'address': host.address or None}
        for host in self.others
      ),
    ]


def _pass_on(
  call: Callable[[], Any], react: Callable[[RemoteWorker], None]
) -> None:
  result = call()
  for worker in result if isinstance(result, list) else ():
    react(worker)
