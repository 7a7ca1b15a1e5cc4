import dataclasses
import functools
import math
from typing import Any

import chex
import jax
import numpy as np
import optax
import pytest
from jax import numpy as jnp

from moetion_jax import config, errors
from moetion_jax.state import optimizers

# LLVM's optimizations are most of the time that these small programs take.
_jit = functools.partial(
  jax.jit, compiler_options={'xla_backend_optimization_level': 0}
)


def _config(optimizer: str = 'adamw', **overrides) -> config.OptimizerConfig:
  return config.OptimizerConfig(optimizer=optimizer, **overrides)


def _plain_descent(settings: config.OptimizerConfig) -> Any:
  """sgd without momentum or decay: its update is minus the rate."""
  return optimizers.make(
    dataclasses.replace(settings, optimizer='sgd', b1=0.0, weight_decay=0.0)
  )


def _applied_rates(
  settings: config.OptimizerConfig, iterations: int
) -> np.ndarray:
  """Rates of updates 1, 2, ..., as they move a parameter of gradient 1."""
  transform = _plain_descent(settings)
  params = {'w': jnp.zeros(())}

  def step(state, _):
    updates, state = transform.update({'w': jnp.ones(())}, state, params)
    return state, -updates['w']

  _, rates = _jit(lambda state: jax.lax.scan(step, state, length=iterations))(
    transform.init(params)
  )
  return np.asarray(rates)


def _cosine(share: float, final: float = 0.1) -> float:
  return final + (1 - final) * (1 + math.cos(math.pi * share)) / 2


# Peak 1, warm-up of 4 iterations, cosine from 4 to 40, final fraction 0.1.
_RATES = {
  1: 1 / 4,
  2: 2 / 4,
  3: 3 / 4,
  4: 1.0,
  5: _cosine(1 / 36),
  13: 0.1 + 0.9 * (1 + math.sqrt(0.5)) / 2,  # a quarter of the way
  22: 0.55,  # half of it
  31: 0.1 + 0.9 * (1 - math.sqrt(0.5)) / 2,
  39: _cosine(35 / 36),
  40: 0.1,
  41: 0.1,
  60: 0.1,
}


def test_rates_of_iterations_by_hand():
  settings = _config(
    learning_rate=1.0, warmup_iterations=4, decay_iterations=40
  )
  rates = _applied_rates(settings, 60)
  for iteration, rate in _RATES.items():
    np.testing.assert_allclose(
      rates[iteration - 1], rate, rtol=1e-5, err_msg=str(iteration)
    )


def test_the_schedule_is_of_iterations_from_one():
  settings = _config(
    learning_rate=1.0, warmup_iterations=4, decay_iterations=40
  )
  schedule: Any = optimizers.schedule(settings)
  of_iterations = [float(schedule(i)) for i in range(1, 61)]
  np.testing.assert_allclose(
    of_iterations, _applied_rates(settings, 60), rtol=1e-5
  )


def test_a_longer_run_keeps_its_earlier_rates_bit_for_bit():
  """Up to the old end those of the old schedule, then those of the new one."""
  shape = {'learning_rate': 0.003, 'warmup_iterations': 7}
  rates = {
    length: _applied_rates(_config(decay_iterations=length, **shape), 90)
    for length in (40, 60, 80)
  }
  found = _applied_rates(
    _config(decay_iterations=80, earlier=((40, 40), (60, 60)), **shape), 90
  )
  expected = [*rates[40][:40], *rates[60][40:60], *rates[80][60:]]
  np.testing.assert_array_equal(found, expected)
  assert found[40] > found[39]  # it decays less since then


@pytest.mark.parametrize('name', config.OPTIMIZERS)
def test_update_one_moves(name):
  params = {'w': jnp.ones((4, 4)), 'norm': jnp.ones(4)}
  transform = optimizers.make(_config(name, weight_decay=0.0))
  gradients = jax.tree.map(jnp.ones_like, params)
  updates, _ = _jit(transform.update)(gradients, transform.init(params), params)
  for name, update in updates.items():
    assert np.all(update < 0), name


