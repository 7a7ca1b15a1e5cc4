import hypothesis
import hypothesis.strategies as st
import pytest

from moetion_jax.training import schedule

_F, _B, _E = (
  schedule.TaskKind.FORWARD,
  schedule.TaskKind.BACKWARD,
  schedule.TaskKind.EVALUATE,
)

# (stages, microbatches) -> one row a stage, in the words of the tasks.
_TABLES = {
  (1, 1): ['F0 B0'],
  (1, 3): ['F0 B0 F1 B1 F2 B2'],
  (2, 1): ['F0 B0', 'F0 B0'],
  (2, 3): ['F0 F1 B0 F2 B1 B2', 'F0 B0 F1 B1 F2 B2'],
  (3, 2): ['F0 F1 B0 B1', 'F0 F1 B0 B1', 'F0 B0 F1 B1'],
  (4, 4): [
    'F0 F1 F2 F3 B0 B1 B2 B3',
    'F0 F1 F2 B0 F3 B1 B2 B3',
    'F0 F1 B0 F2 B1 F3 B2 B3',
    'F0 B0 F1 B1 F2 B2 F3 B3',
  ],
  (3, 5): [
    'F0 F1 F2 B0 F3 B1 F4 B2 B3 B4',
    'F0 F1 B0 F2 B1 F3 B2 F4 B3 B4',
    'F0 B0 F1 B1 F2 B2 F3 B3 F4 B4',
  ],
}

_pipelines = hypothesis.given(st.integers(1, 8), st.integers(1, 12))


def _in_words(tasks) -> str:
  return ' '.join(f'{t.kind.name[0]}{t.microbatch}' for t in tasks)


def _schedules(stages: int, microbatches: int):
  return [
    schedule.one_forward_one_backward(s, stages, microbatches)
    for s in range(stages)
  ]


@pytest.mark.parametrize(('stages', 'microbatches'), _TABLES)
def test_schedules_by_hand(stages, microbatches):
  rows = [_in_words(tasks) for tasks in _schedules(stages, microbatches)]
  assert rows == _TABLES[stages, microbatches]


@pytest.mark.parametrize(('stage', 'stages'), [(-1, 2), (2, 2), (3, 2), (0, 0)])
def test_a_stage_that_is_none_is_refused(stage, stages):
  with pytest.raises(ValueError, match=f'stage {stage} of {stages}'):
    schedule.one_forward_one_backward(stage, stages, 4)


@hypothesis.settings(deadline=None)
@_pipelines
def test_every_microbatch_goes_forward_once_then_backward_once(stages, count):
  for tasks in _schedules(stages, count):
    assert len(tasks) == 2 * count
    # In order both ways: gradients accumulate in microbatch order.
    for kind in (_F, _B):
      assert [t.microbatch for t in tasks if t.kind == kind] == list(
        range(count)
      )
    for m in range(count):
      forward = tasks.index(schedule.Task(_F, m))
      assert forward < tasks.index(schedule.Task(_B, m))


@hypothesis.settings(deadline=None)
@_pipelines
def test_residuals_are_kept_of_few_microbatches_only(stages, count):
  for stage, tasks in enumerate(_schedules(stages, count)):
    in_flight, most = 0, 0
    for task in tasks:
      in_flight += 1 if task.kind == _F else -1
      most = max(most, in_flight)
    assert in_flight == 0
    assert most == min(stages - stage, count)


def _simulate(schedules) -> int:
  """Runs stages that read blockingly; returns the ticks that it took.

  In one tick every stage whose next entry was published before does one task.
  A stage reads its neighbours' entries in the order of its own tasks.

  Raises:
    AssertionError: every stage that is not done waits.
  """
  last = len(schedules) - 1
  progress = [0] * len(schedules)
  published = set()  # (stage, task)
  ticks = 0
  while any(p < len(t) for p, t in zip(progress, schedules, strict=True)):
    done = []
    for stage, tasks in enumerate(schedules):
      if progress[stage] == len(tasks):
        continue
      task = tasks[progress[stage]]
      source = stage + 1 if task.kind == _B else stage - 1
      outside = not 0 <= source <= last  # data, or the loss itself
      if outside or (source, task) in published:
        done.append((stage, task))
    waiting = {
      stage: tasks[p]
      for stage, (tasks, p) in enumerate(zip(schedules, progress, strict=True))
      if p < len(tasks)
    }
    assert done, f'deadlock: {waiting}'
    for stage, task in done:
      progress[stage] += 1
      published.add((stage, task))
    ticks += 1
  return ticks


@hypothesis.settings(deadline=None)
@_pipelines
def test_stages_that_wait_for_each_other_all_finish(stages, count):
  # The least there is: filling and draining the pipeline, nothing more.
  assert _simulate(_schedules(stages, count)) == 2 * (count + stages - 1)


@hypothesis.settings(deadline=None)
@_pipelines
def test_evaluation_flows_through_the_stages(stages, count):
  tasks = schedule.evaluation(count)
  assert tasks == tuple(schedule.Task(_E, m) for m in range(count))
  assert _simulate([tasks] * stages) == count + stages - 1


def test_a_deadlock_would_be_seen():
  backward_early = [
    (schedule.Task(_F, 0), schedule.Task(_B, 0), schedule.Task(_F, 1)),
    (schedule.Task(_F, 0), schedule.Task(_F, 1), schedule.Task(_B, 0)),
  ]
  with pytest.raises(AssertionError, match='deadlock'):
    _simulate(backward_early)
