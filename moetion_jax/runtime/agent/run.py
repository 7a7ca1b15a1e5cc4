"""A run as a user starts it: its settings, its folders, its end."""

from __future__ import annotations

from launch.lm import settings as run_settings
from moetion_jax.hostmem import run_store
from moetion_jax.logs import size as log_size
from moetion_jax.runtime import placement
from moetion_jax.runtime.agent import (
  agent as agent_lib,
  settings as agent_settings,
)
from moetion_jax.runtime.hosts import stores
from moetion_jax.runtime.records import recorder, workdir


def run(
  config: run_settings.RunConfig,
  where: agent_settings.AgentSettings,
  view: recorder.View,
) -> int:
  """Trains from beginning to end, and leaves nothing but the workdir.

  A run that is stopped or fails keeps its host stores: the same command goes
  on from there.

  Args:
    config: the run's settings.
    where: the settings of where it runs.
    view: the live view.

  Returns:
    The exit code.

  Raises:
    errors.ConfigError: the run cannot begin; nothing was written.
  """
  log_size.check_shape(config)
  placement.host_of_stages(
    config.train.stages, where.local_hosts, config.train.replicas
  )
  folder = workdir.Workdir(
    where.workdir, fresh=where.fresh, accept_changes=where.accept_changes
  )
  folder.lock()
  try:
    folder.check(config.to_json())
    if folder.changes.may_splice:
      where = where.with_room_for_splice()
    run_id = run_store.run_id(str(folder.path))
    on_disk = where.durable_folder(str(folder.path))
    if folder.is_finished():
      # A run killed between its checkpoint and its end left something.
      run_store.remove_leftovers(where.hostmem_dir, run_id)
      print(
        f'This run is finished: {folder.checkpoint}. Pass --fresh to start '
        'over.'
      )
      return 0
    # Without the workdir's files nothing says which run the store is of.
    fresh = where.fresh or not (folder.path / 'config.json').exists()
    left = run_store.report_leftovers(where.hostmem_dir, run_id, fresh=fresh)
    if fresh:
      stores.remove_durable(on_disk)
    left = left or stores.has_left_durable(on_disk)
    store = run_store.open_store(where.hostmem_dir, run_id)
    try:
      agent = agent_lib.Agent(
        config, where, folder, store, view, keeps_store=left
      )
      try:
        return agent.run()
      finally:
        left = agent.keeps_store
    finally:
      run_store.close_store(store, keep=left)
      if not left:
        run_store.remove_leftovers(where.hostmem_dir, run_id)
        stores.remove_durable(on_disk)
  finally:
    folder.close()
