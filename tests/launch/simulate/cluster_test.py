"""Tables with sources, costs of jobs on clusters, and the command."""

import copy
import dataclasses
import json
import pathlib
import subprocess
import sys
import time
from typing import Any

import numpy as np
import pytest

from launch.simulate import (
  cluster,
  costs as costs_lib,
  methods,
  paper as paper_lib,
  policies,
  runs as simulate_runs,
  world,
)
from moetion_jax import errors
from moetion_jax.policies import intervals, window
from moetion_jax.policies.kinds import registry
from tests.support import helpers

ROOT = pathlib.Path(__file__).resolve().parents[3]


@pytest.fixture(scope='module')
def paper() -> cluster.Table:
  return cluster.load('paper')


@pytest.fixture(scope='module')
def deepseek(paper) -> costs_lib.Costs:
  return costs_lib.of(paper.cluster, paper.jobs['deepseek_moe'])


def raw(name: str = 'paper') -> dict:
  path = ROOT / 'launch' / 'simulate' / 'clusters' / f'{name}.json'
  return json.loads(path.read_text())


@pytest.mark.parametrize('name', ['paper', 'large', 'this_machine'])
def test_every_number_of_a_table_has_its_source(name):
  assert name in cluster.names()
  table = cluster.load(name)
  fields = {f.name for f in dataclasses.fields(cluster.Cluster)}
  wanted = {f'cluster/{f}' for f in fields}
  for job in table.jobs:
    wanted |= {
      f'jobs/{job}/{f.name}' for f in dataclasses.fields(cluster.TrainingJob)
    }
  assert table.sources.keys() == wanted
  for source in table.sources.values():
    # Said where it is from, or that it is assumed.
    assert source.split(':')[0] and len(source) > 8


def test_the_tables_are_those_of_the_issue(paper):
  assert {job.gpus for job in paper.jobs.values()} == {96}
  assert paper.cluster.gpus_per_host * 12 == 96
  (large,) = cluster.load('large').jobs.values()
  assert (large.gpus, large.stages) == (16384, 64)
  count = helpers.num_parameters(large.config())
  assert count == pytest.approx(671e9, rel=0.01)


def change(where: str, value) -> dict:
  """The paper's table with one entry replaced; None removes it."""
  table = copy.deepcopy(raw())
  *path, last = where.split('/')
  inner = table
  for name in path:
    inner = inner[name]
  if value is None:
    del inner[last]
  else:
    inner[last] = value
  return table


ENTRY = {'value': 1, 'source': 'here'}


@pytest.mark.parametrize(
  'where,value,message',
  [
    ('cluster/mtbf_seconds', {'value': 600}, 'value and a source'),
    ('cluster/mtbf_seconds', 600, 'value and a source'),
    ('cluster/mtbf_seconds', {'value': 600, 'source': ' '}, 'no source'),
    ('cluster/mtbf_seconds', {'value': -1, 'source': 'x'}, 'out of range'),
    ('cluster/mtbf_seconds', {'value': 0, 'source': 'x'}, 'out of range'),
    ('cluster/mtbf_seconds', {'value': 'x', 'source': 'x'}, 'no number'),
    ('cluster/mtbf_seconds', {'value': True, 'source': 'x'}, 'no number'),
    ('cluster/utilization', {'value': 1.5, 'source': 'x'}, 'more than 1'),
    ('cluster/gpus_per_host', {'value': 1.5, 'source': 'x'}, 'no whole'),
    ('cluster/spares', ENTRY, 'unknown spares'),
    ('cluster/spare_hosts', None, 'lacks spare_hosts'),
    ('jobs/gpt_moe/stages', None, 'lacks stages'),
    ('jobs/gpt_moe/expert_devices', {'value': 7, 'source': 'x'}, 'divide'),
    ('jobs/gpt_moe/model', {'value': 'x', 'source': 'x'}, 'model'),
    ('jobs', {}, 'a job at least'),
    ('more', {}, '"cluster" and "jobs"'),
  ],
)
def test_a_table_that_is_not_as_it_should_be(where, value, message, tmp_path):
  table = change(where, value)
  with pytest.raises(ValueError, match=message):
    cluster.parse(table)
  path = tmp_path / 'mine.json'
  path.write_text(json.dumps(table))
  with pytest.raises(errors.ConfigError, match=message):
    cluster.load(str(path))


