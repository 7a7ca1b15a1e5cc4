"""Capture and fold on the device: buffers of their own, and the right bits."""

import contextlib
import dataclasses
import functools
import gc

import chex
import hypothesis
import hypothesis.strategies as st
import jax
import ml_dtypes
import numpy as np
import pytest

from launch.lm import transformer_job
from moetion_jax import errors
from moetion_jax.capture import (
  programs as capture_programs,
  snapshotter,
  transfer,
)
from moetion_jax.policies import decision as decision_lib, slots
from moetion_jax.programs import stage as stage_lib
from moetion_jax.snapshots import (
  coverage,
  file as snapshot_file,
  memory_store,
  snapshot,
)
from tests.support import captures, helpers

_COMPILED = '/jax/core/compile/backend_compile_duration'


@functools.cache
def _programs(devices=1, is_packed=False):
  programs = capture_programs.CapturePrograms(
    captures.make_layout(devices), is_packed
  )
  programs.compile()
  return programs


def _capture(programs, host, slot, others, placed=None):
  state = placed or captures.place(programs.layout, host)
  compute = captures.compute_of(programs.layout, state)
  return state, programs.capture(
    state, compute, coverage.Contents(slot, others)
  )


def _stored(programs, captured, **fields):
  """A snapshot as it comes back from a file."""
  of = programs.layout
  buffers = captured.buffers()
  arrays = {
    b.name: np.concatenate([np.ravel(p) for p in b.pieces]).reshape(b.shape)
    for b in buffers
  }
  metadata = captured.metadata(**fields)
  return snapshot.from_arrays(of, metadata, arrays)


def _rows_of(of, host, operator):
  return of.partition.split(host)[operator]


_SLOTS = [
  captures.pick('router'),
  captures.pick('a/experts:3'),
  captures.pick('a/experts:0', 'a/experts:1', 'b/experts:7', 'head'),
  captures.pick(*(f'a/experts:{i}' for i in range(8)), 'c/experts:5'),
  captures.pick(
    *(f'{g}/experts:{i}' for g in 'abc' for i in range(8)), 'head', 'router'
  ),
  frozenset(),
]


_packed = pytest.mark.parametrize(
  'is_packed', [False, True], ids=['by leaf', 'packed']
)


@_packed
@pytest.mark.parametrize('devices', [1, 4])
@pytest.mark.parametrize('slot', _SLOTS, ids=len)
def test_what_is_captured(devices, slot, is_packed):
  programs, host = _programs(devices, is_packed), captures.make_state(1)
  of = programs.layout
  others = frozenset(of.operators) - slot
  _, captured = _capture(programs, host, slot, others)
  found = _stored(programs, captured)
  assert found.state.keys() == slot
  assert found.compute.keys() == others
  for operator in slot:
    chex.assert_trees_all_equal(
      dict(found.state[operator]), _rows_of(of, host, operator)
    )
  for operator in others:
    expected = {
      path: row.astype(of.compute_dtypes[path])
      for path, row in _rows_of(of, host, operator).items()
      if path in of.compute
    }
    chex.assert_trees_all_equal(dict(found.compute[operator]), expected)
  chex.assert_trees_all_equal(
    dict(found.shared), {name: host[name] for name in captures.SHARED}
  )


@_packed
def test_a_snapshot_has_just_the_operators_that_it_was_asked_for(is_packed):
  programs = _programs(1, is_packed)
  some = captures.pick('a/experts:2', 'a/experts:3', 'a/experts:7', 'head')
  _, captured = _capture(
    programs, captures.make_state(), captures.pick('router'), some
  )
  assert _stored(programs, captured).compute.keys() == some


@_packed
@pytest.mark.parametrize('devices', [1, 4])
def test_captured_buffers_outlive_a_donated_state(devices, is_packed):
  programs, host = _programs(devices, is_packed), captures.make_state(2)
  slot = _SLOTS[4]
  state, captured = _capture(programs, host, slot, frozenset())
  outputs = [part.outputs for part in captured.parts], captured.shared
  before = captures.pointers(state)
  assert not captures.pointers(outputs) & before
  step = jax.jit(
    lambda s: jax.tree.map(lambda x: x * 2 + 1, s), donate_argnums=0
  )
  new = state
  for _ in range(3):
    new = step(new)
  assert all(x.is_deleted() for x in jax.tree.leaves(state))
  assert captures.pointers(new) == before  # nothing kept it from its place
  found = _stored(programs, captured)
  for operator in slot:
    chex.assert_trees_all_equal(
      dict(found.state[operator]), _rows_of(programs.layout, host, operator)
    )


