"""The recorder forgets lines, and says things again."""

import contextlib
import json

import numpy as np
import pytest

from moetion_jax import errors, keys
from moetion_jax.policies import planner
from moetion_jax.recovery import notices, splice as splice_lib
from moetion_jax.runtime.records import files, recorder, workdir
from tests.support import helpers

_OPERATOR = keys.OperatorId('head')


@contextlib.contextmanager
def _opened(path, environment, *accepted):
  folder = workdir.Workdir(str(path), fresh=False, accept_changes=accepted)
  folder.lock()
  with recorder.Recorder(
    helpers.micro_run().job_spec(), folder, recorder.View()
  ) as made:
    made.accept(
      {
        (0, 0): notices.Ready(
          device='',
          platform='cpu',
          lowering_platform='cpu',
          state_bytes=0,
          operators=planner.StageSizes(
            state_bytes={_OPERATOR: 0},
            compute_bytes={},
            gradient_bytes={},
            device={},
          ),
          environment={},
          data_fingerprint={},
        )
      },
      environment,
    )
    yield made
  folder.close()


def test_all_workers_read_the_same_data(tmp_path):
  folder = workdir.Workdir(str(tmp_path / 'run'), fresh=False)
  folder.lock()
  ready = {
    (0, replica): notices.Ready(
      device='',
      platform='cpu',
      lowering_platform='cpu',
      state_bytes=0,
      operators=planner.StageSizes(
        state_bytes={_OPERATOR: 0},
        compute_bytes={},
        gradient_bytes={},
        device={},
      ),
      environment={},
      data_fingerprint={'blake2b': text},
    )
    for replica, text in enumerate('ab')
  }
  job = helpers.micro_run().job_spec()
  with recorder.Recorder(job, folder, recorder.View()) as made:
    with pytest.raises(errors.ConfigError, match='--data=.* has changed'):
      made.accept(ready, {})
  folder.close()
  assert not (tmp_path / 'run' / 'config.json').exists()


@pytest.fixture
def one(tmp_path):
  with _opened(tmp_path / 'run', {}) as made:
    yield made


def _add(one, iteration, loss=1.0):
  digests = {_OPERATOR: np.zeros(2, np.uint32)}
  return one.add(
    helpers.make_report(iteration, loss=loss, digests=digests), [[0]]
  )


@pytest.mark.parametrize(
  ('is_replanned', 'new'), [(False, [5]), (True, [3, 4, 5])]
)
def test_what_is_done_again_after_damage(one, is_replanned, new):
  """Lines may differ then; reports are passed on only once."""
  for iteration in range(1, 5):
    assert _add(one, iteration)
  with pytest.raises(files.MetricsMismatchError):
    _add(one, 3, loss=2.0)
  one.forget_after(2, is_replanned=is_replanned)
  assert (one.iteration, one.last_recorded) == (2, 2)
  with pytest.raises(files.MetricsMismatchError):
    _add(one, 2, loss=2.0)
  again = [i for i in range(3, 6) if _add(one, i, loss=2.0)]
  assert again == new and one.iteration == 5


def test_what_is_newer_than_the_newest_is_not_made_up(one):
  _add(one, 1)
  one.forget_after(7)
  assert one.iteration == 1


def _accepted(path):
  lines = (path / 'events.jsonl').read_text().splitlines()
  events = map(json.loads, lines)
  return [e['names'] for e in events if e['kind'] == 'changes_accepted']


def test_a_splice_is_told_before_it_is_done(tmp_path):
  """Whoever ends between the two tells it again, rather than never."""
  path = tmp_path / 'run'
  config = path / 'config.json'
  here = {'versions': {'jax': '2'}}
  splice = splice_lib.Splice(exact_until=4, complete_at=(6,))
  with _opened(path, {'versions': {'jax': '1'}}):
    pass
  with _opened(path, here, 'jax') as one:
    assert one.begin_splice(splice)
    config.rename(tmp_path / 'kept')
    config.mkdir()  # in its place no file can be put
    with pytest.raises(IsADirectoryError):
      one.finish_splice(splice)
  assert _accepted(path) == [['jax']]
  config.rmdir()
  (tmp_path / 'kept').rename(config)
  with _opened(path, here) as one:
    assert one.begin_splice(splice)
    one.finish_splice(splice)
    assert not one.begin_splice(splice)
  assert _accepted(path) == [['jax'], ['jax']]
