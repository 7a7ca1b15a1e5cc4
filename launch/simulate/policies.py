"""Makes a simulation's method from a job's costs and a policy's settings.

Intervals and windows are chosen by the rules that the system chooses by
(`moetion_jax.policies`), fed with bytes and bandwidths instead of measurements.
"""

from __future__ import annotations

import dataclasses
import math

from launch.simulate import (
  cluster as cluster_lib,
  costs as costs_lib,
  methods,
  partial as partial_method,
  world as world_lib,
)
from moetion_jax import errors
from moetion_jax.policies import (
  decision as decision_lib,
  intervals,
  partial,
  popularity,
  replay_choice,
  settings as capture_settings,
  window,
)
from moetion_jax.policies.kinds import base, registry


@dataclasses.dataclass(frozen=True, kw_only=True)
class PolicySettings:
  """The settings of a policy.

  Attributes:
    policy: a key of `registry.POLICIES`.
    peers: number of hosts that a host's snapshots are copied to; two_phase:
      none.
    overlap_target: share of an iteration that a copy may take.
    interval: iterations between snapshots of dense, two_phase and partial; 0 to
      choose it.
    window_length: window length of sparse; 0 to choose it.
    window_mode: mode of sparse, one of `decision.MODES`; '' to choose it.
    replay: way of replay of sparse, one of `settings.REPLAYS`.
    order: order of sparse's operators, one of `popularity.ORDERS`.
    keep_windows: windows of snapshots that sparse keeps.
    logs: sparse: upstream logging.
    replicated_logs: sparse: logs at the peers as well.
    skip_frozen: sparse: a replay leaves out the weight gradients of frozen
      operators.
    overhead_budget: share of the run that two_phase's snapshots may take.
    partial_experts: k of partial at first.
    plt_budget: proportion of lost tokens beyond which partial doubles k.
    durable_seconds: seconds, about, between whole states that are written to
      the durable store as well; 0 for never.
  """

  policy: str = 'sparse'
  peers: int = 1
  overlap_target: float = 1.0
  interval: int = 0
  window_length: int = 0
  window_mode: str = ''
  replay: str = decision_lib.MICROBATCHES
  order: str = 'static'
  keep_windows: int = 2
  logs: bool = True
  replicated_logs: bool = False
  skip_frozen: bool = False
  overhead_budget: float = intervals.OVERHEAD_BUDGET
  partial_experts: int = 1
  plt_budget: float = partial.PLT_BUDGET
  durable_seconds: float = 0.0

  def __post_init__(self) -> None:
    registry.of_name(self.policy)
    errors.check_known('order', self.order, popularity.ORDERS)
    if self.window_mode:
      errors.check_known('window_mode', self.window_mode, decision_lib.MODES)
    errors.check_known('replay', self.replay, capture_settings.REPLAYS)
    if self.replay == decision_lib.UPDATES and self.window_mode == 'aligned':
      raise errors.ConfigError('replay', self.replay, 'is of rolling windows')
    for name, least in (
      ('peers', 0),
      ('interval', 0),
      ('window_length', 0),
      ('keep_windows', 1),
      ('partial_experts', 1),
    ):
      if getattr(self, name) < least:
        raise errors.ConfigError(
          name, getattr(self, name), f'must be at least {least}'
        )


def world(
  cluster: cluster_lib.Cluster,
  job: cluster_lib.TrainingJob,
  settings: PolicySettings,
  *,
  on_no_spare: str = world_lib.WAIT,
) -> world_lib.World:
  """Makes the world that a job runs in.

  Raises:
    errors.ConfigError: it has fewer hosts than copies are to be on.
  """
  made = world_lib.World(
    stages=job.stages,
    replicas=job.replicas,
    expert_devices=job.expert_devices,
    gpus_per_host=cluster.gpus_per_host,
    peers=settings.peers,
    spare_hosts=cluster.spare_hosts,
    repair_seconds=cluster.repair_seconds,
    on_no_spare=on_no_spare,
  )
  if settings.peers >= made.hosts > 1:
    raise errors.ConfigError('peers', settings.peers, f'of {made.hosts} hosts')
  return made if made.hosts > 1 else dataclasses.replace(made, peers=0)


def make(costs: costs_lib.Costs, settings: PolicySettings) -> world_lib.Method:
  """Makes the method of a policy, with its costs on a cluster.

  Raises:
    errors.ConfigError: a setting does not fit the model.
  """
  policy = registry.of_name(settings.policy)
  if not policy.takes_snapshots:
    return methods.Nothing(
      **_timed(costs, settings, _pace(costs), _whole_reads(costs))
    )
  if policy.is_durable:
    return _two_phase(costs, settings)
  if policy.has_windows:
    return _sparse(costs, settings)
  return _in_memory(costs, settings, is_whole=policy.is_exact)


