import pytest

from moetion_jax import errors
from moetion_jax.runtime import placement

_FLAG = '--xla_gpu_deterministic_ops=true'


def _place(workers, cores=2, gpus=(), local_devices=1, **environment):
  return placement.place(
    workers,
    local_devices=local_devices,
    cores=range(cores),
    gpus=gpus,
    environment=environment,
  )


@pytest.mark.parametrize(
  ('workers', 'cores', 'expected'),
  [
    (1, 2, [(0, 1)]),
    (2, 2, [(0, 1), (0, 1)]),  # few are shared
    (3, 2, [(0, 1)] * 3),
    (3, 4, [(0, 1, 2, 3)] * 3),
    (2, 5, [(0, 1), (2, 3, 4)]),  # none is idle
    (3, 8, [(0, 1), (2, 3, 4), (5, 6, 7)]),
    (7, 5, [(0,), (1,), (2,), (3,), (4,), (0,), (1,)]),  # in turn
    (2, 1, [(0,), (0,)]),
  ],
)
def test_cores(workers, cores, expected):
  assert [p.cores for p in _place(workers, cores)] == expected


@pytest.mark.parametrize(
  ('stages', 'hosts', 'expected'),
  [
    (1, 1, (0,)),
    (3, 1, (0, 0, 0)),
    (2, 2, (0, 1)),
    (3, 2, (0, 0, 1)),  # the first ones have more
    (5, 3, (0, 0, 1, 1, 2)),
    (4, 4, (0, 1, 2, 3)),
  ],
)
def test_hosts(stages, hosts, expected):
  assert placement.host_of_stages(stages, hosts) == expected


@pytest.mark.parametrize('hosts', [0, 3, -1])
def test_hosts_without_a_stage(hosts):
  with pytest.raises(errors.ConfigError, match=f'--local_hosts={hosts}'):
    placement.host_of_stages(2, hosts)


def test_hosts_with_replicas():
  assert placement.host_of_stages(2, 1, replicas=2) == (0, 0)
  with pytest.raises(errors.ConfigError, match='--local_hosts=2.*--replicas'):
    placement.host_of_stages(2, 2, replicas=2)


def test_only_cores_that_the_agent_may_use():
  places = placement.place(
    2, local_devices=1, cores=(3, 7, 9, 11, 14), gpus=(), environment={}
  )
  assert [p.cores for p in places] == [(3, 7), (9, 11, 14)]


@pytest.mark.parametrize(
  ('workers', 'gpus', 'local_devices', 'devices', 'fractions'),
  [
    (2, '', 1, [None, None], [None, None]),
    (2, '01', 1, ['0', '1'], [None, None]),
    (2, '0123', 2, ['0,1', '2,3'], [None, None]),
    (2, '0', 1, ['0', '0'], ['0.450', '0.450']),
    (3, '01', 1, ['0', '1', '0'], ['0.450', None, '0.450']),
    (3, '01', 2, ['0,1'] * 3, ['0.300'] * 3),
    (1, '01', 4, [None], [None]),  # the worker says what is missing
  ],
)
def test_gpus(workers, gpus, local_devices, devices, fractions):
  places = _place(workers, gpus=tuple(gpus), local_devices=local_devices)
  variables = [p.environment for p in places]
  assert [v.get('CUDA_VISIBLE_DEVICES') for v in variables] == devices
  key = 'XLA_PYTHON_CLIENT_MEM_FRACTION'
  assert [v.get(key) for v in variables] == fractions


def test_what_the_user_set_stays():
  (place,) = _place(1, XLA_FLAGS='--xla_gpu_deterministic_ops=false')
  assert 'XLA_FLAGS' not in place.environment
  (place,) = _place(1, XLA_FLAGS='--other')
  assert place.environment['XLA_FLAGS'] == f'--other {_FLAG}'
  places = _place(2, gpus=('0',), XLA_PYTHON_CLIENT_MEM_FRACTION='0.2')
  for place in places:
    assert 'XLA_PYTHON_CLIENT_MEM_FRACTION' not in place.environment


@pytest.mark.parametrize(
  ('environment', 'expected'),
  [
    ({}, ('0', '1')),
    ({'JAX_PLATFORMS': 'cpu'}, ()),
    ({'JAX_PLATFORMS': 'cuda,cpu'}, ('0', '1')),
    ({'CUDA_VISIBLE_DEVICES': ''}, ()),
    ({'CUDA_VISIBLE_DEVICES': '3, 5'}, ('3', '5')),
    ({'CUDA_VISIBLE_DEVICES': 'GPU-a,GPU-b'}, ('GPU-a', 'GPU-b')),
  ],
)
def test_visible_gpus(tmp_path, environment, expected):
  for name in ('nvidia0', 'nvidia1', 'nvidiactl', 'nvidia-uvm'):
    (tmp_path / name).touch()
  assert placement.visible_gpus(environment, str(tmp_path)) == expected


@pytest.mark.parametrize(
  ('tunables', 'expected'),
  [
    (None, {'GLIBC_TUNABLES': 'glibc.malloc.hugetlb=1'}),
    ('a.b=2', {'GLIBC_TUNABLES': 'a.b=2:glibc.malloc.hugetlb=1'}),
    ('glibc.malloc.hugetlb=0', {}),
  ],
)
def test_huge_pages_unless_the_user_says_otherwise(tunables, expected):
  environment = {} if tunables is None else {'GLIBC_TUNABLES': tunables}
  assert placement.memory_variables(environment) == expected
