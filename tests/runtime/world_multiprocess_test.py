"""Stages of several replicas: stage worlds that die and come back.

As `recovery_multiprocess_test`, with two workers a stage that sum their
gradients and share their snapshots.
"""

import signal

import numpy as np
import pytest

from tests.support import runs, worlds

pytestmark = [pytest.mark.thorough, pytest.mark.timeout(600)]


@pytest.fixture(scope='module')
def undisturbed(tmp_path_factory):
  """What every run must come to: its metrics."""
  return worlds.undisturbed_metrics(tmp_path_factory)


def test_replicas_learn_what_one_does_of_as_many_microbatches(host, tmp_path):
  """Their sums are in another order; everything else is the same.

  In fp32: in bf16 a last bit of a sum becomes the last of 8 bits of a weight
  (measured: 6e-5 after six iterations), and has tokens choose other experts.
  """
  lines = []
  for replicas in (1, worlds.REPLICAS):
    workdir = tmp_path / f'{replicas} replica(s)'
    flags = ['--model=compute_dtype=float32']
    run = worlds.train(host, workdir, replicas=replicas, flags=flags)
    runs.end(run, seconds=worlds.SECONDS)
    lines.append(runs.metrics(workdir))
  for name in ('loss', 'eval_loss', 'grad_norm'):
    one, several = ([x[name] for x in run if name in x] for run in lines)
    assert len(one) == len(several) > 0
    np.testing.assert_allclose(one, several, rtol=1e-5)
  assert len(lines[0]) == worlds.ITERATIONS
  one, several = ([x['tokens'] for x in run] for run in lines)
  assert one == several


def test_one_replica_dies_in_every_phase(host, workdir, undisturbed):
  faults = [
    'kill:stage=1,replica=1,iteration=3,phase=backward',
    'kill:stage=0,replica=0,iteration=5,phase=forward',
    'kill:stage=1,replica=0,iteration=7,phase=update',
    'kill:stage=0,replica=1,iteration=9,phase=capture',
  ]
  runs.end(worlds.train(host, workdir, *faults), seconds=worlds.SECONDS)
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
  assert set(worlds.generations(workdir).values()) == {3}


def test_the_other_stage_is_not_disturbed(host, workdir, undisturbed):
  """The world of the dead one is started anew, the other stays."""
  run = worlds.train(
    host, workdir, 'stop:stage=1,replica=1,iteration=6,phase=update'
  )
  runs.until(run, 'iteration 1/')
  before = {(w['stage'], w['replica']): w['pid'] for w in runs.workers(workdir)}
  runs.end(run, seconds=worlds.SECONDS)
  runs.check_finished(host, workdir, runs.bits(undisturbed))
  after = {(w['stage'], w['replica']): w['pid'] for w in runs.workers(workdir)}
  for replica in range(worlds.REPLICAS):
    assert after[0, replica] == before[0, replica]
    assert after[1, replica] != before[1, replica]
  assert worlds.generations(workdir) == {
    (0, 0): 1,
    (0, 1): 1,
    (1, 0): 2,
    (1, 1): 2,
  }


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
  runs.end(
    worlds.train(host, workdir, *faults, flags=flags), seconds=worlds.SECONDS
  )
  runs.check_finished(host, workdir, runs.bits(undisturbed))


def test_everything_dies_and_goes_on(host, workdir, undisturbed):
  fault = 'kill_all:stage=0,iteration=6,phase=forward'
  runs.end(
    worlds.train(host, workdir, fault), -signal.SIGKILL, seconds=worlds.SECONDS
  )
  runs.wait_for(lambda: not host.processes(), seconds=20)
  runs.end(worlds.train(host, workdir, fault), seconds=worlds.SECONDS)
  runs.check_finished(host, workdir, runs.bits(undisturbed))
  assert len(runs.resumptions(workdir)) == 1


def test_a_share_of_a_snapshot_is_damaged(host, workdir, undisturbed):
  """The one of a replica is enough: an older start is taken."""
  fault = 'corrupt_snapshot:stage=1,replica=1,iteration=8,phase=update'
  runs.end(worlds.train(host, workdir, fault), seconds=worlds.SECONDS)
  runs.check_finished(host, workdir, runs.bits(undisturbed))
  assert runs.of_kind(workdir, 'recovered')


def test_replicas_that_share_the_training_state(host, workdir, undisturbed):
  """The same bits, whoever dies where; each has its part, and reports it."""
  faults = [
    'kill:stage=1,replica=1,iteration=3,phase=backward',
    'kill:stage=0,replica=0,iteration=6,phase=update',
    'kill:stage=0,replica=1,iteration=5,phase=replay',
  ]
  flags = ['--shard_optimizer', '--max_failures=6', '--standby']
  runs.end(
    worlds.train(host, workdir, *faults, flags=flags), seconds=worlds.SECONDS
  )
  runs.check_finished(host, workdir, runs.bits(undisturbed))
  failed = [
    (e['stage'], e['replica']) for e in runs.of_kind(workdir, 'failure')
  ]
  assert failed == [(1, 1), (0, 0), (0, 1)]


# The first of all workers takes the port of its world before the world does. In
# a later one the second member comes to the first collective too late for gloo.
_UNMET = """
import os, socket, sys, time
if 'moetion_jax.runtime.worker.main' in sys.orig_argv:
  from moetion_jax.programs import jax_internals
  from moetion_jax.runtime import xla_setup
  def is_first(name):
    try:
      open(os.path.join(os.environ['UNMET'], name), 'x').close()
    except FileExistsError:
      return False
    return True
  join, meet = xla_setup.join_world, jax_internals.meet
  def join_late(address, *rest):
    if is_first('port'):
      host, port = address.split(':')
      taken = socket.create_server((host, int(port)))
    join(address, *rest)
  def meet_late(name):
    meet(name)
    if is_first('gloo'):
      time.sleep(45)
  xla_setup.join_world, jax_internals.meet = join_late, meet_late
"""


@pytest.mark.soak
def test_worlds_that_do_not_come_together(host, workdir, tmp_path, undisturbed):
  """No failures: with --max_failures=1 there may be one of each as well."""
  (tmp_path / 'sitecustomize.py').write_text(_UNMET)
  environment = {'PYTHONPATH': str(tmp_path), 'UNMET': str(tmp_path)}
  flags = '--max_failures=1', '--nostandby'
  run = worlds.train(host, workdir, flags=flags, environment=environment)
  out, _ = runs.end(run, seconds=worlds.SECONDS)
  runs.check_finished(host, workdir, runs.bits(undisturbed))
  assert not runs.of_kind(workdir, 'failure')
  # The first one before there are events.
  (gloo,) = runs.of_kind(workdir, 'unmet')
  assert 'did not come together for its first collective' in gloo['error']
  said = [x for x in out.splitlines() if 'that counts as no failure' in x]
  assert len(said) == 2 and 'while meeting the others of its stage' in said[0]
