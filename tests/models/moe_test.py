import dataclasses
import functools
import re
import warnings
from typing import Any

import chex
import hypothesis
import hypothesis.strategies as st
import jax
import numpy as np
import pytest
from jax import numpy as jnp
from jax.extend.mlir import ir
from jax.sharding import PartitionSpec

from models import layers, moe, stages, transformer
from moetion_jax.programs import mesh
from moetion_jax.state import model as model_lib
from tests.support import helpers

_CONFIG = helpers.FP32_MODEL

_plan = jax.jit(moe.plan_dispatch, static_argnums=(1, 2))


def _integers(seed: int, *shape: int) -> jax.Array:
  values = np.random.default_rng(seed).integers(-4, 5, shape)
  return jnp.asarray(values, jnp.float32)


def _normals(seed: int, *shape: int) -> jax.Array:
  values = np.random.default_rng(seed).standard_normal(shape)
  return jnp.asarray(values, jnp.float32)


def _plan_by_hand(experts, num_experts, capacity, limits=None) -> moe.Dispatch:
  """The definition of a dispatch: one pass over choices, token by token."""
  limits = [capacity] * num_experts if limits is None else limits
  n, k = experts.shape
  seat_of_choice = np.full((n, k), num_experts * capacity)
  choice_of_seat = np.full(num_experts * capacity, n * k)
  load = np.zeros(num_experts, int)
  dropped = 0
  for choice, expert in enumerate(experts.reshape(-1)):
    if load[expert] < limits[expert]:
      seat = expert * capacity + load[expert]
      seat_of_choice.reshape(-1)[choice] = seat
      choice_of_seat[seat] = choice
    else:
      dropped += 1
    load[expert] += 1
  plan: Any = (seat_of_choice, choice_of_seat, load, dropped)
  return moe.Dispatch(*plan)


@st.composite
def _choices(draw):
  # Few shapes, each compiled once.
  n, k, num_experts, capacity = draw(
    st.sampled_from(
      [(1, 1, 1, 1), (7, 2, 4, 3), (8, 3, 3, 8), (5, 4, 6, 1), (9, 2, 5, 20)]
    )
  )
  expert = st.integers(0, num_experts - 1)
  flat = draw(st.lists(expert, min_size=n * k, max_size=n * k))
  experts = np.array(flat, np.int32).reshape(n, k)
  return experts, num_experts, capacity


@hypothesis.settings(deadline=None, max_examples=200)
@hypothesis.given(_choices())
def test_dispatch_equals_one_pass_over_choices(case):
  experts, num_experts, capacity = case
  plan = _plan(jnp.asarray(experts), num_experts, capacity)
  expected = _plan_by_hand(experts, num_experts, capacity)
  for name, ours, theirs in zip(plan._fields, plan, expected, strict=True):
    np.testing.assert_array_equal(ours, theirs, err_msg=name)


@hypothesis.settings(deadline=None, max_examples=100)
@hypothesis.given(_choices(), st.data())
def test_an_expert_uses_as_many_seats_as_it_may(case, data):
  experts, num_experts, capacity = case
  limits = np.array(
    data.draw(
      st.lists(
        st.integers(0, capacity), min_size=num_experts, max_size=num_experts
      )
    )
  )
  plan = _plan(jnp.asarray(experts), num_experts, capacity, jnp.asarray(limits))
  expected = _plan_by_hand(experts, num_experts, capacity, limits)
  for name, ours, theirs in zip(plan._fields, plan, expected, strict=True):
    np.testing.assert_array_equal(ours, theirs, err_msg=name)


@hypothesis.settings(deadline=None, max_examples=100)
@hypothesis.given(_choices())
def test_every_choice_is_in_exactly_one_seat_or_dropped(case):
  experts, num_experts, capacity = case
  plan = _plan(jnp.asarray(experts), num_experts, capacity)
  seats = np.asarray(plan.seat_of_choice).reshape(-1)
  choices = np.asarray(plan.choice_of_seat)
  in_seat = seats < num_experts * capacity
  taken = choices < experts.size
  # The two maps are inverse to each other on what is kept.
  kept, filled = np.flatnonzero(in_seat), np.flatnonzero(taken)
  np.testing.assert_array_equal(choices[seats[in_seat]], kept)
  np.testing.assert_array_equal(seats[choices[taken]], filled)
  # A seat belongs to the expert of its choice.
  np.testing.assert_array_equal(
    seats[in_seat] // capacity, experts.reshape(-1)[in_seat]
  )
  assert int(plan.dropped) == np.sum(~in_seat)
  assert int(np.sum(plan.load)) == experts.size


