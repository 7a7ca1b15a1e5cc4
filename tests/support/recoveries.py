"""A recoverer without processes, and stages that report to it."""

from __future__ import annotations

from moetion_jax import keys
from moetion_jax.policies import planner, settings as capture_settings
from moetion_jax.policies.kinds import registry
from moetion_jax.recovery import plan as recovery_plan, recoverer
from moetion_jax.snapshots import coverage
from tests.support import helpers

_EXPERTS = 6


def operators(stage):
  """The operators of a stage: experts of one layer."""
  return [keys.OperatorId(f'layers/{stage}', e) for e in range(_EXPERTS)]


class Run:
  """A recoverer, and stages that store and report."""

  def __init__(
    self,
    stages=2,
    iterations=60,
    max_failures=3,
    policy='sparse',
    **captures,
  ):
    self.events = []
    self.stages = stages
    self.one = recoverer.Recoverer(
      helpers.micro_run(stages=stages, iterations=iterations).job_spec(),
      capture_settings.CaptureSettings(
        policy=registry.POLICIES[policy],
        **{'window_length': 3, **captures},
      ),
      max_failures,
      lambda kind, **fields: self.events.append({'kind': kind, **fields}),
    )
    self.one.begin(
      [
        planner.StageSizes(
          state_bytes=dict.fromkeys(operators(stage), 12),
          compute_bytes=dict.fromkeys(operators(stage), 2),
          device=dict.fromkeys(operators(stage)),
        )
        for stage in range(stages)
      ],
      'cpu',
    )
    self.begun = [0] * stages

  def first_plan(self, reported=0, newest=0):
    plan = self.one.first_plan(reported, newest)
    self.begun = [plan.first_iteration] * self.stages
    return plan

  def decisions(self, stage, plan=None):
    """Those that a worker of the stage would be told."""
    plan = plan or recovery_plan.RecoveryPlan(
      stages=(stage,),
      start=self.one.line,
      complete_at={stage: self.one.line},
      sources={},
      reasons={},
    )
    return self.one.go(stage, plan, is_fresh=False).decisions

  def share(self, stage, iteration, length=3):
    mine = operators(stage)
    slot = frozenset(mine[iteration % length :: length])
    return coverage.Share(
      iteration=iteration, state=slot, compute=frozenset(mine) - slot
    )

  def train(self, until, stages=None, **fields):
    """All stages do the next iterations: they store, then they report."""
    decided = {}
    for iteration in range(min(self.begun), until + 1):
      for stage in stages or range(self.stages):
        self.one.stored(stage, self.share(stage, iteration))
      made = self.one.add(
        [
          helpers.make_report(iteration, stage, **fields)
          for stage in range(self.stages)
        ]
      )
      if made:
        decided[iteration] = made
      self.one.advance(iteration)
    self.begun = [until + 1] * self.stages
    return decided

  def of_kind(self, kind):
    return [e for e in self.events if e['kind'] == kind]
