"""What every boundary log does: one suite, run for each of them."""

import queue
import re
import threading

import jax
import ml_dtypes
import numpy as np
import pytest
from jax import numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from moetion_jax import errors, keys
from tests.support import runs

SECONDS = 30.0  # bounds every wait; nothing should come near it


def make_key(iteration, stage=0, microbatch=0, kind=keys.EntryKind.ACTIVATION):
  return keys.EntryKey(iteration, stage, 0, kind, microbatch)


def _bits(array):
  return np.asarray(array).tobytes()


class Reading:
  """`read` in a thread of its own."""

  def __init__(self, log, key, **kwargs):
    self.result = queue.Queue()

    def read():
      try:
        self.result.put(log.read(key, timeout_seconds=SECONDS, **kwargs))
      except Exception as error:
        self.result.put(error)

    self.thread = threading.Thread(target=read)
    self.thread.start()

  def get(self):
    result = self.result.get(timeout=2 * SECONDS)
    self.thread.join()
    return result


def until_waiting(log, key):
  assert runs.wait_for(lambda: log.waiting_for, SECONDS) == key


def until_blocked(log, key):
  blocked_for = runs.wait_for(lambda: log.blocked_for, SECONDS)
  assert blocked_for.startswith(f'{key}: ')


class LogConformance:
  """The suite: a fixture `pair` has the started logs of stages 0 and 1."""

  @pytest.mark.parametrize(
    'dtype', [np.float32, ml_dtypes.bfloat16, np.int32, np.uint8], ids=str
  )
  @pytest.mark.parametrize('shape', [(), (0,), (3, 0, 2), (7,), (3, 5, 2)])
  def test_bytes_in_are_bytes_out(self, pair, dtype, shape):
    itemsize = np.dtype(dtype).itemsize
    data = np.arange(int(np.prod(shape)) * itemsize, dtype=np.uint8)
    array = jnp.asarray(data.view(dtype).reshape(shape))
    writer, reader = pair.logs
    writer.publish(make_key(1), array)
    found = reader.read(make_key(1), timeout_seconds=SECONDS)
    assert isinstance(found, jax.Array)
    assert (found.dtype, found.shape) == (np.dtype(dtype), shape)
    assert _bits(found) == _bits(array)

  def test_large_entries(self, pair):
    writer, reader = pair.logs
    for iteration in range(1, 8):
      array = jax.random.normal(jax.random.key(iteration), (150_000,))
      writer.retain(iteration)
      writer.publish(make_key(iteration), array)
      found = reader.read(make_key(iteration), timeout_seconds=SECONDS)
      assert _bits(found) == _bits(array)
      del found

  def test_numpy_arrays_may_be_published(self, pair):
    writer, reader = pair.logs
    writer.publish(make_key(1), np.arange(3, dtype=np.int32))
    found = reader.read(make_key(1), timeout_seconds=SECONDS)
    assert isinstance(found, jax.Array)
    assert found.tolist() == [0, 1, 2]

  def test_read_of_an_absent_entry_waits_visibly(self, pair):
    writer, reader = pair.logs
    reading = Reading(reader, make_key(1))
    until_waiting(reader, make_key(1))
    writer.publish(make_key(1), jnp.arange(4.0))
    assert reading.get().tolist() == [0, 1, 2, 3]
    assert reader.waiting_for is None

  def test_read_times_out_and_can_be_repeated(self, pair):
    writer, reader = pair.logs
    with pytest.raises(TimeoutError, match='iteration 1'):
      reader.read(make_key(1), timeout_seconds=0.01)
    writer.publish(make_key(1), jnp.ones(2))
    assert reader.read(make_key(1), timeout_seconds=SECONDS).tolist() == [1, 1]

  def test_prefetch(self, pair):
    writer, reader = pair.logs
    for microbatch in range(3):
      reader.prefetch(make_key(1, microbatch=microbatch))
      reader.prefetch(make_key(1, microbatch=microbatch))
    for microbatch in range(3):
      writer.publish(
        make_key(1, microbatch=microbatch), jnp.full(5, microbatch)
      )
    for microbatch in (2, 0, 1):
      key = make_key(1, microbatch=microbatch)
      found = reader.read(key, timeout_seconds=SECONDS)
      assert found.tolist() == [microbatch] * 5

  def test_many_readers_of_one_entry(self, pair):
    writer, reader = pair.logs
    key = make_key(1, kind=keys.EntryKind.SCALARS)
    writer.publish(key, jnp.arange(3.0))
    for _ in range(2):
      for log in (writer, reader):
        assert log.read(key, timeout_seconds=SECONDS).tolist() == [0, 1, 2]

  def test_both_directions(self, pair):
    for iteration in range(1, 20):
      for stage in range(2):
        pair.logs[stage].publish(
          make_key(iteration, stage), jnp.full((), 2 * iteration + stage)
        )
      for stage in range(2):
        found = pair.logs[stage].read(
          make_key(iteration, 1 - stage), timeout_seconds=SECONDS
        )
        assert found == 2 * iteration + 1 - stage

  def test_sharding(self, pair):
    writer, reader = pair.logs
    mesh = jax.make_mesh((4,), ('expert',))
    array = jnp.arange(4 * 64, dtype=jnp.float32).reshape(4, 64)
    writer.publish(make_key(1), jax.device_put(array, jax.devices()[1]))
    for spec in (PartitionSpec(), PartitionSpec('expert')):
      sharding = NamedSharding(mesh, spec)
      found = reader.read(make_key(1), sharding, timeout_seconds=SECONDS)
      assert found.sharding == sharding
      assert _bits(found) == _bits(array)
    sharded = jax.device_put(
      array, NamedSharding(mesh, PartitionSpec('expert'))
    )
    writer.publish(make_key(2), sharded)
    found = reader.read(make_key(2), timeout_seconds=SECONDS)
    assert _bits(found) == _bits(array)

  def test_equal_publication_again_changes_nothing(self, pair):
    writer, reader = pair.logs
    for _ in range(3):
      writer.publish(make_key(1), jnp.arange(8.0))
      writer.flush(SECONDS)
    assert reader.read(make_key(1), timeout_seconds=SECONDS).tolist()[7] == 7

  @pytest.mark.parametrize(
    'other',
    [np.ones(4, np.float32), np.zeros(5, np.float32), np.zeros(4, np.int32)],
  )
  def test_unequal_publication_again_is_fatal(self, pair, other):
    writer, reader = pair.logs
    writer.publish(make_key(3, microbatch=5), np.zeros(4, np.float32))
    with pytest.raises(errors.EntryMismatchError) as caught:
      writer.publish(make_key(3, microbatch=5), other)
      writer.flush(SECONDS)
    assert 'iteration 3, microbatch 5' in str(caught.value)
    found = reader.read(make_key(3, microbatch=5), timeout_seconds=SECONDS)
    assert found.tolist() == [0] * 4

  def test_nobody_publishes_for_another(self, pair):
    of_nobody = keys.EntryKey(1, 0, 7, keys.EntryKind.ACTIVATION, 0)
    for other in (make_key(1, stage=1), of_nobody):
      with pytest.raises(ValueError, match=re.escape(str(other))):
        pair.logs[0].publish(other, jnp.ones(1))

  def test_close_ends_a_read_that_waits(self, pair):
    reading = Reading(pair.logs[1], make_key(1))
    until_waiting(pair.logs[1], make_key(1))
    pair.logs[1].close()
    error = reading.get()
    assert isinstance(error, errors.StoreError)
    assert 'closed' in str(error)
    for call in (
      lambda: pair.logs[1].read(make_key(1)),
      lambda: pair.logs[1].publish(make_key(1, stage=1), jnp.ones(1)),
    ):
      with pytest.raises(errors.StoreError, match='closed'):
        call()

  def test_an_interrupted_log_raises_what_it_was_told(self, pair):
    reading = Reading(pair.logs[1], make_key(1))
    until_waiting(pair.logs[1], make_key(1))
    reason = errors.MoetionError('the stages go back')
    pair.logs[1].interrupt(reason)
    assert reading.get() is reason
    with pytest.raises(errors.MoetionError, match='go back'):
      pair.logs[1].publish(make_key(1, stage=1), jnp.ones(1))

  def test_a_mark_is_flushed_with_what_came_before_it(self, pair):
    writer, reader = pair.logs
    writer.publish(make_key(1), jnp.ones(2))
    mark = writer.mark()
    writer.publish(make_key(2), jnp.ones(3))
    for flushed in (mark, writer.mark(), None):
      writer.flush(SECONDS, flushed)
    for iteration in (1, 2):
      found = reader.read(make_key(iteration), timeout_seconds=SECONDS)
      assert found.tolist() == [1] * (iteration + 1)

  def test_a_location_of_this_host_changes_nothing(self, pair):
    writer, reader = pair.logs
    reader.update_locations(pair.locations)
    writer.publish(make_key(1), jnp.ones(2))
    assert reader.read(make_key(1), timeout_seconds=SECONDS).tolist() == [1, 1]
