import chex
import jax
import numpy as np
import pytest
from jax import numpy as jnp

from launch.lm import transformer_job
from models import stages as stages_lib
from moetion_jax import report
from moetion_jax.state import model
from tests.support import helpers, one_process

_COMPILED = '/jax/core/compile/backend_compile_duration'


def _losses(config):
  reports, _ = helpers.train_locally(config)
  return np.array([r[-1].loss for r in reports])


def _initial_digests(config):
  merged = {}
  for index in range(config.train.stages):
    stage = transformer_job.of(config).build_stage(index)
    merged |= helpers.digests_of(stage, stage.initial_state())
  return merged


def _one_stage(config):
  """(worker, inputs of one microbatch) of a run of one stage."""
  data = transformer_job.of(config).data()
  (worker,) = one_process.make_workers(config, data)
  batch = data.batch(1, 0)
  return worker, model.Inputs(batch.inputs, batch.labels)


@pytest.fixture(scope='module')
def one_stage():
  """(config, worker, inputs of one microbatch)."""
  config = helpers.micro_run()
  return config, *_one_stage(config)


def _position(microbatch=0):
  return model.Position(np.uint32(1), np.array([microbatch], np.uint32))


def test_gradients_equal_those_of_a_plain_grad():
  """In fp32: in bf16 two programs may send a token to different experts."""
  config = helpers.micro_run(model={'compute_dtype': 'float32'})
  worker, inputs = _one_stage(config)
  programs, compute = worker.programs, worker.compute
  y, residuals, counts = programs.forward(compute, inputs, _position())
  _, acc = programs.backward(compute, residuals, y, programs.zeros())
  m = config.train.microbatches

  @jax.jit
  def plain(compute):
    def objective(c):
      out = worker.stage.model.forward(c, inputs, None)
      return out.objective / m

    return jax.grad(objective)(compute)

  expected = plain(compute)
  assert acc.keys() == expected.keys()
  for name, value in acc.items():
    ours = np.asarray(value)[0]
    theirs = np.asarray(expected[name])
    # Other programs: a few units in the last place of the largest entry.
    scale = np.abs(theirs).max() + 1e-9
    assert np.abs(ours - theirs).max() / scale < 1e-4, name
  assert counts['load'].sum() == inputs.x.size * 2 * 3  # top-2, 3 MoE layers


def test_accumulation_adds_in_fp32(one_stage):
  _, worker, inputs = one_stage
  programs, compute = worker.programs, worker.compute

  def once(acc):
    y, residuals, _ = programs.forward(compute, inputs, _position())
    return programs.backward(compute, residuals, y, acc)[1]

  single = jax.tree.map(np.array, once(programs.zeros()))
  double = once(once(programs.zeros()))
  chex.assert_trees_all_equal(
    jax.tree.map(np.asarray, double), jax.tree.map(lambda x: x + x, single)
  )
  assert all(x.dtype == np.float32 for x in single.values())


def test_residuals_hold_no_compute_weights(one_stage):
  _, worker, inputs = one_stage
  _, residuals, _ = worker.programs.forward(worker.compute, inputs, _position())
  weights = {np.asarray(w).tobytes() for w in worker.compute.values()}
  norms = {(32,)}  # scales of ones are cheap and may coincide
  for leaf in residuals:
    if leaf.shape[1:] not in norms:
      assert np.asarray(leaf).tobytes() not in weights
  # And none twice: a tensor used by several operations is kept once.
  big = [np.asarray(r).tobytes() for r in residuals if r.size > 4096]
  assert len(big) == len(set(big))


def test_update_is_in_place_and_compute_is_fresh():
  config = helpers.micro_run(iterations=3)
  workers = one_process.make_workers(config)
  (worker,) = workers

  def pointers(tree):
    return {x.unsafe_buffer_pointer() for x in jax.tree.leaves(tree)}

  before, compute = pointers(worker.state), worker.compute
  kept = jax.tree.map(np.array, compute)
  one_process.train(config, workers, lambda _: None)
  assert pointers(worker.state) == before
  assert not pointers(worker.state) & pointers(worker.compute)
  # The first compute weights were never donated: they can still be read.
  chex.assert_trees_all_equal(jax.tree.map(np.asarray, compute), kept)


def test_nothing_compiles_after_the_first_iteration():
  config = helpers.micro_run(iterations=6)
  workers = one_process.make_workers(config)
  compiled: list[str] = []

  def listen(event, *unused, **unused_too):
    if event == _COMPILED:
      compiled.append(event)

  after_first: list[int] = []
  jax.monitoring.register_event_duration_secs_listener(listen)
  try:
    jax.jit(lambda x: x * 3 + 1)(np.arange(5.0))  # the listener does hear
    assert compiled
    one_process.train(
      config, workers, lambda _: after_first.append(len(compiled))
    )
  finally:
    jax.monitoring.clear_event_listeners()
  assert len(after_first) == 6
  # Report i comes during iteration i + 1: nothing new since the first one.
  assert after_first[-1] == after_first[0]


def test_programs_are_traced_once():
  config = helpers.micro_run()
  stage = transformer_job.of(config).build_stage(0)
  for name in ('backward', 'reduce', 'update', 'digest'):
    function = getattr(stage.functions, name)
    setattr(stage.functions, name, chex.assert_max_traces(function, n=1))
  programs = stage.compile()
  state = stage.initial_state()
  for _ in range(3):
    programs.digest(state)
  chex.clear_trace_counter()