def test_overrides_name_their_source(paper):
  table = cluster.override(paper, 'gpt_moe', ['mtbf_seconds=60', 'stages=6'])
  assert table.cluster.mtbf_seconds == 60
  assert table.jobs['gpt_moe'].stages == 6
  assert table.jobs['qwen_moe'] == paper.jobs['qwen_moe']
  assert table.sources['cluster/mtbf_seconds'] == '--set=mtbf_seconds=60'
  for wrong in ('x=1', 'model=tiny', 'stages=1.5', 'stages', 'utilization=2'):
    with pytest.raises(errors.ConfigError, match='set'):
      cluster.override(paper, 'gpt_moe', [wrong])


def test_bytes_and_seconds_of_deepseek(paper, deepseek):
  model = deepseek.job.config()
  parameters = helpers.num_parameters(model)
  # 12 bytes a parameter, and a few counters.
  assert deepseek.state_bytes == pytest.approx(12 * parameters, rel=1e-3)
  tokens = 512 * 2048
  assert deepseek.tokens == tokens
  # 6 FLOP a token and active parameter, attention and the head besides.
  active = helpers.num_parameters(model, active=True)
  seconds = 6 * active * tokens / (96 * 312e12 * 0.3)
  assert deepseek.iteration_seconds == pytest.approx(seconds, rel=0.15)
  # A host is a stage: it sends activations on and gradients back.
  sent = 2 * tokens * model.model_dim * 2
  assert deepseek.network_bytes == deepseek.log_bytes == sent
  assert deepseek.storage_seconds == deepseek.state_bytes / 5e9


@pytest.mark.parametrize(
  'job,expected',
  [
    # Four stages a host: only the outer ones send over the network.
    ({'stages': 12, 'replicas': 1, 'expert_devices': 2}, 2 * 10),
    # Two hosts in all: each has one neighbour.
    ({'stages': 2, 'replicas': 1, 'expert_devices': 8}, 10),
    # A stage of two hosts, each a whole replica: gradients go round, 4 bytes.
    ({'stages': 1, 'replicas': 2, 'expert_devices': 8}, 2 * 0.5 * 4 * 100),
    # Both of a stage's replicas on one host.
    ({'stages': 3, 'replicas': 2, 'expert_devices': 4}, 2 * 2 * 10),
    # A worker of two hosts sends half from each.
    ({'stages': 3, 'replicas': 1, 'expert_devices': 16}, 2 * 10 / 2),
  ],
)
def test_what_training_sends_from_a_host(paper, job, expected):
  job = dataclasses.replace(paper.jobs['gpt_moe'], **job)
  assert costs_lib.network_bytes(paper.cluster, job, 10, 100) == expected


def test_a_link_is_shared_with_training():
  link = costs_lib.NetworkLink(bytes_per_second=10.0, busy_bytes=6.0, copies=2)
  # In iterations of 1 s it has 4 bytes left, each sent twice.
  assert link.free_bytes_per_second(1.0) == 2.0
  assert link.seconds(2.0, 1, 1.0) == 1.0
  assert link.seconds(8.0, 1, 1.0) == pytest.approx((6 + 16) / 10)
  assert link.seconds(8.0, 4, 1.0) == 4.0


