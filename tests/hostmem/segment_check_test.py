"""A check of a log that may be damaged, while its writer goes on or not."""

import numpy as np
import pytest

from moetion_jax import errors, keys
from moetion_jax.hostmem import entry, segment, segment_check, segment_writer
from moetion_jax.runtime.worker import fault_damage


def _key(iteration, kind=keys.EntryKind.ACTIVATION):
  return keys.EntryKey(iteration, 2, 1, kind, 0)


@pytest.fixture
def writer(tmp_path):
  """Of a log with iterations 4 to 8, the first of which may be overwritten."""
  one = segment_writer.SegmentWriter(
    tmp_path, keys.WorkerId(2, 1, 1), 1 << 14, 8
  )
  one.start()
  for iteration in range(4, 9):
    one.put(_key(iteration), np.full(100, iteration))
  yield one
  one.close()


def _check(path):
  return segment_check.check(path, 2, 1)


def _damage_header(path, cell):
  with open(path, 'r+b') as file:
    file.seek(segment.cell_offset(cell) + entry.ITERATION_OFFSET + 5)
    file.write(b'\7')


def test_what_is_whole(writer):
  assert _check(writer.path) == segment_check.SegmentCheck(5, ())
  writer.close()
  assert _check(writer.path) == segment_check.SegmentCheck(5, ())


@pytest.mark.parametrize('is_poison', [False, True])
def test_a_damaged_payload(writer, is_poison):
  for iteration in (7, 5):
    assert fault_damage.damage_entry(
      writer.path, _key(iteration), is_poison=is_poison
    )
  assert _check(writer.path) == segment_check.SegmentCheck(
    5,
    (
      segment_check.Damage(5, 2, 1, str(_key(5))),
      segment_check.Damage(7, 2, 1, str(_key(7))),
    ),
  )


@pytest.mark.parametrize(
  ('cells', 'iterations'),
  [
    ([2], [5]),  # that of the entry before it
    ([0], [4]),  # before it there is none
    ([2, 3], [5, 3]),
    ([4], [7]),
  ],
)
def test_a_damaged_header_is_not_newer_than_its_neighbours(
  writer, cells, iterations
):
  for cell in cells:
    _damage_header(writer.path, cell)
  found = _check(writer.path)
  assert found.entries == 5
  assert [one.iteration for one in found.damaged] == iterations
  for cell, one in zip(cells, found.damaged, strict=True):
    assert f'cell {cell} ' in one.entry


def test_nobody_needs_what_is_retired(writer):
  writer.retain(6)
  for iteration in range(9, 13):  # takes three free cells, and that of 4
    writer.put(_key(iteration), np.full(100, iteration))
  assert not fault_damage.damage_entry(writer.path, _key(4))
  writer.put(_key(13), np.full(100, 13))
  _damage_header(writer.path, 2)
  (damage,) = _check(writer.path).damaged
  assert damage.iteration == 6  # not 13, though that is in the cell before


def test_what_cannot_be_read(writer, tmp_path):
  with pytest.raises(FileNotFoundError):
    _check(tmp_path / 'stage-7.replica-0.segment')
  with open(writer.path, 'r+b') as file:
    file.write(b'\0')
  with pytest.raises(errors.StoreError, match='header is damaged'):
    _check(writer.path)