def test_selection_is_the_mask_of_the_slot(one_stage):
  config, _, inputs = one_stage
  (worker,) = one_process.make_workers(config)
  programs = worker.programs
  y, residuals, counts = programs.forward(worker.compute, inputs, _position())
  _, acc = programs.backward(worker.compute, residuals, y, programs.zeros())
  gradients, _ = programs.reduce(
    (acc,), ((counts,) * config.train.microbatches,)
  )
  slot = {
    g: np.arange(len(worker.stage.partition.operators_of(g))) % 2 == 1
    for g in worker.stage.partition.groups
  }
  _, _, selection = programs.update(
    worker.state, gradients, np.float32(1), slot
  )
  chex.assert_trees_all_equal(jax.device_get(selection), slot)


@pytest.mark.thorough
@pytest.mark.parametrize('stages', [2, 4])
def test_losses_of_a_cut_model(stages):
  whole = _losses(helpers.micro_run())
  cut = _losses(helpers.micro_run(stages=stages))
  np.testing.assert_allclose(cut, whole, rtol=1e-3)


@pytest.mark.thorough
@pytest.mark.parametrize('devices', [2, 4])
def test_losses_with_experts_over_devices(devices):
  whole = _losses(helpers.micro_run(model={'capacity_factor': 0.0}))
  spread = _losses(
    helpers.micro_run(model={'capacity_factor': 0.0}, local_devices=devices)
  )
  np.testing.assert_allclose(spread, whole, rtol=1e-3)


@pytest.mark.thorough
@pytest.mark.parametrize(
  ('stages', 'devices'), [(2, 1), (4, 1), (1, 2), (1, 4), (2, 4)]
)
def test_initial_digest_does_not_depend_on_the_cut(stages, devices):
  whole = _initial_digests(helpers.micro_run())
  cut = _initial_digests(
    helpers.micro_run(stages=stages, local_devices=devices)
  )
  chex.assert_trees_all_equal(cut, whole)
  assert report.combine(whole) == report.combine(cut)


@pytest.mark.thorough
@pytest.mark.parametrize('balance', ['loss', 'bias'])
@pytest.mark.parametrize('stages', [1, 2])
def test_the_same_run_twice(balance, stages):
  config = helpers.micro_run(
    model={'balance': balance, 'dropout_rate': 0.1}, stages=stages
  )
  first, _ = helpers.train_locally(config)
  second, _ = helpers.train_locally(config)
  for a, b in zip(first, second, strict=True):
    assert [r.loss.hex() for r in a] == [r.loss.hex() for r in b]
    for x, y in zip(a, b, strict=True):
      chex.assert_trees_all_equal(x.digests, y.digests)
      assert x.eval_loss == y.eval_loss


@pytest.mark.thorough
def test_bias_balancing_moves_biases_and_only_by_its_step():
  config = helpers.micro_run(
    model={'balance': 'bias', 'balance_rate': 0.125}, iterations=1
  )
  _, (worker,) = helpers.train_locally(config)
  for layer in (1, 2, 3):
    bias = np.asarray(
      worker.state[f'layers/{layer}'][f'master/layers/{layer}/router_bias']
    )
    assert set(np.abs(bias)) <= {0.0, 0.125}
    assert np.any(bias)


@pytest.mark.thorough
def test_remat_gives_the_same_losses():
  plain = _losses(helpers.micro_run())
  remat = _losses(helpers.micro_run(model={'remat': True}))
  np.testing.assert_allclose(remat, plain, rtol=1e-3)


def test_remat_keeps_less():
  def kept(remat):
    config = helpers.micro_run(model={'remat': remat})
    (worker,) = one_process.make_workers(config)
    batch = transformer_job.of(config).data().batch(1, 0)
    inputs = model.Inputs(batch.inputs, batch.labels)
    _, residuals, _ = worker.programs.forward(
      worker.compute, inputs, _position()
    )
    return sum(r.nbytes for r in residuals)

  assert kept(True) < kept(False) / 3


def test_place_state_is_the_state(one_stage):
  _, worker, _ = one_stage
  host = jax.tree.map(np.array, worker.stage.initial_state())
  placed = worker.stage.place_state(host)
  chex.assert_trees_all_equal(jax.tree.map(np.asarray, placed), host)


@pytest.mark.thorough
@pytest.mark.parametrize(
  'optimizer', ['adamw', 'lion', 'sgd', 'adafactor', 'muon']
)
def test_every_optimizer_lowers_the_loss(optimizer):
  rate = {'sgd': 0.3, 'lion': 1e-3, 'adafactor': 3e-2}.get(optimizer, 1e-2)
  config = helpers.micro_run(
    iterations=8,
    eval_every=0,
    optimizer={'optimizer': optimizer, 'learning_rate': rate},
  )
  losses = _losses(config)
  assert losses[-1] < losses[0] - 0.1
  assert np.all(np.isfinite(losses))


def test_whole_model_is_what_a_cut_is_of():
  config = helpers.micro_run()
  specs = stages_lib.cut(config.model, 4)
  names = [
    n
    for s in specs
    for n in stages_lib.build_stage(config.model, s, seed=0).shapes
  ]
  (whole,) = stages_lib.cut(config.model, 1)
  assert sorted(names) == sorted(
    stages_lib.build_stage(config.model, whole, seed=0).shapes
  )
  assert jnp.dtype(config.model.compute_dtype) == jnp.bfloat16
