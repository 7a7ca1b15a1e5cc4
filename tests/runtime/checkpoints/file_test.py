"""The final checkpoint and its proof: what was saved, or an error."""

import gc
import json
import os
import pathlib
import shutil

import numpy as np
import pytest
from orbax import checkpoint as ocp

from launch.lm import checkpoint, settings, transformer_job
from moetion_jax import codec, disk, errors, report
from moetion_jax.runtime.checkpoints import file as checkpoint_file
from moetion_jax.runtime.records import checkpoint_folder, own_files
from tests.support import helpers, power

pytestmark = pytest.mark.timeout(120)


@pytest.fixture(scope='module')
def run():
  """A run's settings as JSON, its state 0, and the digests of it."""
  config = helpers.micro_run(model={'num_layers': 2}, stages=1)
  stage = transformer_job.of(config).build_stage(0, (0,))
  state = stage.initial_state()
  return codec.encode(config), state, helpers.digests_of(stage, state)


@pytest.fixture(scope='module')
def saved(run, tmp_path_factory):
  """A checkpoint, and its tree as bits."""
  path = str(tmp_path_factory.mktemp('saved') / 'checkpoint')
  config, state, digests = run
  checkpoint_file.save(path, [state], 7, config, digests)
  return path, helpers.bits_of(checkpoint_file.load(path, 'init_from'))


@pytest.fixture
def copied(saved, tmp_path):
  path = tmp_path / 'copy'
  shutil.copytree(saved[0], path)
  return path


@pytest.fixture(scope='module')
def of_stage_1(tmp_path_factory):
  """A checkpoint of the second of two stages, as `launch.convert` writes it."""
  config = helpers.micro_run(model={'num_layers': 2}, stages=2)
  stage = transformer_job.of(config).build_stage(1, (0,))
  state = stage.initial_state()
  digests = helpers.digests_of(stage, state)
  path = str(tmp_path_factory.mktemp('stage') / 'stage-1')
  checkpoint_file.save(path, [state], 7, codec.encode(config), digests)
  return path


def test_another_state_than_the_run_began_with(saved):
  digest = checkpoint_folder.digest_of(saved[0])
  checkpoint_file.load(saved[0], 'init_from', digest)
  with pytest.raises(errors.ConfigError, match='has changed since the run'):
    checkpoint_file.load(saved[0], 'init_from', 'other')


def _files(folder):
  files = [p for p in sorted(folder.rglob('*')) if p.is_file()]
  return sorted(files, key=lambda p: -p.stat().st_size)


def _refused(path, *words):
  with pytest.raises(errors.ConfigError) as caught:
    checkpoint_file.load(str(path), 'init_from')
  assert f'--init_from={path}' in str(caught.value)
  assert len(str(caught.value).splitlines()) == 1
  for word in words:
    assert word in caught.value.reason, caught.value.reason


def test_what_is_saved_is_read(run, saved):
  config, state, digests = run
  path, bits = saved
  tree = checkpoint_file.load(path, 'init_from')
  assert int(tree['iteration']) == 7
  assert checkpoint_file.load_config(path, 'init_from') == config
  with ocp.StandardCheckpointer() as checkpointer:  # as the README says
    metadata = checkpointer.metadata(path).custom_metadata
  assert metadata['moetion_digests']['state'] == report.combine(digests)
  assert len(metadata['moetion_digests']['operators']) == len(digests)
  assert set(bits['optimizer']) == {
    g for g, leaves in state.items() if any('optimizer' in x for x in leaves)
  }
  assert not os.path.exists(path + own_files.ASIDE_SUFFIX)


