"""What the leader decides from measurements, by hand and by search."""

import collections
from typing import Any

import hypothesis
import hypothesis.strategies as st
import pytest

from moetion_jax import errors, keys
from moetion_jax.policies import (
  decision as decision_lib,
  planner as planner_lib,
  popularity,
  settings as capture_settings,
  slots,
  window,
)
from moetion_jax.policies.kinds import base, registry, sparse
from moetion_jax.recovery import inventory
from moetion_jax.snapshots import coverage
from tests.support import helpers


def _settings(**fields):
  policy = registry.POLICIES[fields.pop('policy', 'sparse')]
  return capture_settings.CaptureSettings(policy=policy, **fields)


def _sizes(*state: int, layer=0, devices=1, compute=1 / 6):
  """A stage of as many experts; `state` are their bytes."""
  experts = [keys.OperatorId(f'layers/{layer}', i) for i in range(len(state))]
  return planner_lib.StageSizes(
    state_bytes=dict(zip(experts, state, strict=True)),
    compute_bytes={
      o: int(n * compute) for o, n in zip(experts, state, strict=True)
    },
    gradient_bytes={o: int(n / 3) for o, n in zip(experts, state, strict=True)},
    device={
      o: o.expert * devices // len(experts) if devices > 1 else None
      for o in experts
    },
  )


# ---- the first choice --------------------------------------------------------


@pytest.mark.parametrize(
  ('fields', 'operators', 'length', 'mode'),
  [
    ({}, [8], 4, 'rolling'),
    ({}, [3], 3, 'rolling'),
    ({}, [2, 6], 4, 'rolling'),  # the longest of what stages want
    ({'max_window_length': 2}, [8], 2, 'rolling'),
    ({'log_iterations': 13}, [8], 3, 'rolling'),
    ({'window_mode': 'aligned'}, [8], 4, 'aligned'),
    ({'window_length': 7}, [8, 9], 7, 'rolling'),
    ({'window_length': 1, 'window_mode': 'aligned'}, [8], 1, 'aligned'),
  ],
)
def test_the_first_window(fields, operators, length, mode):
  stages = [_sizes(*[60] * n, layer=i) for i, n in enumerate(operators)]
  planner = sparse.SparsePlanner(_settings(**fields), stages, 'cpu')
  made = planner.decisions(17)
  assert len(made) == len(operators)
  for stage, decision in zip(stages, made, strict=True):
    assert decision.first_iteration == 17
    assert (decision.window_length, decision.mode) == (length, mode)
    assert decision.every == 1
    assert frozenset().union(*decision.slots) == stage.state_bytes.keys()
  assert planner.lag_iterations == length


def test_a_window_longer_than_every_stage_is_refused():
  stages = [_sizes(*[60] * n, layer=n) for n in (3, 8)]
  with pytest.raises(errors.ConfigError, match='--window_length=9: .* 8 oper'):
    sparse.SparsePlanner(_settings(window_length=9), stages, 'cpu')


@pytest.mark.parametrize('order', ['static', 'count'])
@pytest.mark.parametrize('mode', ['rolling', 'aligned'])
def test_a_stage_with_fewer_operators_than_slots_has_empty_ones(order, mode):
  stages = [_sizes(*[60] * n, layer=n) for n in (3, 8)]
  planner = sparse.SparsePlanner(
    _settings(window_length=7, window_mode=mode, order=order), stages, 'cpu'
  )
  few, many = planner.decisions(4)
  assert sorted(map(len, few.slots)) == [0] * 4 + [1] * 3
  assert all(many.slots)
  for stage, decision in zip(stages, (few, many), strict=True):
    records = [
      coverage.SnapshotRecord(iteration=i, state=held[0], compute=held[1])
      for i in range(4, 4 + 3 * 7)
      if (held := decision.captured(i))
    ]
    starts = coverage.valid_starts(records, stage.state_bytes)
    if mode == 'aligned':
      assert {4, 11, 18} <= {s.iteration for s in starts}
    else:  # from each that a whole window follows
      assert {*range(4, 19)} <= {s.iteration for s in starts}
    assert all(s.complete_at <= s.iteration + 6 for s in starts)
  remarks = planner.remarks(4)
  assert remarks is not None and remarks.kind == 'window'
  assert remarks.fields['empty_slots'] == [4, 0]
  assert remarks.fields['window_length'] == 7
  whole = sparse.SparsePlanner(_settings(window_length=3), stages, 'cpu')
  assert whole.remarks(4) is None