def test_methods_follow_the_systems_own_rules(deepseek):
  links = deepseek.links(peers=1, logs=False)
  budget = deepseek.budget(links, 1.0)
  seconds = deepseek.iteration_seconds
  free = (10e9 * seconds - deepseek.network_bytes) / seconds
  assert budget.bandwidth_bytes_per_second == pytest.approx(free)
  whole = max(sum(s.state_bytes.values()) for s in deepseek.stages)
  dense = policies.make(deepseek, policies.PolicySettings(policy='dense'))
  assert isinstance(dense, methods.Whole)
  assert dense.interval == intervals.dense_interval(
    state_bytes=whole,
    bandwidth_bytes_per_second=free,
    iteration_seconds=seconds,
  )
  assert dense.pace.overhead == 0
  assert dense.landing_seconds == pytest.approx(whole / free)
  every = policies.make(
    deepseek, policies.PolicySettings(policy='dense', interval=1)
  )
  assert every.pace.overhead == pytest.approx(
    (deepseek.network_bytes + whole) / 10e9 / seconds - 1
  )
  two_phase = policies.make(
    deepseek, policies.PolicySettings(policy='two_phase')
  )
  assert isinstance(two_phase, methods.Whole)
  assert (two_phase.interval - 1) * seconds < two_phase.landing_seconds
  assert two_phase.landing_seconds <= two_phase.interval * seconds
  sparse = policies.make(
    deepseek, policies.PolicySettings(window_mode='aligned')
  )
  assert isinstance(sparse, methods.Windowed)
  operators = deepseek.operators('static')
  chosen = window.choose_window(
    operators,
    deepseek.budget(deepseek.links(peers=1, logs=True), 1.0),
    pinned_mode='aligned',
  )
  assert sparse.decision.window_length >= chosen.window_length
  assert sparse.decision.slots == operators.slots(sparse.decision.window_length)
  assert sparse.pace.overhead <= 0.02
  # 16 microbatches alone, without the bubble of 11 further stages.
  assert sparse.replay_seconds == pytest.approx(seconds * 16 / (16 + 11))


