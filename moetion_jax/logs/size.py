"""Host memory that the boundary logs of a run take, as pure functions."""

from __future__ import annotations

import dataclasses

from moetion_jax import job_spec
from moetion_jax.hostmem import segment

_SCALARS_BYTES = 4 * 4
_SPARE_CELLS = 64


@dataclasses.dataclass(frozen=True, kw_only=True)
class LogSize:
  """Size of one worker's log.

  Attributes:
    ring_bytes: size of the ring of payloads.
    cells: number of entries that the log can hold.
  """

  ring_bytes: int
  cells: int

  @property
  def file_bytes(self) -> int:
    """Host memory that the log takes."""
    return segment.file_bytes(self.ring_bytes, self.cells)


def entry_sizes(job: job_spec.JobSpec, stage: int) -> list[int]:
  """Lists the bytes of each payload that a stage publishes in an iteration."""
  train = job.train
  neighbours = (stage > 0) + (stage < train.stages - 1)
  entries = train.microbatches * neighbours
  if train.eval_every and stage < train.stages - 1:
    entries += train.eval_microbatches
  return [job.hidden_bytes] * entries + [_SCALARS_BYTES]


def log_size(job: job_spec.JobSpec, stage: int, log_iterations: int) -> LogSize:
  """Computes the log size of a stage that keeps `log_iterations` iterations."""
  sizes = entry_sizes(job, stage)
  return LogSize(
    ring_bytes=segment.ring_bytes(sizes, log_iterations),
    cells=len(sizes) * (log_iterations + 1) + _SPARE_CELLS,
  )
