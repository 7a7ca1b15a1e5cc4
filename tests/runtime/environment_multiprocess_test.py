"""Runs that are begun with one environment and go on with another."""

import json
import os
import shutil
import signal

import numpy as np
import pytest

from tests.support import helpers, runs

pytestmark = [pytest.mark.thorough, pytest.mark.timeout(400)]

_ITERATIONS = 24
_STOPPED_AT = 8  # or a few later
_X64 = {'JAX_ENABLE_X64': '1'}
_FAST = {'XLA_FLAGS': '--xla_cpu_enable_fast_math=true'}
_ACCEPTED = '--accept_changes=xla_cpu_enable_fast_math'
_POLICIES = {
  'sparse': ('--window_length=3',),
  'dense': ('--policy=dense', '--interval=3'),
}


def _train(host, workdir, *flags, environment=()):
  return host.train(
    workdir,
    '--stages=2',
    f'--iterations={_ITERATIONS}',
    '--dropout_rate=0.1',
    *flags,
    environment=environment,
  )


def _stop(host, workdir, *flags):
  run = _train(host, workdir, *flags)
  runs.until(run, f'iteration {_STOPPED_AT}/')
  runs.stop(run)


def _copy(source, target):
  """Copies a folder's content: what is there afterwards is as in `source`."""
  shutil.rmtree(target, ignore_errors=True)
  shutil.copytree(source, target)


@pytest.fixture(scope='module')
def undisturbed(tmp_path_factory):
  """The bits of a run whose environment stays."""
  return runs.bits(
    runs.undisturbed_metrics(
      tmp_path_factory,
      lambda host, workdir: _train(host, workdir, *_POLICIES['sparse']),
      _ITERATIONS,
    )
  )


def _check_convert(host, workdir, start):
  """Offline the state is rebuilt across a splice too, where software fits."""
  command = (
    '-m', 'launch.convert', str(workdir), f'--hostmem_dir={host.path}',
    '--stage=1', f'--compilation_cache_dir={helpers.CACHE}',
  )  # fmt: skip
  _, err = runs.end(host.start(*command), 2)
  assert 'xla_cpu_enable_fast_math=true, here (not set)' in err
  out, _ = runs.end(host.start(*command, environment=_FAST))
  assert f'from snapshot {start}' in out and 'all equal' in out


def _config(workdir):
  return json.loads((workdir / 'config.json').read_text())


def test_another_environment_is_refused_by_name(host, workdir):
  flags = _POLICIES['sparse']
  _stop(host, workdir, *flags)
  before = _config(workdir), runs.bits(runs.metrics(workdir))
  for environment, name, change in (
    (_X64, 'jax_enable_x64', 'jax_enable_x64=false, here true'),
    (_FAST, 'xla_cpu_enable_fast_math', '=(not set), here true'),
  ):
    run = _train(host, workdir, *flags, environment=environment)
    _, err = runs.end(run, 2)
    assert f'--workdir={workdir}: holds a run made with {name}' in err
    assert change in err and f'--accept_changes={name}' in err
    words = err.strip().splitlines()  # workers may have printed warnings by now
    assert len([line for line in words if not line.startswith('[stage')]) == 1
  run = _train(
    host, workdir, *flags, '--accept_changes=fast_math', environment=_FAST
  )
  _, err = runs.end(run, 2)
  assert '--accept_changes=fast_math' in err
  assert 'what changed is xla_cpu_enable_fast_math' in err
  assert before == (_config(workdir), runs.bits(runs.metrics(workdir)))
  out, _ = runs.end(_train(host, workdir, *flags))  # nothing is lost
  assert 'Going on with iteration' in out
  assert len(runs.metrics(workdir)) == _ITERATIONS