def test_earlier_tokens_have_priority():
  experts = jnp.array([[0, 1], [0, 1], [1, 0], [2, 0]], jnp.int32)
  plan = _plan(experts, 3, 2)
  dropped = 3 * 2
  np.testing.assert_array_equal(
    plan.seat_of_choice, [[0, 2], [1, 3], [dropped, dropped], [4, dropped]]
  )
  np.testing.assert_array_equal(plan.load, [4, 3, 1])
  assert int(plan.dropped) == 3


def test_a_dispatch_is_traced_without_a_warning_where_64_bits_are_enabled():
  """A warning of a worker's would stand among the lines of a refusal."""
  experts = np.array([[1, 0], [1, 2]], np.int32)
  with jax.enable_x64(True), warnings.catch_warnings():
    warnings.simplefilter('error')
    plan = jax.jit(lambda e: moe.plan_dispatch(e, 4, 1))(jnp.asarray(experts))
  expected = _plan_by_hand(experts, 4, 1)
  np.testing.assert_array_equal(plan.seat_of_choice, expected.seat_of_choice)


def _placement(plan: moe.Dispatch, num_seats: int) -> jax.Array:
  """One-hot f32[E * C, N, K]: which choice lies in which seat."""
  seats = jnp.arange(num_seats)[:, None, None]
  return (plan.seat_of_choice == seats).astype(jnp.float32)


@pytest.mark.parametrize('capacity', [1, 2, 9])
def test_seats_and_their_gradients_are_the_one_hot_definition(capacity):
  n, k, num_experts, d = 6, 3, 5, 4
  experts = np.random.default_rng(0).integers(0, 4, (n, k))  # none to expert 4
  experts = jnp.asarray(experts, jnp.int32)
  plan = _plan(experts, num_experts, capacity)
  num_seats = num_experts * capacity
  assert (int(plan.dropped) > 0) == (capacity < 9)
  placement = _placement(plan, num_seats)

  @functools.partial(jax.jit, static_argnums=0)
  def with_gradient(function, x, dy):
    y, vjp = jax.vjp(function, x)
    return y, *vjp(dy)

  x, dseats = _integers(1, n, d), _integers(2, num_seats, d)
  chex.assert_trees_all_equal(
    with_gradient(lambda x: moe.to_seats(x, plan), x, dseats),
    (
      jnp.einsum('snk,nd->sd', placement, x),
      jnp.einsum('snk,sd->nd', placement, dseats),
    ),
  )
  seats, dchoices = _integers(3, num_seats, d), _integers(4, n, k, d)
  chex.assert_trees_all_equal(
    with_gradient(lambda s: moe.from_seats(s, plan), seats, dchoices),
    (
      jnp.einsum('snk,sd->nkd', placement, seats),
      jnp.einsum('snk,nkd->sd', placement, dchoices),
    ),
  )


def test_gradient_of_copies_is_summed_in_fp32():
  # Summed in bf16, 256 + 1 + 1 would be 256.
  plan = _plan(jnp.array([[0, 1, 2]], jnp.int32), 3, 1)
  dseats = jnp.array([[256], [1], [1]], jnp.bfloat16)
  x = jnp.zeros((1, 1), jnp.bfloat16)
  (dx,) = jax.vjp(lambda x: moe.to_seats(x, plan), x)[1](dseats)
  assert float(dx[0, 0]) == 258


def _expert_weights(seed: int, config) -> dict[str, jax.Array]:
  e, d, f = config.num_experts, config.model_dim, config.expert_dim
  return {
    'w_gate': _normals(seed, e, d, f),
    'w_up': _normals(seed + 1, e, d, f),
    'w_down': _normals(seed + 2, e, f, d),
  }


def _skewed_routing(config, n: int) -> moe.Routing:
  """A routing in which expert 0 is the most popular by far."""
  bias = jnp.zeros(config.num_experts).at[0].set(0.5)
  w_router = _normals(7, config.model_dim, config.num_experts)
  return moe.route(config, _normals(8, n, config.model_dim), w_router, bias)


def _dense_sum(x, gates, weights, *, experts, kept):
  """Every expert on every token, then the gated sum over kept choices."""
  gate = jnp.einsum('nd,edf->enf', x, weights['w_gate'])
  up = jnp.einsum('nd,edf->enf', x, weights['w_up'])
  y = jnp.einsum('enf,efd->end', jax.nn.silu(gate) * up, weights['w_down'])
  chosen = jax.nn.one_hot(experts, y.shape[0]) * kept[..., None]  # [N, K, E]
  return jnp.einsum('nk,nke,end->nd', gates, chosen, y)


