"""What a worker hears of its agent, whatever its threads wait for."""

import fcntl
import os
import queue
import threading

import pytest

from moetion_jax import errors
from moetion_jax.recovery import hang_detection, notices, orders
from moetion_jax.runtime import messages
from moetion_jax.runtime.worker import agent_link

_SECONDS = 20
_PIPE_BYTES = 4096


@pytest.fixture
def pipes():
  """(link, what its worker says, function that tells it something)."""
  status, their_status = os.pipe()
  fcntl.fcntl(status, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)
  their_control, control = os.pipe()
  link = agent_link.AgentLink(their_status, their_control)
  link.start()

  def tell(message):
    messages.write(control, messages.pack(message))

  # Its thread speaks as long as its process lives: that end stays open.
  with open(status, 'rb', closefd=False) as said:
    yield link, said, tell
  os.close(control)


def _heard(said, kind):
  for line in said:
    if isinstance(message := messages.unpack(messages.FromWorker, line), kind):
      return message
  raise AssertionError('the pipe ended')


def _go(line):
  return orders.Go(
    start=0,
    complete_at=0,
    newest=0,
    target=0,
    replays_until=0,
    line=line,
    is_fresh=True,
    ring_bytes=0,
    cells=0,
    pool_files=0,
    pool_bytes=0,
    decisions=(),
  )


def test_the_line_is_told_when_it_moves(pipes):
  link, _, tell = pipes
  told = queue.Queue()
  tell(_go(3))
  tell(messages.Line(iteration=5, entry_line=6))
  assert link.command() == _go(3)
  # What came after the order counts, though the order is obeyed only now.
  while True:
    link.retaining(lambda *lines: told.put(lines))
    if told.get(timeout=_SECONDS) == (5, 6):
      break
  tell(messages.Line(iteration=8, entry_line=9))
  while told.get(timeout=_SECONDS) != (8, 9):  # nobody asked; 5 may come twice
    pass


def test_it_hears_while_its_agent_reads_nothing(pipes):
  link, said, tell = pipes
  told = queue.Queue()
  link.retaining(lambda *lines: told.put(lines))
  assert told.get(timeout=_SECONDS) == (0, 0)
  sent = threading.Event()

  def send():
    long = 'x' * (2 * _PIPE_BYTES)
    link.send(notices.Failed(error=long, iteration=1))
    sent.set()

  thread = threading.Thread(target=send, daemon=True)
  thread.start()
  _heard(said, notices.State)  # it speaks; from here on nobody reads
  tell(orders.Propose(limit=3))
  tell(messages.Locations(locations=()))
  tell(messages.Line(iteration=2, entry_line=2))
  assert told.get(timeout=_SECONDS) == (2, 2)
  assert not sent.is_set()
  assert len(_heard(said, notices.Failed).error) == 2 * _PIPE_BYTES
  assert _heard(said, notices.Answer) == notices.Answer(limit=3, begun=0)
  thread.join(_SECONDS)


def test_the_agent_hears_first_that_a_worker_meets_the_others(pipes):
  """JAX ends a process that does not meet them, and says nothing more."""
  link, said, _ = pipes
  meeting = hang_detection.WorkerState.MEETING
  with link.meeting():
    # Before the thread looks again: this is written already.
    known = [
      messages.unpack(messages.FromWorker, line)
      for line in os.read(said.fileno(), _PIPE_BYTES).splitlines()
    ]
    assert known[-1].state is meeting
  while _heard(said, notices.State).state is meeting:
    pass


def test_who_has_not_met_the_others_says_so_to_the_end(pipes):
  link, said, _ = pipes
  meeting = hang_detection.WorkerState.MEETING
  with pytest.raises(errors.UnmetError), link.meeting():
    raise errors.UnmetError
  while _heard(said, notices.State).state is not meeting:
    pass
  assert _heard(said, notices.State).state is meeting
