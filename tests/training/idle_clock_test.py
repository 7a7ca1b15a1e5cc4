"""The idle clock: what it counts is decided by events, not by time."""

import threading
import time

import pytest
from jax import numpy as jnp

from moetion_jax.training import idle_clock


class _Output:
  """An array whose program ends when the test says so."""

  def __init__(self):
    self.ended = threading.Event()
    self.error: Exception | None = None

  def is_ready(self):
    return self.ended.is_set()

  def block_until_ready(self):
    self.ended.wait()
    if self.error:
      raise self.error


@pytest.fixture
def clock():
  clock = idle_clock.IdleClock()
  clock.start()
  yield clock
  clock.close()


def _await(condition):
  deadline = time.monotonic() + 30
  while not condition():
    assert time.monotonic() < deadline
    time.sleep(0.001)


def test_nothing_runs(clock):
  for outputs in (None, (), jnp.ones(3).block_until_ready()):
    wait = clock.begin(outputs)
    time.sleep(0.001)
    assert 0 < clock.idle_seconds(wait) <= time.monotonic() - wait.begin


def test_a_program_runs_all_the_time(clock):
  output = _Output()
  wait = clock.begin((output, ()))
  assert clock.idle_seconds(wait) == 0
  output.ended.set()


def test_a_program_ends_meanwhile(clock):
  output = _Output()
  wait = clock.begin({'y': output})
  time.sleep(0.001)
  before = time.monotonic()
  output.ended.set()
  _await(lambda: wait.ready_at)
  assert 0 < clock.idle_seconds(wait) <= time.monotonic() - before


def test_outputs_that_are_donated(clock):
  output = _Output()
  output.error = RuntimeError('Array has been deleted.')
  wait = clock.begin(output)
  output.ended.set()
  _await(lambda: wait.output is None)
  assert clock.idle_seconds(wait) == 0
  test_a_program_ends_meanwhile(clock)  # it still lives


def test_close_twice(clock):
  clock.close()
