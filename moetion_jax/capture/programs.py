"""Programs for capture and fold on the device.

`capture` copies the operators of a slot into buffers of their own, so that the
training thread may donate the state right after: by leaf (`rows`) on CPU,
packed (`packed`) elsewhere. `fold` puts the operators of one snapshot into a
partial state. Both work on any pytree whose leaves a `layout.Layout` describes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax import numpy as jnp

from moetion_jax import keys
from moetion_jax.capture import packed, rows, sources, transfer
from moetion_jax.programs import compilation, mesh as mesh_lib
from moetion_jax.snapshots import blocks, coverage, snapshot as snapshot_lib
from moetion_jax.state import layout as layout_lib

# Names of programs; those of capture begin with 'capture '.
_FOLD, _PLACE = 'fold', 'fold the first one'


class CapturePrograms:
  """The compiled programs of capture and fold for one layout.

  Call `compile` first. Capture is compiled once for groups whose leaves have
  equal shapes, and for each number of operators that a call may take; which
  operators is a dynamic index.
  """

  def __init__(
    self,
    layout: layout_lib.Layout,
    is_packed: bool | None = None,
    *,
    records_gradients: bool = False,
  ):
    """Stores the arguments; `compile` does the work.

    Args:
      layout: layout of the state.
      is_packed: whether captures are packed; None: what suits the platform.
      records_gradients: whether gradients may be captured too.
    """
    self.layout = layout
    self._programs: dict[str, Callable[..., Any]] = {}
    self._copy: Callable[..., Any] | None = None
    self._is_packed = is_packed
    self._kinds = (blocks.STATE, blocks.COMPUTE)
    if records_gradients:
      self._kinds += (blocks.GRADIENTS,)
    self._sources = list(sources.sources(layout, self._kinds))
    self._captures: rows.RowCaptures | packed.PackedCaptures | None = (
      None  # once the platform is known
    )

  # ---- compilation ---------------------------------------------------------

  def trace(
    self, mesh: jax.sharding.AbstractMesh, platform: str
  ) -> compilation.TracedPrograms:
    """Traces all programs over a mesh; needs no backend.

    Args:
      mesh: the mesh to trace over.
      platform: the platform to compile for, as JAX calls it.
    """
    traced = {}
    # The layout may have no devices yet.
    captures = self._choose(platform, mesh.shape['expert'])
    for program in captures.programs():
      traced[program.name], _ = compilation.trace(
        mesh,
        program.function,
        program.in_specs,
        program.out_specs,
        program.shapes,
      )
    specs = tuple(
      mesh_lib.EXPERT if x.group.stacked else mesh_lib.SAME
      for x in self.layout.leaves
    )
    leaves = tuple(
      jax.ShapeDtypeStruct(x.shape, x.dtype) for x in self.layout.leaves
    )
    masks = tuple(
      jax.ShapeDtypeStruct(x.shape[: int(x.group.stacked)], np.bool_)
      for x in self.layout.leaves
    )
    traced[_FOLD], _ = compilation.trace(
      mesh,
      _where,
      (specs, specs, specs),
      specs,
      (leaves, leaves, masks),
      donate=(0,),
    )
    traced[_PLACE], _ = compilation.trace(
      mesh, _copied, (specs,), specs, (leaves,)
    )
    return compilation.TracedPrograms(traced)

  def compile(
    self,
    on_program: Callable[[str], None] = lambda _: None,
    lowered: compilation.LoweredPrograms | None = None,
  ) -> None:
    """Compiles all programs.

    Args:
      on_program: called with each program's name before it is compiled.
      lowered: the lowered result of `trace`, if that was done ahead.
    """
    mesh = self.layout.mesh
    if mesh is None:  # the caller's own state, wherever it lies
      captures = self._choose(jax.default_backend(), 1)
      functions: dict[Callable[..., Any], Callable[..., Any]] = {}
      for program in captures.programs():
        self._programs[program.name] = functions.setdefault(
          program.function, jax.jit(program.function)
        )
      self._programs[_FOLD] = jax.jit(_where, donate_argnums=0)
      self._programs[_PLACE] = jax.jit(_copied)
      return
    platform = compilation.platform_of(mesh)
    if lowered is None:
      traced = self.trace(mesh.abstract_mesh, platform)
      lowered = traced.lower(platform, on_program)
    self._choose(platform, self.layout.expert_devices)
    self._programs = lowered.compile_each(mesh, on_program)

  def _choose(
    self, platform: str, devices: int
  ) -> rows.RowCaptures | packed.PackedCaptures:
    """Chooses how the state is captured.

    Args:
      platform: the platform, as JAX calls it.
      devices: number of devices of the axis 'expert'.
    """
    is_packed = self._is_packed
    if is_packed is None:
      is_packed = platform != 'cpu' and not self.layout.is_spread
    if is_packed:
      self._captures = packed.PackedCaptures(self._sources, devices)
    else:
      self._captures = rows.RowCaptures(
        self._sources, devices, self.layout.is_spread
      )
    return self._captures

  # ---- capture -------------------------------------------------------------

  def capture(
    self,
    state: Any,
    compute: Mapping[str, jax.Array],
    operators: coverage.Contents,
    gradients: Mapping[str, jax.Array] | None = None,
  ) -> transfer.Captured:
    """Copies operators on the device; returns when the copies are dispatched.

    Args:
      state: the training state; may be donated as soon as this has returned.
      compute: the compute weights, which nobody may donate.
      operators: the operators to capture.
      gradients: what the update consumed, by parameter, which nobody may
        donate; None if the snapshot holds none of it.
    """
    values = jax.tree.leaves(state)
    assert self._captures is not None, 'compile() was not called'
    arrays = (values, compute, gradients or {})
    assert len(self._kinds) == len(arrays) or not operators.gradients
    parts = self._captures.capture(
      self._programs,
      dict(zip(self._kinds, arrays, strict=False)),
      dict(zip(self._kinds, operators, strict=False)),
    )
    return transfer.Captured(
      parts=tuple(parts),
      operators=operators,
      shared=self._copy_shared(values),
    )

  def _copy_shared(self, values: Sequence[jax.Array]) -> dict[str, jax.Array]:
    if not self.layout.shared:
      return {}
    places = {
      x.path: i
      for i, x in enumerate(self.layout.leaves)
      if x.path in self.layout.shared
    }
    if self._copy is None:
      self._copy = jax.jit(lambda x: jax.tree.map(jnp.copy, x))
    return self._copy({path: values[i] for path, i in places.items()})

  # ---- fold ----------------------------------------------------------------

  def fold(
    self,
    state: Any,
    snapshot: snapshot_lib.Snapshot,
    active: frozenset[keys.OperatorId],
  ) -> Any:
    """Puts a snapshot into a partial state.

    Args:
      state: the partial state, donated; None for the first fold.
      snapshot: snapshot of the state's iteration.
      active: operators that keep what they have.

    Returns:
      The new state: the slot's operators whole, the other frozen ones on
      placeholders.

    Raises:
      StoreError: an operator is neither active nor in the snapshot.
    """
    values, masks = snapshot_lib.assemble(self.layout, snapshot, active)
    if self.layout.placements:
      return self._fold_on_host(state, values, masks)
    # Both programs copy: an argument may alias the mapped snapshot (FACTS).
    if state is None:
      new = self._programs[_PLACE](tuple(values))
    else:
      flat = tuple(jax.tree.leaves(state))
      new = self._programs[_FOLD](flat, tuple(values), tuple(masks))
    return self.layout.partition.unflatten(jax.block_until_ready(new))

  def _fold_on_host(
    self,
    state: Any,
    values: Sequence[np.ndarray],
    masks: Sequence[np.ndarray],
  ) -> Any:
    """Folds leaves that the caller placed; they stay where they are."""
    old = [None] * len(values) if state is None else jax.tree.leaves(state)
    folded = []
    for leaf, before, value, mask in zip(
      self.layout.leaves, old, values, masks, strict=True
    ):
      where = self.layout.placements.get(leaf.path)
      if before is None:
        new = np.array(value)  # an argument may alias the mapped snapshot
      else:
        where = before.sharding if before.committed else None
        new = np.where(_wide(mask, value), value, np.asarray(before))
      folded.append(jax.device_put(new, where))
    return self.layout.partition.unflatten(jax.block_until_ready(folded))


def _copied(leaves):
  return tuple(jnp.copy(x) for x in leaves)


def _wide(mask, leaf):
  """Gives the mask of a leaf, or of its rows, as many dims as the leaf."""
  return mask.reshape(mask.shape + (1,) * (leaf.ndim - mask.ndim))


def _where(state, values, masks):
  return tuple(
    jnp.where(_wide(mask, old), new, old)
    for old, new, mask in zip(state, values, masks, strict=True)
  )
