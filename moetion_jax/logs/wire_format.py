"""Messages between hosts: their form and their security.

```
message   magic, version, type | worker, generation | key | offset
READ      message                        from whom, what
PIECE     message + entry header | bytes of the payload from `offset` on
FENCED    message                        a newer generation took over
```

Fixed sizes and raw bytes, checked before use; nothing is unpickled or parsed.
"""

from __future__ import annotations

import dataclasses
import enum
import hashlib
import ipaddress
import struct

import zmq
import zmq.utils.z85

from moetion_jax import errors, keys

_MESSAGE = struct.Struct('<4sBB2xiiQqiiiiQ')
_MAGIC = b'MoEt'
_VERSION = 1
_MIN_SECRET_BYTES = 16
MESSAGE_BYTES = _MESSAGE.size


class MessageType(enum.IntEnum):
  """Type of a message; the numbers are part of the protocol."""

  READ = 1
  PIECE = 2
  FENCED = 3


def pack(
  kind: int, worker: keys.WorkerId, key: keys.EntryKey, offset: int = 0
) -> bytes:
  """Packs the fixed-size first part of every message."""
  return _MESSAGE.pack(
    _MAGIC,
    _VERSION,
    kind,
    worker.stage,
    worker.replica,
    worker.generation,
    key.iteration,
    key.stage,
    key.replica,
    key.kind,
    key.microbatch,
    offset,
  )


def unpack(
  data: bytes,
) -> tuple[MessageType, keys.WorkerId, keys.EntryKey, int] | None:
  """Inverts `pack`; returns None if `data` is anything else."""
  if len(data) != _MESSAGE.size:
    return None
  magic, version, kind, *worker_and_key, offset = _MESSAGE.unpack(data)
  stage, replica, generation, iteration, of_stage, of_replica, entry_kind, m = (
    worker_and_key
  )
  if magic != _MAGIC or version != _VERSION:
    return None
  try:
    key = keys.EntryKey(
      iteration, of_stage, of_replica, keys.EntryKind(entry_kind), m
    )
    kind = MessageType(kind)
  except ValueError:
    return None
  return kind, keys.WorkerId(stage, replica, generation), key, offset


@dataclasses.dataclass(frozen=True)
class CurveKeys:
  """CURVE keys of a job; either end computes all of them from its secret.

  One pair for servers and one for clients: whoever knows the secret is in the
  job. A key file per host would protect nothing more, since whoever reads one
  host's memory has the training state, and it would have to be handed around.
  """

  server_public: bytes
  server_secret: bytes
  client_public: bytes
  client_secret: bytes

  @classmethod
  def from_secret(cls, secret: bytes) -> CurveKeys:
    """Derives the keys; any 32 bytes are a Curve25519 secret key.

    Raises:
      ValueError: the secret is shorter than 16 bytes.
    """
    if len(secret) < _MIN_SECRET_BYTES:
      raise ValueError(f'a job secret has at least {_MIN_SECRET_BYTES} bytes')
    pairs = []
    for role in (b'moetion-server', b'moetion-client'):
      private = zmq.utils.z85.encode(
        hashlib.blake2b(secret, digest_size=32, person=role).digest()
      )
      pairs += [zmq.curve_public(private), private]
    return cls(*pairs)

  def callback(self, domain: str, key: bytes) -> bool:
    """Tells pyzmq's authenticator, which calls it, if a client may connect."""
    del domain
    return key == self.client_public


def check_address(address: str, secret: bytes | None) -> None:
  """Raises StoreError if others could listen at `address` without a secret."""
  if secret is None and not _is_loopback(address):
    raise errors.StoreError(
      f'{address}: outside loopback a job secret is needed, which encrypts '
      'and authenticates every connection'
    )


def _is_loopback(address: str) -> bool:
  host = address.removeprefix('tcp://').rpartition(':')[0].strip('[]')
  try:
    return ipaddress.ip_address(host).is_loopback
  except ValueError:  # a name: who knows where it leads
    return False
