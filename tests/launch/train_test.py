"""The real program, as a user runs it."""

import dataclasses
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest

from moetion_jax import errors, report
from tests.support import helpers, runs

pytestmark = pytest.mark.timeout(300)


def _lines(workdir):
  return [json.loads(x) for x in open(pathlib.Path(workdir, 'metrics.jsonl'))]


@pytest.fixture(scope='module')
def finished(tmp_path_factory):
  """Workdir of a finished run."""
  workdir = tmp_path_factory.mktemp('train') / 'run'
  result = helpers.launch('train', *helpers.train_flags(workdir))
  assert result.returncode == 0, result.stderr
  assert 'held-out' in result.stdout and 'tokens/s' in result.stdout
  return workdir


def test_the_files_of_a_run(finished):
  lines = _lines(finished)
  assert [x['iteration'] for x in lines] == [1, 2, 3, 4, 5, 6]
  assert lines[-1]['loss'] < lines[0]['loss']
  assert ['eval_loss' in x for x in lines] == [0, 0, 1, 0, 0, 1]
  assert all(float.fromhex(x['loss_hex']) == x['loss'] for x in lines)
  assert len({x['digest'] for x in lines}) == 6
  config = json.loads((finished / 'config.json').read_text())
  assert config['preset'] == 'tiny' and config['environment']['versions']['jax']
  assert len(config['data_fingerprint']['blake2b']) >= 32
  workers = json.loads((finished / 'workers.json').read_text())
  assert [w['state'] for w in workers['workers']] == ['finished'] * 2
  assert len({w['pid'] for w in workers['workers']}) == 2
  kinds = [json.loads(x)['kind'] for x in open(finished / 'events.jsonl')]
  assert (kinds[0], kinds[-1]) == ('start', 'finished')
  assert (finished / 'logs').is_dir()


def test_same_flags_same_bits(finished, tmp_path):
  result = helpers.launch('train', *helpers.train_flags(tmp_path / 'again'))
  assert result.returncode == 0, result.stderr
  for a, b in zip(_lines(finished), _lines(tmp_path / 'again'), strict=True):
    assert a['loss_hex'] == b['loss_hex']
    assert a['digest'] == b['digest']
    assert a.get('eval_loss_hex') == b.get('eval_loss_hex')


def test_a_checkpoint_needs_none_of_our_code(finished, tmp_path):
  script = (
    'import sys, numpy as np\n'
    'from orbax import checkpoint as ocp\n'
    f'tree = ocp.StandardCheckpointer().restore({str(finished)!r}'
    " + '/checkpoint')\n"
    'try:\n  import moetion_jax\n  sys.exit(3)\n'
    'except ImportError:\n  pass\n'
    "w = np.asarray(tree['parameters']['layers/3/experts/w_up'])\n"
    "print(tree['iteration'], w.shape, w.dtype, np.isfinite(w).all())\n"
  )
  result = subprocess.run(
    [sys.executable, '-P', '-c', script],
    cwd=tmp_path,
    capture_output=True,
    text=True,
    timeout=60,
  )
  assert result.returncode == 0, result.stderr
  assert result.stdout.split('\n')[-2] == '6 (4, 32, 32) float32 True'


@pytest.mark.thorough
def test_init_from_continues_from_the_exact_state(finished, tmp_path):
  """Iteration 1 of a run with no step at all leaves the checkpoint's state."""
  flags = helpers.train_flags(
    tmp_path / 'next', f'--init_from={finished}/checkpoint', '--stages=3'
  )
  result = helpers.launch('train', *flags)
  assert result.returncode == 0, result.stderr
  # Its first loss is that of the trained model, not of a fresh one.
  assert (
    _lines(tmp_path / 'next')[0]['loss'] < _lines(finished)[0]['loss'] - 0.5
  )


def test_init_from_is_bitwise(finished, tmp_path):
  from launch.lm import checkpoint, transformer_job
  from moetion_jax.runtime.checkpoints import file as checkpoint_file, restore

  config = checkpoint.load_config(str(finished / 'checkpoint'), 'init_from')
  tree = checkpoint_file.load(str(finished / 'checkpoint'), 'init_from')
  digests, state, stage = {}, {}, None
  for index in range(config.train.stages):
    stage = transformer_job.of(config).build_stage(index)
    state = restore.initial(stage, tree, 'x', 'init_from')()
    digests |= helpers.digests_of(stage, state)
  assert stage
  assert report.combine(digests) == _lines(finished)[-1]['digest']
  fresh = restore.initial(stage, tree, 'x', 'y', weights_only=True)()
  np.testing.assert_array_equal(
    fresh['head']['master/head/table'], state['head']['master/head/table']
  )
  counts = [v for k, v in fresh['head'].items() if k.endswith('count')]
  assert counts and not any(np.any(np.asarray(c)) for c in counts)


