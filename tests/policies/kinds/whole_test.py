"""What the leader decides under the baseline policies, by hand."""

import pytest

from launch.lm import dry_run
from moetion_jax.policies import settings as capture_settings
from moetion_jax.policies.kinds import registry, whole
from tests.support import planning

# ---- dense -------------------------------------------------------------------


def test_dense_chooses_its_interval_from_what_it_measured():
  run = planning.Run(planning.make_planner('dense'))
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
  run = planning.Run(planning.make_planner('dense'))
  run.report(40, copy_bytes_per_second=100.0)
  run.report(80, copy_bytes_per_second=200.0)  # it was 9 from 18 on
  assert [(i, c['interval']) for i, c in run.changes.items()] == [
    (12, 9),
    (54, 5),
  ]
  late = {'blocked_seconds': lambda is_taken: 0.1 * is_taken}
  run.report(30, copy_bytes_per_second=200.0, **late)
  run.report(200, copy_bytes_per_second=900.0)  # five was too short already
  assert isinstance(run.planner, whole.DensePlanner)
  assert len(run.changes) == 3 and run.planner.interval == 7


def test_dense_takes_more_time_when_copies_are_late():
  run = planning.Run(planning.make_planner('dense'))
  run.report(20, copy_bytes_per_second=100.0)
  late = {'blocked_seconds': lambda is_taken: 0.1 * is_taken}
  run.report(10, copy_bytes_per_second=100.0, **late)  # 27: late
  assert len(run.changes) == 1
  run.report(20, copy_bytes_per_second=100.0, **late)  # 36, 45
  (_, second) = run.changes.values()
  assert (second['interval'], second['reason']) == (12, 'copies ran late')


def test_dense_sees_late_copies_when_it_looks_again_too():
  run = planning.Run(planning.make_planner('dense'))
  run.report(30, copy_bytes_per_second=100.0)
  late = {'blocked_seconds': lambda is_taken: 0.1 * is_taken}
  run.report(24, copy_bytes_per_second=100.0, **late)  # 36, 45 and 54 = 18 + 36
  assert list(run.changes) == [12, 54]
  assert run.changes[54]['reason'] == 'copies ran late'


def test_an_interval_that_is_pinned_stays():
  for policy in ('dense', 'two_phase', 'partial'):
    run = planning.Run(planning.make_planner(policy, interval=5))
    slow = {'seconds': lambda is_taken: 1.0 + is_taken}
    run.report(60, copy_bytes_per_second=1.0, **slow)
    assert not run.changes
    assert list(run.taken(1, 30)) == [5, 10, 15, 20, 25, 30]


@pytest.mark.parametrize(
  ('policy', 'replicas', 'files', 'size_bytes'),
  [
    ('dense', 1, 5, planning.STATE_BYTES),
    ('dense', 2, 5, 250),  # of five operators two and the rest
    ('two_phase', 1, 2, planning.STATE_BYTES),
    # A round of experts, two windows, three on their way.
    ('partial', 1, 9, planning.OTHER_BYTES + planning.EXPERT_BYTES),
    ('partial', 2, 9, planning.OTHER_BYTES + planning.EXPERT_BYTES),
  ],
)
def test_room(policy, replicas, files, size_bytes):
  (pool,) = planning.make_planner(policy, replicas).pools()
  assert (pool.files, pool.size_bytes) == (files, size_bytes)


def test_a_dry_run_says_what_each_policy_takes():
  settings = capture_settings.CaptureSettings(
    policy=registry.POLICIES['dense'], interval=3
  )
  lines = dry_run.by_policy(settings, [planning.sizes()])
  assert [line.split(':')[0] for line in lines] == [
    '--policy=sparse --replay=microbatches',
    '--policy=sparse --replay=updates',
    *(f'--policy={name}' for name in ('dense', 'two_phase', 'partial')),
  ]
  assert '450 bytes' in lines[2] and '2.2 KiB' in lines[2]
  assert 'on disk 1.3 KiB' in lines[3]


# ---- two_phase ---------------------------------------------------------------


def test_two_phase_keeps_to_its_budget():
  run = planning.Run(planning.make_planner('two_phase', overhead_budget=0.05))
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
  run = planning.Run(planning.make_planner('two_phase'))
  run.report(24, copy_bytes_per_second=20.0)  # 22.5 s
  assert run.changes[24]['interval'] == 23 + 2
