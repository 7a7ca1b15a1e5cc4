"""The worker's side of the pipes between it and its agent."""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from moetion_jax import errors
from moetion_jax.policies import decision as decision_lib
from moetion_jax.recovery import hang_detection, notices, orders
from moetion_jax.runtime import messages
from moetion_jax.runtime.worker import iteration_limit

if TYPE_CHECKING:  # this imports JAX, which a standby does at low priority
  from moetion_jax.logs import interface as log_interface

_OTHERS = 'the others of its stage'
_STATE_SECONDS = 0.25  # between two looks at what the worker does

Retain = Callable[[int, int], None]
Decide = Callable[[decision_lib.CaptureDecision], None]


class StopHereError(errors.MoetionError):
  """The worker goes back to an earlier state, in this process."""

  def __init__(self):
    super().__init__('the stages go back')


class AgentLink:
  """The pipes between a worker and its agent, served by two threads.

  One thread reads: it acts on some messages, and the rest wait for `command`.
  It waits for nothing else, since what it hears may end any wait of the worker.
  The other one sends, and tells the agent what the worker does.

  Attributes:
    limit: the iteration limit, to be asked between iterations.
  """

  def __init__(self, status_fd: int, control_fd: int):
    """Stores the pipes; `start` starts the threads."""
    self.limit = iteration_limit.IterationLimit()
    self._status_fd = status_fd
    self._control_fd = control_fd
    self._lock = threading.Lock()  # one message at a time
    self._commands: queue.Queue[messages.ToWorker] = queue.Queue()
    self._program = 'starting'
    self._is_meeting = False
    self._shortage: hang_detection.Shortage | None = None
    self._scarce = ''
    self._worker: Any = None
    self._finished = False
    self._answers: queue.Queue[messages.FromWorker] = queue.Queue()
    self._locations_lock = threading.Lock()  # guards the next two attributes
    self._log: log_interface.Log | None = None
    self._locations: tuple[messages.ProducerLocation, ...] = ()
    self._decide: Decide = lambda decision: None
    self._line_lock = threading.Lock()  # guards the next two attributes
    self._lines = 0, 0  # recovery line and entry line, as last heard
    self._retain: Retain = lambda line, entry_line: None
    self._interrupt_lock = threading.Lock()  # guards the next two attributes
    self._stops_here = 0  # those that `command` has not returned yet
    self._interrupt: Callable[[], None] = lambda: None

  def start(self) -> None:
    """Starts the threads that read and that tell what the worker does."""
    for target in (self._read, self._tell):
      threading.Thread(target=target, daemon=True).start()

  def send(self, message: messages.FromWorker) -> None:
    """Sends a message to the agent."""
    with self._lock:
      messages.write(self._status_fd, messages.pack(message))

  def command(self) -> messages.ToWorker:
    """Waits for the agent's next command."""
    message = self._commands.get()
    if isinstance(message, orders.StopHere):
      with self._interrupt_lock:
        self._stops_here -= 1
        self.limit.interrupt(self.is_interrupted)
    return message

  @property
  def is_interrupted(self) -> bool:
    """True while a command to go back waits to be taken."""
    return self._stops_here > 0

  def interrupting(self, interrupt: Callable[[], None]) -> None:
    """Sets the function that is called when the worker is to go back."""
    with self._interrupt_lock:
      self._interrupt = interrupt
      if self.is_interrupted:
        interrupt()

  def _stop_here(self, message: orders.StopHere) -> None:
    with self._interrupt_lock:
      self._stops_here += 1
      self.limit.interrupt(True)
      self._interrupt()
    self._commands.put(message)

  def compiling(self, program: str) -> None:
    """Notes the program that is compiled now."""
    self._program = program

  @contextlib.contextmanager
  def meeting(self) -> Iterator[None]:
    """Notes that the worker meets its world, while the context lasts.

    The agent hears it before: JAX may end this process, and not say why.
    """
    self._is_meeting = True
    self._tell_state()
    yield
    self._is_meeting = False

  def training(self, worker: Any) -> None:
    """Sets whose progress is reported; None for nobody."""
    self._finished, self._shortage = False, None
    self._worker = worker

  def blocked(
    self, shortage: hang_detection.Shortage | None, what: str = ''
  ) -> None:
    """Notes what the worker lacks, and for what; None: nothing any more."""
    self._shortage, self._scarce = shortage, what

  def finished(self) -> None:
    """Notes that from now on the worker waits for nothing but the agent."""
    self._finished = True

  def deciding(self, decide: Decide) -> None:
    """Sets the function that is called with each new decision."""
    self._decide = decide

  def retaining(self, retain: Retain) -> None:
    """Sets the function that is called with the lines, now and if they move."""
    with self._line_lock:
      self._retain = retain
      retain(*self._lines)

  def locating(self, log: log_interface.Log | None) -> None:
    """Sets the log that is told where entries are, as far as known."""
    with self._locations_lock:
      self._log = log
      self._locate()

  def _locate(self) -> None:
    if self._log and self._locations:
      self._log.update_locations(
        {(one.stage, one.replica): one.location for one in self._locations}
      )

  @property
  def iteration(self) -> int:
    """The iteration that the worker works on; 0 before the first one."""
    return self._worker.iteration if self._worker else 0

  def _read(self) -> None:
    with open(self._control_fd, 'rb') as pipe:
      for line in pipe:
        match message := messages.unpack(messages.ToWorker, line):
          case orders.Propose(limit=limit):
            begun = self.limit.propose(limit)
            self._answers.put(notices.Answer(limit=limit, begun=begun))
          case orders.Commit():
            self.limit.commit(message.limit)
          case messages.Line():
            with self._line_lock:
              self._lines = message.iteration, message.entry_line
              self._retain(*self._lines)
          case orders.Decide():
            self._decide(message.decision)
          case orders.StopHere():
            self._stop_here(message)
          case messages.Locations():
            with self._locations_lock:
              self._locations = message.locations
              self._locate()
          case orders.Go():
            with self._line_lock:
              self._lines = message.line, message.entry_line
            self._commands.put(message)
          case _:
            self._commands.put(message)

  def _tell(self) -> None:
    """Tells what the worker does, again and again: silence is a sign too."""
    while True:
      self._tell_state()
      with contextlib.suppress(queue.Empty):
        self.send(self._answers.get(timeout=_STATE_SECONDS))

  def _tell_state(self) -> None:
    with self._lock:  # or what was so before might be told after this
      messages.write(self._status_fd, messages.pack(self._state()))

  def _state(self) -> notices.State:
    states, worker = hang_detection.WorkerState, self._worker
    if self._is_meeting:
      return notices.State(
        state=states.MEETING, detail=_OTHERS, iteration=0, steps=0
      )
    if worker is None:
      return notices.State(
        state=states.COMPILING, detail=self._program, iteration=0, steps=0
      )
    state, detail, shortage = states.RUNNING, worker.program, self._shortage
    if shortage:
      state, detail = states.BLOCKED, shortage.describe(self._scarce)
    elif self._finished:  # the others may take long to finish
      state, detail = states.DONE, ''
    elif blocked_for := worker.log.blocked_for:
      shortage = hang_detection.Shortage.ROOM
      state, detail = states.BLOCKED, shortage.describe(blocked_for)
    elif waiting_for := worker.log.waiting_for:
      state, detail = states.WAITING, str(waiting_for)
    return notices.State(
      state=state,
      detail=detail,
      shortage=shortage,
      iteration=worker.iteration,
      steps=worker.steps,
    )
