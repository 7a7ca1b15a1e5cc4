"""`launch.show` and `launch.convert` on what real runs leave behind."""

import dataclasses
import functools
import json
import os
import shutil
import signal
import types

import chex
import jax
import numpy as np
import pytest
from orbax import checkpoint as ocp

from launch import convert as convert_lib
from launch.lm import transformer_job
from launch.offline import (
  entries as entries_lib,
  rebuild,
  scan as offline_scan,
  stored_run,
)
from moetion_jax import (
  config as config_lib,
  errors,
  keys as keys_lib,
  report as report_lib,
)
from moetion_jax.capture import conversion
from moetion_jax.runtime import linux_process
from moetion_jax.runtime.checkpoints import file as checkpoint_file
from moetion_jax.runtime.records import checkpoint_folder
from moetion_jax.snapshots import coverage
from tests.support import helpers, one_process, runs

pytestmark = pytest.mark.timeout(300)

STAGES = 3
ITERATIONS = 40
REFERENCE = 24  # of them, in the undisturbed run
FLAGS = (
  f'--stages={STAGES}',
  '--window_length=3',
  '--clip_norm=0.5',
  '--dropout_rate=0.1',
  '--model=balance=bias',
  '--standby=false',
  f'--data={helpers.DATA}',
)
CACHE = f'--compilation_cache_dir={helpers.CACHE}'


def stop(host, workdir, *flags, at=12, kill=False):
  """Starts a run, and ends it a while after iteration `at`."""
  run = host.train(workdir, *FLAGS, f'--iterations={ITERATIONS}', *flags)
  runs.until(run, f'iteration {at}/')
  if not kill:
    runs.stop(run)
    return
  for pid in host.processes():
    linux_process.send_signal(pid, signal.SIGKILL)
  run.communicate(timeout=runs.SECONDS)
  runs.wait_for(lambda: not host.processes())


def scanned(workdir, hostmem_dir):
  return offline_scan.scan(
    offline_scan.find(str(workdir), str(hostmem_dir)), in_use=False
  )


def host_tree(state):
  return jax.tree.map(np.array, state)


@pytest.fixture(scope='module')
def left(tmp_path_factory):
  """A run that was stopped: its workdir, hostmem_dir and scan."""
  with runs.host() as host:
    workdir = tmp_path_factory.mktemp('left') / 'run'
    stop(host, workdir)
    run = scanned(workdir, host.path)
    last = runs.metrics(workdir)[-1]['iteration']
    yield types.SimpleNamespace(
      workdir=workdir,
      hostmem_dir=host.path,
      run=run,
      last=last,
      config=run.config,
    )


@pytest.fixture(scope='module')
def undisturbed(left):
  """States [stage][iteration] of a run in one process."""
  config = left.config
  workers = one_process.make_workers(config)
  states = [{} for _ in workers]

  def looking(worker):
    plain = worker.train

    def train(train_config, report, stop, **options):
      def look_and_stop():
        states[worker.index][worker.iteration] = host_tree(worker.state)
        return stop()

      return plain(train_config, report, look_and_stop, **options)

    worker.train = train

  for worker in workers:
    looking(worker)
  one_process.train(
    config,
    workers,
    lambda reports: None,
    lambda: workers[0].iteration >= REFERENCE,
    options=[
      {'retain': lambda iteration, log=worker.log: log.retain(iteration - 1)}
      for worker in workers
    ],
  )
  return states


@pytest.fixture(scope='module')
def rebuilders(left):
  """By run and stage, `Rebuilder.rebuild` and what it says; compiled once."""
  data = transformer_job.of(left.config).data()
  made = []
  for stage in range(STAGES):
    # A stage in the middle reads no text.
    made.append(
      rebuild.Rebuilder.compile(
        left.config, stage, data if stage != 1 else None
      )
    )

  def of(run, stage):
    said = []
    return functools.partial(made[stage].rebuild, run, said.append), said

  return of


@pytest.fixture
def copy(left):
  """A copy of the store, to damage."""
  with runs.host() as host:
    shutil.copytree(left.run.folders[0], host.path / left.run.folders[0].name)
    folder = host.path / left.run.folders[0].name

    def scan():
      return scanned(left.workdir, host.path)

    yield types.SimpleNamespace(hostmem_dir=host.path, folder=folder, scan=scan)


