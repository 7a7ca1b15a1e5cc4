"""Scripts of faults, and each of them as far as one process can have it."""

import json
import signal
import subprocess
import sys

import pytest

from moetion_jax import codec, errors
from moetion_jax.runtime import faults
from tests.support import helpers


def _fault(**fields):
  default = {'number': 0, 'kind': 'kill', 'stage': 1, 'iteration': 5}
  return codec.decode(faults.Fault, default | fields)


@pytest.mark.parametrize(
  ('text', 'fields'),
  [
    ('kill:stage=1,iteration=5', {}),
    ('stop:iteration=7,stage=0,phase=publish,replica=0',
     {'kind': 'stop', 'iteration': 7, 'stage': 0, 'phase': 'publish'}),
    ('oom:stage=1,phase=replay',
     {'kind': 'oom', 'iteration': 0, 'phase': 'replay'}),
    ('exit:stage=1,phase=start',
     {'kind': 'exit', 'iteration': 0, 'phase': 'start'}),
    ('kill_all:iteration=5', {'kind': 'kill_all', 'stage': 0}),
    ('corrupt_final:stage=1',
     {'kind': 'corrupt_final', 'iteration': 0, 'phase': 'hand_over'}),
    ('kill:stage=0,phase=save',
     {'stage': 0, 'iteration': 0, 'phase': 'save'}),
  ],
)  # fmt: skip
def test_parse(text, fields):
  fault = faults.parse(text, 0, stages=2)
  assert fault == _fault(**fields)
  assert faults.parse(str(fault), 0, stages=2) == fault
  value = json.loads(json.dumps(codec.encode(fault)))
  assert codec.decode(faults.Fault, value) == fault


@pytest.mark.parametrize(
  ('text', 'words'),
  [
    ('explode:stage=0,iteration=1', 'a KIND of kill, stop'),
    ('kill', 'a KIND of'),
    ('kill:iteration=1', 'stage= is missing'),
    ('kill:stage=0', 'iteration= is missing'),
    ('kill:stage=2,iteration=1', 'stage must be less than 2'),
    ('kill:stage=0,iteration=1,replica=1', 'replica must be less than 1'),
    ('kill:stage=0,iteration=0', 'at least 1'),
    ('kill:stage=0,iteration=-1', 'must be a number'),
    ('kill:stage=0,stage=1,iteration=1', 'twice'),
    ('kill:stage=0,iteration=1,phase=lunch', 'one of start, compile, forward'),
    ('kill:stage=0,when=1', "'when=1' is not one of"),
    ('corrupt_log:stage=0,phase=start', 'nothing is there'),
    ('poison_read:stage=0,phase=compile', 'nothing is there'),
    ('kill_agent:stage=0,phase=start', 'before the run has begun'),
    ('corrupt_final:stage=0,iteration=1,phase=update', 'of hand_over, save'),
    ('kill:stage=1,phase=save', 'stage 0 replica 0 saves'),
  ],
)
def test_refused(text, words):
  with pytest.raises(errors.ConfigError, match='--fail=') as caught:
    faults.parse_faults(['kill:stage=0,iteration=1', text], stages=2)
  assert caught.value.value == text and words in caught.value.reason


def test_a_wrong_fault_is_one_line(tmp_path):
  result = helpers.launch('train', '--fail=kill', f'--workdir={tmp_path}/x')
  assert result.returncode == 2 and not (tmp_path / 'x').exists()
  assert '--fail=kill: must be' in result.stderr
  assert len(result.stderr.strip().splitlines()) == 1


def test_of_worker():
  script = [
    _fault(number=0),
    _fault(number=1, stage=0),
    _fault(number=2, phase='start', iteration=0),
    _fault(number=3, phase='compile', iteration=4),
  ]
  for begun, numbers in ((0, [0, 2]), (3, [0]), (4, [0, 3]), (9, [0, 3])):
    found = faults.of_worker(script, 1, begun)
    assert [f.number for f in found] == numbers, begun


def _happened(script, calls, replays_until=0):
  """What is announced and then done in a sequence of phases."""
  seen = []
  injector = faults.FaultInjector(script, lambda f: seen.append(('say', f)))
  for place in faults.Place:
    injector.acts[place] = lambda f, i: seen.append((f.number, i))
  injector.replays_until = replays_until
  for call in calls:
    injector.phase(*call)
  assert seen[::2] == [('say', script[n]) for n, _ in seen[1::2]]
  return seen[1::2]


def test_a_fault_happens_once_in_its_phase():
  script = [_fault(phase='update'), _fault(number=1, kind='stop')]
  calls = [
    (phase, iteration)
    for _ in range(2)
    for iteration in (4, 5, 6)
    for phase in ('forward', 'publish', 'update')
  ]
  assert _happened(script, calls) == [(1, 5), (0, 5)]


def test_start_and_replay():
  script = [
    _fault(phase='compile', iteration=3),
    _fault(number=1, phase='replay', iteration=0),
    _fault(number=2, phase='replay', iteration=8),
    _fault(number=3, phase='replay', iteration=9),
  ]
  calls = [('start',), ('compile',)]
  calls += [('forward', i) for i in range(6, 12)]
  assert _happened(script, calls, 8) == [(0, 0), (1, 6), (2, 8)]


def test_the_end():
  script = [
    _fault(phase='hand_over', iteration=0),
    _fault(number=1, phase='save', iteration=9),
    _fault(number=2, phase='save', iteration=8),
  ]
  calls = [('update', 9), ('hand_over', 9), ('hand_over', 9), ('save', 9)]
  assert _happened(script, calls) == [(0, 9), (1, 9)]


@pytest.mark.parametrize(
  ('kind', 'code'), [('kill', -signal.SIGKILL), ('exit', 3), ('exception', 1)]
)
def test_a_process_that_has_a_fault(kind, code):
  script = (
    'from moetion_jax.runtime import faults\n'
    f'fault = faults.parse("{kind}:stage=0,iteration=1", 0, 1)\n'
    'print(len("x"), flush=True)\n'
    'faults.FaultInjector([fault]).phase("forward", 1)\n'
    'print("still here")\n'
  )
  done = subprocess.run(
    [sys.executable, '-c', script],
    cwd=helpers.ROOT,
    capture_output=True,
    text=True,
    timeout=60,
  )
  assert (done.returncode, done.stdout) == (code, '1\n')


def test_out_of_memory_is_real_and_over():
  with pytest.raises(MemoryError):
    faults.run_out_of_memory()
  assert len(bytearray(1 << 20)) == 1 << 20


# ---- the agent's book --------------------------------------------------------


def test_what_happened_is_left_out(tmp_path):
  script = faults.parse_faults(
    ['kill:stage=0,iteration=3', 'stop:stage=1,iteration=4'] * 2, stages=2
  )
  path = tmp_path / 'events.jsonl'
  book = faults.FaultBook(script)
  book.read(path)
  assert [f.number for f in book.of_worker(1, 0)] == [1, 3]
  assert book.happens(3) == script[3]
  assert [f.number for f in book.of_worker(1, 0)] == [1]
  events = [{'kind': 'fault', **faults.event_fields(f)} for f in script[:2]]
  events[0]['iteration'] = 7  # of another script
  events.append({'kind': 'failure', 'stage': 0})
  events += [5, None, [], {'number': None}, {'number': [1]}]  # not ours
  text = '\n'.join(map(json.dumps, events)) + '\n{"kind": "fau'
  path.write_text(text)
  book = faults.FaultBook(script)
  book.read(path)
  assert [f.number for f in book.of_worker(0, 0)] == [0, 2]
  assert [f.number for f in book.of_worker(1, 0)] == [3]
