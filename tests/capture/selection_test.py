"""The mask that the training step returns is held against the plan."""

import dataclasses

import jax
import numpy as np
import pytest

from launch.lm import transformer_job
from moetion_jax import keys
from moetion_jax.capture import (
  programs as capture_programs,
  selection,
  snapshotter,
)
from moetion_jax.logs import memory_log
from moetion_jax.policies import decision as decision_lib, slots
from moetion_jax.programs import stage
from moetion_jax.snapshots import file as snapshot_file, memory_store
from moetion_jax.training import worker
from tests.support import helpers, one_process

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
def compiled():
  config = helpers.micro_run(stages=1, eval_every=0, iterations=4)
  (made,) = one_process.make_workers(config)
  captures = capture_programs.CapturePrograms(stage.layout_of(made.stage))
  captures.compile()
  return config, made, captures


def _train(compiled, folder, change):
  """Trains with snapshots, and masks changed; returns the decision on them."""
  config, made, captures = compiled
  decision = decision_lib.CaptureDecision(
    first_iteration=1,
    window_length=3,
    mode='rolling',
    slots=slots.make_slots(
      captures.layout.operators, captures.layout.state_bytes(), 3
    ),
  )

  def update(*arguments):
    state, compute, mask = made.programs.update(*arguments)
    return state, compute, change(new.iteration, mask)

  new = worker.Worker(
    0,
    made.stage,
    dataclasses.replace(made.programs, update=update),
    made.stage.initial_state(),
    memory_log.MemoryLog(keys.WorkerId(0, 0, 1), memory_log.MemoryStore()),
    transformer_job.of(config).data(),
  )
  store = memory_store.SnapshotStore(folder, 1 << 22, 8)
  taker = snapshotter.Snapshotter(captures, store, decision, {})
  taker.start()
  try:
    new.train(
      config.train, lambda _: None, snapshots=taker, retain=lambda _: None
    )
    taker.flush()
  finally:
    taker.close()
  return decision


def test_snapshots_hold_what_the_step_selected(compiled, shm_folder):
  selected = {}

  def keep(iteration, mask):
    selected[iteration] = jax.device_get(mask)
    return mask

  decision = _train(compiled, shm_folder, keep)
  operators = compiled[2].layout.operators
  paths = snapshot_file.list_snapshots(shm_folder)
  assert sorted(paths) == sorted(selected) == [1, 2, 3, 4]
  for iteration, mask in selected.items():
    captured = decision.captured(iteration)
    assert captured is not None
    selection.check(iteration, mask, operators, captured.state)
    metadata = snapshot_file.read_manifest(paths[iteration]).metadata
    held = keys.operators_from_json(metadata['state'])
    selection.check(iteration, mask, operators, held)


def test_a_step_that_selects_others_leaves_no_snapshot(compiled, shm_folder):
  def damage(iteration, mask):
    if iteration < 3:
      return mask
    return {**mask, 'head': np.logical_not(mask['head'])}

  with pytest.raises(selection.SelectionError, match='^iteration 3: .* head$'):
    _train(compiled, shm_folder, damage)
  assert sorted(snapshot_file.list_snapshots(shm_folder)) == [1, 2]
