"""Updates of whole stages and of groups: no operator reaches another."""

import functools
from typing import Any

import chex
import jax
import numpy as np
import pytest
from jax import numpy as jnp

from models import stages
from moetion_jax import config, keys as keys_lib
from moetion_jax.programs import compilation, mesh, stage
from moetion_jax.state import (
  model as model_lib,
  optimizer_update,
  optimizers,
  partition as partition_lib,
)
from tests.support import helpers

# Wide enough that adafactor factors the second moment of an expert's matrix.
_SHAPES = {
  'embedding/table': (33, 2),
  'layers/0/experts/norm': (4, 7),
  'layers/0/experts/w': (4, 32, 40),
  'layers/0/norm': (5,),
  'layers/0/router_bias': (4,),
  'layers/0/w': (32, 33),
}
_BUFFERS = frozenset({'layers/0/router_bias', 'steered'})


def _optimizer(name: str):
  return optimizers.make(
    config.OptimizerConfig(optimizer=name, weight_decay=0.1)
  )


def _forward(params, inputs, position):
  """The least that makes a whole stage: it is quick to compile."""
  del inputs, position
  sums = [jnp.sum(w.astype(jnp.float32)) for w in params.values()]
  loss = jnp.sum(jnp.stack(sums))
  counts = {
    'auxiliary_loss': loss,
    'load': jnp.zeros((1, 4), jnp.int32),
    'dropped': jnp.zeros(1, jnp.int32),
    'loss': loss,
  }
  return model_lib.Outputs(None, loss, counts)


@functools.cache
def _stage(name: str) -> stage.Stage:
  model = model_lib.StageModel(
    shapes={
      n: jax.ShapeDtypeStruct(s, jnp.float32) for n, s in _SHAPES.items()
    },
    compute_dtypes=dict.fromkeys(_SHAPES, jnp.bfloat16),
    partition=stages.partition,
    initialize=dict,
    forward=_forward,
    buffers=_BUFFERS & _SHAPES.keys(),
    buffer_steps=lambda counts: {
      'layers/0/router_bias': counts['load'][0].astype(jnp.float32)
    },
    has_embedding=True,
    has_head=True,
    hidden_shape=(2, 2),
    hidden_dtype=jnp.bfloat16,
  )
  declared = stage.Stage.declare(
    model,
    _optimizer(name),
    1,
    compilation.ProgramShape(
      microbatch_size=1, sequence_length=2, microbatches=1
    ),
  )
  return declared.on(mesh.make_mesh(jax.devices()[:1]))


def _normals(rng, shapes=_SHAPES):
  return {n: rng.standard_normal(s, np.float32) for n, s in shapes.items()}


@pytest.mark.parametrize('name', config.OPTIMIZERS)
def test_byte_model_is_what_the_state_takes(name):
  built = _stage(name)
  rng = np.random.default_rng(0)
  state = built.state_from_masters(_normals(rng))
  chex.assert_trees_all_equal_shapes_and_dtypes(state, built.state_shapes)
  sizes = built.partition.operator_bytes
  assert sum(sizes.values()) == sum(a.nbytes for a in jax.tree.leaves(state))
  parts = built.partition.split(jax.device_get(state))
  assert {o: sum(a.nbytes for a in p.values()) for o, p in parts.items()} == (
    sizes
  )
  parameters = 32 * 40 + 7
  by_hand = {
    'adamw': 12 * parameters + 8,  # masters, two moments, two counts
    'lion': 8 * parameters + 8,  # masters, one moment, two counts
    'sgd': 8 * parameters + 4,  # masters, one moment, a count
  }
  for operator in built.partition.operators_of('layers/0/experts'):
    assert sizes[operator] == by_hand.get(name, sizes[operator])


def _updated(built, state, gradients):
  """One compiled update of a host state, on a copy of it."""
  update = _programs(built).update
  slot = {
    g: np.zeros(len(built.partition.operators_of(g)), bool)
    for g in built.partition.groups
  }
  shardings = built.shardings(built.compute_specs)
  placed = {
    n: jax.device_put(jnp.array(g), shardings[n]) for n, g in gradients.items()
  }
  new, _, _ = update(built.place_state(state), placed, np.float32(0.5), slot)
  return jax.device_get(new)


# LLVM's optimizations are most of the time that these small programs take.
_jit = functools.partial(
  jax.jit, compiler_options={'xla_backend_optimization_level': 0}
)


@functools.cache
def _programs(built: stage.Stage) -> compilation.Programs:
  jax.config.update('jax_disable_most_optimizations', True)
  try:
    return built.compile()
  finally:
    jax.config.update('jax_disable_most_optimizations', False)


def _perturbed(rng, leaves, poison: bool):
  """Other finite values in every float, or NaN in all of them."""

  def other(a):
    a = np.asarray(a)
    if not np.issubdtype(a.dtype, np.floating):
      return a + 3
    if poison:
      return np.full_like(a, np.nan)
    return (a + rng.uniform(1, 2, a.shape)).astype(a.dtype)

  return {k: other(v) for k, v in leaves.items()}


