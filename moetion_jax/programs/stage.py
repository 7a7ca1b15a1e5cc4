"""A stage's programs, shardings and initial state.

The functions take plain dicts and tuples of arrays and are compiled ahead of
time: calling one with another shape or sharding is an error, never a silent
recompilation. Training and replay run these same executables, which is what
makes recovery bit-exact. Tracing needs no devices: see `compilation`.

Mesh axes: 'data' (replicas), 'expert' (a worker's devices); a device's share
of a microbatch is some of its rows. Every program but `reduce` runs on the
worker's own devices, so a worker meets its stage world once an iteration; twice
where the replicas share the training state (`sharded`), in `gather`. Inside
`shard_map` what is local to a device gets a leading dim of size 1 ('own'), so
that outside it is one array over the mesh.

Dims: B sequences of a microbatch, T sequence, D model, M microbatches.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import optax
from jax import numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from moetion_jax.programs import (
  compilation,
  functions as functions_lib,
  mesh as mesh_lib,
  residuals as residuals_lib,
)
from moetion_jax.state import (
  layout,
  model as model_lib,
  partition as partition_lib,
  zero1,
)

_OWN, _SAME = mesh_lib.OWN, mesh_lib.SAME
Compute = functions_lib.Compute
Tree = functions_lib.Tree


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stage:
  """One stage: partition, shardings, initial state, programs.

  A declared stage has no devices yet, and nothing that it does creates a
  backend, `trace` included; `on` gives it devices.

  Attributes:
    functions: the pure functions that its programs are traced from.
    whole: the functions of a worker that has all of the training state;
      `functions` itself, unless replicas share the state.
    devices: mesh of the worker's own devices and mesh of those of all replicas;
      None before it has any.
  """

  functions: functions_lib.Functions
  whole: functions_lib.Functions
  devices: tuple[jax.sharding.Mesh, jax.sharding.Mesh] | None = None

  @classmethod
  def declare(
    cls,
    model: model_lib.StageModel,
    optimizer: optax.GradientTransformation,
    expert_devices: int,
    shape: compilation.ProgramShape,
  ) -> Stage:
    """Makes a stage without devices.

    Args:
      model: the stage's model.
      optimizer: the optimizer of every operator.
      expert_devices: number of devices of a worker.
      shape: sizes that its programs are compiled for.
    """
    functions = functions_lib.Functions(model, optimizer, shape, expert_devices)
    return cls(functions=functions, whole=functions)

  def sharded(self, position: int) -> Stage:
    """Makes the ZeRO-1 view of this stage: only what worker `position` owns.

    Raises:
      errors.ConfigError: there are more workers than can own something.
    """
    return dataclasses.replace(self, functions=self.functions.sharded(position))

  @property
  def model(self) -> model_lib.StageModel:
    """The stage's model."""
    return self.functions.model

  @property
  def shape(self) -> compilation.ProgramShape:
    """Sizes that its programs are compiled for."""
    return self.functions.shape

  @property
  def ownership(self) -> zero1.Ownership | None:
    """Operators that each replica owns, where they share the training state."""
    return self.functions.ownership

  @property
  def state_shapes(self) -> Tree:
    """Shapes of the training state that this worker has."""
    return self.functions.state_shapes

  @property
  def partition(self) -> partition_lib.Partition:
    """Operators of the training state that this worker has."""
    return self.functions.partition

  # ---- devices and shardings -----------------------------------------------

  @property
  def abstract_mesh(self) -> jax.sharding.AbstractMesh:
    """Shape of a worker's own mesh."""
    return mesh_lib.abstract_mesh(self.functions.expert_devices)

  @property
  def abstract_world(self) -> jax.sharding.AbstractMesh:
    """Shape of the stage world's mesh."""
    return mesh_lib.abstract_mesh(
      self.functions.expert_devices, self.shape.world_size
    )

  @property
  def mesh(self) -> jax.sharding.Mesh:
    """Mesh of the worker's own devices.

    Raises:
      RuntimeError: the stage has no devices yet.
    """
    if self.devices is None:
      raise RuntimeError('the stage has no devices yet: see Stage.on')
    return self.devices[0]

  @property
  def world(self) -> jax.sharding.Mesh:
    """Mesh of the devices of all replicas; raises as `mesh` does."""
    return self.devices[1] if self.devices else self.mesh

  def on(
    self, mesh: jax.sharding.Mesh, world: jax.sharding.Mesh | None = None
  ) -> Stage:
    """Returns this stage on devices.

    Args:
      mesh: mesh of the worker's own devices, in the shape of `abstract_mesh`.
      world: mesh of all replicas' devices, in the shape of `abstract_world`;
        None where there is one worker.
    """
    world = mesh if world is None else world
    for found, wanted in (
      (mesh, self.abstract_mesh),
      (world, self.abstract_world),
    ):
      if found.shape != wanted.shape:
        raise ValueError(f'the stage is cut for {wanted}, not {found}')
    return dataclasses.replace(self, devices=(mesh, world))

  def _group_spec(self, group: model_lib.Group) -> PartitionSpec:
    return PartitionSpec('expert') if group.stacked else _SAME

  @property
  def state_specs(self) -> Tree:
    """Mesh axes of every leaf of the training state."""
    return {
      g.name: dict.fromkeys(self.state_shapes[g.name], self._group_spec(g))
      for g in self.functions.own_groups
    }

  @property
  def compute_specs(self) -> dict[str, PartitionSpec]:
    """Mesh axes of every compute weight."""
    return {
      n: self._group_spec(g)
      for g, names in self.functions.groups.items()
      for n in names
    }

  @property
  def rows_sharding(self) -> NamedSharding:
    """Sharding of tokens, activations and gradients: rows over all devices."""
    return NamedSharding(self.mesh, _OWN)

  @property
  def same_sharding(self) -> NamedSharding:
    """Sharding of arrays that every device holds whole."""
    return NamedSharding(self.mesh, _SAME)

  def shardings(self, specs: Tree) -> Tree:
    """Makes the NamedShardings of a tree of specs."""
    return mesh_lib.shardings(self.mesh, specs)

  # ---- initial state -------------------------------------------------------

  def own_rows(self, group: str, leaf: Any) -> Any:
    """Selects this worker's rows of a leaf of the stage's training state."""
    found = {g.name: g for g in self.functions.groups}[group]
    return self.ownership.rows(found, leaf) if self.ownership else leaf

  def state_from_masters(
    self, masters: Mapping[str, jax.typing.ArrayLike]
  ) -> partition_lib.State:
    """Makes state 0 from all fp32 masters, with fresh optimizer state."""
    init = jax.jit(
      lambda masters: functions_lib.copied(self.functions.init(masters)),
      out_shardings=self.shardings(self.state_specs),
    )
    return init(dict(masters))

  def initial_state(self) -> partition_lib.State:
    """Makes state 0 from the seed."""
    return self.state_from_masters(self.model.initialize())

  def place_state(
    self,
    state: Tree,
    place: Callable[[Tree], partition_lib.State] | None = None,
  ) -> partition_lib.State:
    """Puts a host state (a tree of NumPy arrays) on the mesh.

    When it returns, the host arrays are no longer read, and JAX owns every
    buffer: `update` may donate them.

    Args:
      state: the host state, with the shapes of `state_shapes`.
      place: `place` of the stage's `Programs`; None compiles it here.
    """
    # device_put may alias host memory (FACTS): therefore all of it is copied.
    shardings = self.shardings(self.state_specs)
    copy_all = place or jax.jit(functions_lib.copied, out_shardings=shardings)
    return jax.block_until_ready(copy_all(jax.device_put(state, shardings)))

  def place_gradients(
    self, gradients: Mapping[str, np.ndarray]
  ) -> dict[str, jax.Array]:
    """Puts gradients of all operators on the mesh, as `reduce` leaves them.

    Args:
      gradients: f32 by parameter, to which nobody may write any more. This
        worker has no operators of those that are missing: zeros do.
    """
    shapes = self.model.shapes.items()
    zeros = {name: np.zeros(x.shape, np.float32) for name, x in shapes}
    shardings = self.shardings(self.compute_specs)
    return jax.device_put({**zeros, **gradients}, shardings)

  # ---- compilation ---------------------------------------------------------

  @property
  def _acc_specs(self) -> dict[str, PartitionSpec]:
    return {
      n: PartitionSpec('data', 'expert') if g.stacked else _OWN
      for g, names in self.functions.groups.items()
      for n in names
      if n not in self.model.buffers
    }

  @property
  def _input_specs(self) -> model_lib.Inputs:
    return model_lib.Inputs(_OWN, _OWN if self.model.has_head else None)

  def _input_shapes(self) -> model_lib.Inputs:
    b, t = self.shape.microbatch_size, self.shape.sequence_length
    tokens = jax.ShapeDtypeStruct((b, t), jnp.int32)
    hidden = jax.ShapeDtypeStruct(
      (b, *self.model.hidden_shape), self.model.hidden_dtype
    )
    return model_lib.Inputs(
      tokens if self.model.has_embedding else hidden,
      tokens if self.model.has_head else None,
    )

  def _shapes_in_world(self, shapes: Tree) -> Tree:
    """Widens shapes to the world: replicas share arrays along the first dim."""
    return jax.tree.map(
      lambda s: jax.ShapeDtypeStruct(
        (s.shape[0] * self.shape.world_size, *s.shape[1:]), s.dtype
      ),
      shapes,
    )

  def reduce(
    self,
    programs: compilation.Programs,
    accumulated: Sequence[tuple[Tree, Sequence[Tree]]],
  ) -> tuple[Tree, Tree]:
    """Runs `programs.reduce` on this worker's share; waits for nobody yet.

    Args:
      programs: the stage's programs.
      accumulated: acc and all M counts of each replica that the worker does:
        first its own, the others ascending.

    Returns:
      (gradients, scalars), the same in all workers, on this worker's devices.
    """
    # Lanes without a replica are not read.
    missing = self.functions.order.lanes - len(accumulated)
    filled = [*accumulated, *[accumulated[0]] * missing]
    accs = tuple(acc for acc, _ in filled)
    counts = tuple(tuple(c) for _, c in filled)
    if self.shape.world_size == 1:
      return programs.reduce(accs, counts)
    accs, counts = mesh_lib.widen((accs, counts), self.world)
    return mesh_lib.narrow(programs.reduce(accs, counts), self.mesh)

  def compute_of(
    self, programs: compilation.Programs, state: partition_lib.State
  ) -> Compute:
    """Returns all compute weights; waits for nobody yet.

    Where replicas share the state, all have to call this equally often.

    Args:
      programs: the stage's programs.
      state: this worker's training state.
    """
    own = programs.compute_of(state)
    if programs.gather is None:
      return own
    return mesh_lib.narrow(
      programs.gather(mesh_lib.widen(own, self.world)), self.mesh
    )

  def trace(
    self,
    on_program: Callable[[str], None] = lambda _: None,
    *,
    state_only: bool = False,
  ) -> compilation.TracedPrograms:
    """Traces every program; needs no backend.

    Args:
      on_program: called with each program's name before it is traced.
      state_only: whether to trace only the programs that depend on which share
        of the training state a worker has.
    """
    traced: dict[str, jax.stages.Traced] = {}

    def program(name, function, in_specs, out_specs, shapes, donate=()):
      on_program(name)
      in_world = name in compilation.IN_WORLD
      mesh = self.abstract_world if in_world else self.abstract_mesh
      traced[name], results = compilation.trace(
        mesh, function, in_specs, out_specs, shapes, donate, name=f'_{name}'
      )
      return results

    if not state_only:
      self._trace_microbatches(program)
    self._trace_state(program)
    return compilation.TracedPrograms(
      {name: traced[name] for name in compilation.ORDER if name in traced}
    )

  def _trace_microbatches(self, program: Callable[..., Tree]) -> None:
    """Traces the programs up to the gradients, and evaluation."""
    compute_shapes = {
      n: jax.ShapeDtypeStruct(s.shape, self.model.compute_dtypes[n])
      for n, s in self.model.shapes.items()
    }
    position_specs = model_lib.Position(_SAME, PartitionSpec('data'))
    position_shapes = model_lib.Position(
      jax.ShapeDtypeStruct((), jnp.uint32),
      jax.ShapeDtypeStruct((1,), jnp.uint32),
    )
    if shape := self.model.capacity_shape:
      position_specs = position_specs._replace(capacity=_SAME)
      position_shapes = position_shapes._replace(
        capacity=jax.ShapeDtypeStruct(shape, jnp.float32)
      )
    inputs, input_shapes = self._input_specs, self._input_shapes()
    hidden_spec = () if self.model.has_head else _OWN
    recipes: list[residuals_lib.Recipe] = []
    y, residuals, counts = program(
      'forward',
      functools.partial(self.functions.forward, recipes.append),
      (self.compute_specs, inputs, position_specs),
      (hidden_spec, _OWN, _OWN),
      (compute_shapes, input_shapes, position_shapes),
    )
    acc = program('zeros', self.functions.zeros, (), self._acc_specs, ())
    program(
      'backward',
      functools.partial(self.functions.backward, recipes[0]),
      (self.compute_specs, _OWN, hidden_spec, self._acc_specs),
      (() if self.model.has_embedding else _OWN, self._acc_specs),
      (compute_shapes, residuals, y, acc),
      donate=(1, 3),
    )
    all_counts = (counts,) * self.shape.microbatches
    lanes = self.functions.order.lanes
    program(
      'reduce',
      self.functions.reduce,
      ((self._acc_specs,) * lanes, _OWN),
      (self.compute_specs, _SAME),
      self._shapes_in_world(((acc,) * lanes, (all_counts,) * lanes)),
    )
    program(
      'evaluate',
      self.functions.evaluate,
      (self.compute_specs, inputs),
      _SAME if self.model.has_head else _OWN,
      (compute_shapes, input_shapes),
    )

  def _trace_state(self, program: Callable[..., Tree]) -> None:
    """Traces the programs on the training state that this worker has."""
    states, shapes = self.state_specs, self.state_shapes
    by_group = {g.name: self._group_spec(g) for g in self.functions.own_groups}
    slots = {
      g.name: jax.ShapeDtypeStruct(
        (len(self.partition.operators_of(g.name)),), jnp.bool_
      )
      for g in self.functions.own_groups
    }
    words, from_update = self.compute_specs, self.compute_specs
    if self.ownership:
      words, from_update = dict.fromkeys(self.ownership.words, _OWN), ()
    program(
      'update',
      self.functions.update,
      (states, self.compute_specs, _SAME, by_group),
      (states, from_update, by_group),
      (
        shapes,
        dict(self.model.shapes),  # of gradients, f32
        jax.ShapeDtypeStruct((), jnp.float32),
        slots,
      ),
      donate=(0,),
    )
    functions = self.functions
    program('place', functions_lib.copied, (states,), states, (shapes,))
    own = program(
      'compute_of', functions.compute_of, (states,), words, (shapes,)
    )
    if self.ownership:
      program(
        'gather',
        self.ownership.gather,
        (words,),
        self.compute_specs,
        (self._shapes_in_world(own),),
      )
    program('digest', functions.digest, (states,), _SAME, (shapes,))

  def compile(
    self, on_program: Callable[[str], None] = lambda _: None
  ) -> compilation.Programs:
    """Traces and compiles every program for the stage's devices.

    Args:
      on_program: called with a program's name before each of its steps.
    """
    return self.trace(on_program).compile(self.mesh, on_program, self.world)


def layout_of(
  stage: Stage, *, has_devices: bool = True, whole: bool = False
) -> layout.Layout:
  """Returns the layout of the training state that a worker of a stage has.

  Args:
    stage: the stage, as the worker has it.
    has_devices: False for a stage without devices: its layout says sizes, no
      more.
    whole: True for the layout of the stage's whole training state, whatever
      this worker has of it.
  """
  prefix = 'master/'
  shapes = stage.whole.state_shapes if whole else stage.state_shapes
  compute = {
    f'{group}/{leaf}': leaf.removeprefix(prefix)
    for group, leaves in shapes.items()
    for leaf in leaves
    if leaf.startswith(prefix)
  }
  return layout.Layout(
    partition=stage.whole.partition if whole else stage.partition,
    compute=compute,
    compute_dtypes={
      n: np.dtype(stage.model.compute_dtypes[n]) for n in compute.values()
    },
    compute_shapes={
      n: tuple(stage.model.shapes[n].shape) for n in compute.values()
    },
    mesh=stage.mesh if has_devices else None,
  )
