"""Reads of entries on other hosts: where they lie, and how they are fetched.

A transport is a module with a `ReadServer`, which runs in the agent of the
producer's host, and a `ReadClient`, which `boundary_log.BoundaryLog` is given.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import NamedTuple, Protocol

import numpy as np

from moetion_jax import errors, keys
from moetion_jax.hostmem import entry


@dataclasses.dataclass(frozen=True, kw_only=True)
class Location:
  """Location of the entries of one producer.

  Attributes:
    host: name of the host, as the readers' settings call it.
    address: address of that host's server.
    generation: generation of the producer.
  """

  host: str
  address: str = ''
  generation: int = 0


class Arrival(NamedTuple):
  """Result of a read that ended.

  Attributes:
    key: name of the entry.
    header: header of the entry; None if there is none.
    result: the entry, complete and correct, or the error that says why not.
  """

  key: keys.EntryKey
  header: entry.EntryHeader | None
  result: np.ndarray | errors.StoreError


class ReadClient(Protocol):
  """Reads entries from the servers of other hosts.

  Used by one thread: `want`, `wait`, `collect`, again and again. `collect` is
  called at least once a second: it repeats what got no answer, since a request
  dies with its server, and only the reader knows that it still waits.
  """

  def want(self, key: keys.EntryKey, address: str) -> None:
    """Asks for an entry, unless that address was asked for it already.

    Raises:
      StoreError: the address is not loopback and there is no secret.
    """

  def forget(self, key: keys.EntryKey) -> None:
    """Stops asking for an entry."""

  def keep(self, addresses: set[str]) -> None:
    """Disconnects from every address but these."""

  def wait(self, fd: int, timeout_seconds: float) -> None:
    """Waits until something came, or a descriptor is readable."""

  def collect(self) -> list[Arrival]:
    """Returns what came since the last call."""
    ...

  def close(self) -> None:
    """Drops all connections and reads. May be called twice."""


# Makes the client of a worker, with the seconds without an answer until a read
# is sent again.
Connect = Callable[[keys.WorkerId, float], ReadClient]


class ReadServer(Protocol):
  """Serves the committed entries of a store folder to other hosts.

  A request is answered when its entry exists: at once, or when it comes.
  """

  @property
  def address(self) -> str:
    """Address that readers connect to, known after `start`."""
    ...

  def start(self) -> None:
    """Binds the address and starts to serve.

    Raises:
      StoreError: the address is taken, or is not loopback and there is no
        secret; or the doorbell cannot be bound.
    """

  def close(self) -> None:
    """Stops serving; readers go on asking. May be called twice."""

  def fence(self, worker: keys.WorkerId) -> None:
    """Refuses a worker's older generations, also what they asked before."""
