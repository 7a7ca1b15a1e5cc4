"""Tracing, lowering and compiling a stage's programs, one step at a time.

Only the last step needs devices. A warm standby has no backend (it would take
accelerator memory from the workers) and does the first two: what is left when
it is promoted is a read of the persistent compilation cache. Every worker goes
through the same steps, so cache key and executable are the same either way.

Programs are mapped over an abstract mesh; `compile` gives it its devices.
"""

from __future__ import annotations

import contextlib
import dataclasses
import warnings
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import jax

from moetion_jax.programs import jax_internals, mesh as mesh_lib

Tree: TypeAlias = Any
OnProgram: TypeAlias = Callable[[str], None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProgramShape:
  """Sizes that a stage's programs are compiled for.

  Attributes:
    microbatch_size: sequences B of one microbatch.
    sequence_length: tokens T of one sequence.
    microbatches: microbatches M per replica and iteration.
    replicas: number of replicas of the stage.
    team: the replicas that have a worker in the stage world, ascending; they
      also do the microbatches of the others. None: all.
  """

  microbatch_size: int
  sequence_length: int
  microbatches: int
  replicas: int = 1
  team: tuple[int, ...] | None = None

  @property
  def workers(self) -> tuple[int, ...]:
    """Replicas that have a worker."""
    return tuple(range(self.replicas)) if self.team is None else self.team

  @property
  def world_size(self) -> int:
    """Number of workers in the stage world."""
    return len(self.workers)


@dataclasses.dataclass(frozen=True)
class Programs:
  """Compiled programs of one stage.

  The fields stand in the order of their first use, which is the order in which
  they are compiled.

  Attributes:
    place: state -> state; a copy in buffers of its own.
    compute_of: state -> compute; the same casts as in `update`. Where replicas
      share the state: -> words, the bits of its own (`zero1.Ownership.pack`).
    gather: words of all replicas -> compute. None where each replica has all of
      the state.
    zeros: () -> acc.
    forward: (compute, inputs, position) -> (y, residuals, counts).
    backward: (compute, residuals, dy, acc) -> (dx, acc); donates residuals and
      acc. dy is () in the last stage, dx is () in the first.
    reduce: (acc, counts of all M), each a tuple with one item a lane (see
      `ordered_sum.Order.lanes`) -> (gradients, scalars); fp32, over the mesh.
    update: (state, gradients, clip_factor, slot) -> (state, compute,
      selection); donates state. `slot` and `selection` are bool masks by group.
      `compute` is () where replicas share the state.
    digest: state -> u32[operators, 2], in the partition's order.
    evaluate: (compute, inputs) -> y, or the mean loss f32[] in the last stage.
  """

  place: Callable[..., Any]
  compute_of: Callable[..., Any]
  zeros: Callable[..., Any]
  forward: Callable[..., Any]
  backward: Callable[..., Any]
  reduce: Callable[..., Any]
  update: Callable[..., Any]
  digest: Callable[..., Any]
  evaluate: Callable[..., Any]
  gather: Callable[..., Any] | None = None


ORDER = tuple(f.name for f in dataclasses.fields(Programs))
# Programs that run over the devices of all replicas.
IN_WORLD = frozenset({'reduce', 'gather'})


@dataclasses.dataclass(frozen=True)
class LoweredPrograms:
  """Programs as StableHLO for one platform; see `TracedPrograms.lower`."""

  lowered: Mapping[str, jax.stages.Lowered]

  def compile(
    self,
    mesh: jax.sharding.Mesh,
    on_program: OnProgram = lambda _: None,
    world: jax.sharding.Mesh | None = None,
  ) -> Programs:
    """Compiles all the programs of a stage; see `compile_each`."""
    return Programs(**self.compile_each(mesh, on_program, world))

  def compile_each(
    self,
    mesh: jax.sharding.Mesh,
    on_program: OnProgram = lambda _: None,
    world: jax.sharding.Mesh | None = None,
  ) -> dict[str, Callable[..., Any]]:
    """Compiles for `mesh`, or loads from the persistent compilation cache.

    Args:
      mesh: mesh of the abstract mesh's shape, with devices of the platform that
        the programs were lowered for.
      on_program: called with each program's name before it is compiled.
      world: mesh for the programs IN_WORLD; None: `mesh` is all the world.
    """
    compiled = {}
    for name, lowered in self.lowered.items():
      on_program(name)
      in_world = world is not None and name in IN_WORLD
      where = world if world is not None and in_world else mesh
      devices = tuple(where.devices.flat)
      with (
        jax_internals.first_writes_cache()
        if in_world
        else contextlib.nullcontext()
      ):
        compiled[name] = jax_internals.compile_lowered(lowered, devices)
    return compiled


@dataclasses.dataclass(frozen=True)
class TracedPrograms:
  """Programs as jaxprs over an abstract mesh; made without any backend."""

  traced: Mapping[str, jax.stages.Traced]

  def lower(
    self, platform: str, on_program: OnProgram = lambda _: None
  ) -> LoweredPrograms:
    """Lowers for a platform ('cpu', 'cuda', ...); needs no backend.

    Args:
      platform: the platform, as `platform_of` names it.
      on_program: called with each program's name before it is lowered.
    """
    lowered = {}
    with (
      jax_internals.lowering_without_backend(platform),
      warnings.catch_warnings(),
    ):
      # Residuals are donated so that they are freed early, though few of them
      # have an output of their shape: JAX warns of that.
      warnings.filterwarnings('ignore', 'Some donated buffers')
      for name, traced in self.traced.items():
        on_program(name)
        lowered[name] = traced.lower(lowering_platforms=(platform,))
    return LoweredPrograms(lowered)

  def compile(
    self,
    mesh: jax.sharding.Mesh,
    on_program: OnProgram = lambda _: None,
    world: jax.sharding.Mesh | None = None,
  ) -> Programs:
    """Lowers for the mesh's platform and compiles; see `LoweredPrograms`."""
    lowered = self.lower(platform_of(mesh), on_program)
    return lowered.compile(mesh, on_program, world)


def platform_of(mesh: jax.sharding.Mesh) -> str:
  """Returns the platform that programs of `mesh` are lowered for."""
  return jax_internals.platform_of(mesh.devices.flat[0].client)


def trace(
  mesh: jax.sharding.AbstractMesh,
  function: Callable[..., Any],
  in_specs: tuple[Tree, ...],
  out_specs: Tree,
  shapes: tuple[Tree, ...],
  donate: tuple[int, ...] = (),
  name: str | None = None,
) -> tuple[jax.stages.Traced, Tree]:
  """Traces a function of one device's share over the mesh.

  Args:
    mesh: abstract mesh over whose axes the function may communicate.
    function: the function; it works on one device's share of each argument.
    in_specs: mesh axes of the arguments.
    out_specs: mesh axes of the results.
    shapes: ShapeDtypeStructs of the arguments, over the whole mesh.
    donate: positions of arguments whose buffers are given away.
    name: name of the program; None takes the function's. It is part of the key
      in the compilation cache: under another name a run that goes on would
      compile anew, and an accelerator might pick other algorithms.

  Returns:
    (traced, ShapeDtypeStructs of the results).
  """
  mapped = jax.shard_map(
    function,
    mesh=mesh,
    in_specs=in_specs,
    out_specs=out_specs,
    check_vma=False,
  )
  if name is not None:
    mapped.__name__ = mapped.__qualname__ = name
  traced = jax.jit(
    mapped,
    in_shardings=mesh_lib.shardings(mesh, in_specs),
    out_shardings=mesh_lib.shardings(mesh, out_specs),
    donate_argnums=donate,
  ).trace(*shapes)
  results = jax.tree.map(
    lambda r: jax.ShapeDtypeStruct(r.shape, r.dtype), traced.out_info
  )
  return traced, results
