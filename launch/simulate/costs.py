"""Reckons what a job moves and computes, with the system's own functions.

Bytes come from the shapes of a stage's training state (neither arrays nor a
backend are made), slots and windows from `moetion_jax`. Nothing here knows of a
policy's results.
"""

from __future__ import annotations

import dataclasses
import functools
import random
from collections.abc import Mapping

from launch.lm import settings as run_settings, transformer_job
from launch.simulate import cluster as cluster_lib
from models import config as model_config, stages as stages_lib, transformer
from moetion_jax import config, errors, keys
from moetion_jax.policies import decision, planner, popularity, window
from moetion_jax.programs import stage as stage_lib
from moetion_jax.training import job as job_lib

_FLOPS_PER_MULTIPLICATION = 2
# Forward once, backward twice: for inputs and for weights.
_PASSES = 3
_ACTIVATION_BYTES = 2  # bfloat16
_GRADIENT_BYTES = 4  # `reduce` sums in fp32
_STATE_BYTES = 12  # per parameter: fp32 weight and Adam's two moments
# Share of a link that copies get even if training fills it by itself.
_LEAST_FREE = 0.01


@dataclasses.dataclass(frozen=True, kw_only=True)
class NetworkLink:
  """A link that copies share with training.

  Attributes:
    bytes_per_second: bandwidth of the link.
    busy_bytes: bytes that training moves over it in an iteration.
    copies: number of times that a snapshot passes it.
  """

  bytes_per_second: float
  busy_bytes: float = 0.0
  copies: int = 1

  def free_bytes_per_second(self, iteration_seconds: float) -> float:
    """Returns the rate of snapshots that does not slow training down."""
    free = self.bytes_per_second - self.busy_bytes / iteration_seconds
    return max(free, _LEAST_FREE * self.bytes_per_second) / self.copies

  def seconds(
    self, copied_bytes: float, iterations: int, iteration_seconds: float
  ) -> float:
    """Returns the seconds of iterations beside which a snapshot is copied.

    Copies fill what training leaves of the link; training waits for the rest
    of them.
    """
    moved = iterations * self.busy_bytes + copied_bytes * self.copies
    return max(iterations * iteration_seconds, moved / self.bytes_per_second)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Costs:
  """The costs of a job on a cluster.

  Attributes:
    cluster: the machines.
    job: the model that they train, and its spread.
    iteration_seconds: seconds of an iteration without snapshots and failures.
    tokens: tokens of an iteration.
    stages: operator sizes of each stage.
    compute: by stage, each operator's multiplications per token, on average
      over tokens.
    network_bytes: bytes that training sends in an iteration from the busiest
      host.
    log_bytes: bytes of an iteration in a worker's log.
  """

  cluster: cluster_lib.Cluster
  job: cluster_lib.TrainingJob
  iteration_seconds: float
  tokens: int
  stages: tuple[planner.StageSizes, ...]
  compute: tuple[Mapping[keys.OperatorId, float], ...]
  network_bytes: float
  log_bytes: float

  @property
  def workers_per_host(self) -> float:
    """Number of workers on a host; less than 1 if one has several hosts."""
    return self.cluster.gpus_per_host / self.job.expert_devices

  @functools.cached_property
  def state_bytes(self) -> int:
    """Bytes of the whole model's training state."""
    return sum(sum(s.state_bytes.values()) for s in self.stages)

  @functools.cached_property
  def largest(self) -> int:
    """The stage with the most training state."""
    sizes = [sum(s.state_bytes.values()) for s in self.stages]
    return sizes.index(max(sizes))

  @functools.cached_property
  def distinct_stages(self) -> list[int]:
    """Stages of which each is unlike the others; all are like one of them."""
    return list({id(s): i for i, s in enumerate(self.stages)}.values())

  def operators(
    self,
    order: str,
    stage: int | None = None,
    replay: str = decision.MICROBATCHES,
  ) -> window.StageOperators:
    """Returns the operators of a stage as its replicas capture them.

    Without `stage`, those of the largest one. With a way of replay, as it
    records those outside a slot.
    """
    sizes = self.stages[self.largest if stage is None else stage]
    count = self.job.config().num_experts
    rates = {
      o: expert_share(o.expert, count, self.job.popularity_skew)
      for o in sizes.state_bytes
      if o.expert >= 0
    }
    return sizes.in_order(order, rates, self.job.replicas, replay)

  def host_link(self, *, logs: bool) -> NetworkLink:
    """Returns one worker's link to host memory, with its logs on it or not."""
    rate = self.cluster.host_link_bytes_per_second * self.job.expert_devices
    return NetworkLink(
      bytes_per_second=rate, busy_bytes=self.log_bytes if logs else 0.0
    )

  def network(self, *, peers: int, replicated_logs: bool) -> NetworkLink:
    """Returns one worker's part of its host's link to other hosts."""
    workers = self.workers_per_host
    sent = self.network_bytes / workers
    if replicated_logs:
      sent += self.log_bytes * peers
    return NetworkLink(
      bytes_per_second=self.cluster.network_bytes_per_second / workers,
      busy_bytes=sent,
      copies=peers,
    )

  def links(
    self, *, peers: int, logs: bool, replicated_logs: bool = False
  ) -> tuple[NetworkLink, ...]:
    """Returns all links that a snapshot passes."""
    links = [self.host_link(logs=logs)]
    if peers:
      links.append(self.network(peers=peers, replicated_logs=replicated_logs))
    return tuple(links)

  def budget(
    self, links: tuple[NetworkLink, ...], overlap_target: float
  ) -> window.CopyBudget:
    """Returns the budget for copies beside training."""
    seconds = self.iteration_seconds
    return window.CopyBudget(
      iteration_seconds=seconds,
      bandwidth_bytes_per_second=min(
        link.free_bytes_per_second(seconds) for link in links
      ),
      overlap_target=overlap_target,
    )

  def own_seconds(self, stage_bytes: float) -> float:
    """Returns the seconds until every worker of a stage read `stage_bytes`.

    A worker needs the shares of all replicas: those of its own host from
    memory, the others over the network.
    """
    return self._read_seconds(
      stage_bytes, min(1.0, self.workers_per_host / self.job.replicas)
    )

  def peer_seconds(self, stage_bytes: float) -> float:
    """Returns the same for a new host: all of it over the network."""
    return self._read_seconds(stage_bytes, 0.0)

  def _read_seconds(self, stage_bytes: float, local_share: float) -> float:
    cluster = self.cluster
    rate = cluster.host_link_bytes_per_second * self.job.expert_devices
    # If a worker has several hosts, each reads its part.
    hosts = max(1.0, 1 / self.workers_per_host)
    # A host with workers of several stages reads for each of them.
    stages = max(1.0, self.workers_per_host / self.job.replicas)
    remote = stage_bytes * (1 - local_share) * stages / hosts
    return stage_bytes / rate + remote / cluster.network_bytes_per_second

  @property
  def storage_seconds(self) -> float:
    """Seconds to move the whole state to or from the durable store."""
    return self.state_bytes / self.cluster.storage_bytes_per_second


