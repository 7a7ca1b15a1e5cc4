"""Which standbys there are, and who takes whose place; nothing is prepared."""

import errno
import itertools
import os
import signal
import subprocess

import pytest

from moetion_jax.runtime import spec as spec_lib
from moetion_jax.runtime.hosts import child_process, standbys
from tests.support import helpers

RUN = helpers.micro_run()
SPEC = helpers.worker_spec(RUN)


class _Processes:
  """Notes what would be started and ended."""

  def __init__(self, replicas):
    self.started, self.ended, self.refuses = [], [], False
    self.lost = []
    worlds = (f'world {n}' for n in itertools.count(1))
    self.new_world = lambda: next(worlds)
    self.standbys = standbys.Standbys(
      replicas,
      lambda replica: child_process.WorkerProcess(
        spec_lib.STANDBY, 'here', replica=replica
      ),
      self._start,
      self.ended.append,
      lambda worker, lost: self.lost.append(lost),
    )

  def _start(self, worker, spec):
    if self.refuses:
      raise BlockingIOError(errno.EAGAIN, 'Resource temporarily unavailable')
    worker._process = subprocess.Popen(['true'])
    worker._process.wait()
    self.started.append((worker, spec))

  def warm(self, **changes):
    """What is started, which then is warm."""
    known = len(self.started)
    spec = helpers.worker_spec(RUN, **changes)
    self.standbys.warm(spec, self.new_world)
    new = self.started[known:]
    for worker, _ in new:
      self.standbys.warmed(worker)
    return [(s.replica, s.team, s.world, s.host) for _, s in new]


@pytest.mark.parametrize('replicas', [1, 2])
def test_one_that_cannot_be_started_does_not_end_the_run(replicas):
  them = _Processes(replicas)
  them.refuses = True
  assert them.warm() == [] and not them.standbys.everyone
  assert len(them.ended) == 1
  (lost,) = them.lost
  assert lost.how.endswith('Resource temporarily unavailable')
  them.refuses = False
  assert len(them.warm()) == replicas


def test_one_replaces_one():
  them = _Processes(1)
  assert them.warm() == [(0, (0,), '', 'here')]
  assert them.warm() == []
  assert them.standbys.take(2, (0,), 'there').workers == {}
  taken = them.standbys.take(2, (0,), 'here')
  assert taken.world == '' and list(taken.workers) == [0]
  worker = taken.workers[0]
  assert (worker.stage, worker.replica) == (2, 0)
  assert not worker.is_warm and not them.standbys.everyone
  assert them.standbys.take(1, (0,), 'here') == standbys.TakenStandby()


def test_on_cpu_they_meet_ahead_and_are_taken_together():
  them = _Processes(2)
  both = [(0, (0, 1), 'world 1', 'here'), (1, (0, 1), 'world 1', 'here')]
  assert them.warm() == both
  # A stage that is shrunk has another world.
  assert them.standbys.take(1, (1,), 'here') == standbys.TakenStandby()
  taken = them.standbys.take(1, (0, 1), 'here')
  assert taken.world == 'world 1'
  assert [w.replica for w in taken.workers.values()] == [0, 1]
  assert {w.stage for w in taken.workers.values()} == {1}
  assert [world for _, _, world, _ in them.warm()] == ['world 2'] * 2


def test_a_world_that_lost_one_is_of_no_use():
  them = _Processes(2)
  them.warm()
  first, second = them.standbys.everyone
  them.standbys.died(second, 'ended')
  assert them.ended == [first, second] and not them.standbys.everyone
  assert [world for _, _, world, _ in them.warm()] == ['world 2'] * 2


@pytest.mark.parametrize('replicas', [1, 2])
def test_one_that_is_stopped_is_ended(replicas):
  them = _Processes(replicas)
  them.warm()
  everyone = [*them.standbys.everyone]
  try:
    for worker in everyone:
      worker._process = subprocess.Popen(['sleep', 'infinity'])
    everyone[-1]._process.send_signal(signal.SIGSTOP)
    os.waitpid(everyone[-1].pid, os.WUNTRACED)
    team = tuple(range(replicas))
    assert them.standbys.take(0, team, 'here') == standbys.TakenStandby()
    assert them.ended == everyone and not them.standbys.everyone
    assert [lost.how for lost in them.lost] == ['was stopped (SIGSTOP)']
  finally:
    for worker in everyone:
      worker._process.kill()
      worker._process.wait()


def test_a_world_that_is_not_complete_is_not_taken():
  them = _Processes(2)
  them.standbys.warm(SPEC, them.new_world)
  them.standbys.warmed(them.standbys.everyone[0])
  assert them.standbys.take(1, (0, 1), 'here') == standbys.TakenStandby()
  assert len(them.standbys.everyone) == 2


@pytest.mark.parametrize('changes', [{'platform': 'cuda'}, {'cores': ()}])
def test_without_a_backend_each_is_its_own(changes):
  them = _Processes(2)
  assert [world for _, _, world, _ in them.warm(**changes)] == ['', '']
  taken = them.standbys.take(0, (1,), 'here')  # a shrunk stage
  assert taken.world == '' and list(taken.workers) == [1]
  assert [s for s, *_ in them.warm(**changes)] == [1]
  them.standbys.died(them.standbys.everyone[0], 'ended')
  assert len(them.ended) == 1 and len(them.standbys.everyone) == 1


def test_those_that_keep_dying_are_started_less_and_less():
  """Warm or not; once one is needed, another is started at once."""
  them = _Processes(1)
  starts = []
  for iteration in range(70):
    if them.warm():
      starts.append(iteration)
      (one,) = them.standbys.everyone
      them.standbys.died(one, 'was killed by SIGKILL')
  assert starts == [0, 1, 3, 7, 15, 31, 63]
  assert [lost.deaths for lost in them.lost] == [1, 2, 3, 4, 5, 6, 7]
  assert str(them.lost[0]).endswith('needed, and another one is started')
  assert str(them.lost[-1]) == (
    'a standby was killed by SIGKILL; that makes 7 since one was needed, and '
    'another one is started 63 iteration(s) later'
  )
  while not them.warm():
    pass
  assert them.standbys.take(0, (0,), 'here').workers
  assert them.warm()
  them.standbys.died(them.standbys.everyone[0], 'ended')
  assert them.lost[-1].deaths == 1 and them.warm()


def test_a_world_that_keeps_dying_before_it_is_warm():
  them = _Processes(2)
  starts = []
  for iteration in range(10):
    them.standbys.warm(SPEC, them.new_world)
    if them.standbys.everyone:
      starts.append(iteration)
      them.standbys.died(them.standbys.everyone[0], 'exited with code 1')
  assert starts == [0, 1, 3, 7]
