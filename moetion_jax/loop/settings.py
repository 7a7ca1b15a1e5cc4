"""Settings of sparse checkpoints in anyone's training loop."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from typing import Any

from jax import numpy as jnp


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoopSettings:
  """How a loop's state is captured.

  Attributes:
    folder: where snapshots lie: a new folder, or that of the run to go on
      with, in tmpfs ('/dev/shm/my-run'). It is made with mode 0700, and stays
      when the loop ends.
    compute_dtype: in which the step reads its masters.
    window_length: iterations that together capture everything.
    is_master: which leaves are masters (fp32 parameters that the step reads
      through a cast to `compute_dtype`), by path. Of an operator that is not
      restored yet, those are known and everything else is zero.
    compute_dtype_of: for masters that are read in another dtype, by path.
    must_be_exact: whether to refuse a restored state that has other bits than
      the one that was captured; False: it is taken, and that is logged.
  """

  folder: str | os.PathLike[str]
  compute_dtype: Any = jnp.bfloat16
  window_length: int = 4
  is_master: Callable[[str], bool] = lambda path: path.startswith('params/')
  compute_dtype_of: Callable[[str], Any] | None = None
  must_be_exact: bool = True
