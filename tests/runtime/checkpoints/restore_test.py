"""What goes on from a checkpoint has the bits of what never ended."""

import dataclasses

import pytest

from moetion_jax import codec, report
from moetion_jax.runtime.checkpoints import file as checkpoint_file
from tests.support import helpers

_END, _LATER_END = 4, 7


def _run(iterations, decay_iterations, earlier=(), **fields):
  return helpers.micro_run(
    model={'dropout_rate': 0.1},
    optimizer={'decay_iterations': decay_iterations, 'earlier': earlier},
    iterations=iterations,
    **fields,
  )


def _bits(reports):
  """Iteration, loss and digest of each iteration."""
  return [
    (
      of_stages[-1].iteration,
      of_stages[-1].loss.hex(),
      report.combine({o: d for r in of_stages for o, d in r.digests.items()}),
    )
    for of_stages in reports
  ]


@pytest.fixture(scope='module')
def ended(tmp_path_factory):
  """A run's bits, and its checkpoint."""
  path = str(tmp_path_factory.mktemp('ended') / 'checkpoint')
  config = _run(_END, _END)
  reports, workers = helpers.train_locally(config)
  checkpoint_file.save(
    path,
    [worker.state for worker in workers],
    _END,
    codec.encode(config),
    {o: d for one in reports[-1] for o, d in one.digests.items()},
  )
  return _bits(reports), path


@pytest.mark.parametrize(
  ('decay_iterations', 'earlier'),
  [(_END, ()), (_LATER_END, ((_END, _END),))],
  ids=['pin', 'stretch'],
)
def test_iteration_data_and_schedule_go_on(ended, decay_iterations, earlier):
  before, path = ended
  whole = _run(_LATER_END, decay_iterations, earlier)
  expected = _bits(helpers.train_locally(whole)[0])
  assert expected[:_END] == before
  rest = _run(_LATER_END, decay_iterations, earlier, initial_iteration=_END)
  rest = dataclasses.replace(rest, init_from=path)
  assert _bits(helpers.train_locally(rest)[0]) == expected[_END:]
