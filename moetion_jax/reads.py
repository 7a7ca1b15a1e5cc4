"""A read in the background: what was asked for, and the array to come."""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses

import jax
import numpy as np

from moetion_jax import base, entry


@dataclasses.dataclass
class Read:
  """A read of one entry.

  Attributes:
    sharding: where to put it; None for the default device.
    verify: whether to check the checksum of an entry in shared memory.
    committed_nanoseconds: see `entry.EntryHeader`; 0 until it is done.
    future: of the array on the device.
  """

  sharding: jax.sharding.Sharding | None
  verify: bool
  committed_nanoseconds: int = 0
  future: concurrent.futures.Future[jax.Array] = dataclasses.field(
    default_factory=concurrent.futures.Future
  )

  def put(self, header: entry.EntryHeader, array: np.ndarray) -> jax.Array:
    """The entry on the device.

    Raises:
      EntryCorruptError: it is damaged.
    """
    if self.verify:
      entry.verify(header, array)
    self.committed_nanoseconds = header.committed_nanoseconds
    return jax.device_put(array, self.sharding)

  def complete(
    self,
    header: entry.EntryHeader | None,
    result: np.ndarray | base.StoreError,
  ) -> None:
    """Ends the read with an entry, header included, or with an error."""
    # Closing may have ended it meanwhile.
    with contextlib.suppress(concurrent.futures.InvalidStateError):
      try:
        if isinstance(result, base.StoreError):
          raise result
        assert header is not None
        array = self.put(header, result)
      except Exception as error:
        self.future.set_exception(error)
      else:
        self.future.set_result(array)