@functools.cache
def _shares(experts: int, skew: float) -> tuple[float, ...]:
  weights = [1 / rank**skew for rank in range(1, experts + 1)]
  random.Random(experts).shuffle(weights)  # popular ones may be anywhere
  return tuple(w / sum(weights) for w in weights)


def expert_share(expert: int, experts: int, skew: float) -> float:
  """Returns an expert's share of all tokens' choices; see `TrainingJob`."""
  return _shares(experts, skew)[expert]


def of(cluster: cluster_lib.Cluster, job: cluster_lib.TrainingJob) -> Costs:
  """Reckons the costs of a job on a cluster.

  Raises:
    errors.ConfigError: the model cannot be cut so.
  """
  model = job.config()
  specs = stages_lib.cut(model, job.stages)
  run = run_settings.RunConfig(
    preset='',
    model=model,
    train=config.TrainConfig(
      stages=job.stages,
      replicas=job.replicas,
      local_devices=job.expert_devices,
      microbatches=job.microbatches,
      # Sizes do not depend on it, but it must divide.
      microbatch_size=job.expert_devices,
    ),
  )
  known: dict[tuple[bool, ...], planner.StageSizes] = {}
  sizes = []
  for index, spec in enumerate(specs):
    kinds = tuple(
      model.is_moe(i) for i in range(spec.first_layer, spec.last_layer)
    )
    key = (*kinds, spec.has_embedding, spec.has_head)
    if key not in known:
      parts = stage_lib.layout_of(
        transformer_job.of(run).declare_stage(index), has_devices=False
      )
      known[key] = job_lib.stage_sizes(parts, job.expert_devices)
    sizes.append(known[key])
  tokens = job.sequences * model.sequence_length
  activations = tokens // job.replicas * model.model_dim * _ACTIVATION_BYTES
  parameters = max(sum(s.state_bytes.values()) for s in sizes) / _STATE_BYTES
  network = network_bytes(cluster, job, activations, parameters)
  network += _exchange_bytes(cluster, job, model, specs, tokens)
  flops = _multiplications(model) * _FLOPS_PER_MULTIPLICATION * _PASSES * tokens
  seconds = flops / (job.gpus * cluster.flops_per_second * cluster.utilization)
  inner = min(job.stages - 1, 2)
  return Costs(
    cluster=cluster,
    job=job,
    iteration_seconds=job.iteration_seconds
    or max(seconds, network / cluster.network_bytes_per_second),
    tokens=tokens,
    stages=tuple(sizes),
    compute=tuple(
      {o: _operator_compute(o, n, model, job) for o, n in s.state_bytes.items()}
      for s in sizes
    ),
    network_bytes=network,
    log_bytes=inner * activations,
  )


