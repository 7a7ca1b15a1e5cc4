"""A new JAX that breaks a use of its internals fails the test of that name."""

import functools
import os
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest
from jax import numpy as jnp
from jax._src import distributed
from jax.experimental.compilation_cache import compilation_cache

from launch.lm import transformer_job
from moetion_jax.programs import compilation, jax_internals, mesh
from tests.support import helpers


def _run(code, *arguments):
  """Runs code in a process that has no backend yet."""
  ended = subprocess.run(
    [sys.executable, '-c', code, *map(str, arguments)],
    cwd=helpers.ROOT,
    env=os.environ | {'JAX_PLATFORMS': 'cpu'},
    capture_output=True,
    text=True,
    timeout=120,
  )
  assert ended.returncode == 0, ended.stderr


def test_has_backend():
  _run(
    'import jax\n'
    'from moetion_jax.programs import jax_internals\n'
    'assert not jax_internals.has_backend()\n'
    'jax.devices()\n'
    'assert jax_internals.has_backend()\n'
  )


def test_platform_of():
  assert jax_internals.platform_of(jax.devices()[0].client) == 'cpu'


_LOWER = """
import jax
from jax import numpy as jnp
from jax.sharding import PartitionSpec
from moetion_jax.programs import jax_internals, mesh
over = mesh.abstract_mesh(2)
mapped = jax.shard_map(
  lambda x: jax.lax.psum(x, 'expert'), mesh=over,
  in_specs=PartitionSpec('expert'), out_specs=PartitionSpec(), check_vma=False)
traced = jax.jit(mapped).trace(jax.ShapeDtypeStruct((2,), jnp.float32))
for platform in ('cpu', 'cuda'):
  with jax_internals.lowering_without_backend(platform):
    assert traced.lower(lowering_platforms=(platform,)).as_text()
assert not jax_internals.has_backend(), 'lowering created a backend'
"""


def test_lowering_without_backend():
  _run(_LOWER)


def test_compile_lowered():
  traced, _ = compilation.trace(
    mesh.abstract_mesh(2),
    lambda x: jax.lax.psum(x, 'expert'),
    (mesh.EXPERT,),
    mesh.SAME,
    (jax.ShapeDtypeStruct((2,), jnp.float32),),
  )
  with jax_internals.lowering_without_backend('cpu'):
    lowered = traced.lower(lowering_platforms=('cpu',))
  devices = tuple(jax.devices()[1:3])  # not the default ones
  compiled = jax_internals.compile_lowered(lowered, devices)
  sharding = jax.sharding.NamedSharding(mesh.make_mesh(devices), mesh.EXPERT)
  found = compiled(jax.device_put(np.array([1, 2], np.float32), sharding))
  assert found.sharding.device_set == set(devices)
  np.testing.assert_array_equal(found, np.array([3], np.float32))


_WORLD = """
import sys, jax, numpy as np
from jax.experimental import multihost_utils
from moetion_jax.runtime import xla_setup
xla_setup.join_world(sys.argv[1], 2, int(sys.argv[2]))
print(multihost_utils.process_allgather(np.float32(sys.argv[2])).tolist())
"""


def _run_world(code, *arguments, within=()):
  """The last line that each of two members printed; gloo may print before."""
  with socket.socket() as probe:
    probe.bind(('127.0.0.1', 0))
    address = f'127.0.0.1:{probe.getsockname()[1]}'
  members = [
    subprocess.Popen(
      [*within, sys.executable, '-c', code, address, str(number), *arguments],
      cwd=helpers.ROOT,
      env=os.environ | {'JAX_PLATFORMS': 'cpu'},
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
    )
    for number in range(2)
  ]
  said = []
  for member in members:
    out, err = member.communicate(timeout=120)
    assert member.returncode == 0, err
    said.append(out.splitlines()[-1])
  return said


def test_gather_at():
  """Of a host whose name has no address; it takes root to give it that."""
  name = 'hostname moetion.invalid && exec "$@"'
  within = ['unshare', '--uts', 'sh', '-c', name, 'sh']
  assert _run_world(_WORLD, within=within) == ['[0.0, 1.0]'] * 2


_LATE = """
import sys, time, numpy as np
from jax.experimental import multihost_utils
from moetion_jax.programs import jax_internals
from moetion_jax.runtime import xla_setup
number = int(sys.argv[2])
xla_setup.join_world(sys.argv[1], 2, number)
if number == 1:
  time.sleep(float(sys.argv[3]))
come = time.monotonic()
jax_internals.meet('a name')
met = time.monotonic()
multihost_utils.process_allgather(np.float32(0))
print(come, met)
"""


@pytest.mark.parametrize(
  'late_seconds',
  # Without a meeting gloo gives up after 30.
  [1, pytest.param(40, marks=pytest.mark.soak)],
)
def test_meet(late_seconds):
  (_, met), (come, _) = (
    map(float, line.split()) for line in _run_world(_LATE, str(late_seconds))
  )
  assert met >= come


@pytest.fixture
def cache(tmp_path, monkeypatch):
  """Says how many programs were written since it was asked last."""
  before = getattr(jax.config, 'jax_compilation_cache_dir')  # noqa: B009
  jax.config.update('jax_compilation_cache_dir', str(tmp_path))
  compilation_cache.reset_cache()
  # As in the second process of a world.
  monkeypatch.setattr(distributed.global_state, 'process_id', 1)
  seen = set()

  def written():
    now = set(tmp_path.glob('*-cache'))
    new = len(now - seen)
    seen.update(now)
    return new

  yield written
  jax.config.update('jax_compilation_cache_dir', before)
  compilation_cache.reset_cache()


def _compile(number):
  """Compiles a program that no test before has compiled."""
  jax.jit(functools.partial(jnp.add, number))(jnp.zeros(3))


def test_let_all_write_cache(cache):
  _compile(1.25)
  assert cache() == 0, 'JAX lets every process write the cache by itself now'
  jax_internals.let_all_write_cache()
  _compile(2.25)
  assert cache() >= 1


def test_first_writes_cache(cache, monkeypatch):
  with jax_internals.first_writes_cache():  # this is process 0 of its world
    _compile(3.25)
  assert cache() >= 1
  assert distributed.global_state.process_id == 1  # and put back
  monkeypatch.setattr(jax, 'process_index', lambda: 1)
  with jax_internals.first_writes_cache():
    _compile(4.25)
  assert cache() == 0


def test_names_of_programs_stay():
  """They are part of the key in the compilation cache of runs that go on."""
  stage = transformer_job.of(helpers.micro_run(stages=2)).declare_stage(0)
  for name, lowered in stage.trace().lower('cpu').lowered.items():
    assert f'module @jit__{name} ' in lowered.as_text(), name


def test_nothing_else_uses_internals():
  """Whatever JAX does not promise is used in one module alone."""
  words = ('jax._src', '_lowering.', '_raw_platform', 'global_state', 'jaxlib')
  for package in ('moetion_jax', 'models', 'launch'):
    for path in (helpers.ROOT / package).rglob('*.py'):
      if path.name == 'jax_internals.py':
        continue
      for number, line in enumerate(path.read_text().splitlines(), 1):
        for word in words:
          is_name = line.strip().strip(',') == "'jaxlib'"  # of the package
          assert word not in line or is_name, (
            f'{path}:{number} uses {word}: move it to '
            'moetion_jax/programs/jax_internals.py, with its reason and a test'
          )
