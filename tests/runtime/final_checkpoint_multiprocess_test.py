"""The final checkpoint of whole runs: damaged on its way, it still is right.

Bits are flipped in files, and processes killed, while the state goes from the
workers through the store into the checkpoint.
"""

import signal

import pytest

from moetion_jax import disk
from moetion_jax.runtime.checkpoints import file as checkpoint_file
from tests.support import helpers, runs

pytestmark = [pytest.mark.thorough, pytest.mark.timeout(600)]

SECONDS = 240.0
_CUTS = {
  'one': ('--stages=1',),
  'two': ('--stages=2',),
  'replicas': ('--stages=2', '--replicas=2'),
}


def _train(host, workdir, cut, *flags):
  return host.train(
    workdir,
    '--iterations=3',
    '--microbatches=2',
    '--window_length=2',
    '--eval_every=0',
    *_CUTS[cut],
    *flags,
  )


def _bits(workdir):
  """Of the checkpoint's tree."""
  return helpers.bits_of(
    checkpoint_file.load(str(workdir / 'checkpoint'), 'init_from')
  )


@pytest.fixture(scope='module')
def undisturbed(tmp_path_factory):
  """Bits of what runs that nothing happens to write and save, by their cut."""
  found = {}

  def bits(cut):
    if cut not in found:
      workdir = tmp_path_factory.mktemp('undisturbed') / cut
      with runs.host() as one:
        runs.end(_train(one, workdir, cut), seconds=SECONDS)
        assert one.is_clean()
      found[cut] = runs.bits(runs.metrics(workdir)), _bits(workdir)
    return found[cut]

  return bits


def _check(host, workdir, expected):
  runs.check_finished(host, workdir, expected[0])
  assert _bits(workdir) == expected[1]
  assert not (workdir / 'checkpoint.unproven').exists()


def _damaged(workdir):
  found = runs.of_kind(workdir, 'final_state_damaged')
  return [(e['stage'], e['replica']) for e in found]


@pytest.mark.parametrize(
  ('cut', 'flags', 'givers'),
  [
    ('one', (), [(0, 0)]),
    ('two', (), [(0, 0), (1, 0)]),
    ('replicas', (), [(1, 0)]),
    ('replicas', ('--shard_optimizer',), [(0, 1), (1, 0)]),
  ],
  ids=['one', 'two', 'replicas', 'zero1'],
)
def test_a_flipped_bit_on_the_way(
  host, workdir, undisturbed, cut, flags, givers
):
  """In what was handed over, and in the checkpoint before it is read back."""
  faults = [f'corrupt_final:stage={s},replica={r}' for s, r in givers]
  faults.append('corrupt_final:stage=0,phase=save')
  flags = [*flags, *(f'--fail={fault}' for fault in faults)]
  out, _ = runs.end(_train(host, workdir, cut, *flags), seconds=SECONDS)
  assert out.count('handed over again') == len(givers)
  _check(host, workdir, undisturbed(cut))
  assert _damaged(workdir) == givers
  happened = [(e['fault'], e['phase']) for e in runs.of_kind(workdir, 'fault')]
  assert len(happened) == len(faults)
  assert ('corrupt_final', 'save') in happened
  assert not runs.of_kind(workdir, 'failure')
  (rewritten,) = runs.of_kind(workdir, 'final_checkpoint_damaged')
  assert (rewritten['stage'], rewritten['replica']) == (0, 0)
  (line,) = [x for x in out.splitlines() if 'it is written once more' in x]
  assert rewritten['error'] in line and disk.device_of(workdir) in line


def test_a_disk_that_stays_damaged_ends_the_run(host, workdir, undisturbed):
  """It is named, not host memory, which was proven right; then it is mended."""
  flags = ['--fail=corrupt_final:stage=0,phase=save'] * 2
  out, err = runs.end(_train(host, workdir, 'two', *flags), 1, seconds=SECONDS)
  assert 'it is written once more' in out
  assert f'{disk.device_of(workdir)} is damaged' in err
  assert 'host memory is damaged' not in err
  assert 'Once the cause is gone, the same command goes on' in err
  assert not (workdir / 'checkpoint').exists() and host.has_ended()
  runs.end(_train(host, workdir, 'two', *flags), seconds=SECONDS)
  _check(host, workdir, undisturbed('two'))


def test_memory_that_stays_damaged_ends_the_run(host, workdir, undisturbed):
  """It names what and where; the store stays, and the same command goes on."""
  flags = ['--fail=corrupt_final:stage=1'] * 3
  _, err = runs.end(_train(host, workdir, 'two', *flags), 1, seconds=SECONDS)
  assert 'stage 1, iteration 3: ' in err and 'stage 1 replica 0' in err
  assert '3 times: host memory is damaged' in err
  assert 'head' in err or 'experts' in err or 'layers/' in err
  assert 'the same command goes on' in err
  assert _damaged(workdir) == [(1, 0)] * 3
  assert runs.kinds(workdir)[-1] == 'failed'
  assert not (workdir / 'checkpoint').exists()
  assert host.has_ended()
  runs.end(_train(host, workdir, 'two', *flags), seconds=SECONDS)
  assert runs.resumptions(workdir)
  _check(host, workdir, undisturbed('two'))


def test_everything_is_killed_before_the_checkpoint_is_proven(
  host, workdir, undisturbed
):
  """It is not taken for a finished run; what is left is no obstacle."""
  fault = '--fail=kill_all:phase=save'
  run = _train(host, workdir, 'two', fault)
  runs.end(run, -signal.SIGKILL, seconds=SECONDS)
  runs.wait_for(lambda: not host.processes(), seconds=20)
  assert not (workdir / 'checkpoint').exists()
  assert (workdir / 'checkpoint.unproven').is_dir()
  runs.end(_train(host, workdir, 'two', fault), seconds=SECONDS)
  _check(host, workdir, undisturbed('two'))


def test_workers_die_in_the_end(host, workdir, undisturbed):
  faults = [
    'kill:stage=1,phase=hand_over',
    'kill:stage=0,phase=save',
    'exception:stage=0,phase=save',
    'corrupt_final:stage=1',
  ]
  flags = ['--max_failures=6', *(f'--fail={fault}' for fault in faults)]
  runs.end(_train(host, workdir, 'two', *flags), seconds=SECONDS)
  _check(host, workdir, undisturbed('two'))
  assert len(runs.of_kind(workdir, 'fault')) == len(faults)
  assert len(runs.of_kind(workdir, 'failure')) == 3


def test_a_checkpoint_that_cannot_be_written(host, workdir, undisturbed):
  """The store stays, and the same command goes on once it can."""
  obstacle = workdir / 'checkpoint'
  run = _train(host, workdir, 'two')
  runs.wait_for(lambda: (workdir / 'config.json').exists(), seconds=SECONDS)
  obstacle.touch()  # a folder cannot take that name
  _, err = runs.end(run, 1, seconds=SECONDS)
  assert 'a checkpoint is to be written there' in err and str(workdir) in err
  assert 'the same command goes on' in err
  obstacle.unlink()
  runs.end(_train(host, workdir, 'two'), seconds=SECONDS)
  _check(host, workdir, undisturbed('two'))
