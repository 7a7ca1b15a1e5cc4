"""Faults from outside, done to real processes, files and disks."""

import dataclasses
import os
import pathlib
import signal
import subprocess

import pytest

from launch.chaos import outside
from moetion_jax.hostmem import segment


@dataclasses.dataclass
class _Run:
  """A target that trains nothing."""

  workdir: pathlib.Path
  hostmem: pathlib.Path
  agent: subprocess.Popen
  reader: subprocess.Popen
  names: tuple = ()

  def workers(self):
    return [
      {'stage': stage, 'replica': replica, 'pid': self.reader.pid}
      for stage, replica in self.names
    ]

  def living(self):
    return [p.pid for p in (self.agent, self.reader) if p.poll() is None]


@pytest.fixture
def run(tmp_path):
  """A run whose agent does nothing, and has a reader."""
  hostmem = tmp_path / 'hostmem'
  store = hostmem / 'moetion-x'
  store.mkdir(parents=True)
  segment.segment_path(store, 1, 0).write_bytes(bytes(4096))
  with (
    subprocess.Popen(
      ['cat'], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL
    ) as reader,
    subprocess.Popen(['sleep', 'infinity'], stdout=reader.stdin) as agent,
  ):
    yield _Run(tmp_path, hostmem, agent, reader)
    for process in (agent, reader):
      process.kill()


def _do(run, kind, **fields):
  fault = outside.Fault(kind=kind, stage=1, after_seconds=0.0, **fields)
  return outside.TABLE[kind].act(run, fault)


def test_a_worker_that_ends_meanwhile_is_not_hit(run):
  run.names = ((1, 0),)
  listed = [run.reader.pid]
  run.reader.kill()
  run.reader.wait()
  run.living = lambda: listed
  assert not _do(run, outside.Kind.KILL_WORKER)


def test_a_worker_is_found_by_its_name(run):
  run.names = (0, 0), (1, 1), (None, 0)
  assert not _do(run, outside.Kind.KILL_WORKER)
  run.names += ((1, 0),)
  assert _do(run, outside.Kind.STOP_WORKER)
  _, status = os.waitpid(run.reader.pid, os.WUNTRACED)
  assert os.WIFSTOPPED(status)
  assert _do(run, outside.Kind.KILL_WORKER)
  assert run.reader.wait() == -signal.SIGKILL
  assert not _do(run, outside.Kind.KILL_WORKER)


def test_the_standby_is_killed(run):
  run.names = ((1, 0),)
  assert not _do(run, outside.Kind.KILL_STANDBY)
  run.names = (1, 1), (None, 0)
  assert _do(run, outside.Kind.KILL_STANDBY)
  assert run.reader.wait() == -signal.SIGKILL


def test_the_agent_is_stopped_for_some_time_and_killed(run):
  assert _do(run, outside.Kind.STOP_AGENT, for_seconds=0.1)
  _, status = os.waitpid(run.agent.pid, os.WCONTINUED)
  assert os.WIFCONTINUED(status)
  assert _do(run, outside.Kind.KILL_AGENT)
  assert run.agent.wait() == -signal.SIGKILL


def test_a_segment_is_cut_then_deleted(run):
  (path,) = run.hostmem.glob('*/*.segment')
  assert _do(run, outside.Kind.CUT_SEGMENT)
  assert path.stat().st_size == 2048
  assert _do(run, outside.Kind.DELETE_SEGMENT)
  assert not path.exists()
  assert not _do(run, outside.Kind.DELETE_SEGMENT)
  assert not _do(run, outside.Kind.CUT_SEGMENT)


def test_nobody_reads_any_more(run):
  assert _do(run, outside.Kind.CLOSE_STREAMS)
  with pytest.raises(BrokenPipeError), run.reader.stdin as printed:
    printed.write(b'more')


def test_a_disk_is_full_for_some_time(run):
  disk = run.workdir / 'disk'
  disk.mkdir()
  if outside.Kind.FILL_DISK not in outside.possible(run.workdir):
    pytest.skip('mounting a tmpfs is not allowed here')
  script = 'while head -c 65536 /dev/zero > written; do :; done; exit 7'
  with outside.own_disk(disk, 1):
    with subprocess.Popen(
      ['sh', '-c', script], cwd=disk, stderr=subprocess.DEVNULL
    ) as agent:
      full = dataclasses.replace(run, workdir=disk, agent=agent)
      # It ends with the agent, long before that.
      assert _do(full, outside.Kind.FILL_DISK, for_seconds=60.0)
    assert agent.returncode == 7
    assert os.listdir(disk) == ['written']
    (disk / 'kept').write_text('mine')
  assert not os.path.ismount(disk)
  assert (disk / 'kept').read_text() == 'mine'


def test_what_was_written_stays_if_the_run_fails(tmp_path):
  if outside.Kind.FILL_DISK not in outside.possible(tmp_path):
    pytest.skip('mounting a tmpfs is not allowed here')
  disk = tmp_path / 'disk'
  disk.mkdir()
  with pytest.raises(KeyboardInterrupt):
    with outside.own_disk(disk, 1):
      (disk / 'kept').write_text('mine')
      raise KeyboardInterrupt
  assert (disk / 'kept').read_text() == 'mine'
