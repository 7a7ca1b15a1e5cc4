"""Reads what a run left in its host stores, for tools that look at it.

Knows only files, and changes none: the run may live meanwhile.
"""

from __future__ import annotations

import dataclasses
import os
import pathlib
from collections.abc import Collection, Iterator
from typing import Any

from launch.offline import stored_run
from moetion_jax import codec, config as config_lib, errors, keys
from moetion_jax.hostmem import (
  entry as entry_lib,
  run_store,
  segment,
  segment_check,
  store_folder,
)
from moetion_jax.recovery import splice as splice_lib
from moetion_jax.runtime.records import (
  changes,
  checkpoint_folder,
  held_run,
  own_files,
  run_ids,
)
from moetion_jax.snapshots import (
  folders as folders_lib,
  interface as snapshots_interface,
  registry,
)


def find(path: str, hostmem_dir: str) -> stored_run.StoredRun:
  """Finds the run of a workdir and its stores; does not look into them yet.

  Raises:
    errors.ConfigError: there is no run, or it left no store.
  """
  absolute = os.path.abspath(path)
  settings, found_out = read_settings(absolute)
  iterations = settings['train']['iterations']
  run_store.check_hostmem_dir(hostmem_dir)
  ids = run_ids.RunIds(path=absolute, hostmem_dir=hostmem_dir)
  run_id = ids.find()
  original = ids.find_original(run_id).original
  folders = [] if original else run_store.folders(hostmem_dir, run_id)
  if not folders:
    where = f'no {run_store.paths(hostmem_dir, run_id, 1)[0]}'
    if original:
      where = f'it is a copy of {original}'
    checkpoint = pathlib.Path(absolute, own_files.CHECKPOINT_NAME)
    if checkpoint_folder.is_committed(
      checkpoint
    ) and not checkpoint_folder.doubt(absolute, iterations):
      what = f'the run is finished, its state is {checkpoint}'
    elif checkpoint_folder.base(absolute, iterations):
      what = f'the run goes on from {checkpoint}, its state until now'
    else:
      what = (
        'name the --hostmem_dir of the run; a host that was started anew has '
        'lost it, and --policy=none leaves none'
      )
    raise errors.ConfigError(
      'hostmem_dir',
      hostmem_dir,
      f'has no store of {absolute} ({where}): {what}',
    )
  return stored_run.StoredRun(
    workdir=pathlib.Path(absolute),
    settings=settings,
    found_out=found_out,
    folders=tuple(folders),
    base=checkpoint_folder.base(absolute, iterations),
  )


def read_settings(
  path: str | os.PathLike[str],
) -> tuple[dict[str, Any], dict[str, Any]]:
  """Reads which run a folder holds, whatever its job is.

  Args:
    path: the folder, which is not locked.

  Returns:
    The run's settings as JSON, and what its workers found out:
    `data_fingerprint`, `environment`, `changes`; of an earlier version,
    `software`.

  Raises:
    errors.ConfigError: the folder holds no run, or one of another version of
      this program.
  """
  file = pathlib.Path(path) / own_files.CONFIG
  reason = f'holds no run: there is no {file}; name the --workdir of one'
  try:
    if (value := held_run.read_config(path)) is not None:
      for name in held_run.MARKS:
        value.pop(name, None)
      found_out = {
        name: value.pop(name) for name in held_run.FOUND_OUT if name in value
      }
      codec.decode(config_lib.TrainConfig, value['train'])
      return value, found_out
  except OSError as error:
    reason = f'{file}: {error.strerror}'
  except (held_run.NotOursError, ValueError, KeyError, TypeError) as error:
    reason = f'{file} is damaged, or of another version: {error}'
  raise errors.ConfigError('workdir', str(path), reason)