@_packed
def test_buffers_hold_what_they_are_of(is_packed):
  """The arrays of a snapshot may be gone when it is written."""
  programs, host = _programs(1, is_packed), captures.make_state(6)
  of = programs.layout
  slot = _SLOTS[2]
  others = frozenset(of.operators) - slot
  state, captured = _capture(programs, host, slot, others)
  metadata, buffers = captured.metadata(), captured.buffers()
  expected = [buffer.checksum() for buffer in buffers]
  del captured, state
  gc.collect()
  later = [
    _capture(programs, captures.make_state(i), slot, others)[1]
    for i in range(20)
  ]  # memory that was given back is taken again
  jax.block_until_ready([part.outputs for c in later for part in c.parts])
  assert [buffer.checksum() for buffer in buffers] == expected
  assert len(metadata['state']) == len(slot)


def test_compute_weights_are_held_by_reference():
  programs, host = _programs(), captures.make_state()
  state = captures.place(programs.layout, host)
  compute = captures.compute_of(programs.layout, state)
  some = captures.pick('b/experts:4', 'head')
  captured = programs.capture(
    state, compute, coverage.Contents(_SLOTS[1], some)
  )
  held = [x for p in captured.parts if p.kind == 'compute' for x in p.outputs]
  names = [n for n in compute if 'b/experts' in n or 'head' in n]
  assert len(held) == 3
  assert {id(x) for x in held} == {id(compute[n]) for n in names}


@pytest.mark.parametrize('devices', [1, 4])
def test_packed_captures_are_few_calls_and_arrays(devices):
  """One for groups that are alike, and one array for numbers of a size."""
  programs = _programs(devices, True)
  everything = frozenset(programs.layout.operators)
  slot = captures.pick(
    *(f'{g}/experts:{i}' for g in 'abc' for i in (0, 2, 4, 6)), 'head'
  )
  host = captures.make_state()
  _, captured = _capture(programs, host, slot, everything - slot)
  found = [
    (
      {(s.kind, s.column) for s in part.segments},
      sorted({o.group for o in part.picked.values()}),
      [(x.dtype.name, x.shape) for x in part.outputs],
    )
    for part in captured.parts
  ]
  rows = {1: 4, 4: 1}[devices]  # of each group and device
  state, compute = {('state', '*uint32')}, {('compute', '*uint16')}
  alike, alone = ['a/experts', 'b/experts'], ['c/experts']
  assert sorted(found, key=str) == sorted(
    [
      (state, alike, [('uint32', (devices, 2 * rows * 2 * 17))]),
      (state, alone, [('uint32', (devices, rows * 2 * 2))]),
      (
        state,
        ['head'],
        [('uint32', (1, 28))],
      ),
      (compute, alike, [('uint16', (devices, 2 * rows * 17))]),
      (compute, alone, [('uint16', (devices, rows * 2))]),
      ({('compute', '*uint32')}, ['router'], [('uint32', (1, 3))]),
    ],
    key=str,
  )


@_packed
@pytest.mark.parametrize('devices', [1, 4])
def test_a_snapshot_comes_by_way_of_pinned_memory(
  devices, is_packed, monkeypatch
):
  """Where the host's memory is not the device's; on CPU it can be tried."""
  programs, host = _programs(devices, is_packed), captures.make_state(4)
  of = programs.layout
  slot = _SLOTS[2]
  others = frozenset(of.operators) - slot
  _, captured = _capture(programs, host, slot, others)
  extras = {'digests': jax.numpy.arange(3), 'partials': np.arange(3, 5)}
  captured = dataclasses.replace(captured, extras=extras)
  there = captured.to_host()
  assert there.parts[0].outputs[0] is captured.parts[0].outputs[0]
  monkeypatch.setattr(transfer, '_HOSTS', frozenset())
  transfer._has_pinned_host.cache_clear()
  try:
    there = captured.to_host()
  finally:
    transfer._has_pinned_host.cache_clear()
  moved = [x for part in there.parts for x in part.outputs]
  assert {x.sharding.memory_kind for x in moved} == {'pinned_host'}
  buffers = captured.buffers()
  for expected, found in zip(buffers, there.buffers(), strict=True):
    assert expected.identity == found.identity
    assert expected.checksum() == found.checksum()
  for buffer, (name, value) in zip(buffers[-2:], extras.items(), strict=True):
    assert buffer.name == name
    np.testing.assert_array_equal(buffer.pieces[0], value)


