"""Real text by random access: a batch is a function of where it is used.

`batch(iteration, microbatch)` depends on nothing but the config and the corpus,
so a worker that replays an iteration reads the very same tokens, in any order
and in any process.

There is no prefetch thread: on a 2-core machine a batch of 16 x 256 tokens
takes about 220 microseconds (200 of them Grain's, about 12 a sequence).

Shapes: `B` sequences in a global microbatch, `T` tokens in a sequence, `N`
tokens in the corpus. A window is T + 1 consecutive tokens: inputs and labels.
"""

from __future__ import annotations

import dataclasses
import functools
import glob
import hashlib
import os
import platform
import sysconfig
from collections.abc import Iterator
from typing import NamedTuple, SupportsIndex

import grain
import numpy as np

from moetion_jax import errors

# One block in this many is held out. A block has up to this many windows, fewer
# in a small corpus, so that there are blocks to choose from.
_HELD_OUT_ONE_IN = 20
_MAX_BLOCK_WINDOWS = 16
_MIN_BLOCKS = 640

# Up to these sizes all contents are read, beyond them evenly spaced samples.
_CHECKED_WHOLE_BYTES = 4 << 30
_HASHED_WHOLE_BYTES = 1 << 30
_CHUNK_BYTES = 4 << 20
_PIECE_BYTES = 4 << 10
_SAMPLED_CHUNKS = 64

_BIN_DTYPES = {'uint16': '<u2', 'uint32': '<u4'}


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
  """Settings of what is read and how it is cut.

  Attributes:
    data: file, folder or glob, read as bytes, or one `.bin` file of token ids;
      '' is the Python standard library's own source text.
    data_dtype: dtype of the ids in a `.bin` file, 'uint16' or 'uint32'.
    sequence_length: T, tokens the model reads in one sequence.
    microbatch_size: B, sequences in one global microbatch.
    microbatches: global microbatches in an iteration.
    vocab_size: size of the vocabulary; every token id is below it.
    seed: seed of the order of the training windows; the split ignores it.
  """

  data: str = ''
  data_dtype: str = 'uint16'
  sequence_length: int
  microbatch_size: int
  microbatches: int
  vocab_size: int
  seed: int

  def __post_init__(self):
    """Raises ConfigError for a value out of range."""
    sizes = ('sequence_length', 'microbatch_size', 'microbatches', 'vocab_size')
    for flag in sizes:
      if getattr(self, flag) < 1:
        raise errors.ConfigError(
          flag, getattr(self, flag), 'must be at least 1'
        )
    if self.seed < 0:
      raise errors.ConfigError('seed', self.seed, 'must not be negative')
    if self.data_dtype not in _BIN_DTYPES:
      reason = f'must be one of {", ".join(_BIN_DTYPES)}'
      raise errors.ConfigError('data_dtype', self.data_dtype, reason)


class Batch(NamedTuple):
  """One global microbatch; a label is the token after its input."""

  inputs: np.ndarray  # i32[B, T]
  labels: np.ndarray  # i32[B, T]


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Split:
  """The blocks of consecutive windows that train, and those held out.

  Window i is tokens [i * (T + 1), (i + 1) * (T + 1)): windows never overlap.
  """

  block_windows: int
  training_blocks: np.ndarray  # i64, ascending
  held_out_blocks: np.ndarray  # i64, ascending