@pytest.mark.parametrize('capacity_factor', [0.0, 1.0, 0.4])
def test_experts_equal_the_dense_gated_sum_of_kept_choices(capacity_factor):
  config = dataclasses.replace(_CONFIG, capacity_factor=capacity_factor)
  n = 12
  x, weights = _normals(0, n, config.model_dim), _expert_weights(1, config)
  routing = _skewed_routing(config, n)
  plan = _plan_by_hand(
    np.asarray(routing.experts), config.num_experts, config.capacity(n)
  )
  assert (plan.dropped > 0) == (capacity_factor > 0)
  kept = plan.seat_of_choice < config.num_experts * config.capacity(n)

  def ours(x, gates, weights):
    out, dispatch = moe.experts_forward(
      config, x, routing._replace(gates=gates), weights, 1
    )
    return out, dispatch

  dense = functools.partial(
    _dense_sum, experts=routing.experts, kept=jnp.asarray(kept)
  )

  @jax.jit
  def both(x, gates, weights, dy):
    y, vjp, dispatch = jax.vjp(ours, x, gates, weights, has_aux=True)
    expected, dense_vjp = jax.vjp(dense, x, gates, weights)
    return (y, vjp(dy)), (expected, dense_vjp(dy)), dispatch

  result, expected, dispatch = both(
    x, routing.gates, weights, _normals(9, n, config.model_dim)
  )
  np.testing.assert_array_equal(dispatch.load, plan.load)
  assert int(dispatch.dropped) == plan.dropped
  # Sums of at most 12 products of order 10, in another order.
  chex.assert_trees_all_close(result, expected, rtol=1e-5, atol=1e-4)


def test_a_token_whose_choices_are_all_dropped_gets_nothing():
  config = dataclasses.replace(_CONFIG, capacity_factor=0.5)
  n = 8  # capacity 2
  routing = moe.Routing(
    experts=jnp.tile(jnp.array([[2, 3]], jnp.int32), (n, 1)),
    gates=jnp.full((n, 2), 0.5),
    probabilities=jnp.full((n, 4), 0.25),
    z_loss=jnp.float32(0),
  )
  x, weights = _normals(0, n, config.model_dim), _expert_weights(1, config)
  run = jax.jit(moe.experts_forward, static_argnums=(0, 4))
  out, dispatch = run(config, x, routing, weights, 1)
  assert int(dispatch.dropped) == 2 * (n - 2)
  assert np.all(out[:2] != 0)
  np.testing.assert_array_equal(out[2:], 0)


def test_experts_over_two_devices_equal_experts_on_one():
  devices, n = 2, 8
  x, weights = _normals(0, n, _CONFIG.model_dim), _expert_weights(1, _CONFIG)
  routing = _skewed_routing(_CONFIG, n)

  def local(expert_devices, x, experts, gates, weights):
    of_device = routing._replace(experts=experts, gates=gates)
    return moe.experts_forward(_CONFIG, x, of_device, weights, expert_devices)[
      0
    ]

  def with_gradients(function, x, gates, weights, dy):
    y, vjp = jax.vjp(
      lambda x, g, w: function(x, routing.experts, g, w), x, gates, weights
    )
    return y, vjp(dy)

  sharded = jax.shard_map(
    functools.partial(local, devices),
    mesh=mesh.make_mesh(jax.devices()[:devices]),
    in_specs=PartitionSpec('expert'),
    out_specs=PartitionSpec('expert'),
    check_vma=False,
  )
  args = (x, routing.gates, weights, _normals(9, n, _CONFIG.model_dim))
  chex.assert_trees_all_close(
    jax.jit(functools.partial(with_gradients, sharded))(*args),
    jax.jit(functools.partial(with_gradients, functools.partial(local, 1)))(
      *args
    ),
    rtol=1e-5,
    atol=1e-4,
  )


@pytest.mark.parametrize(
  ('factor', 'tokens', 'capacity'),
  [(0.0, 10, 10), (1.0, 10, 5), (1.5, 10, 8), (0.01, 10, 1), (9.0, 10, 10)],
)
def test_capacity_is_a_multiple_of_the_even_share(factor, tokens, capacity):
  config = dataclasses.replace(_CONFIG, capacity_factor=factor)
  assert config.capacity(tokens) == capacity


# ---- routing ----------------------------------------------------------------

_jitted_route = jax.jit(moe.route, static_argnums=0)


def _route(config, bias=None, seed=0):
  x = _normals(seed, 16, config.model_dim)
  w_router = _normals(seed + 1, config.model_dim, config.num_experts)
  return x, w_router, _jitted_route(config, x, w_router, bias)