@pytest.mark.parametrize(
  ('warmup', 'iterations', 'reached_at'),
  [
    (20, 10, 1),  # longer than the run: a tenth of it
    (100, 50, 5),
    (50, 49, 4),
    (20, 200, 20),
    (0, 200, 1),
    (1, 200, 1),
    (20, 1, 1),
    (20, 2, 1),
  ],
)
def test_the_peak_is_reached_after_the_warm_up(warmup, iterations, reached_at):
  settings = _config(
    learning_rate=1.0, warmup_iterations=warmup, decay_iterations=iterations
  )
  rates = _applied_rates(settings, 200)
  if warmup:
    assert int(np.argmax(rates)) + 1 == reached_at
    assert rates[reached_at - 1] == pytest.approx(1.0)
    np.testing.assert_allclose(
      rates[:reached_at],
      np.arange(1, reached_at + 1) / reached_at,
      rtol=1e-5,
    )
  else:  # the cosine starts at 'iteration 0'
    assert rates[0] == pytest.approx(_cosine(1 / iterations), rel=1e-5)
  assert np.all(np.diff(rates[reached_at - 1 :]) <= 1e-7)
  np.testing.assert_allclose(rates[iterations:], 0.1, rtol=1e-5)


@pytest.mark.parametrize(
  ('warmup', 'iterations'), [(30, 100), (50, 200), (99, 100)]
)
def test_a_warm_up_shorter_than_the_run_is_kept(warmup, iterations):
  settings = _config(
    learning_rate=1.0, warmup_iterations=warmup, decay_iterations=iterations
  )
  rates = _applied_rates(settings, iterations)
  np.testing.assert_allclose(
    rates[:warmup], np.arange(1, warmup + 1) / warmup, rtol=1e-5
  )


# ---- weight decay ------------------------------------------------------------

# A matrix, a table (muon leaves it to Adam) and a vector.
_SHAPES = {'layer/w': (6, 5), 'embedding/table': (7, 3), 'layer/norm': (4,)}


def _random(seed: int) -> dict[str, jax.Array]:
  rng = np.random.default_rng(seed)
  return {
    n: jnp.asarray(rng.standard_normal(s), jnp.float32)
    for n, s in _SHAPES.items()
  }


def _two_updates(name: str, weight_decay: float):
  """(masters, updates) of iterations 1 and 2, with constant rate 0.1."""
  transform = optimizers.make(
    _config(
      name,
      weight_decay=weight_decay,
      learning_rate=0.1,
      warmup_iterations=0,
      final_fraction=1.0,
    )
  )
  update = _jit(transform.update)
  params, state, done = _random(0), transform.init(_random(0)), []
  for seed in (1, 2):
    updates, state = update(_random(seed), state, params)
    done.append((params, updates))
    params = optax.apply_updates(params, updates)
  return done, state


@pytest.mark.parametrize('name', config.OPTIMIZERS)
def test_vectors_are_not_decayed(name):
  with_decay, _ = _two_updates(name, 0.5)
  without, _ = _two_updates(name, 0.0)
  for (_, ours), (_, plain) in zip(with_decay, without, strict=True):
    np.testing.assert_array_equal(ours['layer/norm'], plain['layer/norm'])


@pytest.mark.parametrize('name', config.OPTIMIZERS)
def test_matrices_are_decayed_by_the_rate_apart_from_the_gradient(name):
  with_decay, _ = _two_updates(name, 0.5)
  without, _ = _two_updates(name, 0.0)
  (params, ours), (_, plain) = with_decay[0], without[0]
  for matrix in ('layer/w', 'embedding/table'):
    np.testing.assert_allclose(
      ours[matrix], plain[matrix] - 0.1 * 0.5 * params[matrix], atol=1e-6
    )


@pytest.mark.parametrize('name', config.OPTIMIZERS)
def test_decay_is_no_part_of_the_moments(name):
  _, with_decay = _two_updates(name, 0.5)
  _, without = _two_updates(name, 0.0)
  chex.assert_trees_all_equal(
    jax.tree.leaves(with_decay), jax.tree.leaves(without)
  )


# ---- the definitions ---------------------------------------------------------


def _by_hand(name: str, settings: config.OptimizerConfig):
  """The transform from optax's pieces; update n has the rate of iteration n."""
  base_rate = optimizers.schedule(settings)
  decay = optax.add_decayed_weights(
    settings.weight_decay,
    {'layer/w': True, 'embedding/table': True, 'layer/norm': False},
  )
  rate = optax.scale_by_learning_rate(lambda count: base_rate(count + 1))
  match name:
    case 'adamw':
      return optax.chain(
        optax.scale_by_adam(b1=settings.b1, b2=settings.b2), decay, rate
      )
    case 'lion':
      return optax.chain(
        optax.scale_by_lion(b1=settings.b1, b2=settings.b2), decay, rate
      )
    case 'sgd':
      return optax.chain(
        optax.trace(decay=settings.b1, nesterov=True), decay, rate
      )
  raise AssertionError(name)


