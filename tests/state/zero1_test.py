"""Training state that the replicas of a stage share: the same bits, less of it.

The workers of a stage world are meshes of this process here; the programs are
theirs.
"""

import dataclasses
import functools

import chex
import jax
import numpy as np
import pytest
from jax import numpy as jnp

from launch.lm import settings as run_settings, transformer_job
from moetion_jax import config as config_lib, errors, keys
from moetion_jax.capture import programs as capture_programs
from moetion_jax.programs import (
  compilation,
  mesh as mesh_lib,
  stage as stage_lib,
)
from moetion_jax.runtime import final_state
from moetion_jax.runtime.checkpoints import restore
from moetion_jax.runtime.worker import fault_damage
from moetion_jax.snapshots import coverage, snapshot
from moetion_jax.state import host_digest, model, optimizers
from tests.support import helpers

_GROUPS = {
  'experts': model.Group('experts', True),
  'rest': model.Group('rest', False),
  'head': model.Group('head', False),
}
# One layer with eight experts. No forward: only the state is looked at.
_MODEL = model.StageModel(
  shapes={
    name: jax.ShapeDtypeStruct(shape, jnp.float32)
    for name, shape in {
      'experts/up': (8, 16, 24),
      'experts/down': (8, 24, 16),
      'rest/norm': (16,),
      'rest/router': (16, 8),
      'rest/bias': (8,),
      'head/table': (40, 16),
    }.items()
  },
  compute_dtypes={
    'experts/up': jnp.bfloat16,
    'experts/down': jnp.bfloat16,
    'rest/norm': jnp.bfloat16,
    'rest/router': jnp.float32,
    'rest/bias': jnp.float32,
    'head/table': jnp.bfloat16,
  },
  partition=lambda name: _GROUPS[name.partition('/')[0]],
  initialize=dict,
  forward=lambda params, inputs, position: pytest.fail('nothing is trained'),
  buffers=frozenset({'rest/bias'}),
  buffer_steps=lambda counts: {},
  has_embedding=True,
  has_head=True,
  hidden_shape=(4, 16),
  hidden_dtype=jnp.bfloat16,
)


def _declare(
  position=None, *, optimizer='adamw', replicas=2, devices=1, team=None
):
  stage = stage_lib.Stage.declare(
    _MODEL,
    optimizers.make(
      config_lib.OptimizerConfig(optimizer=optimizer, learning_rate=1e-2)
    ),
    devices,
    compilation.ProgramShape(
      microbatch_size=4,
      sequence_length=4,
      microbatches=1,
      replicas=replicas,
      team=team,
    ),
  )
  return stage if position is None else stage.sharded(position)


@dataclasses.dataclass(frozen=True)
class _Member:
  """A worker, with the programs for its state, which it compiles if asked."""

  stage: stage_lib.Stage

  @functools.cached_property
  def _traced(self):
    return self.stage.trace(state_only=True).traced

  @functools.cache  # noqa: B019  as long as `_world` keeps it
  def program(self, name):
    mesh = self.stage.mesh
    one = compilation.TracedPrograms({name: self._traced[name]})
    lowered = one.lower(compilation.platform_of(mesh))
    return lowered.compile_each(mesh, world=self.stage.world)[name]

  def place(self, state):
    """A host state of the whole stage: what the worker has of it."""
    own = {
      group: {k: self.stage.own_rows(group, state[group][k]) for k in leaves}
      for group, leaves in self.stage.state_shapes.items()
    }
    return self.stage.place_state(own, self.program('place'))

  def split(self, state):
    return self.stage.partition.split(jax.device_get(state))


@functools.lru_cache(maxsize=2)
def _world(optimizer='adamw', replicas=2, devices=1):
  """Every worker that shares the state, and one that has all of it."""
  world = mesh_lib.make_mesh(jax.devices()[: replicas * devices], replicas)

  def member(position):
    first = (position or 0) * devices
    mesh = mesh_lib.make_mesh(jax.devices()[first : first + devices])
    declared = _declare(
      position, optimizer=optimizer, replicas=replicas, devices=devices
    )
    return _Member(declared.on(mesh, world))

  return [member(p) for p in range(replicas)], member(None)


def _host_state(stage, seed=0):
  """Of the whole stage: random, moments not negative."""
  random = np.random.default_rng(seed)
  return jax.tree.map(
    lambda s: np.abs(random.standard_normal(s.shape)).astype(s.dtype),
    stage.whole.state_shapes,
  )