def _timed(
  costs: costs_lib.Costs,
  settings: PolicySettings,
  pace: world_lib.Pace,
  reads: methods.Reads,
) -> dict:
  """Returns the fields that all methods have."""
  every = 0
  if settings.durable_seconds:
    seconds = max(settings.durable_seconds, costs.storage_seconds)
    every = math.ceil(seconds / pace.iteration_seconds)
  return {
    'name': settings.policy,
    'pace': pace,
    'detect_seconds': costs.cluster.detect_seconds,
    'start_seconds': costs.cluster.start_seconds,
    'reads': reads,
    'durable': methods.Durable(
      every=every, landing_seconds=costs.storage_seconds
    ),
  }


def _pace(
  costs: costs_lib.Costs, extra_seconds: tuple[float, ...] = (0.0,)
) -> world_lib.Pace:
  return world_lib.Pace(
    iteration_seconds=costs.iteration_seconds, extra_seconds=extra_seconds
  )


def _every(interval: int, seconds: float) -> tuple[float, ...]:
  """Returns extra seconds by iteration of an interval: all in the last one."""
  return (0.0,) * (interval - 1) + (seconds,)


def _whole_reads(
  costs: costs_lib.Costs, count: int | None = None
) -> methods.Reads:
  """Returns the reads of whole snapshots, or of `count` experts a layer."""
  state = costs.stages[costs.largest].state_bytes
  size = (
    sum(state.values())
    if count is None
    else (partial.partial_bytes(state, count))
  )
  return methods.Reads(
    own_seconds=costs.own_seconds(size),
    peer_seconds=costs.peer_seconds(size),
    durable_seconds=costs.storage_seconds,
  )


def _copy(
  costs: costs_lib.Costs,
  links: tuple[costs_lib.NetworkLink, ...],
  copied_bytes: float,
  iterations: int,
) -> tuple[float, float]:
  """Returns by how much a copy makes iterations longer, and when it landed."""
  seconds = costs.iteration_seconds
  longer = max(x.seconds(copied_bytes, iterations, seconds) for x in links)
  landing = max(copied_bytes / x.free_bytes_per_second(seconds) for x in links)
  return longer - iterations * seconds, min(landing, longer)


def _in_memory(
  costs: costs_lib.Costs, settings: PolicySettings, *, is_whole: bool
) -> methods.Whole:
  """Makes dense and partial: snapshots in host memory, copied to peers."""
  links = costs.links(peers=settings.peers, logs=False)
  budget = costs.budget(links, settings.overlap_target)
  state = costs.operators('static')
  whole = sum(state.state_bytes.values())

  def share(count: int | None) -> float:
    """Returns the bytes that a replica of the largest stage copies."""
    size = (
      whole
      if count is None
      else (partial.partial_bytes(state.state_bytes, count))
    )
    return size / costs.job.replicas

  count = None
  if not is_whole:
    count = min(settings.partial_experts, costs.job.config().num_experts)
  interval = settings.interval or intervals.dense_interval(
    state_bytes=share(count),
    bandwidth_bytes_per_second=budget.bandwidth_bytes_per_second,
    iteration_seconds=costs.iteration_seconds,
    overlap_target=settings.overlap_target,
  )

  def pace_and_landing(count: int | None) -> tuple[world_lib.Pace, float]:
    extra, landing = _copy(costs, links, share(count), interval)
    return _pace(costs, _every(interval, extra)), landing

  pace, landing = pace_and_landing(count)
  timed = _timed(costs, settings, pace, _whole_reads(costs))
  if count is None:
    return methods.Whole(**timed, interval=interval, landing_seconds=landing)
  experts = costs.job.config().num_experts
  counts = partial.possible_counts(count, experts)
  made = {k: pace_and_landing(k) for k in counts}
  return partial_method.Partial(
    **timed,
    interval=interval,
    landing_seconds=landing,
    experts=experts,
    count=count,
    tokens=costs.tokens,
    choices_per_token=costs.job.config().experts_per_token,
    plt_budget=settings.plt_budget,
    paces={k: p for k, (p, _) in made.items()},
    landings={k: x for k, (_, x) in made.items()},
  )


def _two_phase(
  costs: costs_lib.Costs, settings: PolicySettings
) -> methods.Whole:
  """Makes two_phase: phase one ends before the next update, phase two later."""
  link = costs.host_link(logs=False)
  stage = costs.stages[costs.largest].state_bytes
  copied = sum(stage.values()) / costs.job.replicas
  stall, copy_seconds = _copy(costs, (link,), copied, 1)
  landing = copy_seconds + costs.storage_seconds
  interval = settings.interval or intervals.two_phase_interval(
    intervals.TwoPhaseCosts(
      iteration_seconds=costs.iteration_seconds,
      overhead_seconds=stall,
      durable_seconds=landing,
    ),
    settings.overhead_budget,
  )
  # A shorter interval than storage allows makes training wait for it.
  late = landing - interval * costs.iteration_seconds
  pace = _pace(costs, _every(interval, max(stall, late)))
  return methods.Whole(
    **_timed(costs, settings, pace, _whole_reads(costs)),
    interval=interval,
    landing_seconds=landing,
    in_storage=True,
  )