def network_bytes(
  cluster: cluster_lib.Cluster,
  job: cluster_lib.TrainingJob,
  activations: float,
  stage_parameters: float,
) -> float:
  """Returns the bytes that the busiest host sends in an iteration.

  Counts pipeline and gradients. Activations and gradients between stages go to
  another host where the worker of the next or the previous stage is on one.
  Gradients are summed within hosts first, then in a ring of the hosts that a
  stage is on.
  """
  per_host, devices = cluster.gpus_per_host, job.expert_devices
  sent: dict[int, float] = {}
  for worker in range(job.stages * job.replicas):
    host = worker * devices // per_host
    for other in (worker - job.replicas, worker + job.replicas):
      if 0 <= other < job.stages * job.replicas:
        if other * devices // per_host != host:
          sent[host] = sent.get(host, 0.0) + activations
  hosts = job.replicas * devices / per_host
  ring = 0.0
  if job.replicas > 1 and hosts > 1:
    part = min(1.0, per_host / devices)
    ring = 2 * (hosts - 1) / hosts * stage_parameters * _GRADIENT_BYTES * part
  several = max(1.0, devices / per_host)
  return max(sent.values(), default=0.0) / several + ring


def _exchange_bytes(
  cluster: cluster_lib.Cluster,
  job: cluster_lib.TrainingJob,
  model: model_config.ModelConfig,
  specs: tuple[transformer.StageSpec, ...],
  tokens: int,
) -> float:
  """Returns the bytes a host sends to bring tokens to other hosts' experts."""
  hosts = job.expert_devices / cluster.gpus_per_host
  if hosts <= 1:
    return 0.0
  layers = max(
    sum(model.is_moe(i) for i in range(s.first_layer, s.last_layer))
    for s in specs
  )
  # There and back, forward and backward.
  routed = tokens / job.replicas * model.experts_per_token * model.model_dim
  moved = 4 * routed * _ACTIVATION_BYTES * layers
  return moved * (1 - 1 / hosts) / hosts


def _multiplications(model: model_config.ModelConfig) -> float:
  """Returns multiplications per token and forward pass, without empty seats."""
  full = dataclasses.replace(model, capacity_factor=1.0)
  layers = sum(stages_lib.layer_cost(full, i) for i in range(model.num_layers))
  return layers + model.model_dim * model.vocab_size


def _operator_compute(
  operator: keys.OperatorId,
  state_bytes: int,
  model: model_config.ModelConfig,
  job: cluster_lib.TrainingJob,
) -> float:
  """Returns an operator's multiplications per token of the job."""
  parameters = state_bytes / _STATE_BYTES
  if operator.group == 'embedding':
    return 0.0  # a lookup
  if operator.expert < 0:
    return parameters
  share = expert_share(operator.expert, model.num_experts, job.popularity_skew)
  return parameters * model.experts_per_token * share


def slot_choice(
  costs: Costs,
  order: str,
  budget: window.CopyBudget,
  *,
  pinned_length: int | None = None,
  pinned_mode: str | None = None,
) -> window.WindowChoice:
  """Chooses the window of a job: the longest that one of its stages wants."""
  errors.check_known('order', order, popularity.ORDERS)
  choices = []
  for stage in costs.distinct_stages:
    choices.append(
      window.choose_window(
        costs.operators(order, stage),
        budget,
        pinned_length=pinned_length,
        pinned_mode=pinned_mode,
      )
    )
  return window.longest(choices)
