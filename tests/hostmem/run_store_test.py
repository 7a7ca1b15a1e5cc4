"""The stores of a run on its hosts: their names, and which of them go."""

import os

import pytest

from moetion_jax.hostmem import run_store, store_folder

_ID = '0123456789abcdef'
_NAMES = (
  f'moetion-{_ID}',
  f'moetion-{_ID}-host1',
  f'moetion-{_ID}-host10',
  f'moetion-{_ID}-host2',
)
_OTHERS = (
  f'moetion-{_ID}-hosts',
  f'moetion-{_ID}-mine',
  f'moetion-{_ID}0',
  'moetion-fedcba9876543210',
)


@pytest.fixture
def hostmem(tmp_path):
  """Stores of four hosts of a run, and of others, with something in each."""
  for name in (*_NAMES, *_OTHERS):
    store = store_folder.StoreFolder(tmp_path, name.removeprefix('moetion-'))
    store.start()
    store.close()
    (store.path / 'stage-0.replica-0.segment').write_bytes(bytes(8192))
  return tmp_path


def _is_full(path):
  return (path / 'stage-0.replica-0.segment').exists()


def test_folders_by_host(hostmem):
  found = [path.name for path in run_store.folders(str(hostmem), _ID)]
  assert found == [_NAMES[0], _NAMES[1], _NAMES[3], _NAMES[2]]
  assert run_store.paths('/a', _ID, 2) == [
    store_folder.StoreFolder('/a', run_store.host_id(_ID, h)).path
    for h in range(2)
  ]


def test_a_run_that_begins_anew(hostmem):
  """Its hosts' stores are emptied, others of it are removed."""
  living = store_folder.StoreFolder(hostmem, f'{_ID}-host1')
  living.start()
  run_store.empty(str(hostmem), _ID, 2)
  living.close()
  left = {p.name: _is_full(p) for p in hostmem.iterdir()}
  assert left == {
    _NAMES[0]: False,
    _NAMES[1]: False,
    **{name: True for name in _OTHERS},
  }
  run_store.empty(str(hostmem), _ID, 5)  # with stores that are not there


def test_leftovers_are_told_and_stay(hostmem, capsys):
  before = sorted(os.listdir(hostmem))
  assert run_store.report_leftovers(str(hostmem), _ID, anew=False)
  out = capsys.readouterr().out
  assert out.count('goes on with it, if it can begin') == len(_NAMES)
  assert out.count('start the run again, or remove') == len(_OTHERS)
  assert run_store.report_leftovers(str(hostmem), _ID, anew=True)
  out = capsys.readouterr().out
  assert out.count('removed as soon as the new run can begin') == len(_NAMES)
  assert not run_store.report_leftovers(str(hostmem), 'f' * 16, anew=True)
  assert sorted(os.listdir(hostmem)) == before


def test_only_the_runs_own_leftovers_go(hostmem):
  run_store.remove_leftovers(str(hostmem), _ID)
  assert sorted(os.listdir(hostmem)) == sorted(_OTHERS)