def _run(transform, updates: int) -> Any:
  update = _jit(transform.update)
  params, state = _random(0), transform.init(_random(0))
  for seed in range(1, updates + 1):
    changes, state = update(_random(seed), state, params)
    params = optax.apply_updates(params, changes)
  return params


@pytest.mark.parametrize('weight_decay', [0.0, 0.3])
@pytest.mark.parametrize('name', ['adamw', 'lion', 'sgd'])
def test_optimizers_are_their_pieces_bitwise(name, weight_decay):
  settings = _config(
    name,
    weight_decay=weight_decay,
    warmup_iterations=2,
    decay_iterations=20,
  )
  ours = _run(optimizers.make(settings), 4)
  by_hand = _run(_by_hand(name, settings), 4)
  chex.assert_trees_all_equal(ours, by_hand)


def test_adamw_is_its_definition():
  settings = _config('adamw', learning_rate=0.1, decay_iterations=20)
  params = _run(optimizers.make(settings), 3)
  schedule: Any = optimizers.schedule(settings)
  rates = [float(schedule(i)) for i in (1, 2, 3)]
  for name, master in _random(0).items():
    w = np.asarray(master, np.float64)
    m = v = np.zeros_like(w)
    for i, rate in enumerate(rates, 1):
      g = np.asarray(_random(i)[name], np.float64)
      m = 0.9 * m + 0.1 * g
      v = 0.99 * v + 0.01 * g**2
      step = (m / (1 - 0.9**i)) / (np.sqrt(v / (1 - 0.99**i)) + 1e-8)
      w = w - rate * (step + 0.1 * w * (w.ndim >= 2))
    np.testing.assert_allclose(params[name], w, rtol=1e-4, atol=1e-5)


def test_muon_orthogonalizes_matrices_and_leaves_tables_to_adam():
  transform = optimizers.make(
    _config(
      'muon',
      weight_decay=0.0,
      learning_rate=0.1,
      warmup_iterations=0,
      final_fraction=1.0,
    )
  )
  updates, _ = _jit(transform.update)(
    _random(1), transform.init(_random(0)), _random(0)
  )
  singular = np.linalg.svd(np.asarray(updates['layer/w']), compute_uv=False)
  # Rate 0.1, and 0.2 sqrt(fan) to have Adam's step size.
  singular /= 0.1 * 0.2 * math.sqrt(6)
  assert np.all((singular > 0.6) & (singular < 1.3))
  # Adam's first step is the gradient's sign, scaled alike everywhere.
  adam: Any = optax.adam(0.1, b1=0.9, b2=0.99, nesterov=True)
  expected, _ = adam.update(_random(1), adam.init(_random(0)))
  for name in ('embedding/table', 'layer/norm'):
    np.testing.assert_allclose(updates[name], expected[name], rtol=1e-5)
    step = np.abs(updates[name])
    np.testing.assert_allclose(step, step.max(), rtol=1e-3)


def test_an_unknown_optimizer_is_refused_with_the_known_ones():
  with pytest.raises(errors.ConfigError, match='adamw, lion') as info:
    _config('adam')
  assert (info.value.flag, info.value.value) == ('optimizer', 'adam')


@pytest.mark.parametrize(
  ('name', 'bad', 'good'),
  [
    ('learning_rate', 0.0, 1e-9),
    ('learning_rate', float('nan'), 1.0),
    ('warmup_iterations', -1, 0),
    ('decay_iterations', -1, 1),
    ('final_fraction', -0.1, 0.0),
    ('final_fraction', 1.1, 1.0),
    ('weight_decay', -0.1, 0.0),
    ('b1', 1.0, 0.0),
    ('b1', -0.1, 0.999),
    ('b2', 1.0, 0.0),
    ('clip_norm', -1.0, 0.0),
  ],
)
def test_a_setting_out_of_range_is_refused_by_name(name, bad, good):
  assert getattr(_config(**{name: good}), name) == good
  with pytest.raises(errors.ConfigError) as info:
    _config(**{name: bad})
  assert info.value.flag == name
