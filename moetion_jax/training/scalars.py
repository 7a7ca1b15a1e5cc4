"""Decisions that every stage takes alike from all stages' scalars; pure."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from moetion_jax import config as config_lib, errors

# Layout of a SCALARS entry, f32.
SCALARS = ('squared_norm', 'loss', 'auxiliary_loss', 'dropped')
_PLACE = {name: place for place, name in enumerate(SCALARS)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Verdict:
  """Decisions that every stage takes alike from all stages' scalars.

  Attributes:
    loss: mean cross-entropy, f32.
    auxiliary_loss: sum over stages, f32.
    grad_norm: global norm before clipping, f32.
    dropped: choices of an expert that found no seat, over all stages.
    clip_factor: factor by which every gradient is multiplied.
    is_finite: whether everything that the update needs is finite.
    bad_stage: first stage whose loss or gradients are not finite; None if all
      are, or if only the sum over all stages is not.
    partials: the scalars that this was made from, f32[stages, 4].
  """

  loss: np.float32
  auxiliary_loss: np.float32
  grad_norm: np.float32
  dropped: int
  clip_factor: np.float32
  is_finite: bool
  bad_stage: int | None
  partials: np.ndarray


def judge(partials: Sequence[np.ndarray], clip_norm: float) -> Verdict:
  """Sums the stages' SCALARS in stage order, in fp32, and decides.

  Args:
    partials: one SCALARS entry of each stage, in stage order.
    clip_norm: norm to which gradients are clipped; 0 for no clipping.
  """
  total = np.zeros(len(SCALARS), np.float32)
  bad_stage = None
  for stage, partial in enumerate(partials):
    with np.errstate(over='ignore', invalid='ignore'):  # judged below
      total += partial
    if bad_stage is None and not np.all(np.isfinite(partial)):
      bad_stage = stage
  norm = np.sqrt(total[_PLACE['squared_norm']])
  factor = np.float32(1)
  if clip_norm and norm > clip_norm:
    factor = np.float32(clip_norm) / norm
  return Verdict(
    loss=total[_PLACE['loss']],
    auxiliary_loss=total[_PLACE['auxiliary_loss']],
    grad_norm=norm,
    dropped=int(total[_PLACE['dropped']]),
    clip_factor=factor,
    is_finite=bad_stage is None and bool(np.isfinite(norm)),
    bad_stage=bad_stage,
    partials=np.stack(partials),
  )


def decide(
  iteration: int,
  partials: Sequence[np.ndarray],
  config: config_lib.TrainConfig,
) -> Verdict:
  """Judges an iteration whose update is next.

  Args:
    iteration: the iteration.
    partials: see `judge`.
    config: the run's settings.

  Raises:
    errors.NonFiniteError: the update is not finite, and none may be left out.
  """
  verdict = judge(partials, config.optimizer.clip_norm)
  if not verdict.is_finite and not config.skip_nonfinite:
    raise errors.NonFiniteError(
      f'iteration {iteration}: {explain(verdict)}',
      'lower --learning_rate, or pass --skip_nonfinite to leave such updates '
      'out, and --fresh to start over with it',
    )
  return verdict


def explain(verdict: Verdict) -> str:
  """Says what is not finite, for the error that ends a run."""
  what = f'loss {verdict.loss} and gradient norm {verdict.grad_norm}'
  if verdict.bad_stage is None:
    return f'{what}: each stage is finite, the norm over all stages is not'
  return f'{what} are not finite, first in stage {verdict.bad_stage}'
