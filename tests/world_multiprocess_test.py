"""Stages of several replicas: stage worlds that die and come back.

As `recovery_multiprocess_test`, with two workers a stage that sum their
gradients and share their snapshots.
"""

import signal

import numpy as np
import pytest

from launch import checkpoint, local
from moetion_jax import digest
from tests import helpers, runs

STAGES, REPLICAS = 2, 2
ITERATIONS = 10
WINDOW = 3
SECONDS = 240.0

pytestmark = [pytest.mark.fast, pytest.mark.timeout(600)]


def _train(host, workdir, *faults, replicas=REPLICAS, flags=()):
  return host.train(
    workdir,
    f'--stages={STAGES}',
    f'--replicas={replicas}',
    f'--iterations={ITERATIONS}',
    f'--window_length={WINDOW}',
    f'--microbatches={6 // replicas}',
    '--dropout_rate=0.1',
    *(f'--fail={fault}' for fault in faults),
    *flags,
  )


@pytest.fixture(scope='module')
def undisturbed(tmp_path_factory):
  """What every run must come to: its metrics."""
  return runs.undisturbed_metrics(tmp_path_factory, _train, ITERATIONS, SECONDS)


def _generations(workdir):
  return {
    (w['stage'], w['replica']): w['generation'] for w in runs.workers(workdir)
  }


def test_replicas_learn_what_one_does_of_as_many_microbatches(host, tmp_path):
  """Their sums are in another order; everything else is the same.

  In fp32: in bf16 a last bit of a sum becomes the last of 8 bits of a weight
  (measured: 6e-5 after six iterations), and has tokens choose other experts.
  """
  lines = []
  for replicas in (1, REPLICAS):
    workdir = tmp_path / f'{replicas} replica(s)'
    flags = ['--model=compute_dtype=float32']
    run = _train(host, workdir, replicas=replicas, flags=flags)
    runs.end(run, seconds=SECONDS)
    lines.append(runs.metrics(workdir))
  for name in ('loss', 'eval_loss', 'grad_norm'):
    one, several = ([x[name] for x in run if name in x] for run in lines)
    assert len(one) == len(several) > 0
    np.testing.assert_allclose(one, several, rtol=1e-5)
  assert len(lines[0]) == ITERATIONS
  one, several = ([x['tokens'] for x in run] for run in lines)
  assert one == several


def test_one_replica_dies_in_every_phase(host, workdir, undisturbed):
  faults = [
    'kill:stage=1,replica=1,iteration=3,phase=backward',
    'kill:stage=0,replica=0,iteration=5,phase=forward',
    'kill:stage=1,replica=0,iteration=7,phase=update',
    'kill:stage=0,replica=1,iteration=9,phase=capture',
  ]
  runs.end(_train(host, workdir, *faults), seconds=SECONDS)
  runs.check_finished(host, workdir, runs.bits(undisturbed))
  failed = [
    (e['stage'], e['replica']) for e in runs.of_kind(workdir, 'failure')
  ]
  assert failed == [(1, 1), (0, 0), (1, 0), (0, 1)]
  assert [e['stage'] for e in runs.of_kind(workdir, 'recovered')] == [
    1,
    0,
    1,
    0,
  ]
  assert set(_generations(workdir).values()) == {3}


def test_the_other_stage_is_not_disturbed(host, workdir, undisturbed):
  """The world of the dead one is started anew, the other stays."""
  run = _train(host, workdir, 'stop:stage=1,replica=1,iteration=6,phase=update')
  runs.until(run, 'iteration 1/')
  before = {(w['stage'], w['replica']): w['pid'] for w in runs.workers(workdir)}
  runs.end(run, seconds=SECONDS)
  runs.check_finished(host, workdir, runs.bits(undisturbed))
  after = {(w['stage'], w['replica']): w['pid'] for w in runs.workers(workdir)}
  for replica in range(REPLICAS):
    assert after[0, replica] == before[0, replica]
    assert after[1, replica] != before[1, replica]
  assert _generations(workdir) == {(0, 0): 1, (0, 1): 1, (1, 0): 2, (1, 1): 2}


def test_several_replicas_and_stages_and_again_while_they_recover(
  host, workdir, undisturbed
):
  faults = [
    'kill:stage=0,replica=0,iteration=4,phase=backward',
    'kill:stage=1,replica=1,iteration=4,phase=backward',
    'kill:stage=1,replica=0,phase=replay',
    'kill:stage=0,replica=1,iteration=1,phase=compile',
    'kill:stage=0,replica=0,iteration=8,phase=update',
    'kill:stage=0,replica=1,iteration=8,phase=update',
  ]
  flags = ['--max_failures=6', '--standby']
  runs.end(_train(host, workdir, *faults, flags=flags), seconds=SECONDS)
  runs.check_finished(host, workdir, runs.bits(undisturbed))


def test_everything_dies_and_goes_on(host, workdir, undisturbed):
  fault = 'kill_all:stage=0,iteration=6,phase=forward'
  runs.end(_train(host, workdir, fault), -signal.SIGKILL, seconds=SECONDS)
  runs.wait_for(lambda: not host.processes(), seconds=20)
  runs.end(_train(host, workdir, fault), seconds=SECONDS)
  runs.check_finished(host, workdir, runs.bits(undisturbed))
  assert len(runs.resumptions(workdir)) == 1


