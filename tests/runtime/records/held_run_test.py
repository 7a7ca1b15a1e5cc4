"""Which settings go on with a run: with more iterations, and a schedule."""

import dataclasses

import pytest

from moetion_jax import codec, config as config_lib, errors
from moetion_jax.runtime.records import held_run


def _train(iterations, decay=None, earlier=(), **fields):
  return config_lib.TrainConfig(
    iterations=iterations,
    optimizer=config_lib.OptimizerConfig(
      decay_iterations=decay or iterations, earlier=earlier
    ),
    **fields,
  )


def _goes_on(had, wanted, extend):
  """The settings with which the run goes on, as `launch.train` has them."""
  known = {'train': codec.encode(had), 'run_id': 'x', 'workdir': 'y'}
  train = held_run.settings_of(known, wanted, extend)
  had_iterations = held_run.check(
    known, {'train': codec.encode(train)}, 'W', extend
  )
  assert had_iterations == had.iterations
  return train


@pytest.mark.parametrize(
  ('had', 'wanted', 'extend', 'expected'),
  [
    # The same command again; the flag says nothing then.
    (_train(40), _train(40), '', _train(40)),
    (_train(40), _train(40), 'pin', _train(40)),
    (_train(40), _train(40), 'stretch', _train(40)),
    # Longer, and the same command again.
    (_train(40), _train(60), 'pin', _train(60, 40)),
    (_train(60, 40), _train(60), 'pin', _train(60, 40)),
    (_train(40), _train(60), 'stretch', _train(60, 60, ((40, 40),))),
    (
      _train(60, 60, ((40, 40),)),
      _train(60),
      'stretch',
      _train(60, 60, ((40, 40),)),
    ),
    (_train(60, 60, ((40, 40),)), _train(60), '', _train(60, 60, ((40, 40),))),
    # Longer a second time, with the same or the other schedule.
    (_train(60, 40), _train(80), 'pin', _train(80, 40)),
    (_train(60, 40), _train(80), 'stretch', _train(80, 80, ((60, 40),))),
    (
      _train(60, 60, ((40, 40),)),
      _train(80),
      'stretch',
      _train(80, 80, ((40, 40), (60, 60))),
    ),
    (
      _train(60, 60, ((40, 40),)),
      _train(80),
      'pin',
      _train(80, 60, ((40, 40),)),
    ),
    # The user says how long the schedule is: nothing to switch.
    (_train(40, 20), _train(60, 20), 'pin', _train(60, 20)),
    (_train(40, 20), _train(60, 20), 'stretch', _train(60, 20)),
    (_train(40, 20), _train(60, 50), 'stretch', _train(60, 50, ((40, 20),))),
  ],
)
def test_a_run_is_trained_longer(had, wanted, extend, expected):
  assert _goes_on(had, wanted, extend) == expected


@pytest.mark.parametrize(
  ('had', 'wanted', 'extend', 'words'),
  [
    (_train(40), _train(60), '', ['--extend=pin', '--extend=stretch', '40']),
    (_train(40), _train(60), '', ['an optimizer of its own']),
    (_train(40, 20), _train(60, 20), '', ['--extend=pin', '--extend=stretch']),
    (_train(60), _train(40), 'pin', ['other settings (train.iterations']),
    (_train(40), _train(60, 50), 'pin', ['decay_iterations']),
    (_train(60, 40), _train(60), 'stretch', ['decay_iterations']),
    (_train(60, 40), _train(60), '', ['decay_iterations']),
    (_train(40), _train(60, seed=7), 'pin', ['other settings (train.seed)']),
    (_train(40), _train(60, seed=7), 'stretch', ['settings (train.seed)']),
    (
      _train(40),
      _train(60, initial_iteration=40),
      'pin',
      ['(train.initial_iteration)'],
    ),
  ],
)
def test_another_run_is_refused(had, wanted, extend, words):
  with pytest.raises(errors.ConfigError) as caught:
    _goes_on(had, wanted, extend)
  assert all(word in str(caught.value) for word in words), caught.value


def test_settings_that_are_new_are_those_of_an_earlier_version():
  known = {'train': codec.encode(_train(40))}
  del known['train']['initial_iteration']
  del known['train']['optimizer']['earlier']
  assert held_run.check(known, {'train': codec.encode(_train(40))}, 'W', '')
  other = codec.encode(dataclasses.replace(_train(40), initial_iteration=7))
  with pytest.raises(errors.ConfigError, match='initial_iteration'):
    held_run.check(known, {'train': other}, 'W', '')


def test_settings_of_a_later_version_are_refused():
  known = {'train': codec.encode(_train(40)) | {'of_the_future': 1}}
  with pytest.raises(errors.ConfigError, match='of_the_future'):
    held_run.check(known, {'train': codec.encode(_train(40))}, 'W', '')
