"""What the system refuses is neither damage nor a wrong setting."""

import errno

import numpy as np
import pytest

from moetion_jax import errors, keys
from moetion_jax.hostmem import (
  doorbell,
  run_store,
  segment,
  segment_writer,
  store_folder,
)
from moetion_jax.runtime.agent import last_words
from moetion_jax.runtime.records import held_run, workdir
from moetion_jax.snapshots import file as snapshot_file, folders
from tests.support import helpers

_WORKER = keys.WorkerId(1, 0, 3)


@pytest.fixture
def log(shm_folder):
  """Path of a log with an entry of iteration 7, of generation 3."""
  writer = segment_writer.SegmentWriter(shm_folder, _WORKER, 4096, 4)
  writer.start()
  key = keys.EntryKey(7, 1, 0, keys.EntryKind.ACTIVATION, 0)
  writer.put(key, np.arange(10))
  writer.close()
  return writer.path


@pytest.fixture
def snapshot(shm_folder):
  """Path of a snapshot without buffers."""
  path = folders.snapshots_folder(shm_folder, 1, 0) / '7'
  path.mkdir(parents=True)
  snapshot_file.write(path, [], {})
  return path


def _is_refused():
  return pytest.raises(errors.SystemRefusalError, match=r'ulimit -n.*again$')


def test_a_log_is_not_lost_since_no_file_can_be_opened(log):
  size_bytes = segment.whole_bytes(log)
  looks = (
    lambda: segment.fence(log.parent, _WORKER),
    lambda: segment.whole_bytes(log),
    lambda: segment.newest_iteration(log),
  )
  for look in looks:
    with helpers.no_descriptor(), _is_refused():
      look()
  assert segment.whole_bytes(log) == size_bytes > 0
  assert segment.newest_iteration(log) == 7
  assert run_store.newest_generation(log.parent) == 3


def test_a_snapshot_is_not_damaged_since_no_file_can_be_opened(snapshot):
  for look in (snapshot_file.read_manifest, snapshot_file.open_snapshot):
    with helpers.no_descriptor(), _is_refused():
      look(snapshot)
  assert snapshot_file.read_manifest(snapshot).metadata == {}


@pytest.mark.parametrize(
  ('number', 'is_damage'),
  [(errno.EACCES, False), (errno.ENFILE, False), (errno.EIO, True)],
)
def test_what_says_something_of_a_file(number, is_damage):
  error = OSError(number, 'why', 'a/file')
  if is_damage:
    return errors.check_refusal(error)
  with pytest.raises(errors.SystemRefusalError, match='^a/file: why: '):
    errors.check_refusal(error)
  # Who may not write into a workdir names another one.
  if number == errno.EACCES:
    errors.check_limits(error)


def test_a_setting_is_not_wrong_since_no_file_can_be_opened(tmp_path):
  folder = workdir.Workdir(str(tmp_path), fresh=False)
  store = store_folder.StoreFolder(tmp_path, 'x')
  bell = doorbell.Doorbell(tmp_path, 'me')
  for start in (folder.lock, store.start, bell.start):
    with helpers.no_descriptor(), _is_refused():
      start()
    folder.close()
    store.close()
  (tmp_path / 'config.json').write_text('{')
  with helpers.no_descriptor(), _is_refused():
    held_run.read_id(tmp_path)
  folder.lock()
  with helpers.no_descriptor():
    why = last_words.of_system(OSError(errno.EMFILE, 'Too many'), folder)
  assert 'ulimit -n' in str(why)
  folder.close()


def test_a_command_says_it_in_a_line(capsys):
  def main():
    raise OSError(errno.EMFILE, 'Too many open files', 'x')

  assert errors.exit_code_of(main, 'it') == errors.ExitCode.FAILED
  said = capsys.readouterr().err
  assert said.startswith('it: error: x: Too many open files: raise the limit')
  assert said.count('\n') == 1

  def crash():
    raise OSError(errno.EIO, 'a bug')

  with pytest.raises(OSError, match='a bug'):
    errors.exit_code_of(crash, 'it')
