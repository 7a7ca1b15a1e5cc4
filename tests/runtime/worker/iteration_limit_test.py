"""A limit that one thread sets and another one obeys."""

import threading

import pytest

from moetion_jax.runtime.worker import iteration_limit


def test_without_a_limit_nothing_stops():
  limit = iteration_limit.IterationLimit()
  assert not any(limit.stop(i) for i in range(100))


def test_a_committed_limit():
  limit = iteration_limit.IterationLimit()
  assert limit.propose(2) == 0
  assert [limit.stop(i) for i in range(2)] == [False, False]
  limit.commit(2)
  assert limit.stop(2) and limit.stop(2)


def test_a_proposal_that_is_passed_changes_nothing():
  limit = iteration_limit.IterationLimit()
  assert [limit.stop(i) for i in range(5)] == [False] * 5
  assert limit.propose(3) == 5
  assert not limit.stop(5)


@pytest.mark.parametrize('commits', [True, False])
def test_at_a_proposed_limit_it_waits(commits):
  limit = iteration_limit.IterationLimit()
  limit.propose(1)
  assert not limit.stop(0)
  answers = []
  thread = threading.Thread(target=lambda: answers.append(limit.stop(1)))
  thread.start()
  thread.join(0.05)
  assert thread.is_alive() and not answers
  if commits:
    limit.commit(1)
  else:
    limit.propose(4)
  thread.join(10)
  assert answers == [commits]


def test_who_goes_back_waits_at_no_limit():
  limit = iteration_limit.IterationLimit()
  limit.propose(1)
  assert not limit.stop(0)
  answers = []
  thread = threading.Thread(target=lambda: answers.append(limit.stop(1)))
  thread.start()
  thread.join(0.05)
  assert not answers
  limit.interrupt(True)
  thread.join(10)
  assert answers == [True]
  assert limit.stop(0)  # until it has gone back
  limit.interrupt(False)
  assert not limit.stop(0)
