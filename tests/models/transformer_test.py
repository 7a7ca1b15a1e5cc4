import dataclasses
import functools
import itertools

import chex
import jax
import numpy as np
import pytest
from jax import numpy as jnp
from jax.sharding import PartitionSpec

from models import layers as layers_lib, stages as stages_lib
from moetion_jax import errors
from moetion_jax.programs import mesh
from moetion_jax.state import model as model_lib
from tests.support import helpers

_CONFIG = helpers.FP32_MODEL
_TWO_LAYERS = dataclasses.replace(_CONFIG, num_layers=2)
_ONE_LAYER = dataclasses.replace(_CONFIG, num_layers=1, first_dense_layers=0)
_DROPOUT = dataclasses.replace(_ONE_LAYER, dropout_rate=0.2)

# LLVM's optimizations are most of the time that these small programs take.
_jit = functools.partial(
  jax.jit, compiler_options={'xla_backend_optimization_level': 0}
)


def _built(config, num_stages: int, seed: int = 0):
  return [
    stages_lib.build_stage(config, spec, seed=seed)
    for spec in stages_lib.cut(config, num_stages)
  ]


@functools.cache
def _stages(config, num_stages: int, seed: int = 0):
  """The stages of a model, each with its compiled forward."""
  models = _built(config, num_stages, seed)
  return [(model, _jit(model.forward)) for model in models]


@functools.cache
def _params(config):
  """Weights of the whole model, drawn without compiling anything."""
  (model,) = _built(config, 1)
  rng = np.random.default_rng(0)
  params = {}
  for name, leaf in model.shapes.items():
    noise = rng.standard_normal(leaf.shape, np.float32)
    if len(leaf.shape) == 1:  # norms and biases
      params[name] = 1 + 0.1 * noise
    else:
      params[name] = noise * leaf.shape[-2] ** -0.5
  return params


def _tokens(config, seed: int = 0, batch: int = 2):
  rng = np.random.default_rng(seed)
  shape = (batch, config.sequence_length + 1)
  window = rng.integers(0, config.vocab_size, shape).astype(np.int32)
  return jnp.asarray(window[:, :-1]), jnp.asarray(window[:, 1:])


def _position(iteration: int, microbatch: int) -> model_lib.Position:
  return model_lib.Position(jnp.uint32(iteration), jnp.uint32(microbatch))


def _compose(stages, params, tokens, labels, position):
  """Outputs of every stage, one's y being the next one's x."""
  outputs, x = [], tokens
  for model, forward in stages:
    own = {n: params[n] for n in model.shapes}
    inputs = model_lib.Inputs(x, labels if model.has_head else None)
    outputs.append(forward(own, inputs, position))
    x = outputs[-1].y
  return outputs


def _loss(config, position, seed: int = 0) -> float:
  stages = _stages(config, 1, seed)
  (out,) = _compose(stages, _params(config), *_tokens(config), position)
  return float(out.counts['loss'])


# ---- what the model computes -------------------------------------------------


def test_a_later_token_changes_no_earlier_logit():
  (model,), params = _built(_TWO_LAYERS, 1), _params(_TWO_LAYERS)
  tokens, _ = _tokens(_TWO_LAYERS)
  forward = jax.jit(model.forward)  # optimized, as in training

  def logits(tokens):
    inputs = model_lib.Inputs(tokens, None)
    return np.asarray(forward(params, inputs, None).y)

  before = logits(tokens)
  assert before.shape == (2, 6, 13)
  assert before.dtype == np.float32
  for t in range(6):
    after = logits(tokens.at[0, t].set((tokens[0, t] + 1) % 13))
    np.testing.assert_array_equal(after[0, :t], before[0, :t])
    assert np.all(np.any(after[0, t:] != before[0, t:], axis=-1))
    # Dropless, another sequence is another matter; its seats may move.
    np.testing.assert_allclose(after[1], before[1], rtol=1e-5, atol=1e-5)


