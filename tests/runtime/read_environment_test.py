"""Every option of JAX is classified, and what is read is what there is."""

import json
import os
import shutil
import subprocess
import sys

import jax
import optax
import pytest
from jax._src import cache_key

from moetion_jax.runtime import environment, read_environment
from tests.support import helpers


def test_every_option_of_jax_is_in_one_list():
  matters, harmless = read_environment.MATTERS, read_environment.HARMLESS
  assert not matters & harmless
  new = jax.config.values.keys() - matters - harmless
  assert not new, 'into MATTERS if it can change a program or its bits'


def test_what_is_in_no_list_is_recorded():
  found = read_environment.options(
    {'jax_new': True, 'jax_enable_x64': False, 'jax_log_compiles': True}
  )
  assert found == {'jax_enable_x64': False, 'jax_new': True}


def test_flags_that_jax_leaves_out_of_its_cache_key_do_not_count():
  flags = cache_key.xla_flags_to_exclude_from_cache_key
  assert len(flags) > 20
  # But for the tools that make code, whose content JAX does not look at either.
  counted = environment.parse_flags(' '.join(flags))
  assert counted == {'xla_gpu_cuda_data_dir': 'true'}


_READ = """
from moetion_jax.runtime import read_environment, xla_setup
xla_setup.configure(local_devices=2, compilation_cache_dir='/nowhere')
import json
print(json.dumps(read_environment.read()))
"""


def _read(**variables):
  ended = subprocess.run(
    [sys.executable, '-c', _READ],
    cwd=helpers.ROOT,
    env=os.environ | {'JAX_PLATFORMS': 'cpu'} | variables,
    capture_output=True,
    text=True,
    timeout=60,
  )
  assert ended.returncode == 0, ended.stderr
  return json.loads(ended.stdout)


def test_only_what_can_change_a_program_differs(tmp_path):
  expected = _read()
  assert expected['versions']['jaxlib'] == jax.lib.__version__
  assert expected['device']['local_devices'] == 2
  assert expected['device']['processor']
  harmless = _read(
    JAX_LOG_COMPILES='1',
    JAX_ENABLE_COMPILATION_CACHE='0',
    XLA_FLAGS=f'--xla_dump_to={tmp_path}',
    XLA_PYTHON_CLIENT_MEM_FRACTION='0.5',
    TF_CPP_MIN_LOG_LEVEL='3',
  )
  assert environment.changes(expected, harmless) == []
  changed = _read(
    JAX_ENABLE_X64='1',
    JAX_DEFAULT_MATMUL_PRECISION='highest',
    XLA_FLAGS='--xla_cpu_enable_fast_math=true',
    NPROC='1',
  )
  found = environment.changes(expected, changed)
  assert [(x.name, x.was, x.now) for x in found] == [
    ('NPROC', None, '1'),
    ('jax_default_matmul_precision', None, 'highest'),
    ('jax_enable_x64', False, True),
    ('xla_cpu_enable_fast_math', None, 'true'),
  ]


def test_the_content_of_a_file_that_a_flag_names_counts(tmp_path):
  """Read in the process that has the flag, as XLA reads it."""
  path = tmp_path / 'results.textproto'
  flag = f'--xla_gpu_load_autotune_results_from={path}'
  path.write_text('version: 3')
  before = _read(XLA_FLAGS=flag)
  assert _read(XLA_FLAGS=flag) == before
  path.write_text('version: 3 ')
  found = environment.changes(before, _read(XLA_FLAGS=flag))
  assert [x.name for x in found] == ['xla_gpu_load_autotune_results_from']
  path.unlink()
  (change,) = environment.changes(before, _read(XLA_FLAGS=flag))
  assert change.now is None and 'sha256' in change.was


def test_digests_of_files_and_folders(tmp_path):
  one = tmp_path / 'one'
  one.write_text('a')
  assert read_environment.digest_of(str(tmp_path)) is None
  assert read_environment.digest_of(str(tmp_path / 'none'), True) is None
  assert read_environment.digest_of('a\0b') is None
  whole = read_environment.digest_of(str(tmp_path), True)
  assert whole == read_environment.digest_of(str(one)) is not None
  (tmp_path / 'two').write_text('b')
  assert read_environment.digest_of(str(tmp_path), True) != whole


