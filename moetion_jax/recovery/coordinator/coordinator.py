"""The coordinator: decides all that a run does, from its start to its end.

It is pure: events go in, actions come out. Nothing here reads a clock, a file
or a socket. The line, and the team, generation and iteration of every worker
are decided here alone; whoever acts on them keeps processes and files.

Where a dead stage starts again is decided by `plan.plan`, which
`going_back.after` asks after a death (`failing.died`).
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from typing import Any

from moetion_jax import errors
from moetion_jax.recovery import actions, events
from moetion_jax.recovery.coordinator import (
  beginning,
  ending,
  failing,
  going_back,
  progress,
  state as state_lib,
)

_Handlers = Mapping[type, Callable[..., Any]]

# Messages about finished work; ignored from a worker told to roll back.
_PAST = (
  events.Reported,
  events.Stored,
  events.Resumed,
  events.CaughtUp,
  events.Done,
  events.HandedOver,
  events.Damaged,
)
# What is handled, and by whom, until all can train; and from then on. Of what
# workers say the function gets the worker and the message.
_BEGINNING: _Handlers = {
  events.Started: beginning.started,
  events.Died: failing.died_early,
  events.StopAsked: ending.stop_asked,
  events.Looked: failing.looked_early,
  events.Ready: beginning.ready,
  events.State: progress.says,
  events.Faulted: failing.faulted,
  events.Refused: failing.refused,
  events.Failed: failing.failed_early,
}
_RUN: _Handlers = {
  events.Died: failing.died,
  events.StopAsked: ending.stop_asked,
  # Of one that took the place of a worker that died when all could train.
  events.Ready: lambda *unused: None,
  events.Looked: failing.looked,
  events.State: progress.trains,
  events.Resumed: progress.resumed,
  events.CaughtUp: progress.caught_up,
  events.Stored: progress.stored,
  events.Reported: progress.reported,
  events.Answer: progress.answered,
  events.StoppedHere: going_back.stopped_here,
  events.Done: ending.done,
  events.HandedOver: ending.handed_over,
  events.Damaged: ending.damaged,
  events.Rewritten: ending.rewritten,
  events.Saved: ending.saved,
  events.Faulted: failing.faulted,
  events.Refused: failing.refused,
  events.Failed: failing.failed,
}


class Coordinator:
  """Events in, actions out; see `events` and `actions`.

  Attributes:
    state: all that is known and decided; for others to read.
  """

  def __init__(self, settings: state_lib.Settings):
    """Stores the settings."""
    self.state: state_lib.State = state_lib.Beginning(settings=settings)
    self._work: Generator[actions.Question, Any, Any] | None = None

  def handle(self, event: events.Event) -> list[actions.Action]:
    """Takes in an event.

    Args:
      event: the event; the answer, if the last action was a question.

    Returns:
      What is to be done, in order.
    """
    state = self.state
    if isinstance(event, events.Tick):
      state.tick(event.now)
      return []
    try:
      if self._work is not None:
        is_broken = isinstance(event, events.Broke)
        state.do(
          self._work.throw(event.error) if is_broken else self._work.send(event)
        )
      else:
        self._work = self._begin_work(event)
        if self._work is not None:
          state.do(next(self._work))
    except StopIteration as stop:
      self._work = None
      if isinstance(stop.value, state_lib.Run):
        self.state = stop.value
    except errors.MoetionError as error:
      self._work, state.has_ended = None, True
      state.do(actions.Fail(error=error))
    decided = list(state.out)
    state.out.clear()
    return decided

  def _begin_work(
    self, event: events.Event
  ) -> Generator[actions.Question, Any, Any] | None:
    """Handles an event; returns what is left to do, if that has to ask."""
    state = self.state
    handlers = _RUN if isinstance(state, state_lib.Run) else _BEGINNING
    if state.has_ended and not isinstance(event, events.StopAsked):
      return None
    if not isinstance(event, events.Said):
      return handlers[type(event)](state, event)
    worker, message = state.worker(event.worker), event.message
    worker.heard_at = state.watched
    if worker.is_going_back and isinstance(message, _PAST):
      return None
    return handlers[type(message)](state, worker, message)