@contextlib.contextmanager
def _compilations():
  """Yields a list that grows by one for each."""
  compiled: list[str] = []

  def listen(event, duration_secs, **kwargs):
    del duration_secs, kwargs
    if event == _COMPILED:
      compiled.append(event)

  jax.monitoring.register_event_duration_secs_listener(listen)
  try:
    yield compiled
  finally:
    jax.monitoring.unregister_event_duration_listener(listen)


@pytest.mark.parametrize('devices', [1, 4])
def test_one_compilation_for_groups_of_equal_shapes(devices):
  """And for each number of rows that a call takes."""
  named = []
  programs = capture_programs.CapturePrograms(
    captures.make_layout(devices), False
  )
  state = captures.place(programs.layout, captures.make_state())
  compute = captures.compute_of(programs.layout, state)
  with _compilations() as compiled:
    programs.compile(named.append)
    everything = frozenset(programs.layout.operators)
    three = [f'{g}/experts:{e}' for g in 'ac' for e in range(3)]
    for slot in (everything, captures.pick(*three), *_SLOTS):
      programs.capture(state, compute, coverage.Contents(slot))
    # Of the three stacked groups two are alike, each with as many sizes of
    # calls as a device has experts for; shared leaves have one to be copied by.
    alone = {'capture head', 'capture router', 'capture shared'}
    sizes = {1: (8, 2, 1), 4: (2, 1)}[devices]
    stacked = {f'capture {n} of {g}/experts' for n in sizes for g in 'ac'}
    if devices == 1:  # when they are first used, in this process
      assert len(compiled) <= len(alone | stacked)
    else:
      assert {n for n in named if n.startswith('capture ')} <= alone | stacked
      assert len(compiled) == len(set(named)) + 1
    compiled.clear()
    for slot in reversed(_SLOTS):
      programs.capture(state, compute, coverage.Contents(everything - slot))
    assert not compiled  # which operators it is, is a value


@_packed
def test_programs_that_a_standby_lowered_are_those_of_its_devices(is_packed):
  """It has none when it does, and its layout says so."""
  config = helpers.micro_run(local_devices=4)
  declared = transformer_job.of(config).declare_stage(0)
  ahead = capture_programs.CapturePrograms(
    stage_lib.layout_of(declared, has_devices=False), is_packed
  )
  lowered = ahead.trace(declared.abstract_mesh, 'cpu').lower('cpu')
  stage = transformer_job.of(config).bind(declared)
  of, named = stage_lib.layout_of(stage), []
  programs = capture_programs.CapturePrograms(of, is_packed)
  programs.compile(lowered=lowered)
  capture_programs.CapturePrograms(of, is_packed).compile(named.append)
  assert lowered.lowered.keys() == set(named)
  everything = frozenset(of.operators)
  state = stage.initial_state()
  captured = programs.capture(state, {}, coverage.Contents(everything))
  found = _stored(programs, captured)
  expected = of.partition.split(jax.tree.map(np.array, state))
  for operator, rows in found.state.items():
    chex.assert_trees_all_equal(dict(rows), expected[operator])
  assert found.state.keys() == everything


def test_one_call_captures_operators_of_every_device():
  programs = _programs(4)
  slot = captures.pick('a/experts:0', 'a/experts:3', 'a/experts:7')
  _, captured = _capture(programs, captures.make_state(), slot, frozenset())
  (rows,) = captured.parts
  assert {d: o.expert for d, o in rows.picked.items()} == {0: 0, 1: 3, 3: 7}
  slot |= captures.pick('a/experts:1', 'a/experts:6')
  _, captured = _capture(programs, captures.make_state(), slot, frozenset())
  (rows,) = captured.parts  # two rows of each device, as many as some have
  found = {row: o.expert for row, o in rows.picked.items()}
  assert found == {0: 0, 1: 1, 2: 3, 6: 6, 7: 7}
  for rows in captured.parts:  # each device has its row
    for output in rows.outputs:
      assert len({s.device for s in output.addressable_shards}) == 4
      assert not output.is_fully_replicated


# ---- fold --------------------------------------------------------------------


def _expected_fold(of, old, snap_of, slot, active):
  """The definition, operator by operator."""
  old_rows = old and of.partition.split(old)
  new_rows = of.partition.split(snap_of)
  out = {}
  for operator, rows in new_rows.items():
    if operator not in of.operators:  # shared leaves
      out[operator] = rows
    elif operator in active:
      out[operator] = old_rows[operator]
    elif operator in slot:
      out[operator] = rows
    else:
      out[operator] = {
        path: row.astype(of.compute_dtypes[path]).astype(row.dtype)
        if path in of.compute
        else np.zeros_like(row)
        for path, row in rows.items()
      }
  return of.partition.merge(out)


