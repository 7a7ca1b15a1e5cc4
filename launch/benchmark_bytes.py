"""What snapshots weigh: the second table of `launch.benchmark snapshot`.

Bytes of a window's snapshots against the whole state, for every preset, from
shapes alone: nothing is computed.
"""

from __future__ import annotations

from launch import capture_plan, local, settings, summary
from launch.benchmark_pipeline import Row
from models import presets
from moetion_jax import layout as layout_lib, slots

_WINDOWS = (1, 2, 4, 8, 16)
_REPLICAS, _REPLICAS_WINDOW = (1, 2, 4, 8), 4


def rows() -> list[Row]:
  """Of every preset, window and mode; of a replica's share, too."""
  out: list[Row] = []
  for preset in presets.PRESETS:
    sizes = _preset_sizes(preset)
    whole = sum(sizes.state_bytes.values())
    for mode in slots.MODES:
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


def _preset_sizes(preset: str) -> capture_plan.StageSizes:
  """Operators of a whole model with AdamW, from shapes alone."""
  config = settings.make(
    preset,
    model_overrides=[],
    train_overrides={'stages': 1},
    optimizer_overrides={},
  )
  layout = layout_lib.of_stage(
    local.declare_stage(config, 0), has_devices=False
  )
  return local.stage_sizes(layout, 1)
