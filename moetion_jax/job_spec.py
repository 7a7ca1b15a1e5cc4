"""The agent's half of a job: all that a supervisor must know of a model.

The other half is `training.job.Job`, which workers make; it needs JAX, which no
agent imports.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Mapping
from typing import Any

from moetion_jax import codec, config as config_lib, errors

NAME = 'name'  # the field of a fingerprint that is not compared


@dataclasses.dataclass(frozen=True, kw_only=True)
class Base:
  """A checkpoint of the run itself, from which it goes on.

  Attributes:
    path: its folder.
    iteration: iteration of the state.
    digest: the digest of the state.
  """

  path: str
  iteration: int
  digest: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class JobSpec:
  """A job as an agent knows it.

  Attributes:
    factory: 'package.module:function', the function that makes a worker's
      `training.job.Job` from this value.
    config: all settings of the job, as JSON (tuples become lists). The workdir
      keeps them in config.json, and goes on with the same ones only. `train`
      is one of them: the fields of a `TrainConfig`. `data` and `init_from`, if
      they are there, say where something lies: what that is is compared
      instead.
    hidden_bytes: size of what a stage sends to a neighbour for a microbatch.
    tokens_per_iteration: tokens that all replicas train on in one iteration.
    expert_capacity: tokens that an expert takes in an iteration at most.
    data: what the job reads: a file, a folder or a pattern; '' for no file.
    init_from: checkpoint that it starts from; '' for none.
    init_digest: digest of the state in that, as the run began with it; '' for
      any.
    base: the checkpoint with which a run that is trained longer goes on; None
      for a run that begins with the job's own initial state.
  """

  factory: str
  config: dict[str, Any]
  hidden_bytes: int
  tokens_per_iteration: int
  expert_capacity: int
  data: str = ''
  init_from: str = ''
  init_digest: str = ''
  base: Base | None = None

  def __post_init__(self) -> None:
    try:  # as it is read back: a tuple, as of `dataclasses.asdict`, is a list
      config = json.loads(json.dumps(self.config))
    except (TypeError, ValueError) as error:
      raise TypeError(f'JobSpec.config must be JSON: {error}') from error
    object.__setattr__(self, 'config', config)

  @functools.cached_property
  def train(self) -> config_lib.TrainConfig:
    """Settings of the training and of its spread."""
    return codec.decode(config_lib.TrainConfig, self.config['train'])

  @property
  def initial_iteration(self) -> int:
    """Iteration of the state that the run begins with."""
    return self.base.iteration if self.base else self.train.initial_iteration


def data_changes(
  known: Mapping[str, Any], here: Mapping[str, Any]
) -> list[str]:
  """Returns the fields in which fingerprints of other data differ.

  The field `name`, if there is one, is for people: the same data may have
  another one elsewhere.
  """
  found = config_lib.differences(known, here)
  return [name for name in found if name != NAME]


def check_data(
  data: str, known: Mapping[str, Any], here: Mapping[str, Any]
) -> None:
  """Checks that a worker reads the same as the others, and as before.

  Args:
    data: the setting that names what is read.
    known: the fingerprint of what the run reads; {} for any.
    here: the fingerprint of what the worker reads.

  Raises:
    errors.ConfigError: it is another one.
  """
  if known and (changed := data_changes(known, here)):
    raise changed_input('data', data, ', '.join(changed))


def changed_input(flag: str, value: str, what: str) -> errors.ConfigError:
  """Makes the error of something that a run reads and that has changed.

  Args:
    flag: the flag that names it.
    value: the value of the flag.
    what: what of it is different.
  """
  return errors.ConfigError(
    flag,
    value,
    f'has changed since the run began ({what}): other bits would follow. Put '
    'back what it was and give the same command, or start the run over with '
    '--fresh',
  )
