"""Stages whose workers cannot be replaced: others stand in for them."""

import pytest

from launch.lm import checkpoint, transformer_job
from moetion_jax import report
from moetion_jax.runtime.checkpoints import file as checkpoint_file, restore
from tests.support import helpers, runs, worlds

pytestmark = [pytest.mark.thorough, pytest.mark.timeout(600)]


@pytest.fixture(scope='module')
def undisturbed(tmp_path_factory):
  """What every run must come to: its metrics."""
  return worlds.undisturbed_metrics(tmp_path_factory)


def test_a_replica_that_cannot_be_replaced(host, workdir, undisturbed):
  """The other one does its microbatches, until it comes back."""
  faults = [
    f'kill:stage=1,replica=0,iteration=4,phase={phase}'
    for phase in ('forward', 'backward')
  ]
  flags = ['--on_failure=shrink', '--max_failures=1', '--grow_after=3']
  runs.end(
    worlds.train(host, workdir, *faults, flags=flags), seconds=worlds.SECONDS
  )
  runs.check_finished(host, workdir, runs.bits(undisturbed))
  (shrunk,) = runs.of_kind(workdir, 'shrunk')
  assert (shrunk['stage'], shrunk['replica'], shrunk['team']) == (1, 0, [1])
  (grown,) = runs.of_kind(workdir, 'grown')
  assert (grown['stage'], grown['team']) == (1, [0, 1])
  assert worlds.generations(workdir) == {
    (0, 0): 1,
    (0, 1): 1,
    (1, 0): 4,
    (1, 1): 4,
  }


def test_three_become_two_and_one_and_three_again(host, tmp_path):
  """Sums are in the order of the replicas, whoever has their terms.

  One stage: with two it takes twice the time.
  """
  workdir = tmp_path / 'undisturbed'
  runs.end(
    worlds.train(host, workdir, replicas=3, flags=['--stages=1']),
    seconds=worlds.SECONDS,
  )
  undisturbed = runs.bits(runs.metrics(workdir))
  assert len(undisturbed) == worlds.ITERATIONS
  faults = [
    'kill:stage=0,replica=1,iteration=3,phase=forward',
    'kill:stage=0,replica=0,iteration=5,phase=backward',
  ]
  flags = ['--shard_optimizer', '--on_failure=shrink', '--max_failures=0']
  flags += ['--grow_after=3', '--stages=1']
  workdir = tmp_path / 'shrinks'
  run = worlds.train(host, workdir, *faults, replicas=3, flags=flags)
  runs.end(run, seconds=worlds.SECONDS)
  runs.check_finished(host, workdir, undisturbed)
  teams = [e['team'] for e in runs.of_kind(workdir, 'shrunk')]
  assert teams == [[0, 2], [2]]
  assert runs.of_kind(workdir, 'grown')[-1]['team'] == [0, 1, 2]


def test_no_more_processes_than_there_may_be(host, tmp_path, undisturbed):
  """With nobody to stand in the run ends; the same command goes on."""
  fault = 'kill:stage=0,replica=1,iteration=5,phase=update'
  limit = f'--max_workers={worlds.STAGES * worlds.REPLICAS}'
  workdir = tmp_path / 'ends'
  _, err = runs.end(
    worlds.train(host, workdir, fault, flags=[limit]), 1, worlds.SECONDS
  )
  assert limit in err and 'The same command goes on' in err
  runs.end(
    worlds.train(host, workdir, fault, flags=[limit]), seconds=worlds.SECONDS
  )
  runs.check_finished(host, workdir, runs.bits(undisturbed))
  workdir = tmp_path / 'shrinks'
  flags = [
    f'--max_workers={worlds.STAGES * worlds.REPLICAS + 1}',
    '--on_failure=shrink',
  ]
  runs.end(
    worlds.train(host, workdir, fault, flags=flags), seconds=worlds.SECONDS
  )
  runs.check_finished(host, workdir, runs.bits(undisturbed))
  assert worlds.generations(workdir) == {(0, 0): 2, (1, 0): 1, (1, 1): 1}


def test_they_shrink_and_grow_and_leave_one_checkpoint(
  host, workdir, undisturbed
):
  """One alone has everything; the checkpoint is made of everybody's parts."""
  faults = [
    f'kill:stage=1,replica=0,iteration=4,phase={phase}'
    for phase in ('forward', 'backward')
  ]
  flags = ['--shard_optimizer', '--on_failure=shrink', '--max_failures=1']
  flags.append('--grow_after=3')
  runs.end(
    worlds.train(host, workdir, *faults, flags=flags), seconds=worlds.SECONDS
  )
  runs.check_finished(host, workdir, runs.bits(undisturbed))
  assert runs.kinds(workdir).count('shrunk') == 1
  assert runs.kinds(workdir).count('grown') == 1
  path = str(workdir / 'checkpoint')
  tree = checkpoint_file.load(path, 'init_from')
  config = checkpoint.load_config(path, 'init_from')
  digests = {}
  for index in range(worlds.STAGES):
    stage = transformer_job.of(config).build_stage(index, team=(0,))
    state = restore.initial(stage, tree, path, 'init_from')()
    digests |= helpers.digests_of(stage, state)
  assert report.combine(digests) == undisturbed[-1]['digest']
