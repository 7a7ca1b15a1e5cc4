"""Entries on other hosts: their location, and the error of a fenced reader."""

from __future__ import annotations

import dataclasses

from moetion_jax import errors


class FencedError(errors.StoreError):
  """This worker was replaced: a newer generation of it exists."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Location:
  """Location of the entries of one producer.

  Attributes:
    host: name of the host, as the readers' settings call it.
    address: address of that host's store server, 'tcp://<address>:<port>'.
    generation: generation of the producer.
  """

  host: str
  address: str = ''
  generation: int = 0
