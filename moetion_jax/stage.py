"""A stage's programs (DESIGN section 4), compiled for its mesh.

Each is a pure function on plain dicts and tuples of arrays, compiled ahead of
time: calling one with another shape or sharding is an error, never a silent
recompilation. Training and replay run these same executables, which is what
makes recovery bit-exact.

Mesh axes: 'data' (replicas), 'expert' (a worker's devices); a device's share
of a microbatch is its rows. Inside `shard_map` what is local to a device gets a
leading axis of size 1 ('own'), so that outside it is one array over the mesh.

Dims: B sequences of a microbatch, T sequence, D model, M microbatches.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import jax
import numpy as np
import optax
from jax import numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from moetion_jax import digest as digest_lib, operators, stage_model

AXES = ('data', 'expert')
_OWN = PartitionSpec(AXES)  # a leading dim over all devices
_SAME = PartitionSpec()  # the same on every device

Compute = dict[str, jax.Array]
Tree: TypeAlias = Any


def make_mesh(devices: Sequence[Any], replicas: int = 1) -> jax.sharding.Mesh:
  """The stage world's mesh: replicas x devices of each worker."""
  return jax.sharding.Mesh(np.array(devices).reshape(replicas, -1), AXES)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProgramShape:
  """The sizes that a stage's programs are compiled for.

  Attributes:
    microbatch_size: sequences B of one microbatch of one replica.
    sequence_length: tokens T.
    microbatches: M per replica and iteration.
    replicas: size of the mesh axis 'data'.
  """

  microbatch_size: int
  sequence_length: int
  microbatches: int
  replicas: int = 1


@dataclasses.dataclass(frozen=True)
class _Kept:
  """Where one leaf of the vjp function comes from in `backward`."""

  weight: str | None  # a compute weight, by name
  index: int = 0  # else a residual


@dataclasses.dataclass(frozen=True)
class Programs:
  """The compiled programs of one stage; see the module's docstring.

  Attributes:
    forward: (compute, inputs, position) -> (y, residuals, counts).
    backward: (compute, residuals, dy, acc) -> (dx, acc); donates residuals and
      acc. dy is () in the last stage, dx is () in the first.
    reduce: (acc, counts of all M) -> (gradients, scalars); fp32, over the mesh.
    update: (state, gradients, clip_factor, slot) -> (state, compute,
      selection); donates state. `slot` and `selection` are bool masks by group.
    digest: state -> u32[operators, 2] by group.
    evaluate: (compute, inputs) -> y, or the mean loss f32[] in the last stage.
    zeros: () -> acc.
    compute_of: state -> compute; the same casts as in `update`.
  """

  forward: Callable[..., Any]
  backward: Callable[..., Any]
  reduce: Callable[..., Any]
  update: Callable[..., Any]
  digest: Callable[..., Any]
  evaluate: Callable[..., Any]
  zeros: Callable[..., Any]
  compute_of: Callable[..., Any]


