"""The host stores of a run, as the leader looks into them.

All hosts are on this machine for now. No JAX here: the agent uses this module
and never creates a JAX backend.
"""

from __future__ import annotations

import pathlib
import shutil
from collections.abc import Collection, Iterable

from launch import hosts as hosts_lib, inventory, leader, recoverer
from moetion_jax import segment


class Stores:
  """Logs and snapshots of all stages, on disk so to say."""

  def __init__(
    self,
    stages: int,
    hosts: hosts_lib.Hosts,
    recoverer: recoverer.Recoverer,
    leader: leader.Leader,
  ):
    """Stores the arguments.

    Args:
      stages: of the run.
      hosts: of the run.
      recoverer: who is told what the stores hold.
      leader: who writes what was dropped.
    """
    self._stages = range(stages)
    self._hosts = hosts
    self._recoverer = recoverer
    self._leader = leader

  def log_path(self, stage: int) -> pathlib.Path:
    """Where the log of a stage lies."""
    return segment.segment_path(self._hosts.store_of(stage), stage, 0)

  def rescan(self, stages: Iterable[int] | None = None) -> frozenset[int]:
    """Looks what the stores hold of stages (None: of all).

    Returns:
      The stages, of all, whose logs are gone.
    """
    for stage in self._stages if stages is None else stages:
      folder = self._hosts.store_of(stage)
      self._recoverer.rescan(stage, inventory.read_shares(folder, stage, 0))
    return frozenset(
      stage for stage in self._stages if not self.log_path(stage).exists()
    )

  def too_small(self) -> frozenset[int]:
    """The stages that have a log, but for less than this run needs."""
    small = set()
    for stage in self._stages:
      path, need = self.log_path(stage), self._recoverer.log_size(stage)
      if path.exists() and path.stat().st_size < need.file_bytes:
        small.add(stage)
    return frozenset(small)

  def newest_entry(self, stages: Iterable[int] | None = None) -> int:
    """Newest iteration of which there is an entry of one of the stages."""
    return max(
      segment.newest_iteration(self.log_path(stage))
      for stage in (self._stages if stages is None else stages)
    )

  def forget_snapshots(self, stages: Collection[int]) -> None:
    """From the beginning: what is left would only take the room."""
    for stage in stages:
      folder = self._hosts.store_of(stage)
      shutil.rmtree(
        inventory.snapshots_folder(folder, stage, 0), ignore_errors=True
      )
      self._recoverer.rescan(stage, ())

  def drop_damaged(self, stage: int, first_iteration: int) -> None:
    """Before anybody reads it again: its new worker publishes it again."""
    for key in segment.drop_damaged(self.log_path(stage), first_iteration):
      self._leader.event(
        'entry_dropped',
        stage=stage,
        replica=key.replica,
        iteration=key.iteration,
        entry=str(key),
      )
