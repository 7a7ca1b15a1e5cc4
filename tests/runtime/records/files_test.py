import dataclasses
import json
import os
import threading

import numpy as np
import pytest

from moetion_jax import errors, keys, report
from moetion_jax.runtime.records import files as record_files, merge

pytestmark = pytest.mark.fast


def _report(stage=0, iteration=1, loss=1.5, seed=0, **more):
  fields = {
    'iteration': iteration,
    'stage': stage,
    'loss': loss,
    'auxiliary_loss': 0.25,
    'grad_norm': 2.0,
    'dropped': 3,
    'updated': True,
    'digests': {
      keys.OperatorId(f'layers/{stage}'): np.array([seed, 7], np.uint32)
    },
    'eval_loss': None,
    'seconds': 0.5,
    'waited_seconds': 0.0,
  }
  return report.Report(**{**fields, **more})


def _line(iteration, loss=1.5):
  return merge.make_line([_report(iteration=iteration, loss=loss)], 64)


def test_line_has_the_contract_fields():
  line = merge.make_line(
    [_report(0), _report(1, seconds=0.75, eval_loss=2.5)], 64
  )
  assert line['loss_hex'] == (1.5).hex() and line['seconds'] == 0.75
  assert line['eval_loss'] == 2.5
  assert set(line) >= {
      'iteration', 'loss', 'loss_hex', 'tokens', 'seconds', 'digest',
      'snapshot_bytes', 'blocked_seconds', 'grad_norm',
    }  # fmt: skip


def test_digest_is_of_all_stages_and_of_no_order():
  one, two = _report(0, seed=1), _report(1, seed=2)
  whole = merge.make_line([one, two], 64)['digest']
  merged = _report(1, digests={**two.digests, **one.digests})
  assert merge.make_line([merged], 64)['digest'] == whole
  assert merge.make_line([one, _report(1, seed=3)], 64)['digest'] != whole


def test_lines_that_are_done_otherwise_are_cut(tmp_path):
  path = tmp_path / 'metrics.jsonl'
  with record_files.MetricsFile(str(path)) as f:
    for iteration in range(1, 6):
      f.write(_line(iteration))
    f.cut(3)
    assert f.last_iteration == 3
    f.write(_line(3))  # is compared still
    f.write(_line(4, loss=9.0))
    f.cut(7)  # there is nothing
  lines = [json.loads(x) for x in path.read_text().splitlines()]
  assert [(x['iteration'], x['loss']) for x in lines] == [
      (1, 1.5), (2, 1.5), (3, 1.5), (4, 9.0),
    ]  # fmt: skip
  with record_files.MetricsFile(str(path)) as f:
    f.cut(0)
  assert not path.read_bytes()


def test_lines_are_written_once_and_compared_after(tmp_path):
  path = str(tmp_path / 'metrics.jsonl')
  with record_files.MetricsFile(path) as f:
    for i in (1, 2, 3):
      f.write(_line(i))
  content = open(path, 'rb').read()
  with record_files.MetricsFile(path) as f:
    assert f.last_iteration == 3
    f.write(_line(2))  # equal: fine
    with pytest.raises(record_files.MetricsMismatchError, match='iteration 2'):
      f.write(_line(2, loss=np.nextafter(1.5, 2.0)))
    f.write(_line(4))
  assert open(path, 'rb').read().startswith(content)
  lines = [json.loads(x) for x in open(path)]
  assert [x['iteration'] for x in lines] == [1, 2, 3, 4]


@pytest.mark.parametrize('cut_bytes', [1, 5, 40])
def test_a_torn_last_line_is_cut(tmp_path, cut_bytes):
  path = str(tmp_path / 'metrics.jsonl')
  with record_files.MetricsFile(path) as f:
    for i in (1, 2):
      f.write(_line(i))
  whole = open(path, 'rb').read()
  os.truncate(path, len(whole) - cut_bytes)
  with record_files.MetricsFile(path) as f:
    assert f.last_iteration == 1
    f.write(_line(2))
  assert open(path, 'rb').read() == whole


def test_a_damaged_line_is_named(tmp_path):
  path = tmp_path / 'metrics.jsonl'
  path.write_text('{"iteration": 1}\nnonsense\n{"iteration": 3}\n')
  with pytest.raises(errors.StoreError, match='metrics.jsonl:2'):
    record_files.MetricsFile(str(path)).start()


def test_nan_is_valid_json(tmp_path):
  path = str(tmp_path / 'metrics.jsonl')
  with record_files.MetricsFile(path) as f:
    f.write(_line(1, loss=float('nan')))

  def refuse(constant):
    raise AssertionError(constant)

  line = json.loads(open(path).read(), parse_constant=refuse)
  assert line['loss'] is None and line['loss_hex'] == 'nan'