def test_loss_is_the_mean_cross_entropy_and_the_objective_adds_the_rest():
  stages, params = _stages(_TWO_LAYERS, 1), _params(_TWO_LAYERS)
  tokens, labels = _tokens(_TWO_LAYERS)
  (out,) = _compose(stages, params, tokens, labels, None)
  (evaluated,) = _compose(stages, params, tokens, None, None)
  logits = np.asarray(evaluated.y, np.float64)
  ids = np.asarray(labels)[..., None]
  picked = np.take_along_axis(logits, ids, axis=-1)[..., 0]
  expected = np.mean(np.log(np.sum(np.exp(logits), axis=-1)) - picked)
  assert out.y is None
  np.testing.assert_allclose(out.counts['loss'], expected, rtol=1e-5)
  assert float(out.counts['auxiliary_loss']) > 0
  np.testing.assert_allclose(
    out.objective, out.counts['loss'] + out.counts['auxiliary_loss'], rtol=1e-6
  )
  np.testing.assert_array_equal(np.sum(out.counts['load'], axis=1), [2 * 6 * 2])
  np.testing.assert_array_equal(out.counts['dropped'], 0)


@pytest.mark.parametrize('num_stages', [2, 4])
def test_stages_in_a_row_are_the_whole_model(num_stages):
  # With dropout: its keys must not depend on the cut either.
  config = dataclasses.replace(
    _CONFIG, dropout_rate=0.2, first_dense_layers=0, moe_every=2
  )
  position, params = _position(3, 1), _params(config)
  tokens, labels = _tokens(config)
  (whole,) = _compose(_stages(config, 1), params, tokens, labels, position)
  outputs = _compose(
    _stages(config, num_stages), params, tokens, labels, position
  )
  # Not bitwise: XLA fuses, and so rounds, another program in another way.
  np.testing.assert_allclose(
    outputs[-1].counts['loss'], whole.counts['loss'], rtol=1e-6
  )
  np.testing.assert_allclose(
    sum(float(o.objective) for o in outputs), whole.objective, rtol=1e-6
  )
  np.testing.assert_array_equal(
    np.concatenate([o.counts['load'] for o in outputs]), whole.counts['load']
  )


def test_more_than_ten_layers_apply_in_order():
  # As strings '10' sorts before '2'.
  config = dataclasses.replace(_CONFIG, num_layers=12, first_dense_layers=12)
  params, (tokens, labels) = _params(config), _tokens(config)
  (whole,) = _compose(_stages(config, 1), params, tokens, labels, None)

  # One program applies every layer between the first and the last.
  first, middle, *_, last = _stages(config, 12)
  x, out = tokens, None
  for layer in range(12):
    model, forward = {0: first, 11: last}.get(layer, middle)
    own = {n: params[n.replace('/1/', f'/{layer}/')] for n in model.shapes}
    inputs = model_lib.Inputs(x, labels if model.has_head else None)
    out = forward(own, inputs, None)
    x = out.y
  assert out is not None
  np.testing.assert_allclose(
    whole.counts['loss'], out.counts['loss'], rtol=1e-5
  )


