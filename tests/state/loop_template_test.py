"""States of users' loops: they come back with all bits, or it is said."""

import functools
import re

import chex
import jax
import numpy as np
import pytest
from jax import numpy as jnp

from moetion_jax import errors
from moetion_jax.loop import (
  checkpointer as checkpointer_lib,
  settings as loop_settings,
)
from moetion_jax.snapshots import file as snapshot_file
from tests.support import helpers, loops

pytestmark = pytest.mark.timeout(120)

_STOP, _LAST = 13, 18


@pytest.mark.thorough
@pytest.mark.parametrize(
  'make',
  [
    loops.key_and_number,
    loops.flax_train_state,
    loops.vmapped_adafactor,
    loops.norm_of_all,
    loops.odd_leaves,
    loops.on_another_device,
    functools.partial(loops.on_devices, 'Explicit'),
    functools.partial(loops.on_devices, 'Auto', ('x', None, 'y')),
  ],
  ids=lambda make: getattr(make, '__name__', None) or make.args[0],
)
def test_a_loop_goes_on_with_the_bits_that_it_had(make, shm_folder):
  case = make()
  with case.checkpointer(shm_folder / 'whole') as checkpointer:
    expected, end = loops.train(case, checkpointer, _LAST)
    shardings = [x.sharding for x in jax.tree.leaves(checkpointer.state)]

  with case.checkpointer(shm_folder / 'stopped') as checkpointer:
    found, _ = loops.train(case, checkpointer, 5)
    assert checkpointer.rehearse() == 5
    more, stopped = loops.train(case, checkpointer, _STOP)
  with case.checkpointer(shm_folder / 'stopped') as checkpointer:
    assert checkpointer.iteration == _STOP
    assert checkpointer.replayed_iterations == 3
    _, restored = loops.train(case, checkpointer, _STOP)
    chex.assert_trees_all_equal(restored, stopped, strict=True)
    again = jax.tree.leaves(checkpointer.state)
    for leaf, sharding in zip(again, shardings, strict=True):
      assert leaf.sharding.is_equivalent_to(sharding, leaf.ndim)
    last, end_again = loops.train(case, checkpointer, _LAST)
  assert found | more | last == expected
  chex.assert_trees_all_equal(end_again, end, strict=True)


@pytest.mark.parametrize(
  'make',
  [
    loops.read_as_fp32,
    loops.unnamed_masters,
    loops.coupled_rows,
    loops.other_batches,
  ],
)
def test_a_step_that_is_not_what_settings_say_is_found_out(
  make, shm_folder, caplog
):
  case, folder = make(), shm_folder / 'run'
  with case.checkpointer(folder) as checkpointer:
    loops.train(case, checkpointer, 5)
    with pytest.raises(
      checkpointer_lib.NotExactError, match='has other bits'
    ) as rehearsed:
      checkpointer.rehearse()
    # The rehearsal leaves everything as it was.
    _, state = loops.train(case, checkpointer, 6)
  assert rehearsed.value.operator.group in ('experts', 'rest')
  assert rehearsed.value.iteration == 3
  with pytest.raises(
    checkpointer_lib.NotExactError, match=re.escape(str(folder))
  ):
    case.checkpointer(folder).start()
  assert not caplog.records
  with case.checkpointer(folder, must_be_exact=False) as checkpointer:
    assert checkpointer.iteration == 6
    leaves = zip(
      jax.tree.leaves(checkpointer.state), jax.tree.leaves(state), strict=True
    )
    assert any(not np.array_equal(new, old) for new, old in leaves)
    loops.train(case, checkpointer, 7)
  (record,) = caplog.records
  assert 'has other bits' in record.getMessage()


def test_captured_whole_any_step_comes_back(shm_folder):
  case = loops.read_as_fp32()
  with case.checkpointer(shm_folder / 'run', window_length=1) as checkpointer:
    _, expected = loops.train(case, checkpointer, 3)
    assert checkpointer.rehearse() == 3
  with case.checkpointer(shm_folder / 'run', window_length=1) as checkpointer:
    assert checkpointer.iteration == 3
    assert checkpointer.replayed_iterations == 0
    _, found = loops.train(case, checkpointer, 3)
  chex.assert_trees_all_equal(found, expected, strict=True)


def _flip(path):
  with open(path / 'data', 'r+b') as file:
    byte = file.read(1)[0]
    file.seek(0)
    file.write(bytes([byte ^ 4]))


def _truncate(path):
  with open(path / 'data', 'r+b') as file:
    file.truncate(64)


def _tear_manifest(path):
  (path / 'manifest.json').write_text('{')


@pytest.mark.parametrize('damage', [_flip, _truncate, _tear_manifest])
def test_a_damaged_snapshot_is_named_and_not_used(damage, shm_folder, caplog):
  case, folder = loops.plain(), shm_folder / 'run'
  with case.checkpointer(folder) as checkpointer:
    expected, _ = loops.train(case, checkpointer, 10)
  newest = snapshot_file.list_snapshots(folder)[10]
  damage(newest)
  with case.checkpointer(folder) as checkpointer:
    assert checkpointer.iteration == 9
    found, _ = loops.train(case, checkpointer, 10)
  assert found == {10: expected[10]}
  (record,) = caplog.records
  assert str(newest) in record.getMessage()
  with case.checkpointer(folder) as checkpointer:
    assert checkpointer.iteration == 10  # it was taken again


