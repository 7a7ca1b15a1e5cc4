"""A child process as its owner sees it, who must not wait for it."""

import contextlib
import os
import pathlib
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
    child.kill()
    child.close()
    for _ in range(5):  # none of them is left
      held.append(os.open(os.devnull, os.O_RDONLY))
  finally:
    resource.setrlimit(resource.RLIMIT_NOFILE, before)
    for fd in held:
      os.close(fd)
  assert child.pid == 0


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


@pytest.mark.timeout(60)
def test_a_full_disk_leaves_no_child_open(capfd):
  """Its last words cannot be kept: they are shown, and it is over."""
  child = child_process.WorkerProcess(spec_lib.STANDBY)
  child.start(helpers.worker_spec(helpers.micro_run()), {}, ())
  child.kill()
  child.open_log(pathlib.Path('/dev/full'))
  helpers.print_as(child, 'last words')
  fds = child.status_fd, child.output_fd, child.pid_fd
  with pytest.raises(OSError, match='No space left on device: .*/dev/full'):
    child.close()
  assert capfd.readouterr().err.endswith('[standby] last words\n')
  for fd in fds:
    with pytest.raises(OSError, match='Bad file descriptor'):
      os.fstat(fd)
  child.close()


def test_a_folder_of_logs_that_was_removed_is_made_anew(tmp_path):
  """But not the workdir, if that is what was removed."""
  transcript = child_process.Transcript('stage 0')
  transcript.add(b'said before')
  transcript.open_log(tmp_path / 'logs' / 'stage-0.log')
  transcript.close()
  assert (tmp_path / 'logs' / 'stage-0.log').read_bytes() == b'said before\n'
  with pytest.raises(FileNotFoundError):
    transcript.open_log(tmp_path / 'run' / 'logs' / 'stage-0.log')
