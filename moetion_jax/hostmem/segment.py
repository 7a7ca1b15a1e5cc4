"""Segments: the entries of one producer in a preallocated, shared file.

```
file    header | cell 0 | cell 1 | ... | payload ring
cell    256 bytes: what the entry is, then the commit word, written last
ring    payloads at multiples of 64 bytes, so that JAX can alias them
```

Entry number n (the sequence) lies in cell n % cells; cells and payloads are
reused in order, so pages are touched once and then rewritten. A writer killed
at any point leaves either a committed entry or none, and the index is rebuilt
by reading the cells.

Leases are locks of open file descriptions (fcntl(2), F_OFD_SETLK) on one byte
of the cell. They end with the descriptor, so also with a kill -9 of the
reader. A writer retires an entry by marking the cell and then taking its lock;
a reader takes the lock and then looks at the mark: one of them sees the other.

Each bit that somebody reads is proved: the fixed fields of the header and the
fields of a cell by checksums, the generation, which changes, by its complement
beside it, and a mark by being one of two words.
"""

from __future__ import annotations

import errno
import mmap
import os
import pathlib
import shutil
import struct
import zlib
from collections.abc import Iterable

import numpy as np

from moetion_jax import errors, keys
from moetion_jax.hostmem import entry, raw_bytes

_MAGIC = b'MoEtion2'
# Magic, cells, stage, replica, checksum, generation word, the ring's place.
_FILE = struct.Struct('<8sIiiIQQQ')
_GENERATION = struct.Struct('<Q')
_GENERATION_OFFSET = 24
_GENERATION_BITS = 32
_LIVE = 0
_RETIRED = int.from_bytes(b'retired.', 'little')  # no bit of damage makes it
_CELLS_OFFSET = mmap.PAGESIZE
_CELL_BYTES = 256
_MARK = struct.Struct('<Q')
_MARK_OFFSET = entry.HEADER_BYTES


def ring_bytes(iteration_entry_bytes: Iterable[int], iterations: int) -> int:
  """Returns the ring size to keep iterations while the next one is written.

  Args:
    iteration_entry_bytes: payload size of each entry of one iteration.
    iterations: number of finished iterations that are retained.
  """
  sizes = [ring_size(nbytes) for nbytes in iteration_entry_bytes]
  # An entry is never split at the ring's end: up to the largest one is lost.
  return sum(sizes) * (iterations + 1) + max(sizes, default=0)


def ring_size(nbytes: int) -> int:
  """Returns what a payload takes of a ring: never nothing, so none coincide."""
  return raw_bytes.padded(max(nbytes, 1))


def file_bytes(size_bytes: int, cells: int) -> int:
  """Returns the host memory that a segment takes, its cells included."""
  return raw_bytes.whole_pages(cell_offset(cells)) + raw_bytes.whole_pages(
    size_bytes
  )


def segment_path(
  folder: str | os.PathLike[str], stage: int, replica: int
) -> pathlib.Path:
  """Returns the path of one producer's segment in a store folder."""
  return pathlib.Path(folder) / f'stage-{stage}.replica-{replica}.segment'


def cell_offset(cell: int) -> int:
  """Returns the offset of a cell in the file; a lease locks its first byte."""
  return _CELLS_OFFSET + cell * _CELL_BYTES


def fence(folder: str | os.PathLike[str], worker: keys.WorkerId) -> None:
  """Fences off a worker's older generations, which may live on.

  Whatever they do next with their log raises FencedError: they neither publish
  nor read. A log that cannot be told, or is not whole, is removed, and so is
  lost: what they do with it then reaches nobody.

  Args:
    folder: the store folder of the worker's host.
    worker: the newest generation of the worker.

  Raises:
    SystemRefusalError: the system does not let it be opened.
    OSError: it cannot be removed either.
  """
  path = segment_path(folder, worker.stage, worker.replica)
  try:
    fd = open_file(path, os.O_RDWR)
    try:
      if not _whole_bytes(fd):
        raise OSError(errno.EIO, 'not whole', str(path))
      word = os.pread(fd, _GENERATION.size, _GENERATION_OFFSET)
      newest = max(_generation(*_GENERATION.unpack(word)), worker.generation)
      # A word of its own: who looks sees the old one or the new one.
      word = _GENERATION.pack(_generation_word(newest))
      os.pwrite(fd, word, _GENERATION_OFFSET)
    finally:
      os.close(fd)
  except FileNotFoundError:
    return
  except OSError as error:
    errors.check_refusal(error, path)
    is_folder = path.is_dir() and not path.is_symlink()
    shutil.rmtree(path) if is_folder else path.unlink()


