"""The removals of --fresh, and files that no run takes for its own.

The real program, with the files that users had in its workdir (issue 18).
"""

import json
import pathlib
import shutil

import pytest

from tests.support import helpers, runs

pytestmark = pytest.mark.timeout(600)

_ONE = ('--stages=1', '--iterations=2', '--eval_every=0')


def _contents(folder):
  return {
    str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None
    for p in sorted(pathlib.Path(folder).rglob('*'))
  }


def _refused(host, workdir, *flags, words=()):
  """Runs a command that is refused in one line, and changes no file."""
  before = _contents(workdir)
  _, err = runs.end(host.train(workdir, *flags), 2)
  assert len(err.strip().splitlines()) == 1, err
  for word in words:
    assert word in err, err
  assert _contents(workdir) == before
  assert not host.processes()
  return err


@pytest.mark.parametrize('fresh', [(), ('--fresh',)], ids=['plain', 'fresh'])
@pytest.mark.parametrize(
  ('files', 'words'),
  [
    (
      {'config.json': '{"architectures": ["X"]}', 'model.safetensors': 'w'},
      ['config.json', '"architectures"'],
    ),
    ({'checkpoint/model.safetensors': 'w'}, ['checkpoint']),
    ({'metrics.jsonl': '{"loss": 1}\n'}, ['metrics.jsonl']),
  ],
  ids=['a model', 'its checkpoint', 'its metrics'],
)
def test_files_of_others_are_no_run(host, workdir, fresh, files, words):
  for name, content in files.items():
    (workdir / name).parent.mkdir(parents=True, exist_ok=True)
    (workdir / name).write_text(content)
  err = _refused(host, workdir, *_ONE, *fresh, words=words)
  assert '--fresh' not in err and '--workdir' in err
  assert host.is_clean()


@pytest.mark.thorough
def test_fresh_keeps_what_no_run_made(host, workdir, tmp_path):
  """Text, notes in every folder of the run, a state that is to be read."""
  (workdir / 'corpus').mkdir(parents=True)
  shutil.copy(helpers.DATA, workdir / 'corpus' / 'text')
  flags = (*_ONE, f'--data={workdir}/corpus')
  runs.end(host.train(workdir, *flags))
  expected = runs.bits(runs.metrics(workdir))
  assert len(expected) == 2
  notes = ['notes', 'checkpoint/notes', 'checkpoint/d/notes', 'logs/notes']
  for name in notes:
    (workdir / name).write_text(name)
  (tmp_path / 'link').symlink_to(workdir / 'checkpoint')
  for value in (workdir / 'checkpoint', tmp_path / 'link'):
    _refused(
      host,
      workdir,
      *flags,
      f'--init_from={value}',
      '--fresh',
      words=['--init_from', f'mv {workdir}/checkpoint ELSEWHERE'],
    )
  _refused(
    host, workdir, *_ONE, f'--data={workdir}', '--fresh', words=['--data']
  )
  out, _ = runs.end(host.train(workdir, *flags, '--fresh'))
  assert f'Kept in {workdir}' in out
  assert 'checkpoint/notes' in out and 'corpus/' in out
  assert runs.bits(runs.metrics(workdir)) == expected
  assert runs.kinds(workdir).count('start') == 1
  for name in notes:
    assert (workdir / name).read_text() == name
  out, _ = runs.end(host.train(workdir, *flags))
  assert 'This run is finished' in out
  result = helpers.launch(
    'generate', f'--checkpoint={workdir}/checkpoint', '--tokens=2'
  )
  assert result.returncode == 0, result.stderr
  assert host.is_clean()


@pytest.mark.thorough
@pytest.mark.parametrize('hosts', [1, 2])
def test_nothing_goes_before_the_new_run_can_begin(
  host, workdir, tmp_path, hosts
):
  """Snapshots in memory and on disk; one host less later."""
  flags = (
    '--stages=2',
    '--policy=two_phase',
    '--interval=2',
    f'--durable_dir={tmp_path}/disk',
  )
  run = host.train(workdir, *flags, f'--local_hosts={hosts}')
  runs.until(run, 'iteration 8/')
  runs.stop(run)
  (on_disk,) = (tmp_path / 'disk').iterdir()
  (on_disk / 'notes').write_text('mine')
  before = _contents(on_disk)
  stores = sorted(p.name for p in host.path.iterdir())
  assert len(stores) == hosts
  # Only a worker finds that out.
  err = _refused(
    host,
    workdir,
    *flags,
    '--fresh',
    '--seed=7',
    f'--init_from={tmp_path}/none',
    words=['--init_from'],
  )
  assert '--fresh' not in err
  assert _contents(on_disk) == before
  assert sorted(p.name for p in host.path.iterdir()) == stores
  run = host.train(workdir, *flags, f'--local_hosts={hosts}')
  runs.until(run, 'Going on with iteration')
  runs.until_trained(run, 1)
  runs.stop(run)
  out, _ = runs.end(host.train(workdir, *flags, '--fresh', '--iterations=4'))
  assert out.count('removed as soon as the new run can begin') == hosts
  assert f'{on_disk}/notes' in out and 'Going on' not in out
  assert [x['iteration'] for x in runs.metrics(workdir)] == [1, 2, 3, 4]
  assert [p.name for p in on_disk.iterdir()] == ['notes']
  assert host.is_clean()
  config = json.loads((workdir / 'config.json').read_text())
  # The new run has an id of its own.
  assert on_disk.name != f'moetion-{config["run_id"]}'


@pytest.mark.thorough
def test_lost_lines_throw_no_snapshots_away(host, workdir, tmp_path):
  """They are put back; a checkpoint of another run is no end of this one."""
  flags = ('--stages=1', '--window_length=2', '--eval_every=0')
  other = tmp_path / 'other'
  runs.end(host.train(other, *flags, '--iterations=2'))
  run = host.train(workdir, *flags)
  runs.until(run, 'iteration 12/')
  runs.stop(run)
  shutil.copytree(other / 'checkpoint', workdir / 'checkpoint')
  _refused(
    host, workdir, *flags, words=['checkpoint is not the end of the run']
  )
  shutil.rmtree(workdir / 'checkpoint')
  (workdir / 'metrics.jsonl').rename(tmp_path / 'lines')
  _, err = runs.end(host.train(workdir, *flags), 2)
  assert 'lines are missing' in err and '--fresh' in err, err
  (tmp_path / 'lines').replace(workdir / 'metrics.jsonl')
  out, _ = runs.end(host.train(workdir, *flags))
  assert 'Going on with iteration' in out and len(runs.metrics(workdir)) == 40