def test_a_chosen_window_says_which_slots_are_empty():
  planner = _planner(_sizes(*[6] * 3), _sizes(*[6] * 8, layer=1))
  changes = _run(planner, range(1, 7), 2, copy_bytes_per_second=13.0)
  (change,) = changes.values()
  length = change.fields['window_length']
  assert length > 3
  assert change.fields['empty_slots'] == [length - 3, 0]


# ---- measurements ------------------------------------------------------------


def _run(planner, iterations, stages=1, **fields: Any):
  """Changes by the iteration that brought them about."""
  changes = {}
  for i in iterations:
    reports = [
      helpers.make_report(i, stage, **fields) for stage in range(stages)
    ]
    if change := planner.add(reports):
      changes[i] = change
  return changes


def _planner(*stages, platform='gpu', **fields):
  settings = _settings(**fields)
  planner = settings.policy.planner(
    settings, list(stages) or [_sizes(*[6] * 8)], platform
  )
  assert isinstance(planner, sparse.SparsePlanner)
  planner.decisions(0)
  return planner


@pytest.mark.parametrize('bandwidth', [1.0, 7.0, 14.0, 20.0, 100.0])
def test_with_records_every_window_is_rolling(bandwidth):
  # Eight experts: 6 bytes of state and 2 of gradients each. A link that is too
  # slow for those in half an iteration would have an aligned window else.
  planner = _planner(replay='updates')
  changes = _run(
    planner, range(1, 60), seconds=2.0, copy_bytes_per_second=bandwidth
  )
  made = [d for change in changes.values() for d in change.decisions]
  assert all((d.mode, d.every) == ('rolling', 1) for d in made)
  assert planner.choice.window_length == (2 if bandwidth > 30 else 8)


# Eight experts of 6 bytes and 1 byte; see window_test: a window that fits.
@pytest.mark.parametrize(
  ('target', 'fields', 'length', 'mode'),
  [
    (1000, {}, 2, 'rolling'),  # there is no room for whole snapshots
    (1000, {'max_window_length': 1}, 1, 'rolling'),
    (28, {}, 2, 'rolling'),
    (27.9, {}, 3, 'rolling'),
    (22, {}, 4, 'rolling'),
    (13, {}, 8, 'rolling'),
    (13, {'max_window_length': 7}, 5, 'aligned'),
    (12.9, {}, 5, 'aligned'),
    (12.9, {'window_mode': 'rolling'}, 8, 'rolling'),  # nothing fits
    (1000, {'window_mode': 'aligned'}, 2, 'aligned'),
    (4.8, {}, 8, 'rolling'),
    (4.8, {'max_window_length': 6}, 6, 'rolling'),
    (4.8, {'window_mode': 'aligned'}, 8, 'aligned'),
  ],
)
def test_the_window_that_fits_what_was_measured(target, fields, length, mode):
  planner = _planner(overlap_target=0.5, **fields)
  before = planner.choice
  changes = _run(
    planner, range(1, 60), seconds=2.0, copy_bytes_per_second=target
  )
  assert (planner.choice.window_length, planner.choice.mode) == (length, mode)
  assert planner.choice.every == 1
  if (before.window_length, before.mode) == (length, mode):
    assert not changes
    return
  (iteration, change), *others = changes.items()
  assert iteration == 6 and not others
  assert change.kind == 'window'
  first = change.fields['first_iteration']
  # An aligned window is finished first.
  assert first == (12 if before.mode == 'aligned' else 9)
  assert change.fields['window_length'] == length
  assert change.fields['reason'] == planner.choice.reason
  for decision in change.decisions:
    assert decision.first_iteration == first
    assert (decision.window_length, decision.mode) == (length, mode)


