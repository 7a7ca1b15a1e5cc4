"""Sets JAX up for in-process tests, before its backend exists."""

import os
import pathlib
import shutil
import tempfile

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


@pytest.fixture
def shm_folder():
  """A new folder in tmpfs."""
  folder = pathlib.Path(tempfile.mkdtemp(dir='/dev/shm', prefix='test-'))
  yield folder
  shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def host():
  """A host for whole runs; what is left on it at the end is removed."""
  with runs.host() as host:
    yield host


@pytest.fixture
def workdir(tmp_path):
  """Of a run that is yet to be."""
  return tmp_path / 'run'