def test_events_have_time_and_kind(tmp_path):
  path = str(tmp_path / 'events.jsonl')
  events = record_files.EventsFile(path)
  events.write('start', stages=2)
  events.write('failure', stage=1, replica=0)
  first, second = (json.loads(x) for x in open(path))
  assert first['kind'] == 'start' and first['stage'] is None
  assert second['stage'] == 1 and second['time'] >= first['time']


def test_write_json_is_atomic(tmp_path):
  path = str(tmp_path / 'workers.json')
  record_files.write_json(path, {'n': 0, 'pad': 'x' * 4096})
  done = threading.Event()
  seen = set()

  def read():
    while not done.is_set():
      with open(path) as f:
        seen.add(json.load(f)['n'])

  reader = threading.Thread(target=read)
  reader.start()
  for n in range(200):
    record_files.write_json(path, {'n': n, 'pad': 'x' * 4096})
  done.set()
  reader.join()
  assert seen <= set(range(200)) and seen
  assert os.listdir(tmp_path) == ['workers.json']


def test_replicas_become_one_report():
  fields = {'snapshot_bytes': 10, 'blocked_seconds': 0.5, 'seconds': 2.0}
  first = _report(replica=0, copy_bytes_per_second=9.0)
  second = _report(replica=1, copy_bytes_per_second=5.0)
  merged = merge.merge_replicas([first, dataclasses.replace(second, **fields)])
  assert merged.replica == 0
  assert merged.snapshot_bytes == first.snapshot_bytes + 10
  assert merged.blocked_seconds == 0.5
  assert merged.seconds == 2.0
  assert merged.copy_bytes_per_second == 5.0


def test_replicas_with_other_bits_are_named():
  first, second = _report(replica=0), _report(replica=1, seed=1)
  operator = next(iter(first.digests))
  with pytest.raises(merge.ReplicaMismatchError) as error:
    merge.merge_replicas([first, second])
  for word in ('replica 1', str(operator), 'iteration 1', 'corruption'):
    assert word in str(error.value)


def _sharing(replica, *operators, **fields):
  """Of a replica that has only these operators of its stage."""
  digests = {keys.OperatorId(o): np.array([7, 7], np.uint32) for o in operators}
  return _report(replica=replica, digests=digests, **fields)


def test_replicas_that_share_the_state_become_one_report():
  merged = merge.merge_replicas([_sharing(0, 'a', 'c'), _sharing(1, 'b')])
  assert [o.group for o in sorted(merged.digests)] == ['a', 'b', 'c']
  # In the line nobody can tell them from one that has everything.
  one = merge.make_line([_sharing(0, 'a', 'b', 'c')], 64)
  assert merge.make_line([merged], 64) == one


@pytest.mark.parametrize('field', ['loss', 'grad_norm', 'auxiliary_loss'])
def test_what_all_replicas_compute_is_compared(field):
  other = _sharing(1, 'b', **{field: np.nextafter(2.0, 3.0)})
  with pytest.raises(merge.ReplicaMismatchError, match=f'another {field}'):
    merge.merge_replicas([_sharing(0, 'a', **{field: 2.0}), other])


def test_an_operator_that_two_have_is_compared():
  other = _sharing(2, 'b')
  other.digests[keys.OperatorId('a')] = np.array([7, 8], np.uint32)
  with pytest.raises(merge.ReplicaMismatchError, match='another a than'):
    merge.merge_replicas([_sharing(1, 'a'), other])


@pytest.mark.parametrize(
  ('reported', 'team', 'is_whole'),
  [
    ({0: 'a', 1: 'b'}, (0, 1), True),
    ({0: 'a'}, (0, 1), False),
    ({1: 'b'}, (0, 1), False),
    # Replica 0 left: what both said before, then what is said without it.
    ({0: 'a', 1: 'b'}, (1,), True),
    ({1: 'b'}, (1,), False),
    ({1: 'ab'}, (1,), True),
    # It came back: it had said all, and now says its part.
    ({0: 'ab', 1: 'b'}, (0, 1), True),
    ({0: 'a', 1: 'ab'}, (0, 1), True),
  ],
)
def test_a_stage_has_reported_when_all_its_operators_are_there(
  reported, team, is_whole
):
  reports = {r: _sharing(r, *names) for r, names in reported.items()}
  merged = merge.merge_stage(reports, team, operators=2)
  assert (merged is not None) == is_whole
  assert merged is None or len(merged.digests) == 2
