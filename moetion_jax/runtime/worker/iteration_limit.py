"""The iteration after which a worker ends: its loop asks, its agent sets it."""

from __future__ import annotations

import threading


class IterationLimit:
  """A worker's limit: its loop asks, its agent sets, in two threads."""

  def __init__(self):
    """Starts without a limit."""
    self._changed = threading.Condition()  # guards what follows
    self._begun = 0
    self._limit: int | None = None
    self._committed = False
    self._interrupted = False

  def propose(self, limit: int) -> int:
    """Takes a limit unless it is passed; returns the iteration begun last."""
    with self._changed:
      if self._begun <= limit:
        self._limit = limit
      self._changed.notify_all()
      return self._begun

  def commit(self, limit: int) -> None:
    """Makes the limit that everyone accepted final."""
    with self._changed:
      self._limit, self._committed = limit, True
      self._changed.notify_all()

  def interrupt(self, is_on: bool) -> None:
    """Sets whether `stop` returns True at once, for a worker to go back."""
    with self._changed:
      self._interrupted = is_on
      self._changed.notify_all()

  def stop(self, done: int) -> bool:
    """Returns True to end, False to begin the next iteration; may wait.

    Args:
      done: the iteration that is done.
    """
    with self._changed:
      self._begun = done
      self._changed.wait_for(
        lambda: (
          self._interrupted
          or self._committed
          or self._limit is None
          or self._begun < self._limit
        )
      )
      if self._interrupted:
        return True
      if self._limit is not None and self._begun >= self._limit:
        return True
      self._begun += 1
      return False
