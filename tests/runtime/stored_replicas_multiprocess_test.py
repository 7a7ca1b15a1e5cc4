"""`launch.show` and `launch.convert` on what replicas leave behind."""

import json
import shutil
import signal

import pytest

from launch.lm import transformer_job
from launch.offline import rebuild, scan
from moetion_jax import report
from moetion_jax.runtime import linux_process
from moetion_jax.snapshots import file as snapshot_file
from tests.support import helpers, runs

pytestmark = [pytest.mark.thorough, pytest.mark.timeout(600)]

STAGES, REPLICAS = 2, 2
WINDOW = 3
LAST = 7  # when it is killed
SECONDS = 240.0


@pytest.fixture(scope='module', params=[False, True], ids=['each', 'share'])
def left(request, tmp_path_factory):
  """(workdir, hostmem_dir) of a run whose processes were all killed."""
  with runs.host() as host:
    workdir = tmp_path_factory.mktemp('left') / 'run'
    run = host.train(
      workdir,
      f'--stages={STAGES}',
      f'--replicas={REPLICAS}',
      f'--shard_optimizer={str(request.param).lower()}',
      f'--window_length={WINDOW}',
      '--iterations=100',
      '--microbatches=2',
      '--dropout_rate=0.1',
      f'--data={helpers.DATA}',
    )
    runs.until(run, f'iteration {LAST}/')
    for pid in host.processes():
      linux_process.send_signal(pid, signal.SIGKILL)
    run.communicate(timeout=SECONDS)
    runs.wait_for(lambda: not host.processes())
    yield workdir, host.path


@pytest.fixture
def copied(left, tmp_path, shm_folder):
  """As `left`, to be damaged."""
  workdir, hostmem_dir = left
  shutil.copytree(
    hostmem_dir,
    shm_folder,
    ignore=shutil.ignore_patterns('*.bell'),
    dirs_exist_ok=True,
  )
  return workdir, shm_folder


def _scan(workdir, hostmem_dir):
  return scan.scan(scan.find(str(workdir), str(hostmem_dir)), in_use=False)


def _show(workdir, hostmem_dir, *flags, code=0):
  result = helpers.launch(
    'show', str(workdir), f'--hostmem_dir={hostmem_dir}', *flags
  )
  assert result.returncode == code, result
  return result.stdout


def test_all_shares_are_shown(left):
  value = json.loads(_show(*left, '--json', '--verify'))
  assert value['newest_common_start']
  for stage in value['stages']:
    assert len(stage['snapshots']) >= WINDOW
    # Of the last two a share may not have been stored yet.
    for snapshot in stage['snapshots'][:-2]:
      shares = snapshot['shares']
      assert snapshot['is_whole']
      assert [s['replica'] for s in shares] == list(range(REPLICAS))
      assert sum(s['bytes'] for s in shares) == snapshot['bytes']
      assert snapshot['covered_operators'] == stage['operators']
    assert stage['log']['whole_iterations'][-1][1] >= LAST
    assert any(s['usable'] and s['reaches'] >= LAST for s in stage['starts'])
  text = _show(*left)
  assert 'shares' in text and '2 of 2' in text


def _rebuild(run, stage):
  rebuilder = rebuild.Rebuilder.compile(
    run.config, stage, transformer_job.of(run.config).data()
  )
  said = []
  return rebuilder.rebuild(run, said.append), said


def test_one_process_does_what_all_replicas_did(left):
  """Sums are in the order of the replicas, whoever adds them up."""
  run = _scan(*left)
  states = [_rebuild(run, stage)[0] for stage in range(STAGES)]
  for done in states:
    assert done.start and done.snapshots and done.losses and done.entries
    assert done.whole_digests
  line = run.metrics[states[0].whole_digests[-1]]
  both = {o: d for done in states for o, d in done.digests.items()}
  if {done.iteration for done in states} == {line['iteration']}:
    assert report.combine(both) == line['digest']


def test_a_share_that_is_missing_or_damaged(copied):
  """The whole snapshot is of no use then: an older start is taken."""
  run = _scan(*copied)
  *_, older, newest = run.stages[1].starts
  gone = run.stages[1].snapshots[newest.iteration].shares[1].path
  shutil.rmtree(gone)
  run = _scan(*copied)
  assert newest not in run.stages[1].starts
  assert str(gone) in _show(*copied, code=1)
  damaged = run.stages[1].snapshots[older.iteration].shares[0].path
  with open(damaged / snapshot_file.DATA_NAME, 'r+b') as file:
    file.seek(100)
    byte = file.read(1)[0]
    file.seek(100)
    file.write(bytes([byte ^ 1]))
  assert str(damaged) in _show(*copied, '--verify', code=1)
  done, said = _rebuild(run, 1)
  assert done.start < older.iteration
  assert any(str(damaged) in text for text in said)