def test_router_chooses_the_most_probable_experts():
  x, w_router, routing = _route(_CONFIG)
  logits = np.asarray(x, np.float64) @ np.asarray(w_router, np.float64)
  exponentials = np.exp(logits)
  probabilities = exponentials / exponentials.sum(-1, keepdims=True)
  np.testing.assert_allclose(routing.probabilities, probabilities, rtol=1e-4)
  np.testing.assert_array_equal(
    routing.experts, np.argsort(-probabilities, axis=-1)[:, :2]
  )
  np.testing.assert_allclose(
    routing.z_loss, np.mean(np.log(exponentials.sum(-1)) ** 2), rtol=1e-5
  )


@pytest.mark.parametrize('biased', [False, True])
def test_gates_are_the_unbiased_probabilities_of_the_choice(biased):
  bias = jnp.array([0.0, 0.0, 0.9, 0.0]) if biased else None
  config = dataclasses.replace(_CONFIG, normalize_gates=False)
  _, _, routing = _route(config, bias)
  np.testing.assert_array_equal(
    routing.gates,
    np.take_along_axis(
      np.asarray(routing.probabilities), np.asarray(routing.experts), axis=-1
    ),
  )
  _, _, normalized = _route(_CONFIG, bias)
  np.testing.assert_array_equal(normalized.experts, routing.experts)
  np.testing.assert_allclose(np.sum(normalized.gates, -1), 1, rtol=1e-6)
  np.testing.assert_allclose(
    normalized.gates,
    routing.gates / np.sum(routing.gates, -1, keepdims=True),
    rtol=1e-6,
  )


def test_bias_changes_the_choice_and_nothing_else():
  _, _, plain = _route(_CONFIG)
  _, _, biased = _route(_CONFIG, jnp.array([0.0, 0.0, 2.0, 0.0]))
  assert not np.all(np.any(plain.experts == 2, axis=-1))
  assert np.all(np.any(biased.experts == 2, axis=-1))
  chex.assert_trees_all_equal(
    (plain.probabilities, plain.z_loss), (biased.probabilities, biased.z_loss)
  )


def test_gradient_of_gates_is_that_of_picking_them():
  x, w_router, routing = _route(_CONFIG)
  dy = _normals(5, *routing.gates.shape)

  def ours(x, w_router):
    return jnp.sum(dy * moe.route(_CONFIG, x, w_router, None).gates)

  def plain(x, w_router):
    probabilities = jax.nn.softmax(x @ w_router, axis=-1)
    gates = jnp.take_along_axis(probabilities, routing.experts, axis=-1)
    return jnp.sum(dy * gates / jnp.sum(gates, -1, keepdims=True))

  chex.assert_trees_all_close(
    jax.jit(jax.grad(ours, (0, 1)))(x, w_router),
    jax.jit(jax.grad(plain, (0, 1)))(x, w_router),
    rtol=1e-4,
    atol=1e-5,
  )


def test_router_computes_in_fp32_on_bf16_tokens():
  x, w_router, _ = _route(_CONFIG)
  low = x.astype(jnp.bfloat16)
  routing = _jitted_route(_CONFIG, low, w_router, None)
  assert routing.probabilities.dtype == routing.gates.dtype == jnp.float32
  chex.assert_trees_all_equal(
    routing, _jitted_route(_CONFIG, low.astype(jnp.float32), w_router, None)
  )


# ---- balancing --------------------------------------------------------------


def _routing_with(probabilities: jax.Array) -> moe.Routing:
  return moe.Routing(
    experts=jnp.zeros((probabilities.shape[0], 2), jnp.int32),
    gates=jnp.zeros((probabilities.shape[0], 2)),
    probabilities=probabilities,
    z_loss=jnp.float32(0),
  )


def test_balance_loss_is_one_when_balanced():
  routing = _routing_with(jnp.full((8, 4), 0.25))
  assert float(moe.balance_loss(routing, jnp.array([4, 4, 4, 4]), 16)) == 1


def test_balance_loss_is_its_definition():
  probabilities = jax.nn.softmax(_normals(0, 8, 4), axis=-1)
  load = jnp.array([9, 1, 4, 2])
  mean = np.asarray(probabilities, np.float64).mean(axis=0)
  expected = 4 * np.dot(np.asarray(load) / 16, mean)
  loss = moe.balance_loss(_routing_with(probabilities), load, 16)
  np.testing.assert_allclose(loss, expected, rtol=1e-6)


