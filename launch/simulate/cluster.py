"""A cluster and its jobs, from a table in which every entry has its source.

A table is JSON: `{"cluster": {FIELD: ENTRY, ...}, "jobs": {NAME: {FIELD: ENTRY,
...}, ...}}`, and an entry is `{"value": ..., "source": "..."}`. Those that come
with the program are in `launch/simulate/clusters`.
"""

from __future__ import annotations

import dataclasses
import json
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from models import config as model_config, presets
from moetion_jax import errors

_FOLDER = pathlib.Path(__file__).parent / 'clusters'


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cluster:
  """Machines and their failures.

  Attributes:
    gpus_per_host: GPUs of one host.
    host_link_bytes_per_second: bandwidth of one GPU, to or from its host's
      memory.
    gpu_link_bytes_per_second: bandwidth of one GPU, to others of its host.
    network_bytes_per_second: bandwidth of one host, in each direction.
    storage_bytes_per_second: bandwidth of the durable store, for the whole job.
    flops_per_second: peak of one GPU.
    utilization: share of that peak in training, the pipeline's bubble included.
    mtbf_seconds: mean time between failures of the whole job.
    host_failure_share: share of failures that take a whole host along.
    hardware_failure_share: share of failures after which a host is repaired.
    spare_hosts: number of hosts that stand by.
    repair_seconds: seconds to repair a host.
    detect_seconds: seconds from a death until it is known.
    start_seconds: seconds from then until what died is replaced and can read.
  """

  gpus_per_host: int
  host_link_bytes_per_second: float
  gpu_link_bytes_per_second: float
  network_bytes_per_second: float
  storage_bytes_per_second: float
  flops_per_second: float
  utilization: float
  mtbf_seconds: float
  host_failure_share: float
  hardware_failure_share: float
  spare_hosts: int
  repair_seconds: float
  detect_seconds: float
  start_seconds: float


_MAY_BE_ZERO = (
  'host_failure_share',
  'hardware_failure_share',
  'spare_hosts',
  'detect_seconds',
  'start_seconds',
  'iteration_seconds',
)
_SHARES = ('utilization', 'host_failure_share', 'hardware_failure_share')


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingJob:
  """A model and how it is spread over a cluster.

  Attributes:
    model: a preset, or fields of `models/config.py` with 'preset' among them.
    stages: stages of the pipeline.
    replicas: workers of each stage.
    expert_devices: GPUs of one worker.
    microbatches: microbatches of one replica in an iteration.
    microbatch_sequences: sequences of one microbatch.
    iteration_seconds: measured seconds; 0 to reckon them from the model.
    popularity_skew: the expert of rank r gets tokens in proportion to
      1 / r**popularity_skew.
  """

  model: str | Mapping[str, Any]
  stages: int
  replicas: int
  expert_devices: int
  microbatches: int
  microbatch_sequences: int
  iteration_seconds: float
  popularity_skew: float = 0.0

  @property
  def gpus(self) -> int:
    """Number of GPUs that train."""
    return self.stages * self.replicas * self.expert_devices

  @property
  def sequences(self) -> int:
    """Number of sequences in an iteration, all replicas together."""
    return self.replicas * self.microbatches * self.microbatch_sequences

  def config(self) -> model_config.ModelConfig:
    """Returns the model's shape."""
    if isinstance(self.model, str):
      return presets.get(self.model)
    fields = dict(self.model)
    preset = presets.get(fields.pop('preset'))
    return dataclasses.replace(preset, **fields)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Table:
  """The content of a table.

  Attributes:
    cluster: the machines.
    jobs: jobs by name, in the order of the file.
    sources: source of every entry, by 'cluster/FIELD' or 'jobs/NAME/FIELD'.
  """

  cluster: Cluster
  jobs: Mapping[str, TrainingJob]
  sources: Mapping[str, str]


def names() -> list[str]:
  """Returns the names of the tables that come with the program."""
  return sorted(path.stem for path in _FOLDER.glob('*.json'))


def load(name: str) -> Table:
  """Reads a table.

  Args:
    name: name of one that comes with the program, or the path of another.

  Raises:
    errors.ConfigError: the table is not there or not as it should be.
  """
  path = _FOLDER / f'{name}.json' if name in names() else pathlib.Path(name)
  try:
    value = json.loads(path.read_text())
  except OSError as e:
    reason = f'{e.strerror}; known are {", ".join(names())}, or give a path'
    raise errors.ConfigError('cluster', name, reason) from None
  except ValueError as e:
    raise errors.ConfigError('cluster', name, f'no JSON: {e}') from None
  try:
    return parse(value)
  except ValueError as e:
    raise errors.ConfigError('cluster', name, str(e)) from None


