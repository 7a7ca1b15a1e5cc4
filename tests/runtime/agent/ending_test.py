"""A run tells at its end of the one that it was to replace."""

import json
import pathlib
import selectors
from typing import cast

import pytest

from moetion_jax import errors
from moetion_jax.hostmem import store_folder
from moetion_jax.runtime import faults
from moetion_jax.runtime.agent import (
  beginning,
  ending,
  settings as agent_settings,
)
from moetion_jax.runtime.hosts import crew as crew_lib, hosts as hosts_lib
from moetion_jax.runtime.records import held_run, recorder, workdir
from tests.support import helpers


@pytest.fixture
def folder(tmp_path):
  """The workdir of a run that is to begin anew, locked."""
  run = workdir.Workdir(str(tmp_path / 'run'), fresh=True)
  run.lock()
  run.take_id(held_run.new_id())
  found_out = {'data_fingerprint': {}, 'environment': {}}
  config = helpers.micro_run().to_json() | found_out
  (run.path / 'config.json').write_text(json.dumps(config))
  (run.path / 'events.jsonl').write_text('')
  yield run
  run.close()


def _ending(tmp_path: pathlib.Path, folder: workdir.Workdir) -> ending.Ending:
  config = helpers.micro_run()
  where = agent_settings.AgentSettings(workdir=str(folder.path), fresh=True)
  store = store_folder.StoreFolder(tmp_path, 'store')
  hosts = hosts_lib.Hosts(config.train.stages, 1, store)
  crew = crew_lib.Crew(
    config,
    hosts,
    selectors.DefaultSelector(),
    cast('crew_lib.Listener', None),  # nobody is started
    beginning.worker_spec(config, where, folder, store, ''),
    faults.FaultBook([]),
  )
  return ending.Ending(
    recorder.Recorder(config, folder, helpers.NotesView()),
    hosts,
    crew,
    keeps_store=True,
    starts_over=True,
  )


@pytest.mark.parametrize('is_removed', [False, True])
@pytest.mark.parametrize('is_failure', [False, True])
def test_what_it_says_of_the_earlier_run_is_true(
  tmp_path, folder, capfd, is_removed, is_failure
):
  """An end after the removal, but before anybody trains."""
  one = _ending(tmp_path, folder)
  if is_removed:

    def remove():
      # A file cannot take its place: the beginning ends there.
      (folder.path / 'config.json').unlink()
      (folder.path / 'config.json').mkdir()
      return ()

    folder.remove_elsewhere = remove
    with pytest.raises(IsADirectoryError):
      folder.accept(helpers.micro_run().to_json(), {})
  assert (folder.path / 'events.jsonl').exists() == (not is_removed)
  if is_failure:
    one.failed(errors.StoreError('full'), [], has_begun=False)
  else:
    one.stopped(has_begun=False)
  said = capfd.readouterr().err
  assert ('Nothing of the earlier run was removed.' in said) != is_removed
  assert ('The same command starts over.' in said) == is_removed
