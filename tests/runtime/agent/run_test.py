"""Settings that are refused before anything of a run is made."""

import os

import pytest

from moetion_jax import errors
from moetion_jax.policies import settings as capture_settings
from moetion_jax.policies.kinds import registry
from moetion_jax.runtime.agent import run as agent_run, settings
from moetion_jax.runtime.records import own_files, workdir
from tests.support import helpers


def _check(path, **fields):
  """Checks the places of a run with snapshots on disk."""
  captures = capture_settings.CaptureSettings(
    policy=registry.of_name('two_phase')
  )
  where = settings.AgentSettings(
    workdir=str(path), hostmem_dir='/dev/shm', captures=captures, **fields
  )
  folder = workdir.Workdir(str(path), fresh=False)
  folder.run_id = 'x'
  on_disk = where.durable_folder(str(path), folder.run_id)
  job = helpers.micro_run().job_spec()
  agent_run._check_places(job, where, folder, on_disk)
  return on_disk


def test_a_link_for_the_snapshots_on_disk(tmp_path):
  """It is refused, and what is said to do about it works."""
  path, target = tmp_path / 'run', tmp_path / 'disk'
  path.mkdir()
  target.mkdir()
  link = path / own_files.DURABLE_NAME
  link.symlink_to(target)
  said = f'{link} is a symbolic link.*; remove it, .* with --durable_dir$'
  with pytest.raises(errors.ConfigError, match=said):
    _check(path)
  link.unlink()
  assert os.path.dirname(_check(path, durable_dir=str(target))) == str(target)
