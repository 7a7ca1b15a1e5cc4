"""The places of a run: what may be gone on from, and what goes at the end."""

import os
import shutil

import pytest

from moetion_jax import errors
from moetion_jax.hostmem import store_folder
from moetion_jax.runtime.records import whereabouts

_ID = '0123456789abcdef'
_NAME = f'moetion-{_ID}'


def _search(tmp_path, known, here, changes=0):
  return whereabouts.Search(
    workdir=str(tmp_path / 'run'),
    run_id=_ID,
    known=whereabouts.Whereabouts(**known),
    here=whereabouts.Whereabouts(**here),
    changes=changes,
  )


def _store(directory, run_id=_ID):
  directory.mkdir(exist_ok=True)
  store = store_folder.StoreFolder(directory, run_id)
  store.start()
  store.close()
  return store.path


def _on_disk(folder):
  snapshot = folder / 'stage-0.replica-0.snapshots' / '3'
  snapshot.mkdir(parents=True)
  (snapshot / 'data').write_text('x')
  return folder


def test_what_is_left_is_recorded_with_the_changes_by_then():
  first, second = (
    whereabouts.Whereabouts(hostmem_dir=f'/{x}', on_disk=f'/{x}/disk')
    for x in 'ab'
  )
  one = first.moved_to(second, 0)
  assert one.left_hostmem == {'/a': 0} and one.left_on_disk == {'/a/disk': 0}
  two = one.moved_to(whereabouts.Whereabouts(hostmem_dir='/b', on_disk=''), 1)
  assert two.left_hostmem == {'/a': 0}
  assert two.left_on_disk == {'/a/disk': 0, '/b/disk': 1}
  assert whereabouts.Whereabouts.from_json(two.to_json()) == two
  back = two.moved_to(first, 1)
  assert back.left_hostmem == {'/b': 1} and back.left_on_disk == {'/b/disk': 1}
  assert first.moved_to(first, 3) == first
  # Of a version that recorded neither, or the first one only.
  assert whereabouts.Whereabouts().moved_to(first, 2) == first
  known = whereabouts.Whereabouts.from_json({'hostmem_dir': '/a'})
  assert known.on_disk is None


def test_a_copy_has_only_what_lies_in_the_workdir():
  whole = whereabouts.Whereabouts(
    hostmem_dir='/a', on_disk='/d/x', left_on_disk={'durable': 0, '/e/x': 1}
  )
  assert whole.of_copy() == whereabouts.Whereabouts(
    on_disk='', left_on_disk={'durable': 0}
  )
  inside = whereabouts.Whereabouts(hostmem_dir='/a', on_disk='durable')
  assert inside.of_copy() == whereabouts.Whereabouts(on_disk='durable')


@pytest.mark.parametrize(
  'config',
  [
    {'hostmem_dir': 3},
    {'on_disk': None},
    {'left': []},
    {'left': {'other': {}}},
    {'left': {'on_disk': []}},
    {'left': {'on_disk': {'/a': '1'}}},
  ],
)
def test_damaged_fields(config):
  with pytest.raises(ValueError, match='is damaged'):
    whereabouts.Whereabouts.from_json(config)


def test_real_paths(tmp_path):
  (tmp_path / 'shm').mkdir()
  (tmp_path / 'link').symlink_to('shm')
  link = tmp_path / 'link'
  found = whereabouts.of_run(str(link), f'{link}/x', str(tmp_path / 'run'))
  assert found.hostmem_dir == str(tmp_path / 'shm')
  assert found.on_disk == str(tmp_path / 'shm' / 'x')
  inside = whereabouts.of_run(str(link), '/a/durable', '/a')
  assert inside.on_disk == 'durable'
  assert whereabouts.of_run(str(link), '', '/a').on_disk == ''


@pytest.mark.parametrize(
  ('known', 'changes', 'is_stale'),
  [
    ({'on_disk': 'HERE'}, 2, False),
    ({'on_disk': 'ELSEWHERE'}, 0, False),
    ({'on_disk': 'ELSEWHERE', 'left_on_disk': {'HERE': 0}}, 1, True),
    ({'on_disk': 'ELSEWHERE', 'left_on_disk': {'HERE': 1}}, 1, False),
    # It was never there, as far as is known.
    ({'on_disk': 'ELSEWHERE'}, 1, True),
    ({'on_disk': ''}, 1, True),
    # A version that did not record it.
    ({}, 1, False),
  ],
)
@pytest.mark.parametrize('tier', ['on_disk', 'hostmem'])
def test_what_is_of_before_an_accepted_change_is_refused(
  tmp_path, known, changes, is_stale, tier
):
  here, elsewhere = tmp_path / 'here', tmp_path / 'elsewhere'
  if tier == 'hostmem':
    stale, shown = _store(here), f'--hostmem_dir={elsewhere}'
    paths = {'HERE': str(here), 'ELSEWHERE': str(elsewhere)}
    if known.get('on_disk') == '':
      pytest.skip('there are always stores')
  else:
    stale, shown = _on_disk(here / _NAME), f'--durable_dir={elsewhere}'
    paths = {'HERE': str(stale), 'ELSEWHERE': str(elsewhere / _NAME)}
  names = {'on_disk': 'on_disk', 'left_on_disk': 'left_on_disk'}
  if tier == 'hostmem':
    names = {'on_disk': 'hostmem_dir', 'left_on_disk': 'left_hostmem'}
  made = {
    names[name]: {paths[k]: v for k, v in value.items()}
    if isinstance(value, dict)
    else paths.get(value, value)
    for name, value in known.items()
  }
  if not made.get('on_disk', True):
    made['hostmem_dir'] = '/shm'
    shown = '--hostmem_dir=/shm and the --policy of then'
  search = _search(tmp_path, made, {names['on_disk']: paths['HERE']}, changes)
  if not is_stale:
    search.check()
    return
  with pytest.raises(errors.ConfigError) as refused:
    search.check()
  text = str(refused.value)
  assert f'={here}: {stale} is of before' in text and shown in text
  assert text.endswith('or remove that folder')
  there = {names['on_disk']: made.get(names['on_disk']) or ''}
  _search(tmp_path, made, there, changes).check()  # with the flags
  shutil.rmtree(stale)
  search.check()


