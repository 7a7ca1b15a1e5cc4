"""Which flags and variables count, what has changed, and how it is said."""

import pytest

from moetion_jax import errors
from moetion_jax.runtime import environment


@pytest.mark.parametrize(
  ('text', 'found'),
  [
    ('', {}),
    ('  --b=2   --a\n', {'a': 'true', 'b': '2'}),
    ('--a=1 --a=2', {'a': '1 2'}),  # some flags add up
    ('--a=1 --a=1', {'a': '1'}),
    ('--a=x=y', {'a': 'x=y'}),
    ('--xla_dump_to=/tmp/x --xla_cpu_enable_fast_math=true',
     {'xla_cpu_enable_fast_math': 'true'}),
    ('--xla_force_host_platform_device_count=4', {}),
    ('--xla_gpu_deterministic_ops=true',
     {'xla_gpu_deterministic_ops': 'true'}),
    ('flags.txt', {'from_a_file': '1'}),
  ],
)  # fmt: skip
def test_flags(text, found):
  read = {'flags.txt': '--from_a_file=1\n--xla_log_hlo_text=x'}.__getitem__
  assert environment.parse_flags(text, read) == found
  assert list(environment.parse_flags(text, read)) == sorted(found)


@pytest.mark.parametrize(
  ('text', 'whole'),
  [
    ('', '--xla_gpu_deterministic_ops=true'),
    ('--a', '--a --xla_gpu_deterministic_ops=true'),
    ('--xla_gpu_deterministic_ops=false', '--xla_gpu_deterministic_ops=false'),
    # XLA would take name and flag together for the name of a file.
    ('flags.txt', '--in_file --xla_gpu_deterministic_ops=true'),
  ],
)
def test_the_determinism_flag_is_added_to_what_the_user_has(text, whole):
  found = environment.with_determinism(text, lambda path: '--in_file\n')
  assert found == whole


def test_a_file_of_flags_is_read(tmp_path):
  path = tmp_path / 'flags.txt'
  path.write_text('--b=1\n--a')
  assert environment.parse_flags(str(path)) == {'a': 'true', 'b': '1'}
  assert environment.parse_flags(str(tmp_path / 'no.txt')) == {}


@pytest.mark.parametrize(
  ('name', 'matters'),
  [
    ('NCCL_ALGO', True),
    ('NCCL_DEBUG', False),
    ('NVIDIA_TF32_OVERRIDE', True),
    ('TF_CPP_MIN_LOG_LEVEL', False),
    ('TF_XLA_FLAGS', True),
    ('TF_VAR_db_password', False),  # Terraform's
    ('TF_TOKEN_app_terraform_io', False),
    ('NCCL_SOCKET_IFNAME', False),
    ('XLA_FLAGS', False),  # by flag
    ('XLA_PYTHON_CLIENT_MEM_FRACTION', False),
    ('TPU_WORKER_ID', False),
    ('OMP_NUM_THREADS', True),
    ('NPROC', True),
    ('NPROC_PER_NODE', False),
    ('PATH', False),
    ('GLIBC_TUNABLES', False),
  ],
)
def test_variables(name, matters):
  expected = {name: '1'} if matters else {}
  assert environment.variables({name: '1', 'HOME': '/'}) == expected


def test_contents_of_files_that_flags_name():
  asked = []

  def digest(path, reads_folder):
    asked.append((path, reads_folder))
    is_file = path.startswith('/') or path in ('true', 'results')
    return f'sha256 {path[-1]}' if is_file else None

  found = environment.contents(
    {
      'xla_gpu_load_autotune_results_from': '/a',
      'xla_twice': '/b /c',
      'xla_cpu_enable_fast_math': 'true',
      'xla_gpu_gemm_autotuner_override_file': 'results',
      'xla_gpu_kernel_cache_file': '/written',
      'xla_gpu_pgle_profile_file_or_directory_path': '/d',
    },
    digest,
  )
  assert found == {
    'xla_gpu_load_autotune_results_from': 'a file with sha256 a',
    'xla_gpu_gemm_autotuner_override_file': 'a file with sha256 s',
    'xla_twice': 'a file with sha256 c sha256 b sha256 c',
    'xla_gpu_pgle_profile_file_or_directory_path': 'a file with sha256 d',
  }
  assert ('/d', True) in asked and ('/a', False) in asked


def test_another_content_is_a_change_by_the_name_of_the_flag():
  flags = {'xla_a': '/a'}
  was = _record(xla_flags=flags) | {'files': {'xla_a': 'a file with x'}}
  now = was | {'files': {'xla_a': 'a file with y'}}
  (change,) = environment.changes(was, now)
  assert (change.name, change.was) == ('xla_a', 'a file with x')
  moved = now | {'xla_flags': {'xla_a': '/b'}}
  (change,) = environment.changes(was, moved)
  assert (change.name, change.now) == ('xla_a', '/b')
  # A version that recorded no contents, nor folders of autotune results.
  folder = {'xla_gpu_per_fusion_autotune_cache_dir': '/cache'}
  here = now | {'xla_flags': flags | folder}
  known = {k: v for k, v in was.items() if k != 'files'}
  assert not environment.changes(environment.completed(known, here), here)
  (change,) = environment.changes(environment.completed(now, here), here)
  assert change.name == 'xla_gpu_per_fusion_autotune_cache_dir'


