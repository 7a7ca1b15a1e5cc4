"""Planners of small stages, and runs that report to them."""

from __future__ import annotations

from moetion_jax import keys
from moetion_jax.policies import (
  decision as decision_lib,
  planner as planner_lib,
  settings as capture_settings,
)
from moetion_jax.policies.kinds import registry
from tests.support import helpers

EXPERTS = 4
EXPERT_BYTES, OTHER_BYTES = 100, 50
STATE_BYTES = EXPERTS * EXPERT_BYTES + OTHER_BYTES


def expert(index, stage=0):
  return keys.OperatorId(f'layers/{stage}/experts', index)


def other(stage=0):
  """The operator of what is no expert."""
  return keys.OperatorId(f'layers/{stage}')


def sizes(stage=0):
  state_bytes = {expert(i, stage): EXPERT_BYTES for i in range(EXPERTS)}
  state_bytes[other(stage)] = OTHER_BYTES
  return planner_lib.StageSizes(
    state_bytes=state_bytes,
    compute_bytes=dict.fromkeys(state_bytes, 10),
    gradient_bytes=dict.fromkeys(state_bytes, 20),
    device=dict.fromkeys(state_bytes),
  )


def make_planner(policy, replicas=1, stages=1, **fields) -> planner_lib.Planner:
  """A planner of a baseline policy that has made its first decisions."""
  kind = registry.of_name(policy)
  planner = kind.planner(
    capture_settings.CaptureSettings(policy=kind, **fields),
    [sizes(stage) for stage in range(stages)],
    'tpu',  # where half of an iteration may copy
    replicas=replicas,
  )
  planner.decisions(0)
  return planner


class Run:
  """Reports iterations, with the snapshots that were decided."""

  def __init__(self, planner, load=None):
    self.planner = planner
    self.decisions = [*planner.decisions(0)]
    self.changes = {}
    self.load = load or {}
    self.iteration = 0

  def report(self, count, **fields):
    for _ in range(count):
      self.iteration += 1
      held = decision_lib.active(self.decisions, self.iteration)
      is_taken = held.slot_index(self.iteration) is not None
      now: dict = {
        k: v(is_taken) if callable(v) else v for k, v in fields.items()
      }
      change = self.planner.add(
        [
          helpers.make_report(
            self.iteration, load=self.load, snapshot_bytes=int(is_taken), **now
          )
        ]
      )
      if change:
        self.decisions.append(change.decisions[0])
        if change.kind:
          self.changes[self.iteration] = dict(change.fields)

  def taken(self, first, last):
    """Iterations with a snapshot, and the experts in it."""
    found = {}
    for iteration in range(first, last + 1):
      captured = decision_lib.active(self.decisions, iteration).captured(
        iteration
      )
      if captured:
        found[iteration] = sorted(o.expert for o in captured[0])[1:]
    return found
