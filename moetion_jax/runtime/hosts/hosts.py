"""The hosts of a run, as its leader sees them.

Host 0 is the agent that the user started. With `--local_hosts=N` each further
host is an agent process of its own on this machine (`host_agent`), with its own
store; to the leader its workers look like workers here. Entries of other hosts
are read over TCP, encrypted with a secret that is drawn for each run.
"""

from __future__ import annotations

import functools
import os
import pathlib
import secrets
import selectors
import socket
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

from moetion_jax import errors, keys
from moetion_jax.hostmem import run_store, segment, store_folder
from moetion_jax.logs import remote
from moetion_jax.runtime import (
  linux_process,
  messages,
  placement,
  spec as spec_lib,
)
from moetion_jax.runtime.hosts import child_process

if TYPE_CHECKING:
  from moetion_jax.runtime.hosts import remote_host

_SECRET_BYTES = 32


class StoreGoneError(errors.StoreError):
  """A host's store was removed; a run that starts again makes another one."""

  is_passing = True


class Hosts:
  """All hosts of a run. `start` first, `close` last.

  Attributes:
    secret: the job's secret, in hex; '' where there is one host.
    names: the name of every stage's host.
    others: all hosts but the first one.
  """

  def __init__(
    self,
    stages: int,
    local_hosts: int,
    store: store_folder.StoreFolder,
    replicas: int = 1,
  ):
    """Stores the arguments; nothing runs before `start`.

    Args:
      stages: number of stages of the run.
      local_hosts: number of hosts.
      store: the first host's store, started.
      replicas: number of replicas of each stage.

    Raises:
      errors.ConfigError: there are more hosts than stages, or several hosts
        and replicas.
    """
    self._replicas = replicas
    here = socket.gethostname()
    self._of_stage = placement.host_of_stages(stages, local_hosts, replicas)
    names = [here, *(f'{here}-host{h}' for h in range(1, local_hosts))]
    self.names = [names[host] for host in self._of_stage]
    self.secret = secrets.token_hex(_SECRET_BYTES) if local_hosts > 1 else ''
    self.others: list[remote_host.RemoteHost] = []
    if local_hosts > 1:
      # Here: a run of one host starts without all that hosts tell each other.
      from moetion_jax.runtime.hosts import remote_host

      self.others = [
        remote_host.RemoteHost(
          name,
          str(store.path.parent),
          run_store.host_id(store.run_id, host),
          store.workdir,
        )
        for host, name in enumerate(names[1:], 1)
      ]
    self._name = here
    self._store = store
    self._server: Any = None
    self._address: str | None = None

  def start(self, lock_fds: tuple[int, ...]) -> None:
    """Starts the other hosts' agents, and serves this host's store.

    Args:
      lock_fds: descriptors of the run's locks, which all processes inherit.
    """
    if not self.others:
      return
    from moetion_jax.logs import zmq_server

    linux_process.adopt_orphans()
    for host in self.others:
      host.start(self.secret, lock_fds)
    self._server = zmq_server.StoreServer(
      self._store.path, secret=bytes.fromhex(self.secret)
    )
    self._server.start()
    self._address = self._server.address

  def close(self) -> None:
    """Ends the other hosts' agents and workers; `keep` sets what stays."""
    for host in self.others:
      host.close()
    if self._server:
      self._server.close()
      self._server = None

  def worker(self, stage: int, replica: int) -> child_process.WorkerProcess:
    """Makes a worker on its stage's host; the caller starts it."""
    host = self._of_stage[stage]
    if host:
      return self.others[host - 1].worker(stage)
    return child_process.WorkerProcess(
      stage,
      self._name,
      replica=replica,
      is_alone=self._replicas == 1,
    )

  def standby(self, replica: int) -> child_process.WorkerProcess:
    """Makes a process that may become any worker of this host.

    Args:
      replica: the replica that it becomes if it has joined a world by then.
    """
    return child_process.WorkerProcess(
      spec_lib.STANDBY,
      self._name,
      replica=replica,
      is_alone=self._replicas == 1,
    )

  def store_of(self, stage: int) -> pathlib.Path:
    """Returns the store folder of a stage's host, always on this machine."""
    host = self._of_stage[stage]
    return self.others[host - 1].store if host else self._store.path

  def stores(self) -> list[pathlib.Path]:
    """Returns the store folders of all hosts."""
    return [self._store.path, *(host.store for host in self.others)]

  def gone(self) -> list[pathlib.Path]:
    """Returns the store folders that somebody removed while the run lived."""
    first = [self._store.path] if self._store.is_gone else []
    began = (host.store for host in self.others if host.address)
    return [*first, *(path for path in began if not path.is_dir())]

  def make_stores(self) -> None:
    """Makes the store anew after somebody removed it.

    Raises:
      errors.StoreError: it cannot be made, or there are several hosts, whose
        servers know the one that is gone.
    """
    if self.others:
      names = ' and '.join(map(str, self.gone()))
      raise StoreGoneError(
        f'{names}: was removed while its run lived, and with several hosts '
        'that cannot be made anew'
      )
    self._store.make_anew()

  def keep(self, keep: bool) -> None:
    """Sets whether the other hosts' stores stay when they are closed."""
    for host in self.others:
      host.keeps_store = keep

  def register(
    self,
    selector: selectors.BaseSelector,
    react: Callable[[remote_host.RemoteWorker], None],
  ) -> None:
    """Has `react` called with each worker of another host that has news."""
    for host in self.others:
      for fd, call in host.sources():
        selector.register(
          fd, selectors.EVENT_READ, functools.partial(_pass_on, call, react)
        )

  def fence(self, worker: keys.WorkerId) -> None:
    """Fences off a worker's older generations in the stores of all hosts.

    Args:
      worker: the generation of the worker that starts next.
    """
    segment.fence(self._store.path, worker)
    if self._server:
      self._server.fence(worker)
    for host in self.others:
      host.fence(worker)

  def locations(
    self,
    workers: Iterable[child_process.WorkerProcess],
    generations: Mapping[tuple[int, int], int],
  ) -> messages.Locations:
    """Returns where workers' entries are, and of which generations."""
    addresses = {host['host']: host['address'] for host in self.agents()}
    return messages.Locations(
      locations=tuple(
        messages.ProducerLocation(
          stage=worker.stage,
          replica=worker.replica,
          location=remote.Location(
            host=worker.host,
            address=addresses[worker.host] or '',
            generation=generations[worker.stage, worker.replica],
          ),
        )
        for worker in workers
      )
    )

  def away(self) -> str:
    """Names the agent of another host that a signal has stopped; '' if none."""
    for host in self.others:
      if linux_process.is_stopped(host.pid):
        return f'{host.name}: its agent (pid {host.pid})'
    return ''

  def agents(self) -> list[dict[str, Any]]:
    """Returns the agents of all hosts, as in `workers.json`."""
    return [
      {'host': self._name, 'pid': os.getpid(), 'address': self._address},
      *(
        {'host': host.name, 'pid': host.pid, 'address': host.address or None}
        for host in self.others
      ),
    ]


def _pass_on(
  call: Callable[[], Any], react: Callable[[remote_host.RemoteWorker], None]
) -> None:
  result = call()
  for worker in result if isinstance(result, list) else ():
    react(worker)
