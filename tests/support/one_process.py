"""A whole run in one process: every stage a thread, logs in memory.

Does in threads what the agent and its workers do in processes: the same loop,
programs and reports. The multi-process pipeline is compared with the
one-process cut of a model, bit for bit.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from launch.lm import settings as run_settings, transformer_job
from moetion_jax import keys, report as report_lib
from moetion_jax.logs import memory_log
from moetion_jax.training import worker


def make_workers(
  config: run_settings.RunConfig, data: worker.Data | None = None
) -> list[worker.Worker]:
  """Compiles every stage and makes its worker; their logs share one memory.

  Args:
    config: the run's settings.
    data: what the workers read; None: the run's text.
  """
  store = memory_log.MemoryStore()
  job = transformer_job.of(config)
  data = data or job.data()
  workers = []
  for index in range(config.train.stages):
    stage = job.build_stage(index)
    state = job.initial(stage)()
    programs = stage.compile()
    log = memory_log.MemoryLog(keys.WorkerId(index, 0, 1), store)
    workers.append(worker.Worker(index, stage, programs, state, log, data))
  return workers


def train(
  config: run_settings.RunConfig,
  workers: Sequence[worker.Worker],
  on_iteration: Callable[[Sequence[report_lib.Report]], None],
  stop: Callable[[], bool] = lambda: False,
  options: Sequence[Mapping[str, Any]] = (),
) -> int:
  """Trains all stages to the end of the run.

  Args:
    config: the run's settings.
    workers: one for each stage, made by `make_workers`.
    on_iteration: called in this thread with all stages' reports of an
      iteration, in order.
    stop: asked by the first stage between iterations; True ends the run.
    options: further arguments of each stage's `Worker.train`.

  Returns:
    The last iteration done.

  Raises:
    The first error of any stage or of `on_iteration`.
  """
  options = options or [{}] * len(workers)
  if len(workers) == 1:
    return workers[0].train(
      config.train, lambda r: on_iteration([r]), stop, **options[0]
    )
  reports: queue.Queue = queue.Queue()
  last_iterations = [0] * len(workers)
  errors: list[BaseException] = []  # the first one is the cause of the others
  last = _LastIteration(stop)

  def run(index: int) -> None:
    try:
      last_iterations[index] = workers[index].train(
        config.train, reports.put, last.stop_of(index), **options[index]
      )
    except BaseException as e:  # handed to the caller's thread
      errors.append(e)
      for w in workers:
        w.log.close()
    finally:
      reports.put(None)

  threads = [
    threading.Thread(target=run, args=(i,), name=f'stage-{i}')
    for i in range(len(workers))
  ]
  for thread in threads:
    thread.start()
  gathered: dict[int, dict[int, report_lib.Report]] = {}
  refused = False
  running = len(threads)
  while running:
    report = reports.get()
    if report is None:
      running -= 1
      continue
    by_stage = gathered.setdefault(report.iteration, {})
    by_stage[report.stage] = report
    if len(by_stage) == len(workers) and not refused:
      del gathered[report.iteration]
      try:
        on_iteration([by_stage[i] for i in range(len(workers))])
      except BaseException as e:  # the stages must end first
        errors.append(e)
        refused = True
        last.now()
        for w in workers:
          w.log.close()
  for thread in threads:
    thread.join()
  if errors:
    raise errors[0]
  return last_iterations[-1]


class _LastIteration:
  """Makes all stages stop after the same iteration.

  Stage 0 asks first, since every other stage's iteration needs its
  activations; the others follow its answer for the same iteration.
  """

  def __init__(self, stop: Callable[[], bool]):
    self._stop = stop
    self._answers: list[bool] = []
    self._changed = threading.Condition()
    self._ended = False

  def now(self) -> None:
    with self._changed:
      self._ended = True
      self._changed.notify_all()

  def stop_of(self, index: int) -> Callable[[], bool]:
    asked = 0

    def stop() -> bool:
      nonlocal asked
      asked += 1
      with self._changed:
        if index == 0:
          self._answers.append(self._ended or self._stop())
          self._changed.notify_all()
        self._changed.wait_for(
          lambda: self._ended or len(self._answers) >= asked
        )
        return self._ended or self._answers[asked - 1]

    return stop
