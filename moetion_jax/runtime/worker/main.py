"""A worker process: one stage of a run; started by the agent only.

It reads a `spec_lib.Spec` from stdin. A spec without a stage makes it a warm
standby: it prepares for every stage, and waits until it gets one. The exit
codes are those of `launch.train`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import json
import os
import signal
import sys
import threading
import time
import traceback
from typing import TYPE_CHECKING

from moetion_jax import codec, errors, job_spec
from moetion_jax.hostmem import entry
from moetion_jax.recovery import notices
from moetion_jax.runtime import (
  environment,
  faults,
  linux_process,
  messages,
  spec as spec_lib,
)
from moetion_jax.runtime.worker import agent_link

if TYPE_CHECKING:  # this imports JAX, which a standby does at low priority
  from collections.abc import Callable

  from moetion_jax.runtime.worker import prepared as prepared_lib
  from moetion_jax.state import partition

# Errors after which a new worker would come to the same end.
_FINAL = (
  errors.NonFiniteError,
  errors.EntryMismatchError,
  errors.DamagedDiskError,
)
# A standby prepares beside workers that train: it must not take their time.
# With 5 it was not warm after four minutes where two cores had much to do.
_STANDBY_NICENESS = 2


def _stand_by(
  spec: spec_lib.Spec, link: agent_link.AgentLink
) -> tuple[spec_lib.Spec, prepared_lib.Prepared | None]:
  """Prepares, then waits to be promoted.

  Returns:
    The spec of the worker that it becomes, and what it has prepared, if that
    succeeded.
  """
  prepared: list[prepared_lib.Prepared] = []
  is_wanted, is_made = threading.Event(), threading.Event()

  def make_backend() -> None:
    """Makes the backend, whose threads inherit this thread's priority."""
    is_wanted.wait()
    try:
      import jax

      from moetion_jax.runtime import xla_setup

      if spec.world:
        xla_setup.join_world(spec.world, len(spec.team), spec.replica)
      else:
        jax.devices()
    finally:  # the waiting thread goes on, and meets the error itself
      is_made.set()

  def ask_for_backend() -> None:
    is_wanted.set()
    is_made.wait()

  def warm() -> None:
    # For this thread alone: the priority cannot be raised again.
    os.setpriority(
      os.PRIO_PROCESS, threading.get_native_id(), _STANDBY_NICENESS
    )
    try:
      from moetion_jax.runtime.worker import standby

      prepared.append(
        standby.prepare(
          spec.job,
          spec.platform,
          spec.compilation_cache_dir,
          ask_for_backend if spec.loads_ahead else None,
          spec.replica,
        )
      )
      link.compiling('warm')
      link.send(messages.Warm())
    except BaseException:
      traceback.print_exc()
      if spec.world:
        os._exit(1)  # the others of its world are of no use either
      # Once promoted, it prepares what is missing.

  _run_on(spec.cores)
  threading.Thread(target=make_backend, name='backend', daemon=True).start()
  thread = threading.Thread(target=warm, name='warm up')
  thread.start()
  while not isinstance(command := link.command(), messages.Promote):
    if isinstance(command, messages.Exit):
      os._exit(0)  # nothing to close, and the thread may take long
  thread.join()
  os.environ.update(command.environment)
  promoted = dataclasses.replace(
    command.spec, status_fd=spec.status_fd, control_fd=spec.control_fd
  )
  return promoted, prepared[0] if prepared else None


def _run_on(cores: tuple[int, ...]) -> None:
  """Keeps all existing threads on these cores; () leaves them anywhere."""
  for thread in os.listdir('/proc/self/task') if cores else ():
    with contextlib.suppress(ProcessLookupError):
      os.sched_setaffinity(int(thread), cores)


def _injector(
  spec: spec_lib.Spec, link: agent_link.AgentLink
) -> faults.FaultInjector:
  """Makes the injector of the worker's scripted faults.

  A fault of the agent is reported; the worker then waits for the agent to act.
  """
  injector = faults.FaultInjector(
    spec.faults,
    lambda fault: link.send(
      messages.FaultHappens(number=fault.number, at=time.monotonic())
    ),
  )
  injector.acts[faults.Place.AGENT] = lambda fault, iteration: signal.pause()
  return injector