@pytest.mark.parametrize('policy', _POLICIES)
def test_an_accepted_change_and_failures_soon_after(
  host, tmp_path, undisturbed, policy
):
  """With and without failures the same bits come out, whole up to the splice.

  The second run begins as if the first start with the change had died before
  anything was removed.
  """
  flags, workdir = _POLICIES[policy], tmp_path / 'run'
  _stop(host, workdir, *flags)
  kept = tmp_path / 'kept'
  _copy(workdir, kept / 'workdir')
  (store,) = host.path.iterdir()
  _copy(store, host.path.parent / f'{host.path.name}-kept')
  kept_store = host.path.parent / f'{host.path.name}-kept'
  try:
    run = _train(host, workdir, *flags, _ACCEPTED, environment=_FAST)
    out, _ = runs.end(run)
    (event,) = runs.of_kind(workdir, 'changes_accepted')
    exact = event['exact_until']
    assert 0 < exact < _ITERATIONS
    assert event['from'] == {'xla_cpu_enable_fast_math': None}
    assert event['to'] == {'xla_cpu_enable_fast_math': 'true'}
    assert f'Other bits than before from iteration {exact + 1} on' in out
    expected = runs.bits(runs.metrics(workdir))
    assert expected[:exact] == undisturbed[:exact]
    # Something did change, or the rest of this test says nothing.
    assert expected[-1] != undisturbed[-1]
    runs.check_finished(host, workdir, expected)
    done = _config(workdir)
    assert done['environment']['xla_flags']['xla_cpu_enable_fast_math'] == (
      'true'
    )
    (change,) = done['changes']
    assert change['exact_until'] == exact and 'pending' not in change

    _copy(kept / 'workdir', workdir)
    shutil.copytree(kept_store, store)
    half = done | {'changes': [change | {'pending': True}]}
    (workdir / 'config.json').write_text(json.dumps(half))
    last = max(change['complete_at'])
    faults = [
      f'--fail=kill:stage=1,iteration={exact + 1},phase=backward',
      f'--fail=kill:stage=0,iteration={last + 1},phase=forward',
      f'--fail=kill_agent:iteration={last + 2},phase=update',
      f'--fail=kill:stage=1,iteration={last + 3},phase=update',
    ]
    runs.end(
      _train(host, workdir, *flags, *faults, environment=_FAST),
      -signal.SIGKILL,
    )
    runs.wait_for(lambda: not host.processes())
    if policy == 'sparse':
      _check_convert(host, workdir, exact)
    runs.end(_train(host, workdir, *flags, *faults, environment=_FAST))
    runs.check_finished(host, workdir, expected)
    assert len(runs.of_kind(workdir, 'failure')) == 3
    assert len(runs.of_kind(workdir, 'changes_accepted')) == 1
  finally:
    shutil.rmtree(kept_store, ignore_errors=True)


def test_what_is_installed_under_a_living_run_is_found_out(
  host, tmp_path, undisturbed
):
  """A replacement that would compute with something else refuses by name."""
  flags, workdir = _POLICIES['sparse'], tmp_path / 'run'
  site = tmp_path / 'site'
  site.mkdir()
  environment = {'PYTHONPATH': str(site)}
  run = _train(host, workdir, *flags, environment=environment)
  runs.until(run, 'iteration 5/')
  package = site / 'nvidia_imagined-1.0.dist-info'
  package.mkdir()
  os.kill(runs.workers(workdir)[1]['pid'], signal.SIGKILL)
  _, err = runs.end(run, 1)
  assert 'nvidia_imagined=(not set), now 1.0' in err
  assert 'damaged' not in err
  _, err = runs.end(_train(host, workdir, *flags, environment=environment), 2)
  assert 'holds a run made with nvidia_imagined=(not set), here 1.0' in err
  package.rmdir()
  runs.end(_train(host, workdir, *flags, environment=environment))
  runs.check_finished(host, workdir, undisturbed)


def _two_phase(host, workdir, disk, *flags, environment=()):
  return _train(
    host,
    workdir,
    '--policy=two_phase',
    '--interval=2',
    f'--durable_dir={disk}',
    *flags,
    environment=environment,
  )


def _stop_after(run, iterations):
  runs.until_trained(run, iterations)
  runs.stop(run)