@pytest.mark.parametrize(
  ('platform', 'share', 'chosen'),
  # As many bytes an iteration either way; see window_test for whole ones.
  [('cpu', 0.02, (1, 2)), ('gpu', 0.5, (2, 1))],
)
def test_how_much_of_an_iteration_depends_on_the_platform(
  platform, share, chosen
):
  planner = _planner(platform=platform)
  _run(planner, range(1, 7), seconds=1.0, copy_bytes_per_second=28 / share)
  assert (planner.choice.window_length, planner.choice.every) == chosen


# Eight experts of 6 bytes and 1 byte: 48 in all. Reserved are 28 files of 28.
@pytest.mark.parametrize(
  ('target', 'fields', 'every'),
  [
    (24, {}, 2),
    (23.9, {}, 3),
    (9.6, {}, 5),
    (4.8, {}, 8),  # no window fits; logs have no room for 10 iterations
    (24, {'window_mode': 'rolling'}, 0),
    (4.8, {'window_mode': 'rolling'}, 0),
    (24, {'window_length': 3}, 0),
    # A third window of up to 4, and 5 whole ones, do not fit into 16 files.
    (24, {'max_window_length': 4}, 0),
    (48, {}, 0),  # a window of 2, since there is no room for all of them
  ],
)
def test_whole_snapshots_where_copies_take_from_training(target, fields, every):
  planner = _planner(platform='cpu', overlap_target=0.02, **fields)
  changes = _run(
    planner, range(1, 60), seconds=2.0, copy_bytes_per_second=target * 25
  )
  if not every:
    assert planner.choice.window_length > 1
    return
  (iteration, change), *others = changes.items()
  assert iteration == 6 and not others
  (decision,) = change.decisions
  assert decision.is_whole and decision.every == every
  assert decision.first_iteration == 9
  assert planner.lag_iterations == every


def test_another_look_whether_a_shorter_window_would_do():
  def run(planner, first, last, target, **fields):
    changes = _run(
      planner,
      range(first, last),
      seconds=2.0,
      copy_bytes_per_second=target * 25,
      **fields,
    )
    return [
      (i, (c.fields['window_length'], c.fields['every']))
      for i, c in changes.items()
    ]

  cpu: dict[str, Any] = {'platform': 'cpu', 'overlap_target': 0.02}
  planner = _planner(**cpu)
  assert run(planner, 1, 20, 9.6) == [(6, (1, 5))]
  # From 9 on; after four windows of 5.
  assert run(planner, 20, 60, 16) == [(28, (1, 3))]
  assert run(planner, 60, 100, 23.9) == []  # no more than that
  assert run(planner, 100, 140, 4.8) == []  # longer only when copies are late
  assert run(planner, 140, 180, 24, blocked_seconds=1.0)[0][1] == (1, 4)
  assert planner.choice.every > 4
  assert run(planner, 180, 300, 24) == []  # it was too short before
  # Five is not shorter than six by a quarter.
  planner = _planner(**cpu)
  assert run(planner, 1, 20, 8) == [(6, (1, 6))]
  assert run(planner, 20, 90, 9.6) == []
  # Windows: of bytes an iteration; see above.
  planner = _planner(**cpu, window_mode='rolling')
  (first,) = run(planner, 1, 20, 14)
  assert first[1][0] > 2
  (second,) = run(planner, 20, 90, 28)
  assert second[1] == (2, 1)


def test_the_median_of_the_last_five_iterations_counts():
  planner = _planner(overlap_target=0.5)
  for i, seconds in enumerate([99.0, 2.0, 0.1, 2.0, 88.0, 2.0], start=1):
    planner.add(
      [helpers.make_report(i, seconds=seconds, copy_bytes_per_second=27.9)]
    )
  assert planner.choice.window_length == 3