_ALL = sorted(captures.make_layout().operators)


@hypothesis.settings(deadline=None, max_examples=40)
@hypothesis.given(
  st.sampled_from([1, 4]),
  st.booleans(),
  st.lists(st.sets(st.sampled_from(_ALL)), min_size=1, max_size=4),
)
def test_folds_are_their_definition(devices, is_packed, windows):
  programs = _programs(devices, is_packed)
  of = programs.layout
  state, expected, active = None, None, frozenset()
  for number, slot in enumerate(map(frozenset, windows)):
    host = captures.make_state(number)
    others = frozenset(of.operators) - slot - active  # more is not needed
    _, captured = _capture(programs, host, slot, others)
    found = _stored(programs, captured)
    state = programs.fold(state, found, active)
    expected = _expected_fold(of, expected, host, slot, active)
    active |= slot
    chex.assert_trees_all_equal(jax.tree.map(np.array, state), expected)
    for leaf, value in zip(of.leaves, jax.tree.leaves(state), strict=True):
      if of.mesh is not None:
        assert value.is_fully_replicated != leaf.group.stacked


def test_a_fold_owns_its_memory(tmp_path):
  """The file that a snapshot was read from may change right after."""
  programs, host = _programs(), captures.make_state(3)
  of = programs.layout
  everything = frozenset(of.operators)
  _, captured = _capture(programs, host, everything, frozenset())
  snapshot_file.write(
    tmp_path,
    captured.buffers(),
    captured.metadata(),
  )
  stored = snapshot_file.open_snapshot(tmp_path)
  found = snapshot.from_arrays(of, stored.metadata, stored.arrays)
  first = programs.fold(None, found, frozenset())
  second = programs.fold(
    captures.place(of, captures.make_state(4)), found, frozenset()
  )
  jax.block_until_ready((first, second))
  data = tmp_path / snapshot_file.DATA_NAME
  with open(data, 'r+b') as file:
    file.write(b'\xff' * data.stat().st_size)
  chex.assert_trees_all_equal(jax.tree.map(np.array, first), host)
  chex.assert_trees_all_equal(jax.tree.map(np.array, second), host)


@pytest.mark.parametrize('devices', [1, 4])
def test_a_fold_writes_what_its_slot_has_and_no_more(devices):
  """Where gradients are recorded, nobody reads what becomes of the others."""
  programs, host = _programs(devices), captures.make_state(5)
  of = programs.layout
  slot = captures.pick('a/experts:1', 'a/experts:2', 'a/experts:7', 'head')
  _, captured = _capture(programs, host, slot, frozenset())
  others = frozenset(of.operators) - slot
  found = dataclasses.replace(
    _stored(programs, captured), gradients={o: {} for o in others}
  )
  for before in (None, captures.make_state(6)):
    state = before and captures.place(of, before)
    old = state and jax.tree.leaves(state)
    new = programs.fold(state, found, frozenset())
    base = before or jax.tree.map(np.zeros_like, host)
    expected = of.partition.split(base) | {
      o: rows
      for o, rows in of.partition.split(host).items()
      if o in slot or o not in of.operators
    }
    chex.assert_trees_all_equal(
      jax.tree.map(np.array, new), of.partition.merge(expected)
    )
    places = {
      i
      for i, x in enumerate(of.leaves)
      if x.group.name in ('c/experts', 'router')
    }
    if old:
      leaves = jax.tree.leaves(new)
      assert all(leaves[i] is old[i] for i in places)


def test_an_operator_that_is_nowhere_is_named():
  programs = _programs()
  of = programs.layout
  others = frozenset(of.operators) - captures.pick('b/experts:4', 'head')
  _, captured = _capture(programs, captures.make_state(), frozenset(), others)
  found = _stored(programs, captured, iteration=12)
  with pytest.raises(
    errors.StoreError, match='snapshot 12 has nothing of b/exp'
  ):
    programs.fold(None, found, captures.pick('head'))


