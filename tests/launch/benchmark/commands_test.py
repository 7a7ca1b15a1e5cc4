import json
import os
import uuid

import pytest

from launch.benchmark import boundary
from tests.support import helpers

pytestmark = pytest.mark.timeout(180)

_MORE = ('host', 'tcp', 'tcp, CURVE')


def test_boundary_measures_every_subject_and_leaves_nothing():
  folder = f'/dev/shm/test-{uuid.uuid4().hex}'
  os.mkdir(folder)
  try:
    found = boundary.measure(folder, 1, (1000, 100_000))
    assert not os.listdir(folder)
  finally:
    os.rmdir(folder)
  assert set(found) == {1000, 100_000}
  for seconds in found.values():
    assert set(seconds) == {
          'memcpy', 'checksum', 'socket',
          *_MORE, *(f'{name}, latency' for name in _MORE),
        }  # fmt: skip
    assert all(s > 0 for values in seconds.values() for s in values)


def test_verification_of_all_entries_of_an_iteration():
  ((name, value, _),) = boundary.verification_rows('tiny', 3)
  assert 'verified twice' in name and value.median > 0


@pytest.mark.thorough
@pytest.mark.timeout(400)
def test_programs_measures_ours_beside_plain_steps(tmp_path):
  result = helpers.launch(
    'benchmark',
    'pipeline',
    '--preset=tiny',
    '--part=programs',
    '--rounds=1',
    f'--compilation_cache_dir={helpers.CACHE}',
    f'--out={tmp_path}',
    timeout_seconds=380,
  )
  assert not result.returncode, result.stderr
  found = json.loads((tmp_path / 'pipeline.json').read_text())
  assert 'digest / plain AdamW update' in json.dumps(found)


def test_boundary_without_host_memory():
  result = helpers.launch(
    'benchmark', 'pipeline', '--part=boundary', '--hostmem_dir=/no/such'
  )
  assert result.returncode == 2
  assert '--hostmem_dir=/no/such' in result.stderr


def test_unknown_subcommand():
  result = helpers.launch('benchmark', 'nonsense')
  assert result.returncode == 2 and 'pipeline' in result.stderr
