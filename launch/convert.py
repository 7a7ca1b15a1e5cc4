"""Makes dense state from sparse snapshots, offline: of one stage, or of all.

`python -m launch.convert WORKDIR --stage=S` does what a recovery does, with
what a stopped run left in its host store, and compares digests; with --out it
writes the state as a plain Orbax checkpoint. With --all that is the state of
all stages after one iteration: a checkpoint as a finished run writes it, from
which any number of stages can go on. Nothing in the store changes.

Exit codes: 0 the state was made, 1 no state can be made, or a digest differs,
2 a flag is wrong.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if not __package__:  # run as a file
  sys.path[0] = os.path.abspath(f'{sys.path[0]}/..')

from absl import flags

from launch.lm import command_line
from launch.offline import run_flags, scan, stored_run
from moetion_jax import codec, errors, job_spec
from moetion_jax.hostmem import run_store
from moetion_jax.runtime import environment
from moetion_jax.runtime.records import changes, places

if TYPE_CHECKING:  # it imports JAX, before whose import cores are set
  from launch.offline import rebuild

flags.adopt_module_key_flags(run_flags)
_STAGE = flags.DEFINE_integer('stage', None, 'Which one; or all, with --all.')
_ALL = flags.DEFINE_bool('all', False, 'All stages, as one checkpoint.')
_ITERATION = flags.DEFINE_integer(
  'iteration', None, 'Whose state; by default the newest that can be made.'
)
_START = flags.DEFINE_integer(
  'start', None, 'The snapshot to start from; by default the newest that can.'
)
_OUT = flags.DEFINE_string(
  'out', '', "Folder for the state; '' to compare digests only."
)
_DATA = flags.DEFINE_string(
  'data', '', "The run's text, if it is elsewhere now."
)
_ACCEPT_CHANGES = flags.DEFINE_list(
  'accept_changes', [], 'Names of what may differ from what the run had.'
)
_CACHE = flags.DEFINE_string(
  'compilation_cache_dir', '~/.cache/moetion_jax', 'As of launch.train.'
)


def load_data(
  run: stored_run.StoredRun, stage: int, path: str
) -> tuple[stored_run.StoredRun, Any]:
  """Loads the run's text, if the stage reads any.

  Args:
    run: the stored run.
    stage: the stage's number.
    path: the path of the text; '' for the one that the run read.

  Returns:
    The run with this path, and its data; None for a stage that reads none.

  Raises:
    errors.ConfigError: the text is missing, or is not that of the run.
  """
  from launch.lm import transformer_job

  if path:
    settings = {**run.settings, 'data': os.path.abspath(path)}
    run = dataclasses.replace(run, settings=settings)
  if 0 < stage < run.train.stages - 1:
    return run, None
  data = transformer_job.of(run.config).data()
  known = dict(run.found_out.get('data_fingerprint', {}))
  here = data.fingerprint()
  if changed := job_spec.data_changes(known, here):
    raise errors.ConfigError(
      'data',
      run.config.data,
      f'is not the text of the run: {", ".join(changed)} differ(s) from '
      f'{run.workdir / "config.json"}',
    )
  return run, data


def check_environment(
  run: stored_run.StoredRun,
  stage: int,
  here: environment.Record,
  accepted: Sequence[str],
) -> str:
  """Checks that a replay here comes to the bits of the run.

  Args:
    run: the stored run.
    stage: the stage's number.
    here: what this process computes with.
    accepted: names of what may differ all the same.

  Returns:
    A description of what differs; '' where nothing does.

  Raises:
    errors.ConfigError: something that is not accepted differs.
  """
  known = environment.of_worker(
    changes.recorded(run.found_out, here), stage * run.train.replicas
  )
  found = environment.changes(known, here)
  environment.check_names(accepted, found, here)
  if refused := [x for x in found if x.name not in accepted]:
    raise errors.ConfigError(
      'workdir',
      str(run.workdir),
      f'holds a run made with {environment.describe(refused)}: a replay would '
      'not come to its bits. Convert it with what it was made with, or pass '
      f'--accept_changes={environment.names_of(found)}',
    )
  return environment.describe(found)


def recorded_cores(run: stored_run.StoredRun, stage: int) -> str | None:
  """Returns the number of cores of a stage's worker; None if not recorded."""
  known = run.found_out.get(changes.ENVIRONMENT)
  if not known:
    known = {'device': run.found_out.get(changes.SOFTWARE, {})}
  number = stage * run.train.replicas
  cores = environment.of_worker(known, number)['device'].get(environment.CORES)
  return None if cores is None else str(cores)


def _warn(text: str) -> None:
  print(text, file=sys.stderr, flush=True)


def _ranges(iterations: Sequence[int]) -> str:
  return stored_run.format_runs(stored_run.runs_of(iterations))


def common_iteration(run: stored_run.StoredRun) -> int:
  """Returns the newest iteration whose state can be made of all stages.

  Raises:
    errors.MoetionError: there is none.
  """
  newest = min(
    max((c.reaches for c in run.candidates(s) if c.is_usable), default=0)
    for s in range(run.train.stages)
  )
  for iteration in range(newest, run.initial, -1):
    if all(
      any(
        c.is_usable and c.start.complete_at <= iteration <= c.reaches
        for c in run.candidates(stage)
      )
      for stage in range(run.train.stages)
    ):
      return iteration
  raise errors.MoetionError(
    'no iteration is left whose state can be made of all stages; '
    'launch.show lists what there is of each'
  )


