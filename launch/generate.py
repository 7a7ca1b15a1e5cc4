"""Samples text: `python -m launch.generate --checkpoint W/checkpoint`.

Bytes in, bytes out: for models trained on byte-level text. Every token is one
forward pass over the last `sequence_length` bytes, at one fixed shape.
"""

from __future__ import annotations

import dataclasses
import os
import sys
from typing import Any

if not __package__:  # run as a file
  sys.path[0] = os.path.abspath(f'{sys.path[0]}/..')

from absl import flags

from launch.lm import command_line
from moetion_jax import errors

_CHECKPOINT = flags.DEFINE_string(
  'checkpoint',
  None,
  'A final checkpoint: WORKDIR/checkpoint.',
  required=True,
)
_PROMPT = flags.DEFINE_string('prompt', 'def ', 'Text to go on from.')
_TOKENS = flags.DEFINE_integer('tokens', 200, 'Bytes to sample.')
_TEMPERATURE = flags.DEFINE_float(
  'temperature', 0.8, 'Below 1 prefers likely bytes; 0 takes the likeliest.'
)
_SEED = flags.DEFINE_integer('seed', 0, 'Of the sampling.')


def main(argv: list[str]) -> int:
  """Prints the prompt and what the model adds."""
  del argv
  if _TOKENS.value < 1:
    raise errors.ConfigError('tokens', _TOKENS.value, 'must be at least 1')
  if _TEMPERATURE.value < 0:
    raise errors.ConfigError(
      'temperature', _TEMPERATURE.value, 'must not be negative'
    )
  if not _PROMPT.value:
    raise errors.ConfigError('prompt', '', 'must not be empty')
  from moetion_jax.runtime import xla_setup

  xla_setup.configure(local_devices=1, compilation_cache_dir='')
  import jax
  import numpy as np
  from jax import numpy as jnp

  from launch.lm import checkpoint
  from models import stages
  from moetion_jax.runtime.checkpoints import file as checkpoint_file
  from moetion_jax.state import model as model_lib

  path = _CHECKPOINT.value
  config = checkpoint.load_config(path, 'checkpoint')
  if config.model.vocab_size < 256 or config.data.endswith('.bin'):
    raise errors.ConfigError(
      'checkpoint', path, 'was not trained on bytes: its tokens are no text'
    )
  # Dropless: a byte's future must not depend on who else wants its expert.
  shape = dataclasses.replace(config.model, capacity_factor=0.0)
  (spec,) = stages.cut(shape, 1)
  model = stages.build_stage(shape, spec, seed=0)
  tree = checkpoint_file.load(path, 'checkpoint')
  checkpoint.check_all_stages(tree, path, 'checkpoint')
  missing = model.shapes.keys() - tree['parameters'].keys()
  if missing:
    raise errors.ConfigError('checkpoint', path, f'has no {min(missing)}')
  weights = {
    n: jnp.asarray(tree['parameters'][n], model.compute_dtypes[n])
    for n in model.shapes
  }
  length = shape.sequence_length

  @jax.jit
  def next_byte(weights, window, last, key):
    # Bytes after `last` are padding; attention is causal, they reach nothing.
    inputs = model_lib.Inputs(window[None], None)
    out: Any = model.forward(weights, inputs, None).y  # f32[1, T, V]
    logits = out[0, last, :256]
    if _TEMPERATURE.value == 0:
      return jnp.argmax(logits)
    return jax.random.categorical(key, logits / _TEMPERATURE.value)

  text = list(_PROMPT.value.encode())
  key = jax.random.key(_SEED.value)
  sys.stdout.write(_PROMPT.value)
  for i in range(_TOKENS.value):
    tail = text[-length:]
    window = np.zeros(length, np.int32)
    window[: len(tail)] = tail
    byte = int(
      next_byte(weights, window, len(tail) - 1, jax.random.fold_in(key, i))
    )
    text.append(byte)
  added = bytes(text[len(_PROMPT.value.encode()) :])
  print(added.decode(errors='replace'))
  return 0


if __name__ == '__main__':
  command_line.run_main('launch.generate', main)