def test_the_stage_that_needs_most_decides():
  planner = _planner(
    _sizes(*[6] * 8), _sizes(*[12] * 8, layer=1), overlap_target=0.5
  )
  (change,) = _run(
    planner, range(1, 9), 2, seconds=2.0, copy_bytes_per_second=55.0
  ).values()
  assert [d.window_length for d in change.decisions] == [3, 3]


@pytest.mark.parametrize(
  'fields', [{'window_length': 4}, {'policy': 'none'}], ids=str
)
def test_a_pinned_window_stays(fields):
  planner = _planner(**fields)
  late: dict[str, Any] = {
    'seconds': 1.0,
    'blocked_seconds': 0.9,
    'copy_bytes_per_second': 1e3,
  }
  assert not _run(planner, range(1, 100), **late)


def test_nothing_is_kept_for_nothing():
  planner = _planner(policy='none')
  assert planner.pools() == [planner_lib.PoolSize(files=0, size_bytes=0)]


# ---- the way of replay -------------------------------------------------------


@pytest.mark.parametrize('mtbf', [1e-3, 1.0, 1e9])
@pytest.mark.parametrize('bandwidth', [10.0, 28.0, 60.0, 1e4, 1e12])
@pytest.mark.parametrize('platform', ['cpu', 'gpu'])
@pytest.mark.parametrize('fields', [{}, {'window_length': 3}], ids=str)
def test_the_way_of_replay_with_the_highest_ettr(
  mtbf, bandwidth, platform, fields
):
  measured = {'seconds': 2.0, 'copy_bytes_per_second': bandwidth}
  planner = _planner(
    platform=platform, replay='auto', expected_mtbf_seconds=mtbf, **fields
  )
  (first,) = planner.decisions(0)
  assert first.replay == 'microbatches'
  (iteration, change), *later = _run(planner, range(1, 60), **measured).items()
  assert (iteration, change.kind) == (6, 'window')
  predicted = change.fields['predicted']
  assert change.fields['expected_mtbf_seconds'] == mtbf
  chosen = predicted[change.fields['replay']]
  assert chosen['ettr'] == max(one['ettr'] for one in predicted.values())
  assert chosen['window_length'] == change.fields['window_length']
  assert {d.replay for d in change.decisions} <= {change.fields['replay']}
  pools = planner.pools()
  for decision in [
    *change.decisions,
    *(d for _, c in later for d in c.decisions),
  ]:
    assert decision.replay == change.fields['replay']  # once and for all
  if change.fields['replay'] == 'microbatches':
    # As if nothing else had been possible; room is there for either.
    plain = _planner(platform=platform, **fields)
    before = _run(plain, range(1, 60), **measured)
    assert [c.decisions for c in before.values()] == [
      c.decisions for c in (change, *(c for _, c in later)) if c.decisions
    ]
    assert pools[0].size_bytes >= plain.pools()[0].size_bytes
  else:
    assert change.decisions


def test_rare_failures_are_not_worth_records_where_copies_cost_time():
  measured = {'seconds': 2.0, 'copy_bytes_per_second': 1e4}
  chosen = {}
  for mtbf in (1.0, 1e2, 1e9):
    planner = _planner(
      platform='cpu',
      replay='auto',
      expected_mtbf_seconds=mtbf,
      window_length=4,
    )
    change = _run(planner, range(1, 60), **measured)[6]
    chosen[mtbf] = change.fields['replay']
    assert change.fields['window_length'] == 4
  assert chosen == {1.0: 'updates', 1e2: 'updates', 1e9: 'microbatches'}


def test_room_is_for_the_larger_way():
  fields: dict[str, Any] = {'window_length': 4}
  pools = {
    replay: _planner(replay=replay, **fields).pools()
    for replay in capture_settings.REPLAYS
  }
  sizes = {replay: made[0].size_bytes for replay, made in pools.items()}
  assert sizes['auto'] == sizes['updates'] > sizes['microbatches']
  # Where it changes, a start just before waits for a window of the new ones.
  files = {replay: made[0].files for replay, made in pools.items()}
  assert files['auto'] == files['updates'] + 4


