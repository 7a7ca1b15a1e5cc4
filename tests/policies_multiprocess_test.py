"""Runs under the baseline policies in which workers and agents die.

The exact ones come out as if nobody had died; nobody's process is started
again but that of the dead.
"""

import signal

import pytest

from tests import runs

STAGES = 3
ITERATIONS = 14
SECONDS = 240.0

pytestmark = [pytest.mark.fast, pytest.mark.timeout(600)]


def _train(host, workdir, *faults, flags=()):
  return host.train(
    workdir,
    f'--stages={STAGES}',
    f'--iterations={ITERATIONS}',
    '--microbatches=4',
    '--dropout_rate=0.1',
    *(f'--fail={fault}' for fault in faults),
    *flags,
  )


@pytest.fixture(scope='module')
def undisturbed(tmp_path_factory):
  """What every exact run must come to: it captures nothing."""
  workdir = tmp_path_factory.mktemp('undisturbed') / 'run'
  with runs.host() as host:
    run = _train(host, workdir, flags=['--policy=none'])
    runs.end(run, seconds=SECONDS)
  lines = runs.bits(runs.metrics(workdir))
  assert [x[0] for x in lines] == list(range(1, ITERATIONS + 1))
  return lines


@pytest.fixture
def host():
  with runs.host() as host:
    yield host


@pytest.fixture
def workdir(tmp_path):
  return tmp_path / 'run'


def test_dense_goes_back_together(host, workdir, undisturbed):
  """To the newest whole snapshot; live workers keep their processes."""
  faults = [
    'kill:stage=1,iteration=7,phase=backward',
    'kill:stage=0,iteration=10,phase=update',
  ]
  flags = ['--policy=dense', '--interval=3']
  run = _train(host, workdir, *faults, flags=flags)
  runs.until(run, 'iteration 1/')
  before = {w['stage']: w['pid'] for w in runs.workers(workdir)}
  runs.end(run, seconds=SECONDS)
  runs.check_finished(host, workdir, undisturbed)
  after = {w['stage']: w for w in runs.workers(workdir)}
  assert after[2]['pid'] == before[2]
  assert after[0]['pid'] != before[0] and after[1]['pid'] != before[1]
  assert [after[s]['generation'] for s in range(STAGES)] == [3, 3, 3]
  recovered = runs.of_kind(workdir, 'recovered')
  assert sorted(e['stage'] for e in recovered) == [0, 0, 1, 1, 2, 2]
  for event in recovered:
    assert event['first_iteration'] in (4, 7, 10)  # after 3, 6 or 9
    assert event['source'] == 'own'
  # Those that a replay comes by are there already.
  sizes = [x['snapshot_bytes'] > 0 for x in runs.metrics(workdir)]
  assert [i for i, there in enumerate(sizes, 1) if there][:2] == [3, 6]
  assert not any(there for i, there in enumerate(sizes, 1) if i % 3)


def test_dense_goes_on_after_its_agent(host, workdir, undisturbed):
  flags = ['--policy=dense', '--interval=3']
  faults = ['kill_agent:iteration=8,phase=backward']
  run = _train(host, workdir, *faults, flags=flags)
  runs.end(run, -signal.SIGKILL, seconds=SECONDS)
  runs.wait_for(lambda: not host.processes(), seconds=10)
  runs.end(_train(host, workdir, *faults, flags=flags), seconds=SECONDS)
  runs.check_finished(host, workdir, undisturbed)
  assert runs.resumptions(workdir)[0] in (4, 7)