def scan(run: stored_run.StoredRun, *, in_use: bool) -> stored_run.StoredRun:
  """Looks into the stores; `in_use` tells that the run lives and uses them.

  Raises:
    errors.ConfigError: a store is not private.
  """
  try:
    for folder in run.folders:
      store_folder.check_private(folder)
  except errors.StoreError as error:
    hostmem_dir = str(run.folders[0].parent)
    raise errors.ConfigError('hostmem_dir', hostmem_dir, str(error)) from error
  stages, replicas = range(run.train.stages), run.train.replicas
  entries = run.found_out.get(changes.CHANGES, ())
  splices = splice_lib.in_force(changes.splices_of(entries))
  pending = changes.pending_of(entries)
  return dataclasses.replace(
    run,
    stages=tuple(
      _without_dropped(
        dataclasses.replace(
          _scan_stage(run.folders, stage, replicas, in_use),
          splices=splices,
          initial=run.initial,
        ),
        pending,
      )
      for stage in stages
    ),
  )


def _without_dropped(
  one: stored_run.StoredStage, pending: splice_lib.Splice | None
) -> stored_run.StoredStage:
  """Leaves out what the next start of the run drops, to finish a splice.

  Args:
    one: what is there.
    pending: the splice that was begun; None for none.
  """
  if pending is None:
    return one
  complete_at = pending.complete_at[one.stage]
  return dataclasses.replace(
    one,
    entries={},
    snapshots={
      iteration: info
      for iteration, info in one.snapshots.items()
      if iteration <= complete_at
    },
    only_start=pending.exact_until,
  )


def _scan_stage(
  folders: Collection[pathlib.Path], stage: int, replicas: int, in_use: bool
) -> stored_run.StoredStage:
  """Scans a stage where its newest workers were: hosts may have changed."""
  found = [
    [_scan_log(folder, stage, replica) for replica in range(replicas)]
    for folder in folders
  ]
  logs = max(
    found,
    key=lambda logs: (
      max(one.generation for one in logs),
      bool(folders_lib.snapshots_folders(logs[0].folder, stage)),
    ),
  )
  snapshots, damage = _scan_snapshots(logs[0].folder, stage, in_use)
  for replica, one in enumerate(logs):
    damage += one.damage
    if snapshots and not one.generation and not one.damage:
      damage.append(
        stored_run.Damage(
          stage=stage,
          kind=stored_run.DamageKind.LOG,
          iteration=None,
          message=f'{one.segment_path(replica)}: No such file or directory',
        )
      )
  return dataclasses.replace(
    logs[0],
    generation=max(one.generation for one in logs),
    segment_bytes=sum(one.segment_bytes for one in logs),
    entries={k: header for one in logs for k, header in one.entries.items()},
    snapshots=snapshots,
    damage=tuple(damage),
  )


def _scan_log(
  folder: pathlib.Path, stage: int, replica: int
) -> stored_run.StoredStage:
  path = segment.segment_path(folder, stage, replica)
  nothing = stored_run.StoredStage(
    stage=stage, folder=folder, snapshots={}, entries={}
  )
  try:
    with segment_check.SegmentFile.open(path) as file:
      return dataclasses.replace(
        nothing,
        generation=segment.newest_generation(path),
        segment_bytes=path.stat().st_size,
        entries={header.key: header for header in file.entries()},
        damage=tuple(
          _log_damage(
            stage, f'{path}: what cell {cell} says of its entry is damaged'
          )
          for cell in file.damaged_cells()
        ),
      )
  except FileNotFoundError:
    return nothing
  except (OSError, errors.StoreError) as error:
    reason = str(error)
  return dataclasses.replace(nothing, damage=(_log_damage(stage, reason),))


def _log_damage(stage: int, reason: str) -> stored_run.Damage:
  return stored_run.Damage(
    stage=stage, kind=stored_run.DamageKind.LOG, iteration=None, message=reason
  )


def _scan_snapshots(
  store: pathlib.Path, stage: int, in_use: bool
) -> tuple[dict[int, stored_run.SnapshotInfo], list[stored_run.Damage]]:
  shares: dict[int, list[stored_run.ShareInfo]] = {}
  damage: list[stored_run.Damage] = []
  missing: dict[int, list[str]] = {}
  for folder in folders_lib.snapshots_folders(store, stage):
    stored = registry.stored(folder)
    found, broken = _scan_shares(stored, in_use)
    for iteration, share in found.items():
      shares.setdefault(iteration, []).append(share)
    for iteration, message in broken.items():
      damage.append(_broken(stage, iteration, message))
    if not in_use:
      for iteration, message in _gaps(stored, found.keys() | broken.keys()):
        missing.setdefault(iteration, []).append(message)
  snapshots = {
    iteration: stored_run.SnapshotInfo(found=tuple(of_iteration))
    for iteration, of_iteration in sorted(shares.items())
  }
  for iteration, messages in missing.items():
    # While a replica had no worker it took none, and others took all.
    if iteration not in snapshots or not snapshots[iteration].shares:
      damage += [_broken(stage, iteration, message) for message in messages]
  return snapshots, sorted(damage, key=lambda d: (d.iteration, d.message))