def test_nothing_is_stale_where_nothing_is(tmp_path):
  known = {'hostmem_dir': '/nowhere', 'on_disk': '/nowhere/x'}
  here = {'hostmem_dir': str(tmp_path), 'on_disk': str(tmp_path / _NAME)}
  _search(tmp_path, known, here, 3).check()


def test_where_the_snapshots_are_is_told(tmp_path):
  disk = _on_disk(tmp_path / 'disk' / _NAME)
  _store(tmp_path / 'shm')
  known = {'hostmem_dir': str(tmp_path / 'shm')}
  here = {'hostmem_dir': '/dev/shm', 'on_disk': ''}
  note = _search(tmp_path, known, here).note()
  assert f'--hostmem_dir={tmp_path}/shm it goes on' in note
  assert not _search(tmp_path, known, known).note()
  known |= {'on_disk': str(disk)}
  note = _search(tmp_path, known, here).note()
  assert f'--policy=two_phase --durable_dir={tmp_path}/disk it goes' in note
  assert not _search(tmp_path, known, here | {'on_disk': str(disk)}).note()
  _on_disk(tmp_path / 'run' / 'durable')
  note = _search(tmp_path, known | {'on_disk': 'durable'}, here).note()
  assert f'{tmp_path}/run/durable' in note and 'without --durable_dir' in note
  gone = {'hostmem_dir': '/nowhere', 'on_disk': '/nowhere/x'}
  assert not _search(tmp_path, gone, here).note()


@pytest.mark.skipif(os.geteuid() != 0, reason='only root may be another user')
def test_a_directory_that_may_not_be_searched_is_told(tmp_path):
  left = tmp_path / 'left'
  _store(left)
  left.chmod(0o700)
  tmp_path.chmod(0o755)
  here = os.open('.', os.O_RDONLY)
  os.chdir(tmp_path)  # those above it may be closed to others too
  os.seteuid(65534)
  try:
    removal = _search(
      tmp_path, {'left_hostmem': {'left': 0}}, {}
    ).remove_elsewhere()
  finally:
    os.seteuid(0)
    os.fchdir(here)
    os.close(here)
  assert removal.failed == ('left: may not be searched',)


def test_only_what_is_the_runs_goes_elsewhere(tmp_path):
  stays = [
    _store(tmp_path / 'here'),
    _store(tmp_path / 'left', 'f' * 16),
    _on_disk(tmp_path / 'disk' / ('moetion-' + 'f' * 16)),
    _on_disk(tmp_path / 'mine'),
  ]
  goes = [
    _store(tmp_path / 'left'),
    _store(tmp_path / 'left', f'{_ID}-host1'),
    _store(tmp_path / 'last'),
    _on_disk(tmp_path / 'disk' / _NAME),
    _on_disk(tmp_path / 'run' / 'durable'),
  ]
  notes = _on_disk(tmp_path / 'other' / _NAME) / 'notes'
  notes.write_text('mine')
  held = store_folder.StoreFolder(tmp_path / 'left', f'{_ID}-host2')
  held.start()
  known = {
    'hostmem_dir': str(tmp_path / 'last'),
    'on_disk': 'durable',
    'left_hostmem': {str(tmp_path / 'left'): 0, '/nowhere': 0},
    'left_on_disk': {
      str(goes[3]): 0,
      str(stays[2]): 0,
      str(stays[3]): 0,
      str(notes.parent): 1,
      '/nowhere/x': 0,
    },
  }
  here = {'hostmem_dir': str(tmp_path / 'here'), 'on_disk': ''}
  removal = _search(tmp_path, known, here).remove_elsewhere()
  held.close()
  assert removal.others == (str(notes),)
  (failed,) = removal.failed
  assert failed.startswith(f'{held.path}: ') and 'living run' in failed
  assert [path for path in goes if path.exists()] == []
  assert [path for path in stays if not path.exists()] == []


def test_directories_that_the_run_made_go_with_it_if_they_are_empty(tmp_path):
  (tmp_path / 'there').mkdir()
  on_disk = tmp_path / 'there' / 'a' / 'b' / _NAME
  first = whereabouts.of_run('/dev/shm', str(on_disk), str(tmp_path / 'run'))
  assert first.made == (str(on_disk.parent), str(on_disk.parent.parent))
  on_disk.parent.mkdir(parents=True)
  # A later start finds them, and what it knows says whose they are.
  again = whereabouts.of_run('/dev/shm', str(on_disk), str(tmp_path / 'run'))
  assert again.made == ()
  known = whereabouts.Whereabouts().moved_to(first, 0).moved_to(again, 0)
  assert known.made == first.made
  assert whereabouts.Whereabouts.from_json(known.to_json()) == known
  assert known.of_copy().made == ()
  with pytest.raises(ValueError, match='"made" in it is damaged'):
    whereabouts.Whereabouts.from_json({'made': [1]})
  search = _search(tmp_path, {'made': known.made}, {})
  (on_disk.parent / 'notes').write_text('mine')
  search.remove_made()
  assert on_disk.parent.is_dir()
  (on_disk.parent / 'notes').unlink()
  search.remove_made()
  search.remove_made()
  assert [p.name for p in tmp_path.iterdir()] == ['there']
  assert list((tmp_path / 'there').iterdir()) == []
