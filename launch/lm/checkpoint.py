"""Final checkpoints of language models: what begins or samples from them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from launch.lm import settings as run_settings
from moetion_jax import codec, errors
from moetion_jax.runtime.checkpoints import damage, file

_ENDS = ('embedding', 'head')  # groups that the first and last stage have


def load_config(path: str, flag: str) -> run_settings.RunConfig:
  """Reads the configuration that a checkpoint carries.

  Raises:
    errors.ConfigError: it is missing, damaged or not one of ours.
  """
  config = file.load_config(path, flag)
  try:
    return codec.decode(run_settings.RunConfig, config)
  except Exception as error:  # fields of another version, of whatever type
    raise errors.ConfigError(
      flag,
      path,
      f'carries no configuration of ours: {damage.first_line(error)}'
      f'; use it with the version that wrote it, else {file.ADVICE}',
    ) from error


def check_all_stages(tree: Mapping[str, Any], path: str, flag: str) -> None:
  """Checks that a checkpoint is of a whole model.

  Args:
    tree: the checkpoint, as `file.load` returned it.
    path: its folder.
    flag: the flag that named it, for errors.

  Raises:
    errors.ConfigError: it is of one stage, as `launch.convert` writes it.
  """
  names = tree['parameters']
  missing = [p for p in _ENDS if not any(n.startswith(f'{p}/') for n in names)]
  if missing:
    raise errors.ConfigError(
      flag,
      path,
      f'is the state of one stage, without {" and ".join(missing)} of the '
      f'model, as launch.convert writes it; {file.NAME_ONE}',
    )
