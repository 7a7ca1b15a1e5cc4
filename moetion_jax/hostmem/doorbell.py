"""Doorbells: how processes of one host tell each other to look again.

Entries are found in mapped memory; a ring only says that it is worth a look.
So it carries nothing, needs no identity, cannot be forged to any effect, and
one that finds the bell's queue full may be dropped: its owner has yet to look.

A bell is a datagram socket of the kernel (AF_UNIX) in the store folder, which
only its owner can enter. Whoever rings lists the folder each time: there is
nothing to subscribe to, and nothing to restore when a process is replaced.
"""

from __future__ import annotations

import contextlib
import os
import pathlib
import socket

from moetion_jax import errors
from moetion_jax.hostmem import private

_SUFFIX = '.bell'


class Doorbell:
  """A process's own bell, and the means to ring those of the others.

  Call `start` before the first look at shared memory; then wait until `fileno`
  is readable, `drain`, look. In that order no commit is missed.
  """

  def __init__(self, folder: str | os.PathLike[str], name: str):
    """Stores the names.

    Args:
      folder: the store folder.
      name: name that is unique among the living processes of the folder.
    """
    self._folder = pathlib.Path(folder)
    self._name = name + _SUFFIX
    self._folder_fd = -1
    self._socket: socket.socket | None = None

  def start(self) -> None:
    """Binds the bell, in place of one that a dead process left.

    Raises:
      StoreError: the bell cannot be bound in the folder.
      SystemRefusalError: that is not because of the folder.
    """
    try:
      self._folder_fd = os.open(
        self._folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
      )
      (self._folder / self._name).unlink(missing_ok=True)
      self._socket = socket.socket(
        socket.AF_UNIX,
        socket.SOCK_DGRAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC,
      )
      private.restrict(self._socket.fileno())  # its file begins with that mode
      self._socket.bind(self._address(self._name))
      private.restrict(self._folder / self._name)
    except OSError as error:
      self.close()
      errors.check_limits(error, self._folder)
      raise errors.StoreError(f'{self._folder}: {error.strerror}') from error

  def close(self) -> None:
    """Removes the bell. May be called twice."""
    if self._socket is not None:
      self._socket.close()
      self._socket = None
      (self._folder / self._name).unlink(missing_ok=True)
    if self._folder_fd >= 0:
      os.close(self._folder_fd)
      self._folder_fd = -1

  def fileno(self) -> int:
    """Returns the descriptor to poll; it is readable once the bell was rung."""
    assert self._socket is not None
    return self._socket.fileno()

  def drain(self) -> None:
    """Forgets the rings so far; look into memory after this, not before."""
    assert self._socket is not None
    with contextlib.suppress(BlockingIOError):
      while True:
        self._socket.recv(1)  # longer ones are cut by the kernel

  def ring(self) -> None:
    """Rings this process's own bell, to wake the thread that polls it."""
    self._ring(self._name)

  def ring_others(self) -> None:
    """Rings every other bell in the folder."""
    for name in os.listdir(self._folder_fd):
      if name.endswith(_SUFFIX) and name != self._name:
        self._ring(name)

  def _ring(self, name: str) -> None:
    if self._socket is None:  # closed: nobody listens here either
      return
    # Full: its owner has yet to look. Refused or gone: nobody is there to look.
    with contextlib.suppress(
      BlockingIOError, ConnectionRefusedError, FileNotFoundError
    ):
      self._socket.sendto(b'\0', self._address(name))

  def _address(self, name: str) -> str:
    # The kernel takes 107 bytes at most: go through the folder's descriptor.
    return f'/proc/self/fd/{self._folder_fd}/{name}'
