"""The agent trains whatever job it is given: one in plain JAX, ours not."""

import subprocess
import sys

import pytest

from tests.support import helpers, runs

pytestmark = [pytest.mark.thorough, pytest.mark.timeout(600)]


def _train(host, workdir, replicas, *faults, program='markov_train'):
  run = host.start(
    *('-m', f'tests.support.{program}', workdir, host.path),
    *(str(replicas), *faults),
  )
  runs.end(run, seconds=300)
  assert host.is_clean()
  assert runs.events(workdir)[-1]['kind'] == 'finished'
  return runs.metrics(workdir)


# Alone: with another store of snapshots too, in agent and workers.
@pytest.mark.parametrize(
  ('replicas', 'program'), [(1, 'plain_train'), (2, 'markov_train')]
)
def test_another_job_recovers_to_the_same_bits(
  host, tmp_path, replicas, program
):
  expected = _train(host, tmp_path / 'whole', replicas)
  assert expected[-1]['loss'] < expected[0]['loss'] / 2
  lines = _train(
    *(host, tmp_path / 'killed', replicas),
    'kill:stage=1,iteration=20,phase=forward',
    'kill:stage=0,iteration=30,phase=update',
    program=program,
  )
  assert runs.bits(lines) == runs.bits(expected)
  recovered = runs.of_kind(tmp_path / 'killed', 'recovered')
  assert [event['stage'] for event in recovered] == [1, 0]
  for event in recovered:
    assert event['source'] == 'own'
    # Where only the interrupted iteration was done again, nothing is compared.
    assert event['digest_verified'] == (event['compared_iterations'] > 0)
    assert event['first_iteration'] > 10  # from snapshots
  again = _train(host, tmp_path / 'killed', replicas, program=program)  # done
  assert runs.bits(again) == runs.bits(expected)


def test_it_needs_nothing_of_launch():
  code = (
    'import sys, tests.support.markov_train\n'
    'assert "jax" not in sys.modules\n'
    'import tests.support.markov_job\n'
    'assert not {"launch", "models", "flax"} & set(sys.modules)\n'
  )
  subprocess.run([sys.executable, '-c', code], cwd=helpers.ROOT, check=True)
