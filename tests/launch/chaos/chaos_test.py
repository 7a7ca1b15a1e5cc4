"""Random faults: what is drawn, what is counted; and 200 of them (soak)."""

import os
import random

import pytest

from launch.chaos import draw, outside
from moetion_jax import errors
from moetion_jax.policies.kinds import registry
from moetion_jax.runtime import faults as faults_lib
from tests.support import helpers


@pytest.mark.parametrize('replicas', [1, 2])
def test_a_drawn_script_is_a_script(replicas):
  size = {'stages': 3, 'iterations': 20, 'replicas': replicas}
  for seed in range(200):
    source = random.Random(seed)
    script = draw.draw_script(source, 12, **size)
    assert len(script) == 12
    assert faults_lib.parse_faults(script, stages=3, replicas=replicas)
    assert draw.draw_script(random.Random(seed), 12, **size) == script
    final = [x for x in script if x.startswith('corrupt_final')]
    assert len(final) == len(set(final))  # a second time ends the run


@pytest.mark.parametrize('replicas', [1, 2])
def test_everything_is_drawn(replicas):
  source = random.Random(0)
  script = faults_lib.parse_faults(
    draw.draw_script(source, 3000, 3, iterations=20, replicas=replicas),
    stages=3,
    replicas=replicas,
  )
  everybody = {(s, r) for s in range(3) for r in range(replicas)}
  assert {(fault.stage, fault.replica) for fault in script} == everybody
  drawn = {(fault.kind, fault.phase) for fault in script}
  assert {phase for kind, phase in drawn if kind == 'kill'} == set(
    faults_lib.Phase
  )
  assert {kind for kind, _ in drawn} == set(faults_lib.FaultKind)
  drawn_outside = draw.draw_outside(
    source, 300, stages=3, mean_seconds=2.0, replicas=replicas
  )
  assert {fault.kind for fault in drawn_outside} == set(outside.Kind)
  assert {(f.stage, f.replica) for f in drawn_outside} == everybody
  mean_seconds = sum(f.after_seconds for f in drawn_outside) / 300
  assert 1.5 < mean_seconds < 2.5
  for fault in drawn_outside:
    least, most = outside.TABLE[fault.kind].for_seconds
    assert least <= fault.for_seconds <= most


def _fault(kind, stage, phase='forward'):
  return {'kind': 'fault', 'fault': kind, 'stage': stage, 'phase': phase}


def _recovered(stage, seconds):
  return {'kind': 'recovered', 'stage': stage, 'seconds': {'replay': seconds}}


def test_tally():
  tally = draw.Tally()
  tally.add(
    [
      _fault('kill', 1),
      _fault('kill', 0),
      _recovered(1, 2.0),
      {'kind': 'outside', 'fault': 'kill the agent', 'stage': None},
      {'kind': 'resumed', 'stage': None},
      _fault('stop', 2, 'update'),
      _recovered(0, 4.0),
    ]
  )
  assert tally.count == 4
  assert tally.recovered == {
    ('kill', 'forward'): 2,
    ('kill the agent', 'outside'): 1,
  }
  table = tally.table()
  assert 'stop            update          1          0' in table
  assert 'all                             4          3' in table
  assert 'recoveries of one stage: 2, median 3.00 s, longest 4.00 s' in table
  assert 'gone on with: 1' in table


def test_differences():
  line = {'iteration': 3, 'loss_hex': '0x1p+0', 'digest': 'ab', 'seconds': 1.0}
  assert not draw.differences([line], [{**line, 'seconds': 2.0}])
  assert draw.differences([line], [{**line, 'digest': 'ac'}]) == [
    'iteration 3: digest is ab, not ac'
  ]
  assert draw.differences([], [line]) == ['0 iterations, not 1']


@pytest.mark.parametrize(
  ('lines', 'expected', 'happened', 'equal', 'problem'),
  [
    (3, 3, 1, 1, ''),
    (2, 3, 1, 0, 'run: 2 iterations, not 3'),
    (0, 0, 1, 0, 'undisturbed: 0 iterations, not 3: there is nothing'),
    (3, 3, 0, 1, 'no fault happened'),
  ],
)
def test_a_verdict_is_over_something(lines, expected, happened, equal, problem):
  tally = draw.Tally()
  tally.add([_fault('kill', 1)] * happened)
  known = [{'iteration': i, 'loss_hex': 'a', 'digest': 'b'} for i in range(3)]
  assert tally.compare({'run': known[:lines]}, known[:expected], 3) == equal
  assert problem in '; '.join(tally.problems)
  assert bool(tally.problems) == bool(problem)


@pytest.mark.parametrize('policy', registry.POLICIES)
@pytest.mark.parametrize('form', ['--policy={}', '-policy\n{}'])
def test_each_policy_gets_its_own_flags(policy, form):
  more = ['--remat', *form.format(policy).split('\n')]
  if not (registry.POLICIES[policy].is_exact and policy != 'none'):
    with pytest.raises(errors.ConfigError, match='nothing to compare'):
      draw.policy_of(more)
    return
  found = draw.micro_flags(draw.policy_of(more))[-1]
  assert found == (
    '--window_length=3' if policy == 'sparse' else '--interval=3'
  )


def test_it_says_how_long():
  result = helpers.launch('chaos')
  assert result.returncode == 2 and '--minutes' in result.stderr


@pytest.mark.thorough
@pytest.mark.timeout(600)
def test_a_few(tmp_path):
  (tmp_path / 'chaos').mkdir()
  (tmp_path / 'chaos' / 'notes').write_text('mine')
  result = helpers.launch(
    'chaos',
    '--seed=3',
    '--faults=3',
    '--scripted=3',
    '--outside=1',
    '--iterations=16',
    f'--workdir={tmp_path}/chaos',
    '--',
    f'--compilation_cache_dir={helpers.CACHE}',
    f'--data={helpers.DATA}',
    timeout_seconds=500,
  )
  assert result.returncode == 0, result.stdout + result.stderr
  assert 'equal to the undisturbed one in every bit' in result.stdout
  assert os.listdir(tmp_path / 'chaos') == ['notes']


@pytest.mark.soak
@pytest.mark.timeout(4 * 3600)
@pytest.mark.parametrize(
  ('seed', 'faults', 'replicas', 'flags'),
  [(1, 200, 1, []), (2, 100, 2, []), (3, 100, 2, ['--shard_optimizer'])],
)
def test_many_random_faults(tmp_path, seed, faults, replicas, flags):
  result = helpers.launch(
    'chaos',
    f'--seed={seed}',
    f'--faults={faults}',
    f'--replicas={replicas}',
    f'--workdir={tmp_path}/chaos',
    '--',
    f'--compilation_cache_dir={helpers.CACHE}',
    f'--data={helpers.DATA}',
    *flags,
    timeout_seconds=4 * 3600,
  )
  print(result.stdout)
  assert result.returncode == 0, result.stdout + result.stderr
