import dataclasses
from typing import Any

import numpy as np
import pytest

from launch.lm import transformer_job
from moetion_jax import errors
from tests.support import helpers, one_process


class _Poisoned:
  """Data whose embedding rows the test has made NaN in one iteration."""

  def __init__(self, data, iteration):
    self._data = data
    self._iteration = iteration

  def fingerprint(self):
    return self._data.fingerprint()

  def held_out_batch(self, index):
    return self._data.held_out_batch(index)

  def batch(self, iteration, microbatch):
    batch = self._data.batch(iteration, microbatch)
    if iteration != self._iteration:
      return batch._replace(inputs=np.minimum(batch.inputs, 127))
    return batch._replace(inputs=np.full_like(batch.inputs, 255))


def _poison(config, iteration):
  """Workers whose model meets a NaN in `iteration` and in no other one."""
  data = _Poisoned(transformer_job.of(config).data(), iteration)
  workers = one_process.make_workers(config, data)
  first = workers[0]
  state: dict[str, dict[str, Any]] = {
    g: dict(leaves) for g, leaves in first.state.items()
  }
  name = 'master/embedding/table'
  table = np.array(state['embedding'][name])
  table[255] = np.nan
  state['embedding'][name] = table
  first.state = first.stage.place_state(state)
  first.compute = first.programs.compute_of(first.state)
  return workers


@pytest.mark.parametrize('stages', [1, 2])
def test_a_nan_ends_the_run_and_names_iteration_and_stage(stages):
  config = helpers.micro_run(stages=stages, eval_every=0)
  workers = _poison(config, 3)
  seen = []
  with pytest.raises(errors.NonFiniteError, match='iteration 3.*stage 0') as e:
    one_process.train(config, workers, lambda r: seen.append(r[-1].iteration))
  # It is given where no damage explains the NaN.
  assert '--skip_nonfinite' in e.value.advice
  assert '--skip_nonfinite' not in e.value.what
  assert str(e.value) == f'{e.value.what}; {e.value.advice}'
  assert seen == [1, 2]


def test_skip_nonfinite_leaves_the_update_out():
  config = helpers.micro_run(eval_every=0, skip_nonfinite=True)
  workers = _poison(config, 2)
  reports = []
  one_process.train(config, workers, lambda r: reports.append(r[0]))
  assert [r.updated for r in reports] == [True, False, True, True]
  assert np.isnan(reports[1].loss) and np.isfinite(reports[2].loss)
  for operator, value in reports[0].digests.items():
    np.testing.assert_array_equal(value, reports[1].digests[operator])


@pytest.mark.thorough
@pytest.mark.parametrize('stages', [1, 3])
def test_all_stages_stop_after_the_same_iteration(stages):
  config = helpers.micro_run(stages=stages, iterations=50, eval_every=0)
  workers = one_process.make_workers(config)
  seen = []
  last = one_process.train(
    config,
    workers,
    lambda r: seen.append(r[-1].iteration),
    stop=lambda: len(seen) >= 2,
  )
  assert seen == list(range(1, last + 1))
  assert 2 <= last < 50


def test_an_error_of_the_caller_ends_all_stages():
  config = helpers.micro_run(stages=2, iterations=50, eval_every=0)
  workers = one_process.make_workers(config)

  def fail(_):
    raise KeyError('disk is gone')

  with pytest.raises(KeyError, match='disk is gone'):
    one_process.train(config, workers, fail)


def test_evaluation_is_of_the_state_after_the_update():
  config = helpers.micro_run(iterations=2, eval_every=1)
  (reports, (end,)) = helpers.train_locally(config)
  assert all(r[0].eval_loss is not None for r in reports)
  data = transformer_job.of(config).data()
  from moetion_jax.state import model

  losses = []
  for m in range(config.train.eval_microbatches):
    batch = data.held_out_batch(m)
    losses.append(
      end.programs.evaluate(
        end.compute, model.Inputs(batch.inputs, batch.labels)
      )
    )
  assert reports[-1][0].eval_loss == float(
    np.mean([np.float32(x) for x in losses], dtype=np.float32)
  )


@pytest.mark.thorough
def test_evaluation_changes_nothing():
  often, _ = helpers.train_locally(helpers.micro_run(eval_every=1))
  never, _ = helpers.train_locally(helpers.micro_run(eval_every=0))
  for a, b in zip(often, never, strict=True):
    assert a[0].loss.hex() == b[0].loss.hex()
    assert b[0].eval_loss is None


@pytest.mark.thorough
def test_clipping_bounds_the_step():
  free = helpers.micro_run(
    iterations=1, eval_every=0, optimizer={'optimizer': 'sgd'}
  )
  tight = dataclasses.replace(
    free,
    train=dataclasses.replace(
      free.train,
      optimizer=dataclasses.replace(free.train.optimizer, clip_norm=1e-9),
    ),
  )
  (_, (moved,)) = helpers.train_locally(free)
  (_, (held,)) = helpers.train_locally(tight)
  start = held.stage.initial_state()
  name = 'master/head/table'

  def step(w):
    return np.abs(
      np.asarray(w.state['head'][name]) - np.asarray(start['head'][name])
    ).max()

  decay = np.abs(np.asarray(start['head'][name])).max()
  assert step(moved) > 1e-4
  assert step(held) < 0.01 * decay
