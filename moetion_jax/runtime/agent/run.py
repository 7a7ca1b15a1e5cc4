"""A run as a user starts it: its settings, its folders, its end."""

from __future__ import annotations

import dataclasses
import functools
import os
import sys
from collections.abc import Sequence

from moetion_jax import errors, job_spec
from moetion_jax.hostmem import run_store
from moetion_jax.runtime import placement
from moetion_jax.runtime.agent import (
  agent as agent_lib,
  settings as agent_settings,
)
from moetion_jax.runtime.records import (
  changes,
  checkpoint_folder,
  held_run,
  own_files,
  places,
  recorder,
  run_ids,
  whereabouts,
  workdir,
)


def run(
  job: job_spec.JobSpec,
  where: agent_settings.AgentSettings,
  view: recorder.View,
) -> int:
  """Trains from beginning to end, and leaves nothing but the workdir.

  A run that is stopped or fails keeps its host stores: the same command goes
  on from there.

  Args:
    job: the run's job.
    where: the settings of where it runs.
    view: the live view.

  Returns:
    The exit code.

  Raises:
    errors.ConfigError: the run cannot begin (`errors.exit_code_of` makes an
      exit code of that). Nothing but the run's id was
      written, and nothing was removed, unless the error is that something
      cannot be: then a part of the earlier run may be gone.
  """
  placement.host_of_stages(
    job.train.stages, where.local_hosts, job.train.replicas
  )
  folder = workdir.Workdir(
    where.workdir,
    fresh=where.fresh,
    accept_changes=where.accept_changes,
    extend=where.extend,
  )
  folder.lock()
  try:
    job = dataclasses.replace(
      job,
      init_digest=checkpoint_folder.digest_of(job.init_from),
      config=job.config | {'train': folder.settings_of(job.train)},
    )
    found = {}
    if os.path.isdir(job.init_from):  # else a worker says what is missing
      found = {held_run.INIT_DIGEST: job.init_digest}
    folder.check(job.config | found)
    job = dataclasses.replace(job, base=folder.base)
    if folder.changes.may_splice:
      where = where.with_room_for_splice()
    return _run(job, where, folder, view)
  finally:
    folder.close()


def _run(
  job: job_spec.JobSpec,
  where: agent_settings.AgentSettings,
  folder: workdir.Workdir,
  view: recorder.View,
) -> int:
  """Runs in a workdir that is locked and checked; see `run`."""
  ids = run_ids.RunIds(
    path=folder.path,
    hostmem_dir=where.hostmem_dir,
    locked_id=folder.locked_id,
    durable_dir=where.durable_dir,
  )
  chosen = ids.choose_new() if where.fresh else ids.choose()
  run_id, folder.earlier_id = chosen.run_id, chosen.earlier_id
  on_disk = where.durable_folder(str(folder.path), run_id)
  folder.whereabouts = whereabouts.of_run(
    where.hostmem_dir, on_disk, str(folder.path)
  )
  if not folder.is_finished():
    note = chosen.note
    if not folder.begins_anew:
      search = _search(folder, run_id)
      search.check()
      note = note or search.note()
    if note:
      print(note, flush=True)
  folder.take_id(run_id)
  _check_places(job, where, folder, on_disk)
  if folder.is_finished():
    # A run killed between its checkpoint and its end left something.
    folder.sync_finished()
    if folder.is_proven():
      _remove_rest(where, folder, on_disk)
    print(
      f'This run is finished: {folder.checkpoint}. Pass --fresh to start over.'
    )
    return errors.ExitCode.FINISHED
  left = run_store.report_leftovers(
    where.hostmem_dir, folder.earlier_id or run_id, anew=folder.begins_anew
  )
  left = left or bool(on_disk) and whereabouts.has_snapshots(on_disk)
  left = left and not where.fresh  # it is not this run's
  folder.remove_elsewhere = functools.partial(_remove_earlier, where, folder)
  try:
    store = run_store.open_store(where.hostmem_dir, run_id, str(folder.path))
  except errors.ConfigError:
    if not ids.find_original(run_id).original:
      raise
    # Another folder with this id was quicker: this one is taken for the copy.
    return _run(job, where, folder, view)
  try:
    agent = agent_lib.Agent(job, where, folder, store, view)
    try:
      return agent.run(keeps_store=left)
    finally:
      left = agent.executor.keeps_store
      if not agent.executor.has_begun:
        store.disown()  # who is refused left nothing there
  finally:
    run_store.close_store(store, keep=left)
    if not left and not folder.begins_anew:  # else: not accepted
      _remove_rest(where, folder, on_disk)