def test_snapshots_on_disk_of_before_an_accepted_change(host, tmp_path):
  """In another --durable_dir they are refused by name, and go at the end.

  The run goes over to other software with one directory; then the command of
  before is given again, with the other one.
  """
  workdir, before, after = (tmp_path / name for name in ('run', 'a', 'b'))
  _stop_after(_two_phase(host, workdir, before), 8)
  (stale,) = before.iterdir()
  run = _two_phase(host, workdir, after, _ACCEPTED, environment=_FAST)
  told = runs.until(run, f"The run's snapshots are in {stale}")
  assert f'--durable_dir={before}' in told
  _stop_after(run, 6)
  (event,) = runs.of_kind(workdir, 'changes_accepted')
  assert event['exact_until'] == 0
  kept = runs.bits(runs.metrics(workdir)), _config(workdir)
  run = _two_phase(host, workdir, before, environment=_FAST)
  _, err = runs.end(run, 2)
  assert f'--durable_dir={before}: {stale} is of before this run' in err
  assert f'--durable_dir={after}' in err
  assert len(err.strip().splitlines()) == 1, err
  assert kept == (runs.bits(runs.metrics(workdir)), _config(workdir))
  run = _two_phase(host, workdir, after, environment=_FAST)
  out, _ = runs.end(run)
  assert 'Going on with iteration' in out
  whole = tmp_path / 'whole'
  runs.end(_two_phase(host, whole, after, environment=_FAST))
  runs.check_finished(host, workdir, runs.bits(runs.metrics(whole)))
  assert not before.exists() and not after.exists()


def test_data_that_change_while_the_run_lives(host, workdir, tmp_path):
  """The last stage, which reads the labels, is replaced; then all of them."""
  text = tmp_path / 'text'
  shutil.copy(helpers.DATA, text)
  before = text.read_bytes()
  flags = (*_POLICIES['sparse'], f'--data={text}', '--nostandby')
  run = _train(host, workdir, *flags)
  runs.until(run, f'iteration {_STOPPED_AT}/')
  text.write_bytes(b'?' * 99 + before[99:])
  (last,) = [w for w in runs.workers(workdir) if w['stage'] == 1]
  os.kill(last['pid'], signal.SIGKILL)
  _, err = runs.end(run, 1)
  assert f'--data={text}: has changed since the run began' in err, err
  assert 'data_fingerprint' in _config(workdir)
  _, err = runs.end(_train(host, workdir, *flags), 2)
  assert f'--data={text}: has changed since the run began' in err, err
  text.write_bytes(before)
  out, _ = runs.end(_train(host, workdir, *flags))
  assert 'Going on with iteration' in out


def test_a_mapped_file_that_changes_while_the_run_lives(
  host, workdir, tmp_path, undisturbed
):
  """Nobody dies, and yet no iteration is done with what was written there."""
  ids = tmp_path / 'ids.bin'
  np.fromfile(helpers.DATA, np.uint8).astype(np.uint16).tofile(ids)
  before = ids.read_bytes()
  flags = [*_POLICIES['sparse'], f'--data={ids}', '--data_dtype=uint16']
  flags += ['--model=vocab_size=256', '--nostandby']
  run = _train(host, workdir, *flags)
  runs.until(run, f'iteration {_STOPPED_AT}/')
  with open(ids, 'r+b') as opened:
    opened.write(bytes(len(before)))
  _, err = runs.end(run, 1)
  assert f'--data={ids}: has changed since the run began' in err, err
  ended = runs.metrics(workdir)
  assert len(ended) < _ITERATIONS
  with open(ids, 'r+b') as opened:
    opened.write(before)
  out, _ = runs.end(_train(host, workdir, *flags))
  assert 'Going on with iteration' in out
  runs.check_finished(host, workdir, undisturbed)


def test_a_checkpoint_that_changes_after_the_run_began(host, tmp_path):
  """The new one is whole, and of the same model."""
  one, other, run = tmp_path / 'one', tmp_path / 'other', tmp_path / 'run'
  for path, seed in ((one, 1), (other, 2)):
    runs.end(host.train(path, '--stages=1', '--iterations=1', f'--seed={seed}'))
  flags = (*_POLICIES['sparse'], f'--init_from={one}/checkpoint', '--nostandby')
  _stop(host, run, *flags)
  shutil.move(one / 'checkpoint', tmp_path / 'kept')
  shutil.copytree(other / 'checkpoint', one / 'checkpoint')
  _, err = runs.end(_train(host, run, *flags), 2)
  assert f'--init_from={one}/checkpoint: has changed' in err, err
  _copy(tmp_path / 'kept', one / 'checkpoint')
  out, _ = runs.end(_train(host, run, *flags))
  assert 'Going on with iteration' in out