def _gradients(member, seed):
  random = np.random.default_rng(seed)
  host = {
    n: random.standard_normal(s.shape).astype(np.float32)
    for n, s in member.stage.model.shapes.items()
  }
  shardings = member.stage.shardings(member.stage.compute_specs)
  return jax.device_put(host, shardings)


def _update(member, state, seed):
  slot = {
    group: np.zeros(len(member.stage.partition.operators_of(group)), bool)
    for group in member.stage.partition.groups
  }
  state, _, _ = member.program('update')(
    state, _gradients(member, seed), np.float32(0.37), slot
  )
  return state


def _gather(members, states):
  """What every worker has afterwards, as one array over the world."""
  world = members[0].stage.world
  packed = [
    member.program('compute_of')(state)
    for member, state in zip(members, states, strict=True)
  ]

  def join(*of_each):
    first = of_each[0]
    return jax.make_array_from_single_device_arrays(
      (first.shape[0] * len(of_each), *first.shape[1:]),
      jax.sharding.NamedSharding(world, mesh_lib.OWN),
      [shard.data for x in of_each for shard in x.addressable_shards],
    )

  return members[0].program('gather')(jax.tree.map(join, *packed))


def _assert_same_bits(ours, theirs):
  assert ours.keys() == theirs.keys()
  for name in ours:
    a, b = np.asarray(ours[name]), np.asarray(theirs[name])
    assert (a.dtype, a.shape) == (b.dtype, b.shape), name
    assert a.tobytes() == b.tobytes(), name


@pytest.mark.thorough
@pytest.mark.parametrize('name', config_lib.OPTIMIZERS)
def test_updates_have_the_bits_of_one_who_has_everything(name):
  members, whole = _world(name)
  host = _host_state(whole.stage)
  everything = whole.place(host)
  states = [member.place(host) for member in members]
  for seed in range(3):
    everything = _update(whole, everything, seed)
    states = [_update(m, s, seed) for m, s in zip(members, states, strict=True)]
  parts: dict = {}
  for member, state in zip(members, states, strict=True):
    parts |= member.split(state)
  expected = whole.split(everything)
  chex.assert_trees_all_equal(parts, expected)
  before = whole.split(host)
  for operator, leaves in expected.items():
    assert not all(
      np.array_equal(value, before[operator][k]) for k, value in leaves.items()
    )
  _assert_same_bits(
    _gather(members, states), whole.program('compute_of')(everything)
  )


@pytest.mark.parametrize(('replicas', 'devices'), [(2, 2), (3, 1)])
def test_the_same_with_other_worlds(replicas, devices):
  """Eight experts: four on each device, or three, three and two."""
  members, whole = _world(replicas=replicas, devices=devices)
  host = _host_state(whole.stage)
  everything = _update(whole, whole.place(host), 0)
  states = [_update(m, m.place(host), 0) for m in members]
  parts: dict = {}
  for member, state in zip(members, states, strict=True):
    for leaf in jax.tree.leaves(state):
      assert leaf.sharding.device_set == set(member.stage.mesh.devices.flat)
    parts |= member.split(state)
  chex.assert_trees_all_equal(parts, whole.split(everything))
  _assert_same_bits(
    _gather(members, states), whole.program('compute_of')(everything)
  )


@pytest.mark.parametrize('devices', [1, 2])
def test_digests_are_those_of_one_who_has_everything(devices):
  members, whole = _world(devices=devices)
  host = _host_state(whole.stage)

  def digests(member):
    rows = member.program('digest')(member.place(host))
    return member.stage.partition.by_operator(rows)

  found = digests(members[0]) | digests(members[1])
  chex.assert_trees_all_equal(found, digests(whole))


def test_bits_arrive_as_they_are():
  """Zeros with a sign, infinities, NaNs with a payload, anything."""
  (first, second), whole = _world()
  random = np.random.default_rng(0)
  weights = {}
  for name, shape in whole.stage.model.shapes.items():
    dtype = np.dtype(whole.stage.model.compute_dtypes[name])
    words = np.dtype(f'uint{8 * dtype.itemsize}')
    bits = random.integers(0, np.iinfo(words).max, shape.shape, words, True)
    strange = [1 << (8 * words.itemsize - 1), np.iinfo(words).max]
    bits.reshape(-1)[:2] = strange  # -0.0, and a NaN of all bits
    weights[name] = bits.view(dtype)
  packed = []
  assert first.stage.ownership and second.stage.ownership
  for member in (first, second):
    own = {
      n: member.stage.own_rows(member.stage.model.partition(n).name, weights[n])
      for n in weights
      if member.stage.ownership.has(member.stage.model.partition(n))
    }
    packed.append(jax.jit(member.stage.ownership.pack)(own))
  words = jax.tree.map(lambda *x: np.concatenate(jax.device_get(x)), *packed)
  for member in (first, second):
    _assert_same_bits(jax.jit(member.stage.ownership.unpack)(words), weights)


