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
from moetion_jax.recovery import actions, events, notices
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
  notices.Reported,
  notices.Stored,
  notices.Resumed,
  notices.CaughtUp,
  notices.Done,
  notices.HandedOver,
  notices.Damaged,
)
# What is handled, and by whom, until all can train; and from then on. Of what
# workers say the function gets the worker and the message.
_BEGINNING: _Handlers = {
  events.Started: beginning.started,
  events.Died: failing.died_early,
  events.StopAsked: ending.stop_asked,
  events.Looked: failing.looked_early,
  notices.Ready: beginning.ready,
  notices.State: progress.says,
  notices.Faulted: failing.faulted,
  notices.Refused: failing.refused,
  notices.Failed: failing.failed_early,
}
_RUN: _Handlers = {
  events.Died: failing.died,
  events.StopAsked: ending.stop_asked,
  # Of one that took the place of a worker that died when all could train.
  notices.Ready: lambda *unused: None,
  events.Looked: failing.looked,
  notices.State: progress.trains,
  notices.Resumed: progress.resumed,
  notices.CaughtUp: progress.caught_up,
  notices.Stored: progress.stored,
  notices.Reported: progress.reported,
  notices.Answer: progress.answered,
  notices.StoppedHere: going_back.stopped_here,
  notices.Done: ending.done,
  notices.HandedOver: ending.handed_over,
  notices.Damaged: ending.damaged,
  notices.Rewritten: ending.rewritten,
  notices.Saved: ending.saved,
  notices.Faulted: failing.faulted,
  notices.Refused: failing.refused,
  notices.Failed: failing.failed,
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
    worker.heard(state.watched)
    if worker.is_going_back and isinstance(message, _PAST):
      return None
    return handlers[type(message)](state, worker, message)
