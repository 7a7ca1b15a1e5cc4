"""A state put together from checkpoints: the newest of each, or an error."""

import chex
import numpy as np
import pytest

from moetion_jax import errors
from moetion_jax.capture import merged_restore, programs as capture_programs
from moetion_jax.snapshots import coverage, file as snapshot_file, folders
from tests.support import captures

_STAGE = 1


@pytest.fixture(scope='module')
def programs():
  made = capture_programs.CapturePrograms(captures.make_layout())
  made.compile()
  return made


@pytest.fixture
def stored(programs, shm_folder):
  """Stores operators of the state of an iteration; returns that state."""

  def store(iteration, operators):
    host = captures.make_state(iteration)
    state = captures.place(programs.layout, host)
    compute = captures.compute_of(programs.layout, state)
    taken = programs.capture(
      state, compute, coverage.Contents(operators)
    ).to_host()
    folder = folders.snapshots_folder(shm_folder, _STAGE, 0)
    path = folder / str(iteration)
    path.mkdir(parents=True)
    metadata = taken.metadata(iteration=iteration, replica=0, replicas=1)
    snapshot_file.write(path, taken.buffers(), metadata)
    return host

  return store


def _load(programs, folder, start):
  return merged_restore.load(
    folder,
    _STAGE,
    start,
    programs.layout,
    lambda: captures.make_state(0),
  )


def test_every_operator_is_as_new_as_there_is(programs, stored, shm_folder):
  rest = captures.pick('head', 'router')
  newer = captures.pick('a/experts:1', 'b/experts:2')
  older = captures.pick('a/experts:1', 'c/experts:3')
  states = {0: captures.make_state(0)}
  states[2] = stored(2, rest | older)
  states[4] = stored(4, rest | newer)
  states[6] = stored(6, rest)
  found = _load(programs, shm_folder, 4)
  split = programs.layout.partition.split
  rows = {i: split(state) for i, state in states.items()}
  for operator in programs.layout.operators:
    of = 0
    if operator in older:
      of = 2
    if operator in newer | rest:
      of = 4
    expected = rows[of][operator]
    chex.assert_trees_all_equal(
      {k: np.asarray(v) for k, v in found.state[operator].items()}, expected
    )


def test_what_every_checkpoint_holds_is_not_taken_from_state_0(
  programs, stored, shm_folder
):
  stored(2, captures.pick('head', 'router'))
  stored(4, captures.pick('router', 'a/experts:1'))
  with pytest.raises(
    errors.StoreError, match='snapshot 4 of stage 1 lacks head'
  ):
    _load(programs, shm_folder, 4)
  with pytest.raises(errors.StoreError, match='no snapshot 5'):
    _load(programs, shm_folder, 5)
