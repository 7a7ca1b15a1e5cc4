"""Reads what a run left in its host stores, for tools that look at it.

Knows nothing but files, and changes none: a run may live meanwhile. No JAX
here: looking must be fast.
"""

from __future__ import annotations

import dataclasses
import os
import pathlib
from collections.abc import Collection, Iterator

from launch import host_store, inventory, stored, workdir
from moetion_jax import (
  base,
  entry,
  hostmem,
  segment,
  snapshot_file,
  store_index,
)


def find(path: str, hostmem_dir: str) -> stored.StoredRun:
  """The run of a workdir and its stores, which are not looked into yet.

  Raises:
    base.ConfigError: there is no run, or it left no store.
  """
  # As the agent does: symbolic links are not followed.
  absolute = os.path.abspath(path)
  config, found_out = workdir.read_run(absolute)
  host_store.check_hostmem_dir(hostmem_dir)
  folders = host_store.folders(hostmem_dir, absolute)
  if not folders:
    run_id = host_store.run_id(absolute)
    where = f'no {hostmem.StoreFolder(hostmem_dir, run_id).path}'
    checkpoint = pathlib.Path(absolute, 'checkpoint')
    if checkpoint.is_dir():
      what = f'the run is finished, its state is {checkpoint}'
    else:
      what = (
        'name the --hostmem_dir of the run; a host that was started anew has '
        'lost it, and --policy=none leaves none'
      )
    raise base.ConfigError(
      'hostmem_dir',
      hostmem_dir,
      f'has no store of {absolute} ({where}): {what}',
    )
  return stored.StoredRun(
    workdir=pathlib.Path(absolute),
    config=config,
    found_out=found_out,
    folders=tuple(folders),
  )


def scan(run: stored.StoredRun, *, in_use: bool) -> stored.StoredRun:
  """Looks into the stores; `in_use`: by the run, which lives.

  Raises:
    base.ConfigError: a store is not private, or of several replicas.
  """
  if (replicas := run.config.train.replicas) > 1:
    raise base.ConfigError(
      'replicas', replicas, 'what such a run left cannot be looked into yet'
    )
  try:
    for folder in run.folders:
      hostmem.check_private(folder)
  except base.StoreError as error:
    hostmem_dir = str(run.folders[0].parent)
    raise base.ConfigError('hostmem_dir', hostmem_dir, str(error)) from error
  stages = range(run.config.train.stages)
  return dataclasses.replace(
    run, stages=tuple(_scan_stage(run.folders, s, in_use) for s in stages)
  )


def _scan_stage(
  folders: Collection[pathlib.Path], stage: int, in_use: bool
) -> stored.StoredStage:
  """The stage where its newest worker was: hosts may have changed."""
  found = [_scan_log(folder, stage) for folder in folders]
  newest = max(
    found,
    key=lambda one: (
      one.generation,
      inventory.snapshots_folder(one.folder, stage, stored.REPLICA).is_dir(),
    ),
  )
  snapshots, damage = _scan_snapshots(newest.folder, stage, in_use)
  if snapshots and not newest.generation and not newest.damage:
    damage.append(
      stored.Damage(
        stage=stage,
        kind='log',
        iteration=None,
        message=f'{newest.segment_path}: No such file or directory',
      )
    )
  return dataclasses.replace(
    newest, snapshots=snapshots, damage=(*newest.damage, *damage)
  )


def _scan_log(folder: pathlib.Path, stage: int) -> stored.StoredStage:
  path = segment.segment_path(folder, stage, stored.REPLICA)
  nothing = stored.StoredStage(
    stage=stage, folder=folder, snapshots={}, entries={}
  )
  reader = store_index.SegmentReader(path)
  try:
    reader.start()
    return dataclasses.replace(
      nothing,
      generation=reader.generation,
      segment_bytes=path.stat().st_size,
      entries={header.key: header for header in reader.entries()},
      damage=tuple(
        stored.Damage(
          stage=stage,
          kind='log',
          iteration=None,
          message=f'{path}: what slot {slot} says of its entry is damaged',
        )
        for slot in reader.damaged_slots()
      ),
    )
  except FileNotFoundError:
    return nothing
  except (OSError, base.StoreError) as error:
    reason = str(error)
  finally:
    reader.close()
  lost = stored.Damage(stage=stage, kind='log', iteration=None, message=reason)
  return dataclasses.replace(nothing, damage=(lost,))


def _scan_snapshots(
  folder: pathlib.Path, stage: int, in_use: bool
) -> tuple[dict[int, stored.SnapshotInfo], list[stored.Damage]]:
  folder = inventory.snapshots_folder(folder, stage, stored.REPLICA)
  snapshots: dict[int, stored.SnapshotInfo] = {}
  broken: dict[int, str] = {}
  for iteration, path in snapshot_file.list_snapshots(folder).items():
    try:
      manifest = snapshot_file.read_manifest(path)
      share = inventory.share_from_json(manifest.metadata)
    except base.StoreError as error:
      if not in_use or is_there(path):
        broken[iteration] = str(error)
      continue
    except (KeyError, TypeError, ValueError) as error:
      broken[iteration] = f'{path}: no snapshot of a stage: {error!r}'
      continue
    if share.iteration != iteration:
      broken[iteration] = f'{path}: is one of iteration {share.iteration}'
      continue
    digests = manifest.buffers.get(stored.DIGESTS)
    snapshots[iteration] = stored.SnapshotInfo(
      path=path,
      size_bytes=sum(b.nbytes for b in manifest.buffers.values()),
      share=share,
      digests=digests.shape[0] if digests else 0,
      has_partials=stored.PARTIALS in manifest.buffers,
    )
  known = snapshots.keys() | broken.keys()
  if not in_use:
    # Older ones than the oldest may be on their way out; one between two
    # neighbours was there.
    for iteration in range(min(known, default=0), max(known, default=0)):
      path = folder / str(iteration)
      if iteration in known:
        continue
      if path.is_dir():
        name = path / snapshot_file.MANIFEST_NAME
        broken[iteration] = f'{name}: No such file or directory'
      elif {iteration - 1, iteration + 1} <= known:
        broken[iteration] = f'{path}: No such file or directory'
  return snapshots, [
    stored.Damage(
      stage=stage, kind='snapshot', iteration=iteration, message=message
    )
    for iteration, message in sorted(broken.items())
  ]


def is_there(path: pathlib.Path) -> bool:
  """Whether a snapshot is still one: a living run retires them."""
  return (path / snapshot_file.MANIFEST_NAME).is_file()


def verify(run: stored.StoredRun) -> Iterator[stored.Damage]:
  """Reads everything; what has another checksum than it was written with."""
  for one in run.stages:
    for iteration, info in one.snapshots.items():
      try:
        snapshot_file.open_snapshot(info.path, verify=True).close()
      except base.StoreError as error:
        if is_there(info.path):
          yield stored.Damage(
            stage=one.stage,
            kind='snapshot',
            iteration=iteration,
            message=str(error),
          )
    if not one.entries:
      continue
    reader = store_index.SegmentReader(one.segment_path)
    try:
      reader.start()
      for key, header in one.entries.items():
        array = reader.view(header)
        if array is None:  # a living run let go of it
          continue
        try:
          entry.verify(header, array)
        except base.StoreError as error:
          yield stored.Damage(
            stage=one.stage,
            kind='entry',
            iteration=key.iteration,
            message=f'{one.segment_path}: {error}',
            key=key,
          )
    finally:
      reader.close()