def test_who_has_what():
  (first, second), whole = _world()
  operators = [set(m.stage.partition.operators) for m in (first, second)]
  # Experts go round, after the head went to the first one; the other one has
  # the rest, which is next.
  assert operators[0] == {
    keys.OperatorId('head'),
    *(keys.OperatorId('experts', e) for e in (0, 2, 4, 6)),
  }
  assert sorted(
    [*first.stage.partition.operators, *second.stage.partition.operators]
  ) == list(whole.stage.partition.operators)
  assert first.stage.whole.partition.operators == (
    whole.stage.partition.operators
  )


@pytest.mark.parametrize('replicas', [2, 4])
def test_the_state_of_a_worker_falls_as_one_over_the_replicas(replicas):
  config = run_settings.make(
    'small',
    model_overrides=[],
    train_overrides={'replicas': replicas, 'shard_optimizer': True},
    optimizer_overrides={},
  )

  def state_bytes(position):
    stage = transformer_job.of(config).declare_stage(0, None, position)
    return sum(
      x.size * x.dtype.itemsize for x in jax.tree.leaves(stage.state_shapes)
    )

  whole = state_bytes(None)
  own = [state_bytes(position) for position in range(replicas)]
  assert sum(own) == whole
  assert max(own) < 1.1 * whole / replicas


def test_there_is_nothing_for_a_replica():
  with pytest.raises(errors.ConfigError, match='no more than 10 parts'):
    _declare(0, replicas=11)
  with pytest.raises(errors.ConfigError, match='no more than 4 parts'):
    _declare(0, replicas=5, devices=4)  # two experts on each device
  with pytest.raises(errors.ConfigError, match='needs --replicas=2'):
    config_lib.TrainConfig(shard_optimizer=True)


def test_a_worker_alone_has_everything():
  config = helpers.micro_run(replicas=2, shard_optimizer=True)
  assert (
    transformer_job.of(config).declare_stage(0, None, 0).ownership is not None
  )
  stage = transformer_job.of(config).declare_stage(0, (0,), 0)
  assert stage.ownership is None
  assert stage.partition is stage.whole.partition


@pytest.mark.parametrize('weights_only', [False, True])
def test_a_checkpoint_to_start_from(weights_only):
  members, whole = _world()
  host = _host_state(whole.stage)
  tree = {'parameters': {}, 'optimizer': {}}
  for group, leaves in host.items():
    for leaf, value in leaves.items():
      if leaf.startswith('master/'):
        tree['parameters'][leaf.removeprefix('master/')] = value
      else:
        tree['optimizer'].setdefault(group, {})[leaf] = value
  expected = whole.split(
    restore.initial(whole.stage, tree, 'x', 'y', weights_only=weights_only)()
  )
  parts: dict = {}
  for member in members:
    parts |= member.split(
      restore.initial(member.stage, tree, 'x', 'y', weights_only=weights_only)()
    )
  chex.assert_trees_all_equal(parts, expected)


def _put_shares(folder, members, host, digests):
  """Puts a stage's state as replicas 2 and 5, as stage 1."""
  for replica, member in zip((2, 5), members, strict=True):
    final_state.put(
      folder,
      1,
      member.place(host),
      {o: digests[o] for o in member.stage.partition.operators},
      replica=replica,
      partition=member.stage.partition,
    )


def test_the_final_state_of_all(shm_folder):
  members, whole = _world()
  host = _host_state(whole.stage)
  digests = _digests(whole, host)
  _put_shares(shm_folder, members, host, digests)
  final_state.put(shm_folder, 0, whole.place(host), digests)
  for found in (
    final_state.get(shm_folder, 1, [2, 5]),
    final_state.get(shm_folder, 0),
  ):
    chex.assert_trees_all_equal(dict(found.state), host)
    assert found.digests.keys() == digests.keys()


def test_a_damaged_part_of_the_final_state_names_its_replica(shm_folder):
  members, whole = _world()
  host = _host_state(whole.stage)
  digests = _digests(whole, host)
  _put_shares(shm_folder, members, host, digests)
  path = fault_damage.flip_bit_in_largest(
    final_state.folder_of(shm_folder, 1, 5)
  )
  with pytest.raises(final_state.DamagedError) as caught:
    final_state.get(shm_folder, 1, [2, 5])
  assert (caught.value.stage, caught.value.replica) == (1, 5)
  text, _, names = str(caught.value).rpartition(': ')
  assert str(path) in text
  assert names in map(str, members[1].stage.partition.operators)
  # Without one of them there is no whole state.
  with pytest.raises(final_state.DamagedError, match='replica 2'):
    final_state.get(shm_folder, 1, [2])


