"""Final states on their way through the store: joined, and never believed."""

import json
import mmap
import os
import subprocess

import chex
import numpy as np
import pytest

from moetion_jax import errors, keys
from moetion_jax.runtime import final_state
from moetion_jax.runtime.worker import fault_damage
from moetion_jax.state import host_digest

_STACKED = {'layers/1/experts'}


def _state():
  rng = np.random.default_rng(0)
  return {
    'head': {
      'master/head/table': rng.standard_normal((40, 8)).astype('f4'),
      'optimizer/count': np.asarray(3, np.int32),
    },
    'layers/1/experts': {
      'master/w': rng.standard_normal((4, 300, 30)).astype('f4'),
      'optimizer/mu': rng.standard_normal((4, 5)).astype('f4'),
    },
  }


@pytest.fixture
def put(shm_folder):
  """Puts a state as stage 2 replica 1; returns its folder, state, digests."""
  state = _state()
  digests = host_digest.digest_state(state, _STACKED)
  final_state.put(shm_folder, 2, state, digests, replica=1)
  return final_state.folder_of(shm_folder, 2, 1), state, digests


def _get(shm_folder):
  return final_state.get(shm_folder, 2, [1])


def test_what_is_put_is_got(shm_folder, put):
  _, state, digests = put
  found = _get(shm_folder)
  chex.assert_trees_all_equal(dict(found.state), state)
  assert not host_digest.differences(found.digests, digests)
  memory = found.state['layers/1/experts']['master/w']
  while isinstance(memory, np.ndarray):
    memory = memory.base
  assert isinstance(memory, mmap.mmap)


def test_every_damaged_file_is_found_and_what_of_it(shm_folder, put):
  folder, state, _ = put
  names = sorted(os.listdir(folder))
  assert names == ['0.npy', '1.npy', '2.npy', '3.npy', 'index.json']
  for name in names:
    path = folder / name
    content = path.read_bytes()
    first = 0 if name == 'index.json' else len(content) - 4
    for position in {first, len(content) - 1}:
      path.write_bytes(
        content[:position]
        + bytes([content[position] ^ 16])
        + content[position + 1 :]
      )
      with pytest.raises(final_state.DamagedError) as caught:
        _get(shm_folder)
      assert (caught.value.stage, caught.value.replica) == (2, 1)
      assert not caught.value.is_sent_so
      operator = {
        '0.npy': 'head',
        '1.npy': 'head',
        '2.npy': 'layers/1/experts/3',
        '3.npy': 'layers/1/experts/3',
      }.get(name, 'checksum')
      assert 'stage 2 replica 1' in str(caught.value)
      assert name in str(caught.value) and operator in str(caught.value)
    for other in (content[:-1], content + b'\0', b''):
      path.write_bytes(other)
      with pytest.raises(final_state.DamagedError, match=name):
        _get(shm_folder)
    path.unlink()
    with pytest.raises(final_state.DamagedError, match=name):
      _get(shm_folder)
    path.write_bytes(content)
    chex.assert_trees_all_equal(dict(_get(shm_folder).state), state)


def test_a_state_that_is_not_the_one_that_was_reported(shm_folder):
  """Damaged before it was put: its checksum is right, its digest is not."""
  state = _state()
  digests = host_digest.digest_state(state, _STACKED)
  state['layers/1/experts']['optimizer/mu'][2, 3] += 1
  final_state.put(shm_folder, 2, state, digests, replica=1)
  with pytest.raises(
    final_state.DamagedError, match='left its device .*layers/1/experts/2$'
  ) as caught:
    _get(shm_folder)
  assert caught.value.is_sent_so


def test_an_operator_that_nobody_had(shm_folder):
  state = _state()
  digests = host_digest.digest_state(state, _STACKED)
  del digests[keys.OperatorId('layers/1/experts', 1)]
  final_state.put(shm_folder, 2, state, digests, replica=1)
  with pytest.raises(final_state.DamagedError, match='layers/1/experts/1$'):
    _get(shm_folder)


def test_the_scripted_fault_is_found(shm_folder, put):
  folder, _, _ = put
  assert fault_damage.flip_bit_in_largest(folder) == folder / '2.npy'
  with pytest.raises(final_state.DamagedError, match='2.npy: other bits'):
    _get(shm_folder)


def test_a_full_store(tight, shm_folder):
  """It takes a larger tmpfs, or more room in that one, as the error says."""
  state = _state()
  digests = host_digest.digest_state(state, _STACKED)
  put = lambda folder: final_state.put(folder, 2, state, digests)  # noqa: E731
  words = 'free host memory, or name a larger tmpfs with --hostmem_dir'
  with pytest.raises(errors.NoRoomError, match=words):
    put(tight)
  put(shm_folder)
  subprocess.run(['mount', '-o', 'remount,size=1m', tight], check=True)
  put(tight)
  chex.assert_trees_all_equal(final_state.get(tight, 2).state, state)


def test_it_is_put_again(shm_folder, put):
  """In place of what was there, damaged or half written."""
  folder, state, digests = put
  (folder / 'index.json').write_text(json.dumps([]))
  (folder / '9.npy').touch()
  final_state.put(shm_folder, 2, state, digests, replica=1)
  chex.assert_trees_all_equal(dict(_get(shm_folder).state), state)