@pytest.mark.parametrize(
  'job', ['moe_llava', 'gpt_moe', 'qwen_moe', 'deepseek_moe']
)
def test_auto_is_one_of_both_ways_of_replay(paper, job):
  costs = costs_lib.of(paper.cluster, paper.jobs[job])
  made = {
    replay: policies.make(costs, policies.PolicySettings(replay=replay))
    for replay in ('auto', 'updates', 'microbatches')
  }
  assert made.pop('auto') in made.values()
  recorded = made['updates']
  assert isinstance(recorded, methods.Windowed)
  assert recorded.decision.replay == 'updates'
  assert recorded.decision.every == 1
  gradients = costs.operators('static', replay='updates').rest_bytes
  state = costs.operators('static').state_bytes
  assert {state[o] // n for o, n in gradients.items()} == {3}
  bandwidth = costs.job.expert_devices * 25e9
  assert recorded.update_seconds == pytest.approx(
    (2 * sum(state.values()) + sum(gradients.values())) / bandwidth
  )


def test_no_aligned_window_has_records(paper):
  with pytest.raises(errors.ConfigError, match='--replay=updates'):
    policies.PolicySettings(replay='updates', window_mode='aligned')
  costs = costs_lib.of(paper.cluster, paper.jobs['deepseek_moe'])
  assert policies.make(
    costs, policies.PolicySettings(replay='auto', window_mode='aligned')
  ) == policies.make(costs, policies.PolicySettings(window_mode='aligned'))


def test_replicas_share_captures_and_read_each_others(paper):
  job = paper.jobs['qwen_moe']
  costs = costs_lib.of(paper.cluster, job)
  assert (job.replicas, job.expert_devices) == (2, 4)
  # Both replicas are on the stage's host: a restore reads memory, no network.
  assert costs.own_seconds(1e9) == pytest.approx(1e9 / (4 * 25e9))
  assert costs.peer_seconds(1e9) == pytest.approx(1e9 / 100e9 + 1e9 / 10e9)
  spread = dataclasses.replace(job, stages=6, replicas=4)
  costs = costs_lib.of(paper.cluster, spread)
  assert costs.own_seconds(1e9) == pytest.approx(1e9 / 100e9 + 0.5e9 / 10e9)


def test_skewed_popularity_and_settings_are_checked(paper):
  shares = [costs_lib.expert_share(e, 4, 1.0) for e in range(4)]
  assert sorted(shares, reverse=True) == pytest.approx(
    [12 / 25, 6 / 25, 4 / 25, 3 / 25]
  )
  for name, value in (
    ('policy', 'x'),
    ('order', 'x'),
    ('window_mode', 'x'),
    ('peers', -1),
  ):
    wrong: dict[str, Any] = {name: value}
    with pytest.raises(errors.ConfigError):
      policies.PolicySettings(**wrong)
  job = paper.jobs['gpt_moe']
  with pytest.raises(errors.ConfigError, match='peers'):
    policies.world(paper.cluster, job, policies.PolicySettings(peers=12))


def test_a_trace_and_counted_failures(deepseek, tmp_path):
  path = tmp_path / 'trace.json'
  path.write_text('[900, {"seconds": 100, "gpu": 9, "whole_host": true}]')
  trace = simulate_runs.read_trace(str(path), 96)
  assert trace == [
    (100.0, world.Failure(gpu=9, whole_host=True)),
    (900.0, world.Failure(gpu=0)),
  ]
  run: dict[str, Any] = {'horizon_seconds': 3600.0}
  one = simulate_runs.study(
    deepseek, policies.PolicySettings(), trace=trace, **run
  )
  assert [r.failures for r in one.results] == [2]
  many = simulate_runs.study(
    deepseek, policies.PolicySettings(), count=24, seeds=3, **run
  )
  assert [r.failures for r in many.results] == [24] * 3
  assert many.error('ettr') > 0 == one.error('ettr')
  for wrong in ('[-1]', '[{"gpu": 1}]', '[{"seconds": 1, "gpu": 96}]', '{'):
    path.write_text(wrong)
    with pytest.raises(errors.ConfigError, match='trace'):
      simulate_runs.read_trace(str(path), 96)


def test_a_week_of_16384_gpus_in_less_than_a_minute():
  days = 1  # of the seven
  begin = time.process_time()
  table = cluster.load('large')
  (job,) = table.jobs.values()
  costs = costs_lib.of(table.cluster, job)
  study = simulate_runs.study(
    costs, policies.PolicySettings(), horizon_seconds=days * 24 * 3600.0
  )
  assert time.process_time() - begin < 60 * days / 7
  (result,) = study.results
  assert 100 < result.failures < 190  # at an MTBF of 10 minutes
  assert result.iterations > 7_000


def test_differences_are_to_the_nearest_of_the_paper():
  assert paper_lib.difference([0.95, 0.96], 0.951, 0.964) == (
    pytest.approx(-0.001)
  )
  assert paper_lib.difference([0.96], 0.951, 0.964) == 0
  assert paper_lib.difference([0.9, 1.0], 0.95, 0.96) == (pytest.approx(-0.05))
  # An ETTR of 0.8 at an MTBF of 600 s: 150 s of every 750.
  assert paper_lib.lost_seconds(0.8, 600.0, 0.0) == pytest.approx(150)
  assert paper_lib.lost_seconds(0.8, 600.0, 0.25) == pytest.approx(0)


def test_the_papers_rows():
  rows = paper_lib.rows(1)
  assert len(rows) == len({row.name for row in rows}) >= 18
  for row in rows:
    assert row.why and all(np.isfinite(row.value)), row
  by_name = {row.name: row for row in rows}
  skipped = by_name['skipped weight gradients, conversion']
  assert -1 / 3 <= skipped.value[0] < 0


def test_the_command(tmp_path):
  out = tmp_path / 'out'
  command = [
      sys.executable, '-m', 'launch.simulate', '--cluster=this_machine',
      '--hours=0.2', '--seeds=2', f'--out={out}', '--set=detect_seconds=0.1',
    ]  # fmt: skip
  done = subprocess.run(
    command, cwd=ROOT, capture_output=True, text=True, timeout=240
  )
  assert done.returncode == 0, done.stderr
  result = json.loads((out / 'simulate.json').read_text())
  assert [p['settings']['policy'] for p in result['policies']] == list(
    [*registry.POLICIES]
  )
  figures = {p['settings']['policy']: p['figures'] for p in result['policies']}
  assert figures['none']['ettr']['mean'] < figures['sparse']['ettr']['mean'] < 1
  assert result['inputs']['cluster/detect_seconds'] == {
      'value': 0.1, 'source': '--set=detect_seconds=0.1',
    }  # fmt: skip
  assert (out / 'simulate.png').read_bytes()[:4] == b'\x89PNG'
  wrong = subprocess.run(
    [*command, '--job=x'], cwd=ROOT, capture_output=True, text=True, timeout=240
  )
  assert wrong.returncode == 2
  assert wrong.stderr.count('\n') == 1 and '--job=x' in wrong.stderr
