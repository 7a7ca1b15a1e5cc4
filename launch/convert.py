"""Makes one stage's dense state from sparse snapshots, offline.

`python -m launch.convert WORKDIR --stage=S` does what a recovery does, with
what a stopped run left in its host store, and compares digests; with --out it
writes the state as a plain Orbax checkpoint. Nothing in the store changes.

Exit codes: 0 the state was made, 1 no state can be made, 2 a flag is wrong.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import sys
from collections.abc import Sequence
from typing import Any

if not __package__:  # run as a file
  sys.path[0] = os.path.abspath(f'{sys.path[0]}/..')

from absl import flags

from launch.lm import command_line
from launch.offline import run_flags, scan, stored_run
from moetion_jax import codec, errors, job_spec
from moetion_jax.hostmem import run_store
from moetion_jax.runtime import environment
from moetion_jax.runtime.records import changes, places

flags.adopt_module_key_flags(run_flags)
_STAGE = flags.DEFINE_integer('stage', None, 'Which one.', required=True)
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


def _convert(run: stored_run.StoredRun) -> None:
  from moetion_jax.runtime import read_environment, xla_setup

  stage = _STAGE.value
  if run.caution:
    _warn(run.caution)
  xla_setup.use_cores(recorded_cores(run, stage))
  xla_setup.configure(
    local_devices=run.train.local_devices,
    compilation_cache_dir=_CACHE.value,
  )
  from launch.offline import rebuild
  from moetion_jax import report
  from moetion_jax.runtime.checkpoints import file as checkpoint_file

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
  done = rebuilder.rebuild(run, _warn, _ITERATION.value, _START.value)
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
  if _OUT.value:
    checkpoint_file.save(
      _OUT.value,
      [done.state],
      done.iteration,
      codec.encode(run.config),
      done.digests,
    )
    print(f'Written: {os.path.abspath(_OUT.value)}')


def main(argv: list[str]) -> int:
  """Converts as the flags say; returns the exit code."""
  run = run_flags.find_run(argv)
  stages = run.config.train.stages  # of launch.train, or it says so
  if not 0 <= _STAGE.value < stages:
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
      _convert(scan.scan(run, in_use=False))
    except errors.ConfigError:
      raise
    except errors.MoetionError as error:
      _warn(str(error))
      return 1
  return 0


if __name__ == '__main__':
  command_line.run_main('launch.convert', main)
