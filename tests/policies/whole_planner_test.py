"""What the leader decides under the baseline policies, by hand."""

import pytest

from launch.lm import dry_run
from moetion_jax import keys
from moetion_jax.policies import (
  decision as decision_lib,
  partial_planner,
  planner as planner_lib,
  settings as capture_settings,
  whole_planner,
)
from moetion_jax.recovery import partial_inventory
from moetion_jax.snapshots import coverage
from tests.support import helpers

pytestmark = pytest.mark.fast

_EXPERTS = 4
_EXPERT_BYTES, _OTHER_BYTES = 100, 50
_STATE_BYTES = _EXPERTS * _EXPERT_BYTES + _OTHER_BYTES


def _expert(index, stage=0):
  return keys.OperatorId(f'layers/{stage}/experts', index)


def _other(stage=0):
  return keys.OperatorId(f'layers/{stage}')


def _sizes(stage=0):
  state_bytes = {_expert(i, stage): _EXPERT_BYTES for i in range(_EXPERTS)}
  state_bytes[_other(stage)] = _OTHER_BYTES
  return planner_lib.StageSizes(
    state_bytes=state_bytes,
    compute_bytes=dict.fromkeys(state_bytes, 10),
    device=dict.fromkeys(state_bytes),
  )


def _planner(policy, replicas=1, stages=1, **fields) -> planner_lib.Planner:
  planner = whole_planner.make(
    capture_settings.CaptureSettings(policy=policy, **fields),
    [_sizes(stage) for stage in range(stages)],
    'tpu',  # where half of an iteration may copy
    replicas=replicas,
  )
  planner.decisions(0)
  return planner


class _Run:
  """Reports iterations, with the snapshots that were decided."""

  def __init__(self, planner, load=None):
    self.planner = planner
    self.decisions = [*planner.decisions(0)]
    self.changes = {}
    self.load = load or {}
    self.iteration = 0

  def report(self, count, **fields):
    for _ in range(count):
      self.iteration += 1
      held = decision_lib.active(self.decisions, self.iteration)
      is_taken = held.slot_index(self.iteration) is not None
      now: dict = {
        k: v(is_taken) if callable(v) else v for k, v in fields.items()
      }
      change = self.planner.add(
        [
          helpers.make_report(
            self.iteration, load=self.load, snapshot_bytes=int(is_taken), **now
          )
        ]
      )
      if change:
        self.decisions.append(change.decisions[0])
        if change.kind:
          self.changes[self.iteration] = dict(change.fields)

  def taken(self, first, last):
    """Iterations with a snapshot, and the experts in it."""
    found = {}
    for iteration in range(first, last + 1):
      captured = decision_lib.active(self.decisions, iteration).captured(
        iteration
      )
      if captured:
        found[iteration] = sorted(o.expert for o in captured[0])[1:]
    return found


# ---- dense -------------------------------------------------------------------


def test_dense_chooses_its_interval_from_what_it_measured():
  run = _Run(_planner('dense'))
  # 450 bytes in 4.5 s; half of an iteration of 1 s may copy.
  run.report(11, copy_bytes_per_second=100.0)
  assert not run.changes
  run.report(1, copy_bytes_per_second=100.0)
  change = run.changes[12]
  assert (change['interval'], change['first_iteration']) == (9, 18)
  assert change['reason'] == (
    'a copy takes 4.5 s and may take 0.5 of iterations of 1 s'
  )
  assert list(run.taken(1, 40)) == [6, 12, 18, 27, 36]
  assert run.taken(18, 18) == {18: [0, 1, 2, 3]}
  assert run.planner.lag_iterations == 9
  run.report(40, copy_bytes_per_second=50.0)
  assert len(run.changes) == 1


def test_dense_looks_again_whether_a_shorter_interval_would_do():
  run = _Run(_planner('dense'))
  run.report(40, copy_bytes_per_second=100.0)
  run.report(80, copy_bytes_per_second=200.0)  # it was 9 from 18 on
  assert [(i, c['interval']) for i, c in run.changes.items()] == [
    (12, 9),
    (54, 5),
  ]
  late = {'blocked_seconds': lambda is_taken: 0.1 * is_taken}
  run.report(30, copy_bytes_per_second=200.0, **late)
  run.report(200, copy_bytes_per_second=900.0)  # five was too short already
  assert len(run.changes) == 3 and run.planner.interval == 7


