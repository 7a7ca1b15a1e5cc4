"""Settings of sparse checkpoints in a user's own training loop."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from typing import Any

from jax import numpy as jnp


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoopSettings:
  """Settings for capturing a loop's state.

  Attributes:
    folder: the folder of the snapshots: a new one, or that of the run to go on
      with, in tmpfs ('/dev/shm/my-run'). It is made with mode 0700, and stays
      when the loop ends.
    compute_dtype: the dtype in which the step reads its masters.
    window_length: number of iterations that together capture everything.
    is_master: tells by its path whether a leaf is a master (an fp32 parameter
      that the step reads through a cast to `compute_dtype`). Of an operator
      that is not restored yet, masters are known and everything else is zero.
    compute_dtype_of: the dtype in which a master is read, by its path; None:
      `compute_dtype` for all.
    must_be_exact: whether to refuse a restored state that has other bits than
      the captured one; False: it is taken, and that is logged.
    accept_changes: names of libraries, options of JAX, flags and variables that
      may be other ones than those with which the snapshots were taken. Other
      bits follow, from the iteration on that is logged. 'environment.json'
      goes on with snapshots of which nothing says what they were taken with.
  """

  folder: str | os.PathLike[str]
  compute_dtype: Any = jnp.bfloat16
  window_length: int = 4
  is_master: Callable[[str], bool] = lambda path: path.startswith('params/')
  compute_dtype_of: Callable[[str], Any] | None = None
  must_be_exact: bool = True
  accept_changes: tuple[str, ...] = ()
