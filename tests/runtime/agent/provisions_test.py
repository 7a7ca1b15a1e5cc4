"""Room in host memory at the beginning of a run: what counts as free."""

import pytest

from moetion_jax import errors
from moetion_jax.hostmem import run_store, store_folder
from moetion_jax.policies import settings as capture_settings
from moetion_jax.policies.kinds import registry
from moetion_jax.runtime.agent import provisions, settings as agent_settings
from moetion_jax.runtime.records import held_run, workdir
from tests.support import helpers

_MIB = 1 << 20


@pytest.fixture
def hostmem(tmp_path):
  """A tmpfs of 64 MiB."""
  with helpers.small_tmpfs(tmp_path / 'shm') as path:
    yield path


@pytest.mark.parametrize(
  ('is_new', 'fresh', 'local_hosts', 'fits'),
  [
    (False, False, 2, True),  # both hosts' stores are used again
    (False, False, 1, False),  # the other one stays to the end of the run
    (False, True, 1, True),  # it is removed first
    (True, False, 1, True),  # of a run that was killed before it began
  ],
)
def test_what_stores_hold(hostmem, tmp_path, is_new, fresh, local_hosts, fits):
  folder = workdir.Workdir(str(tmp_path / 'run'), fresh=fresh)
  folder.lock()
  folder.take_id(held_run.new_id())
  if not is_new:
    (tmp_path / 'run' / 'config.json').write_text('{}')
  for host in range(2):
    name = run_store.host_id(folder.run_id, host)
    store = store_folder.StoreFolder(hostmem, name)
    store.start()
    (store.path / 'stage-0.replica-0.segment').write_bytes(bytes(16 * _MIB))
    store.close()
  where = agent_settings.AgentSettings(
    workdir=str(tmp_path / 'run'),
    fresh=fresh,
    hostmem_dir=str(hostmem),
    captures=capture_settings.CaptureSettings(
      policy=registry.POLICIES['sparse']
    ),
    local_hosts=local_hosts,
  )
  provisions.check_room(where, folder, 40 * _MIB)  # 32 are free, 16 in host 0's
  if fits:
    provisions.check_room(where, folder, 56 * _MIB)
  else:
    with pytest.raises(errors.ConfigError, match='hostmem_dir'):
      provisions.check_room(where, folder, 56 * _MIB)
  folder.close()
