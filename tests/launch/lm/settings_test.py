import dataclasses
import json

import pytest

from launch.lm import settings as run_settings
from moetion_jax import config as config_lib, errors


def _make(preset='tiny', model=(), train=None, optimizer=None):
  return run_settings.make(
    preset,
    model_overrides=list(model),
    train_overrides=train or {},
    optimizer_overrides=optimizer or {},
  )


@pytest.mark.parametrize(
  'preset', ['tiny', 'small', 'paper_qwen_moe', 'paper_deepseek_moe']
)
def test_json_round_trip(preset):
  config = _make(preset, train={'microbatches': 2})
  again = run_settings.RunConfig.from_json(
    json.loads(json.dumps(config.to_json()))
  )
  assert again == config


@pytest.mark.parametrize(
  ('arguments', 'flag', 'value'),
  [
    ({'preset': 'huge'}, 'preset', 'huge'),
    ({'model': ['num_layers']}, 'model', 'num_layers'),
    ({'model': ['layers=3']}, 'model', 'layers=3'),
    ({'model': ['num_layers=x']}, 'model', 'num_layers=x'),
    ({'model': ['remat=1']}, 'model', 'remat=1'),
    ({'model': ['num_layers=0']}, 'model', 'num_layers=0'),
    ({'model': ['balance=luck']}, 'model', 'balance=luck'),
    ({'optimizer': {'optimizer': 'adam2'}}, 'optimizer', 'adam2'),
    ({'optimizer': {'learning_rate': 0.0}}, 'learning_rate', 0.0),
    ({'optimizer': {'learning_rate': float('nan')}}, 'learning_rate', None),
    ({'optimizer': {'b2': 1.0}}, 'b2', 1.0),
    ({'optimizer': {'clip_norm': -1.0}}, 'clip_norm', -1.0),
    ({'optimizer': {'final_fraction': 2.0}}, 'final_fraction', 2.0),
    ({'train': {'iterations': 0}}, 'iterations', 0),
    ({'train': {'seed': -1}}, 'seed', -1),
    ({'train': {'stages': 0}}, 'stages', 0),
    ({'train': {'eval_every': -1}}, 'eval_every', -1),
    (
      {'train': {'microbatch_size': 6, 'local_devices': 4}},
      'microbatch_size',
      6,
    ),
  ],
)
def test_wrong_settings_name_flag_and_value(arguments, flag, value):
  with pytest.raises(errors.ConfigError) as caught:
    _make(**arguments)
  assert caught.value.flag == flag
  if value is not None:
    assert caught.value.value == value
    assert f'--{flag}={value}: ' in str(caught.value)


def test_overrides_reach_the_configuration():
  config = _make(
    model=['capacity_factor=0', 'remat=true', 'balance=bias'],
    train={'iterations': 7, 'seed': None},
    optimizer={'optimizer': 'lion', 'b1': 0.8},
  )
  assert config.model.capacity_factor == 0.0 and config.model.remat
  assert config.train.iterations == 7 and config.train.seed == 0
  assert config.train.optimizer.decay_iterations == 7
  assert config.train.optimizer.b1 == 0.8
  default = _make().train.optimizer.learning_rate
  assert config.train.optimizer.learning_rate == pytest.approx(default / 10)


def test_differences_are_dotted_names():
  a = _make().to_json()
  b = _make(train={'seed': 3}, model=['num_layers=5']).to_json()
  assert config_lib.differences(a, a) == []
  assert config_lib.differences(a, b) == ['model.num_layers', 'train.seed']


def test_configurations_are_frozen():
  config = _make()
  for value in (config, config.model, config.train, config.train.optimizer):
    field = dataclasses.fields(value)[0].name
    with pytest.raises(dataclasses.FrozenInstanceError):
      setattr(value, field, None)
