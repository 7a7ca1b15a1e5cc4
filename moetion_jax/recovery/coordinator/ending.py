"""The end: all have trained, their states become the final checkpoint.

Each worker puts its state into the store; once all states are there, the first
worker saves them. One that dies meanwhile is asked again, when it is back; and
so is one whose state arrives damaged, which it still has.
"""

from __future__ import annotations

from moetion_jax.recovery import (
  actions,
  events,
  failures as failures_lib,
  notices,
  orders,
)
from moetion_jax.recovery.coordinator import (
  failing,
  progress,
  state as state_lib,
)

_MAX_DAMAGED = 3  # hand-overs of one worker
_DAMAGED_MEMORY = (
  'host memory is damaged. Have it tested, or name another tmpfs with '
  '--hostmem_dir'
)
_DAMAGED_DEVICE = (
  'host memory brought what was sent, by its checksums: the memory of the '
  'device is damaged, or the way out of it (on CPU, the memory of the '
  'process). Have it tested, or go on on another machine'
)


def stop_asked(state: state_lib.State, event: events.StopAsked) -> None:
  """Ends the run after this iteration, or at once."""
  state.signals += event.times
  is_training = isinstance(state, state_lib.Run) and (
    len(state.trained) == state.train.stages
  )
  if state.has_ended:
    state.do(actions.KillNow())
  elif state.signals > 1 or not is_training:
    recorded = state.recorded if isinstance(state, state_lib.Run) else 0
    _end(state, actions.Stop(iteration=recorded))
    state.do(actions.KillNow())
  else:
    assert isinstance(state, state_lib.Run)
    state.note('Stopping after this iteration; again to stop at once.')
    progress.propose_end(state)


def done(
  run: state_lib.Run, worker: state_lib.Worker, message: notices.Done
) -> state_lib.Asking[None]:
  """Takes in that a worker has trained to the end; the last is waited for."""
  run.done.add(worker.name)
  if len(run.done) < len(run.workers):
    return
  if message.iteration < run.train.iterations:
    _end(run, actions.Stop(iteration=run.recorded))
    return
  if not (
    yield from failing.suspect(run, 'the run is done', counts_dropped=False)
  ):
    run.kill(worker, 'was ended, since the last iterations are wrong')
    return
  for giver in _givers(run):
    if giver not in run.asked:
      run.asked.add(giver)
      run.do(actions.Send(worker=giver, order=orders.HandOver()))


def _givers(run: state_lib.Run) -> list[events.Name]:
  """Returns workers that together have the whole state of every stage."""
  if run.train.shard_optimizer:
    return [worker.name for worker in run.workers]
  return [(stage, run.team(stage)[0]) for stage in run.stages]


def handed_over(
  run: state_lib.Run, worker: state_lib.Worker, message: notices.HandedOver
) -> None:
  """Takes in that a worker's state is there; with the last, has all saved."""
  del message
  run.handed_over.add(worker.name)
  givers = _givers(run)
  if run.handed_over.issuperset(givers):
    replicas = tuple(
      tuple(replica for s, replica in givers if s == stage)
      for stage in run.stages
    )
    run.do(
      actions.Save(worker=givers[0], iteration=run.recorded, replicas=replicas)
    )


def damaged(
  run: state_lib.Run, worker: state_lib.Worker, message: notices.Damaged
) -> None:
  """Asks a worker again whose state arrived damaged, a few times.

  Args:
    run: the state.
    worker: the worker that was to save.
    message: its message.

  Raises:
    failures_lib.WorkerError: that state has arrived damaged too often.
  """
  name = message.stage, message.replica
  if name not in run.handed_over:
    return  # its worker goes back, and will hand over another one
  run.damaged[name] += 1
  count, what = run.damaged[name], message.what
  run.record(
    'final_state_damaged',
    stage=message.stage,
    replica=message.replica,
    error=what,
  )
  if count == _MAX_DAMAGED:
    cause = _DAMAGED_DEVICE if message.is_sent_so else _DAMAGED_MEMORY
    raise failures_lib.WorkerError(
      message.stage, run.recorded, f'{what}; that was {count} times: {cause}'
    )
  run.note(f'{what}; it is handed over again.')
  run.handed_over.discard(name)
  if name in _givers(run):
    run.do(actions.Send(worker=name, order=orders.HandOver()))


def rewritten(
  run: state_lib.Run, worker: state_lib.Worker, message: notices.Rewritten
) -> None:
  """Tells that the checkpoint was read back damaged, and is written again."""
  run.record(
    'final_checkpoint_damaged',
    stage=worker.stage,
    replica=worker.replica,
    error=message.what,
  )
  run.note(f'{message.what}; it is written once more.')


def saved(
  run: state_lib.Run, worker: state_lib.Worker, message: notices.Saved
) -> None:
  """Ends the run, whose final checkpoint is written."""
  del worker, message
  _end(run, actions.Finish(iteration=run.recorded))


def _end(state: state_lib.State, action: actions.Action) -> None:
  state.do(action)
  state.has_ended = True
