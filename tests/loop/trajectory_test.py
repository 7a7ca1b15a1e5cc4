"""A user's loop that goes on with other software, options or flags."""

import dataclasses
import json
import shutil

import chex
import pytest

from moetion_jax import errors
from moetion_jax.loop import trajectory
from moetion_jax.recovery import splice
from moetion_jax.runtime import read_environment
from moetion_jax.runtime.records import changes
from tests.support import loops

_LAST = 20


def _pretend(folder, jaxlib='0.0.1'):
  """Has the folder say that its snapshots are of another jaxlib."""
  path = folder / 'environment.json'
  value = json.loads(path.read_text())
  value['environment']['versions']['jaxlib'] = jaxlib
  path.write_text(json.dumps(value))


def test_other_software_is_refused_by_name(shm_folder):
  case, folder = loops.plain(), shm_folder / 'loop'
  with case.checkpointer(folder) as checkpointer:
    loops.train(case, checkpointer, 6)
  assert (folder / 'environment.json').stat().st_mode & 0o777 == 0o600
  _pretend(folder)
  before = sorted(folder.iterdir())
  with pytest.raises(errors.StoreError) as refused:
    case.checkpointer(folder).start()
  assert 'jaxlib=0.0.1, here ' in str(refused.value)
  assert "accept_changes=('jaxlib',)" in str(refused.value)
  with pytest.raises(errors.ConfigError, match='jaxlob'):
    case.checkpointer(folder, accept_changes=('jaxlob',)).start()
  assert sorted(folder.iterdir()) == before


@pytest.mark.parametrize('remedy', ['another folder', 'removed'])
def test_snapshots_of_another_state_are_refused(shm_folder, remedy):
  """And a loop begins in another folder, or without them, as that says."""
  case, folder = loops.plain(), shm_folder / 'loop'
  with case.checkpointer(folder) as checkpointer:
    loops.train(case, checkpointer, 6)
  parameters = dict(case.state['params'])
  parameters['another'] = parameters.pop('router')
  other = dataclasses.replace(case, state={**case.state, 'params': parameters})
  words = 'name another folder, or remove this one'
  with pytest.raises(errors.StoreError, match=words):
    other.checkpointer(folder).start()
  if remedy == 'removed':
    shutil.rmtree(folder)
  else:
    folder = shm_folder / 'another'
  with other.checkpointer(folder) as checkpointer:
    assert checkpointer.iteration == 0


@pytest.mark.parametrize(
  'content',
  ['[]', 'null', '{}', '3', '{"environment": []}', '{', 'CHANGES', 'NAMELESS'],
)
def test_a_damaged_record_is_refused(tmp_path, content):
  damaged = {'environment': read_environment.read(), 'changes': [{}]}
  nameless = damaged | {'changes': [{'exact_until': 1, 'complete_at': [1]}]}
  content = content.replace('CHANGES', json.dumps(damaged))
  content = content.replace('NAMELESS', json.dumps(nameless))
  (tmp_path / 'environment.json').write_text(content)
  with pytest.raises(errors.StoreError, match='environment.json: .*: remove'):
    trajectory.Trajectory(tmp_path, ()).check()
  assert (tmp_path / 'environment.json').read_text() == content
  (tmp_path / 'environment.json').unlink()  # the folder, with all that is in it
  trajectory.Trajectory(tmp_path, ()).check()


def test_an_unknown_name_is_refused_of_a_new_loop_too(tmp_path):
  with pytest.raises(errors.ConfigError, match='jaxlob'):
    trajectory.Trajectory(tmp_path / 'new', ('jaxlob',)).check()
  trajectory.Trajectory(tmp_path / 'new', ('jaxlib',)).check()


def test_a_folder_without_a_record_goes_on_only_if_that_is_accepted(shm_folder):
  """As of earlier versions: what it was taken with may be anything."""
  case, folder = loops.plain(), shm_folder / 'loop'
  with case.checkpointer(folder) as checkpointer:
    loops.train(case, checkpointer, 6)
  (folder / 'environment.json').unlink()
  before = sorted(folder.rglob('*'))
  with pytest.raises(errors.StoreError) as refused:
    case.checkpointer(folder).start()
  assert f'{folder} holds snapshots, and no environment.json' in (
    str(refused.value)
  )
  name = "accept_changes=('environment.json',)"
  assert name in str(refused.value)
  assert sorted(folder.rglob('*')) == before
  accepted = ('environment.json',)
  with case.checkpointer(folder, accept_changes=accepted) as checkpointer:
    assert checkpointer.iteration == 6
  value = json.loads((folder / 'environment.json').read_text())
  assert value['environment'] == read_environment.read()
  (entry,) = value['changes']
  assert entry['names'] == ['environment.json'] and entry['complete_at'] == [6]
  for again in ((), accepted):  # from then on it is compared
    with case.checkpointer(folder, accept_changes=again) as checkpointer:
      assert checkpointer.iteration == 6


def test_a_folder_without_a_record_and_snapshots_is_a_new_one(tmp_path):
  trajectory.Trajectory(tmp_path, ()).check()


@pytest.mark.parametrize('until', [0, 1, 3, 4, 9])
def test_after_an_accepted_change_the_trajectories_are_never_mixed(
  shm_folder, until
):
  """Other batches stand for software that comes to other bits.

  Whether it is killed `until` iterations later or not, the same comes out.
  """
  old = loops.plain()
  new = dataclasses.replace(old, batch=lambda i: loops.batch(i + 1000))
  folder, kept = shm_folder / 'loop', shm_folder / 'kept'
  with old.checkpointer(folder) as checkpointer:
    loops.train(old, checkpointer, 9)
  with old.checkpointer(shm_folder / 'whole') as checkpointer:
    _, undisturbed = loops.train(old, checkpointer, _LAST)
  _pretend(folder)
  shutil.copytree(folder, kept)
  accepted = {'accept_changes': ('jaxlib',)}
  with new.checkpointer(folder, **accepted) as checkpointer:
    first = checkpointer.iteration
    expected, end = loops.train(new, checkpointer, _LAST)
  with pytest.raises(AssertionError):  # the change is one
    chex.assert_trees_all_equal(end, undisturbed)
  (entry,) = json.loads((folder / 'environment.json').read_text())['changes']
  assert entry['complete_at'] == [first]
  assert entry['exact_until'] == first - 3

  with new.checkpointer(kept, **accepted) as checkpointer:
    found, _ = loops.train(new, checkpointer, first + until)
  with new.checkpointer(kept) as checkpointer:
    assert checkpointer.iteration == first + (until if until >= 4 else 0)
    more, again = loops.train(new, checkpointer, _LAST)
  assert found | more == expected
  chex.assert_trees_all_equal(again, end, strict=True)


def test_a_start_that_died_in_the_middle_is_done_again(shm_folder):
  case, folder = loops.plain(), shm_folder / 'loop'
  with case.checkpointer(folder) as checkpointer:
    loops.train(case, checkpointer, 9)
  _pretend(folder)
  begun = changes.Changes(folder / 'environment.json', ['jaxlib'], 0o600)
  begun.known = json.loads((folder / 'environment.json').read_text())
  assert not begun.refused(read_environment.read())
  begun.begin(splice.Splice(exact_until=6, complete_at=(9,)))
  with case.checkpointer(folder) as checkpointer:
    assert checkpointer.iteration == 9
  (entry,) = json.loads((folder / 'environment.json').read_text())['changes']
  assert 'pending' not in entry