def test_balance_loss_pushes_probability_away_from_load():
  load = jnp.array([9, 1, 4, 2])
  gradient = jax.grad(lambda p: moe.balance_loss(_routing_with(p), load, 16))(
    jnp.full((8, 4), 0.25)
  )
  np.testing.assert_allclose(
    gradient, np.tile(4 * np.asarray(load) / 16 / 8, (8, 1)), rtol=1e-6
  )


def test_balance_loss_of_devices_averages_to_that_of_the_microbatch():
  probabilities = jax.nn.softmax(_normals(0, 8, 4), axis=-1)
  load = jnp.array([9, 1, 4, 2])
  whole = moe.balance_loss(_routing_with(probabilities), load, 16)
  halves = [
    moe.balance_loss(_routing_with(p), load, 16)
    for p in (probabilities[:4], probabilities[4:])
  ]
  np.testing.assert_allclose(np.mean(halves), whole, rtol=1e-6)


# ---- no floating-point scatter ----------------------------------------------


def _scattered_types(function, *args) -> list[str]:
  """Element types of every scatter in a function's StableHLO, such as 'i32'."""
  found = []

  def visit(operation):
    if 'scatter' in operation.name:
      for result in operation.results:
        found.append(str(ir.RankedTensorType(result.type).element_type))
    return ir.WalkResult.ADVANCE

  module: Any = jax.jit(function).lower(*args).compiler_ir('stablehlo')
  module.operation.walk(visit)
  return found


def _all_integer(types: list[str]) -> bool:
  return all(re.fullmatch(r'[us]?i\d+', t) for t in types)


def test_a_scatter_add_of_floats_would_be_seen():
  # The gradient of a gather, hidden in a nested function.
  @jax.jit
  def gather(table):
    return jnp.sum(table[jnp.array([1, 1, 2])] ** 2)

  planted = _scattered_types(jax.grad(gather), jnp.ones(4))
  assert planted
  assert not _all_integer(planted)
  integers = _scattered_types(
    lambda x: x.at[jnp.array([1, 1])].add(1), jnp.ones(4, jnp.int32)
  )
  assert integers
  assert _all_integer(integers)


# First, middle and last stage (first and last layer, embedding, head): each has
# a MoE layer.
_STAGES = (
  (0, 2, True, False),
  (2, 3, False, False),
  (3, 4, False, True),
)


def _stage_scattered_types(config, stage: int) -> list[str]:
  """Of forward and backward of one stage, as the stage's programs do them."""
  first, last, has_embedding, has_head = _STAGES[stage]
  spec = transformer.StageSpec(
    first_layer=first,
    last_layer=last,
    has_embedding=has_embedding,
    has_head=has_head,
  )
  model = stages.build_stage(config, spec, seed=0)
  params = {
    n: jax.ShapeDtypeStruct(s.shape, model.compute_dtypes[n])
    for n, s in model.shapes.items()
  }
  tokens = jax.ShapeDtypeStruct((2, config.sequence_length), jnp.int32)
  hidden = jax.ShapeDtypeStruct((2, *model.hidden_shape), model.hidden_dtype)
  number: Any = jax.ShapeDtypeStruct((), jnp.uint32)

  def step(params, x, labels, position):
    def forward(params, x):
      out = model.forward(params, model_lib.Inputs(x, labels), position)
      y = () if out.y is None else out.y
      return (y, out.objective), out.counts

    if has_embedding:  # tokens have no gradient
      out, vjp, counts = jax.vjp(lambda p: forward(p, x), params, has_aux=True)
    else:
      out, vjp, counts = jax.vjp(forward, params, x, has_aux=True)
    return out, counts, vjp(out)

  return _scattered_types(
    step,
    params,
    tokens if has_embedding else hidden,
    tokens if has_head else None,
    model_lib.Position(number, number),
  )


@pytest.mark.parametrize(
  'overrides',
  [
    dict(capacity_factor=1.5, remat=True, compute_dtype='bfloat16'),
    dict(balance='bias', dropout_rate=0.1, normalize_gates=False),
  ],
  ids=str,
)
@pytest.mark.parametrize('stage', [0, 1, 2])
def test_no_floating_point_scatter_forward_or_backward(stage, overrides):
  config = dataclasses.replace(_CONFIG, num_layers=4, **overrides)
  types = _stage_scattered_types(config, stage)
  assert types, 'the dispatch scatters integers; the check saw none'
  assert _all_integer(types)


def test_a_plain_lookup_in_the_model_would_be_seen(monkeypatch):
  monkeypatch.setattr(layers, 'embed', lambda table, tokens: table[tokens])
  types = _stage_scattered_types(_CONFIG, 0)
  assert types.count('f32') == 1
