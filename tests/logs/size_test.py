import uuid

import numpy as np
import pytest

from moetion_jax import errors, keys
from moetion_jax.hostmem import segment_writer, store_folder
from moetion_jax.logs import size as log_size
from tests.support import helpers

# [8 sequences, 16 tokens, 32 dims] in bfloat16.
_HIDDEN = 8 * 16 * 32 * 2
_SCALARS = 16


@pytest.mark.parametrize(
  ('stages', 'stage', 'microbatches', 'eval_every', 'hidden_entries'),
  [
    (1, 0, 4, 0, 0),  # no neighbour
    (1, 0, 4, 2, 0),
    (2, 0, 4, 0, 4),  # activations
    (2, 1, 4, 0, 4),  # gradients
    (3, 1, 4, 0, 8),  # both
    (3, 2, 1, 0, 1),
    (2, 0, 4, 2, 4 + 2),  # and held-out activations
    (2, 1, 4, 2, 4),  # which the last stage has nobody to send to
    (3, 1, 4, 2, 8 + 2),
  ],
)
def test_entries(stages, stage, microbatches, eval_every, hidden_entries):
  config = helpers.micro_run(
    stages=stages, microbatches=microbatches, eval_every=eval_every
  )
  sizes = log_size.entry_sizes(config.job_spec(), stage)
  assert sizes == [_HIDDEN] * hidden_entries + [_SCALARS]


@pytest.mark.parametrize(
  ('model', 'nbytes'),
  [
    ({}, _HIDDEN),
    ({'compute_dtype': 'float32'}, 2 * _HIDDEN),
    ({'sequence_length': 48}, 3 * _HIDDEN),
    ({'model_dim': 64}, 2 * _HIDDEN),
  ],
)
def test_bytes_of_an_entry(model, nbytes):
  config = helpers.micro_run(model, stages=2)
  assert log_size.entry_sizes(config.job_spec(), 0)[0] == nbytes


@pytest.mark.parametrize('log_iterations', [1, 4])
@pytest.mark.parametrize('stage', [0, 1, 2])
def test_a_log_of_this_size_holds_what_it_is_for(stage, log_iterations):
  job = helpers.micro_run(stages=3).job_spec()
  size = log_size.log_size(job, stage, log_iterations)
  store = store_folder.StoreFolder('/dev/shm', f'test-{uuid.uuid4().hex}')
  store.start()
  try:
    writer = segment_writer.SegmentWriter(
      store.path, keys.WorkerId(stage, 0, 1), size.ring_bytes, size.cells
    )
    writer.start()
    assert writer.path.stat().st_size == size.file_bytes
    # The iteration that is written and those before it that are kept.
    for iteration in range(1, 4 * log_iterations):
      writer.retain(iteration - log_iterations)
      for number, nbytes in enumerate(log_size.entry_sizes(job, stage)):
        key = keys.EntryKey(
          iteration, stage, 0, keys.EntryKind.ACTIVATION, number
        )
        assert writer.put(key, np.zeros(nbytes, np.uint8))
    writer.close()
  finally:
    store.remove()


@pytest.mark.parametrize(
  ('model', 'train', 'flag'),
  [
    ({}, {'stages': 5}, 'stages'),  # it has 4 layers
    ({}, {'local_devices': 8}, 'local_devices'),  # and 4 experts
  ],
)
def test_shapes_that_cannot_be(model, train, flag):
  with pytest.raises(errors.ConfigError, match=f'--{flag}='):
    helpers.micro_run(model, **train).job_spec()


def test_shapes_that_can_be():
  helpers.micro_run(stages=4, local_devices=4).job_spec()