@pytest.mark.parametrize(
  'fields', [{'window_mode': 'aligned'}, {'policy': 'none'}], ids=str
)
def test_where_nothing_can_be_recorded_auto_is_microbatches(fields):
  planner = _planner(replay='auto', **fields)
  assert planner.decisions(0) == _planner(**fields).decisions(0)
  assert planner.pools() == _planner(**fields).pools()
  changes = _run(planner, range(1, 60), copy_bytes_per_second=1e3)
  assert all('predicted' not in c.fields for c in changes.values())


@pytest.mark.parametrize('mtbf', [0.0, -1.0, float('inf'), float('nan')])
def test_an_mtbf_is_a_number_of_seconds(mtbf):
  with pytest.raises(errors.ConfigError, match='--expected_mtbf'):
    _settings(expected_mtbf_seconds=mtbf)


def test_starts_across_the_change_of_replay():
  """From each snapshot a window before the change, and each from it on."""
  planner = _planner(replay='auto', window_length=4, expected_mtbf_seconds=1.0)
  decisions = list(planner.decisions(0))
  change = _run(planner, range(1, 9), copy_bytes_per_second=1e4)[6]
  assert change.fields['replay'] == 'updates'
  decisions += change.decisions
  first = change.fields['first_iteration']
  records = [
    coverage.SnapshotRecord(
      iteration=i,
      is_record=True,
      **decision_lib.active(decisions, i).captured(i)._asdict(),
    )
    for i in range(1, first + 10)
  ]
  starts = {
    s.iteration
    for s in coverage.valid_starts(
      records, records[0].state | records[0].compute
    )
  }
  # The last snapshot with compute weights is a start for records as well.
  assert starts == {
    *range(1, first - 3), *range(first - 1, first + 7)
  }  # fmt: skip
  # So much is kept that the line never has to pass those that are none.
  assert planner.settings.kept_snapshots >= planner.lag_iterations + 2 * 4


# ---- late copies -------------------------------------------------------------


def test_the_window_grows_when_copies_run_late():
  planner = _planner(_sizes(*[6] * 40), overlap_target=0.5)
  fine: dict[str, Any] = {'seconds': 2.0, 'copy_bytes_per_second': 90.0}
  assert not _run(planner, range(1, 11), **fine)
  assert planner.choice.window_length == 4
  late: dict[str, Any] = fine | {'blocked_seconds': 0.05}
  changes = _run(planner, range(11, 14), **late)
  (iteration, change), *others = changes.items()
  assert iteration == 13 and not others
  assert change.kind == 'window'
  assert change.fields['window_length'] == 5
  assert change.fields['first_iteration'] == 16
  assert 'late' in change.fields['reason']
  assert planner.lag_iterations == 4  # the line is at a window of 4
  assert not _run(planner, range(14, 25), **fine)
  assert planner.lag_iterations == 4
  assert not _run(planner, range(25, 26), **fine)
  assert planner.lag_iterations == 5  # 16 to 20 and 21 to 25 are there
  # What is late before a window of the new ones is over says nothing.
  changes = _run(planner, range(14, 60), **late)
  lengths = {i: c.fields['window_length'] for i, c in changes.items()}
  firsts = [c.fields['first_iteration'] for c in changes.values()]
  assert lengths == {20: 7, 29: 8}
  assert firsts == [23, 32]


def test_copies_that_are_late_now_and_then_are_forgotten():
  planner = _planner(overlap_target=0.5)
  for i in range(1, 200):
    blocked = 0.5 if i % 10 == 9 else 0.019
    change = planner.add(
      [
        helpers.make_report(
          i,
          seconds=1.0,
          blocked_seconds=blocked,
          copy_bytes_per_second=44.0,
        )
      ]
    )
    assert not change


# ---- orders ------------------------------------------------------------------


def _loads(*counts, layer=0):
  return {
    keys.OperatorId(f'layers/{layer}', e): n for e, n in enumerate(counts)
  }