def _convert(run: stored_run.StoredRun) -> bool:
  """Converts as the flags say; returns whether all digests are as recorded."""
  from moetion_jax.runtime import xla_setup

  stages = range(run.train.stages) if _ALL.value else [_STAGE.value]
  iteration = _ITERATION.value
  if _ALL.value and iteration is None:
    iteration = common_iteration(run)
  if run.caution:
    _warn(run.caution)
  cores = {recorded_cores(run, stage) for stage in stages}
  if len(cores) > 1:
    raise errors.ConfigError(
      'all',
      True,
      'is for runs whose workers all had as many cores: convert each --stage '
      'by itself',
    )
  xla_setup.use_cores(*cores)
  xla_setup.configure(
    local_devices=run.train.local_devices,
    compilation_cache_dir=_CACHE.value,
  )
  import jax
  import numpy as np

  from moetion_jax import report
  from moetion_jax.runtime.checkpoints import file as checkpoint_file

  states, digests, is_verified = [], {}, True
  for stage in stages:
    done = _rebuild(run, stage, iteration)
    iteration = done.iteration
    # On the host: a device need not hold all stages.
    states.append(jax.tree.map(np.array, done.state))
    digests |= done.digests
    is_verified &= done.is_verified or iteration == run.initial
  if _ALL.value:
    is_verified = _compare_whole(run, iteration, report.combine(digests))
  if _OUT.value:
    checkpoint_file.save(
      _OUT.value, states, iteration, codec.encode(run.config), digests
    )
    print(f'Written: {os.path.abspath(_OUT.value)}')
  return is_verified or not _ALL.value


def _compare_whole(
  run: stored_run.StoredRun, iteration: int, found: str
) -> bool:
  """Compares the digest of all stages' state with its line; True if equal."""
  line = run.metrics.get(iteration)
  if line is None:
    _warn(f'metrics.jsonl has no digest of state {iteration}, which is {found}')
    return iteration == run.initial
  if line['digest'] != found:
    _warn(
      f'The digest of state {iteration} is {found}, but metrics.jsonl has '
      f'{line["digest"]}: these are other bits than the run had.'
    )
    return False
  print(
    f'State {iteration} of all stages, digest {found}: as in metrics.jsonl.'
  )
  return True


def _rebuild(
  run: stored_run.StoredRun, stage: int, iteration: int | None
) -> rebuild.Rebuilt:
  """Rebuilds a stage's state, and says what it was compared with."""
  from launch.offline import rebuild
  from moetion_jax import report
  from moetion_jax.runtime import read_environment

  run, data = load_data(run, stage, _DATA.value)
  if changed := check_environment(
    run,
    stage,
    read_environment.read(),
    environment.canonical(_ACCEPT_CHANGES.value),
  ):
    _warn(
      f'Other than what the run had: {changed}. The bits may differ; digests '
      'will tell.'
    )
  rebuilder = rebuild.Rebuilder.compile(run.config, stage, data)
  done = rebuilder.rebuild(run, _warn, iteration, _START.value)
  replayed = range(done.start + 1, done.iteration + 1)
  is_initial = done.start == run.initial
  came = 'the initial state' if is_initial else f'snapshot {done.start}'
  print(
    f'Stage {stage}, state {done.iteration}, digest '
    f'{report.combine(done.digests)}: from {came}, complete at '
    f'{done.complete_at}; replayed '
    + (f'iterations {_ranges(replayed)}.' if replayed else 'nothing.')
  )
  for what, iterations in (
    ('Digests of its operators, with those in snapshots', done.snapshots),
    ('Losses, with metrics.jsonl', done.losses),
    ('Digests of all stages together, with it', done.whole_digests),
  ):
    if iterations:
      print(f'  {what}: equal, {_ranges(iterations)}.')
  if done.applied_updates:
    print(f'  Updates with recorded gradients: {done.applied_updates}.')
  if done.entries:
    print(f'  Entries that were published: {done.entries}, all equal.')
  if not done.is_verified and done.iteration:
    _warn(f'No digest of state {done.iteration} was recorded anywhere.')
  return done


def main(argv: list[str]) -> int:
  """Converts as the flags say; returns the exit code."""
  run = run_flags.find_run(argv)
  stages = run.config.train.stages  # of launch.train, or it says so
  if _ALL.value == (_STAGE.value is not None):
    raise errors.ConfigError(
      'stage',
      '' if _STAGE.value is None else _STAGE.value,
      'name one stage, or pass --all',
    )
  if _START.value is not None and _ALL.value:
    raise errors.ConfigError('start', _START.value, 'is of one --stage')
  if not _ALL.value and not 0 <= _STAGE.value < stages:
    raise errors.ConfigError(
      'stage', _STAGE.value, f'must be 0 to {stages - 1}'
    )
  if _OUT.value and os.path.lexists(_OUT.value):
    raise errors.ConfigError('out', _OUT.value, 'exists; name another folder')
  places.check_found('out', _OUT.value)
  places.check_output('out', _OUT.value, str(run.workdir), run.folders)
  with contextlib.ExitStack() as stack:
    try:
      stack.enter_context(run_store.hold(run.folders))
    except errors.StoreError as error:
      raise errors.ConfigError(
        'workdir',
        str(run.workdir),
        f'{error}; only what a stopped run left can be converted',
      ) from error
    try:
      is_verified = _convert(scan.scan(run, in_use=False))
    except errors.ConfigError:
      raise
    except errors.MoetionError as error:
      _warn(str(error))
      return 1
  return 0 if is_verified else 1


if __name__ == '__main__':
  command_line.run_main('launch.convert', main)