def show(workdir, hostmem_dir, *flags):
  return helpers.launch(
    'show', str(workdir), f'--hostmem_dir={hostmem_dir}', *flags
  )


def convert(workdir, hostmem_dir, *flags):
  return helpers.launch(
    'convert', str(workdir), f'--hostmem_dir={hostmem_dir}', CACHE, *flags
  )


def flip(path, offset=None):
  data = bytearray(path.read_bytes())
  data[len(data) // 2 if offset is None else offset] ^= 4
  path.write_bytes(data)


# --- show --------------------------------------------------------------------


def test_show_says_what_there_is(left):
  text = show(left.workdir, left.hostmem_dir, '--verify')
  assert text.returncode == 0, text.stderr
  result = show(left.workdir, left.hostmem_dir, '--json')
  value = json.loads(result.stdout)
  assert result.returncode == 0 and value['damaged'] == []
  assert value['last_line'] == left.last and not value['in_use']
  # Windows of three: the last two snapshots are not the first of a whole one.
  assert value['newest_common_start'] == left.last - 2
  assert f'newest common start: snapshot {left.last - 2}' in text.stdout
  assert 'All checksums are right.' in text.stdout
  job = transformer_job.of(left.config)
  for stage, one in enumerate(value['stages']):
    operators = job.build_stage(stage).partition.operators
    assert one['operators'] == len(operators) and one['generation'] == 1
    iterations = [s['iteration'] for s in one['snapshots']]
    assert iterations[-1] == left.last and len(iterations) >= 6
    window = one['snapshots'][-3:]
    assert sorted(o for s in window for o in s['slot']) == sorted(
      map(str, operators)
    )
    for s in one['snapshots']:
      assert s['covered_operators'] == len(operators) and s['bytes'] > 0
      assert f'{s["slot_operators"]} of {len(operators)}' in text.stdout
    for s in one['starts']:
      if s['iteration']:
        assert s['complete_at'] == s['iteration'] + 2
        assert s['reaches'] == left.last and s['usable']
    ((first, last),) = one['log']['whole_iterations']
    assert first <= left.last - 6 and last == left.last
    assert 0 < one['log']['bytes'] <= one['log']['segment_bytes']
    assert f'iterations {first} to {last} whole' in text.stdout


def test_show_imports_no_jax(left):
  script = (
    'import sys\n'
    'from absl import flags\n'
    'from launch import show\n'
    'flags.FLAGS(["show", "--verify", *sys.argv[2:]])\n'
    'assert show.main(["show", sys.argv[1]]) == 0\n'
    'assert "jax" not in sys.modules\n'
  )
  with runs.host() as host:
    flag = f'--hostmem_dir={left.hostmem_dir}'
    runs.end(host.start('-c', script, str(left.workdir), flag))


def _damage(copy, left, what):
  """Damages something of stage 1; what `show` has to say of it."""
  snapshots = copy.folder / 'stage-1.replica-0.snapshots'
  one = snapshots / str(left.last - 1)
  log = copy.folder / 'stage-1.replica-0.segment'
  header = next(
    h
    for h in left.run.stages[1].entries.values()
    if h.key.iteration == left.last
    and h.key.kind == keys_lib.EntryKind.GRADIENT
  )
  if what == 'snapshot flipped':
    flip(one / 'data', 100)
    return str(one / 'data')
  if what == 'snapshot truncated':
    os.truncate(one / 'data', 4096)
    return f'{one / "data"}: truncated'
  if what == 'manifest flipped':
    flip(one / 'manifest.json')
    return str(one / 'manifest.json')
  if what == 'manifest removed':
    (one / 'manifest.json').unlink()
    return str(one / 'manifest.json')
  if what == 'data removed':
    (one / 'data').unlink()
    return str(one / 'data')
  if what == 'snapshot removed':
    shutil.rmtree(one)
    return str(one)
  if what == 'entry flipped':
    data = log.read_bytes()
    flip(log, len(data) - _ring_bytes(data) + header.offset)
    return str(header.key)
  if what == 'cell flipped':
    flip(log, 4096 + 256 * (header.sequence % _cells(log.read_bytes())) + 8)
    return f'{log}: what cell'
  if what == 'log truncated':
    os.truncate(log, 8192)
    return str(log)
  assert what == 'log removed'
  log.unlink()
  return str(log)


def _cells(data):
  return int.from_bytes(data[8:12], 'little')


def _ring_bytes(data):
  return int.from_bytes(data[40:48], 'little')


SNAPSHOT_DAMAGE = (
  'snapshot flipped',
  'snapshot truncated',
  'manifest flipped',
  'manifest removed',
  'data removed',
  'snapshot removed',
)
LOG_DAMAGE = (
  'entry flipped',
  'cell flipped',
  'log truncated',
  'log removed',
)


@pytest.mark.parametrize('what', SNAPSHOT_DAMAGE + LOG_DAMAGE)
def test_show_names_what_is_damaged(left, copy, what):
  name = _damage(copy, left, what)
  result = show(left.workdir, copy.hostmem_dir, '--verify', '--json')
  assert result.returncode == 1, result.stderr
  value = json.loads(result.stdout)
  (damage,) = value['damaged']
  assert name in damage['message'] and damage['stage'] == 1
  if what in SNAPSHOT_DAMAGE:
    assert damage['iteration'] == left.last - 1
    # Without it, the newest whole window ends before.
    assert value['newest_common_start'] == left.last - 4
  text = show(left.workdir, copy.hostmem_dir, '--verify')
  assert text.returncode == 1 and name in text.stdout


@pytest.fixture
def pending(left):
  """The run, as if it had ended while it went over to other software."""
  entry = {
    'names': ['jaxlib'],
    'from': {'jaxlib': '0'},
    'to': {'jaxlib': '1'},
    'exact_until': left.last - 4,
    'complete_at': [left.last - 2] * STAGES,
    'pending': True,
  }
  path = left.workdir / 'config.json'
  before = path.read_text()
  path.write_text(json.dumps(json.loads(before) | {'changes': [entry]}))
  yield entry
  path.write_text(before)


def test_a_splice_that_is_not_finished(left, pending):
  """Offline too nothing counts but its start: the next start drops the rest."""
  start, last = pending['exact_until'], pending['complete_at'][0]
  run = scanned(left.workdir, left.hostmem_dir)
  for one in run.stages:
    assert [x.iteration for x in one.starts] == [start]
    assert max(one.snapshots) == last and not one.entries
  assert run.newest_common_start == start
  result = show(left.workdir, left.hostmem_dir, '--json')
  assert json.loads(result.stdout)['only_start'] == start
  result = show(left.workdir, left.hostmem_dir)
  assert f'it begins again with state {start}, and drops' in result.stdout
  with pytest.raises(rebuild.UnreachableError):
    rebuild.choose(run.candidates(0), last + 1)


def test_a_splice_whose_start_is_gone(left, pending, copy):
  """The next start begins with state 0 then."""
  start = pending['exact_until']
  for path in copy.hostmem_dir.glob(f'moetion-*/*.snapshots/{start}'):
    shutil.rmtree(path)
  result = show(left.workdir, copy.hostmem_dir)
  assert 'it begins again with state 0, and drops' in result.stdout


# --- convert -----------------------------------------------------------------


@pytest.mark.thorough
@pytest.mark.parametrize('stage', [0, STAGES - 1])
def test_convert_writes_the_undisturbed_state(
  left, undisturbed, tmp_path, stage
):
  out = tmp_path / 'out'
  result = convert(
    left.workdir, left.hostmem_dir, f'--stage={stage}', f'--out={out}'
  )
  assert result.returncode == 0, result.stderr
  assert not result.stderr
  last = left.last
  assert f'state {last}' in result.stdout and f'snapshot {last - 2}' in (
    result.stdout
  )
  for line in (
    f'snapshots: equal, {last - 2} to {last}.',
    f'metrics.jsonl: equal, {last - 1} to {last}.',
    f'with it: equal, {last - 1} to {last}.',
  ):
    assert line in result.stdout
  with ocp.StandardCheckpointer() as checkpointer:
    tree = checkpointer.restore(out)
    metadata = checkpointer.metadata(out).custom_metadata
  assert tree['iteration'] == last
  assert f'digest {metadata["moetion_digests"]["state"]}: ' in result.stdout
  proven = checkpoint_file.load(str(out), 'init_from')  # or it raises
  assert helpers.bits_of(proven) == helpers.bits_of(tree)
  expected = undisturbed[stage][last]
  parameters, optimizer = {}, {}
  for group, leaves in expected.items():
    for name, value in leaves.items():
      if name.startswith('master/'):
        parameters[name.removeprefix('master/')] = value
      else:
        optimizer.setdefault(group, {})[name] = value
  chex.assert_trees_all_equal(host_tree(tree['parameters']), parameters)
  chex.assert_trees_all_equal(host_tree(tree['optimizer']), optimizer)


@pytest.mark.thorough
def test_all_stages_become_one_checkpoint(left, undisturbed, tmp_path):
  out = tmp_path / 'out'
  result = convert(left.workdir, left.hostmem_dir, '--all', f'--out={out}')
  assert result.returncode == 0, result.stderr
  line = left.run.metrics[left.last]
  assert f'State {left.last} of all stages, digest {line["digest"]}: as in' in (
    result.stdout
  )
  tree = checkpoint_file.load(str(out), 'init_from')  # proven
  expected = {
    name.removeprefix('master/'): value
    for stage in undisturbed
    for leaves in stage[left.last].values()
    for name, value in leaves.items()
    if name.startswith('master/')
  }
  chex.assert_trees_all_equal(host_tree(tree['parameters']), expected)
  # Cut anew, it is a beginning like any finished run's.
  flags = [f'--init_from={out}', '--stages=1', f'--workdir={tmp_path / "on"}']
  result = helpers.launch('train', *flags, '--iterations=1', '--dry_run')
  assert result.returncode == 0, result.stderr


@pytest.mark.thorough
@pytest.mark.parametrize('stage', range(STAGES))
def test_every_reachable_state_from_the_newest_start(
  left, undisturbed, rebuilders, stage
):
  rebuilt, said = rebuilders(left.run, stage)
  candidates = left.run.candidates(stage)
  first = min(c.start.complete_at for c in candidates if c.start.iteration)
  for iteration in range(first, left.last + 1):
    done = rebuilt(iteration)
    assert (done.iteration, done.start) == (iteration, iteration - 2)
    assert done.is_verified and done.entries > 0
    assert done.losses == done.whole_digests == (iteration - 1, iteration)
    chex.assert_trees_all_equal(
      host_tree(done.state), undisturbed[stage][iteration]
    )
  done = rebuilt(start=first - 2)  # trains on
  assert done.iteration == left.last and done.start == first - 2
  chex.assert_trees_all_equal(
    host_tree(done.state), undisturbed[stage][left.last]
  )
  assert not said
  with pytest.raises(rebuild.UnreachableError, match=f'{left.last + 1} cannot'):
    rebuilt(left.last + 1)
  with pytest.raises(rebuild.UnreachableError, match='no start'):
    rebuilt(start=left.last - 1)


def test_the_digests_are_those_of_the_metrics(left, rebuilders):
  digests = {}
  for stage in range(STAGES):
    done = rebuilders(left.run, stage)[0](left.last - 1)
    digests |= done.digests
  line = runs.metrics(left.workdir)[left.last - 2]
  assert report_lib.combine(digests) == line['digest']


def test_digests_are_not_of_operators_that_nobody_names(left):
  """Snapshots of a part do not say which operators there are."""
  stage = left.run.stages[0]
  newest = max(stage.snapshots)
  assert stage.digests(newest).keys() == stage.operators
  (one,) = stage.snapshots[newest].shares
  part = dataclasses.replace(one.share, compute=frozenset())
  found = (dataclasses.replace(one, share=part),)
  stage = dataclasses.replace(
    stage, snapshots={newest: stored_run.SnapshotInfo(found=found)}
  )
  assert len(stage.operators) == one.digests
  assert stage.digests(newest) is None


@pytest.mark.thorough
def test_all_killed(left, undisturbed, rebuilders, tmp_path):
  """In the middle of something: the stages were not equally far."""
  with runs.host() as host:
    stop(host, tmp_path / 'run', at=10, kill=True)
    result = show(tmp_path / 'run', host.path, '--verify')
    assert result.returncode == 0, result.stdout
    assert 'of a stopped run' in result.stdout
    run = scanned(tmp_path / 'run', host.path)
    assert run.config == left.config
    for stage in range(STAGES):
      rebuilt, said = rebuilders(run, stage)
      done = rebuilt()
      assert done.iteration >= 10 and not said
      chex.assert_trees_all_equal(
        host_tree(done.state), undisturbed[stage][done.iteration]
      )


# --- damage ------------------------------------------------------------------


@pytest.mark.parametrize('what', SNAPSHOT_DAMAGE)
def test_an_older_start_is_used_and_the_damage_named(
  left, copy, undisturbed, rebuilders, what
):
  name = _damage(copy, left, what)
  rebuilt, said = rebuilders(copy.scan(), 1)
  done = rebuilt()
  assert (done.start, done.complete_at) == (left.last - 4, left.last - 2)
  assert done.iteration == left.last and done.is_verified
  assert left.last - 1 not in done.snapshots
  assert name in '\n'.join(said)
  chex.assert_trees_all_equal(host_tree(done.state), undisturbed[1][left.last])


def test_convert_says_what_is_damaged(left, copy):
  name = _damage(copy, left, 'snapshot flipped')
  result = convert(left.workdir, copy.hostmem_dir, '--stage=1')
  assert result.returncode == 0, result.stderr
  assert f'Not from snapshot {left.last - 2}' in result.stderr
  assert name in result.stderr
  assert f'from snapshot {left.last - 4}' in result.stdout


def test_a_damaged_start_that_is_asked_for(left, copy, rebuilders):
  name = _damage(copy, left, 'snapshot flipped')
  rebuilt, _ = rebuilders(copy.scan(), 1)
  with pytest.raises(conversion.SnapshotLostError, match=name):
    rebuilt(start=left.last - 2)


def test_damage_of_two_snapshots(left, copy, undisturbed, rebuilders):
  folder = copy.folder / 'stage-1.replica-0.snapshots'
  flip(folder / str(left.last) / 'data', 100)
  flip(folder / str(left.last - 4) / 'data', 100)
  rebuilt, said = rebuilders(copy.scan(), 1)
  done = rebuilt()
  assert done.start == left.last - 3
  assert len(said) == 1  # once, though the next attempt does without as well
  assert str(folder / str(left.last) / 'data') in said[0]
  chex.assert_trees_all_equal(host_tree(done.state), undisturbed[1][left.last])
  done = rebuilt(left.last - 2)
  assert done.start < left.last - 6 and done.iteration == left.last - 2
  assert str(folder / str(left.last - 4) / 'data') in said[-1]
  chex.assert_trees_all_equal(
    host_tree(done.state), undisturbed[1][left.last - 2]
  )


@pytest.mark.parametrize('what', LOG_DAMAGE)
def test_a_damaged_log_of_a_neighbour(
  left, copy, undisturbed, rebuilders, what
):
  """An older start is of no use: the newest state before it is."""
  name = _damage(copy, left, what)
  rebuilt, said = rebuilders(copy.scan(), 0)
  if what.startswith('log'):
    with pytest.raises(rebuild.UnreachableError, match='nothing is left'):
      rebuilt()
    assert name in said[0]
    with pytest.raises(
      rebuild.UnreachableError, match='have no gradient of st'
    ):
      rebuilt(left.last)
    return
  done = rebuilt()
  assert done.iteration == left.last - 1
  assert name in said[0]
  chex.assert_trees_all_equal(
    host_tree(done.state), undisturbed[0][left.last - 1]
  )
  with pytest.raises(rebuild.UnreachableError, match='have no gradient of st'):
    rebuilt(left.last)


def test_a_snapshot_that_lies(left, copy, undisturbed, rebuilders):
  """Right checksums and wrong contents: digests tell, an older one is used."""
  path = copy.scan().stages[1].snapshots[left.last - 2].path
  helpers.make_lie(path, 'master')
  assert show(left.workdir, copy.hostmem_dir, '--verify').returncode == 0
  rebuilt, said = rebuilders(copy.scan(), 1)
  done = rebuilt()
  # The snapshots before that one need it.
  assert done.start == left.last - 5 and done.iteration == left.last
  assert len(said) == 1 and 'has another digest than before' in said[0]
  chex.assert_trees_all_equal(host_tree(done.state), undisturbed[1][left.last])


def test_a_snapshot_of_another_iteration(left, copy, rebuilders):
  path = copy.scan().stages[1].snapshots[left.last - 2].path
  shutil.rmtree(path)
  shutil.copytree(path.with_name(str(left.last - 5)), path)
  rebuilt, said = rebuilders(copy.scan(), 1)
  assert rebuilt().start == left.last - 5
  assert said == [f'{path}: is one of iteration {left.last - 5}']


def test_metrics_of_another_run(left, copy, rebuilders, tmp_path):
  lines = runs.metrics(left.workdir)
  lines[-1]['loss_hex'] = (1.5).hex()
  (tmp_path / 'metrics.jsonl').write_text(
    ''.join(json.dumps(line) + '\n' for line in lines)
  )
  run = dataclasses.replace(copy.scan(), workdir=tmp_path)
  rebuilt, said = rebuilders(run, 1)
  with pytest.raises(rebuild.DifferentError, match='loss of iteration'):
    rebuilt(start=left.last - 2)
  with pytest.raises(rebuild.UnreachableError, match='cannot be reached'):
    rebuilt(left.last)
  assert 'loss of iteration' in said[0]


# --- refusals ----------------------------------------------------------------


@pytest.mark.thorough
def test_a_living_run(tmp_path):
  with runs.host() as host:
    run = host.train(tmp_path / 'run', *FLAGS, '--iterations=4000')
    runs.until(run, 'iteration 9/')
    result = convert(tmp_path / 'run', host.path, '--stage=0')
    assert result.returncode == 2 and 'living run' in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    for _ in range(3):
      result = show(tmp_path / 'run', host.path, '--verify')
      assert result.returncode == 0, result.stdout + result.stderr
      assert 'in use by a living run' in result.stdout
    assert runs.stop(run).startswith('Stopped after')


def _refused(result, *words):
  assert result.returncode == 2, result.stdout + result.stderr
  assert len(result.stderr.strip().splitlines()) == 1, result.stderr
  for word in words:
    assert word in result.stderr


def test_nothing_to_look_at(left, tmp_path):
  empty = tmp_path / 'empty'
  empty.mkdir()
  for launch, flags in ((show, ()), (convert, ('--stage=0',))):
    _refused(
      launch(tmp_path / 'no', left.hostmem_dir, *flags),
      'holds no run',
      str(tmp_path / 'no' / 'config.json'),
    )
    _refused(
      launch(left.workdir, empty, *flags),
      'has no store of',
      str(empty / left.run.folders[0].name),
    )
  _refused(show(left.workdir, tmp_path / 'no'), 'no such directory')
  _refused(helpers.launch('show'), 'name the folder')
  finished = tmp_path / 'finished'
  shutil.copytree(left.workdir, finished)
  (finished / 'checkpoint').mkdir()
  _refused(show(finished, empty), f'a copy of {left.workdir}', '--hostmem_dir')
  (finished / 'checkpoint' / 'commit_success.txt').touch()
  _refused(show(finished, empty), 'name the --hostmem_dir')  # not the end's
  with open(finished / 'metrics.jsonl', 'a') as file:
    iterations = left.run.config.train.iterations
    file.write(json.dumps({'iteration': iterations}) + '\n')
  _refused(show(finished, empty), 'is finished', str(finished / 'checkpoint'))
  (finished / 'config.json').write_text('{"preset": ')
  _refused(show(finished, empty), 'config.json is damaged')


def test_wrong_flags_of_convert(left, tmp_path):
  refuse = lambda *flags: convert(left.workdir, left.hostmem_dir, *flags)  # noqa: E731
  _refused(refuse('--stage=3'), '--stage=3', '0 to 2')
  _refused(refuse(), '--stage', 'name one stage, or pass --all')
  _refused(refuse('--stage=0', '--all'), '--stage=0', 'name one stage')
  _refused(refuse('--all', '--start=3'), '--start=3', 'is of one --stage')
  _refused(refuse('--stage=0', f'--out={tmp_path}'), '--out', 'exists')
  long = f'--out={tmp_path}/{"x" * 500}'
  _refused(refuse('--stage=0', long), '--out', 'File name too long')
  # It would pass for the checkpoint of the finished run.
  for folder in (left.workdir / 'checkpoint', left.run.folders[0] / 'x'):
    _refused(refuse('--stage=0', f'--out={folder}'), '--out', 'name a folder')
    assert not folder.exists()
  other = tmp_path / 'other.txt'
  other.write_text('Something else. ' * 10000)
  _refused(refuse('--stage=0', f'--data={other}'), 'not the text of the run')
  # A stage in the middle reads no text.
  result = refuse('--stage=1', f'--data={other}')
  assert result.returncode == 0, result.stderr
  result = refuse('--stage=1', f'--iteration={ITERATIONS}')
  assert result.returncode == 1 and 'cannot be reached' in result.stderr


def test_another_environment_is_refused_by_name(left):
  here = left.run.found_out['environment']
  there = {**here, 'versions': {**here['versions'], 'jaxlib': '0.0.1'}}
  run = dataclasses.replace(left.run, found_out={'environment': there})
  with pytest.raises(errors.ConfigError) as refused:
    convert_lib.check_environment(run, 0, here, [])
  assert 'jaxlib=0.0.1, here ' in str(refused.value)
  assert '--accept_changes=jaxlib' in str(refused.value)
  assert convert_lib.check_environment(run, 0, here, ['jaxlib'])
  with pytest.raises(errors.ConfigError, match='accept_changes=jaxlob'):
    convert_lib.check_environment(run, 0, here, ['jaxlob', 'jaxlib'])
  assert not convert_lib.check_environment(left.run, 0, here, [])


def test_the_environment_of_an_earlier_version_is_compared(left):
  here = left.run.found_out['environment']
  software = {**here['versions'], **here['device']}
  run = dataclasses.replace(left.run, found_out={'software': software})
  assert not convert_lib.check_environment(run, 0, here, [])
  assert convert_lib.recorded_cores(run, 0) == here['device']['cores']
  software['jax'] = '0.0.1'
  with pytest.raises(errors.ConfigError, match='jax=0.0.1'):
    convert_lib.check_environment(run, 0, here, [])


@pytest.mark.thorough
def test_stages_on_several_hosts(undisturbed, rebuilders, tmp_path):
  with runs.host() as host:
    stop(host, tmp_path / 'run', '--local_hosts=2', at=8)
    result = show(tmp_path / 'run', host.path, '--verify', '--json')
    assert result.returncode == 0, result.stdout
    value = json.loads(result.stdout)
    assert len(value['stores']) == 2
    assert [s['store'] for s in value['stages']] == [
      value['stores'][h] for h in (0, 0, 1)
    ]
    run = scanned(tmp_path / 'run', host.path)
    for stage in range(STAGES):
      done = rebuilders(run, stage)[0]()
      assert done.is_verified and done.iteration == value['last_line']
      chex.assert_trees_all_equal(
        host_tree(done.state), undisturbed[stage][done.iteration]
      )


def test_a_run_of_another_job(left):
  """It is shown; to make a state of it would take its model."""
  file = left.workdir / 'config.json'
  before = show(left.workdir, left.hostmem_dir, '--json').stdout
  content = file.read_text()
  known = json.loads(content)
  for name in ('preset', 'model', 'data'):
    del known[name]
  file.write_text(json.dumps({'name': 'mine', **known}))
  try:
    shown = show(left.workdir, left.hostmem_dir, '--json')
    refused = convert(left.workdir, left.hostmem_dir, '--stage=0')
  finally:
    file.write_text(content)
  assert shown.returncode == 0 and json.loads(shown.stdout) == json.loads(
    before
  )
  _refused(refused, 'a run of another job than that of launch.train')


def test_another_initial_state_than_the_run_began_with(left, tmp_path):
  """It is compared where a state is made of it."""
  job = transformer_job.of(left.config)
  stages = [job.build_stage(index) for index in range(STAGES)]
  states = [stage.initial_state() for stage in stages]
  digests = {}
  for stage, state in zip(stages, states, strict=True):
    digests |= helpers.digests_of(stage, state)
  path = str(tmp_path / 'checkpoint')
  checkpoint_file.save(path, states, 0, left.run.settings, digests)
  digest = checkpoint_folder.digest_of(path)
  began = dataclasses.replace(
    left.run,
    settings={**left.run.settings, 'init_from': path},
    found_out={**left.run.found_out, 'init_digest': digest},
  )
  tools = rebuild.Rebuilder.compile(began.config, 1, None)
  done = tools.rebuild(began, print, 0)
  chex.assert_trees_all_equal(host_tree(done.state), host_tree(states[1]))
  found = {**left.run.found_out, 'init_digest': 'other'}
  other = dataclasses.replace(began, found_out=found)
  with pytest.raises(errors.ConfigError, match='--init_from=.*has changed'):
    tools.rebuild(other, print, 0)


# --- pure --------------------------------------------------------------------


def test_names_are_those_of_the_conversion():
  assert (stored_run.DIGESTS, stored_run.PARTIALS) == (
    conversion.DIGESTS,
    conversion.PARTIALS,
  )


@pytest.mark.parametrize(
  ('stage', 'scalars', 'expected'),
  [
    (0, False, ['GRADIENT 1'] * 2),
    (1, False, ['ACTIVATION 0'] * 2 + ['GRADIENT 2'] * 2),
    (2, False, ['ACTIVATION 1'] * 2),
    (
      1,
      True,
      ['ACTIVATION 0'] * 2 + ['GRADIENT 2'] * 2 + ['SCALARS 0', 'SCALARS 2'],
    ),
  ],
)
def test_needed_entries(stage, scalars, expected):
  train = config_lib.TrainConfig(stages=3, microbatches=2, eval_every=1)
  keys = entries_lib.needed_entries(train, stage, 5, scalars=scalars)
  assert sorted(f'{k.kind.name} {k.stage}' for k in keys) == expected


def test_published_entries_are_all_that_a_log_has(left):
  train = left.config.train
  for one in left.run.stages:
    found = {k for k in one.entries if k.iteration == left.last}
    expected = entries_lib.published_entries(train, one.stage, left.last)
    assert found == set(expected)


def _candidate(start, complete_at, reaches):
  return stored_run.Candidate(
    start=coverage.Start(iteration=start, complete_at=complete_at),
    reaches=reaches,
    missing=None,
  )


@pytest.mark.parametrize(
  ('iteration', 'start', 'excluded', 'expected'),
  [
    (None, None, (), (7, 12)),
    (8, None, (), (6, 8)),
    (6, None, (), (2, 6)),
    (12, None, (7,), (6, 12)),
    (0, None, (), (0, 0)),
    (None, 2, (), (2, 6)),
    (7, None, (), None),
    (13, None, (), None),
    (12, 2, (), None),
    (None, 9, (), None),  # valid, but the log ends before it is complete
  ],
)
def test_choose(iteration, start, excluded, expected):
  candidates = [
    _candidate(0, 0, 0),
    _candidate(2, 4, 6),
    _candidate(6, 8, 12),
    _candidate(7, 9, 12),
    _candidate(9, 13, 12),
  ]
  if expected is None:
    with pytest.raises(
      rebuild.UnreachableError, match='starts: 0 leads to 0; 2 '
    ):
      rebuild.choose(candidates, iteration, start, excluded)
    return
  candidate, goal = rebuild.choose(candidates, iteration, start, excluded)
  assert (candidate.start.iteration, goal) == expected


def test_runs_of():
  runs_of = stored_run.runs_of([7, 3, 5, 4])
  assert runs_of == [(3, 5), (7, 7)]
  assert stored_run.format_runs(runs_of) == '3 to 5, 7'