class Stage:
  """One stage on its mesh: shardings, partition, initial state, programs."""

  def __init__(
    self,
    model: stage_model.StageModel,
    optimizer: optax.GradientTransformation,
    mesh: jax.sharding.Mesh,
    shape: ProgramShape,
  ):
    """Stores; `compile` does the work."""
    self.model = model
    self.mesh = mesh
    self.shape = shape
    self._optimizer = optimizer
    self._groups = operators.group_parameters(
      list(model.shapes), model.partition
    )
    self._kept: list[_Kept] = []
    self._vjp_structure: Any = None
    self.state_shapes = jax.eval_shape(self._init, dict(model.shapes))
    self.partition = operators.Partition(
      self.state_shapes,
      operators.state_rule(model.partition, list(model.shapes)),
    )

  # ---- shardings -----------------------------------------------------------

  def _group_spec(self, group: stage_model.Group) -> PartitionSpec:
    return PartitionSpec('expert') if group.stacked else _SAME

  @property
  def state_specs(self) -> Tree:
    """Mesh axes of every leaf of the training state."""
    return {
      g.name: dict.fromkeys(self.state_shapes[g.name], self._group_spec(g))
      for g in self._groups
    }

  @property
  def compute_specs(self) -> dict[str, PartitionSpec]:
    """Mesh axes of every compute weight."""
    return {
      n: self._group_spec(g) for g, names in self._groups.items() for n in names
    }

  def _by_group_specs(self) -> dict[str, PartitionSpec]:
    return {g.name: self._group_spec(g) for g in self._groups}

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
    return jax.tree.map(
      lambda s: NamedSharding(self.mesh, s),
      specs,
      is_leaf=lambda s: isinstance(s, PartitionSpec),
    )

  # ---- initial state -------------------------------------------------------

  def _init(self, masters: Mapping[str, jax.Array]) -> operators.State:
    return {
      g.name: operators.init_group(
        self._optimizer,
        {n: masters[n] for n in names},
        stacked=g.stacked,
        buffers=self.model.buffers,
      )
      for g, names in self._groups.items()
    }

  def state_from_masters(
    self, masters: Mapping[str, jax.typing.ArrayLike]
  ) -> operators.State:
    """State 0 of given fp32 masters: fresh optimizer state."""
    init = jax.jit(self._init, out_shardings=self.shardings(self.state_specs))
    # A copy: XLA may hand an input through, and `update` donates the state.
    return jax.tree.map(lambda x: jnp.array(x, copy=True), init(dict(masters)))

  def initial_state(self) -> operators.State:
    """State 0 from the seed."""
    return self.state_from_masters(self.model.initialize())

  def place_state(self, state: Tree) -> operators.State:
    """Puts a host state (a tree of NumPy arrays) on the mesh."""
    # jnp.array copies; device_put may alias host memory (FACTS).
    return jax.tree.map(
      lambda x, s: jax.device_put(jnp.array(x, copy=True), s),
      state,
      self.shardings(self.state_specs),
    )

  # ---- the functions, on one device's share --------------------------------

  def _trained(self, compute: Compute) -> Compute:
    return {n: w for n, w in compute.items() if n not in self.model.buffers}

  def _forward(self, compute, inputs, position):
    trained = self._trained(compute)
    position = stage_model.Position(position.iteration, position.microbatch[0])

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
    leaves, self._vjp_structure = jax.tree.flatten(vjp)
    residuals = self._keep(leaves, compute)
    return y, jax.tree.map(lambda r: r[None], residuals), _own(counts)

  def _keep(self, leaves: list, compute: Compute) -> tuple[jax.Array, ...]:
    """Residuals without the compute weights, each once; remembers how."""
    weights = {id(w): n for n, w in compute.items()}
    places: dict[int, int] = {}
    kept, residuals = [], []
    for leaf in leaves:
      if id(leaf) in weights:
        kept.append(_Kept(weights[id(leaf)]))
        continue
      if id(leaf) not in places:
        places[id(leaf)] = len(residuals)
        residuals.append(leaf)
      kept.append(_Kept(None, places[id(leaf)]))
    self._kept = kept
    return tuple(residuals)

  def _backward(self, compute, residuals, dy, acc):
    leaves = [
      compute[k.weight] if k.weight is not None else residuals[k.index][0]
      for k in self._kept
    ]
    vjp = jax.tree.unflatten(self._vjp_structure, leaves)
    # The objective is the mean over devices and microbatches.
    share = 1.0 / (self.mesh.size * self.shape.microbatches)
    cotangents = vjp((dy, jnp.float32(share)))
    acc = {
      n: a + cotangents[0][n][None].astype(jnp.float32) for n, a in acc.items()
    }
    dx = () if self.model.has_embedding else cotangents[1]
    return dx, acc

  def _reduce(self, acc, counts):
    gradients, squares = {}, {True: [], False: []}
    for group, names in self._groups.items():
      for name in names:
        if name in self.model.buffers:
          continue
        axes = 'data' if group.stacked else AXES
        gradients[name] = jax.lax.psum(acc[name][0], axes)
        squares[group.stacked].append(jnp.sum(gradients[name] ** 2))
    norm = sum(squares[False], jnp.float32(0))
    norm += jax.lax.psum(sum(squares[True], jnp.float32(0)), 'expert')
    total = jax.tree.map(lambda *c: sum(x[0] for x in c), *counts)
    total = jax.lax.psum(total, AXES)
    gradients |= self.model.buffer_steps(total)
    number = self.mesh.size * self.shape.microbatches
    scalars = {
      'squared_norm': norm,
      'loss': total.get('loss', jnp.float32(0)) / number,
      'auxiliary_loss': total['auxiliary_loss'] / number,
      'dropped': jnp.sum(total['dropped']),
      'load': total['load'],
    }
    return gradients, scalars

  def _compute_of(self, state: operators.State) -> Compute:
    return {
      n: m.astype(self.model.compute_dtypes[n])
      for n, m in operators.masters_of(state).items()
    }

  def _update(self, state, gradients, clip_factor, slot):
    new = {}
    for group, names in self._groups.items():
      own = {
        n: gradients[n]
        if n in self.model.buffers
        else gradients[n] * clip_factor
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
    return new, self._compute_of(new), selection

  def _digest(self, state):
    return {
      g.name: digest_lib.digest_leaves(state[g.name], g.stacked)
      for g in self._groups
    }

  def _evaluate(self, compute, inputs):
    out = self.model.forward(compute, inputs, None)
    if out.y is not None:
      return out.y
    return jax.lax.pmean(out.counts['loss'], AXES)

  def _zeros(self):
    acc = {}
    for group, names in self._groups.items():
      for name in names:
        shape = self.model.shapes[name].shape
        if group.stacked:
          shape = (shape[0] // self.mesh.shape['expert'], *shape[1:])
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
    b = self.shape.microbatch_size * self.shape.replicas
    t = self.shape.sequence_length
    tokens = jax.ShapeDtypeStruct((b, t), jnp.int32)
    hidden = jax.ShapeDtypeStruct(
      (b, *self.model.hidden_shape), self.model.hidden_dtype
    )
    return stage_model.Inputs(
      tokens if self.model.has_embedding else hidden,
      tokens if self.model.has_head else None,
    )

  def compile(
    self, on_program: Callable[[str], None] = lambda _: None
  ) -> Programs:  # noqa: E501
    """Traces and compiles every program.

    Args:
      on_program: called with each program's name before it is compiled.
    """
    compute_shapes = {
      n: jax.ShapeDtypeStruct(s.shape, self.model.compute_dtypes[n])
      for n, s in self.model.shapes.items()
    }
    position_specs = stage_model.Position(_SAME, PartitionSpec('data'))
    position_shapes = stage_model.Position(
      jax.ShapeDtypeStruct((), jnp.uint32),
      jax.ShapeDtypeStruct((self.shape.replicas,), jnp.uint32),
    )
    inputs, input_shapes = self._input_specs, self._input_shapes()
    hidden_spec = () if self.model.has_head else _OWN
    compiled = {}

    def program(name, function, in_specs, out_specs, shapes, donate=()):
      on_program(name)
      mapped = jax.shard_map(
        function,
        mesh=self.mesh,
        in_specs=in_specs,
        out_specs=out_specs,
        check_vma=False,
      )
      jitted = jax.jit(
        mapped,
        in_shardings=self.shardings(in_specs),
        out_shardings=self.shardings(out_specs),
        donate_argnums=donate,
      )
      # Residuals are donated so that they are freed early, though few of them
      # have an output of their shape: JAX warns of that.
      with warnings.catch_warnings():
        warnings.filterwarnings('ignore', 'Some donated buffers')
        compiled[name] = jitted.lower(*shapes).compile()
      return jax.eval_shape(mapped, *shapes)

    y, residuals, counts = program(
      'forward',
      self._forward,
      (self.compute_specs, inputs, position_specs),
      (hidden_spec, _OWN, _OWN),
      (compute_shapes, input_shapes, position_shapes),
    )
    acc = program('zeros', self._zeros, (), self._acc_specs, ())
    program(
      'backward',
      self._backward,
      (self.compute_specs, _OWN, hidden_spec, self._acc_specs),
      (() if self.model.has_embedding else _OWN, self._acc_specs),
      (compute_shapes, residuals, y, acc),
      donate=(1, 3),
    )
    gradients, _ = program(
      'reduce',
      self._reduce,
      (self._acc_specs, _OWN),
      (self.compute_specs, _SAME),
      (acc, (counts,) * self.shape.microbatches),
    )
    slot_shapes = {
      g.name: jax.ShapeDtypeStruct(
        (len(self.partition.operators_of(g.name)),), jnp.bool_
      )
      for g in self._groups
    }
    by_group = self._by_group_specs()
    program(
      'update',
      self._update,
      (self.state_specs, self.compute_specs, _SAME, by_group),
      (self.state_specs, self.compute_specs, by_group),
      (
        self.state_shapes,
        gradients,
        jax.ShapeDtypeStruct((), jnp.float32),
        slot_shapes,
      ),
      donate=(0,),
    )
    program(
      'compute_of',
      self._compute_of,
      (self.state_specs,),
      self.compute_specs,
      (self.state_shapes,),
    )
    program(
      'digest',
      self._digest,
      (self.state_specs,),
      by_group,
      (self.state_shapes,),
    )
    program(
      'evaluate',
      self._evaluate,
      (self.compute_specs, inputs),
      _SAME if self.model.has_head else _OWN,
      (compute_shapes, input_shapes),
    )
    return Programs(**compiled)


def _own(counts: dict[str, jax.Array]) -> dict[str, jax.Array]:
  return {k: v[None] for k, v in counts.items()}
