"""A stage's pure functions (DESIGN section 4), shardings and initial state.

The functions take plain dicts and tuples of arrays and are compiled ahead of
time: calling one with another shape or sharding is an error, never a silent
recompilation. Training and replay run these same executables, which is what
makes recovery bit-exact. Tracing needs no devices: see `programs`.

Mesh axes: 'data' (replicas), 'expert' (a worker's devices); a device's share
of a microbatch is its rows. Every program but `reduce` runs on the worker's own
devices, so a worker meets its stage world once an iteration; twice where the
replicas share the training state (`sharded`), in `gather`. Inside `shard_map`
what is local to a device gets a leading axis of size 1 ('own'), so that outside
it is one array over the mesh.

Dims: B sequences of a microbatch, T sequence, D model, M microbatches.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import jax
import optax
from jax import numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from moetion_jax import (
  digest as digest_lib,
  mesh as mesh_lib,
  operators,
  programs as programs_lib,
  residuals as residuals_lib,
  shares as shares_lib,
  stage_model,
  sums,
)

make_mesh = mesh_lib.make_mesh
ProgramShape = programs_lib.ProgramShape
Programs = programs_lib.Programs
TracedPrograms = programs_lib.TracedPrograms
_OWN, _SAME = mesh_lib.OWN, mesh_lib.SAME
Compute = dict[str, jax.Array]
Tree: TypeAlias = Any


class Stage:
  """One stage: partition, shardings, initial state, programs.

  Made with an abstract mesh it has no devices yet, and nothing that it does
  creates a backend, `trace` included; `on` gives it devices.

  Attributes:
    model: its functions.
    shape: that its programs are compiled for.
    order: in which what replicas have is added.
    shares: of its replicas, where they share the training state; None: each has
      all of it.
    state_shapes: of the training state that this worker has.
    partition: of that.
    whole_shapes: of the stage's training state.
    whole_partition: of that.
  """

  def __init__(
    self,
    model: stage_model.StageModel,
    optimizer: optax.GradientTransformation,
    mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh,
    shape: ProgramShape,
  ):
    """Stores; `trace` and `compile` do the work."""
    self.model = model
    self.shape = shape
    expert_devices = mesh.shape['expert']
    self.abstract_mesh = mesh_lib.abstract_mesh(expert_devices)
    self.abstract_world = mesh_lib.abstract_mesh(
      expert_devices, shape.world_size
    )
    self.order = sums.Order.of_team(
      shape.replicas, shape.workers, expert_devices
    )
    self._mesh = mesh if isinstance(mesh, jax.sharding.Mesh) else None
    self._world = self._mesh
    self._optimizer = optimizer
    self._groups = operators.group_parameters(
      list(model.shapes), model.partition
    )
    self._vjp: residuals_lib.Recipe | None = None  # when forward was traced
    self.shares: shares_lib.Shares | None = None
    self.state_shapes, self.partition = self._parts()
    self.whole_shapes, self.whole_partition = self.state_shapes, self.partition

  def _parts(self) -> tuple[Tree, operators.Partition]:
    """Of the training state that this worker has: its shapes, its operators."""
    names = list(self.model.shapes)
    shapes = jax.eval_shape(self._init, dict(self.model.shapes))
    return shapes, operators.Partition(
      shapes,
      operators.state_rule(self.model.partition, names),
      self.shares.experts if self.shares else None,
    )

  def sharded(self, position: int) -> Stage:
    """This stage, as that worker of its world has it that has its share only.

    Raises:
      base.ConfigError: there are more workers than can have something.
    """
    part = copy.copy(self)
    part.shares = shares_lib.Shares(
      self.model,
      self._groups,
      self.whole_partition,
      replicas=self.shape.world_size,
      position=position,
      expert_devices=self.abstract_mesh.shape['expert'],
    )
    part.state_shapes, part.partition = part._parts()
    return part

  # ---- devices and shardings -----------------------------------------------

  @property
  def mesh(self) -> jax.sharding.Mesh:
    """Of the worker's own devices.

    Raises:
      RuntimeError: the stage has no devices yet.
    """
    if self._mesh is None:
      raise RuntimeError('the stage has no devices yet: see Stage.on')
    return self._mesh

  @property
  def world(self) -> jax.sharding.Mesh:
    """Of the devices of all replicas; see `mesh`."""
    if self._world is None:
      raise RuntimeError('the stage has no devices yet: see Stage.on')
    return self._world

  def on(
    self, mesh: jax.sharding.Mesh, world: jax.sharding.Mesh | None = None
  ) -> Stage:
    """This stage on devices.

    Args:
      mesh: of the worker's own, in the shape of `abstract_mesh`.
      world: of all replicas', in the shape of `abstract_world`; None with one.
    """
    world = mesh if world is None else world
    for found, wanted in (
      (mesh, self.abstract_mesh),
      (world, self.abstract_world),
    ):
      if found.shape != wanted.shape:
        raise ValueError(f'the stage is cut for {wanted}, not {found}')
    placed = copy.copy(self)
    placed._mesh, placed._world = mesh, world
    return placed

  def _group_spec(self, group: stage_model.Group) -> PartitionSpec:
    return PartitionSpec('expert') if group.stacked else _SAME

  @property
  def _own_groups(self) -> dict[stage_model.Group, tuple[str, ...]]:
    """Those of which this worker has training state."""
    return {
      g: names
      for g, names in self._groups.items()
      if self.shares is None or self.shares.has(g)
    }

  @property
  def state_specs(self) -> Tree:
    """Mesh axes of every leaf of the training state."""
    return {
      g.name: dict.fromkeys(self.state_shapes[g.name], self._group_spec(g))
      for g in self._own_groups
    }

  @property
  def compute_specs(self) -> dict[str, PartitionSpec]:
    """Mesh axes of every compute weight."""
    return {
      n: self._group_spec(g) for g, names in self._groups.items() for n in names
    }

  @property
  def rows_sharding(self) -> NamedSharding:
    """Of tokens, activations and their gradients: rows over all devices."""
    return NamedSharding(self.mesh, _OWN)

  @property
  def same_sharding(self) -> NamedSharding:
    """Of what every device holds whole."""
    return NamedSharding(self.mesh, _SAME)

  def shardings(self, specs: Tree) -> Tree:
    """NamedShardings of a tree of specs."""
    return mesh_lib.shardings(self.mesh, specs)

  # ---- initial state -------------------------------------------------------

  def _init(self, masters: Mapping[str, jax.Array]) -> operators.State:
    if self.shares:
      masters = {
        n: self.shares.rows(g, masters[n])
        for g, names in self._own_groups.items()
        for n in names
      }
    return {
      g.name: operators.init_group(
        self._optimizer,
        {n: masters[n] for n in names},
        stacked=g.stacked,
        buffers=self.model.buffers,
      )
      for g, names in self._own_groups.items()
    }

  def own_rows(self, group: str, leaf: Any) -> Any:
    """Of a leaf of the stage's training state, what this worker has of it."""
    found = {g.name: g for g in self._groups}[group]
    return self.shares.rows(found, leaf) if self.shares else leaf

  def state_from_masters(
    self, masters: Mapping[str, jax.typing.ArrayLike]
  ) -> operators.State:
    """State 0 of given fp32 masters, all of them: fresh optimizer state."""
    init = jax.jit(
      lambda masters: _copied(self._init(masters)),
      out_shardings=self.shardings(self.state_specs),
    )
    return init(dict(masters))

  def initial_state(self) -> operators.State:
    """State 0 from the seed."""
    return self.state_from_masters(self.model.initialize())

  def place_state(
    self, state: Tree, place: Callable[[Tree], operators.State] | None = None
  ) -> operators.State:
    """Puts a host state (a tree of NumPy arrays) on the mesh.

    When it returns, the host arrays are read no longer, and JAX owns every
    buffer: `update` may donate them.

    Args:
      state: as of `state_shapes`.
      place: of the stage's `Programs`; None compiles it here.
    """
    # device_put may alias host memory (FACTS), therefore a copy of all of it.
    shardings = self.shardings(self.state_specs)
    copy_all = place or jax.jit(_copied, out_shardings=shardings)
    return jax.block_until_ready(copy_all(jax.device_put(state, shardings)))

  # ---- the functions, on one device's share --------------------------------

  def _trained(self, compute: Compute) -> Compute:
    return {n: w for n, w in compute.items() if n not in self.model.buffers}

  def _forward(self, compute, inputs, position):
    trained = self._trained(compute)
    position = position._replace(microbatch=position.microbatch[0])

    def objective(trained, x):
      out = self.model.forward(
        {**compute, **trained}, inputs._replace(x=x), position
      )
      y = () if out.y is None else out.y
      return (y, out.objective), out.counts

    if self.model.has_embedding:  # tokens have no gradient
      function = lambda trained: objective(trained, inputs.x)  # noqa: E731
      (y, _), vjp, counts = jax.vjp(function, trained, has_aux=True)
    else:
      (y, _), vjp, counts = jax.vjp(objective, trained, inputs.x, has_aux=True)
    residuals, self._vjp = residuals_lib.split(vjp, compute)
    return y, jax.tree.map(lambda r: r[None], residuals), _own(counts)

  def _backward(self, compute, residuals, dy, acc):
    assert self._vjp is not None  # forward is traced first
    vjp = self._vjp.join(compute, [r[0] for r in residuals])
    # The objective is the mean over all replicas' devices and microbatches.
    share = 1.0 / self._terms
    cotangents = vjp((dy, jnp.float32(share)))
    acc = {
      n: a + cotangents[0][n][None].astype(jnp.float32) for n, a in acc.items()
    }
    dx = () if self.model.has_embedding else cotangents[1]
    return dx, acc

  @property
  def _terms(self) -> int:
    """Of the mean that an iteration's loss is."""
    devices = self.abstract_mesh.size * self.shape.replicas
    return devices * self.shape.microbatches

  def _reduce(self, accs, counts):
    gradients, squares = {}, {True: [], False: []}
    for group, names in self._groups.items():
      for name in names:
        if name in self.model.buffers:
          continue
        gradients[name] = self.order.sum(
          [acc[name][0] for acc in accs], over_devices=not group.stacked
        )
        squares[group.stacked].append(jnp.sum(gradients[name] ** 2))
    norm = sum(squares[False], jnp.float32(0))
    norm += self.order.sum_over_devices(sum(squares[True], jnp.float32(0)))
    by_slot = [
      jax.tree.map(lambda *c: sum(x[0] for x in c), *of_slot)
      for of_slot in counts
    ]
    total = jax.tree.map(lambda *c: self.order.sum(c), *by_slot)
    gradients |= self.model.buffer_steps(total)
    scalars = {
      'squared_norm': norm,
      'loss': total.get('loss', jnp.float32(0)) / self._terms,
      'auxiliary_loss': total['auxiliary_loss'] / self._terms,
      'dropped': jnp.sum(total['dropped']),
      'load': total['load'],
    }
    return gradients, scalars

  def _compute_of(self, state: operators.State) -> Tree:
    compute = {
      n: m.astype(self.model.compute_dtypes[n])
      for n, m in operators.masters_of(state).items()
    }
    return self.shares.pack(compute) if self.shares else compute

  def _gather(self, words):
    assert self.shares is not None
    return self.shares.unpack(
      {kind: jax.lax.all_gather(x[0], 'data') for kind, x in words.items()}
    )

  def _update(self, state, gradients, clip_factor, slot):
    new = {}
    for group, names in self._own_groups.items():
      own = {n: gradients[n] for n in names}
      if self.shares:
        own = {n: self.shares.rows_of_device(group, own[n]) for n in names}
      own = {
        n: own[n] if n in self.model.buffers else own[n] * clip_factor
        for n in names
      }
      new[group.name] = operators.update_group(
        self._optimizer,
        state[group.name],
        own,
        stacked=group.stacked,
        buffers=self.model.buffers,
      )
    # The mask is returned as computed on the device, one with the step.
    selection = {g: jnp.asarray(mask) for g, mask in slot.items()}
    compute = () if self.shares else self._compute_of(new)
    return new, compute, selection

  def _place(self, state):
    return _copied(state)

  def _digest(self, state):
    found = []
    for name, group in self.partition.groups.items():
      rows = digest_lib.digest_leaves(state[name], group.stacked)
      if group.stacked and self.abstract_mesh.shape['expert'] > 1:
        rows = jax.lax.all_gather(rows, 'expert', tiled=True)
      found.append(rows)
    return jnp.concatenate(found)  # one array: to read one costs the host

  def _evaluate(self, compute, inputs):
    out = self.model.forward(compute, inputs, None)
    if out.y is not None:
      return out.y
    return jax.lax.pmean(out.counts['loss'], mesh_lib.AXES)

  def _zeros(self):
    acc = {}
    for group, names in self._groups.items():
      for name in names:
        shape = self.model.shapes[name].shape
        if group.stacked:
          shape = (shape[0] // self.abstract_mesh.shape['expert'], *shape[1:])
        if name not in self.model.buffers:
          acc[name] = jnp.zeros((1, *shape), jnp.float32)
    return acc

  # ---- compilation ---------------------------------------------------------

  @property
  def _acc_specs(self) -> dict[str, PartitionSpec]:
    return {
      n: PartitionSpec('data', 'expert') if g.stacked else _OWN
      for g, names in self._groups.items()
      for n in names
      if n not in self.model.buffers
    }

  @property
  def _input_specs(self) -> stage_model.Inputs:
    return stage_model.Inputs(_OWN, _OWN if self.model.has_head else None)

  def _input_shapes(self) -> stage_model.Inputs:
    b, t = self.shape.microbatch_size, self.shape.sequence_length
    tokens = jax.ShapeDtypeStruct((b, t), jnp.int32)
    hidden = jax.ShapeDtypeStruct(
      (b, *self.model.hidden_shape), self.model.hidden_dtype
    )
    return stage_model.Inputs(
      tokens if self.model.has_embedding else hidden,
      tokens if self.model.has_head else None,
    )

  def _shapes_in_world(self, shapes: Tree) -> Tree:
    """Of arrays of which every replica has a share, along their first dim."""
    return jax.tree.map(
      lambda s: jax.ShapeDtypeStruct(
        (s.shape[0] * self.shape.world_size, *s.shape[1:]), s.dtype
      ),
      shapes,
    )

  def reduce(
    self, programs: Programs, accumulated: Sequence[tuple[Tree, Sequence[Tree]]]
  ) -> tuple[Tree, Tree]:
    """`programs.reduce` of this worker's share; waits for nobody yet.

    Args:
      programs: of the stage.
      accumulated: acc and all M counts, of each replica that the worker does:
        first its own, the others ascending.

    Returns:
      (gradients, scalars), the same in all workers, on this worker's devices.
    """
    # Slots without a replica are not read.
    missing = self.order.slots - len(accumulated)
    filled = [*accumulated, *[accumulated[0]] * missing]
    accs = tuple(acc for acc, _ in filled)
    counts = tuple(tuple(c) for _, c in filled)
    if self.shape.world_size == 1:
      return programs.reduce(accs, counts)
    accs, counts = mesh_lib.widen((accs, counts), self.world)
    return mesh_lib.narrow(programs.reduce(accs, counts), self.mesh)

  def compute_of(self, programs: Programs, state: operators.State) -> Compute:
    """All compute weights; waits for nobody yet.

    Where replicas share the state, all have to call this equally often.

    Args:
      programs: of the stage.
      state: of this worker.
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
  ) -> TracedPrograms:
    """Traces every program; needs no backend.

    Args:
      on_program: called with each program's name before it is traced.
      state_only: only those that differ where workers have other shares.
    """
    traced: dict[str, jax.stages.Traced] = {}

    def program(name, in_specs, out_specs, shapes, donate=()):
      on_program(name)
      function = getattr(self, f'_{name}')
      in_world = name in programs_lib.IN_WORLD
      mesh = self.abstract_world if in_world else self.abstract_mesh
      traced[name], results = programs_lib.trace(
        mesh, function, in_specs, out_specs, shapes, donate
      )
      return results

    if not state_only:
      self._trace_microbatches(program)
    self._trace_state(program)
    return TracedPrograms(
      {name: traced[name] for name in programs_lib.ORDER if name in traced}
    )

  def _trace_microbatches(self, program: Callable[..., Tree]) -> None:
    """Up to the gradients; and evaluation."""
    compute_shapes = {
      n: jax.ShapeDtypeStruct(s.shape, self.model.compute_dtypes[n])
      for n, s in self.model.shapes.items()
    }
    position_specs = stage_model.Position(_SAME, PartitionSpec('data'))
    position_shapes = stage_model.Position(
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
    y, residuals, counts = program(
      'forward',
      (self.compute_specs, inputs, position_specs),
      (hidden_spec, _OWN, _OWN),
      (compute_shapes, input_shapes, position_shapes),
    )
    acc = program('zeros', (), self._acc_specs, ())
    program(
      'backward',
      (self.compute_specs, _OWN, hidden_spec, self._acc_specs),
      (() if self.model.has_embedding else _OWN, self._acc_specs),
      (compute_shapes, residuals, y, acc),
      donate=(1, 3),
    )
    all_counts = (counts,) * self.shape.microbatches
    slots = self.order.slots
    program(
      'reduce',
      ((self._acc_specs,) * slots, _OWN),
      (self.compute_specs, _SAME),
      self._shapes_in_world(((acc,) * slots, (all_counts,) * slots)),
    )
    program(
      'evaluate',
      (self.compute_specs, inputs),
      _SAME if self.model.has_head else _OWN,
      (compute_shapes, input_shapes),
    )

  def _trace_state(self, program: Callable[..., Tree]) -> None:
    """What is done with the training state that this worker has."""
    states, shapes = self.state_specs, self.state_shapes
    by_group = {g.name: self._group_spec(g) for g in self._own_groups}
    slots = {
      g.name: jax.ShapeDtypeStruct(
        (len(self.partition.operators_of(g.name)),), jnp.bool_
      )
      for g in self._own_groups
    }
    words, from_update = self.compute_specs, self.compute_specs
    if self.shares:
      words, from_update = dict.fromkeys(self.shares.words, _OWN), ()
    program(
      'update',
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
    program('place', (states,), states, (shapes,))
    own = program('compute_of', (states,), words, (shapes,))
    if self.shares:
      program(
        'gather', (words,), self.compute_specs, (self._shapes_in_world(own),)
      )
    program('digest', (states,), _SAME, (shapes,))

  def compile(
    self, on_program: Callable[[str], None] = lambda _: None
  ) -> Programs:
    """Traces and compiles every program for the stage's devices.

    Args:
      on_program: called with a program's name before each step of it.
    """
    return self.trace(on_program).compile(self.mesh, on_program, self.world)


def _copied(tree: Tree) -> Tree:
  """Copies every leaf; under jit, into buffers that nobody else holds."""
  return jax.tree.map(jnp.copy, tree)


def _own(counts: dict[str, jax.Array]) -> dict[str, jax.Array]:
  return {k: v[None] for k, v in counts.items()}
