"""Optimizers by name, each an optax transform of one operator's parameters.

Clipping is no part of them: the factor is global, so `training/scalars.py`
computes it from all stages' partial norms and `update` multiplies gradients by
it.
"""

from __future__ import annotations

import jax
import optax
from jax import numpy as jnp

from moetion_jax import config as config_lib


def schedule(config: config_lib.OptimizerConfig) -> optax.Schedule:
  """Makes the schedule: linear warm-up to the peak, then cosine decay.

  It decays to a fraction of the peak. A run no longer than its warm-up warms up
  for a tenth of its iterations, at least one. Updates up to the last one of an
  earlier schedule have that one.
  """
  found = _of_length(config, config.decay_iterations)
  for last, decay_iterations in reversed(config.earlier):
    found = _switched(last, _of_length(config, decay_iterations), found)
  return found


def _switched(
  last: int, before: optax.Schedule, after: optax.Schedule
) -> optax.Schedule:
  def switched(count):
    return jnp.where(count <= last, before(count), after(count))

  return switched


def _of_length(
  config: config_lib.OptimizerConfig, decay_iterations: int
) -> optax.Schedule:
  total = max(2, decay_iterations)
  warmup = config.warmup_iterations
  if warmup >= total:
    warmup = max(1, total // 10)
  return optax.warmup_cosine_decay_schedule(
    init_value=0.0,
    peak_value=config.learning_rate,
    # optax counts from 0: `make` shifts by one so that update 1 moves already.
    warmup_steps=warmup,
    decay_steps=total,
    end_value=config.learning_rate * config.final_fraction,
  )


def make(config: config_lib.OptimizerConfig) -> optax.GradientTransformation:
  """Makes the transform that `config` names.

  It works on {parameter name: array} of one operator. Weight decay applies to
  matrices only; under muon so does the orthogonalized update, and the
  embedding and head, whose rows are tokens, are left to Adam.
  """
  base_rate = schedule(config)

  def rate(count):
    return base_rate(count + 1)

  def decay_mask(params):
    return jax.tree.map(lambda p: p.ndim >= 2, params)

  match config.optimizer:
    case 'adamw':
      return optax.adamw(
        rate,
        b1=config.b1,
        b2=config.b2,
        weight_decay=config.weight_decay,
        mask=decay_mask,
      )
    case 'lion':
      return optax.lion(
        rate,
        b1=config.b1,
        b2=config.b2,
        weight_decay=config.weight_decay,
        mask=decay_mask,
      )
    case 'sgd':
      return optax.chain(
        optax.trace(decay=config.b1, nesterov=True),
        optax.add_decayed_weights(config.weight_decay, decay_mask),
        optax.scale_by_learning_rate(rate),
      )
    case 'adafactor':
      return optax.chain(
        optax.adafactor(
          None, min_dim_size_to_factor=32, clipping_threshold=1.0
        ),
        optax.add_decayed_weights(-config.weight_decay, decay_mask),
        optax.scale_by_learning_rate(rate, flip_sign=False),
      )
    case 'muon':
      return optax.chain(
        optax.contrib.muon(
          1.0,
          adam_b1=config.b1,
          adam_b2=config.b2,
          consistent_rms=0.2,  # the step size that suits Adam suits muon
          muon_weight_dimension_numbers=_muon_dimensions,
        ),
        optax.add_decayed_weights(-config.weight_decay, decay_mask),
        optax.scale_by_learning_rate(rate, flip_sign=False),
      )
  raise AssertionError(config.optimizer)


def _muon_dimensions(params):
  def dimensions(path, leaf):
    name = path[-1].key
    if leaf.ndim == 2 and not name.endswith('/table'):
      return optax.contrib.MuonDimensionNumbers()
    return None

  return jax.tree_util.tree_map_with_path(dimensions, params)
