"""The files that a run leaves: written once, compared, cut, never torn."""

import contextlib
import json
import os
import resource
import signal
import threading

import numpy as np
import pytest

from moetion_jax import errors
from moetion_jax.runtime.hosts import child_process
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


@pytest.mark.parametrize('use', ['write', 'sync', 'cut'])
@pytest.mark.parametrize('how', ['emptied', 'cut', 'added to', 'removed'])
def test_nobody_else_changes_the_lines_of_a_living_run(tmp_path, how, use):
  path = tmp_path / 'metrics.jsonl'
  with record_files.MetricsFile(str(path)) as f:
    for iteration in (1, 2):
      f.write(_line(iteration))
    if how == 'removed':
      path.unlink()
    elif how == 'added to':
      with open(path, 'ab') as other:
        other.write(b'{}\n')
    else:
      os.truncate(path, 0 if how == 'emptied' else 5)
    uses = {
      'write': lambda: f.write(_line(3)),
      'sync': f.sync,
      'cut': lambda: f.cut(1),
    }
    with pytest.raises(errors.StoreError, match='while its run wrote it: put'):
      uses[use]()


@pytest.mark.parametrize(
  'line', ['5', 'null', '[]', '{"iteration": null}', '{"iteration": "3"}',
           '{"iteration": true}', '{"iteration": [3]}', '[' * 100_000],
)  # fmt: skip
def test_a_line_that_is_none(tmp_path, line):
  path = tmp_path / 'metrics.jsonl'
  with record_files.MetricsFile(str(path)) as f:
    for iteration in (1, 2):
      f.write(_line(iteration))
  with open(path, 'a') as other:
    other.write(line + '\n')
  assert list(record_files.read_lines(path)) == [1, 2]
  with pytest.raises(errors.StoreError, match=':3 is damaged: put back'):
    record_files.MetricsFile(str(path)).start()


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


@pytest.mark.parametrize(
  ('order', 'named'),
  [((1, 3, 4), 2), ((2, 3), 1), ((1, 3, 2), 2), ((1, 2, 2, 3), 3)],
)
def test_lines_that_are_missing_or_out_of_order(tmp_path, order, named):
  """Then the file ends a run that goes on, until it is put back."""
  path = tmp_path / 'metrics.jsonl'
  with record_files.MetricsFile(str(path)) as f:
    for iteration in (1, 2, 3, 4):
      f.write(_line(iteration))
  whole = path.read_bytes()
  lines = whole.splitlines(keepends=True)
  edited = b''.join(lines[iteration - 1] for iteration in order)
  path.write_bytes(edited)
  words = rf':{named} is of iteration {order[named - 1]}, .*put back.*--fresh'
  with pytest.raises(errors.StoreError, match=words):
    record_files.MetricsFile(str(path)).start()
  assert path.read_bytes() == edited
  path.write_bytes(whole)
  with record_files.MetricsFile(str(path)) as f:
    assert f.last_iteration == 4


def test_lines_of_a_run_that_begins_later(tmp_path):
  path = str(tmp_path / 'metrics.jsonl')
  for _ in range(2):
    with record_files.MetricsFile(path, 7) as f:
      f.write(_line(8))
      f.write(_line(9))
  with pytest.raises(errors.StoreError, match='is of iteration 8, and not'):
    record_files.MetricsFile(path).start()


def test_a_line_that_was_changed_and_put_back(tmp_path):
  path = tmp_path / 'metrics.jsonl'
  with record_files.MetricsFile(str(path)) as f:
    f.write(_line(1))
  whole = path.read_bytes()
  path.write_bytes(whole.replace(_line(1)['loss_hex'].encode(), b'0x1.0p+0'))
  with record_files.MetricsFile(str(path)) as f:
    with pytest.raises(
      record_files.MetricsMismatchError, match='put back the file as it was'
    ):
      f.write(_line(1))
  path.write_bytes(whole)
  with record_files.MetricsFile(str(path)) as f:
    f.write(_line(1))