def test_two_expert_devices_compute_what_one_does():
  # With dropout: rows keep their masks on whichever device they lie. Auxiliary
  # losses of devices average to that of the microbatch.
  params, (tokens, labels) = _params(_DROPOUT), _tokens(_DROPOUT, batch=4)
  (whole,) = _compose(
    _stages(_DROPOUT, 1), params, tokens, labels, _position(1, 0)
  )
  (spec,) = stages_lib.cut(_DROPOUT, 1)
  model = stages_lib.build_stage(_DROPOUT, spec, seed=0, expert_devices=2)
  own, same = PartitionSpec('expert'), PartitionSpec()
  specs = {n: own if model.partition(n).stacked else same for n in params}

  @functools.partial(
    jax.shard_map,
    mesh=mesh.make_mesh(jax.devices()[:2]),
    in_specs=(specs, own, same),
    out_specs=same,
    check_vma=False,
  )
  def on_two(params, inputs, position):
    out = model.forward(params, inputs, position)
    return (
      jax.lax.pmean(out.objective, 'expert'),
      jax.lax.pmean(out.counts['loss'], 'expert'),
      jax.lax.psum(out.counts['load'], 'expert'),
    )

  inputs = model_lib.Inputs(tokens, labels)
  objective, loss, load = _jit(on_two)(params, inputs, _position(1, 0))
  np.testing.assert_allclose(loss, whole.counts['loss'], rtol=1e-6)
  np.testing.assert_allclose(objective, whole.objective, rtol=1e-6)
  np.testing.assert_array_equal(load, whole.counts['load'])


# ---- dropout -----------------------------------------------------------------


def test_dropout_is_keyed_by_seed_iteration_and_microbatch():
  losses = {
    position: _loss(_DROPOUT, _position(*position))
    for position in itertools.product((1, 2), (0, 1, 2))
  }
  assert len(set(losses.values())) == len(losses)
  for position, loss in losses.items():
    assert _loss(_DROPOUT, _position(*position)) == loss
  assert _loss(_DROPOUT, _position(1, 0), seed=1) != losses[1, 0]


def test_every_dropout_has_a_key_of_its_own_however_the_model_is_cut(
  monkeypatch,
):
  config = dataclasses.replace(_CONFIG, dropout_rate=0.2)
  keys = []

  def remember(x, rate, key, rows):
    assert rate == 0.2
    np.testing.assert_array_equal(rows.shape, x.shape[:1])
    keys.append(jax.random.key_data(key))
    return x

  monkeypatch.setattr(layers_lib, 'dropout', remember)

  def keys_of(model):
    shape = (2, 6) if model.has_embedding else (2, *model.hidden_shape)
    dtype = jnp.int32 if model.has_embedding else model.hidden_dtype
    inputs = model_lib.Inputs(jnp.zeros(shape, dtype), None)
    own = {n: _params(config)[n] for n in model.shapes}

    def run(position):
      keys.clear()
      model.forward(own, inputs, position)
      return jnp.stack(keys)

    return np.asarray(_jit(run)(_position(2, 5)))

  (whole,) = map(keys_of, _built(config, 1))
  assert len({tuple(key) for key in whole}) == len(whole) == 2 * 4
  cut = np.concatenate([keys_of(model) for model in _built(config, 2)])
  np.testing.assert_array_equal(cut, whole)


def test_dropout_is_off_in_evaluation():
  without = _loss(_ONE_LAYER, _position(1, 0))
  assert _loss(_DROPOUT, _position(1, 0)) != without
  np.testing.assert_allclose(_loss(_DROPOUT, None), without, rtol=1e-6)


# ---- recomputation -----------------------------------------------------------


def _objective_and_gradients(config):
  (model,) = _built(config, 1)
  tokens, labels = _tokens(config)
  inputs = model_lib.Inputs(tokens, labels)

  def objective(params):
    return model.forward(params, inputs, _position(1, 0)).objective

  return _jit(jax.value_and_grad(objective))(_params(config))


def test_recomputation_changes_neither_loss_nor_gradients():
  remat = dataclasses.replace(_DROPOUT, remat=True)
  # Not bitwise: XLA may fuse, and so round, the recomputed part otherwise.
  chex.assert_trees_all_close(
    _objective_and_gradients(remat),
    _objective_and_gradients(_DROPOUT),
    rtol=1e-5,
    atol=1e-6,
  )