def test_16_bytes_anywhere_are_found_or_change_nothing(saved, copied):
  """Orbax writes files that nobody needs to read the arrays."""
  largest, *_ = files = _files(copied)
  for file in files:
    content = file.read_bytes()
    for start in {0, len(content) // 2, max(0, len(content) - 16)}:
      end = min(start + 16, len(content))
      other = bytes(x ^ 0xA5 for x in content[start:end])
      file.write_bytes(content[:start] + other + content[end:])
      try:
        tree = checkpoint_file.load(str(copied), 'init_from')
      except errors.ConfigError as error:
        assert len(str(error).splitlines()) == 1
      else:
        assert file != largest or start != len(content) // 2, start
        assert helpers.bits_of(tree) == saved[1], (file, start)
    file.write_bytes(content)
  assert helpers.bits_of(checkpoint_file.load(str(copied), 'x')) == saved[1]


@pytest.mark.parametrize(
  ('was', 'becomes', 'words'),
  [
    (b'experts/w_down"', b'experts/w_dowo"', 'it lacks optimizer.layers/'),
    (b'"skip_deserialize"', b'"skip_desesialize"', ''),
    (b'"np.ndarray"', b'"np.ndbrray"', ''),
    (b'"key_type": 2', b'"key_type": 6', ''),
  ],
)
def test_a_bit_in_the_trees_structure(copied, was, becomes, words):
  """It is JSON still, and all data is whole: Orbax finds something missing."""
  file = copied / '_METADATA'
  content = file.read_bytes()
  assert was in content
  file.write_bytes(content.replace(was, becomes, 1))
  _refused(copied, 'its file _METADATA is damaged', words)
  file.write_bytes(content)  # a copy of it, as the error says
  checkpoint_file.load(str(copied), 'init_from')


@pytest.mark.filterwarnings('error::pytest.PytestUnraisableExceptionWarning')
def test_a_torn_or_missing_file(saved, copied, capfd):
  """One line says which file it is, and what to do; no traceback is beside."""
  largest, *_ = files = _files(copied)
  refused = set()
  for file in files:
    content = file.read_bytes()
    name = str(file.relative_to(copied))
    for torn in (content[: len(content) // 2], b'', None):
      file.unlink()
      if torn is not None:
        file.write_bytes(torn)
      try:
        tree = checkpoint_file.load(str(copied), 'init_from')
      except errors.ConfigError as error:
        refused.add(file)
        assert len(str(error).splitlines()) == 1
        assert name in error.reason, (name, torn and len(torn), error)
        assert 'missing' in error.reason or torn is not None
        assert error.reason.endswith('use a copy of it, or train again')
        assert 'source locations' not in error.reason
      else:
        assert file != largest
        assert helpers.bits_of(tree) == saved[1], (file, torn)
      gc.collect()  # what asyncio has to say of its tasks, it says then
      said = capfd.readouterr()
      assert (said.out, said.err) == ('', ''), name
      file.write_bytes(content)
  # How many of the others are read is TensorStore's affair, and varies.
  names = ('_CHECKPOINT_METADATA', '_METADATA', 'manifest.ocdbt')
  assert {largest, *(copied / name for name in names)} <= refused


def test_what_is_no_checkpoint(copied, tmp_path):
  (tmp_path / 'file').touch()
  (tmp_path / 'empty').mkdir()
  (tmp_path / 'run').mkdir()
  copied.rename(tmp_path / 'run' / 'checkpoint')
  _refused(tmp_path / 'none', "no such folder; name a finished run's WORKDIR")
  _refused(tmp_path / 'file', 'is no folder; name a finished')
  (tmp_path / 'deep').mkdir()
  (tmp_path / 'deep' / '_CHECKPOINT_METADATA').write_text('[' * 100_000)
  _refused(tmp_path / 'deep', '_CHECKPOINT_METADATA is damaged')
  _refused(tmp_path / 'empty', '_CHECKPOINT_METADATA is missing', 'train again')
  _refused(
    tmp_path / 'run', f'is a workdir, not a checkpoint; name {tmp_path}/run/ch'
  )


def test_one_of_a_stage_alone(run, saved, of_stage_1):
  tree = checkpoint_file.load(of_stage_1, 'checkpoint')
  with pytest.raises(errors.ConfigError) as caught:
    checkpoint.check_all_stages(tree, of_stage_1, 'checkpoint')
  assert 'the state of one stage, without embedding of' in caught.value.reason
  assert 'launch.convert' in caught.value.reason
  config = codec.decode(settings.RunConfig, {**run[0], 'init_from': of_stage_1})
  stage = transformer_job.of(config).build_stage(0, (0,))
  with pytest.raises(errors.ConfigError, match='the state of one stage'):
    transformer_job.of(config).initial(stage)
  whole = checkpoint_file.load(saved[0], 'checkpoint')
  checkpoint.check_all_stages(whole, saved[0], 'checkpoint')


def test_generate_refuses_one_of_a_stage_alone(of_stage_1):
  result = helpers.launch('generate', f'--checkpoint={of_stage_1}')
  assert result.returncode == 2
  (line,) = result.stderr.splitlines()
  assert 'is the state of one stage' in line and 'WORKDIR/checkpoint' in line


def _rewrite(saved, path, change):
  """Saves the tree with a change, by Orbax alone, with the same metadata."""
  with ocp.StandardCheckpointer() as checkpointer:
    tree = checkpointer.restore(saved[0])
    metadata = checkpointer.metadata(saved[0]).custom_metadata
    tree = {k: dict(v) if k == 'parameters' else v for k, v in tree.items()}
    change(tree)
    checkpointer.save(path, tree, custom_metadata=metadata)
    checkpointer.wait_until_finished()


_UP = 'layers/1/experts/w_up'


def _swap(tree):
  w = np.array(tree['parameters'][_UP])
  w[[0, 2]] = w[[2, 0]]
  tree['parameters'][_UP] = w


def _reshape(tree):
  w = np.array(tree['parameters'][_UP])
  tree['parameters'][_UP] = w.reshape(w.shape[0], 2, -1)


def _retype(tree):
  w = np.array(tree['parameters'][_UP])
  tree['parameters'][_UP] = w.view(np.int32)


@pytest.mark.parametrize(
  ('change', 'words'),
  [
    (_swap, ['layers/1/experts/0, layers/1/experts/2 have other bits']),
    (_reshape, [_UP, 'float32', 'when it was saved']),
    (_retype, [_UP, 'int32', 'when it was saved']),
    (lambda tree: tree['parameters'].pop(_UP), [_UP, 'is missing']),
    (lambda tree: tree['parameters'].update(x=np.zeros(3)), ['was missing']),
    (lambda tree: tree.update(iteration=np.int64(8)), ['of iteration 8']),
    (lambda tree: tree.pop('optimizer'), ['not a checkpoint of ours']),
  ],
  ids=['swap', 'reshape', 'retype', 'missing', 'extra', 'iteration', 'part'],
)
def test_a_tree_that_is_another_one(saved, tmp_path, change, words):
  _rewrite(saved, tmp_path / 'other', change)
  _refused(tmp_path / 'other', *words)


def _edit(copied, change):
  path = copied / '_CHECKPOINT_METADATA'
  value = json.loads(path.read_text())
  change(value['custom_metadata'])
  path.write_text(json.dumps(value))


@pytest.mark.parametrize(
  'change',
  [
    lambda x: x['moetion_config']['model'].update(experts_per_token=1),
    lambda x: x['moetion_digests'].update(iteration=8),
    lambda x: x['moetion_digests']['operators'][0].__setitem__(2, '00000000'),
    lambda x: x['moetion_digests']['operators'].pop(),
    lambda x: x.pop('moetion_checksum'),
    lambda x: x.pop('moetion_digests'),
    lambda x: x.pop('moetion_config'),
    lambda x: x.clear(),
  ],
)
def test_edited_metadata(copied, change):
  _edit(copied, change)
  _refused(copied, '_CHECKPOINT_METADATA is damaged')
  with pytest.raises(errors.ConfigError, match='METADATA is damaged'):
    checkpoint.load_config(str(copied), 'init_from')


def test_one_of_before_cannot_be_proven(saved, copied, capsys):
  checkpoint_file.load(str(copied), 'init_from')
  assert capsys.readouterr().err == ''

  def change(metadata):
    del metadata['moetion_digests'], metadata['moetion_checksum']

  _edit(copied, change)
  tree = checkpoint_file.load(str(copied), 'init_from')
  assert helpers.bits_of(tree) == saved[1]
  (line,) = capsys.readouterr().err.splitlines()
  assert str(copied) in line and 'no digests' in line


# ---- written, read back, and only then there ---------------------------------


def _damage(path):
  """Overwrites 16 bytes in the largest file below a folder, for real."""
  largest = max(
    (os.path.join(d, f) for d, _, fs in os.walk(path) for f in fs),
    key=os.path.getsize,
  )
  with open(largest, 'r+b') as file:
    file.seek(os.path.getsize(largest) // 2)
    file.write(b'\xff' * 16)


def test_what_does_not_compare_is_saved_once_more(run, saved, tmp_path):
  config, state, digests = run
  path, written = tmp_path / 'checkpoint', []

  def damage_first(aside):
    assert not path.exists()  # whoever kills us now leaves no checkpoint
    written.append(aside)
    if len(written) == 1:
      _damage(aside)

  told = []
  checkpoint_file.save(
    str(path), [state], 7, config, digests, damage_first, told.append
  )
  (what,) = told
  assert str(path) in what and disk.device_of(path) in what
  assert written == [str(path) + own_files.ASIDE_SUFFIX] * 2
  assert helpers.bits_of(checkpoint_file.load(str(path), 'x')) == saved[1]
  assert os.listdir(tmp_path) == ['checkpoint']


def test_what_is_read_back_is_what_the_disk_has(run, saved, tmp_path):
  """The bits change below the file system, whose memory has the right ones."""
  config, state, digests = run
  with power.disk(tmp_path) as mounted:
    written, told = [], []

    def damage_first(aside):
      written.append(aside)
      if len(written) > 1:
        return
      os.sync()
      content = _files(pathlib.Path(aside))[0].read_bytes()
      middle = content[len(content) // 2 :][:512]
      assert mounted.replace(middle, b'\xff' * len(middle)) == 1
      assert _files(pathlib.Path(aside))[0].read_bytes() == content

    path = str(mounted.path / 'checkpoint')
    checkpoint_file.save(
      path, [state], 7, config, digests, damage_first, told.append
    )
    (what,) = told
    assert 'read back otherwise than it was written to /dev/loop' in what
    assert helpers.bits_of(checkpoint_file.load(path, 'x')) == saved[1]


def test_a_disk_is_not_blamed_for_what_else_fails(run, tmp_path, monkeypatch):
  """Memory that runs out, descriptors, a bug: the bits are as written."""
  config, state, digests = run

  def restore(*unused):
    raise MemoryError('no room for the arrays')

  monkeypatch.setattr(ocp.StandardCheckpointer, 'restore', restore)
  path, told = str(tmp_path / 'checkpoint'), []
  with pytest.raises(errors.StoreError, match='no room for the arrays') as e:
    checkpoint_file.save(
      path, [state], 7, config, digests, on_damaged=told.append
    )
  assert not isinstance(e.value, errors.DamagedDiskError)
  assert disk.device_of(path) not in str(e.value) + ''.join(told)
  assert os.listdir(tmp_path) == []


def test_what_never_compares_is_not_there(run, saved, copied, tmp_path):
  """What was there before stays."""
  config, state, digests = run
  for path in (tmp_path / 'checkpoint', copied):
    told = []
    with pytest.raises(errors.DamagedDiskError, match='2 times and read') as e:
      checkpoint_file.save(
        str(path), [state], 7, config, digests, _damage, told.append
      )
    assert f'{disk.device_of(path)} is damaged' in str(e.value)
    assert 'still has its digests' in str(e.value)
    assert len(told) == 1
  assert os.listdir(tmp_path) == ['copy']
  assert helpers.bits_of(checkpoint_file.load(str(copied), 'x')) == saved[1]


def test_a_state_that_is_not_the_one_of_the_digests(run, tmp_path):
  config, state, digests = run
  head = {k: np.array(v) for k, v in state['head'].items()}
  head['master/head/table'][0, 0] += 1
  with pytest.raises(
    errors.StoreError, match='changed in host memory: head has other bits'
  ):
    checkpoint_file.save(
      str(tmp_path / 'x'),
      [{**state, 'head': head}],
      7,
      config,
      digests,
    )
  assert not os.listdir(tmp_path)


def test_where_nothing_can_be_written(run, tmp_path):
  config, state, digests = run
  (tmp_path / 'file').touch()
  with pytest.raises(errors.StoreError, match='cannot be written'):
    checkpoint_file.save(
      str(tmp_path / 'file' / 'x'), [state], 7, config, digests
    )
