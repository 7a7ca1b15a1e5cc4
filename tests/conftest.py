"""Sets JAX up for in-process tests, before its backend exists."""

import os
import pathlib
import shutil
import subprocess
import tempfile

import hypothesis
import jax
import pytest

from tests.support import runs

jax.config.update('jax_num_cpu_devices', 4)
# Programs of earlier sessions: compiling them is most of the tests' time.
jax.config.update(
  'jax_compilation_cache_dir', os.path.expanduser('~/.cache/moetion_jax_tests')
)
jax.config.update('jax_persistent_cache_min_compile_time_secs', 0)
jax.config.update('jax_persistent_cache_min_entry_size_bytes', -1)
# On a busy machine an example takes any time.
hypothesis.settings.register_profile('untimed', deadline=None)
hypothesis.settings.load_profile('untimed')


def pytest_collection_modifyitems(config, items):
  """A test is of the tier `fast` unless it says that it is of another.

  Those of the tier `soak` run only where `-m` asks for something.
  """
  if not config.option.markexpr:
    items[:] = [i for i in items if not i.get_closest_marker('soak')]
  for item in items:
    if not {'thorough', 'soak'} & {mark.name for mark in item.iter_markers()}:
      item.add_marker('fast')
  # The longest files first: what is left at the end is short, and both workers
  # finish together (with --no-loadscope-reorder).
  items.sort(key=lambda item: '_multiprocess_test' not in item.nodeid)


@pytest.fixture
def shm_folder():
  """A new folder in tmpfs."""
  folder = pathlib.Path(tempfile.mkdtemp(dir='/dev/shm', prefix='test-'))
  yield folder
  shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def tight(tmp_path):
  """A folder on a tmpfs of 16 pages; only root may mount one."""
  folder = tmp_path / 'tight'
  folder.mkdir()
  mount = ['mount', '-t', 'tmpfs', '-o', 'size=64k', 'tmpfs', folder]
  subprocess.run(mount, check=True)
  yield folder
  subprocess.run(['umount', folder], check=True)


@pytest.fixture
def host():
  """A host for whole runs; what is left on it at the end is removed."""
  with runs.host() as host:
    yield host


@pytest.fixture
def workdir(tmp_path):
  """Of a run that is yet to be."""
  return tmp_path / 'run'