def test_a_snapshot_that_lies_is_not_used(shm_folder, caplog):
  """Right checksums and wrong contents: digests tell."""
  case, folder = loops.plain(), shm_folder / 'run'
  with case.checkpointer(folder) as checkpointer:
    expected, _ = loops.train(case, checkpointer, 10)
  path = snapshot_file.list_snapshots(folder)[10]
  helpers.make_lie(path, 'params')
  with case.checkpointer(folder) as checkpointer:
    assert checkpointer.iteration == 9
    found, _ = loops.train(case, checkpointer, 10)
  assert found == {10: expected[10]}
  (record,) = caplog.records
  assert 'an older state' in record.getMessage()


def test_that_nothing_is_left_to_come_back_is_said(shm_folder, caplog):
  case, folder = loops.plain(), shm_folder / 'run'
  with case.checkpointer(folder) as checkpointer:
    expected, _ = loops.train(case, checkpointer, 9)
  for path in snapshot_file.list_snapshots(folder).values():
    _truncate(path)
  with case.checkpointer(folder) as checkpointer:
    assert checkpointer.iteration == 0
    found, _ = loops.train(case, checkpointer, 9)
  assert found == expected
  messages = [record.getMessage() for record in caplog.records]
  assert 'begins anew' in messages[-1]
  assert len(messages) > 1


def test_a_rehearsal_needs_a_window(shm_folder):
  case = loops.plain()
  with case.checkpointer(shm_folder / 'run') as checkpointer:
    loops.train(case, checkpointer, 3)
    with pytest.raises(errors.StoreError, match='no whole window'):
      checkpointer.rehearse()
    loops.train(case, checkpointer, 4)
    assert checkpointer.rehearse() == 4


def _of_other_experts(state):
  return jax.tree.map(
    lambda x: x[:4] if x.shape[:1] == (loops.EXPERTS,) else x, state
  )


def _of_other_width(state):
  wide = {**state['params'], 'router': jnp.zeros((16, 9))}
  return {**state, 'params': wide}


def _with_a_new_leaf(state):
  return {**state, 'experts': {'bias': jnp.zeros((loops.EXPERTS, 2))}}


def _with_a_new_number(state):
  return {**state, 'number': jnp.zeros(())}


def test_checkpoints_of_others_in_the_folder_stay(shm_folder):
  """Those of Orbax's CheckpointManager have numbers for names as well."""
  (shm_folder / '100' / 'default').mkdir(parents=True)
  (shm_folder / '100' / 'default' / '_METADATA').write_text('mine')
  with pytest.raises(errors.StoreError, match='name another folder'):
    loops.key_and_number().checkpointer(shm_folder).start()
  assert (shm_folder / '100' / 'default' / '_METADATA').read_text() == 'mine'


@pytest.mark.parametrize(
  'change',
  [_of_other_experts, _of_other_width, _with_a_new_leaf, _with_a_new_number],
)
def test_a_folder_of_another_state_is_refused(change, shm_folder):
  case, folder = loops.plain(), shm_folder / 'run'
  with case.checkpointer(folder) as checkpointer:
    loops.train(case, checkpointer, 6)
  other = checkpointer_lib.SparseCheckpointer(
    case.step,
    change(case.state),
    case.batch,
    loops.rule,
    loop_settings.LoopSettings(folder=folder),
  )
  with pytest.raises(errors.StoreError, match='name another folder'):
    other.start()
  with case.checkpointer(folder) as checkpointer:  # nothing was done to it
    assert checkpointer.iteration == 6


# ---- what is refused ---------------------------------------------------------


def _without(state):
  return {k: v for k, v in state.items() if k != 'optimizer'}


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    (_without, 'optimizer/1/0/count is missing'),
    (lambda s: {**s, 'more': jnp.zeros(3)}, 'more is new'),
    (
      lambda s: {**s, 'number': jnp.zeros(2)},
      r'number is float32\(2,\), in the initial state it was float32\(\)',
    ),
    (
      lambda s: {**s, 'number': jnp.int32(1)},
      r'number is int32\(\), in the initial state it was float32\(\)',
    ),
    (
      lambda s: {
        **s,
        'number': jax.device_put(
          s['number'],
          jax.NamedSharding(
            jax.make_mesh((4,), ('x',)), jax.sharding.PartitionSpec()
          ),
        ),
      },
      'number lies on 4 devices',
    ),
  ],
)
def test_a_state_unlike_the_initial_one_is_refused(change, message, shm_folder):
  case = loops.plain()
  state = {**case.state, 'number': jnp.float32(1)}
  settings = loop_settings.LoopSettings(folder=shm_folder / 'run')
  with checkpointer_lib.SparseCheckpointer(
    case.step, state, case.batch, loops.rule, settings
  ) as checkpointer:
    with pytest.raises(ValueError, match=message):
      checkpointer.capture(1, change(state))
    checkpointer.capture(1, state)  # it was not half taken


@pytest.mark.parametrize(
  ('state', 'rule', 'message'),
  [
    ({'a': 'text'}, loops.rule, 'a is str, not an array'),
    ({'a': jnp.zeros(3)}, loops.rule, 'nothing is an operator'),
    (
      {'experts': jnp.zeros((8, 2)), 'of experts': jnp.zeros((1, 2))},
      loops.rule,
      'stacks 1 operators, others of group experts stack 8',
    ),
  ],
)
def test_what_is_no_state_is_refused(state, rule, message, shm_folder):
  with pytest.raises(ValueError, match=message):
    checkpointer_lib.SparseCheckpointer(
      lambda s, x: (s,),
      state,
      loops.batch,
      rule,
      loop_settings.LoopSettings(folder=shm_folder),
    )