def parse(value: Any) -> Table:
  """Makes a table from its JSON value.

  Raises:
    ValueError: a field is missing, unknown, out of range or without source.
  """
  if not isinstance(value, dict) or value.keys() != {'cluster', 'jobs'}:
    raise ValueError('a table has a "cluster" and "jobs"')
  sources: dict[str, str] = {}
  cluster = _fields(Cluster, value['cluster'], 'cluster', sources)
  jobs = {
    name: _fields(TrainingJob, fields, f'jobs/{name}', sources)
    for name, fields in value['jobs'].items()
  }
  if not jobs:
    raise ValueError('a table has a job at least')
  for name, job in jobs.items():
    try:
      experts = job.config().num_experts
    except (errors.ConfigError, TypeError, KeyError) as e:
      raise ValueError(f'jobs/{name}/model: {e}') from None
    if experts % job.expert_devices:
      raise ValueError(
        f'jobs/{name}/expert_devices must divide the {experts} experts'
      )
  return Table(cluster=cluster, jobs=jobs, sources=sources)


def _fields(kind: type, value: Any, where: str, sources: dict[str, str]) -> Any:
  """Makes a dataclass from its entries, and adds their sources."""
  if not isinstance(value, dict):
    raise ValueError(f'{where} is no object')
  known = {f.name: f for f in dataclasses.fields(kind)}
  needed = {n for n, f in known.items() if f.default is dataclasses.MISSING}
  if unknown := value.keys() - known.keys():
    raise ValueError(f'{where} has the unknown {", ".join(sorted(unknown))}')
  if missing := needed - value.keys():
    raise ValueError(f'{where} lacks {", ".join(sorted(missing))}')
  out = {}
  for name, entry in value.items():
    if not isinstance(entry, dict) or entry.keys() != {'value', 'source'}:
      raise ValueError(f'{where}/{name} needs a value and a source, no more')
    source = entry['source']
    if not isinstance(source, str) or not source.strip():
      raise ValueError(f'{where}/{name} has no source')
    sources[f'{where}/{name}'] = source
    out[name] = entry['value']
    if name != 'model':
      _check(f'{where}/{name}', name, entry['value'], known[name].type)
  return kind(**out)


def _check(where: str, name: str, value: Any, kind: Any) -> None:
  if isinstance(value, bool) or not isinstance(value, int | float):
    raise ValueError(f'{where} is no number')
  if kind == 'int' and value != int(value):
    raise ValueError(f'{where} is no whole number')
  least = 0 if name in _MAY_BE_ZERO or name == 'popularity_skew' else None
  if not math.isfinite(value) or value < 0 or (least is None and value == 0):
    raise ValueError(f'{where} is out of range')
  if name in _SHARES and value > 1:
    raise ValueError(f'{where} is more than 1')


def override(table: Table, job: str, changes: Sequence[str]) -> Table:
  """Returns a table with other numbers in place.

  Args:
    table: the table as it was read.
    job: the job whose fields are meant, where the cluster has no such field.
    changes: settings FIELD=VALUE; their source is then the flag.

  Raises:
    errors.ConfigError: there is no such field or value.
  """
  sources = dict(table.sources)
  for change in changes:
    name, _, text = change.partition('=')
    kind = Cluster if name in vars(table.cluster) else TrainingJob
    where = 'cluster' if kind is Cluster else f'jobs/{job}'
    known = {f.name: f.type for f in dataclasses.fields(kind)}
    if name not in known or name == 'model':
      raise errors.ConfigError('set', change, 'FIELD=VALUE of cluster or job')
    try:
      number = float(text)
      _check(f'{where}/{name}', name, number, known[name])
    except ValueError as e:
      raise errors.ConfigError('set', change, str(e)) from None
    value = int(number) if known[name] == 'int' else number
    sources[f'{where}/{name}'] = f'--set={change}'
    if kind is Cluster:
      cluster = dataclasses.replace(table.cluster, **{name: value})
      table = dataclasses.replace(table, cluster=cluster)
    else:
      changed = dataclasses.replace(table.jobs[job], **{name: value})
      table = dataclasses.replace(table, jobs={**table.jobs, job: changed})
  return dataclasses.replace(table, sources=sources)
