import dataclasses
import json

import pytest

from launch.lm import settings as run_settings
from moetion_jax import codec, config as config_lib, errors

# What a workdir has in config.json, and a checkpoint in its metadata.
_OLD = (
  '{"preset": "tiny", "model": {"vocab_size": 256, "sequence_length": 16, '
  '"num_layers": 4, "model_dim": 32, "num_heads": 2, "num_kv_heads": 1, '
  '"head_dim": 16, "num_experts": 4, "experts_per_token": 2, "expert_dim": 32, '
  '"shared_dim": 32, "dense_dim": 64, "first_dense_layers": 1, "moe_every": 1, '
  '"normalize_gates": true, "capacity_factor": 1.5, "balance": "loss", '
  '"balance_rate": 0.01, "z_loss_weight": 0.001, "dropout_rate": 0, '
  '"rope_base": 10000.0, "compute_dtype": "bfloat16", "remat": false}, '
  '"train": {"seed": 0, "iterations": 4, "stages": 1, "replicas": 1, '
  '"local_devices": 1, "microbatches": 4, "microbatch_size": 8, '
  '"eval_every": 2, "eval_microbatches": 2, "shard_optimizer": false, '
  '"skip_nonfinite": false, "optimizer": {"optimizer": "adamw", '
  '"learning_rate": 0.003, "warmup_iterations": 2, "decay_iterations": 8, '
  '"final_fraction": 0.1, "weight_decay": 0.1, "b1": 0.9, "b2": 0.95, '
  '"clip_norm": 1.0}}, "data": "/data/LICENSE", "data_dtype": "uint16", '
  '"init_from": "", "init_weights_only": false}'
)


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
  value = codec.encode(config)
  assert value == json.loads(json.dumps(dataclasses.asdict(config)))
  again = codec.decode(run_settings.RunConfig, json.loads(json.dumps(value)))
  assert again == config


def test_json_of_an_earlier_version():
  config = codec.decode(run_settings.RunConfig, json.loads(_OLD))
  new = config_lib.differences(json.loads(_OLD), codec.encode(config))
  assert new == ['train.initial_iteration', 'train.optimizer.earlier']
  assert config.model.shared_dim == 32 and config.train.optimizer.b2 == 0.95


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
  a = codec.encode(_make())
  b = codec.encode(_make(train={'seed': 3}, model=['num_layers=5']))
  assert config_lib.differences(a, a) == []
  assert config_lib.differences(a, b) == ['model.num_layers', 'train.seed']


def test_configurations_are_frozen():
  config = _make()
  for value in (config, config.model, config.train, config.train.optimizer):
    field = dataclasses.fields(value)[0].name
    with pytest.raises(dataclasses.FrozenInstanceError):
      setattr(value, field, None)
