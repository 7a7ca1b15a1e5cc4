"""Uses of JAX internals: all that there are, each with its reason.

JAX has no public name for these. Tests of the same names
(`tests/programs/jax_internals_test.py`) fail when a new release breaks one.
Verified with jax 0.10.2 and 0.11.2.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax._src import distributed, xla_bridge
from jax.extend import backend
from jaxlib import _jax

# A week: it is the agent that ends a wait that leads nowhere.
_MEETING_MILLISECONDS = 7 * 24 * 3600 * 1000


def has_backend() -> bool:
  """Returns whether this process has created a backend; creates none.

  Reason: a standby must not take accelerator memory, and asserts that it has
  not. Every public function that could tell creates the backend.
  """
  return xla_bridge.backends_are_initialized()


def platform_of(client: Any) -> str:
  """Returns the platform that programs for a client's devices are lowered for.

  Reason: `Device.platform` says 'gpu' where lowering wants 'cuda' or 'rocm'.

  Args:
    client: client of a device, `device.client`.
  """
  return getattr(client, '_raw_platform', client.platform)


@dataclasses.dataclass(frozen=True)
class _StandInClient:
  """Stands in for a backend's client, as far as lowering asks for it."""

  platform: str
  runtime_type: str = ''


# `jax.default_device` accepts types that have 'Device' in their name.
@dataclasses.dataclass(frozen=True)
class _StandInDevice:
  """Stands in for the default device, of which lowering wants the platform."""

  client: _StandInClient

  @property
  def platform(self) -> str:
    return self.client.platform


@contextlib.contextmanager
def lowering_without_backend(platform: str) -> Iterator[None]:
  """Lets `traced.lower(lowering_platforms=...)` run without a backend.

  Reason: JAX lowers for an abstract mesh and a named platform, but asks the
  default device for its client on the way, which would create the backend.

  Args:
    platform: the platform, as `platform_of` names it.
  """
  device: Any = _StandInDevice(_StandInClient(platform))
  with jax.default_device(device):
    yield


def compile_lowered(
  lowered: jax.stages.Lowered, devices: tuple[Any, ...]
) -> Callable[..., Any]:
  """Compiles for devices a program that was lowered without a backend.

  Reason: the lowered program remembers the stand-in's client, and no public
  argument of `Lowered.compile` replaces it.

  Args:
    lowered: the program, lowered over an abstract mesh.
    devices: the devices, in the order of the mesh.
  """
  lowered._lowering.compile_args['backend'] = devices[0].client
  return lowered.compile(device_assignment=devices)


def gather_at(host: str) -> None:
  """Has the CPU collectives of this process's world use one address.

  Reason: JAX does not tell gloo which, and that looks up the host's own name:
  it may have no address, or one that others reach. Call this after
  `jax.distributed.initialize`, before there is a backend.

  Args:
    host: this host's address, as the other members of the world reach it.
  """
  if jax.config.values['jax_cpu_collectives_implementation'] != 'gloo':
    return
  collectives = _jax.make_gloo_tcp_collectives(
    distributed_client=distributed.global_state.client, hostname=host
  )
  factory = functools.partial(xla_bridge.make_cpu_client, collectives)
  backend.register_backend_factory(
    'cpu', factory, priority=0, fail_quietly=False
  )


def let_all_write_cache() -> None:
  """Lets this process write the compilation cache whatever its number is.

  Reason: JAX leaves that to process 0 of a world. But the key of a program on a
  process's own devices has their numbers in it (on CPU), so process 0 never
  writes it, and the others would compile again in every generation. Call it
  when there is a backend: creating one needs the true number.
  """
  assert has_backend()
  distributed.global_state.process_id = 0


def meet(name: str) -> None:
  """Waits until all processes of the world call this, however long it takes.

  Reason: gloo gives a member 30 s to come to the first collective, and no other
  limit can be set; on a machine that has much to do that is no failure. Every
  public function that waits for all is a collective itself.

  Args:
    name: the name of the meeting; there is one of it in a world.
  """
  distributed.global_state.client.wait_at_barrier(name, _MEETING_MILLISECONDS)


@contextlib.contextmanager
def first_writes_cache() -> Iterator[None]:
  """Lets process 0 alone write the compilation cache, inside the block.

  Reason: all processes of a world have the same key for a program over all of
  its devices; `let_all_write_cache` would have each of them write it.
  """
  state = distributed.global_state
  process_id, state.process_id = state.process_id, jax.process_index()
  try:
    yield
  finally:
    state.process_id = process_id