@pytest.mark.parametrize('is_replaced', [False, True])
def test_lines_that_are_removed_while_they_are_written(tmp_path, is_replaced):
  path = tmp_path / 'metrics.jsonl'
  with record_files.MetricsFile(str(path)) as f:
    f.write(_line(1))
    path.rename(tmp_path / 'away')
    if is_replaced:
      path.write_bytes(b'')
    with pytest.raises(errors.StoreError, match='was removed.*put back'):
      f.write(_line(2))
    (tmp_path / 'away').rename(path)
    f.write(_line(2))
  assert list(record_files.read_lines(path)) == [1, 2]


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


def test_updates_that_were_left_out_are_counted(tmp_path):
  """Also those of an earlier start, or of a version that did not count."""
  path, made = tmp_path / 'metrics.jsonl', []
  with record_files.MetricsFile(str(path)) as file:
    for iteration, updated in enumerate([True, False, True, False, False], 1):
      report = helpers.make_report(iteration, updated=updated)
      line = merge.make_line([report], 64, file.skipped(iteration - 1))
      made.append(line.pop('skipped'))
      file.write(line)
  assert made == [0, 1, 0, 1, 2]
  with record_files.MetricsFile(str(path)) as file:
    assert [0, *made] == [file.skipped(iteration) for iteration in range(6)]
    assert file.skipped_in_all == 3
    file.cut(4)
    assert file.skipped(4) == 1 and file.skipped_in_all == 2


@pytest.mark.parametrize('torn', [b'{"time": 1', b'{"kind": "x"}\n{"ti', b'\n'])
def test_an_event_after_a_torn_one_is_whole(tmp_path, torn):
  path = tmp_path / 'events.jsonl'
  path.write_bytes(torn)
  record_files.EventsFile(str(path)).write('start')
  *before, last = path.read_bytes().splitlines(keepends=True)
  assert json.loads(last)['kind'] == 'start'
  assert b''.join(before) == torn[: torn.rfind(b'\n') + 1]


@contextlib.contextmanager
def _full():
  """A limit of the size of files is met like a full disk: in the middle."""
  before = resource.getrlimit(resource.RLIMIT_FSIZE)
  old = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
  try:
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, before[1]))
    yield
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, old)


def test_lines_and_events_on_a_full_disk(tight):
  """What was written in part is cut; with room there it goes on."""
  helpers.fill(tight, 8192)
  events = record_files.EventsFile(str(tight / 'events.jsonl'))
  path = tight / 'metrics.jsonl'
  with record_files.MetricsFile(str(path)) as f:
    with pytest.raises(OSError, match='No space left'):
      for iteration in range(1, 100):
        f.write(_line(iteration))
        events.write('start', pad='x' * 300)
  (tight / 'fill').unlink()
  events.write('finished')
  kinds = [json.loads(x)['kind'] for x in open(tight / 'events.jsonl')]
  assert kinds == ['start'] * (len(kinds) - 1) + ['finished']
  with record_files.MetricsFile(str(path)) as f:
    first = f.last_iteration + 1
    assert first > 1
    for iteration in (first, first + 1):
      f.write(_line(iteration))
  assert list(record_files.read_lines(path)) == [*range(1, first + 2)]


def test_write_json_on_a_full_disk_leaves_nothing(tmp_path):
  path = tmp_path / 'workers.json'
  record_files.write_json(str(path), {'n': 1})
  with _full(), pytest.raises(OSError, match='workers.json'):
    record_files.write_json(str(path), {'n': 2, 'pad': 'x' * (1 << 17)})
  assert json.loads(path.read_text()) == {'n': 1}
  assert os.listdir(tmp_path) == ['workers.json']


def test_a_file_that_cannot_grow_is_named(tmp_path):
  long, metrics = 'x' * (1 << 17), tmp_path / 'metrics.jsonl'
  with _full(), pytest.raises(OSError, match='events.jsonl'):
    record_files.EventsFile(str(tmp_path / 'events.jsonl')).write(long)
  with _full(), record_files.MetricsFile(str(metrics)) as file:
    with pytest.raises(OSError, match='metrics.jsonl'):
      file.write(_line(1) | {'long': long})
  (tmp_path / 'stage-0.log').write_bytes(b'\n' * (1 << 16))
  log = child_process.Transcript('stage 0')
  log.open_log(tmp_path / 'stage-0.log')
  with _full(), pytest.raises(OSError, match='stage-0.log'):
    log.add(b'a line')
  log.close()


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
