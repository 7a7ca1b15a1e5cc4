"""Entries on other hosts: where they are, and that a reader was replaced."""

from __future__ import annotations

import dataclasses

from moetion_jax import errors


class FencedError(errors.StoreError):
  """This worker was replaced: a newer generation of it exists."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Location:
  """Where the entries of one producer are.

  Attributes:
    host: name of the host, as the readers' settings call it.
    address: of that host's store server, 'tcp://<address>:<port>'.
    generation: of the producer.
  """

  host: str
  address: str = ''
  generation: int = 0