def _digests(whole, host):
  """Of all operators of a state on the host."""
  partition = whole.stage.partition
  return host_digest.digest_state(host, partition.stacked_groups)


def _taken(member, state, slot, captures):
  """A worker's share of a snapshot, as it comes out of the store."""
  own = frozenset(member.stage.partition.operators)
  whole = stage_lib.layout_of(member.stage, whole=True)
  # What forward reads is all there, on every worker.
  compute = {
    n: np.zeros(s.shape, member.stage.model.compute_dtypes[n])
    for n, s in member.stage.model.shapes.items()
  }
  for leaf, name in whole.compute.items():
    group, _, _ = leaf.partition('/master/')
    if group not in state:
      continue
    part = np.asarray(state[group][f'master/{name}'])
    rows = slice(None)
    if whole.partition.groups[group].stacked:
      rows = [o.expert for o in member.stage.partition.operators_of(group)]
    compute[name][rows] = part.astype(compute[name].dtype)
  captured = captures.capture(
    state, jax.device_put(compute), coverage.Contents(slot & own, own - slot)
  )
  digests = member.program('digest')(state)
  captured = dataclasses.replace(captured, extras={snapshot.DIGESTS: digests})
  buffers = captured.buffers()
  metadata = captured.metadata(iteration=1, digests=keys.operators_to_json(own))
  arrays = {
    b.name: np.concatenate([np.ravel(p) for p in b.pieces])
    .view(b.dtype)
    .reshape(b.shape)
    for b in buffers
  }
  return snapshot.from_arrays(whole, metadata, arrays)


@pytest.mark.thorough
@pytest.mark.parametrize('is_packed', [False, True])
@pytest.mark.parametrize('devices', [1, 2])
def test_shares_of_a_snapshot_make_states_of_any_team(devices, is_packed):
  members, whole = _world(devices=devices)
  host = _host_state(whole.stage)
  operators = whole.stage.partition.operators
  slot = frozenset(operators[::3])
  captures = []
  for member in (*members, whole):
    of = stage_lib.layout_of(member.stage)
    programs = capture_programs.CapturePrograms(of, is_packed)
    programs.compile()
    captures.append(programs)
  shares = [
    _taken(m, m.place(host), slot, c)
    for m, c in zip(members, captures, strict=False)
  ]
  merged = snapshot.merge(shares)
  names = snapshot.names_of_digests(merged.metadata[snapshot.DIGESTS])
  assert sorted(names) == list(operators)
  expected = whole.split(host)
  for member, programs in zip((*members, whole), captures, strict=True):
    state = programs.fold(None, merged, frozenset())
    for operator, leaves in member.split(state).items():
      if operator in slot:
        chex.assert_trees_all_equal(leaves, expected[operator])
        continue
      for leaf, value in leaves.items():
        wanted = np.zeros_like(value)
        if name := programs.layout.compute.get(leaf):
          dtype = member.stage.model.compute_dtypes[name]
          wanted = expected[operator][leaf].astype(dtype).astype(np.float32)
        np.testing.assert_array_equal(value, wanted)


def test_one_share_is_enough_for_a_worker_of_the_same_team():
  (first, second), _ = _world()
  host = _host_state(first.stage)
  slot = frozenset(first.stage.whole.partition.operators)
  programs = capture_programs.CapturePrograms(stage_lib.layout_of(first.stage))
  programs.compile()
  share = _taken(first, first.place(host), slot, programs)
  state = programs.fold(None, share, frozenset())
  chex.assert_trees_all_equal(
    first.split(state), first.split(first.place(host))
  )
  other = capture_programs.CapturePrograms(stage_lib.layout_of(second.stage))
  other.compile()
  with pytest.raises(errors.StoreError, match='has nothing of'):
    other.fold(None, share, frozenset())


def test_compute_weights_are_those_that_an_update_makes():
  """Without shares: `compute_of` is what `update` returns."""
  _, whole = _world()
  state = whole.place(_host_state(whole.stage))
  slot = {
    group: np.zeros(len(whole.stage.partition.operators_of(group)), bool)
    for group in whole.stage.partition.groups
  }
  state, compute, _ = whole.program('update')(
    state, _gradients(whole, 0), np.float32(1), slot
  )
  assert any(x.dtype == jnp.bfloat16 for x in compute.values())
  _assert_same_bits(compute, whole.program('compute_of')(state))
