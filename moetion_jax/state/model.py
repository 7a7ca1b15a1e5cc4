"""Model as the library knows it: one stage of it, as pure functions.

A model package (such as `models`, or the user's own) makes a `StageModel` of
each stage; `programs/stage.py` turns it into compiled programs.

Dims: B sequences of one device, T sequence, D model, L MoE layers, E experts.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax


class Group(NamedTuple):
  """Leaves that belong together.

  Attributes:
    name: name of the group.
    stacked: True if every leaf's leading dim counts operators (experts);
      otherwise the group is one operator.
  """

  name: str
  stacked: bool


# Fields of what crosses jit are arrays, their shapes or their specs: Any.
class Position(NamedTuple):
  """Data that a program works on, and how; also keys its randomness."""

  iteration: Any  # u32[]
  microbatch: Any  # u32[]: global number within the iteration
  capacity: Any = None  # f32[L, E]: factors of experts' capacities, if any


class Inputs(NamedTuple):
  """Inputs of one stage's forward, from one microbatch."""

  x: Any  # i32[B, T] tokens for the first stage, else [B, T, D]
  labels: Any  # i32[B, T] for the last stage, else None


class Outputs(NamedTuple):
  """Results of one stage's forward, on one device."""

  y: jax.Array | None  # [B, T, D] sent on; None in the last stage
  objective: jax.Array  # f32[]: what this stage adds to the objective
  counts: dict[str, jax.Array]  # summed over devices and microbatches


@dataclasses.dataclass(frozen=True, kw_only=True)
class StageModel:
  """One stage of a model.

  Attributes:
    shapes: f32 shape of every parameter by its global name. A parameter of a
      stacked group has the operators (experts) as its leading dim, sharded over
      the mesh axis 'expert'; inside `forward` a device sees its own share.
    compute_dtypes: dtype in which forward reads each parameter.
    partition: group of a parameter name.
    initialize: makes the initial fp32 masters.
    forward: (params, inputs, position) -> Outputs, on one device's share.
      `position` is None in evaluation: no randomness. The objective is a mean
      over the device's tokens plus auxiliary terms. Training minimizes the mean
      over devices and microbatches of the sum over stages. Required counts:
      'auxiliary_loss' f32[], 'load' i32[L, E], 'dropped' i32[L], and in the
      last stage 'loss' f32[], the mean cross-entropy.
    buffers: parameters without gradient, changed by `buffer_steps` only.
    buffer_steps: counts of a whole iteration -> what is added to each buffer.
    has_embedding: True in the first stage, which reads tokens.
    has_head: True in the last stage, which reads labels.
    hidden_shape: (T, D) of what travels between stages.
    hidden_dtype: dtype of what travels between stages.
    capacity_shape: (L, E) of `Position.capacity`, where it scales how many
      tokens each expert takes; None where nothing scales it.
    scaled: makes the same stage with a `capacity_shape`, for factors up to its
      argument; None where nothing limits the tokens that an expert takes.
  """

  shapes: Mapping[str, jax.ShapeDtypeStruct]
  compute_dtypes: Mapping[str, jax.typing.DTypeLike]
  partition: Callable[[str], Group]
  initialize: Callable[[], dict[str, jax.Array]]
  forward: Callable[[dict[str, jax.Array], Inputs, Position | None], Outputs]
  buffers: frozenset[str]
  buffer_steps: Callable[[dict[str, jax.Array]], dict[str, jax.Array]]
  has_embedding: bool
  has_head: bool
  hidden_shape: tuple[int, int]
  hidden_dtype: jax.typing.DTypeLike
  capacity_shape: tuple[int, int] | None = None
  scaled: Callable[[float], StageModel] | None = None
