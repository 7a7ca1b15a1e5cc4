"""A run's own folder and copies of it, told apart by what was recorded."""

import os

import pytest

from moetion_jax.hostmem import store_folder
from moetion_jax.runtime.records import copies

_HERE = (7, 100)
_OWN, _COPY, _UNTOLD = copies.Relation
_AT_HERE, _TWIN, _LEFT, _GONE = copies.AtPath


@pytest.mark.parametrize(
  ('identity', 'at_path', 'relation'),
  [
    # It was started here before.
    ((7, 100), _AT_HERE, _OWN),
    # Moved inside the file system; then another folder took its place.
    ((7, 100), _GONE, _OWN),
    ((7, 100), _TWIN, _OWN),
    # The device has another number since the machine was started again.
    ((8, 100), _AT_HERE, _OWN),
    # Copied, and the original is there, or moved.
    ((7, 101), _TWIN, _COPY),
    ((8, 101), _TWIN, _COPY),
    ((7, 101), _GONE, _COPY),
    # Moved to another file system, or copied there and the original moved.
    ((8, 101), _GONE, _UNTOLD),
    ((8, 100), _GONE, _UNTOLD),
    # Put back from a copy, or copied to where the original was.
    ((7, 101), _AT_HERE, _UNTOLD),
    # All that was in it was moved to another folder, or copied and removed.
    ((7, 101), _LEFT, _UNTOLD),
    # A version that recorded the path alone.
    (None, _AT_HERE, _OWN),
    (None, _TWIN, _COPY),
    (None, _GONE, _UNTOLD),
  ],
)
def test_judge(identity, at_path, relation):
  recorded = copies.Mark(path='/a/run', identity=identity)
  assert copies.judge(_HERE, recorded, at_path) is relation


@pytest.mark.parametrize(
  ('of_store', 'of_folder', 'concluded'),
  [
    (None, None, _OWN),
    ((_OWN, _AT_HERE), (_OWN, _AT_HERE), _OWN),
    # Another folder took the store.
    ((_COPY, _TWIN), (_OWN, _GONE), _COPY),
    # A store that the run left long ago.
    ((_COPY, _GONE), (_OWN, _AT_HERE), _OWN),
    ((_UNTOLD, _GONE), (_OWN, _AT_HERE), _OWN),
    ((_UNTOLD, _GONE), (_COPY, _GONE), _COPY),
    ((_COPY, _GONE), (_UNTOLD, _AT_HERE), _COPY),
    (None, (_UNTOLD, _GONE), _UNTOLD),
    # It was killed before there was a config.json.
    ((_COPY, _GONE), None, _COPY),
    ((_UNTOLD, _GONE), None, _UNTOLD),
  ],
)
def test_conclude(of_store, of_folder, concluded):
  findings = [
    one and copies.Finding(relation=one[0], recorded='/a', at_path=one[1])
    for one in (of_store, of_folder)
  ]
  assert copies.conclude(*findings).relation is concluded


@pytest.mark.parametrize(
  ('value', 'identity'),
  [
    ([7, 100], (7, 100)),
    ([7], None),
    (['7', 100], None),
    ([True, 1], None),
    ({}, None),
    (None, None),
  ],
)
def test_identity_from_json(value, identity):
  assert copies.identity_from_json(value) == identity


def test_a_moved_folder_keeps_its_identity(tmp_path):
  (tmp_path / 'a').mkdir()
  before = store_folder.identity_of(tmp_path / 'a')
  os.rename(tmp_path / 'a', tmp_path / 'b')
  (tmp_path / 'a').mkdir()
  assert store_folder.identity_of(tmp_path / 'b') == before
  assert store_folder.identity_of(tmp_path / 'a') != before
