"""Sizes of snapshots: the second table of `launch.benchmark snapshot`.

Bytes of a window's snapshots against the whole state, for every preset, from
shapes alone: nothing is computed.
"""

from __future__ import annotations

from launch.benchmark.harness import summary
from launch.lm import settings as run_settings, transformer_job
from models import presets
from moetion_jax.policies import decision, planner
from moetion_jax.programs import stage
from moetion_jax.training import job as job_lib

_WINDOWS = (1, 2, 4, 8, 16)
_REPLICAS, _REPLICAS_WINDOW = (1, 2, 4, 8), 4


def rows() -> list[summary.Row]:
  """Returns rows by preset, window and mode, and by a replica's share."""
  out: list[summary.Row] = []
  for preset in presets.PRESETS:
    sizes = _preset_sizes(preset)
    whole = sum(sizes.state_bytes.values())
    for mode in decision.MODES:
      for length in _WINDOWS:
        if length > len(sizes.state_bytes):
          continue
        each = sizes.in_order('static', {}).snapshot_bytes(length, mode)
        out.append(
          (
            f'bytes / dense, {preset}, {mode}, window {length}: '
            f'largest {max(each) / whole:.3f}, mean',
            summary.summarize([sum(each) / len(each) / whole]),
            '',
          )
        )
    for replicas in _REPLICAS:
      parts = sizes.in_order('static', {}, replicas)
      each = parts.snapshot_bytes(_REPLICAS_WINDOW, 'rolling')
      out.append(
        (
          f'bytes / dense, {preset}, rolling, window '
          f'{_REPLICAS_WINDOW}, largest share of {replicas} replica(s)',
          summary.summarize([max(each) / whole]),
          '',
        )
      )
  return out


def _preset_sizes(preset: str) -> planner.StageSizes:
  """Returns operator sizes of a whole model with AdamW, from shapes alone."""
  config = run_settings.make(
    preset,
    model_overrides=[],
    train_overrides={'stages': 1},
    optimizer_overrides={},
  )
  layout = stage.layout_of(
    transformer_job.of(config).declare_stage(0), has_devices=False
  )
  return job_lib.stage_sizes(layout, 1)