def whole_bytes(path: str | os.PathLike[str]) -> int:
  """Returns the size of a segment; 0 if it is missing, cut or no segment.

  Raises:
    SystemRefusalError: the system does not let it be opened.
  """
  try:
    fd = open_file(path)
  except OSError as error:
    errors.check_refusal(error, path)
    return 0
  try:
    return _whole_bytes(fd)
  except OSError:  # a folder
    return 0
  finally:
    os.close(fd)


def _whole_bytes(fd: int) -> int:
  try:
    size_bytes = os.fstat(fd).st_size
    _read_header(os.pread(fd, _FILE.size, 0), size_bytes)
  except errors.StoreError:
    return 0
  return size_bytes


def pack_header(
  worker: keys.WorkerId, cells: int, ring_offset: int, size_bytes: int
) -> bytes:
  """Packs the first bytes of a segment.

  Args:
    worker: the worker that writes it.
    cells: the number of its cells.
    ring_offset: offset of the ring.
    size_bytes: size of the ring.
  """
  fields = (_MAGIC, cells, worker.stage, worker.replica)
  ring = (ring_offset, size_bytes)
  return _FILE.pack(
    *fields,
    _fields_checksum(*fields, *ring),
    _generation_word(worker.generation),
    *ring,
  )


def _fields_checksum(*fields: bytes | int) -> int:
  return zlib.crc32(repr(fields).encode())


def _generation_word(generation: int) -> int:
  mask = (1 << _GENERATION_BITS) - 1
  return (~generation & mask) << _GENERATION_BITS | generation


def _generation(word: int) -> int:
  """Returns the generation that a word says; raises StoreError if damaged."""
  generation = word & (1 << _GENERATION_BITS) - 1
  if word != _generation_word(generation):
    raise errors.StoreError('its header is damaged: no word of a generation')
  return generation


def _read_header(data: bytes, size_bytes: int) -> tuple[int, ...]:
  """Returns number of cells, stage, replica, offset and size of the ring.

  Args:
    data: the first bytes of a segment.
    size_bytes: the size of the file.

  Raises:
    StoreError: it is no segment, or a damaged one.
  """
  if size_bytes < _CELLS_OFFSET or len(data) < _FILE.size:
    raise errors.StoreError('not a segment: too short')
  (magic, cells, stage, replica, checksum, word, ring_offset, size) = (
    _FILE.unpack(data)
  )
  fields = (magic, cells, stage, replica, ring_offset, size)
  if (
    magic != _MAGIC
    or checksum != _fields_checksum(*fields)
    or not cells
    or ring_offset < cell_offset(cells)
    or ring_offset % mmap.PAGESIZE
    or ring_offset + size != size_bytes
  ):
    raise errors.StoreError(
      'not a segment, one of another version, or its header is damaged'
    )
  _generation(word)
  return cells, stage, replica, ring_offset, size