def test_tools_that_make_code_count():
  name = 'xla_gpu_cuda_data_dir'
  flags = environment.parse_flags(f'--{name}=/cuda')

  def files(digests):
    return environment.contents(flags, lambda path, _: digests.get(path))

  one, other = (
    files({'/cuda/nvvm/libdevice/libdevice.10.bc': x, '/cuda/bin/ptxas': 'p'})
    for x in 'ab'
  )
  assert one == {name: 'a file with a p'}
  was = _record(xla_flags=flags) | {'files': one}
  (change,) = environment.changes(was, was | {'files': other})
  assert change.name == name
  # A version to which they did not count.
  before = _record() | {'files': {}}
  assert not environment.changes(environment.completed(before, was), was)
  (change,) = environment.changes(environment.completed(was, before), before)
  assert change.name == name


def test_the_name_of_a_variable_is_that_of_its_option():
  found = environment.canonical(['JAX_ENABLE_X64', 'XLA_X', 'jaxlib'])
  assert found == ('jax_enable_x64', 'XLA_X', 'jaxlib')


def _record(**sections):
  base = {
    'versions': {'jax': '1', 'numpy': '2'},
    'device': {'platform': 'cpu', 'cores': '2'},
    'options': {'jax_enable_x64': False},
    'xla_flags': {},
    'libtpu_flags': {},
    'variables': {},
  }
  return {**base, **{n: {**base[n], **v} for n, v in sections.items()}}


@pytest.mark.parametrize(
  ('sections', 'text'),
  [
    ({}, ''),
    ({'options': {'jax_enable_x64': True}}, 'jax_enable_x64=false, here true'),
    ({'versions': {'jax': '1.1'}}, 'jax=1, here 1.1'),
    ({'versions': {'libtpu': '3'}}, 'libtpu=(not set), here 3'),
    ({'xla_flags': {'xla_a': '1'}}, 'xla_a=(not set), here 1'),
    ({'variables': {'NCCL_ALGO': 'Ring'}, 'device': {'cores': '1'}},
     'NCCL_ALGO=(not set), here Ring; cores=2, here 1'),
    # Of another JAX, or of another version of this program.
    ({'options': {'jax_new': True}}, ''),
    ({'device': {'driver': '5'}}, ''),
  ],
)  # fmt: skip
def test_changes(sections, text):
  found = environment.changes(_record(), _record(**sections))
  assert environment.describe(found) == text


def test_many_changes_are_counted():
  flags = {f'xla_{i}': '1' for i in range(8)}
  found = environment.changes(_record(), _record(xla_flags=flags))
  text = environment.describe(found)
  assert text.endswith('xla_4=(not set), here 1; and 3 more')
  assert environment.names_of(found) == ','.join(sorted(flags))


def test_what_was_not_recorded_is_taken_over():
  here = _record(variables={'NCCL_ALGO': 'Ring'})
  known = {'versions': {'jax': '1', 'numpy': '2'}, 'options': {'other': 1}}
  filled = environment.completed(known, here)
  assert environment.changes(filled, here) == []
  assert filled['options'] == {'jax_enable_x64': False, 'other': 1}
  other = _record(versions={'jax': '0'})
  filled = environment.completed(known, other)
  assert environment.describe(environment.changes(filled, other)) == (
    'jax=1, here 0'
  )


@pytest.mark.parametrize(
  ('software', 'text'),
  [
    ({}, ''),
    ({'jax': '1', 'platform': 'cpu', 'cores': '2'}, ''),
    ({'jax': '0', 'platform': 'gpu'}, 'jax=0, here 1; platform=gpu, here cpu'),
    ({'gone': '1'}, 'gone=1, here (not set)'),
    ({'cores': '4'}, 'cores=4, here 2'),
  ],
)
def test_what_earlier_versions_recorded_is_compared(software, text):
  here = _record()
  known = environment.from_software(software, here)
  assert environment.describe(environment.changes(known, here)) == text
  assert here == _record()


def test_workers_may_have_other_numbers_of_cores_only():
  same, other = _record(), _record(device={'cores': '3'})
  environment.check_same_everywhere({'stage 0': same, 'stage 1': other})
  whole = environment.joined([same, other])
  assert whole['device']['cores'] == '2,3'
  assert environment.of_worker(whole, 0) == same
  assert environment.of_worker(whole, 1) == other
  assert environment.joined([same, same]) == same
  assert environment.of_worker(same, 1) == same
  assert environment.of_worker({}, 1) == {}
  # Of the first worker alone there was a record once.
  known = environment.from_software({'cores': '2'}, whole)
  assert environment.changes(known, whole) == []
  fast = _record(xla_flags={'xla_cpu_enable_fast_math': 'true'})
  with pytest.raises(errors.MoetionError) as refused:
    environment.check_same_everywhere({'stage 0': same, 'stage 1': fast})
  assert str(refused.value).startswith(
    'stage 1 does not compute as stage 0 does: there '
    'xla_cpu_enable_fast_math=(not set), here true; '
  )


def test_a_replacement_must_be_like_its_predecessor():
  environment.check_replacement({}, _record())
  environment.check_replacement(_record(), _record())
  with pytest.raises(errors.ConfigError) as refused:
    environment.check_replacement(_record(), _record(versions={'jax': '9'}))
  assert 'jax=1, now 9' in str(refused.value)
  assert '--accept_changes=jax' in str(refused.value)


@pytest.mark.parametrize(
  ('name', 'is_known'),
  [
    ('jax', True),
    ('jax_enable_x64', True),
    ('NCCL_ALGO', True),
    ('xla_cpu_enable_fast_math', True),
    ('jaxlob', False),
    ('', False),
  ],
)
def test_names_that_can_be_accepted(name, is_known):
  found = environment.changes(_record(), _record(versions={'numpy': '3'}))
  if is_known:
    environment.check_names([name], found, _record())
    return
  with pytest.raises(errors.ConfigError, match='what changed is numpy'):
    environment.check_names([name], found, _record())
