"""Runs under the baseline policies in which workers and agents die.

The exact ones come out as if nobody had died; nobody's process is started
again but that of the dead.
"""

import shutil
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
  took = {x['iteration'] for x in runs.metrics(workdir) if x['snapshot_bytes']}
  assert {3, 12} <= took <= {3, 6, 9, 12}


def test_dense_goes_on_after_its_agent(host, workdir, undisturbed):
  flags = ['--policy=dense', '--interval=3']
  faults = ['kill_agent:iteration=8,phase=backward']
  run = _train(host, workdir, *faults, flags=flags)
  runs.end(run, -signal.SIGKILL, seconds=SECONDS)
  runs.wait_for(lambda: not host.processes(), seconds=10)
  runs.end(_train(host, workdir, *faults, flags=flags), seconds=SECONDS)
  runs.check_finished(host, workdir, undisturbed)
  assert runs.resumptions(workdir)[0] in (4, 7)


def test_two_phase_reads_from_disk(host, workdir, tmp_path, undisturbed):
  """What is in memory is lost, even where it is not."""
  flags = [
    '--policy=two_phase',
    '--interval=3',
    f'--durable_dir={tmp_path / "disk"}',
  ]
  faults = [
    'kill:stage=2,iteration=8,phase=capture',
    'kill_agent:iteration=12,phase=backward',
  ]
  run = _train(host, workdir, *faults, flags=flags)
  runs.until(run, 'iteration 1/')
  before = {w['stage']: w['pid'] for w in runs.workers(workdir)}
  runs.wait_for(lambda: len(runs.of_kind(workdir, 'recovered')) == STAGES)
  after = {w['stage']: w['pid'] for w in runs.workers(workdir)}
  assert [s for s in range(STAGES) if after[s] == before[s]] == [0, 1]
  runs.end(run, -signal.SIGKILL, seconds=SECONDS)
  runs.wait_for(lambda: not host.processes(), seconds=10)
  shutil.rmtree(host.path)  # as after a reboot
  host.path.mkdir()
  runs.end(_train(host, workdir, *faults, flags=flags), seconds=SECONDS)
  runs.check_finished(host, workdir, undisturbed)
  assert runs.resumptions(workdir)[0] in (7, 10)
  for event in runs.of_kind(workdir, 'recovered'):
    assert event['source'] == 'durable'
    assert event['first_iteration'] in (4, 7)
  assert not list((tmp_path / 'disk').iterdir())


@pytest.mark.parametrize('select', ['sequential', 'load_aware'])
def test_partial_goes_on_with_stale_experts(host, workdir, undisturbed, select):
  flags = [
    '--policy=partial',
    '--interval=2',
    f'--partial_select={select}',
    '--plt_budget=0.02',
  ]
  faults = ['kill:stage=1,iteration=9,phase=backward']
  run = _train(host, workdir, *faults, flags=flags)
  runs.until(run, 'iteration 1/')
  before = {w['stage']: w['pid'] for w in runs.workers(workdir)}
  runs.end(run, seconds=SECONDS)
  assert host.is_clean()
  after = {w['stage']: w['pid'] for w in runs.workers(workdir)}
  assert [s for s in range(STAGES) if after[s] == before[s]] == [0, 2]
  assert runs.kinds(workdir)[-1] == 'finished'
  found = runs.bits(runs.metrics(workdir))
  assert [x[0] for x in found] == list(range(1, ITERATIONS + 1))
  (back,) = runs.of_kind(workdir, 'rolled_back')
  start = back['iteration']
  assert start in (4, 6, 8)
  assert found[:start] == undisturbed[:start]
  for line, exact in zip(found[start:], undisturbed[start:], strict=True):
    assert line[2] != exact[2]
    assert 0 < float.fromhex(line[1]) < 10
  # The budget is spent: from then on two of the four experts of a layer.
  assert back['plt'] > 0.02 and back['experts'] == 2
  assert len(runs.of_kind(workdir, 'recovered')) == STAGES
  for event in runs.of_kind(workdir, 'recovered'):
    assert not event['digest_verified']
    assert event['lost_tokens'] == back['lost_tokens'] > 0
    assert event['first_iteration'] == start + 1
  sizes = [x['snapshot_bytes'] for x in runs.metrics(workdir)]
  assert sizes[ITERATIONS - 3] > sizes[1] > 0