class Cells:
  """The cells of a segment: mapped, or a copy as they once were.

  Attributes:
    cells: their number.
    stage: the stage of the producer.
    replica: its replica.
    ring_offset: offset of the ring in the file.
    ring_bytes: size of the ring.
    commits: the commit word of each cell, 0 without an entry.
  """

  def __init__(self, memory: mmap.mmap | bytes, size_bytes: int):
    """Views a segment's first bytes; raises StoreError if it is none.

    Args:
      memory: the bytes of the file, up to the last cell or further.
      size_bytes: the size of the file.
    """
    fields = _read_header(memory[: _FILE.size], size_bytes)
    self.cells, self.stage, self.replica, self.ring_offset, self.ring_bytes = (
      fields
    )
    self._memory = memory
    words = np.frombuffer(
      memory, np.uint64, self.cells * _CELL_BYTES // 8, _CELLS_OFFSET
    ).reshape(self.cells, -1)
    # Aligned words of their own: a store or a load of one is never torn.
    self.commits = words[:, entry.COMMIT_OFFSET // 8]
    self._marks = words[:, _MARK_OFFSET // 8]
    self._words = words

  def is_live(self, cell: int) -> bool:
    """Returns whether a cell's mark, which no checksum covers, is none."""
    return int(self._marks[cell]) == _LIVE

  def is_retired(self, cell: int) -> bool:
    """Returns whether a cell is retired; neither live nor that: damaged."""
    return int(self._marks[cell]) == _RETIRED

  def header(self, cell: int) -> entry.EntryHeader | None:
    """Returns a cell's committed entry, retired or not, or None without one."""
    return self._unpack(cell, self._packed(cell))

  def mended_header(self, cell: int) -> entry.EntryHeader | None:
    """Returns a cell's entry though one bit of it may be damaged, or None."""
    if (header := self.header(cell)) is not None:
      return header
    packed = bytearray(self._packed(cell))
    for bit in range(len(packed) * 8):
      packed[bit // 8] ^= 1 << bit % 8
      if (header := self._unpack(cell, bytes(packed))) is not None:
        return header
      packed[bit // 8] ^= 1 << bit % 8
    return None

  def _packed(self, cell: int) -> bytes:
    start = cell_offset(cell)
    return self._memory[start : start + entry.HEADER_BYTES]

  def _unpack(self, cell: int, packed: bytes) -> entry.EntryHeader | None:
    header = entry.EntryHeader.unpack(packed)
    if (
      header is None
      or header.sequence % self.cells != cell
      or (header.key.stage, header.key.replica) != (self.stage, self.replica)
      or header.offset % raw_bytes.ALIGNMENT_BYTES
      or header.offset + header.nbytes > self.ring_bytes
    ):
      return None
    return header

  @property
  def newest_iteration(self) -> int:
    """Newest iteration of the committed entries; 0 when there are none."""
    iterations = self._words[:, entry.ITERATION_OFFSET // 8]
    for cell in np.argsort(iterations)[::-1].tolist():
      if self.commits[cell] and (header := self.header(cell)):
        return header.key.iteration
    return 0

  @property
  def whole_from(self) -> int:
    """The first iteration of which no entry was evicted; 0 without entries.

    Entries are evicted in the order in which they were published.
    """
    headers = self.headers()
    return headers[0].key.iteration + 1 if headers else 0

  def sequence(self, cell: int) -> int:
    """Returns the number that a cell says its entry has, damaged or not."""
    return int(self._words[cell, 0])

  def headers(self) -> list[entry.EntryHeader]:
    """Lists the committed entries, retired ones included, oldest first."""
    found = map(self.header, np.flatnonzero(self.commits).tolist())
    return sorted(filter(None, found), key=lambda header: header.sequence)


class SegmentLayout(Cells):
  """A mapped segment file, seen as header, cells and ring.

  Whoever touches what was cut off dies of SIGBUS: compare `size_bytes` before,
  or, if that death would end the run, do not map: `read_cells`.
  """

  def __init__(self, fd: int, writable: bool):
    """Maps the file; raises StoreError if it is no segment or a damaged one."""
    self.size_bytes = size_bytes = os.fstat(fd).st_size
    _read_header(os.pread(fd, _FILE.size, 0), size_bytes)
    protection = mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0)
    # Never closed by hand: it is unmapped when the last view of it is gone.
    self.map = mmap.mmap(
      fd, size_bytes, mmap.MAP_SHARED | mmap.MAP_POPULATE, protection
    )
    super().__init__(self.map, size_bytes)
    self.ring = np.frombuffer(
      self.map, np.uint8, self.ring_bytes, self.ring_offset
    )

  @property
  def generation(self) -> int:
    """Newest generation of its worker; older ones are fenced off.

    Raises StoreError if the header is damaged by now.
    """
    data = self.map[: _FILE.size]
    _read_header(data, self.size_bytes)
    return _generation(*_GENERATION.unpack_from(data, _GENERATION_OFFSET))

  @generation.setter
  def generation(self, generation: int) -> None:
    word = _generation_word(generation)
    _GENERATION.pack_into(self.map, _GENERATION_OFFSET, word)

  def retire(self, cell: int) -> None:
    """Marks a cell's entry, which a reader may still have, as retired."""
    self._marks[cell] = _RETIRED

  def reuse(self, cell: int) -> None:
    """Makes a cell, which nobody needs any more, one without an entry."""
    self.commits[cell] = 0
    self._marks[cell] = _LIVE


def open_file(path: str | os.PathLike[str], flags: int = os.O_RDONLY) -> int:
  """Opens a segment's file, no link to one; returns the descriptor."""
  return os.open(path, flags | os.O_CLOEXEC | os.O_NOFOLLOW)


def read_bytes(fd: int, buffer: memoryview, offset: int) -> None:
  """Fills a buffer from a file; raises StoreError if that was cut."""
  done = 0
  while done < len(buffer):
    count = os.preadv(fd, [buffer[done:]], offset + done)
    if not count:
      raise errors.StoreError('was cut while it was read')
    done += count


def read_cells(fd: int) -> Cells:
  """Copies the cells of a segment, which somebody may cut meanwhile.

  Raises:
    StoreError: the file is no segment, or a damaged one.
  """
  size_bytes = os.fstat(fd).st_size
  cells, *_ = _read_header(os.pread(fd, _FILE.size, 0), size_bytes)
  copy = bytearray(cell_offset(cells))
  read_bytes(fd, memoryview(copy), 0)
  return Cells(bytes(copy), size_bytes)


def write_retired(fd: int, cell: int) -> None:
  """Marks a cell's entry as retired, in a segment that is not mapped."""
  os.pwrite(fd, _MARK.pack(_RETIRED), cell_offset(cell) + _MARK_OFFSET)


def newest_iteration(path: str | os.PathLike[str]) -> int:
  """Returns the newest iteration of a segment; 0 if empty or unreadable.

  Raises:
    SystemRefusalError: the system does not let it be opened.
  """
  cells = _readable_cells(path)
  return cells.newest_iteration if cells else 0


def whole_from(path: str | os.PathLike[str]) -> int:
  """Returns the first iteration of which a segment surely has all entries.

  Later entries of its worker have not been evicted; 0 if it is empty or
  unreadable.

  Raises:
    SystemRefusalError: the system does not let it be opened.
  """
  cells = _readable_cells(path)
  return cells.whole_from if cells else 0


def _readable_cells(path: str | os.PathLike[str]) -> Cells | None:
  """Reads a segment's cells; None if it is missing, cut or damaged.

  Raises:
    SystemRefusalError: the system does not let it be opened.
  """
  try:
    with os.fdopen(open_file(path), 'rb', buffering=0) as file:
      return read_cells(file.fileno())
  except OSError as error:
    errors.check_refusal(error, path)
  except errors.StoreError:
    pass
  return None


def newest_generation(path: str | os.PathLike[str]) -> int:
  """Returns the generation of a segment's newest writer.

  Raises:
    OSError: it cannot be read.
    StoreError: the file is no segment, or a damaged one.
  """
  with os.fdopen(open_file(path), 'rb', buffering=0) as file:
    data = os.pread(file.fileno(), _FILE.size, 0)
    try:
      _read_header(data, os.fstat(file.fileno()).st_size)
    except errors.StoreError as error:
      raise errors.StoreError(f'{path}: {error}') from error
    return _generation(*_GENERATION.unpack_from(data, _GENERATION_OFFSET))
