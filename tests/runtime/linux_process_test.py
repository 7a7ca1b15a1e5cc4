"""Signals that end a run, counted as they come; processes that are stopped."""

import os
import signal
import subprocess
import sys
import time

import pytest

from moetion_jax.runtime import linux_process


@pytest.fixture
def hangup():
  """What a test does with the handler of SIGHUP is undone.

  Nor is a hangup ignored, as it is below nohup.
  """
  before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
  yield lambda: os.kill(os.getpid(), signal.SIGHUP)
  signal.signal(signal.SIGHUP, before)


def test_a_terminal_that_goes_counts_once(hangup):
  """It sends a hangup, and so does its shell; twice means at once."""
  pipe = linux_process.SignalPipe()
  with pipe.open():
    hangup()
    hangup()
    assert pipe.take() == 1
    hangup()
    assert pipe.take() == 0
    os.kill(os.getpid(), signal.SIGTERM)
    assert pipe.take() == 1


def test_a_hangup_that_is_ignored_stays_so(hangup):
  signal.signal(signal.SIGHUP, signal.SIG_IGN)
  pipe = linux_process.SignalPipe()
  with pipe.open():
    hangup()
    os.kill(os.getpid(), signal.SIGINT)
    assert pipe.take() == 1
  assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN


def test_the_kernel_knows_who_is_stopped():
  process = subprocess.Popen(['sleep', '60'])
  try:
    assert not linux_process.is_stopped(process.pid)
    os.kill(process.pid, signal.SIGSTOP)
    deadline = time.monotonic() + 10
    while not linux_process.is_stopped(process.pid):
      assert time.monotonic() < deadline
    os.kill(process.pid, signal.SIGCONT)
    while linux_process.is_stopped(process.pid):
      assert time.monotonic() < deadline
  finally:
    process.kill()
    process.wait()
  assert not linux_process.is_stopped(process.pid)  # it is no more
  assert not linux_process.is_stopped(os.getpid())


def test_the_kernel_counts_what_a_process_is_given():
  """Two that want one core, and one that wants none."""
  core = min(os.sched_getaffinity(0))
  spin = f'import os\nos.sched_setaffinity(0, [{core}])\nwhile True: pass'
  spinners = [subprocess.Popen([sys.executable, '-c', spin]) for _ in range(2)]
  sleeper = subprocess.Popen(['sleep', '60'])
  try:
    deadline = time.monotonic() + 60
    while True:
      found = linux_process.usage(spinners[0].pid)
      assert found is not None and time.monotonic() < deadline, found
      if min(found.worked_seconds, found.queued_seconds) > 0.2:
        break
    assert found.is_held
    while (slept := linux_process.usage(sleeper.pid)) and slept.is_held:
      assert time.monotonic() < deadline
    assert slept is not None and slept.queued_seconds < found.queued_seconds
  finally:
    for process in (*spinners, sleeper):
      process.kill()
      process.wait()
  assert linux_process.usage(sleeper.pid) is None