@pytest.mark.parametrize(
  ('cpuinfo', 'found'),
  [
    ('model name\t: Fast 1\nflags\t: fpu avx2 fma ibrs avx\n\n'
     'model name\t: Fast 2\nflags\t: fpu\n', ('Fast 1', 'avx avx2 fma')),
    ('CPU implementer\t: 0x41\nCPU part\t: 0xd40\nFeatures\t: fp asimd sve\n',
     ('0x41 0xd40', 'asimd sve')),
  ],
)  # fmt: skip
def test_processors(cpuinfo, found):
  assert read_environment.processor(cpuinfo) == found


def test_what_nccl_reads_itself(tmp_path):
  """In its order: the first line that sets a variable holds."""
  user, system = tmp_path / 'user', tmp_path / 'system'
  user.write_text('NCCL_ALGO=Tree\n#NCCL_PROTO=LL\nNCCL_ALGO=x\nnonsense\n')
  system.write_text('NCCL_ALGO=Ring\nNCCL_DEBUG=INFO\nNCCL_PROTO=Simple')
  files = [str(user), str(system), str(tmp_path / 'missing'), '']
  found = read_environment.nccl_settings(files)
  assert environment.variables(found) == {
    'NCCL_ALGO': 'Tree',
    'NCCL_PROTO': 'Simple',
  }


def test_installed_packages_by_the_beginnings_of_their_names(tmp_path):
  for name in (
    'nvidia_cudnn_cu12-9.1.0.dist-info',
    'Jax_CUDA12_plugin-0.10.2.dist-info',
    'numpy-2.0.dist-info',
    'nvidia',
  ):
    (tmp_path / name).mkdir()
  found = read_environment.installed(
    [str(tmp_path), str(tmp_path / 'none')], ('nvidia_', 'jax_cuda')
  )
  assert found == {'Jax_CUDA12_plugin': '0.10.2', 'nvidia_cudnn_cu12': '9.1.0'}


def test_sources_that_hide_an_installed_package_are_named(tmp_path):
  """They have no version of their own, and may be anything."""
  shutil.copytree(os.path.dirname(optax.__file__), tmp_path / 'optax')
  path = os.pathsep.join([str(tmp_path), os.environ.get('PYTHONPATH', '')])
  here, there = _read(), _read(PYTHONPATH=path)
  (change,) = environment.changes(here, there)
  assert change.name == 'optax'
  assert change.now == f'{change.was} at {tmp_path / "optax"}'


def test_the_c_library_and_what_is_loaded_before_it(tmp_path):
  (tmp_path / 'libm.so.6').write_text('m')
  (tmp_path / 'first.so').write_text('1')
  maps = f'7f00-7f01 r-xp 0 00:1 5    {tmp_path}/libm.so.6\n'
  maps += '7f02-7f03 r-xp 0 00:1 6    /lib/libmvec.so.1\n'
  plain = read_environment.system(maps, {})
  assert plain.keys() == {'libc', 'libm'} and 'sha256' in plain['libm']
  variables = {
    'LD_PRELOAD': f'{tmp_path}/first.so',
    'GLIBC_TUNABLES': 'glibc.malloc.check=1:glibc.cpu.hwcaps=-FMA',
  }
  other = read_environment.system(maps, variables)
  assert other['GLIBC_TUNABLES'] == 'glibc.cpu.hwcaps=-FMA'
  (tmp_path / 'first.so').write_text('2')
  (tmp_path / 'libm.so.6').write_text('n')
  later = read_environment.system(maps, variables)
  here = {'versions': {}, 'system': later}
  found = environment.changes({'versions': {}, 'system': other}, here)
  assert {x.name for x in found} == {'libm', 'LD_PRELOAD'}
  # A record of before has none of that.
  assert environment.completed({'versions': {}}, here) == here
