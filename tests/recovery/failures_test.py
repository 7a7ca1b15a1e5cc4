"""How many failures are too many: the counts, and who counts when."""

import pytest

from moetion_jax import errors
from moetion_jax.recovery import actions, failures
from tests.support import recoveries


def _do(counts, steps):
  """Does what was written: 'fail 01' is a failure of stages 0 and 1 at once."""
  for step in steps:
    match step.split():
      case ['fail', stages]:
        counts.add({int(s): f'{s} died' for s in stages}, line=7)
      case ['unmet', stage]:
        counts.add_unmet(int(stage), line=7, reason='it met nobody')
      case ['diverge', stages]:
        counts.add_divergence({int(s): f'{s} differs' for s in stages}, 2)
      case ['damage', reached]:
        counts.add_damage(int(reached), 'it is damaged')
      case ['forgive', stage]:
        counts.forgive(int(stage))
      case ['line_moved']:
        counts.line_moved()
      case ['all_caught_up']:
        counts.all_caught_up()
      case _:
        raise ValueError(step)


# ---- counts ------------------------------------------------------------------


@pytest.mark.parametrize(
  ('max_failures', 'steps', 'ends'),
  [
    pytest.param(0, ['fail 0'], True, id='none is allowed'),
    pytest.param(0, ['damage 3'], True, id='no damage is allowed'),
    pytest.param(
      1, ['damage 3', 'line_moved', 'damage 3'], True, id='damage again'
    ),
    pytest.param(
      1, ['damage 3', 'damage 4', 'damage 5'], False, id='damage further on'
    ),
    pytest.param(1, ['damage 4', 'damage 3'], True, id='damage before that'),
    pytest.param(1, ['fail 0'], False, id='as many as allowed'),
    pytest.param(1, ['fail 0', 'unmet 0'], False, id='unmet is apart'),
    pytest.param(1, ['unmet 0', 'unmet 1'], False, id='unmet, two stages'),
    pytest.param(1, ['unmet 0', 'fail 1', 'unmet 0'], True, id='unmet again'),
    pytest.param(
      1, ['unmet 0', 'line_moved', 'unmet 0'], False, id='met in between'
    ),
    pytest.param(0, ['forgive 0', 'unmet 0'], False, id='unmet, forgiven'),
    pytest.param(1, ['fail 0', 'fail 0'], True, id='one more'),
    pytest.param(2, ['fail 0', 'fail 0', 'fail 0'], True, id='two and one'),
    pytest.param(1, ['fail 0', 'fail 1'], False, id='each stage has its own'),
    pytest.param(1, ['fail 01'], False, id='together'),
    pytest.param(1, ['fail 1', 'fail 01'], True, id='one of those together'),
    pytest.param(
      1, ['fail 01', 'line_moved', 'fail 01'], False, id='progress clears all'
    ),
    pytest.param(
      1,
      ['fail 0', 'line_moved', 'fail 0', 'fail 0'],
      True,
      id='they count anew after progress',
    ),
    pytest.param(
      1, ['fail 0', 'all_caught_up', 'fail 0'], True, id='back is no progress'
    ),
    pytest.param(
      1, ['fail 0', 'diverge 0', 'diverge 0'], False, id='other bits are apart'
    ),
    pytest.param(
      1, ['fail 0', 'forgive 0', 'fail 0', 'fail 0'], False, id='forgiven'
    ),
    pytest.param(
      1,
      ['fail 0', 'forgive 0', 'fail 0', 'fail 0', 'fail 0'],
      True,
      id='forgiven once: the one at hand, and those before',
    ),
    pytest.param(
      1, ['fail 01', 'forgive 0', 'fail 1'], True, id='forgiven is one stage'
    ),
    pytest.param(0, ['forgive 0', 'fail 0'], False, id='forgiven before it'),
    pytest.param(
      0, ['forgive 0', 'fail 0', 'fail 0'], True, id='forgiven is one failure'
    ),
    pytest.param(
      0,
      ['forgive 0', 'line_moved', 'fail 0'],
      True,
      id='progress takes it back',
    ),
  ],
)
def test_the_last_failure_ends_the_run_or_does_not(max_failures, steps, ends):
  counts = failures.Failures(max_failures)
  _do(counts, steps[:-1])
  if not ends:
    _do(counts, steps[-1:])
    return
  with pytest.raises(errors.MoetionError, match='end the run'):
    _do(counts, steps[-1:])


