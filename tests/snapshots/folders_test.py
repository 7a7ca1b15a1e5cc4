"""Shares as the folders of snapshots tell of them."""

import pytest

from moetion_jax import keys
from moetion_jax.snapshots import coverage, file as snapshot_file, folders
from tests.support import captures, shares


def _write(folder, iteration, **metadata):
  path = folders.snapshots_folder(folder, 1, 0) / str(iteration)
  path.mkdir(parents=True)
  share = shares.rolling_share(iteration)
  snapshot_file.write(
    path,
    [],
    {
      'iteration': iteration,
      'replica': 0,
      'replicas': 1,
      'state': keys.operators_to_json(share.state),
      'compute': keys.operators_to_json(share.compute),
      **metadata,
    },
  )
  return path


def test_shares_are_read_from_manifests(shm_folder):
  assert folders.read_shares(shm_folder, 1) == []
  for iteration in (12, 9, 10, 11):
    _write(shm_folder, iteration, stage=1, clip_factor='0x1p0')
  (shm_folder / 'stage-1.replica-0.snapshots' / '9' / 'manifest.json').unlink()
  torn = shm_folder / 'stage-1.replica-0.snapshots' / '11' / 'manifest.json'
  torn.write_bytes(torn.read_bytes()[:-5])
  wanted = [shares.rolling_share(10), shares.rolling_share(12)]
  wrong = []
  assert folders.read_shares(shm_folder, 1, wrong.append) == wanted
  assert len(wrong) == 1 and wrong[0].startswith(f'{torn}: torn')
  wrong.clear()
  assert folders.read_shares(shm_folder, 0, wrong.append) == []
  assert wrong == []


def test_shares_in_json():
  share = coverage.Share(
    iteration=3,
    replica=1,
    replicas=2,
    state=captures.pick('a/experts:1', 'head'),
    compute=captures.pick('router'),
  )
  value = {
    'iteration': 3,
    'replica': 1,
    'replicas': 2,
    'state': [['a/experts', 1], ['head', -1]],
    'compute': [['router', -1]],
  }
  assert folders.share_of(value | {'digests': []}) == share
  with pytest.raises(ValueError, match='Share.replica must be of type int'):
    folders.share_of(value | {'replica': '1'})