def test_recomputation_keeps_weights_and_block_inputs_only():
  def residual_bytes(config):
    (model,) = _built(config, 1)
    hidden = jax.ShapeDtypeStruct((2, *model.hidden_shape), jnp.int32)
    tokens = jax.ShapeDtypeStruct(hidden.shape[:2], jnp.int32)

    def residuals(params, x, labels):
      inputs = model_lib.Inputs(x, labels)
      forward = lambda p: model.forward(p, inputs, None).objective  # noqa: E731
      return jax.tree.leaves(jax.vjp(forward, params)[1])

    leaves = jax.eval_shape(residuals, dict(model.shapes), tokens, tokens)
    return sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)

  remat = dataclasses.replace(_CONFIG, remat=True)
  assert residual_bytes(remat) < 0.7 * residual_bytes(_CONFIG)


# ---- balancing by bias -------------------------------------------------------

_BIAS = dataclasses.replace(
  _ONE_LAYER, balance='bias', balance_rate=0.5, z_loss_weight=0.0
)


def test_router_biases_are_buffers_without_gradient():
  (model,) = _built(_BIAS, 1)
  assert model.buffers == {'layers/0/router_bias'}
  _, gradients = _objective_and_gradients(_BIAS)
  for name, gradient in gradients.items():
    assert np.any(gradient != 0) == (name not in model.buffers), name


def test_balancing_by_bias_adds_no_loss():
  (out,) = _compose(_stages(_BIAS, 1), _params(_BIAS), *_tokens(_BIAS), None)
  assert float(out.counts['auxiliary_loss']) == 0
  assert float(out.objective) == float(out.counts['loss'])


def test_bias_falls_for_the_busy_and_rises_for_the_idle():
  (model,) = _built(_BIAS, 1)
  steps = model.buffer_steps({'load': jnp.array([[5, 1, 3, 3]])})
  assert steps.keys() == model.buffers
  np.testing.assert_array_equal(
    steps['layers/0/router_bias'], [-0.5, 0.5, 0, 0]
  )


def test_auxiliary_balancing_has_no_buffers():
  (model,) = _built(_CONFIG, 1)
  assert not model.buffers
  assert model.buffer_steps({'load': jnp.zeros((3, 4), jnp.int32)}) == {}


@pytest.mark.thorough
@pytest.mark.parametrize('num_layers', [3, 12])
def test_every_layer_balances_by_its_own_load(num_layers):
  config = dataclasses.replace(
    _BIAS,
    num_layers=num_layers,
    first_dense_layers=1,
    experts_per_token=1,
    num_experts=5,
  )
  favourite = lambda layer: layer * 3 % 5  # noqa: E731
  params = dict(_params(config))
  for layer in range(1, num_layers):
    bias = 100 * jax.nn.one_hot(favourite(layer), 5)
    params[f'layers/{layer}/router_bias'] = bias
  (out,) = _compose(_stages(config, 1), params, *_tokens(config), None)
  steps = _built(config, 1)[0].buffer_steps(out.counts)
  assert len(steps) == num_layers - 1
  for name, step in steps.items():
    layer = int(name.split('/')[1])
    expected = np.full(5, 0.5)
    expected[favourite(layer)] = -0.5
    np.testing.assert_array_equal(step, expected, err_msg=name)


# ---- where the model is cut --------------------------------------------------

_COSTLY_HEAD = dataclasses.replace(_CONFIG, num_layers=6, vocab_size=5000)
_COSTLY_START = dataclasses.replace(
  _CONFIG, num_layers=6, dense_dim=900, first_dense_layers=2
)
_UNEVEN = dataclasses.replace(
  _CONFIG, num_layers=6, moe_every=2, expert_dim=64, capacity_factor=1.5
)


