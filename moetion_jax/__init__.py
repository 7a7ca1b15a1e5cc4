"""MoEtion in JAX: sparse checkpointing for Mixture-of-Experts training.

The names in `__all__` are the library's interface; all else is internal, and
may change. Each is imported when it is first asked for, so that an agent needs
no JAX.
"""

import importlib
from typing import Any

_NAMES = {
  'errors': ('ExitCode', 'exit_code_of', 'MoetionError', 'ConfigError'),
  # Sparse checkpoints for a loop of one's own.
  'loop': ('SparseCheckpointer', 'LoopSettings', 'NotExactError', 'Group'),
  # A job: `JobSpec` for its agent, a subclass of `Job` for its workers.
  'config': ('TrainConfig', 'OptimizerConfig'),
  'job_spec': ('JobSpec',),
  'training.job': ('Job',),
  'state.model': ('StageModel', 'Inputs', 'Outputs', 'Position'),
  # Its run, in processes that may die.
  'runtime.agent.run': ('run',),
  'runtime.agent.settings': ('AgentSettings',),
  'runtime.faults': ('parse_faults',),
  'runtime.records.recorder': ('View',),
  'policies.settings': ('CaptureSettings',),
  'policies.kinds.registry': ('POLICIES',),
  # Pure planning.
  'policies.window': ('choose_window',),
  'policies.slots': ('make_slots',),
  'snapshots.coverage': ('valid_starts',),
  'recovery.plan': ('plan', 'StageInventory', 'RecoveryPlan'),
}
_HOMES = {name: home for home, names in _NAMES.items() for name in names}
__all__ = sorted(_HOMES)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
  if name not in _HOMES:
    raise AttributeError(f'module {__name__} has no attribute {name}')
  value = getattr(importlib.import_module(f'{__name__}.{_HOMES[name]}'), name)
  globals()[name] = value
  return value
