"""The mask that the training step returns is held against the plan."""

import dataclasses

import jax
import numpy as np
import pytest

from launch.lm import one_process, transformer_job
from moetion_jax import keys
from moetion_jax.capture import (
  programs as capture_programs,
  selection,
  snapshotter,
)
from moetion_jax.policies import decision as decision_lib, slots
from moetion_jax.programs import stage
from moetion_jax.snapshots import file as snapshot_file, memory_store
from tests.support import helpers

_EXPERTS = tuple(keys.OperatorId('layers/0/experts', e) for e in range(3))
_HEAD, _LAYER = keys.OperatorId('head'), keys.OperatorId('layers/0')
_OPERATORS = (_HEAD, _LAYER, *_EXPERTS)
_SLOT = frozenset({_HEAD, _EXPERTS[0], _EXPERTS[2]})


def test_every_group_has_a_mask():
  mask = selection.make_mask(_OPERATORS, _SLOT)
  assert {group: row.tolist() for group, row in mask.items()} == {
    'head': [True],
    'layers/0': [False],
    'layers/0/experts': [True, False, True],
  }
  selection.check(3, mask, _OPERATORS, _SLOT)
  # Those of other workers are not in this worker's mask.
  selection.check(3, mask, _OPERATORS, _SLOT | {keys.OperatorId('embedding')})


@pytest.mark.parametrize('operator', _OPERATORS, ids=str)
def test_what_differs_is_named(operator):
  mask = selection.make_mask(_OPERATORS, _SLOT ^ {operator})
  with pytest.raises(selection.SelectionError) as raised:
    selection.check(3, mask, _OPERATORS, _SLOT)
  assert str(raised.value).startswith('iteration 3: ')
  assert str(raised.value).endswith(f' capturing {operator}')


@pytest.fixture(scope='module')
def worker():
  config = helpers.micro_run(stages=1, eval_every=0, iterations=5)
  (made,) = one_process.make_workers(config, transformer_job.load_data(config))
  return made, config.train


def _train(worker, folder, update):
  """Trains with snapshots and `update`; returns the decision on them."""
  made, config = worker
  layout = stage.layout_of(made.stage)
  captures = capture_programs.CapturePrograms(layout)
  captures.compile()
  decision = decision_lib.CaptureDecision(
    first_iteration=1,
    window_length=3,
    mode='rolling',
    slots=slots.make_slots(layout.operators, layout.state_bytes(), 3),
  )
  store = memory_store.SnapshotStore(folder, 1 << 22, 8)
  taker = snapshotter.Snapshotter(captures, store, decision, {})
  taker.start()
  undisturbed = made.programs
  made.programs = dataclasses.replace(undisturbed, update=update)
  try:
    made.train(config, lambda _: None, snapshots=taker, line=lambda _: 0)
    taker.flush()
  finally:
    made.programs = undisturbed
    taker.close()
  return decision


def test_snapshots_hold_what_the_step_selected(worker, shm_folder):
  inner = worker[0].programs.update
  selected = []

  def update(*arguments):
    results = inner(*arguments)
    selected.append(jax.device_get(results[2]))
    return results

  decision = _train(worker, shm_folder, update)
  layout = stage.layout_of(worker[0].stage)
  paths = snapshot_file.list_snapshots(shm_folder)
  assert sorted(paths) == [1, 2, 3, 4, 5]
  for iteration, mask in enumerate(selected, 1):
    captured = decision.captured(iteration)
    assert captured is not None
    selection.check(iteration, mask, layout.operators, captured[0])
    metadata = snapshot_file.read_manifest(paths[iteration]).metadata
    held = keys.operators_from_json(metadata['state'])
    selection.check(iteration, mask, layout.operators, held)


def test_a_step_that_selects_others_leaves_no_snapshot(worker, shm_folder):
  inner = worker[0].programs.update
  masks = []

  def update(*arguments):
    state, compute, mask = inner(*arguments)
    masks.append(mask)
    if len(masks) == 3:  # of the head another value, as by a damaged device
      mask = {**mask, 'head': np.logical_not(mask['head'])}
    return state, compute, mask

  with pytest.raises(selection.SelectionError, match='^iteration 3: .* head$'):
    _train(worker, shm_folder, update)
  assert sorted(snapshot_file.list_snapshots(shm_folder)) == [1, 2]
