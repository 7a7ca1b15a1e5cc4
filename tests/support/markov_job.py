"""A job of one's own: a small Mixture of Experts in plain JAX, data, optimizer.

Each stage is a layer of experts; the text is a Markov chain. `markov_train.py`
trains it, with the agent of the library, and needs no more than this.
"""

import hashlib
from typing import NamedTuple

import jax
import numpy as np
import optax
from jax import numpy as jnp

from moetion_jax import Group, Job, Outputs, StageModel
from tests.support.markov_train import DIM, LENGTH

TOKENS, EXPERTS, HIDDEN = 16, 4, 12


class Batch(NamedTuple):
  inputs: np.ndarray  # i32[B, T]
  labels: np.ndarray


class Chain:
  """Random access to the text: what is read depends on where alone."""

  def __init__(self, train):
    self._train = train

  def batch(self, iteration, microbatch):
    return self._draw(iteration, microbatch)

  def held_out_batch(self, index):
    return self._draw(0, index)  # no iteration has number 0

  def fingerprint(self):
    sample = self.held_out_batch(0)  # a `name` alone is not compared
    digest = hashlib.sha256(b''.join(x.tobytes() for x in sample)).hexdigest()
    return {'name': 'markov', 'sha256': digest}

  def _draw(self, *where):
    random = np.random.default_rng([self._train.seed, *where])
    tokens = random.integers(TOKENS, size=(self._train.microbatch_size, 1))
    steps = random.integers(1, 3, size=(len(tokens), LENGTH))
    text = np.cumsum(np.hstack([tokens, steps]), axis=1, dtype=np.int32)
    return Batch(text[:, :-1] % TOKENS, text[:, 1:] % TOKENS)


class MarkovJob(Job):
  """One layer of experts a stage; each token goes to one of them."""

  def stage_model(self, index):
    stages = self.spec.train.stages
    layer, is_first, is_last = f'layer{index}', not index, index == stages - 1
    shapes = {
      f'{layer}/router': (DIM, EXPERTS),
      f'{layer}/experts/up': (EXPERTS, DIM, HIDDEN),
      f'{layer}/experts/down': (EXPERTS, HIDDEN, DIM),
    }
    if is_first:
      shapes['embedding'] = (TOKENS, DIM)
    if is_last:
      shapes['head'] = (DIM, TOKENS)

    def initialize():
      key = jax.random.key(self.spec.train.seed + index)
      keys = jax.random.split(key, len(shapes))
      return {
        name: jax.random.normal(k, shape) / 4
        for k, (name, shape) in zip(keys, sorted(shapes.items()), strict=True)
      }

    def forward(weights, inputs, position):
      del position  # no dropout
      x = weights['embedding'][inputs.x] if is_first else inputs.x
      scores = jax.nn.softmax(x @ weights[f'{layer}/router'])
      chosen = jax.nn.one_hot(jnp.argmax(scores, axis=-1), EXPERTS)
      h = jnp.einsum('btd,edf->btef', x, weights[f'{layer}/experts/up'])
      h = jax.nn.relu(h) * (scores * chosen)[..., None]
      x += jnp.einsum('btef,efd->btd', h, weights[f'{layer}/experts/down'])
      counts = {
        'auxiliary_loss': jnp.float32(0),
        'load': jnp.sum(chosen, axis=(0, 1)).astype(jnp.int32)[None],
        'dropped': jnp.zeros(1, jnp.int32),
      }
      if not is_last:
        return Outputs(x, jnp.float32(0), counts)
      loss = optax.softmax_cross_entropy_with_integer_labels(
        x @ weights['head'], inputs.labels
      ).mean()
      return Outputs(None, loss, {**counts, 'loss': loss})

    return StageModel(
      shapes={n: jax.ShapeDtypeStruct(s, 'float32') for n, s in shapes.items()},
      compute_dtypes=dict.fromkeys(shapes, 'float32'),
      partition=lambda name: Group(
        name.rpartition('/')[0] or name, stacked='/experts/' in name
      ),
      initialize=initialize,
      forward=forward,
      buffers=frozenset(),
      buffer_steps=lambda counts: {},
      has_embedding=is_first,
      has_head=is_last,
      hidden_shape=(LENGTH, DIM),
      hidden_dtype='float32',
    )

  def optimizer(self):
    return optax.adam(3e-2)

  def data(self):
    return Chain(self.spec.train)
