"""Experts that take more tokens than usual for some iterations."""

import dataclasses

import numpy as np
import pytest

from launch.lm import transformer_job
from moetion_jax.recovery import orders
from moetion_jax.runtime.worker import extra_capacity
from moetion_jax.training import worker as worker_lib
from tests.support import helpers, one_process

pytestmark = pytest.mark.thorough

GO = orders.Go(
  start=0,
  complete_at=0,
  newest=0,
  target=0,
  replays_until=0,
  line=0,
  is_fresh=True,
  ring_bytes=0,
  cells=0,
  pool_files=0,
  pool_bytes=0,
  decisions=(),
)


def _programs(stage):
  return extra_capacity.compile_programs(stage, lambda name: None)


def _train(config, factor=None, until=0):
  """(reports, iterations in which capacities had grown) of one stage."""
  (worker,) = one_process.make_workers(config)
  grown = []
  if factor is not None:
    programs = _programs(worker.stage)
    forward = programs['forward']

    def noted(compute, inputs, position):
      grown.append(int(position.iteration))
      return forward(compute, inputs, position)

    groups = worker.stage.whole.partition.stacked_groups
    worker.grown = worker_lib.GrownCapacity(
      forward=noted,
      backward=programs['backward'],
      factors=np.full(
        (len(groups), config.model.num_experts), factor, np.float32
      ),
      until=until,
    )
  reports = []
  one_process.train(config, [worker], lambda r: reports.append(r[0]))
  return reports, grown


@pytest.fixture(scope='module')
def config():
  return helpers.micro_run(
    model={'capacity_factor': 0.75}, iterations=3, eval_every=0
  )


@pytest.fixture(scope='module')
def usual(config):
  return _train(config)[0]


def test_they_drop_fewer_tokens_until_then(config, usual):
  reports, grown = _train(config, 2.0, until=2)
  assert grown == [1] * 4 + [2] * 4
  first, *_ = usual
  # Half as many slots again as there are choices, beside three quarters.
  assert first.dropped > 2 * reports[0].dropped
  assert reports[2].dropped > 2 * reports[1].dropped


def test_a_factor_of_one_is_the_usual_capacity(config, usual):
  reports, grown = _train(config, 1.0, until=1)
  assert grown == [1] * 4
  assert reports[0].dropped == usual[0].dropped > 0
  assert reports[0].load == usual[0].load
  # The same sums, in programs of other shapes.
  assert reports[0].loss == pytest.approx(usual[0].loss, rel=1e-3)


def test_what_a_worker_is_told(config):
  stages = dataclasses.replace(
    config, train=dataclasses.replace(config.train, stages=2)
  )
  stage = transformer_job.of(stages).build_stage(1)
  programs = _programs(stage)
  group, *others = stage.whole.partition.stacked_groups
  go = dataclasses.replace(
    GO, capacity=((group, 1, 1.5), (group, 0, 1.25)), capacity_until=7
  )
  grown = extra_capacity.make(go, stage, programs)
  assert grown is not None and grown.until == 7
  experts = config.model.num_experts
  assert grown.factors.tolist() == [
    [1.25, 1.5] + [1.0] * (experts - 2),
    *([1.0] * experts for _ in others),
  ]
  assert extra_capacity.make(GO, stage, programs) is None


def test_a_stage_without_experts_has_nothing_to_grow(config):
  stages = dataclasses.replace(
    config,
    model=dataclasses.replace(config.model, first_dense_layers=1),
    train=dataclasses.replace(config.train, stages=config.model.num_layers),
  )
  stage = transformer_job.of(stages).build_stage(0)
  assert not stage.whole.partition.stacked_groups
  assert _programs(stage) == {}