def split_windows(num_windows: int, min_training: int) -> Split:
  """Holds out 5 % of the blocks, at least one where possible.

  The choice depends only on the number of blocks. Windows that fill no block
  are left out.

  Args:
    num_windows: windows in the corpus, at least `min_training`.
    min_training: windows that training must keep, at least 1.
  """
  block_windows = num_windows // max(_MIN_BLOCKS, min_training)
  block_windows = min(max(block_windows, 1), _MAX_BLOCK_WINDOWS)
  num_blocks = num_windows // block_windows
  num_held_out = min(
    max(num_blocks // _HELD_OUT_ONE_IN, 1),
    (num_blocks * block_windows - min_training) // block_windows,
  )
  order = np.argsort(_hash(np.arange(num_blocks, dtype=np.uint64)))
  return Split(
    block_windows=block_windows,
    training_blocks=np.sort(order[num_held_out:]),
    held_out_blocks=np.sort(order[:num_held_out]),
  )


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Dataset:
  """A corpus cut into training and held-out batches; made by `load`.

  Every method is a pure function of its arguments and may be called from any
  thread.

  Attributes:
    config: the settings it was loaded with.
    name: the corpus's name, the same on every machine.
    tokens: [N] uint8 in memory, or uint16 or uint32 mapped from a file.
    split: its blocks that train, and those held out.
  """

  config: DataConfig
  name: str
  tokens: np.ndarray
  split: Split

  def batch(self, iteration: int, microbatch: int) -> Batch:
    """Returns the training batch of one global microbatch.

    Windows are drawn without replacement in each epoch and reshuffled in the
    next one; a batch that lies across two epochs is full like any other.

    Args:
      iteration: the iteration's number, from 1.
      microbatch: global index within the iteration, from 0.

    Raises:
      ConfigError: a token id is not below `vocab_size`.
    """
    if iteration < 1 or not 0 <= microbatch < self.config.microbatches:
      raise ValueError(f'no microbatch {microbatch} in iteration {iteration}')
    index = (iteration - 1) * self.config.microbatches + microbatch
    return self._as_batch(self._training_batches[index])

  @property
  def num_held_out_batches(self) -> int:
    """Number of batches that show every held-out window; 0 in a tiny corpus."""
    return -(-len(self._held_out_windows) // self.config.microbatch_size)

  def held_out_batch(self, index: int) -> Batch:
    """Returns held-out batch `index` modulo `num_held_out_batches`.

    The order is shuffled once, the same for every seed, so that a few batches
    are a fair sample. The last batch is filled up from the first one.

    Raises:
      ConfigError: the corpus is too small to hold anything out, or a token id
        is not below `vocab_size`.
    """
    if not self.num_held_out_batches:
      raise _error(self.config, 'too few tokens to hold any out')
    index %= self.num_held_out_batches
    return self._as_batch(self._held_out_batches[index])

  def fingerprint(self) -> dict[str, str | int]:
    """Returns what tells this corpus from another one, ready for JSON.

    Reads up to 1 GiB; `hashed_bytes` below the corpus's size says that only
    evenly spaced samples were read. A mapped file is read each time, since it
    may have changed.
    """
    return self._hashed() if self.mapped_files() else self._hashed_once

  def mapped_files(self) -> tuple[str, ...]:
    """Returns the paths of what `fingerprint` reads each time."""
    path = getattr(self.tokens, 'filename', None)  # a `np.memmap` has one
    return (str(path),) if path else ()

  @functools.cached_property
  def _hashed_once(self) -> dict[str, str | int]:
    return self._hashed()

  def _hashed(self) -> dict[str, str | int]:
    digest = hashlib.blake2b(str(self.tokens.size).encode(), digest_size=16)
    hashed_bytes = 0
    for chunk in _chunks(self.tokens, _HASHED_WHOLE_BYTES):
      digest.update(chunk.data)
      hashed_bytes += chunk.nbytes
    return {
      'name': self.name,
      'tokens': self.tokens.size,
      'dtype': self.tokens.dtype.name,
      'bytes': self.tokens.nbytes,
      'hashed_bytes': hashed_bytes,
      'blake2b': digest.hexdigest(),
    }

  @functools.cached_property
  def _training_batches(self) -> grain.MapDataset:
    windows = self._windows(self.split.training_blocks)
    shuffled = grain.MapDataset.source(windows).seed(self.config.seed).shuffle()
    return shuffled.repeat().batch(self.config.microbatch_size)

  @functools.cached_property
  def _held_out_batches(self) -> grain.MapDataset:
    shuffled = grain.MapDataset.source(self._held_out_windows).shuffle(seed=0)
    repeated = shuffled.repeat(reseed_each_epoch=False)
    return repeated.batch(self.config.microbatch_size)

  @property
  def _held_out_windows(self) -> _Windows:
    return self._windows(self.split.held_out_blocks)

  def _windows(self, blocks: np.ndarray) -> _Windows:
    return _Windows(
      # A plain array: slicing a memory-mapped one costs more.
      tokens=np.asarray(self.tokens),
      window_tokens=self.config.sequence_length + 1,
      block_windows=self.split.block_windows,
      blocks=blocks,
    )

  def _as_batch(self, windows: np.ndarray | None) -> Batch:
    assert windows is not None  # None occurs in filtered Grain datasets only
    # Checked in the file's own dtype: as int32 a large uint32 is negative.
    _check_ids(int(windows.max()), self.config)
    return Batch(
      inputs=np.ascontiguousarray(windows[:, :-1], np.int32),
      labels=np.ascontiguousarray(windows[:, 1:], np.int32),
    )


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class _Windows:
  """Grain's random-access source: the windows of some blocks."""

  tokens: np.ndarray  # [N]
  window_tokens: int
  block_windows: int
  blocks: np.ndarray

  def __len__(self) -> int:
    return len(self.blocks) * self.block_windows

  def __getitem__(self, index: SupportsIndex) -> np.ndarray:
    block, offset = divmod(index.__index__(), self.block_windows)
    window = int(self.blocks[block]) * self.block_windows + offset
    start = window * self.window_tokens
    return self.tokens[start : start + self.window_tokens]


def load(config: DataConfig) -> Dataset:
  """Opens, checks and splits the corpus.

  Raises:
    ConfigError: it is missing, empty, unreadable or damaged, holds fewer tokens
      than one batch, or an id that is not below `vocab_size`.
  """
  try:
    name, tokens = _open(config)
  except OSError as error:
    raise _error(config, f'cannot be read: {error}') from error
  window_tokens = config.sequence_length + 1
  needed = config.microbatch_size * window_tokens
  if tokens.size < needed:
    raise _error(
      config,
      f'has {tokens.size} tokens, but one batch of {config.microbatch_size} '
      f'different windows of {window_tokens} needs {needed}',
    )
  chunks = _chunks(tokens, _CHECKED_WHOLE_BYTES)
  _check_ids(max(int(chunk.max()) for chunk in chunks), config)
  split = split_windows(tokens.size // window_tokens, config.microbatch_size)
  return Dataset(config=config, name=name, tokens=tokens, split=split)


def _open(config: DataConfig) -> tuple[str, np.ndarray]:
  """Returns the corpus's name and its tokens [N]."""
  if not config.data:
    root = sysconfig.get_path('stdlib')
    excluded = ('site-packages', 'dist-packages', '__pycache__')
    files = [f for f in _files_below(root, excluded) if f.endswith('.py')]
    return f'python-{platform.python_version()}-stdlib', _read(files, config)
  path = os.path.expanduser(config.data)
  name = os.path.basename(os.path.abspath(path))
  if os.path.isdir(path):
    if name.endswith('.bin'):
      raise _error(config, 'is a folder')
    files = _files_below(path)
  elif os.path.isfile(path):
    if path.endswith('.bin'):
      return name, _map(path, config)
    files = [path]
  elif os.path.exists(path):
    raise _error(config, 'is no regular file')
  else:
    files = sorted(filter(os.path.isfile, glob.glob(path, recursive=True)))
    if not files:
      reason = 'no such file or folder, and as a pattern it matches no file'
      raise _error(config, reason)
  return name, _read(files, config)


def _files_below(root: str, excluded: tuple[str, ...] = ()) -> list[str]:
  """Returns the regular files below `root` that are not hidden, sorted."""
  found, folders = [], [root]
  while folders:
    with os.scandir(folders.pop()) as entries:  # os.walk asks for each name
      for entry in entries:
        if entry.name.startswith('.'):
          continue
        if entry.is_dir(follow_symlinks=False):
          if entry.name not in excluded:
            folders.append(entry.path)
        elif entry.is_file(follow_symlinks=False) or os.path.isfile(entry):
          found.append(entry.path)
  return sorted(found)


def _read(files: list[str], config: DataConfig) -> np.ndarray:
  """Returns the files' bytes, one 0 byte between two files: uint8[N]."""
  text = bytearray()
  for file in files:
    if file.endswith('.bin'):
      raise _error(config, f'{file} holds token ids: name it alone')
    start = len(text)
    with open(file, 'rb', buffering=0) as stream:
      size_bytes = os.fstat(stream.fileno()).st_size
      # Room for more than there is would cost more than the reading.
      piece_bytes = min(max(size_bytes + 1, _PIECE_BYTES), _CHUNK_BYTES)
      while chunk := stream.read(piece_bytes):
        text += chunk
    if len(text) > start:
      text.append(0)
  if not text:
    raise _error(config, 'is empty')
  tokens = np.frombuffer(text, np.uint8)[:-1]
  tokens.flags.writeable = False
  return tokens


def _map(path: str, config: DataConfig) -> np.ndarray:
  """Returns the ids in a `.bin` file, mapped, not read: [N]."""
  dtype = np.dtype(_BIN_DTYPES[config.data_dtype])
  size_bytes = os.path.getsize(path)
  if not size_bytes:
    raise _error(config, 'is empty')
  if size_bytes % dtype.itemsize:
    raise _error(
      config,
      f'{size_bytes} bytes are no whole number of {config.data_dtype} ids',
    )
  return np.memmap(path, dtype, mode='r')


def _chunks(tokens: np.ndarray, whole_bytes: int) -> Iterator[np.ndarray]:
  """Yields all tokens, or evenly spaced samples beyond `whole_bytes`."""
  size = _CHUNK_BYTES // tokens.itemsize
  starts = range(0, tokens.size, size)
  if tokens.nbytes > whole_bytes:
    last = max(tokens.size - size, 0)
    starts = [last * i // (_SAMPLED_CHUNKS - 1) for i in range(_SAMPLED_CHUNKS)]
  for start in starts:
    yield tokens[start : start + size]


def _error(config: DataConfig, reason: str) -> errors.ConfigError:
  return errors.ConfigError('data', config.data, reason)


def _check_ids(largest: int, config: DataConfig) -> None:
  """Raises ConfigError if the largest id has no place in the vocabulary."""
  if largest >= config.vocab_size:
    raise _error(
      config,
      f'token id {largest} found, but vocab_size is {config.vocab_size}',
    )


def _hash(x: np.ndarray) -> np.ndarray:
  """Mixes u64[...] one to one (splitmix64), on every machine alike."""
  x = (x + 1) * 0x9E3779B97F4A7C15
  x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9
  x = (x ^ x >> 27) * 0x94D049BB133111EB
  return x ^ x >> 31
