"""The rule of digests (see `state/digest.py`), for NumPy and for JAX alike.

Who computes digests on a device and who does so on the host share this, so that
they come to the same bits.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterable
from typing import Any

import numpy as np

SUM_ROWS = 256
# From 64 rows on XLA leaves the vectorized path (measured: 8 times slower).
_ROWS = 32
_ODD = 0x9E3779B1
_STEP = 0x243F6A89


def rows_of(words: int) -> int:
  """Returns the rows in which so many words of a leaf are laid out."""
  return math.gcd(words, _ROWS)


def powers(rows: int) -> np.ndarray:
  """Returns the factor of each row, u32[rows]: powers of an odd constant."""
  return np.array([pow(_ODD, i, 1 << 32) for i in range(rows)], np.uint32)


def padded(columns: int) -> int:
  """Returns the length to which so many columns are padded; at least one."""
  width = max(columns, 1)  # leaves may be empty
  return width + -width % SUM_ROWS


def blend(word: Any) -> Any:
  """Mixes the upper half of each u32 word into its lower half."""
  return word ^ (word >> 15)


def mix_columns(columns: Any, position: Any, names: Iterable[str]) -> Any:
  """Mixes each column word with its position and all leaves' names.

  Args:
    columns: u32[operators, columns].
    position: the columns' positions, u32[columns].
    names: the names of all leaves, in order.
  """
  salt = np.uint32(zlib.crc32('\n'.join(names).encode()))
  return mix(columns + position * np.uint32(_STEP) + salt)


def weights(position: Any) -> Any:
  """Returns the odd weight of each column in the second lane."""
  return 2 * position + 1


def mix(x: Any) -> Any:
  """Mixes 32 bits invertibly (the finalizer of MurmurHash3)."""
  x = (x ^ (x >> 16)) * np.uint32(0x85EBCA6B)
  x = (x ^ (x >> 13)) * np.uint32(0xC2B2AE35)
  return x ^ (x >> 16)