@pytest.mark.parametrize('name', config.OPTIMIZERS)
def test_no_operator_reaches_another_through_a_stages_update(name):
  built, rng = _stage(name), np.random.default_rng(0)
  partition = built.partition
  gradients = _normals(rng)
  state = jax.device_get(built.state_from_masters(_normals(rng)))
  state = _updated(built, state, gradients)
  expected = partition.split(_updated(built, state, gradients))
  of_gradients = partition_lib.Partition(gradients, built.model.partition)
  assert of_gradients.operators == partition.operators
  for operator, poison in (
    (keys_lib.OperatorId('layers/0/experts', 2), False),
    (keys_lib.OperatorId('layers/0/experts', 0), True),
    (keys_lib.OperatorId('layers/0'), False),
    (keys_lib.OperatorId('embedding'), True),
  ):
    parts = partition.split(state)
    parts[operator] = _perturbed(rng, parts[operator], poison)
    own = of_gradients.split(gradients)
    own[operator] = _perturbed(rng, own[operator], poison)
    after = partition.split(
      _updated(built, partition.merge(parts), of_gradients.merge(own))
    )
    for other in partition.operators:
      same = helpers.bits_of(after[other]) == helpers.bits_of(expected[other])
      assert same == (other != operator), f'{operator} reached {other}'


def _expert_group(rng, experts: int):
  shapes = {'w': (experts, 32, 40), 'b': (experts, 7), 'steered': (experts, 3)}
  return _normals(rng, shapes)


def _group_functions(name: str, *, stacked: bool):
  optimizer = _optimizer(name)
  settings: Any = dict(stacked=stacked, buffers=_BUFFERS)
  return (
    _jit(lambda m: optimizer_update.init_group(optimizer, m, **settings)),
    _jit(
      lambda s, g: optimizer_update.update_group(optimizer, s, g, **settings)
    ),
  )


def _experts_reached(name: str, *, stacked: bool) -> list[int]:
  """Experts of which an update depends on expert 1."""
  rng = np.random.default_rng(0)
  init, update = _group_functions(name, stacked=stacked)
  gradients = _expert_group(rng, 4)
  state = update(init(_expert_group(rng, 4)), gradients)
  expected = update(state, gradients)

  def changed(tree, poison=False):
    out = {}
    for key, leaf in jax.device_get(tree).items():
      leaf = np.array(leaf)
      if leaf.shape[:1] == (4,):  # not what unstacked experts share
        leaf[1] = _perturbed(rng, {'': leaf[1]}, poison)['']
      out[key] = leaf
    return out

  reached = set()
  for poison in (False, True):
    after = update(changed(state, poison), changed(gradients, poison))
    for key, leaf in after.items():
      if leaf.shape[:1] == (4,):
        for e in range(4):
          if helpers.bits_of(leaf[e]) != helpers.bits_of(expected[key][e]):
            reached.add(e)
  return sorted(reached)


@pytest.mark.parametrize('name', config.OPTIMIZERS)
def test_no_expert_reaches_another_in_its_group(name):
  assert _experts_reached(name, stacked=True) == [1]


def test_experts_updated_as_one_array_would_reach_each_other():
  # The control: adafactor looks at the norm of a leaf.
  assert _experts_reached('adafactor', stacked=False) == [0, 1, 2, 3]


@pytest.mark.parametrize('name', config.OPTIMIZERS)
def test_a_stacked_group_is_its_experts_one_by_one(name):
  rng = np.random.default_rng(0)
  masters, gradients = _expert_group(rng, 3), _expert_group(rng, 3)
  init, update = _group_functions(name, stacked=True)
  stacked = update(update(init(masters), gradients), gradients)
  init, update = _group_functions(name, stacked=False)
  for e in range(3):
    own = {n: g[e] for n, g in gradients.items()}
    alone = update(
      update(init({n: m[e] for n, m in masters.items()}), own), own
    )
    row = {path: leaf[e] for path, leaf in stacked.items()}
    chex.assert_trees_all_equal_shapes_and_dtypes(row, alone)
    # Not bitwise: these are two programs, and XLA rounds each in its own way.
    chex.assert_trees_all_close(row, alone, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize('name', config.OPTIMIZERS)
def test_buffers_take_their_step_and_nothing_else(name):
  rng = np.random.default_rng(0)
  masters, steps = _expert_group(rng, 2), _expert_group(rng, 2)
  init, update = _group_functions(name, stacked=True)
  state = init(masters)
  assert [k for k in state if k.endswith('steered')] == ['master/steered']
  after = update(state, steps)
  np.testing.assert_array_equal(
    after['master/steered'], masters['steered'] + steps['steered']
  )
  assert after.keys() == state.keys()


def test_masters_are_found_in_a_state():
  state = {
    'layers/0': {'master/layers/0/w': np.ones(1), 'optimizer/0/mu/w': 0},
    'head': {'master/head/w': np.zeros(1)},
  }
  masters = optimizer_update.masters_of(state)
  assert masters == {'layers/0/w': np.ones(1), 'head/w': np.zeros(1)}