def test_dense_takes_more_time_when_copies_are_late():
  run = _Run(_planner('dense'))
  run.report(20, copy_bytes_per_second=100.0)
  late = {'blocked_seconds': lambda is_taken: 0.1 * is_taken}
  run.report(10, copy_bytes_per_second=100.0, **late)  # 27: late
  assert len(run.changes) == 1
  run.report(20, copy_bytes_per_second=100.0, **late)  # 36, 45
  (_, second) = run.changes.values()
  assert (second['interval'], second['reason']) == (12, 'copies ran late')


def test_dense_sees_late_copies_when_it_looks_again_too():
  run = _Run(_planner('dense'))
  run.report(30, copy_bytes_per_second=100.0)
  late = {'blocked_seconds': lambda is_taken: 0.1 * is_taken}
  run.report(24, copy_bytes_per_second=100.0, **late)  # 36, 45 and 54 = 18 + 36
  assert list(run.changes) == [12, 54]
  assert run.changes[54]['reason'] == 'copies ran late'


def test_an_interval_that_is_pinned_stays():
  for policy in ('dense', 'two_phase', 'partial'):
    run = _Run(_planner(policy, interval=5))
    slow = {'seconds': lambda is_taken: 1.0 + is_taken}
    run.report(60, copy_bytes_per_second=1.0, **slow)
    assert not run.changes
    assert list(run.taken(1, 30)) == [5, 10, 15, 20, 25, 30]


@pytest.mark.parametrize(
  ('policy', 'replicas', 'files', 'size_bytes'),
  [
    ('dense', 1, 5, _STATE_BYTES),
    ('dense', 2, 5, 250),  # of five operators two and the rest
    ('two_phase', 1, 2, _STATE_BYTES),
    # A round of experts, two windows, three on their way.
    ('partial', 1, 9, _OTHER_BYTES + _EXPERT_BYTES),
    ('partial', 2, 9, _OTHER_BYTES + _EXPERT_BYTES),
  ],
)
def test_room(policy, replicas, files, size_bytes):
  (pool,) = _planner(policy, replicas).pools()
  assert (pool.files, pool.size_bytes) == (files, size_bytes)


def test_a_dry_run_says_what_each_policy_takes():
  settings = capture_settings.CaptureSettings(policy='dense', interval=3)
  lines = dry_run.by_policy(settings, [_sizes()])
  assert [line.split(':')[0] for line in lines] == [
    f'--policy={name}' for name in ('sparse', 'dense', 'two_phase', 'partial')
  ]
  assert '450 bytes' in lines[1] and '2.2 KiB' in lines[1]
  assert 'on disk 1.3 KiB' in lines[2]


# ---- two_phase ---------------------------------------------------------------


def test_two_phase_keeps_to_its_budget():
  run = _Run(_planner('two_phase', overhead_budget=0.05))
  # A checkpoint costs half a second: 5 % of 10 iterations of a second.
  fields = {
    'copy_bytes_per_second': 450.0,
    'seconds': lambda is_taken: 1.5 if is_taken else 1.0,
  }
  run.report(24, **fields)
  change = run.changes[24]  # with the third that is measured
  assert change['interval'] == 10
  assert 'costs 0.5 s and is on disk after 1 s' in change['reason']
  assert list(run.taken(1, 50)) == [6, 12, 18, 24, 30, 40, 50]
  # Cheaper, but not by half: it stays.
  fields['seconds'] = lambda is_taken: 1.3 if is_taken else 1.0
  run.report(60, **fields)
  assert len(run.changes) == 1
  fields['seconds'] = lambda is_taken: 1.0
  run.report(60, **fields)
  assert [c['interval'] for c in run.changes.values()] == [10, 3]


def test_two_phase_waits_for_the_disk():
  run = _Run(_planner('two_phase'))
  run.report(24, copy_bytes_per_second=20.0)  # 22.5 s
  assert run.changes[24]['interval'] == 23 + 2


# ---- partial -----------------------------------------------------------------


def test_partial_saves_experts_in_turn():
  run = _Run(_planner('partial', interval=4))
  run.report(30)
  assert run.taken(1, 30) == {
      4: [0], 8: [1], 12: [2], 16: [3], 20: [0], 24: [1], 28: [2],
    }  # fmt: skip
  decision = decision_lib.active(run.decisions, 8)
  assert decision.captured(8) == (
    frozenset({_other(), _expert(1)}),
    frozenset(),
  )
  assert decision_lib.CaptureDecision.from_json(decision.to_json()) == decision


def test_partial_saves_those_that_were_trained_most():
  load = {_expert(0): 1, _expert(1): 7, _expert(2): 3, _expert(3): 2}
  run = _Run(_planner('partial', interval=4, partial_select='load_aware'), load)
  run.report(60)
  # After 1, 5, ... reported iterations; in 12 expert 1 has 7 tokens, 2 has 27.
  assert list(run.taken(1, 12).values()) == [[1], [2], [1]]
  # In a round or two everybody is saved.
  assert {x[0] for x in run.taken(1, 60).values()} == {0, 1, 2, 3}