@pytest.mark.parametrize('config', [_COSTLY_HEAD, _COSTLY_START, _UNEVEN])
@pytest.mark.parametrize('num_stages', range(1, 7))
def test_no_other_cut_has_a_cheaper_costliest_stage(config, num_stages):
  layers = config.num_layers
  costs = [stages_lib.layer_cost(config, i) for i in range(layers)]
  costs[-1] += config.model_dim * config.vocab_size

  def costliest(ends):
    edges = (0, *ends, layers)
    return max(sum(costs[a:b]) for a, b in itertools.pairwise(edges))

  specs = stages_lib.cut(config, num_stages)
  ours = costliest([s.last_layer for s in specs[:-1]])
  cuts = itertools.combinations(range(1, layers), num_stages - 1)
  assert ours == min(map(costliest, cuts))


@pytest.mark.parametrize('num_layers', [1, 2, 5, 24])
def test_a_cut_covers_every_layer_once(num_layers):
  config = dataclasses.replace(_CONFIG, num_layers=num_layers)
  for num_stages in range(1, num_layers + 1):
    specs = stages_lib.cut(config, num_stages)
    assert len(specs) == num_stages
    covered = [
      layer for s in specs for layer in range(s.first_layer, s.last_layer)
    ]
    assert covered == list(range(num_layers))
    assert all(s.first_layer < s.last_layer for s in specs)
    assert [s.has_embedding for s in specs] == [True] + [False] * (
      num_stages - 1
    )
    assert [s.has_head for s in specs] == [False] * (num_stages - 1) + [True]


@pytest.mark.parametrize('num_stages', [-1, 0, 5])
def test_more_stages_than_layers_or_none_are_refused(num_stages):
  with pytest.raises(errors.ConfigError) as info:
    stages_lib.cut(_CONFIG, num_stages)
  assert (info.value.flag, info.value.value) == ('stages', num_stages)


def test_layer_cost_counts_multiplications_per_token():
  c = dataclasses.replace(_CONFIG, capacity_factor=1.5)
  heads, kv_heads = 2 * 4, 1 * 4
  projections = 8 * (heads + kv_heads + kv_heads) + heads * 8
  scores = 2 * heads * 6 / 2  # causal: half of the positions, twice
  assert stages_lib.layer_cost(c, 0) == projections + scores + 3 * 8 * 8
  router, shared, seats = 8 * 4, 3 * 8 * 4, 1.5 * 2 * 3 * 8 * 6
  assert stages_lib.layer_cost(c, 1) == (
    projections + scores + router + shared + seats
  )
  dropless = 4 * 3 * 8 * 6
  assert stages_lib.layer_cost(_CONFIG, 1) == (
    projections + scores + router + shared + dropless
  )


# ---- names and initial bits --------------------------------------------------


# Few shapes, for initial bits are drawn by one program a shape.
_SQUARE = dataclasses.replace(
  _CONFIG,
  vocab_size=32,
  model_dim=32,
  num_kv_heads=2,
  head_dim=16,
  num_experts=8,
  expert_dim=32,
  shared_dim=32,
  dense_dim=32,
)


@pytest.mark.parametrize('num_stages', [2, 4])
def test_names_and_initial_bits_do_not_depend_on_the_cut(num_stages):
  (whole,) = _built(_SQUARE, 1)
  stages = _built(_SQUARE, num_stages)
  names = [n for stage in stages for n in stage.shapes]
  assert sorted(names) == sorted(whole.shapes)
  masters = {}
  for stage in stages:
    masters |= stage.initialize()
  chex.assert_trees_all_equal(masters, whole.initialize())
  for stage in stages:
    for name, shape in stage.shapes.items():
      assert shape == whole.shapes[name]
      assert stage.partition(name) == whole.partition(name)
      assert stage.compute_dtypes[name] == whole.compute_dtypes[name]


