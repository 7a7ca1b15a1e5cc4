"""Takes the snapshots of a worker, one per iteration, in a thread of its own.

The training thread hands the state over and goes on; the snapshot thread
dispatches the copies on the device, waits for them and stores them. The state
may be donated once the copies are dispatched, which `release` waits for. At
most one snapshot is on its way, and no capture is ever skipped: when the last
one is late, training waits, visibly.
"""

from __future__ import annotations

import collections
import dataclasses
import errno
import functools
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from moetion_jax import errors, keys
from moetion_jax.capture import (
  programs as capture_programs,
  selection,
  transfer,
)
from moetion_jax.logs import interface as log_interface
from moetion_jax.policies import decision as decision_lib
from moetion_jax.recovery import hang_detection
from moetion_jax.snapshots import (
  coverage,
  interface as snapshots_interface,
  manifest,
  snapshot,
)

_MEASURED_COPIES = 4
_FULL_POLL_SECONDS = 0.1  # a reader's lease ends without notice


@dataclasses.dataclass(frozen=True, kw_only=True)
class TakenSnapshot:
  """The cost of taking a snapshot.

  Attributes:
    snapshot_bytes: bytes of the operators; 0 if no snapshot was taken.
    blocked_seconds: seconds the training thread waited for the last copy.
  """

  snapshot_bytes: int = 0
  blocked_seconds: float = 0.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class _CaptureJob:
  """A snapshot on its way."""

  iteration: int
  state: Any
  compute: Mapping[str, jax.Array]
  gradients: Mapping[str, jax.Array]
  operators: coverage.Contents
  extras: Mapping[str, jax.Array | np.ndarray]
  check: Callable[[], None]  # raises if the step selected other operators
  fields: Mapping[str, Any]
  replace: bool
  mark: log_interface.Mark
  is_whole: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
  """Parts of snapshots that a worker of a run has, and a lone loop has not.

  Attributes:
    log: the worker's log. A snapshot counts only when everything published
      before it was taken can be read, since it is never published again.
    on_stored: called with the metadata of each snapshot once it counts, in the
      snapshot thread; in `take` for one that exists when it is to be taken.
    full_seconds: seconds to wait for host memory when there is none; `math.inf`
      where somebody else ends that wait.
    on_block: called in the snapshot thread when a wait for room begins or ends,
      with what there is too little of, and for what; None and '': no longer.
    share: operators that this worker captures, while other replicas capture
      the rest; None captures all.
  """

  log: log_interface.Log | None = None
  on_stored: Callable[[Mapping[str, Any]], None] = lambda metadata: None
  full_seconds: float = 60.0
  on_block: Callable[[hang_detection.Shortage | None, str], None] = (
    lambda shortage, what: None
  )
  share: frozenset[keys.OperatorId] | None = None


