"""A standby's programs are a worker's: no backend before, the same bits after.

Both run in processes of their own, since a backend is for a process's life.
"""

import json
import subprocess
import sys

import chex
import jax
import numpy as np
import pytest

from launch.lm import transformer_job
from moetion_jax import codec
from moetion_jax.capture import selection
from tests.support import helpers, one_process

# Builds stage 1 of 2 as a worker or as a standby does, and works one iteration.
_PROCESS = """
import collections, json, sys
import jax
import numpy as np
from launch.lm import settings as run_settings, transformer_job
from moetion_jax import codec
from moetion_jax.programs import compilation, jax_internals, mesh
from moetion_jax.runtime import xla_setup
from moetion_jax.state import model as model_lib

config = codec.decode(run_settings.RunConfig, json.loads(sys.argv[1]))
role, cache = sys.argv[2:]
devices = config.train.local_devices
xla_setup.configure(local_devices=devices, compilation_cache_dir=cache)
events = collections.Counter()
jax.monitoring.register_event_listener(lambda e, **_: events.update([e]))
stage = transformer_job.of(config).declare_stage(1)
if role == 'standby':
  lowered = stage.trace().lower('cpu')
  has_backend = jax_internals.has_backend()
  stage = stage.on(mesh.make_mesh(jax.devices()[:devices]))
  programs = lowered.compile(stage.mesh)
else:
  has_backend = None
  stage = stage.on(mesh.make_mesh(jax.devices()[:devices]))
  programs = stage.compile()
hits, misses = (
  events[f'/jax/compilation_cache/cache_{x}'] for x in ('hits', 'misses')
)
random = np.random.default_rng(0)
state = stage.place_state(jax.tree.map(
  lambda s: abs(random.standard_normal(s.shape) * 0.02).astype(s.dtype),
  stage.state_shapes,
), programs.place)
compute = programs.compute_of(state)
train, model = config.train, stage.model
shape = (train.microbatch_size, *model.hidden_shape)
x = random.standard_normal(shape).astype(model.hidden_dtype)
labels = random.integers(0, 256, shape[:2], np.int32)
inputs = model_lib.Inputs(jax.device_put(x, stage.rows_sharding), labels)
acc, counts = programs.zeros(), []
for m in range(train.microbatches):
  position = model_lib.Position(np.uint32(1), np.array([m], np.uint32))
  y, residuals, count = programs.forward(compute, inputs, position)
  dx, acc = programs.backward(compute, residuals, y, acc)
  counts.append(count)
gradients, scalars = programs.reduce((acc,), (tuple(counts),))
slot = {
  g: np.zeros(len(stage.partition.operators_of(g)), bool)
  for g in stage.partition.groups
}
state, compute, _ = programs.update(state, gradients, np.float32(1), slot)
rows = stage.partition.by_operator(programs.digest(state))
print(json.dumps({
  'has_backend': has_backend, 'hits': hits, 'misses': misses,
  'digests': {str(o): row.tolist() for o, row in rows.items()},
  'loss': float(scalars['loss']).hex(),
  'eval_loss': float(programs.evaluate(compute, inputs)).hex(),
  'dx': np.asarray(dx).tobytes().hex(),
}))
"""


def _work(config, role, cache):
  result = subprocess.run(
    [
      sys.executable,
      '-c',
      _PROCESS,
      json.dumps(codec.encode(config)),
      role,
      str(cache),
    ],
    cwd=helpers.ROOT,
    capture_output=True,
    text=True,
    timeout=200,
  )
  assert result.returncode == 0, result.stderr
  return json.loads(result.stdout)


@pytest.mark.thorough
@pytest.mark.parametrize('devices', [1, 2])
def test_a_standby_takes_its_programs_from_the_workers_cache(devices, tmp_path):
  config = helpers.micro_run(
    model={'num_layers': 2, 'dropout_rate': 0.1},
    stages=2,
    local_devices=devices,
  )
  worker = _work(config, 'worker', tmp_path)
  standby = _work(config, 'standby', tmp_path)
  assert standby.pop('has_backend') is False
  assert (standby.pop('hits'), standby.pop('misses')) == (9, 0)
  assert worker.pop('misses') == 9
  del worker['hits'], worker['has_backend']
  assert standby == worker


@pytest.fixture(scope='module')
def placed_with():
  (worker,) = one_process.make_workers(
    helpers.micro_run(model={'num_layers': 2})
  )
  return worker


@pytest.mark.parametrize('is_compiled', [True, False])
def test_placed_state_is_not_the_hosts_memory(placed_with, is_compiled):
  worker = placed_with
  host = jax.tree.map(np.array, worker.state)
  # Aligned, as pages of a file are: such arrays device_put aliases.
  aligned = jax.tree.map(_aligned, host)
  place = worker.programs.place if is_compiled else None
  placed = worker.stage.place_state(aligned, place)
  for leaf in jax.tree.leaves(aligned):
    leaf[...] = 77  # before anything else could have waited for the copy
  chex.assert_trees_all_equal(jax.tree.map(np.asarray, placed), host)
  pointers = [x.unsafe_buffer_pointer() for x in jax.tree.leaves(placed)]
  assert len(set(pointers)) == len(pointers)


def _aligned(array):
  whole = np.empty(array.nbytes + 64, np.uint8)
  offset = -whole.ctypes.data % 64
  copy = whole[offset : offset + array.nbytes].view(array.dtype)
  copy = copy.reshape(array.shape)
  copy[...] = array
  return copy


def test_placed_state_is_updated_in_place(placed_with):
  worker = placed_with
  stage, programs = worker.stage, worker.programs
  state = stage.place_state(
    jax.tree.map(np.array, worker.state), programs.place
  )
  before = {x.unsafe_buffer_pointer() for x in jax.tree.leaves(state)}
  gradients = jax.device_put(
    {n: np.zeros(s.shape, np.float32) for n, s in stage.model.shapes.items()},
    stage.shardings(stage.compute_specs),
  )
  operators = stage.partition.operators
  masks = selection.make_mask(operators, frozenset(operators))
  new, _, _ = programs.update(state, gradients, np.float32(1), masks)
  assert {x.unsafe_buffer_pointer() for x in jax.tree.leaves(new)} == before


def test_a_stage_without_devices_says_so():
  stage = transformer_job.of(helpers.micro_run(stages=2)).declare_stage(0)
  with pytest.raises(RuntimeError, match='no devices yet'):
    _ = stage.rows_sharding