def test_initial_masters_are_of_their_shapes_and_scales():
  (model,) = _built(_SQUARE, 1)
  masters = model.initialize()
  chex.assert_trees_all_equal_shapes_and_dtypes(masters, dict(model.shapes))
  np.testing.assert_array_equal(masters['layers/1/norm'], 1)
  for name, stddev in {
    'embedding/table': 1.0,
    'head/table': 32**-0.5,
    'layers/1/attention/w_query': 32**-0.5,
    'layers/1/attention/w_out': 32**-0.5 * 8**-0.5,
    'layers/1/experts/w_gate': 32**-0.5,
    'layers/1/experts/w_down': 32**-0.5 * 8**-0.5,
  }.items():
    # At least 1024 draws: three standard deviations are below 7 %.
    np.testing.assert_allclose(np.std(masters[name]), stddev, rtol=0.07)


def test_initial_bits_depend_on_seed_and_name():
  masters = _built(_SQUARE, 1)[0].initialize()
  other_seed = _built(_SQUARE, 1, seed=1)[0].initialize()
  drawn = [n for n in masters if not n.endswith('norm')]
  assert len(drawn) == 4 * 4 + 3 + 3 * 7 + 2  # attention, dense, MoE, tables
  for name in drawn:
    assert np.mean(masters[name] == other_seed[name]) < 0.01, name
  by_bits = {np.asarray(masters[n]).tobytes() for n in drawn}
  assert len(by_bits) == len(drawn)


def test_operators_are_experts_rest_of_layers_embedding_and_head():
  (model,) = _built(dataclasses.replace(_CONFIG, balance='bias'), 1)
  groups = {n: model.partition(n) for n in model.shapes}
  assert groups['embedding/table'] == ('embedding', False)
  assert groups['head/table'] == groups['head/norm'] == ('head', False)
  for name, group in groups.items():
    if name.startswith('layers/'):
      layer = '/'.join(name.split('/')[:2])
      if '/experts/' in name:
        assert group == (f'{layer}/experts', True)
        assert model.shapes[name].shape[0] == 4
      else:
        assert group == (layer, False)
  for part in ('w_router', 'router_bias', 'shared/w_gate', 'attention/w_out'):
    assert groups[f'layers/2/{part}'] == ('layers/2', False)


def test_routers_are_read_in_fp32_and_all_else_in_compute_dtype():
  config = dataclasses.replace(
    _CONFIG, balance='bias', compute_dtype='bfloat16'
  )
  (model,) = _built(config, 1)
  for name, dtype in model.compute_dtypes.items():
    router = name.endswith(('/w_router', '/router_bias'))
    assert dtype == (jnp.float32 if router else jnp.bfloat16), name
  assert model.hidden_dtype == jnp.bfloat16
  assert model.hidden_shape == (6, 8)


@pytest.mark.parametrize(
  ('first_dense_layers', 'moe_every', 'moe_layers'),
  [
    (0, 1, {0, 1, 2, 3, 4, 5}),
    (1, 1, {1, 2, 3, 4, 5}),
    (0, 2, {1, 3, 5}),
    (1, 2, {2, 4}),
    (2, 3, {4}),
    (6, 1, set()),
  ],
)
def test_moe_layers_stand_where_the_config_says(
  first_dense_layers, moe_every, moe_layers
):
  config = dataclasses.replace(
    _CONFIG,
    num_layers=6,
    first_dense_layers=first_dense_layers,
    moe_every=moe_every,
  )
  (model,) = _built(config, 1)
  for layer in range(6):
    is_moe = layer in moe_layers
    assert config.is_moe(layer) == is_moe
    assert (f'layers/{layer}/experts/w_gate' in model.shapes) == is_moe
    assert (f'layers/{layer}/w_router' in model.shapes) == is_moe
    assert (f'layers/{layer}/dense/w_gate' in model.shapes) != is_moe


@pytest.mark.parametrize('devices', [3, 8])
def test_experts_that_do_not_divide_among_devices_are_refused(devices):
  (spec,) = stages_lib.cut(_CONFIG, 1)
  with pytest.raises(errors.ConfigError) as info:
    stages_lib.build_stage(_CONFIG, spec, seed=0, expert_devices=devices)
  assert (info.value.flag, info.value.value) == ('local_devices', devices)
