"""The agent's side of a script of faults: which of them are still to come.

Each happens once in a run, however often the same command is started: what has
happened stands in `events.jsonl`.

No JAX here: the agent uses this module and never creates a JAX backend.
"""

from __future__ import annotations

import json
import pathlib
from collections.abc import Sequence

from moetion_jax import faults

EVENT = 'fault'
_FIELDS = ('stage', 'replica', 'iteration', 'phase')


def event_fields(fault: faults.Fault) -> dict[str, object]:
  """What stands in the event of a fault."""
  return {
    'number': fault.number,
    'fault': fault.kind,
    **{name: getattr(fault, name) for name in _FIELDS},
  }


class FaultBook:
  """A script, and what of it has happened. `read` first."""

  def __init__(self, script: Sequence[faults.Fault]):
    """Stores the script."""
    self._coming = {fault.number: fault for fault in script}

  def read(self, path: pathlib.Path) -> None:
    """Strikes out what happened before this agent was started.

    Args:
      path: of the run's events; need not exist.
    """
    try:
      lines = path.read_bytes().splitlines()
    except FileNotFoundError:
      return
    for line in lines:
      try:
        event = json.loads(line)
      except ValueError:
        continue  # torn by a death
      fault = self._coming.get(event.get('number', -1))
      if (
        fault is not None
        and event.get('kind') == EVENT
        and event_fields(fault).items() <= event.items()
      ):
        del self._coming[fault.number]

  def of_worker(
    self, stage: int, begun: int, replica: int = 0
  ) -> tuple[faults.Fault, ...]:
    """What a worker that is started now has to do (`faults.of_worker`)."""
    return faults.of_worker(self._coming.values(), stage, begun, replica)

  def happens(self, number: int) -> faults.Fault:
    """A fault is announced: nobody else has it to do."""
    return self._coming.pop(number)