@pytest.mark.parametrize('optimizer', ['lion', 'sgd', 'muon'])
def test_init_from_with_another_optimizer(finished, optimizer):
  """Also where its state is a part of the other's, as lion's of adamw's."""
  from launch.lm import checkpoint, transformer_job
  from moetion_jax.runtime.checkpoints import file as checkpoint_file, restore

  path = str(finished / 'checkpoint')
  config = checkpoint.load_config(path, 'init_from')
  assert config.train.optimizer.optimizer == 'adamw'
  tree = checkpoint_file.load(path, 'init_from')
  restore.initial(
    transformer_job.of(config).build_stage(0), tree, path, 'init_from'
  )
  other = dataclasses.replace(config.train.optimizer, optimizer=optimizer)
  train = dataclasses.replace(config.train, optimizer=other)
  stage = transformer_job.of(
    dataclasses.replace(config, train=train)
  ).build_stage(0)
  with pytest.raises(errors.ConfigError, match='--init_weights_only'):
    restore.initial(stage, tree, path, 'init_from')
  restore.initial(stage, tree, path, 'init_from', weights_only=True)


def test_a_finished_run_says_so(finished):
  result = helpers.launch('train', *helpers.train_flags(finished))
  assert result.returncode == 0
  assert 'finished' in result.stdout and '--fresh' in result.stdout


def test_a_worker_that_cannot_be_started_is_named(host, tmp_path):
  """Whatever is missing for it; here: descriptors."""
  limited = """
import os, resource, sys
resource.setrlimit(resource.RLIMIT_NOFILE, (16, 16))
os.execv(sys.executable, [sys.executable, '-m', 'launch.train', *sys.argv[1:]])
"""
  flags = helpers.train_flags(tmp_path / 'run', f'--hostmem_dir={host.path}')
  _, err = runs.end(host.start('-c', limited, *flags), 1)
  assert 'Traceback' not in err
  assert 'worker.main: Too many open files: raise the limit' in err


def test_another_run_in_the_same_workdir_is_refused(finished):
  flags = helpers.train_flags(finished, '--seed=7')
  result = helpers.launch('train', *flags)
  assert result.returncode == 2
  assert 'train.seed' in result.stderr and '--fresh' in result.stderr
  assert len(result.stderr.strip().splitlines()) == 1


@pytest.mark.thorough
def test_sigterm_then_a_line_that_says_something_else(host, tmp_path):
  workdir = tmp_path / 'run'
  # Of a window the last iterations are done again.
  flag = '--window_length=4'
  run = host.train(workdir, flag)
  runs.until(run, 'iteration 6/')
  said = runs.stop(run, signal.SIGTERM)
  assert said.startswith('Stopped after iteration')
  lines = _lines(workdir)
  assert 6 <= len(lines) < runs.ITERATIONS
  assert not (workdir / 'checkpoint').exists()
  path = workdir / 'metrics.jsonl'
  path.write_text(path.read_text().replace(lines[-1]['digest'], '0' * 16))
  _, err = runs.end(host.train(workdir, flag), 2)
  said = f'has digest {"0" * 16} for iteration {len(lines)}'
  assert said in err and '--fresh' in err
  assert host.has_ended()
  out, _ = runs.end(host.train(workdir, '--fresh', '--iterations=1'))
  assert 'removed as soon as' in out and len(_lines(workdir)) == 1
  assert host.is_clean()


@pytest.mark.parametrize(
  ('flags', 'words'),
  [
    (['--preset=huge'], ['--preset=huge', 'tiny']),
    (['--optimizer=adamm'], ['--optimizer=adamm', 'adamw']),
    (['--iterations=many'], ['--iterations=many']),
    (['--no_such_flag=1'], ['no_such_flag']),
    (['--stages=5'], ['--stages=5', '4']),
    (['--local_devices=3', '--microbatch_size=6'], ['--local_devices=3']),
    (['--local_devices=3'], ['--microbatch_size=8', 'local_devices=3']),
    (['--data=/no/such/file'], ['--data=/no/such/file']),
    (['--model=vocab_size=100'], ['--data=', 'vocab_size']),
    (['--data=tests/no*such'], ['--data=tests/no*such']),
    (['--init_from=/no/such/folder'], ['--init_from=/no/such/folder']),
    (['stray'], ['stray']),
  ],
)
def test_bad_input_is_one_line_and_exit_code_2(tmp_path, flags, words):
  result = helpers.launch(
    # One worker, where it takes a worker to find out.
    'train',
    *helpers.train_flags(tmp_path / 'run', '--stages=1', *flags),
  )
  assert result.returncode == 2, (result.stdout, result.stderr)
  assert len(result.stderr.strip().splitlines()) == 1, result.stderr
  for word in words:
    assert word in result.stderr
  assert not (tmp_path / 'run' / 'metrics.jsonl').exists()


