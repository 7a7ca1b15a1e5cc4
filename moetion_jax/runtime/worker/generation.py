"""One generation of a stage's worker: its log, its snapshots, its training."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import gc
import math
import signal
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from moetion_jax import errors, keys, report as report_lib
from moetion_jax.capture import (
  conversion,
  merged_restore,
  snapshotter,
)
from moetion_jax.hostmem import segment
from moetion_jax.logs import (
  boundary_log,
  interface as log_interface,
  joined_log,
  zmq_client,
)
from moetion_jax.policies import planner
from moetion_jax.programs import jax_internals, stage as stage_lib
from moetion_jax.recovery import notices, orders
from moetion_jax.runtime import faults, messages, spec as spec_lib
from moetion_jax.runtime.worker import (
  agent_link,
  extra_capacity,
  fault_damage,
  finish,
  prepared as prepared_lib,
)
from moetion_jax.snapshots import (
  coverage,
  folders,
  reader,
  registry,
  snapshot,
)
from moetion_jax.state import partition
from moetion_jax.training import job, worker

_COLLECTIVE = 'reduce'  # the first program that all of a world run together
# Room beside each leaf of each operator: digests, scalars, padding.
_PADDING_BYTES = 64


class StageRun:
  """A worker's part of a run.

  Call `compile`, then `run`.
  """

  def __init__(
    self,
    spec: spec_lib.Spec,
    link: agent_link.AgentLink,
    stage: stage_lib.Stage,
    data: worker.Data,
    injector: faults.FaultInjector,
    initial_state: Callable[[], partition.State],
  ):
    """Stores the arguments."""
    self._injector = injector
    self._spec = spec
    self._link = link
    self._stage = stage
    self._data = data
    self._initial_state = initial_state
    self._worker: Any = None
    self._digests: Mapping[keys.OperatorId, np.ndarray] = {}
    self._interrupts: list[Callable[[], None]] = []
    self._layout = stage_lib.layout_of(stage)
    self._whole = stage_lib.layout_of(stage, whole=True)
    self._captures = prepared_lib.captures_of(stage)
    self._grown: dict[str, Callable[..., Any]] = {}
    # The root of the snapshots that can be read again.
    self._snapshots_root = spec.durable_folder or spec.folder
    self._folder = folders.snapshots_folder(
      self._snapshots_root, spec.stage, spec.replica
    )
    self._closing = contextlib.ExitStack()
    self._told = 0
    self._has_met = False  # the others of the world, in a collective
    self._is_meeting = False  # until that is done

  def sizes(self) -> planner.StageSizes:
    """Returns the sizes of the stage's operators."""
    return job.stage_sizes(self._whole, self._whole.expert_devices)

  def compile(
    self, prepared: prepared_lib.Lowered | prepared_lib.Loaded | None
  ) -> None:
    """Compiles all programs, except those that were compiled ahead."""
    if prepared is None:
      self._programs = self._stage.compile(self._compiling)
      self._captures.compile(self._compiling)
    else:
      self._programs, self._captures = prepared.compiled(
        self._stage, self._compiling
      )
    if self._spec.grows_capacity:
      self._grown = extra_capacity.compile_programs(
        self._stage, self._compiling
      )
    self._link.compiling('')

  def _compiling(self, program: str) -> None:
    self._link.compiling(program)
    self._injector.phase('compile')

  def run(self) -> None:
    """Obeys the agent, from `Go` to `Exit`.

    When all stages go back, this process stays: it ends what it does, wherever
    it is, and begins again with another state. Its programs are still there.
    """
    while not isinstance(command := self._link.command(), messages.Exit):
      assert isinstance(command, orders.Go), command
      try:
        self._train(command)
        if isinstance(self._finish(), messages.Exit):
          break
      except jax.errors.JaxRuntimeError as error:
        if not self._is_meeting:
          raise
        raise errors.UnmetError(
          f'the stage world at {self._spec.world} did not come together for '
          f'its first collective: {error}'
        ) from error
      except errors.MoetionError:
        if not self._link.is_interrupted:
          raise
        self._link.command()
      self._let_go()
      self._link.send(notices.StoppedHere())
    self._closing.close()

  def _let_go(self) -> None:
    """Closes the log and the snapshots, and frees the state."""
    self._closing.close()
    self._link.training(None)
    self._link.compiling('nothing, until it is told from where to go on')
    self._link.locating(None)
    self._link.deciding(lambda value: None)
    self._link.retaining(lambda line, entry_line: None)
    self._interrupts = []
    self._worker = None
    gc.collect()  # frees the state, before there is another one

  def _interrupt(self) -> None:
    """Makes whatever waits raise; called in another thread."""
    for interrupt in self._interrupts:
      interrupt()

  def _begin(self, phase: str, iteration: int) -> None:
    """Begins a phase: raises if the worker is to go back, injects faults."""
    if self._link.is_interrupted:
      raise agent_link.StopHereError
    self._is_meeting = False
    self._injector.phase(phase, iteration)
    if phase == _COLLECTIVE and self._spec.world and not self._has_met:
      self._has_met = True
      self._meet(phase)

  def _meet(self, name: str) -> None:
    """Waits for the others of the world, before a first collective of all."""
    self._is_meeting = True
    jax_internals.meet(name)

  def _train(self, go: orders.Go) -> None:
    """Trains until the run ends or stops.

    Args:
      go: the order that says from where.

    Raises:
      errors.MoetionError: any such error, once `link.is_interrupted`.
    """
    if go.generation:
      self._spec = dataclasses.replace(self._spec, generation=go.generation)
    spec, link = self._spec, self._link
    self._told, self._digests = 0, {}
    log = self._log(go)
    log.start()
    self._closing.callback(log.close)
    link.locating(log)
    self._interrupts = [lambda: log.interrupt(agent_link.StopHereError())]
    link.interrupting(self._interrupt)
    started = time.monotonic()
    restoring = self._conversion(go)
    state = restoring.begin()
    fetched = time.monotonic()
    snapshots = self._snapshots(go, log)
    if self._stage.ownership and spec.world:
      self._meet('compute')  # it gathers its compute weights

    def retain(line: int, entry_line: int) -> None:
      if snapshots:
        snapshots.retain(line)
      if go.keeps_entries:
        log.retain(entry_line + 1)

    def between(iteration: int) -> None:
      if not go.keeps_entries:
        # Nobody goes back alone: neighbours need the newest entries only.
        log.retain(iteration - 1)

    # Not between iterations: the one at hand may wait for just that.
    link.retaining(retain)
    self._worker = worker.Worker(
      spec.stage,
      self._stage,
      self._programs,
      state,
      log,
      self._data,
      (spec.replica, *spec.stands_for),
    )
    self._worker.iteration = go.start
    self._worker.grown = extra_capacity.make(go, self._stage, self._grown)
    self._worker.on_phase = self._begin
    self._script(go, log, snapshots)
    link.send(
      notices.Resumed(
        first_iteration=go.start + 1, fetch_seconds=fetched - started
      )
    )
    link.training(self._worker)
    try:
      last = self._worker.train(
        spec.job.train,
        self._report,
        lambda: self._between(go.target),
        first_iteration=go.start + 1,
        snapshots=snapshots,
        conversion=restoring,
        retain=between,
      )
      if link.is_interrupted:
        raise agent_link.StopHereError
    except errors.EntryMismatchError as error:
      if self._worker.iteration > go.newest:
        raise
      # The rebuilt state comes to other bits than the lost one.
      raise conversion.ReplayMismatchError(
        error, range(go.start, self._worker.iteration)
      ) from error
    self._between(go.target)
    log.flush()
    if snapshots:
      snapshots.flush()
    link.finished()
    link.send(notices.Done(iteration=last))

  def _report(self, report: report_lib.Report) -> None:
    self._digests = report.digests
    self._link.send(notices.Reported(report=report))

  def _log(self, go: orders.Go) -> log_interface.Log:
    """Makes this worker's log, joined with those of replicas it stands for."""
    spec = self._spec
    settings = log_interface.LogSettings(
      folder=spec.folder,
      size_bytes=go.ring_bytes,
      cells=go.cells,
      fresh=go.is_fresh,
      host=spec.host,
    )
    connect = functools.partial(
      zmq_client.StoreClient, secret=bytes.fromhex(spec.secret) or None
    )
    of_replica = {
      replica: boundary_log.BoundaryLog(
        keys.WorkerId(spec.stage, replica, spec.generation), settings, connect
      )
      for replica in (spec.replica, *spec.stands_for)
    }
    if spec.stands_for:
      return joined_log.JoinedLog(of_replica)
    return of_replica[spec.replica]

  def _script(
    self,
    go: orders.Go,
    log: log_interface.Log,
    snapshots: snapshotter.Snapshotter | None,
  ) -> None:
    """Lets scripted faults damage what this worker stores."""
    self._injector.replays_until = go.replays_until

    def damage_snapshot(fault: faults.Fault, iteration: int) -> None:
      del iteration
      if snapshots:
        snapshots.flush()
      fault_damage.damage_snapshot(self._folder, fault.kind)
      faults.signal_self(signal.SIGKILL)

    def damage_log(fault: faults.Fault, iteration: int) -> None:
      del fault
      log.flush()
      path = segment.segment_path(
        self._spec.folder, self._spec.stage, self._spec.replica
      )
      # The iteration before: everybody has read its entries.
      fault_damage.flip_bit_in_log(path, iteration - 1)

    reads = fault_damage.ReadDamage(self._spec.folder)
    self._worker.on_read = reads.after_read
    acts: dict[faults.Place, faults.Act] = {
      faults.Place.SNAPSHOTS: damage_snapshot,
      faults.Place.LOG: damage_log,
      faults.Place.READS: reads.arm,
    }
    self._injector.acts |= acts
    for place in acts:  # they would keep the log and the snapshots alive
      self._closing.callback(self._injector.acts.pop, place)

  def _between(self, target: int) -> bool:
    """Reports, between iterations, that `target` is reached; True: stop."""
    if self._worker.iteration == target != self._told:
      self._told = target
      self._link.send(notices.CaughtUp())
    return self._link.limit.stop(self._worker.iteration)

  def _conversion(self, go: orders.Go) -> conversion.Conversion:
    return conversion.Conversion(
      self._captures,
      self._programs.digest,
      self._initial_state,
      self._load_merged if go.merges else self._load,
      conversion.Route(
        start=coverage.Start(iteration=go.start, complete_at=go.complete_at),
        newest=go.newest,
        initial=self._spec.job.initial_iteration,
        unverified_until=go.unverified_until,
        applied=range(go.start + 1, go.applied_until + 1),
      ),
    )

  def _load(self, iteration: int) -> snapshot.Snapshot:
    """Loads a snapshot from this host's store, verified.

    It is made of all replicas' shares; where they share the state like this
    worker's team, of its own share.
    """
    stores = folders.find_shares(
      self._snapshots_root, self._spec.stage, iteration
    )
    if not stores:
      raise errors.StoreError(f'{self._folder / str(iteration)}: there is none')
    if self._stage.ownership and len(stores) == len(self._spec.team):
      stores = [stores[self._stage.ownership.position]]
    return reader.load(self._whole, iteration, stores)

  def _load_merged(self, iteration: int) -> snapshot.Snapshot:
    """Loads a snapshot of all operators, each as new as there is."""
    return merged_restore.load(
      self._snapshots_root,
      self._spec.stage,
      iteration,
      self._layout,
      self._initial_state,
    )

  def _snapshots(
    self, go: orders.Go, log: log_interface.Log
  ) -> snapshotter.Snapshotter | None:
    if not go.pool_files:
      return None
    spec, number = self._spec, len(self._spec.team)
    position = spec.team.index(spec.replica)
    share = self._whole.shares(number)[position]
    leaves = len(self._layout.leaves) * len(self._layout.operators)
    padding_bytes = leaves * _PADDING_BYTES
    store = registry.make(
      folders.snapshots_folder(spec.folder, spec.stage, spec.replica),
      go.pool_bytes + padding_bytes,
      go.pool_files,
      self._folder if spec.durable_folder else None,
    )
    if any(decision.is_whole for decision in go.decisions):
      # Before the store starts: it would make files only to remove them.
      whole_bytes = snapshot.snapshot_bytes(
        self._whole, coverage.Contents(state=share)
      )
      store.enlarge(whole_bytes + padding_bytes)
    self._interrupts.append(store.interrupt)
    taker = snapshotter.Snapshotter(
      self._captures,
      store,
      go.decisions[0],
      {
        'stage': spec.stage,
        'replica': position,
        'replicas': number,
        **self._digest_names(),
      },
      snapshotter.Options(
        log=log,
        on_stored=lambda metadata: self._link.send(
          notices.Stored(share=folders.share_of(metadata))
        ),
        full_seconds=math.inf,  # that is the coordinator's to decide
        on_block=self._link.blocked,
        share=share,
      ),
    )
    for decision in go.decisions[1:]:
      taker.decide(decision)
    taker.start()
    self._closing.callback(taker.close)
    # A replay closes the gaps that it passes: else no start leads across them.
    for iteration in go.excluded:
      taker.distrust(iteration)
    for iteration in store.iterations():
      try:
        metadata = store.manifest(iteration).metadata
        is_ours = metadata['replicas'] == number
      except errors.StoreError:
        is_ours = False
      if not is_ours:  # damaged, or the share of another team
        taker.distrust(iteration)
    self._link.deciding(taker.decide)
    return taker

  def _digest_names(self) -> dict[str, Any]:
    """Names the operators whose digests are in this worker's snapshots."""
    if not self._spec.job.train.shard_optimizer:
      return {}
    return {conversion.DIGESTS: keys.operators_to_json(self._layout.operators)}

  def _finish(self) -> messages.Exit | orders.StopHere:
    """Obeys the agent after the end, until it says one of these two."""
    last = self._worker
    digests = self._digests or self._stage.partition.by_operator(
      self._programs.digest(last.state)  # there was no iteration to do
    )
    return finish.Finish(
      self._spec,
      self._link,
      self._injector,
      finish.LastState(
        iteration=last.iteration,
        state=last.state,
        digests=digests,
        partition=self._stage.partition,
      ),
    ).obey()
