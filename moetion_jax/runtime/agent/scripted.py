"""The agent's part in scripted faults: it notes them, and performs its own."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Sequence

from moetion_jax.runtime import faults, messages
from moetion_jax.runtime.hosts import child_process


def happens(
  book: faults.FaultBook,
  worker: child_process.WorkerProcess,
  message: messages.FaultHappens,
  event: Callable[..., None],
  everyone: Callable[[], Sequence[child_process.WorkerProcess]],
) -> None:
  """Notes a fault that a worker announced, and performs the agent's kinds.

  Args:
    book: the faults that have not happened yet.
    worker: the worker that announced the fault, and waits if it is the agent's.
    message: its message.
    event: writes the event.
    everyone: returns all processes of this agent.
  """
  fault = book.happens(message.number)
  event(faults.EVENT, **faults.event_fields(fault))
  worker.fault_at = message.at
  if fault.phase not in faults.START_PHASES:
    worker.iteration = max(worker.iteration, fault.iteration)
  if fault.kind is faults.FaultKind.KILL_ALL:
    for each in everyone():
      each.kill()
  if faults.TABLE[fault.kind].place is faults.Place.AGENT:
    os.kill(os.getpid(), signal.SIGKILL)
