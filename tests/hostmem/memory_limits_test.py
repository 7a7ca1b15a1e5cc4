"""How much host memory there is: tables of what the kernel says."""

import dataclasses

import pytest

from moetion_jax import errors
from moetion_jax.hostmem import memory_limits

_MIB = 1 << 20
_GIB = 1 << 30


def _cgroups(root, files):
  for name, text in files.items():
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


@pytest.mark.parametrize(
  ('membership', 'files', 'available_bytes'),
  [
    pytest.param('', {}, None, id='no cgroups'),
    pytest.param('0::/\n', {}, None, id='root of v2 has no limit'),
    pytest.param(
      '0::/\n',
      {'memory.max': '1000\n', 'memory.current': '400\n'},
      600,
      id='v2 in a container',
    ),
    pytest.param(
      '0::/\n',
      {'memory.max': 'max\n', 'memory.current': '400\n'},
      None,
      id='v2 without a limit',
    ),
    pytest.param(
      '0::/job/step\n',
      {
        'job/memory.max': '500\n',
        'job/memory.current': '100\n',
        'job/step/memory.max': '5000\n',
        'job/step/memory.current': '100\n',
      },
      400,
      id='v2: the parent is stricter',
    ),
    pytest.param(
      '0::/\n',
      {
        'memory.max': '1000\n',
        'memory.current': '900\n',
        'memory.stat': 'anon 100\ninactive_file 700\nactive_file 5\n',
      },
      800,
      id='v2: clean file pages come back',
    ),
    pytest.param(
      '4:memory:/docker/1234\n3:cpuset:/docker/1234\n',
      {
        'memory/memory.limit_in_bytes': '1000\n',
        'memory/memory.usage_in_bytes': '300\n',
        'memory/memory.stat': 'inactive_file 9\ntotal_inactive_file 100\n',
      },
      800,
      id='v1 in a container: the path is the host one',
    ),
    pytest.param(
      '4:memory:/slurm/job\n0::/\n',
      {
        'memory/memory.limit_in_bytes': '9223372036854771712\n',
        'memory/slurm/job/memory.limit_in_bytes': '2000\n',
        'memory/slurm/job/memory.usage_in_bytes': '2500\n',
        'unified/cgroup.controllers': '',
      },
      0,
      id='v1 and v2 mounted; over the limit',
    ),
  ],
)
def test_cgroup_limits(tmp_path, membership, files, available_bytes):
  _cgroups(tmp_path / 'cgroup', files)
  _cgroups(
    tmp_path / 'proc',
    {
      'self/cgroup': membership,
      'meminfo': 'MemTotal: 9 kB\nMemAvailable:    2048 kB\n',
    },
  )
  measured = memory_limits.read_room(
    tmp_path, tmp_path / 'cgroup', tmp_path / 'proc'
  )
  assert measured.cgroup_available_bytes == available_bytes
  assert measured.memory_available_bytes == 2 * _MIB
  assert 0 < measured.tmpfs_free_bytes <= measured.tmpfs_bytes


def _room(**changes):
  ample = memory_limits.Room(
    folder='/dev/shm/moetion-x', tmpfs_free_bytes=_GIB, tmpfs_bytes=2 * _GIB
  )
  return dataclasses.replace(ample, **changes)


def test_enough_room():
  memory_limits.check_room(_GIB, _room())
  memory_limits.check_room(
    _GIB, _room(cgroup_available_bytes=_GIB, memory_available_bytes=_GIB)
  )


@pytest.mark.parametrize(
  ('changes', 'words'),
  [
    (
      dict(tmpfs_free_bytes=63 * _MIB, tmpfs_bytes=64 * _MIB),
      [
        '63.0 MiB free of 64.0 MiB',
        '--shm-size=1g',
        'medium: Memory',
        '--hostmem_dir',
        '--log_iterations',
      ],
    ),
    (
      dict(cgroup_available_bytes=10 * _MIB),
      ['cgroup', '10.0 MiB', 'docker run --memory', '--log_iterations'],
    ),
    (dict(memory_available_bytes=10 * _MIB), ['machine', '10.0 MiB']),
  ],
)
def test_too_little_room_names_the_remedy(changes, words):
  with pytest.raises(errors.StoreError) as caught:
    memory_limits.check_room(512 * _MIB, _room(**changes))
  for word in ['/dev/shm/moetion-x', '512.0 MiB', *words]:
    assert word in str(caught.value)


def test_this_machine():
  measured = memory_limits.read_room('/dev/shm')
  with pytest.raises(errors.StoreError, match='--shm-size'):
    memory_limits.check_room(measured.tmpfs_bytes + 1, measured)


@pytest.mark.parametrize(
  ('count', 'text'),
  [
    (0, '0 bytes'),
    (1023, '1023 bytes'),
    (1536, '1.5 KiB'),
    (1 << 42, '4.0 TiB'),
  ],
)
def test_format_bytes(count, text):
  assert memory_limits.format_bytes(count) == text