def test_an_unpopular_expert_is_saved_in_the_end():
  load = {_expert(3): 9, _expert(1): 5}
  run = _Run(_planner('partial', interval=4, partial_select='popularity'), load)
  run.report(120)
  saved = [x[0] for x in run.taken(1, 120).values()]
  assert saved[:7] == [3] * 7
  assert saved[7:10] == [1, 0, 2]  # not for 8 checkpoints
  assert saved.count(3) > 15


def test_what_a_restore_of_partial_loses():
  load = {_expert(i): 2 for i in range(_EXPERTS)}
  planner = _planner('partial', interval=4, plt_budget=0.2)
  assert isinstance(planner, partial_planner.PartialPlanner)
  run = _Run(planner, load)
  run.report(14)
  versions = {_expert(0): 4, _expert(1): 8, _expert(2): 12, _expert(3): 0}
  loss = planner.restart_from(12, versions)
  # Of 12 iterations with 8 tokens each: 8 + 4 + 0 + 12 iterations of 2 tokens.
  assert loss == partial_planner.Loss(lost_tokens=48.0, plt=0.5, experts=2)
  (decision,) = planner.decisions(12)
  assert (decision.first_iteration, decision.every) == (12, 4)
  assert planner.pools()[0].size_bytes == _OTHER_BYTES + 2 * _EXPERT_BYTES
  # The same again: all that there is to lose is lost in two restores.
  second = planner.restart_from(12, versions)
  assert (second.plt, second.experts) == (1.0, 4)


def test_popular_experts_that_lost_tokens_take_more_of_them():
  load = {_expert(i): 2 for i in range(_EXPERTS)}
  planner = _planner('partial', interval=4, partial_select='popularity')
  assert isinstance(planner, partial_planner.PartialPlanner)
  run = _Run(planner, load)
  run.report(14)
  versions = {_expert(0): 4, _expert(1): 8, _expert(2): 12, _expert(3): 10}
  loss = planner.restart_from(12, versions)
  # For 8 iterations, as long as expert 0 was not saved: what 8, 4, 0 and 2
  # iterations brought, on top of what 8 bring.
  assert loss.capacity_until == 20
  assert planner.capacity(0) == (
    ('layers/0/experts', 0, 2.0),
    ('layers/0/experts', 1, 1.5),
    ('layers/0/experts', 2, 1.0),
    ('layers/0/experts', 3, 1.25),
  )
  nothing = planner.restart_from(12, dict.fromkeys(versions, 12))
  assert nothing.capacity_until == 0 and planner.capacity(0) == ()


def _stored(found, iteration, experts):
  state = frozenset({_other(), *(_expert(i) for i in experts)})
  found.stored(
    0,
    coverage.Share(iteration=iteration, state=state, compute=frozenset()),
  )


def test_the_inventory_keeps_what_the_line_needs():
  found = partial_inventory.PartialInventory([_sizes().state_bytes], 4)

  def starts():
    return [s.iteration for s in found.starts(0)]

  assert starts() == [0]
  for number, iteration in enumerate(range(4, 24, 4)):
    _stored(found, iteration, [number % _EXPERTS])
  assert starts() == [0, 4, 8, 12, 16, 20]
  assert found.versions(12) == {
      _expert(0): 4, _expert(1): 8, _expert(2): 12, _expert(3): 0,
    }  # fmt: skip
  # Nothing may go while an expert is the initial one.
  assert found.advance(9, frozen=False) and found.line == 0
  assert starts() == [0, 4, 8, 12, 16, 20]
  assert not found.advance(9, frozen=False)
  # At 16 expert 0 is of iteration 4: that is kept, though no start any more.
  assert found.advance(20, frozen=False) and found.line == 4
  assert starts() == [0, 16, 20]
  assert found.versions(16)[_expert(0)] == 4
  _stored(found, 24, [1])
  assert found.advance(24, frozen=False) and found.line == 8
  assert not found.advance(24, frozen=True)
  _stored(found, 28, [2])
  found.lose(0, 28)
  assert starts() == [0, 20, 24]


def test_an_inventory_that_begins_somewhere():
  found = partial_inventory.PartialInventory([_sizes().state_bytes], 4)
  for number, iteration in enumerate(range(4, 28, 4)):
    _stored(found, iteration, [number % _EXPERTS])
  found.begin_at(20)
  assert found.line == 8
  assert [s.iteration for s in found.starts(0)] == [0, 20, 24]
