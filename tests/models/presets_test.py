from typing import Any

import jax
import pytest
from jax import numpy as jnp

from models import config as model_config, presets, stages
from moetion_jax import errors
from moetion_jax.state import model as model_lib
from tests.support import helpers

_PAPER = [name for name in presets.PRESETS if name.startswith('paper_')]

# Published counts in billions: in all, and those that one token meets.
# arXiv 2401.15947 (table 1), the paper (7.3B), the model card of
# Qwen1.5-MoE-A2.7B, arXiv 2401.06066 (table 1).
_PUBLISHED = {
  'paper_moe_llava': (2.9, 2.0),
  'paper_gpt_moe': (7.3, None),
  'paper_qwen_moe': (14.3, 2.7),
  'paper_deepseek_moe': (16.4, 2.8),
}


def test_every_paper_preset_has_a_published_count():
  assert sorted(_PUBLISHED) == sorted(_PAPER)


@pytest.mark.parametrize('name', _PAPER)
def test_parameter_counts_are_the_published_ones_within_a_percent(name):
  published, _ = _PUBLISHED[name]
  count = helpers.num_parameters(presets.get(name)) / 1e9
  assert count == pytest.approx(published, rel=0.01)


@pytest.mark.parametrize('name', ['paper_qwen_moe', 'paper_deepseek_moe'])
def test_active_parameter_counts_round_to_the_published_ones(name):
  _, published = _PUBLISHED[name]
  count = helpers.num_parameters(presets.get(name), active=True) / 1e9
  assert round(count, 1) == published


def test_active_parameters_leave_out_the_experts_not_chosen():
  config = model_config.ModelConfig(num_layers=3, first_dense_layers=1)
  not_chosen = 2 * (8 - 2) * 3 * 128 * 128  # layers, experts, SwiGLU
  assert (
    helpers.num_parameters(config) - helpers.num_parameters(config, active=True)
    == not_chosen
  )


@pytest.mark.parametrize('name', presets.PRESETS)
def test_presets_have_their_shapes_without_being_allocated(name):
  config = presets.get(name)
  before = jax.live_arrays()
  (spec,) = stages.cut(config, 1)
  model = stages.build_stage(config, spec, seed=0)
  for shape in model.shapes.values():
    assert type(shape) is jax.ShapeDtypeStruct
  params = {
    n: jax.ShapeDtypeStruct(s.shape, model.compute_dtypes[n])
    for n, s in model.shapes.items()
  }
  b, t, v = 2, config.sequence_length, config.vocab_size
  tokens: Any = jax.ShapeDtypeStruct((b, t), jnp.int32)
  number: Any = jax.ShapeDtypeStruct((), jnp.uint32)
  position = model_lib.Position(number, number)
  trained = jax.eval_shape(
    model.forward, params, model_lib.Inputs(tokens, tokens), position
  )
  evaluated = jax.eval_shape(
    lambda p, x: model.forward(p, model_lib.Inputs(x, None), None),
    params,
    tokens,
  )
  known = {id(array) for array in before}
  assert not [a for a in jax.live_arrays() if id(a) not in known]
  float32 = jnp.dtype('float32')
  assert (evaluated.y.shape, evaluated.y.dtype) == ((b, t, v), float32)
  assert trained.y is None
  assert (trained.objective.shape, trained.objective.dtype) == ((), float32)
  moe_layers = sum(map(config.is_moe, range(config.num_layers)))
  assert {n: (c.shape, c.dtype) for n, c in trained.counts.items()} == {
    'loss': ((), float32),
    'auxiliary_loss': ((), float32),
    'load': ((moe_layers, config.num_experts), jnp.dtype('int32')),
    'dropped': ((moe_layers,), jnp.dtype('int32')),
  }


@pytest.mark.parametrize('name', presets.PRESETS)
@pytest.mark.parametrize('num_stages', [2, 4])
def test_stages_of_a_preset_have_all_of_its_parameters(name, num_stages):
  config = presets.get(name)
  sizes = []
  for spec in stages.cut(config, num_stages):
    stage = stages.build_stage(config, spec, seed=0)
    sizes.append(sum(s.size for s in stage.shapes.values()))
  assert sum(sizes) == helpers.num_parameters(config)


@pytest.mark.parametrize('name', ['', 'huge', 'Tiny'])
def test_an_unknown_preset_is_refused_with_the_known_ones(name):
  with pytest.raises(errors.ConfigError, match='tiny, small') as info:
    presets.get(name)
  assert (info.value.flag, info.value.value) == ('preset', name)


# Each row: a setting, a value out of range, values at the edge of it.
_RANGES = [
  ('vocab_size', 0, [1]),
  ('sequence_length', 0, [1]),
  ('num_layers', 0, [1]),
  ('num_layers', -1, []),
  ('model_dim', 0, [1]),
  ('num_heads', 0, [2, 6]),
  ('num_kv_heads', 0, [1, 4]),
  ('num_kv_heads', 3, []),  # does not divide 4 heads
  ('num_kv_heads', 8, []),
  ('head_dim', 0, [2]),
  ('head_dim', 5, []),
  ('num_experts', 0, [2]),  # two a token
  ('experts_per_token', 0, [1, 8]),
  ('experts_per_token', 9, []),  # of 8
  ('expert_dim', 0, [1]),
  ('shared_dim', -1, [0]),
  ('dense_dim', 0, [1]),
  ('first_dense_layers', -1, [0, 4]),
  ('moe_every', 0, [1]),
  ('capacity_factor', -0.1, [0.0]),
  ('capacity_factor', float('nan'), []),
  ('balance', 'none', ['loss', 'bias']),
  ('balance_rate', -0.1, [0.0]),
  ('z_loss_weight', -0.1, [0.0]),
  ('dropout_rate', -0.1, [0.0, 0.99]),
  ('dropout_rate', 1.0, []),
  ('dropout_rate', float('nan'), []),
  ('rope_base', 0.0, [1.0]),
  ('rope_base', -1.0, []),
  ('compute_dtype', 'float16', ['bfloat16', 'float32']),
]


@pytest.mark.parametrize(('name', 'bad', 'good'), _RANGES)
def test_a_setting_out_of_range_is_refused_by_name(name, bad, good):
  for value in good:
    assert getattr(model_config.ModelConfig(**{name: value}), name) == value
  with pytest.raises(errors.ConfigError) as info:
    model_config.ModelConfig(**{name: bad})
  assert info.value.flag == name
  assert info.value.value is bad
  message = str(info.value)
  assert message.startswith(f'--{name}={bad}: ')
  assert '\n' not in message
