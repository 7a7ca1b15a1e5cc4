"""Predicts the time of a run of ours from what was measured in others of it.

Uses the same core and methods as for clusters, with measured seconds in place
of bytes and bandwidths. `launch.benchmark ettr` compares predictions with runs.
"""

from __future__ import annotations

import dataclasses

from launch.simulate import (
  core,
  methods,
  partial as partial_method,
  world as world_lib,
)
from moetion_jax import keys
from moetion_jax.policies import decision as decision_lib, partial
from moetion_jax.policies.kinds import registry


@dataclasses.dataclass(frozen=True, kw_only=True)
class Measured:
  """The settings, measurements and failures of a run.

  Attributes:
    policy: a key of `registry.POLICIES`.
    iterations: iterations that the run does.
    iteration_seconds: seconds of one, without snapshots and failures.
    blocked_seconds: seconds by which a snapshot makes the run longer: waits and
      slowdown, on average.
    landing_seconds: seconds from the end of an iteration until its snapshot
      counts (two_phase: in storage).
    detect_seconds: seconds from a death until it is known.
    start_seconds: seconds from then until what died is replaced.
    fetch_seconds: seconds until snapshots are read.
    replay_seconds: seconds of an iteration that a stage does again (sparse),
      the interrupted one counted among them: `seconds.replay` by
      `replayed_iterations` of the event `recovered`. The policies that go back
      as a whole train on as before.
    failures: (iteration, fraction of it that is done, stage), ascending.
    stages: stages of the run.
    interval: iterations between snapshots; with sparse more than 1 only with a
      window of 1.
    taken: dense and two_phase: iterations whose snapshots were taken if the
      interval changed on the way, ascending; `interval` is then the usual one.
    window_length: window length of sparse.
    window_mode: mode of sparse, one of `decision.MODES`.
    keep_windows: windows of snapshots that sparse keeps.
    experts: partial: experts of a layer.
    partial_experts: partial: k at first.
    plt_budget: partial: proportion of lost tokens beyond which k is doubled.
    tokens: partial: tokens of an iteration.
    choices_per_token: partial: experts that a token goes to.
  """

  policy: str
  iterations: int
  iteration_seconds: float
  blocked_seconds: float = 0.0
  landing_seconds: float = 0.0
  detect_seconds: float
  start_seconds: float
  fetch_seconds: float = 0.0
  replay_seconds: float = 0.0
  failures: tuple[tuple[int, float, int], ...]
  stages: int
  interval: int = 1
  taken: tuple[int, ...] = ()
  window_length: int = 1
  window_mode: str = 'rolling'
  keep_windows: int = 2
  experts: int = 1
  partial_experts: int = 1
  plt_budget: float = partial.PLT_BUDGET
  tokens: int = 0
  choices_per_token: int = 1


def predict(measured: Measured) -> core.Result:
  """Simulates the run: `wall_seconds`, `ettr`, `recovery_seconds`, ...

  Raises:
    errors.ConfigError: a setting is none of ours.
  """
  world = world_lib.World(stages=measured.stages, peers=0)
  moments = [
    world_lib.Moment(
      iteration=iteration,
      fraction=fraction,
      failure=world_lib.Failure(gpu=stage),
    )
    for iteration, fraction, stage in measured.failures
  ]
  return core.simulate(
    _method(measured), world, moments=moments, iterations=measured.iterations
  )


def error(predicted_seconds: float, measured_seconds: float) -> float:
  """Returns the share of the measurement by which a prediction is off."""
  return abs(predicted_seconds - measured_seconds) / measured_seconds


def _method(measured: Measured) -> world_lib.Method:
  policy = registry.of_name(measured.policy)
  pause = (0.0,) * (measured.interval - 1)
  pace = world_lib.Pace(
    iteration_seconds=measured.iteration_seconds,
    extra_seconds=(*pause, measured.blocked_seconds),
  )
  timed = {
    'name': measured.policy,
    'pace': pace,
    'detect_seconds': measured.detect_seconds,
    'start_seconds': measured.start_seconds,
    'reads': methods.Reads(
      own_seconds=measured.fetch_seconds,
      peer_seconds=measured.fetch_seconds,
      durable_seconds=measured.fetch_seconds,
    ),
  }
  if not policy.takes_snapshots:
    return methods.Nothing(**timed)
  if policy.has_windows:
    # What is in which slot makes no difference here: one operator in each.
    decision = decision_lib.CaptureDecision(
      # Whole snapshots are taken at multiples of the interval, as by `Whole`.
      first_iteration=1 if measured.interval == 1 else 0,
      window_length=measured.window_length,
      mode=measured.window_mode,
      every=measured.interval,
      slots=tuple(
        frozenset({keys.OperatorId('slot', i)})
        for i in range(measured.window_length)
      ),
    )
    return methods.Windowed(
      **timed,
      decision=decision,
      landing_seconds=(measured.landing_seconds,) * measured.window_length,
      replay_seconds=measured.replay_seconds,
      replays_interrupted=True,
      keep_windows=measured.keep_windows,
    )
  whole = {
    **timed,
    'interval': measured.interval,
    'landing_seconds': measured.landing_seconds,
  }
  if policy.is_exact:
    return methods.Whole(
      **whole,
      in_storage=policy.is_durable,
      taken=measured.taken,
    )
  counts = partial.possible_counts(measured.partial_experts, measured.experts)
  return partial_method.Partial(
    **whole,
    experts=measured.experts,
    count=measured.partial_experts,
    tokens=measured.tokens,
    choices_per_token=measured.choices_per_token,
    plt_budget=measured.plt_budget,
    # What a larger k costs was not measured.
    paces=dict.fromkeys(counts, pace),
    landings=dict.fromkeys(counts, measured.landing_seconds),
  )
