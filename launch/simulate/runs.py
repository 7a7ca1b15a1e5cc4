"""Simulates runs of a job under a policy, with random or given failures.

A run with seed n meets the same failures under every policy.
"""

from __future__ import annotations

import dataclasses
import json
import math
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from launch.simulate import (
  cluster as cluster_lib,
  core,
  costs as costs_lib,
  policies,
  world as world_lib,
)
from moetion_jax import errors

_INTERVAL = 1.96  # this many standard errors to either side hold 95 %
COLUMNS = (
  ('ettr', 'ETTR', '{:.4f}'),
  ('overhead', 'overhead', '{:.2%}'),
  ('recovery_seconds', 'recovery s', '{:,.0f}'),
  ('failures', 'failures', '{:.1f}'),
  ('replayed_iterations', 'replayed', '{:,.0f}'),
  ('waited_for_repair_seconds', 'no spare s', '{:,.0f}'),
  ('lost_tokens', 'lost tokens', '{:.3g}'),
  ('iterations', 'iterations', '{:,.0f}'),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Study:
  """Runs of one policy.

  Attributes:
    settings: the policy's settings.
    method: the method made from them.
    results: one result for each seed.
  """

  settings: policies.PolicySettings
  method: world_lib.Method
  results: tuple[core.Result, ...]

  def mean(self, name: str) -> float:
    """Returns the mean of a figure of the results, over the seeds."""
    return float(np.mean([getattr(r, name) for r in self.results]))

  def error(self, name: str) -> float:
    """Returns half the 95 % interval of that mean; 0 with one seed."""
    values = [getattr(r, name) for r in self.results]
    if len(values) < 2:
      return 0.0
    return _INTERVAL * float(np.std(values, ddof=1)) / math.sqrt(len(values))

  def to_json(self) -> dict[str, Any]:
    """Returns settings, means with intervals, and the first run's curve."""
    return {
      'label': self.method.label,
      'settings': dataclasses.asdict(self.settings),
      'seeds': len(self.results),
      'figures': {
        name: {'mean': self.mean(name), 'interval': self.error(name)}
        for name, _, _ in COLUMNS
      },
      'curve': self.results[0].curve,
    }


def study(
  costs: costs_lib.Costs,
  settings: policies.PolicySettings,
  *,
  horizon_seconds: float,
  seeds: int = 1,
  count: int | None = None,
  trace: Sequence[tuple[float, world_lib.Failure]] | None = None,
  on_no_spare: str = world_lib.WAIT,
  method: world_lib.Method | None = None,
) -> Study:
  """Simulates a policy on a cluster.

  Args:
    costs: the job's costs on the cluster.
    settings: the policy's settings.
    horizon_seconds: length of every run.
    seeds: number of runs, each with failures of its own.
    count: number of failures in every run, at random moments; None for a
      Poisson process of the cluster's MTBF.
    trace: the failures instead; every seed meets the same.
    on_no_spare: see `world.World`.
    method: a method in place of that of the settings.
  """
  cluster = costs.cluster
  world = policies.world(cluster, costs.job, settings, on_no_spare=on_no_spare)
  method = method or policies.make(costs, settings)
  results = []
  for seed in range(seeds):
    source = np.random.default_rng(seed)
    if trace is not None:
      failures: world_lib.Failures = trace
    elif count is not None:
      failures = _counted(source, world, cluster, count, horizon_seconds)
    else:
      failures = world_lib.poisson(
        source,
        world,
        mtbf_seconds=cluster.mtbf_seconds,
        host_share=cluster.host_failure_share,
        hardware_share=cluster.hardware_failure_share,
      )
    results.append(
      core.simulate(method, world, failures, horizon_seconds=horizon_seconds)
    )
  return Study(settings=settings, method=method, results=tuple(results))


def _counted(
  source: np.random.Generator,
  world: world_lib.World,
  cluster: cluster_lib.Cluster,
  count: int,
  horizon_seconds: float,
) -> Iterator[tuple[float, world_lib.Failure]]:
  """Yields `count` failures at moments that are all equally likely."""
  for seconds in np.sort(source.uniform(0, horizon_seconds, count)):
    yield (
      float(seconds),
      world_lib.draw(
        source,
        world,
        cluster.host_failure_share,
        cluster.hardware_failure_share,
      ),
    )


def read_trace(path: str, gpus: int) -> list[tuple[float, world_lib.Failure]]:
  """Reads failures from a file.

  Args:
    path: path of a JSON array; an element is the seconds since the run began,
      or an object with `seconds` and, if they differ, `gpu` (0), `whole_host`
      (false) and `needs_spare` (false).
    gpus: number of GPUs of the job.

  Raises:
    errors.ConfigError: the file is not there or not as it should be.
  """
  try:
    value = json.loads(pathlib.Path(path).read_text())
    out = []
    for entry in value:
      fields = dict(entry) if isinstance(entry, dict) else {'seconds': entry}
      seconds = float(fields.pop('seconds'))
      failure = world_lib.Failure(**{'gpu': 0, **fields})
      if seconds < 0 or not 0 <= failure.gpu < gpus:
        raise ValueError(f'out of range: {entry}')
      out.append((seconds, failure))
  except (OSError, ValueError, TypeError, KeyError) as e:
    raise errors.ConfigError('trace', path, str(e)) from None
  return sorted(out, key=lambda x: x[0])


def table(title: str, studies: Sequence[Study]) -> Any:
  """Returns a table of the studies' figures, for people."""
  import rich.table

  made = rich.table.Table(title=title)
  made.add_column('policy')
  for _, label, _ in COLUMNS:
    made.add_column(label, justify='right')
  for one in studies:
    cells = [text.format(one.mean(name)) for name, _, text in COLUMNS]
    if error := one.error('ettr'):
      cells[0] += f' ± {error:.4f}'
    made.add_row(one.method.label, *cells)
  return made


def plot(path: pathlib.Path, studies: Sequence[Study]) -> None:
  """Plots iterations over time of every policy's first run, as PNG."""
  import matplotlib

  matplotlib.use('Agg')
  from matplotlib import pyplot

  figure, axes = pyplot.subplots(figsize=(8, 5))
  for one in studies:
    seconds, iterations = zip(*one.results[0].curve, strict=True)
    axes.plot([s / 3600 for s in seconds], iterations, label=one.method.label)
  axes.set_xlabel('hours')
  axes.set_ylabel('iterations done')
  axes.legend()
  figure.tight_layout()
  figure.savefig(path, dpi=120)
  pyplot.close(figure)


def inputs(table: cluster_lib.Table, job: str) -> Mapping[str, Any]:
  """Returns all numbers that went in, each with its source."""
  values = {
    **{f'cluster/{n}': v for n, v in vars(table.cluster).items()},
    **{f'jobs/{job}/{n}': v for n, v in vars(table.jobs[job]).items()},
  }
  return {
    name: {'value': value, 'source': table.sources[name]}
    for name, value in values.items()
    if name in table.sources
  }