def test_too_many_failures_are_told_with_the_stage_that_has_them():
  counts = failures.Failures(1)
  _do(counts, ['fail 12', 'forgive 2'])
  with pytest.raises(errors.MoetionError) as caught:
    counts.add({2: 'it hangs', 1: 'it fell over'}, line=30)
  assert str(caught.value) == (
    '2 failure(s) of stage 1 since iteration 30, the last one: it fell over; '
    'more than --max_failures=1 end the run'
  )


@pytest.mark.parametrize(
  ('max_failures', 'steps', 'loops'),
  [
    (0, [], [0, 1]),  # the first failure is too many
    (1, [], []),
    (1, ['fail 0'], [0]),
    (2, ['fail 0'], []),
    (2, ['fail 0', 'fail 01'], [0]),
    (2, ['fail 01', 'fail 01'], [0, 1]),
    (1, ['fail 01', 'forgive 0'], [1]),
    (1, ['fail 0', 'forgive 0', 'fail 0'], []),
    (1, ['fail 0', 'forgive 0', 'fail 0', 'fail 0'], [0]),
    (1, ['fail 01', 'line_moved'], []),
    (1, ['fail 01', 'all_caught_up'], [0, 1]),
    (1, ['diverge 0', 'diverge 0'], []),
  ],
)
def test_a_crash_loop_is_one_failure_before_too_many(
  max_failures, steps, loops
):
  counts = failures.Failures(max_failures)
  _do(counts, steps)
  assert [s for s in (0, 1) if counts.is_crash_loop(s)] == loops
  for stage in (0, 1):
    if stage not in loops:
      counts.add({stage: 'it died'}, line=0)
      continue
    with pytest.raises(errors.MoetionError):
      counts.add({stage: 'it died'}, line=0)


@pytest.mark.parametrize(
  ('steps', 'ends'),
  [
    (['diverge 0', 'diverge 0'], False),  # each of two stages, once
    (['diverge 0', 'diverge 1', 'diverge 01'], True),
    (['diverge 01', 'diverge 01'], False),  # one for all that failed at once
    (['diverge 0', 'fail 0', 'fail 0', 'diverge 0'], False),
    (['diverge 0', 'diverge 0', 'all_caught_up', 'diverge 01'], False),
    (['diverge 0', 'diverge 0', 'line_moved', 'diverge 01'], True),
    (['diverge 0', 'diverge 0', 'forgive 0', 'diverge 01'], True),
  ],
)
def test_states_of_other_bits_are_counted_until_all_are_back(steps, ends):
  counts = failures.Failures(9)
  _do(counts, steps[:-1])
  if not ends:
    _do(counts, steps[-1:])
    return
  with pytest.raises(errors.MoetionError, match='^0 differs; 1 differs$'):
    _do(counts, steps[-1:])


# ---- in a run ----------------------------------------------------------------


def _trained(**settings):
  run = recoveries.Run(settings=settings)
  run.begin()
  run.train(10)
  return run


def test_too_many_failures_of_a_stage_end_the_run():
  run = _trained(max_failures=2)
  for stage in (1, 1, 0):  # each has its own count
    run.dies(stage)
  assert not run.of(actions.Fail)
  run.dies(1, how='fell over')
  words = str(run.error())
  assert '3 failure(s) of stage 1 since iteration 5' in words
  assert 'fell over' in words and '--max_failures=2' in words


def test_failures_are_forgotten_when_the_line_moves_on():
  run = _trained(max_failures=1)
  for until in (10, 20, 30):
    run.train(until)
    run.dies(1)
    run.comes_back(1)
  assert len(run.of_kind('recovered')) == 3


def test_a_run_that_comes_to_other_bits_again_and_again_ends():
  run = _trained(max_failures=9)
  run.dies(1)
  for bad in (10, 9):
    run.dies(1, error='other bits', suspects=(bad,))
  run.dies(1, error='a/3 of state 8 has other bits', suspects=(8,))
  assert 'a/3 of state 8 has other bits' in str(run.error())


def test_sources_that_were_bad_once_are_no_matter_for_ever():
  run = _trained()
  for until in (10, 20, 30, 40):
    run.train(until)
    run.dies(1)
    run.dies(1, error='other bits', suspects=(until,))
    run.comes_back(1)
  assert len(run.of_kind('recovered')) == 4