@pytest.mark.parametrize(
  ('change', 'words'),
  [
    (lambda a: None, 'state of a/experts/1, params/a/experts/w, is missing'),
    (lambda a: a[..., 0], r'1\|\S+ is float32\(1, 3\), not float32\(1, 3, 4\)'),
    (lambda a: a.astype(ml_dtypes.bfloat16), r'1\|params/a/ex\S+ is bfloat16'),
  ],
)
def test_a_snapshot_of_another_model_is_refused(change, words):
  programs = _programs()
  of = programs.layout
  slot = captures.pick('a/experts:1')
  _, captured = _capture(programs, captures.make_state(), slot, frozenset())
  arrays = {
    b.name: np.reshape(b.pieces[0], b.shape) for b in captured.buffers()
  }
  name = 'state|a/experts|1|params/a/experts/w'
  changed = change(arrays[name])
  if changed is None:
    del arrays[name]
  else:
    arrays[name] = changed
  metadata = captured.metadata(iteration=3)
  with pytest.raises(errors.StoreError, match=words) as caught:
    snapshot.from_arrays(of, metadata, arrays)
  assert str(caught.value).startswith('snapshot 3: ')
  assert str(caught.value).endswith(': it is of another model')


# ---- bytes -------------------------------------------------------------------


@_packed
@pytest.mark.parametrize('devices', [1, 4])
@pytest.mark.parametrize('slot', _SLOTS, ids=len)
def test_bytes_are_those_of_the_buffers(devices, slot, is_packed):
  programs = _programs(devices, is_packed)
  of = programs.layout
  others = frozenset(of.operators) - slot
  _, captured = _capture(programs, captures.make_state(), slot, others)
  buffers = captured.buffers()
  written = sum(b.nbytes for b in buffers if not b.name.startswith('shared'))
  assert snapshot.snapshot_bytes(of, coverage.Contents(slot, others)) == written


@pytest.mark.parametrize('optimizer', ['adamw', 'adafactor', 'sgd'])
@pytest.mark.parametrize('stages', [1, 2])
def test_bytes_of_a_stage(optimizer, stages):
  config = helpers.micro_run(optimizer={'optimizer': optimizer}, stages=stages)
  for index in range(stages):
    stage = transformer_job.of(config).declare_stage(index)
    of = stage_lib.layout_of(stage, has_devices=False)
    shapes = jax.tree.leaves(stage.state_shapes)
    state = sum(x.size * x.dtype.itemsize for x in shapes)
    compute = sum(
      x.size * np.dtype(stage.model.compute_dtypes[name]).itemsize
      for name, x in stage.model.shapes.items()
    )
    assert sum(of.state_bytes().values()) == state
    assert of.state_bytes() == stage.partition.operator_bytes
    assert sum(of.compute_bytes().values()) == compute
    if optimizer == 'adamw':  # 12 bytes a parameter, and counts of steps
      parameters = sum(x.size for x in stage.model.shapes.values())
      assert 0 <= state - 12 * parameters <= 16 * len(of.operators)


# ---- training beside it ------------------------------------------------------


@_packed
@pytest.mark.parametrize('devices', [1, 4])
def test_the_update_stays_in_place_while_snapshots_are_taken(
  devices, is_packed, shm_folder
):
  """A host view of a donated buffer would silently make each update a copy."""
  programs = _programs(devices, is_packed)
  of = programs.layout
  order = list(of.operators)
  made = slots.make_slots(order, of.state_bytes(), 3)
  decision = decision_lib.CaptureDecision(
    first_iteration=0, window_length=3, mode='rolling', slots=made
  )
  store = memory_store.SnapshotStore(shm_folder, 1 << 16, 9)
  # As a stage's: fresh compute weights are an output, the state is donated.
  step = jax.jit(
    lambda s: (
      new := jax.tree.map(lambda x: x * 3 + 1, s),
      captures.compute_of(of, new),
    ),
    donate_argnums=0,
  )
  taker = snapshotter.Snapshotter(programs, store, decision, {})
  taker.start()
  try:
    host = captures.make_state(5)
    state = captures.place(of, host)
    before = captures.pointers(state)
    expected = {}
    for iteration in range(1, 8):
      taker.release()
      state, compute = step(state)
      assert captures.pointers(state) == before
      taker.take(iteration, state, compute, {})
      host = jax.tree.map(np.array, jax.tree.map(jax.numpy.copy, state))
      expected[iteration] = host
    taker.flush()
    for iteration, path in snapshot_file.list_snapshots(shm_folder).items():
      with snapshot_file.open_snapshot(path, verify=True) as stored:
        found = snapshot.from_arrays(of, stored.metadata, stored.arrays)
        for operator, rows in found.state.items():
          chex.assert_trees_all_equal(
            dict(rows), _rows_of(of, expected[iteration], operator)
          )
        del found
  finally:
    taker.close()