def _sparse(
  costs: costs_lib.Costs, settings: PolicySettings
) -> methods.Windowed:
  job = costs.job
  links = costs.links(
    peers=settings.peers,
    logs=settings.logs,
    replicated_logs=settings.replicated_logs and settings.logs,
  )
  replay, choice = _replay_and_window(costs, settings, links)
  operators = costs.operators(settings.order, replay=replay)
  choice = _until_not_late(costs, links, choice, operators)
  decision = decision_lib.CaptureDecision(
    first_iteration=1,
    window_length=choice.window_length,
    mode=choice.mode,
    every=choice.every,
    slots=operators.slots(choice.window_length),
    replay=replay,
  )
  copies = _copies(costs, links, choice, operators)
  extra = [x for e, _ in copies for x in _every(choice.every, e)]
  alone = dataclasses.replace(operators, shares=())
  read = sum(alone.snapshot_bytes(choice.window_length, choice.mode))
  compute = costs.compute[costs.largest]
  frozen = {}
  if settings.skip_frozen:
    total = sum(compute.values())
    # One of three passes is for weight gradients.
    frozen = {o: c / total / 3 for o, c in compute.items()}
  # Microbatches wait only for stages that replay as well.
  unit = costs.iteration_seconds / (job.microbatches + job.stages - 1)
  reads = methods.Reads(
    own_seconds=costs.own_seconds(read),
    peer_seconds=costs.peer_seconds(read),
    durable_seconds=costs.storage_seconds,
  )
  return methods.Windowed(
    **_timed(costs, settings, _pace(costs, tuple(extra)), reads),
    decision=decision,
    landing_seconds=tuple(x for _, x in copies),
    replay_seconds=unit * job.microbatches,
    pipeline_seconds=unit,
    update_seconds=_update_seconds(costs, settings, costs.largest),
    frozen_share=frozen,
    logs=settings.logs,
    replicated_logs=settings.replicated_logs,
    keep_windows=settings.keep_windows,
  )


def _replay_and_window(
  costs: costs_lib.Costs,
  settings: PolicySettings,
  links: tuple[costs_lib.NetworkLink, ...],
) -> tuple[str, window.WindowChoice]:
  """Returns the way of replay and the window, as the leader chooses them."""
  budget = costs.budget(links, settings.overlap_target)
  again = costs_lib.slot_choice(
    costs,
    settings.order,
    budget,
    pinned_length=settings.window_length or None,
    pinned_mode=settings.window_mode or None,
  )
  microbatches, updates = decision_lib.REPLAYS
  if settings.replay == microbatches or settings.window_mode == 'aligned':
    return microbatches, again
  longest = capture_settings.CaptureSettings.max_window_length
  ways = (
    [
      replay_choice.Stage(
        operators=costs.operators(settings.order, stage, replay),
        budget=budget,
        update_seconds=_update_seconds(costs, settings, stage),
        read_bytes_per_second=1 / costs.own_seconds(1.0),
      )
      for stage in costs.distinct_stages
    ]
    for replay in decision_lib.REPLAYS
  )
  predicted = replay_choice.predictions(
    again,
    *ways,
    replay_choice.Outlook(
      expected_mtbf_seconds=costs.cluster.mtbf_seconds,
      hides_copies=True,
      fixed_seconds=costs.cluster.detect_seconds + costs.cluster.start_seconds,
    ),
    lengths=range(1, longest + 1),
  )
  if settings.replay == capture_settings.AUTO:
    best = replay_choice.best(predicted)
    return best.replay, best.choice
  for one in predicted:
    if one.replay == updates:
      return updates, one.choice
  return updates, window.WindowChoice(
    window_length=longest,
    mode=decision_lib.MODES[0],
    reason='gradients fit no window; the longest',
  )


def _update_seconds(
  costs: costs_lib.Costs, settings: PolicySettings, stage: int
) -> float:
  """Returns the bound of an update's seconds, by the link to the host."""
  return replay_choice.update_seconds(
    costs.operators(settings.order, stage, decision_lib.UPDATES),
    costs.budget((costs.host_link(logs=False),), settings.overlap_target),
  )


def _copies(
  costs: costs_lib.Costs,
  links: tuple[costs_lib.NetworkLink, ...],
  choice: window.WindowChoice,
  operators: window.StageOperators,
) -> list[tuple[float, float]]:
  """Returns `_copy` of each snapshot of a window, of the busiest replica."""
  copied = operators.snapshot_bytes(choice.window_length, choice.mode)
  return [_copy(costs, links, n, choice.every) for n in copied]


def _until_not_late(
  costs: costs_lib.Costs,
  links: tuple[costs_lib.NetworkLink, ...],
  choice: window.WindowChoice,
  operators: window.StageOperators,
) -> window.WindowChoice:
  """Returns the leader's window in the end: it grows while copies run late.

  The stages' first choices may differ, and the one taken may be too short for
  the largest of them.
  """
  while True:
    latest = max(e for e, _ in _copies(costs, links, choice, operators))
    if not base.is_late(latest, choice.every * costs.iteration_seconds):
      return choice
    if (longer := window.enlarge(choice, operators)) == choice:
      return choice
    choice = longer
