"""Idle time of a stage: it has no entry to work on and runs no program.

Programs are dispatched and run on their own, so a loop that waits for an entry
says nothing of the device. The end of the last program does, and somebody has
to wait for it: a thread, while the loop waits for the entry.
"""

from __future__ import annotations

import queue
import threading
import time
from typing import Any

import jax


class _Wait:
  """One wait of the loop."""

  def __init__(self, output: Any):
    self.output = output
    self.begin = time.monotonic()
    self.ready_at: float | None = None


class IdleClock:
  """Measures the waits of one thread. Call `start` first, `close` last."""

  def __init__(self):
    """Starts nothing yet."""
    self._waits: queue.SimpleQueue[_Wait | None] = queue.SimpleQueue()
    self._thread: threading.Thread | None = None

  def start(self) -> None:
    """Starts the thread."""
    self._thread = threading.Thread(
      target=self._watch, name='idle clock', daemon=True
    )
    self._thread.start()

  def close(self) -> None:
    """Ends the thread, once the last program that it watches has ended."""
    if self._thread is not None:
      self._waits.put(None)
      self._thread.join()
      self._thread = None

  def begin(self, outputs: Any) -> _Wait:
    """Begins a wait.

    Args:
      outputs: pytree that the program dispatched last returns; None if the
        program is known to have ended. Donating it meanwhile is fine.
    """
    leaves = jax.tree.leaves(outputs)
    wait = _Wait(leaves[0] if leaves else None)
    if wait.output is None or wait.output.is_ready():
      wait.ready_at = wait.begin
    else:
      self._waits.put(wait)
    return wait

  def idle_seconds(self, wait: _Wait) -> float:
    """Returns for how long no program ran during a wait that ends now."""
    if wait.ready_at is None:
      return 0.0
    return time.monotonic() - wait.ready_at

  def _watch(self) -> None:
    while wait := self._waits.get():
      try:
        wait.output.block_until_ready()
      except Exception:  # donated: the loop waits no more; or it reports it
        continue
      finally:
        wait.output = None
      wait.ready_at = time.monotonic()
