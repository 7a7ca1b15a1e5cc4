"""A run as a user starts it: its settings, its folders, its end.

No JAX here: the agent never creates a JAX backend.
"""

from __future__ import annotations

from launch import (
  agent_settings,
  durable,
  host_store,
  log_size,
  placement,
  settings,
  supervisor,
  workdir,
)


def run(config: settings.RunConfig, where: agent_settings.AgentSettings) -> int:
  """Trains from beginning to end, and leaves nothing but the workdir.

  A run that is stopped or fails keeps its host stores: the same command goes
  on from there.

  Args:
    config: of the run.
    where: it runs.

  Returns:
    The exit code.

  Raises:
    base.ConfigError: the run cannot begin; nothing was written.
  """
  log_size.check_shape(config)
  placement.host_of_stages(
    config.train.stages, where.local_hosts, config.train.replicas
  )
  folder = workdir.Workdir(where.workdir, fresh=where.fresh)
  folder.lock()
  try:
    folder.check(config.to_json())
    run_id = host_store.run_id(str(folder.path))
    on_disk = durable.folder_of(where, str(folder.path))
    if folder.is_finished():
      # Killed between its checkpoint and its end, it left something.
      host_store.remove_leftovers(where.hostmem_dir, run_id)
      print(
        f'This run is finished: {folder.checkpoint}. Pass --fresh to start '
        'over.'
      )
      return 0
    # Without the workdir's files nothing says what the store is of.
    fresh = where.fresh or not (folder.path / 'config.json').exists()
    left = host_store.report_leftovers(where.hostmem_dir, run_id, fresh=fresh)
    if fresh:
      durable.remove(on_disk)
    left = left or durable.has_left(on_disk)
    store = host_store.open_store(where.hostmem_dir, run_id)
    try:
      agent = supervisor.Agent(config, where, folder, store, keeps_store=left)
      try:
        return agent.run()
      finally:
        left = agent.keeps_store
    finally:
      host_store.close_store(store, keep=left)
      if not left:
        host_store.remove_leftovers(where.hostmem_dir, run_id)
        durable.remove(on_disk)
  finally:
    folder.close()