def _search(folder: workdir.Workdir, run_id: str) -> whereabouts.Search:
  """Returns where a run, by its id, is and was as its workdir says."""
  config = held_run.read_config(folder.path) or {}
  return whereabouts.Search(
    workdir=str(folder.path),
    run_id=run_id,
    known=whereabouts.Whereabouts.from_json(config),
    here=folder.whereabouts,
    changes=changes.finished_of(config.get(changes.CHANGES, ())),
  )


def _check_places(
  job: job_spec.JobSpec,
  where: agent_settings.AgentSettings,
  folder: workdir.Workdir,
  on_disk: str,
) -> None:
  """Raises errors.ConfigError if a setting is a path that the run removes."""
  if os.path.islink(on_disk):
    raise errors.ConfigError(
      'workdir',
      str(folder.path),
      f'{on_disk} is a symbolic link, through which no run writes; remove it, '
      'and name its target with --durable_dir',
    )
  of_run = run_store.paths(where.hostmem_dir, folder.run_id, where.local_hosts)
  try:
    places.check(
      places.Places(
        workdir=str(folder.path),
        data=job.data,
        init_from=job.init_from,
        durable_dir=where.durable_dir,
        hostmem_dir=where.hostmem_dir,
        compilation_cache_dir=where.compilation_cache_dir,
      ),
      of_run=[*of_run, *([on_disk] if on_disk else [])],
      fresh=where.fresh,
    )
  except OSError as error:
    raise own_files.config_error(error, 'workdir', folder.path) from error


def _remove_earlier(
  where: agent_settings.AgentSettings, folder: workdir.Workdir
) -> Sequence[str]:
  """Removes what an earlier run left outside the workdir.

  Returns:
    What is not the run's and stays.
  """
  run_store.empty(where.hostmem_dir, folder.run_id, where.local_hosts)
  kept: list[str] = []
  for run_id in filter(None, (folder.run_id, folder.earlier_id)):
    if where.durable_dir:
      on_disk = where.durable_folder(str(folder.path), run_id)
      kept += own_files.remove_durable(on_disk)
  if folder.earlier_id:
    run_store.remove_leftovers(where.hostmem_dir, folder.earlier_id)
    elsewhere = _search(folder, folder.earlier_id).remove_elsewhere()
    kept += elsewhere.others
    _tell_failed(elsewhere)
  return list(dict.fromkeys(kept))


def _remove_rest(
  where: agent_settings.AgentSettings, folder: workdir.Workdir, on_disk: str
) -> None:
  """Removes stores and snapshots on disk, which nobody needs any more.

  If the run is finished, those too that it left in other places.
  """
  run_store.remove_leftovers(where.hostmem_dir, folder.run_id)
  try:
    own_files.remove_durable(on_disk)
  except OSError as error:
    print(f'Not removed: {error.filename}: {error.strerror}', file=sys.stderr)
  if folder.is_finished():
    search = _search(folder, folder.run_id)
    elsewhere = search.remove_elsewhere()
    _tell_failed(elsewhere)
    if elsewhere.others:
      names = own_files.name_some(elsewhere.others)
      print(f'Kept, since no run made it: {names}.')
    search.remove_made()


def _tell_failed(removal: whereabouts.Removal) -> None:
  """Tells what is of no use any more, and could not be removed."""
  for text in removal.failed:
    print(f'Not removed: {text}; remove it', file=sys.stderr)