def _captured_by_slot(decision):
  return [sorted(o.expert for o in slot) for slot in decision.slots]


@pytest.mark.parametrize(
  'order', [o for o in popularity.ORDERS if o != 'static']
)
def test_the_popular_are_captured_last(order):
  planner = sparse.SparsePlanner(
    _settings(window_length=2, order=order),
    [_sizes(6, 6, 6, 6), _sizes(6, 6, 6, 6, layer=1)],
    'cpu',
    expert_capacity=1000.0,
  )
  assert _captured_by_slot(planner.decisions(0)[0]) == [[0, 1], [2, 3]]
  change = planner.add(
    [
      helpers.make_report(1, 0, load=_loads(9, 1, 8, 2)),
      helpers.make_report(1, 1, load=_loads(1, 2, 3, 4, layer=1)),
    ]
  )
  assert change is not None and change.kind == 'reorder'
  assert change.fields == {'first_iteration': 4, 'order': order}
  assert _captured_by_slot(change.decisions[0]) == [[1, 3], [0, 2]]
  assert _captured_by_slot(change.decisions[1]) == [[0, 1], [2, 3]]
  assert change.decisions[0].first_iteration == 4


def test_a_new_order_holds_for_a_window_at_least():
  planner = _planner(window_length=3, order='count')
  changes = []
  for i in range(1, 40):
    counts = [100.0**i if e == i % 8 else 1 for e in range(8)]
    change = planner.add([helpers.make_report(i, load=_loads(*counts))])
    if change:
      changes.append((i, change.fields['first_iteration']))
  assert changes[:3] == [(2, 5), (7, 10), (12, 15)]


def test_the_same_counts_leave_the_order():
  planner = _planner(window_length=3, order='count')
  changes = _run(planner, range(1, 60), load=_loads(*range(8)))
  assert list(changes) == [2]


def test_the_static_order_stays():
  assert not _run(
    _planner(window_length=3), range(1, 60), load=_loads(*range(8))
  )


# ---- whatever is decided -----------------------------------------------------


@st.composite
def _stages(draw):
  stages = []
  for layer in range(draw(st.integers(1, 2))):
    sizes = draw(st.lists(st.integers(1, 40), min_size=1, max_size=7))
    stages.append(
      _sizes(
        *sizes,
        layer=layer,
        devices=draw(st.sampled_from([1, 1, 2, 4])),
        compute=draw(st.sampled_from([1 / 6, 0.5, 1.0])),
      )
    )
  return stages


@st.composite
def _any_settings(draw, stages):
  most = min(len(s.state_bytes) for s in stages)
  pinned = draw(st.integers(0, most))
  return _settings(
    window_length=pinned,
    window_mode=draw(st.sampled_from(['', *decision_lib.MODES])),
    order=draw(st.sampled_from(popularity.ORDERS)),
    max_window_length=draw(st.integers(1, 10)),
    overlap_target=draw(st.sampled_from([0.02, 0.5, 1.0])),
    keep_windows=draw(st.integers(1, 3)),
  )


def _decided(data, stages, settings, iterations):
  """Yields (iteration, decisions since, planner); draws what is measured."""
  planner = sparse.SparsePlanner(settings, stages, 'cpu', expert_capacity=50.0)
  decided = [planner.decisions(0)]
  random = data.draw(st.randoms(use_true_random=False))
  bandwidths = st.sampled_from([0.0, 10.0, 100.0, 1e4])
  bandwidth, later = data.draw(bandwidths), data.draw(bandwidths)
  lateness = data.draw(st.sampled_from([0.0, 0.2, 1.0]))
  for i in range(1, iterations):
    if i == 15:  # then a shorter window may do
      bandwidth = later
    reports = [
      helpers.make_report(
        i,
        stage,
        blocked_seconds=float(random.random() < lateness),
        copy_bytes_per_second=bandwidth,
        load={o: random.randrange(100) ** 3 for o in sizes.state_bytes},
      )
      for stage, sizes in enumerate(stages)
    ]
    if change := planner.add(reports):
      decided.append(change.decisions)
    yield i, decided, planner