def _work(
  spec: spec_lib.Spec,
  link: agent_link.AgentLink,
  prepared: prepared_lib.Prepared | None,
) -> None:
  """Works from the making of the backend to the end of the run."""
  injector = _injector(spec, link)
  injector.phase('start')
  from moetion_jax.runtime import xla_setup

  train = spec.job.train
  xla_setup.configure(
    local_devices=train.local_devices,
    compilation_cache_dir=spec.compilation_cache_dir,
  )
  import jax

  from moetion_jax.programs import compilation
  from moetion_jax.runtime import read_environment
  from moetion_jax.runtime.checkpoints import file as checkpoint_file, restore
  from moetion_jax.runtime.worker import fingerprints, generation
  from moetion_jax.training import job as job_lib

  position = spec.team.index(spec.replica)
  if spec.world and not (prepared and prepared.loaded):
    with link.meeting():
      xla_setup.join_world(spec.world, len(spec.team), position)
  found = read_environment.read()
  environment.check_replacement(spec.environment, found)
  job = job_lib.make(spec.job)
  data = prepared.data if prepared else job.data()
  sources = fingerprints.sources_of(data)
  fingerprint = fingerprints.of(data, spec.folder)
  job_spec.check_data(spec.job.data, spec.data_fingerprint, fingerprint)
  if sources:
    data = fingerprints.WatchedData(
      data, spec.job.data, spec.folder, fingerprint, sources
    )
  lowered = prepared.of(spec.stage, position) if prepared else None
  loaded = prepared.loaded.get(spec.stage) if prepared else None
  if len(spec.team) < train.replicas:
    lowered = None  # these programs are those of a whole team
  if loaded:
    stage = loaded.stage
  elif lowered:
    stage = job.bind(lowered.declared)
  else:
    stage = job.build_stage(spec.stage, spec.team, position)

  def initial() -> Callable[[], partition.State]:
    if base := spec.job.base:
      tree = checkpoint_file.load(base.path, 'workdir', base.digest)
      return restore.initial(stage, tree, base.path, 'workdir')
    return job.initial(stage)

  # Nearly all replacements start from snapshots, and need not wait for it.
  initial_state = (lambda: initial()()) if spec.is_replacement else initial()
  run = generation.StageRun(spec, link, stage, data, injector, initial_state)
  if not spec.is_replacement:  # the agent knows all that of a replacement
    link.send(
      notices.Ready(
        platform=jax.default_backend(),
        lowering_platform=compilation.platform_of(stage.mesh),
        device=jax.local_devices()[0].device_kind,
        state_bytes=sum(
          leaf.size * leaf.dtype.itemsize
          for leaf in jax.tree.leaves(stage.whole.state_shapes)
        ),
        operators=run.sizes(),
        environment=found,
        data_fingerprint=fingerprint,
      )
    )
  run.compile(loaded or lowered)
  gc.freeze()  # what was made so far stays: the collector need not visit it
  gc.enable()
  run.run()


def main() -> int:
  """Works as the spec on stdin says; returns the exit code."""
  # Importing, tracing and lowering make millions of objects, and nearly all
  # stay (measured at `tiny`: an eighth of a start is spent looking at them).
  gc.disable()
  spec = codec.decode(spec_lib.Spec, json.load(sys.stdin))
  linux_process.die_with(spec.agent_pid)
  link = agent_link.AgentLink(spec.status_fd, spec.control_fd)
  link.start()
  prepared = None
  try:
    if spec.stage == spec_lib.STANDBY:
      spec, prepared = _stand_by(spec, link)
    _run_on(spec.cores)
    _work(spec, link, prepared)
  except errors.ConfigError as error:
    link.send(notices.Refused.of(error))
    return errors.ExitCode.REFUSED
  except Exception as error:
    is_own = isinstance(error, errors.MoetionError)
    if not is_own:
      traceback.print_exc()
    name = '' if is_own else type(error).__name__
    is_nan = isinstance(error, errors.NonFiniteError)
    what = error.what if is_nan else str(error)
    link.send(
      notices.Failed(
        error=': '.join(x for x in (name, what) if x),
        advice=error.advice if is_nan else '',
        iteration=link.iteration,
        is_final=isinstance(error, _FINAL),
        is_unmet=isinstance(error, errors.UnmetError),
        has_wrong_bits=isinstance(error, errors.WrongBitsError),
        suspects=error.suspects if is_own else (),
        corrupt=(error.key.stage, error.key.iteration)
        if isinstance(error, entry.EntryCorruptError)
        else None,
      )
    )
    return errors.ExitCode.FAILED
  return errors.ExitCode.FINISHED


if __name__ == '__main__':
  sys.exit(main())
