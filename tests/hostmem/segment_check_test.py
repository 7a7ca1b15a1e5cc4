"""A check of a log that may be damaged, while its writer goes on or not."""

import contextlib
import os
import shutil

import numpy as np
import pytest

from moetion_jax import errors, keys
from moetion_jax.hostmem import (
  entry,
  segment,
  segment_check,
  segment_reader,
  segment_writer,
)
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


@pytest.mark.parametrize('left', [0, 100, 5000, segment.file_bytes(4096, 8)])
def test_one_that_is_cut_while_it_is_read(writer, left):
  """Whoever had mapped it would be dead: a check runs in the agent."""
  with segment_check.SegmentFile.open(writer.path) as file:
    headers = file.entries()
    os.truncate(writer.path, left)
    uses = [file.entries, file.damaged_cells, lambda: file.oldest_iteration(2)]
    uses.append(lambda: file.damaged_entries(headers))
    uses.append(lambda: _check(writer.path))
    for use in uses:
      with pytest.raises(errors.StoreError, match=r'replica-1\.segment: ') as e:
        use()
      assert not isinstance(e.value, entry.EntryCorruptError)
  assert segment.newest_iteration(writer.path) == 0
  writer.close()
  with pytest.raises(errors.StoreError, match=r'replica-1\.segment: '):
    segment_check.drop_damaged(writer.path, 1)


def test_one_that_is_cut_after_its_cells_were_read(writer):
  with segment_check.SegmentFile.open(writer.path) as file:
    cells, (*_, last) = file._cells(), file.entries()
    os.truncate(writer.path, cells.ring_offset + last.offset)
    with pytest.raises(errors.StoreError, match='cut while it was read'):
      file._is_whole(last, cells)


# ---- one bit -----------------------------------------------------------------

_WORD_BYTES = 8


@contextlib.contextmanager
def _flipped(path, bit):
  with open(path, 'r+b', buffering=0) as file:
    file.seek(bit // 8)
    (byte,) = file.read(1)
    for value in (byte ^ 1 << bit % 8, byte):
      file.seek(bit // 8)
      file.write(bytes([value]))
      if value != byte:
        yield


def _iterations(folder):
  """Those whose entries a new reader finds; their bytes are right."""
  with contextlib.closing(segment_reader.StoreIndex(folder)) as index:
    return [n for n in range(4, 9) if _taken(index, n)]


def _taken(index, iteration):
  found = index.take(_key(iteration))
  if found is None:
    return False
  entry.verify(*found)
  assert found[1].tobytes() == np.full(100, iteration).tobytes()
  return True


def _replace(path, folder):
  """Copies a damaged log, and lets a replacement write 6 again.

  Returns:
    Whether it began a new log; whether it had to write 6.
  """
  worker = keys.WorkerId(2, 1, 2)
  folder.mkdir(exist_ok=True)
  copy = shutil.copy(path, folder)
  segment.fence(folder, worker)
  is_new = not (folder / path.name).exists()
  one = segment_writer.SegmentWriter(folder, worker, 1 << 14, 8)
  one.start()
  is_written = one.put(_key(6), np.full(100, 6))
  assert 6 in _iterations(folder)
  assert segment.whole_bytes(copy)
  one.close()
  return is_new, is_written


def test_each_bit_of_a_cell(writer, tmp_path):
  """Damage is found by a check, hides its entry only, and is written again."""
  start, end = (segment.cell_offset(cell) * 8 for cell in (2, 3))
  harmless = set()
  with contextlib.closing(segment_reader.StoreIndex(tmp_path)) as index:
    for bit in range(start, end):
      assert _taken(index, 6)
      with _flipped(writer.path, bit):
        found = _check(writer.path).damaged
        if not found:
          harmless.add(bit)
        assert [one.iteration for one in found] == [6] * len(found)
        kept = [n for n in range(4, 9) if n != 6 or not found]
        assert [n for n in range(4, 9) if _taken(index, n)] == kept
        writer.check_fence()
        if bit % 8 == bit // 8 % 8:  # one of each byte: it takes its time
          assert _iterations(tmp_path) == kept
          replaced = _replace(writer.path, tmp_path / 'copy')
          assert replaced == (False, bool(found))
  # All but the padding behind the fields, the commit word and the mark.
  used = (entry.HEADER_BYTES + _WORD_BYTES) * 8
  assert harmless == set(range(start + used, end))


def test_each_bit_of_the_header(writer, tmp_path):
  """With one that is damaged the log is lost, but nobody is fenced off."""
  padding = len(segment.pack_header(keys.WorkerId(2, 1, 1), 8, 0, 0)) * 8
  with contextlib.closing(segment_reader.StoreIndex(tmp_path)) as index:
    assert _taken(index, 6)
    for bit in range(padding + _WORD_BYTES * 8):
      with _flipped(writer.path, bit):
        assert _taken(index, 6)  # by what it knew when it opened the file
        is_lost = not segment.whole_bytes(writer.path)
        assert is_lost == (bit < padding)
        assert _replace(writer.path, tmp_path / 'copy') == (is_lost, is_lost)
        uses = [
          writer.check_fence,
          lambda: writer.put(_key(9), np.full(100, 9)),
          lambda: _iterations(tmp_path),
          lambda: _check(writer.path),
        ]
        for use in uses if is_lost else ():
          with pytest.raises(errors.StoreError, match='damaged') as caught:
            use()
          assert not isinstance(caught.value, errors.FencedError)
    writer.check_fence()
    assert _check(writer.path) == segment_check.SegmentCheck(5, ())


def test_a_damaged_mark_is_dropped_like_a_damaged_payload(writer):
  writer.close()
  mark = (segment.cell_offset(2) + entry.HEADER_BYTES) * 8
  with _flipped(writer.path, mark):
    assert segment_check.drop_damaged(writer.path, 7) == []
    assert _check(writer.path).damaged[0].iteration == 6
    assert segment_check.drop_damaged(writer.path, 6) == [_key(6)]
    assert segment_check.drop_damaged(writer.path, 6) == []
    assert _check(writer.path) == segment_check.SegmentCheck(4, ())