def _broken(stage: int, iteration: int, message: str) -> stored_run.Damage:
  return stored_run.Damage(
    stage=stage,
    kind=stored_run.DamageKind.SNAPSHOT,
    iteration=iteration,
    message=message,
  )


def _scan_shares(
  stored: snapshots_interface.StoredSnapshots, in_use: bool
) -> tuple[dict[int, stored_run.ShareInfo], dict[int, str]]:
  """Returns one worker's whole snapshots, and the errors of its others."""
  found: dict[int, stored_run.ShareInfo] = {}
  broken: dict[int, str] = {}
  for iteration, path in stored.paths().items():
    try:
      manifest = stored.manifest(iteration)
      share = folders_lib.share_of(manifest.metadata)
      names = keys.operators_from_json(
        manifest.metadata.get(stored_run.DIGESTS, ())
      )
    except errors.StoreError as error:
      if not in_use or iteration in stored.iterations():
        broken[iteration] = str(error)
      continue
    except (KeyError, TypeError, ValueError) as error:
      broken[iteration] = f'{path}: no snapshot of a stage: {error!r}'
      continue
    if share.iteration != iteration:
      broken[iteration] = f'{path}: is one of iteration {share.iteration}'
      continue
    digests = manifest.buffers.get(stored_run.DIGESTS)
    found[iteration] = stored_run.ShareInfo(
      store=stored,
      path=path,
      size_bytes=sum(b.nbytes for b in manifest.buffers.values()),
      share=share,
      digests=digests.shape[0] if digests else 0,
      digest_names=tuple(sorted(names)),
      has_partials=stored_run.PARTIALS in manifest.buffers,
    )
  return found, broken


def _gaps(
  stored: snapshots_interface.StoredSnapshots, known: Collection[int]
) -> Iterator[tuple[int, str]]:
  """Yields the missing snapshots of a run that ended, each with a message.

  Those older than the oldest may be on their way out; one between two
  neighbours was there.
  """
  for iteration in range(min(known, default=0), max(known, default=0)):
    if iteration in known:
      continue
    left = (stored.folder / str(iteration)).exists()
    if left or {iteration - 1, iteration + 1} <= set(known):
      try:
        stored.manifest(iteration)
      except errors.StoreError as error:
        yield iteration, str(error)


def verify(run: stored_run.StoredRun) -> Iterator[stored_run.Damage]:
  """Reads everything and yields what no longer has its written checksum."""
  for one in run.stages:
    for iteration, info in one.snapshots.items():
      for share in info.found:
        try:
          share.store.open(iteration, verify=True).close()
        except errors.StoreError as error:
          if share.is_there():
            yield _broken(one.stage, iteration, str(error))
    for replica in range(run.train.replicas):
      yield from _verify_log(one, replica)


def _verify_log(
  one: stored_run.StoredStage, replica: int
) -> Iterator[stored_run.Damage]:
  entries = {k: h for k, h in one.entries.items() if k.replica == replica}
  if not entries:
    return
  path = one.segment_path(replica)
  try:
    with segment_check.SegmentFile.open(path) as file:
      damaged = file.damaged_entries(entries.values())
  except (OSError, errors.StoreError) as error:  # cut or gone since the scan
    yield _log_damage(one.stage, str(error))
    return
  for header in damaged:
    yield stored_run.Damage(
      stage=one.stage,
      kind=stored_run.DamageKind.ENTRY,
      iteration=header.key.iteration,
      message=f'{path}: {entry_lib.EntryCorruptError(header.key)}',
      key=header.key,
    )