@hypothesis.settings(deadline=None, max_examples=30)
@hypothesis.given(st.data())
def test_there_is_room_for_whatever_is_decided(data):
  stages = data.draw(_stages())
  settings = data.draw(_any_settings(stages))
  seen = 1
  for i, decided, planner in _decided(data, stages, settings, 45):
    for made in decided[seen - 1 :]:
      pools = planner.pools()
      for stage, decision, pool in zip(stages, made, pools, strict=True):
        largest = max(
          slots.snapshot_bytes(
            decision.slots,
            stage.state_bytes,
            stage.compute_bytes,
            decision.mode,
          )
        )
        # Whole ones have files of their own: see the next test.
        assert largest <= pool.size_bytes or decision.every > 1
    if len(decided) > seen:
      before, after = decided[-2][0], decided[-1][0]
      # Nobody has begun it, and there was a whole window before it.
      assert after.first_iteration >= i + base.NOTICE_ITERATIONS
      length = before.window_length
      assert after.first_iteration >= before.first_iteration + length
      seen = len(decided)


@hypothesis.settings(deadline=None, max_examples=30)
@hypothesis.given(st.data())
def test_the_line_moves_on_before_what_is_kept_is_full(data):
  """Or else a snapshot would wait for room that comes only after it."""
  stages = data.draw(_stages())
  settings = data.draw(_any_settings(stages))
  operators = [frozenset(s.state_bytes) for s in stages]
  files: list[dict[int, int]] = [{} for _ in stages]  # bytes by iteration
  found = None
  told = collections.deque([0, 0], maxlen=2)  # the line is told of later
  for i, decided, planner in _decided(data, stages, settings, 45):
    found = found or inventory.Inventory(
      settings.policy, operators, planner.lag_iterations
    )
    assert i - told[0] < settings.kept_snapshots
    assert i - told[0] < settings.kept_iterations
    for stage in range(len(stages)):
      decision = decision_lib.active([made[stage] for made in decided], i)
      captured = decision.captured(i) or coverage.Contents()
      found.stored(stage, coverage.Share(iteration=i, **captured._asdict()))
      pool, whole_bytes = planner.pools()[stage], 0
      if decision.every > 1:
        whole_bytes = sum(stages[stage].state_bytes.values())
      if captured.state:
        files[stage][i] = max(pool.size_bytes, whole_bytes)
      kept = [n for j, n in files[stage].items() if j >= told[0]]
      assert sum(kept) <= pool.files * pool.size_bytes
    found.lag_iterations = planner.lag_iterations
    found.advance(i - 1, frozen=False)  # reports are late as well
    told.append(found.line)


def test_an_aligned_window_that_fills_what_is_kept():
  """As the search above, with the longest windows that there are."""
  settings = _settings(window_length=8, window_mode='aligned')
  sizes = _sizes(*[6] * 8)
  planner = sparse.SparsePlanner(settings, [sizes], 'cpu')
  (decision,) = planner.decisions(0)
  found = inventory.Inventory(
    settings.policy, [sizes.state_bytes], planner.lag_iterations
  )
  kept = 0
  for i in range(1, 100):
    captured = decision.captured(i) or coverage.Contents()
    found.stored(0, coverage.Share(iteration=i, **captured._asdict()))
    found.advance(i, frozen=False)
    kept = max(kept, i - found.line + 1)
  # From the start that is kept to the end of the window two later.
  assert kept == 8 + 8 + 7
  assert kept < settings.kept_snapshots


def test_a_window_choice_in_an_event_is_plain_json():
  change = next(
    iter(
      _run(
        _planner(overlap_target=0.5),
        range(1, 9),
        seconds=2.0,
        copy_bytes_per_second=28.0,
      ).values()
    )
  )
  names = {f for f in window.WindowChoice.__dataclass_fields__ if f != 'pinned'}
  assert change.fields.keys() == names | {'first_iteration'}
  assert all(isinstance(v, int | str) for v in change.fields.values())
