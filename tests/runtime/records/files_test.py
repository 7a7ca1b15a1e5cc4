"""The files that a run leaves: written once, compared, cut, never torn."""

import json
import os
import threading

import numpy as np
import pytest

from moetion_jax import errors
from moetion_jax.runtime.records import files as record_files, merge
from tests.support import helpers


def _line(iteration, loss=1.5):
  return merge.make_line([helpers.make_report(iteration, loss=loss)], 64)


def test_lines_that_are_done_otherwise_are_cut(tmp_path):
  path = tmp_path / 'metrics.jsonl'
  with record_files.MetricsFile(str(path)) as f:
    for iteration in range(1, 6):
      f.write(_line(iteration))
    f.cut(3)
    assert f.last_iteration == 3
    assert f.digest(3) == _line(3)['digest'] and f.digest(4) == ''
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
