"""A child process as its owner sees it, who must not wait for it."""

import contextlib
import os
import resource
import signal

import pytest

from moetion_jax.logs import remote
from moetion_jax.runtime import messages, spec as spec_lib
from moetion_jax.runtime.hosts import child_process
from tests.support import helpers


def test_a_child_that_cannot_be_started_is_named():
  """And is closed as if it had ended."""
  before = resource.getrlimit(resource.RLIMIT_NOFILE)
  child = child_process.WorkerProcess(spec_lib.STANDBY)
  held = []
  try:
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, before[1]))
    with contextlib.suppress(OSError):
      while True:
        held.append(os.open(os.devnull, os.O_RDONLY))
    for _ in range(5):  # of the pipes that it needs, not all can be made
      os.close(held.pop())
    with pytest.raises(OSError, match='Too many open files: .*worker.main'):
      child.start(helpers.worker_spec(helpers.micro_run()), {}, ())
  finally:
    resource.setrlimit(resource.RLIMIT_NOFILE, before)
    for fd in held:
      os.close(fd)
  assert child.pid == 0
  child.kill()
  child.close()


@pytest.mark.timeout(60)
def test_a_child_that_is_stopped_keeps_nobody_waiting():
  child = child_process.WorkerProcess(spec_lib.STANDBY)
  child.start(helpers.worker_spec(helpers.micro_run()), {}, ())
  os.kill(child.pid, signal.SIGSTOP)
  one = messages.ProducerLocation(
    stage=0,
    replica=0,
    location=remote.Location(host='x' * 1024, address='', generation=1),
  )
  for _ in range(10):  # more than a pipe holds
    child.send(messages.Locations(locations=(one,) * 100))
  child.kill()
  child.close()
  assert child.describe_exit() == 'was killed by SIGKILL'