def test_a_share_of_a_snapshot_is_damaged(host, workdir, undisturbed):
  """The one of a replica is enough: an older start is taken."""
  fault = 'corrupt_snapshot:stage=1,replica=1,iteration=8,phase=update'
  runs.end(_train(host, workdir, fault), seconds=SECONDS)
  runs.check_finished(host, workdir, runs.bits(undisturbed))
  assert runs.of_kind(workdir, 'recovered')


def test_a_replica_that_cannot_be_replaced(host, workdir, undisturbed):
  """The other one does its microbatches, until it comes back."""
  faults = [
    f'kill:stage=1,replica=0,iteration=4,phase={phase}'
    for phase in ('forward', 'backward')
  ]
  flags = ['--on_failure=shrink', '--max_failures=1', '--grow_after=3']
  runs.end(_train(host, workdir, *faults, flags=flags), seconds=SECONDS)
  runs.check_finished(host, workdir, runs.bits(undisturbed))
  (shrunk,) = runs.of_kind(workdir, 'shrunk')
  assert (shrunk['stage'], shrunk['replica'], shrunk['team']) == (1, 0, [1])
  (grown,) = runs.of_kind(workdir, 'grown')
  assert (grown['stage'], grown['team']) == (1, [0, 1])
  assert _generations(workdir) == {(0, 0): 1, (0, 1): 1, (1, 0): 4, (1, 1): 4}


def test_three_become_two_and_one_and_three_again(host, tmp_path):
  """Sums are in the order of the replicas, whoever has their terms."""
  workdir = tmp_path / 'undisturbed'
  runs.end(_train(host, workdir, replicas=3), seconds=SECONDS)
  undisturbed = runs.bits(runs.metrics(workdir))
  assert len(undisturbed) == ITERATIONS
  faults = [
    f'kill:stage=1,replica={replica},iteration={iteration},phase={phase}'
    for replica, iteration in ((1, 3), (0, 5))
    for phase in ('forward', 'backward')
  ]
  flags = ['--shard_optimizer', '--on_failure=shrink', '--max_failures=1']
  flags.append('--grow_after=3')
  workdir = tmp_path / 'shrinks'
  run = _train(host, workdir, *faults, replicas=3, flags=flags)
  runs.end(run, seconds=SECONDS)
  runs.check_finished(host, workdir, undisturbed)
  teams = [e['team'] for e in runs.of_kind(workdir, 'shrunk')]
  assert teams == [[0, 2], [2]]
  assert runs.of_kind(workdir, 'grown')[-1]['team'] == [0, 1, 2]


def test_no_more_processes_than_there_may_be(host, tmp_path, undisturbed):
  """With nobody to stand in the run ends; the same command goes on."""
  fault = 'kill:stage=0,replica=1,iteration=5,phase=update'
  limit = f'--max_workers={STAGES * REPLICAS}'
  workdir = tmp_path / 'ends'
  _, err = runs.end(_train(host, workdir, fault, flags=[limit]), 1, SECONDS)
  assert limit in err and 'The same command goes on' in err
  runs.end(_train(host, workdir, fault, flags=[limit]), seconds=SECONDS)
  runs.check_finished(host, workdir, runs.bits(undisturbed))
  workdir = tmp_path / 'shrinks'
  flags = [f'--max_workers={STAGES * REPLICAS + 1}', '--on_failure=shrink']
  runs.end(_train(host, workdir, fault, flags=flags), seconds=SECONDS)
  runs.check_finished(host, workdir, runs.bits(undisturbed))
  assert _generations(workdir) == {(0, 0): 2, (1, 0): 1, (1, 1): 1}


def test_replicas_that_share_the_training_state(host, workdir, undisturbed):
  """The same bits, whoever dies where; each has its part, and reports it."""
  faults = [
    'kill:stage=1,replica=1,iteration=3,phase=backward',
    'kill:stage=0,replica=0,iteration=6,phase=update',
    'kill:stage=0,replica=1,iteration=5,phase=replay',
  ]
  flags = ['--shard_optimizer', '--max_failures=6', '--standby']
  runs.end(_train(host, workdir, *faults, flags=flags), seconds=SECONDS)
  runs.check_finished(host, workdir, runs.bits(undisturbed))
  failed = [
    (e['stage'], e['replica']) for e in runs.of_kind(workdir, 'failure')
  ]
  assert failed == [(1, 1), (0, 0), (0, 1)]


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
  runs.end(_train(host, workdir, *faults, flags=flags), seconds=SECONDS)
  runs.check_finished(host, workdir, runs.bits(undisturbed))
  assert runs.kinds(workdir).count('shrunk') == 1
  assert runs.kinds(workdir).count('grown') == 1
  path = str(workdir / 'checkpoint')
  tree = checkpoint.load(path, 'init_from')
  config = checkpoint.load_config(path, 'init_from')
  digests = {}
  for index in range(STAGES):
    stage = local.build_stage(config, index, team=(0,))
    checkpoint.check(stage, tree, path, weights_only=False)
    state = checkpoint.state_of(stage, tree, weights_only=False)
    digests |= helpers.digests_of(stage, state)
  assert digest.combine(digests) == undisturbed[-1]['digest']