@pytest.mark.thorough
def test_bad_init_from(finished, tmp_path):
  corrupt = tmp_path / 'corrupt'
  shutil.copytree(finished / 'checkpoint', corrupt)
  for path in corrupt.rglob('*'):
    if path.is_file() and path.stat().st_size > 4096:
      content = bytearray(path.read_bytes())
      middle = len(content) // 2
      content[middle : middle + 2048] = os.urandom(2048)
      path.write_bytes(content)
  empty = tmp_path / 'empty'
  empty.mkdir()
  for folder in (corrupt, empty):
    result = helpers.launch(
      'train',
      *helpers.train_flags(
        tmp_path / 'run', '--stages=1', f'--init_from={folder}'
      ),
    )
    assert result.returncode == 2, result.stderr
    assert f'--init_from={folder}' in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
  wide = helpers.launch(
    'train',
    *helpers.train_flags(
      tmp_path / 'run',
      f'--init_from={finished}/checkpoint',
      '--stages=1',
      '--model=model_dim=64',
    ),
  )
  assert wide.returncode == 2 and 'the run needs' in wide.stderr


@pytest.mark.thorough
def test_a_damaged_checkpoint_is_used_by_nobody(finished, tmp_path):
  """16 bytes of the largest file, which Orbax restores without a word."""
  path = tmp_path / 'damaged'
  shutil.copytree(finished / 'checkpoint', path)
  reads = {
    'generate': ['generate', f'--checkpoint={path}', '--tokens=2'],
    'init_from': ['train', f'--init_from={path}'],
    'weights': ['train', f'--init_from={path}', '--init_weights_only'],
  }

  def read(name):
    module, *flags = reads[name]
    if module == 'train':
      workdir = tmp_path / name
      flags = helpers.train_flags(workdir, *flags, '--stages=1', '--fresh')
    return helpers.launch(module, *flags)

  for name in reads:
    assert read(name).returncode == 0
  files = [file for file in path.rglob('*') if file.is_file()]
  largest = max(files, key=lambda file: file.stat().st_size)
  content = largest.read_bytes()
  middle = len(content) // 2
  damaged = b'\x5a' * 16
  largest.write_bytes(content[:middle] + damaged + content[middle + 16 :])
  for name in reads:
    result = read(name)
    assert result.returncode == 2, (name, result.stdout, result.stderr)
    assert f'={path}: ' in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1, result.stderr


@pytest.mark.thorough
def test_nan_loss_ends_the_run(host, tmp_path):
  """At once: done again, it would be the same."""
  run = host.train(
    tmp_path / 'run',
    '--optimizer=sgd',
    '--learning_rate=1e30',
    '--clip_norm=0',
  )
  _, err = runs.end(run, 1)
  assert 'iteration' in err and 'stage 0' in err
  assert runs.kinds(tmp_path / 'run')[-1] == 'failed'
  assert 'recovery_started' not in runs.kinds(tmp_path / 'run')
  assert host.has_ended()


def test_print_config_is_json_and_writes_nothing(tmp_path):
  result = helpers.launch(
    'train', *helpers.train_flags(tmp_path / 'run', '--print_config')
  )
  assert result.returncode == 0
  assert json.loads(result.stdout)['train']['iterations'] == 6
  assert not (tmp_path / 'run').exists()


def test_generate_is_deterministic_text(finished):
  def sample(*more):
    result = helpers.launch(
      'generate',
      f'--checkpoint={finished}/checkpoint',
      '--prompt=def ',
      '--tokens=12',
      *more,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout

  first = sample()
  assert first.startswith('def ') and len(first) > 5
  assert sample() == first
  assert sample('--seed=1') != first


def test_generate_refuses_what_is_no_checkpoint(tmp_path):
  result = helpers.launch('generate', f'--checkpoint={tmp_path}')
  assert result.returncode == 2
  assert f'--checkpoint={tmp_path}' in result.stderr