class Snapshotter:
  """Takes snapshots between `start` and `close`.

  The training thread calls `take` after every update, and `release` before it
  donates the state that was taken.

  Attributes:
    newest: iteration of the newest snapshot that counts; -1 for none.
  """

  def __init__(
    self,
    programs: capture_programs.CapturePrograms,
    store: snapshots_interface.Store,
    decision: decision_lib.CaptureDecision,
    fields: Mapping[str, Any],
    options: Options | None = None,
  ):
    """Stores the arguments.

    Args:
      programs: the compiled programs.
      store: a store that is not started and that only this object uses.
      decision: which operators are captured in which iteration.
      fields: metadata of every snapshot.
      options: what else a worker of a run has.
    """
    self.newest = -1
    self._programs = programs
    self._store = store
    self._fields = dict(fields)
    self._options = Options() if options is None else options
    self._decisions = [decision]
    self._asked = -1, decision  # an iteration, and what holds in it
    self._changed = threading.Condition()  # guards the fields below
    self._copies: collections.deque[tuple[int, float]] = collections.deque(
      maxlen=_MEASURED_COPIES  # bytes and seconds
    )
    self._job: _CaptureJob | None = None
    self._reads_state = False  # whether the job still needs its state
    self._first_iteration = 0
    self._closing = False
    self._error: BaseException | None = None
    self._known: set[int] = set()
    self._broken: set[int] = set()
    self._thread: threading.Thread | None = None

  def start(self) -> None:
    """Opens the store and starts the thread; raises StoreError."""
    self._store.start()
    self._known = set(self._store.iterations())
    self.newest = max(self._known, default=-1)
    self._thread = threading.Thread(
      target=self._run, name='snapshots', daemon=True
    )
    self._thread.start()

  @property
  def bandwidth(self) -> float:
    """Bytes per second at which the last snapshots were stored; 0 if none was.

    Counted from when their contents were on the host.
    """
    with self._changed:
      copied_bytes = sum(size for size, _ in self._copies)
      seconds = sum(seconds for _, seconds in self._copies)
    return copied_bytes / seconds if seconds else 0.0

  def close(self) -> None:
    """Waits for the copy on its way, then ends the thread. Idempotent."""
    with self._changed:
      self._closing = True
      self._changed.notify_all()
    if self._thread is not None:
      self._thread.join()
      self._thread = None
      self._store.close()

  def decide(self, decision: decision_lib.CaptureDecision) -> None:
    """Captures by `decision` from its `first_iteration` on. Any thread."""
    with self._changed:
      self._decisions = [
        d
        for d in self._decisions
        if d.first_iteration < decision.first_iteration
      ] + [decision]

  def retain(self, first_iteration: int) -> None:
    """Allows snapshots of earlier iterations to be removed. Any thread."""
    with self._changed:
      self._first_iteration = max(self._first_iteration, first_iteration)
      held = [d for d in self._decisions if d.first_iteration < first_iteration]
      self._decisions = self._decisions[max(0, len(held) - 1) :]
      self._changed.notify_all()

  def distrust(self, iteration: int) -> None:
    """Has a damaged snapshot taken again when its iteration comes."""
    with self._changed:
      self._broken.add(iteration)

  def slot(self, iteration: int) -> frozenset[keys.OperatorId]:
    """Returns the operators whose training state an iteration captures."""
    with self._changed:
      captured = self._decision(iteration).captured(iteration)
    return captured.state if captured else frozenset()

  def _decision(self, iteration: int) -> decision_lib.CaptureDecision:
    """Returns what holds in an iteration; a later word does not change it."""
    if self._asked[0] != iteration:
      active = decision_lib.active(self._decisions, iteration)
      self._asked = iteration, active
    return self._asked[1]

  def take(
    self,
    iteration: int,
    state: Any,
    compute: Mapping[str, jax.Array],
    extras: Mapping[str, jax.Array | np.ndarray],
    mask: selection.Mask | None = None,
    gradients: Mapping[str, jax.Array] | None = None,
    **fields: Any,
  ) -> TakenSnapshot:
    """Takes the snapshot of the state after `iteration`, if it has one.

    Args:
      iteration: the iteration.
      state: the training state; may be donated once `release` has returned.
      compute: the compute weights, which nobody may donate.
      extras: further arrays by name, which nobody may donate.
      mask: the mask that the training step returned for `slot`, by which the
        snapshot counts; None if the step is one that returns none.
      gradients: what the update consumed, which nobody may donate; None in a
        loop that has decided on none of it.
      **fields: metadata of this snapshot.

    Raises:
      StoreError, EntryMismatchError: an earlier snapshot could not be stored.
      SelectionError: the training step selected other operators for one.
    """
    with self._changed:
      self._check()
      decision = self._decision(iteration)
      captured = decision.captured(iteration)
      if captured is None:
        return TakenSnapshot()
      check = functools.partial(
        selection.check,
        iteration,
        mask,
        self._programs.layout.partition.operators,
        captured.state,
      )
      if self._options.share is not None:
        captured = captured.of(self._options.share)
      is_broken = iteration in self._broken
      is_known = iteration in self._known and not is_broken
      if is_known and self._is_told(iteration):
        return TakenSnapshot()  # in a replay: it exists already
      begin = time.monotonic()
      self._changed.wait_for(lambda: not self._job or self._error)
      blocked_seconds = time.monotonic() - begin
      self._check()
      self._broken.discard(iteration)
      self._reads_state = True
      self._job = _CaptureJob(
        iteration=iteration,
        state=state,
        compute=compute,
        gradients=gradients if gradients and captured.gradients else {},
        operators=captured,
        extras=extras,
        check=check,
        fields=fields,
        replace=is_broken,
        mark=self._options.log.mark() if self._options.log else (),
        is_whole=decision.is_whole,
      )
      self._changed.notify_all()
    return TakenSnapshot(
      snapshot_bytes=snapshot.snapshot_bytes(self._programs.layout, captured),
      blocked_seconds=blocked_seconds,
    )

  def _is_told(self, iteration: int) -> bool:
    """Tells that a snapshot counts which exists; returns False if it does not.

    Its predecessor may have died before anybody heard of it.
    """
    try:
      metadata = self._store.manifest(iteration).metadata
    except errors.StoreError:
      return False
    self._options.on_stored(metadata)
    return True

  def release(self) -> float:
    """Waits until the state that was taken last may be donated.

    That is when its copies are dispatched, milliseconds after `take`: with an
    iteration trained in between there is no wait.

    Returns:
      The seconds waited.

    Raises:
      StoreError, EntryMismatchError, SelectionError: as `take`.
    """
    with self._changed:
      begin = time.monotonic()
      self._changed.wait_for(lambda: not self._reads_state or self._error)
      self._check()
      return time.monotonic() - begin

  def flush(self) -> None:
    """Waits until every snapshot that was taken counts."""
    with self._changed:
      self._changed.wait_for(lambda: not self._job or self._error)
      self._check()

  def _check(self) -> None:
    if self._error is not None:
      raise self._error

  def _run(self) -> None:
    """Runs in the snapshot thread: saves one job after another."""
    try:
      while True:
        with self._changed:
          self._changed.wait_for(lambda: self._job or self._closing)
          first_iteration = self._first_iteration
          if self._job is None:
            return
        self._store.retain(first_iteration)
        iteration = self._save()
        with self._changed:
          self._known = {i for i in self._known if i >= first_iteration}
          self._known.add(iteration)
          self.newest = max(self.newest, iteration)
          self._job = None
          self._changed.notify_all()
    except BaseException as error:  # raised by the next call
      with self._changed:
        self._error = error
        self._changed.notify_all()

  def _save(self) -> int:
    """Captures and stores the job's snapshot; returns its iteration."""
    captured, job = self._capture()
    on_host = captured.to_host()
    buffers = on_host.buffers()
    job.check()
    if self._options.log:
      self._options.log.flush(mark=job.mark)
    metadata = on_host.metadata(
      iteration=job.iteration, **self._fields, **job.fields
    )
    del captured, on_host  # frees their device memory
    begin = time.monotonic()
    size = self._store_one(job, metadata, buffers)
    with self._changed:
      self._copies.append((size, time.monotonic() - begin))
    self._options.on_stored(metadata)
    return job.iteration

  def _capture(self) -> tuple[transfer.Captured, _CaptureJob]:
    """Captures; returns the result, and the job without its arrays."""
    with self._changed:
      job = self._job
    assert job is not None
    captured = self._programs.capture(
      job.state, job.compute, job.operators, job.gradients
    )
    captured = dataclasses.replace(captured, extras=job.extras)
    # Nothing here may keep device memory that training gives back.
    job = dataclasses.replace(
      job, state=None, compute={}, gradients={}, extras={}
    )
    with self._changed:
      self._job = job
      self._reads_state = False
      self._changed.notify_all()
    return captured, job

  def _store_one(
    self,
    job: _CaptureJob,
    metadata: dict[str, Any],
    buffers: Sequence[manifest.Buffer],
  ) -> int:
    """Stores a snapshot; while all must be kept it waits, and so does training.

    Raises:
      NoRoomError: there was no host memory, and none came in time.
    """
    full_at: float | None = None  # since when there has been no room at all
    shortage: hang_detection.Shortage | None = None
    if job.is_whole:  # the files may be sized for the parts of a window
      self._store.enlarge(
        manifest.data_bytes(buffer.nbytes for buffer in buffers)
      )
    try:
      while True:
        try:
          return self._store.save(
            job.iteration, metadata, buffers, replace=job.replace
          )
        except (snapshots_interface.SnapshotFullError, OSError) as error:
          if isinstance(error, OSError):
            if error.errno != errno.ENOSPC:
              raise
            full_at = time.monotonic() if full_at is None else full_at
            found = hang_detection.Shortage.ROOM
            what = (
              f'snapshot {job.iteration}: {error.strerror}; free host memory, '
              'or name a larger tmpfs with --hostmem_dir'
            )
            if time.monotonic() > full_at + self._options.full_seconds:
              raise errors.NoRoomError(
                f'no room for {what}; that was so for '
                f'{self._options.full_seconds:g} s'
              ) from error
          else:
            full_at, found = None, hang_detection.Shortage.SNAPSHOTS
            what = f'snapshot {job.iteration}'
          if found != shortage:
            if shortage:
              self._options.on_block(None, '')
            shortage = found
            self._options.on_block(shortage, what)
          with self._changed:
            if self._closing:
              raise
            self._changed.wait(_FULL_POLL_SECONDS)
            self._store.retain(self._first_iteration)
    finally:
      if shortage:
        self._options.on_block(None, '')
