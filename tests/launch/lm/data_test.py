import hashlib
import json
import os
import pathlib
import subprocess
import sys
import sysconfig
from typing import Any

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from launch.lm import data
from moetion_jax import errors

_ROOT = pathlib.Path(__file__).resolve().parents[3]


def _config(path='', **overrides) -> data.DataConfig:
  settings: dict[str, Any] = dict(
    data=str(path),
    sequence_length=7,
    microbatch_size=4,
    microbatches=3,
    vocab_size=1 << 20,
    seed=5,
  )
  return data.DataConfig(**(settings | overrides))


def _counting_corpus(folder, num_tokens: int) -> dict:
  """A corpus in which a token's id is its position."""
  path = folder / f'{num_tokens}.bin'
  np.arange(num_tokens, dtype=np.uint32).tofile(path)
  return dict(path=path, data_dtype='uint32')


def _windows(batch: data.Batch) -> np.ndarray:
  return np.concatenate([batch.inputs, batch.labels[:, -1:]], axis=1)


def _training_windows(dataset: data.Dataset, count: int) -> np.ndarray:
  """The first `count` windows that training reads: [count, T + 1]."""
  config = dataset.config
  found = []
  for index in range(-(-count // config.microbatch_size)):
    iteration, microbatch = divmod(index, config.microbatches)
    found.append(_windows(dataset.batch(iteration + 1, microbatch)))
  return np.concatenate(found)[:count]


def _held_out_windows(dataset: data.Dataset) -> np.ndarray:
  batches = range(dataset.num_held_out_batches)
  return np.concatenate([_windows(dataset.held_out_batch(i)) for i in batches])


def _num_training(dataset: data.Dataset) -> int:
  return dataset.split.block_windows * len(dataset.split.training_blocks)


def _load_error(*args, **kwargs) -> str:
  with pytest.raises(errors.ConfigError) as info:
    data.load(_config(*args, **kwargs))
  assert info.value.flag == 'data'
  assert '\n' not in str(info.value)
  return str(info.value)


def test_batch_has_inputs_and_labels_of_consecutive_tokens(tmp_path):
  batch = data.load(_config(**_counting_corpus(tmp_path, 5000))).batch(3, 1)
  assert batch.inputs.shape == batch.labels.shape == (4, 7)
  assert batch.inputs.dtype == batch.labels.dtype == np.int32
  np.testing.assert_array_equal(batch.inputs + 1, batch.labels)
  np.testing.assert_array_equal(np.diff(batch.inputs, axis=1), 1)


_BATCHES = [(i, m) for i in (1, 2, 90, 10**9) for m in range(3)]
_DIGEST_PROGRAM = """
import hashlib, sys
from launch.lm import data
dataset = data.load(data.DataConfig(sequence_length=7, microbatch_size=4,
                                    microbatches=3, vocab_size=256, seed=5))
for index in map(int, sys.argv[2:]):
  dataset.held_out_batch(index)
for key in reversed(eval(sys.argv[1])):
  batch = dataset.batch(*key)
  print(hashlib.sha256(batch.inputs.tobytes() + batch.labels.tobytes()
                       ).hexdigest())
print(dataset.fingerprint()['blake2b'])
"""


def test_a_second_process_reads_the_same_bytes_in_another_order():
  dataset = data.load(_config(vocab_size=256))
  expected = []
  for key in _BATCHES:
    batch = dataset.batch(*key)
    contents = batch.inputs.tobytes() + batch.labels.tobytes()
    expected.append(hashlib.sha256(contents).hexdigest())
  output = subprocess.run(
    [sys.executable, '-c', _DIGEST_PROGRAM, repr(_BATCHES), '3', '1'],
    cwd=_ROOT,
    check=True,
    capture_output=True,
    text=True,
  ).stdout.split()
  assert output == expected[::-1] + [dataset.fingerprint()['blake2b']]


def test_seeds_iterations_and_microbatches_read_different_tokens(tmp_path):
  corpus = _counting_corpus(tmp_path, 50_000)
  contents = {
    _windows(data.load(_config(**corpus, seed=seed)).batch(*key)).tobytes()
    for seed in (0, 1, 2)
    for key in ((1, 0), (1, 1), (1, 2), (2, 0), (2, 1))
  }
  assert len(contents) == 15


def test_microbatches_is_only_how_the_stream_is_cut(tmp_path):
  corpus = _counting_corpus(tmp_path, 5000)
  three = data.load(_config(**corpus, microbatches=3))
  one = data.load(_config(**corpus, microbatches=1))
  np.testing.assert_array_equal(
    _training_windows(three, 40), _training_windows(one, 40)
  )


@pytest.mark.parametrize('num_windows', [45, 100, 3001])
def test_each_epoch_reads_every_training_window_once(tmp_path, num_windows):
  dataset = data.load(_config(**_counting_corpus(tmp_path, num_windows * 8)))
  epoch = _num_training(dataset)
  starts = _training_windows(dataset, 2 * epoch)[:, 0]
  first, second = starts[:epoch], starts[epoch:]
  assert len(np.unique(first)) == epoch
  np.testing.assert_array_equal(np.sort(first), np.sort(second))
  assert first.tolist() != second.tolist()
  assert first.tolist() != sorted(first)


@pytest.mark.parametrize('num_tokens', [45 * 8 + 3, 30_000 * 8 + 7])
def test_no_training_window_holds_a_held_out_token(tmp_path, num_tokens):
  corpus = _counting_corpus(tmp_path, num_tokens)
  dataset = data.load(_config(**corpus, microbatch_size=32))
  training = np.unique(_training_windows(dataset, _num_training(dataset)))
  held_out = np.unique(_held_out_windows(dataset))
  assert np.intersect1d(training, held_out).size == 0
  # Nothing is lost but what fills no block.
  lost = num_tokens - training.size - held_out.size
  assert 0 <= lost < 8 * (dataset.split.block_windows + 1)
  assert 0.03 < held_out.size / num_tokens < 0.06


def test_held_out_windows_lie_all_over_the_corpus(tmp_path):
  dataset = data.load(_config(**_counting_corpus(tmp_path, 160_000)))
  starts = np.unique(_held_out_windows(dataset)[:, 0])
  counts, _ = np.histogram(starts, bins=8, range=(0, 160_000))
  assert counts.min() > counts.sum() / 8 / 4
  # And not one window in 20 alike: whole passages.
  assert np.median(np.diff(starts)) == 8


@hypothesis.settings(deadline=None, max_examples=150)
@hypothesis.given(st.data())
def test_split_is_a_partition_that_leaves_training_enough(draw):
  num_windows = draw.draw(st.integers(1, 30_000))
  min_training = draw.draw(st.integers(1, num_windows))
  split = data.split_windows(num_windows, min_training)
  held_out, training = split.held_out_blocks, split.training_blocks
  blocks = np.concatenate([held_out, training])
  np.testing.assert_array_equal(np.sort(blocks), np.arange(blocks.size))
  left_out = num_windows - blocks.size * split.block_windows
  assert 0 <= left_out < split.block_windows
  assert training.size * split.block_windows >= min_training
  assert held_out.size <= max(1, blocks.size / 20)
  if num_windows >= 2 * min_training and num_windows > 1:
    assert held_out.size >= max(1, blocks.size // 20)
  if num_windows > min_training and split.block_windows == 1:
    assert held_out.size >= 1


def test_held_out_order_is_fixed_and_wraps_around(tmp_path):
  corpus = _counting_corpus(tmp_path, 30_000)
  dataset = data.load(_config(**corpus))
  windows = _held_out_windows(dataset)
  count = dataset.split.block_windows * len(dataset.split.held_out_blocks)
  assert count % 4, 'the last batch would need no filling up'
  assert len(np.unique(windows[:count, 0])) == count
  np.testing.assert_array_equal(
    windows[count:], windows[: len(windows) - count]
  )
  for index in (0, 3):
    np.testing.assert_array_equal(
      dataset.held_out_batch(dataset.num_held_out_batches + index),
      dataset.held_out_batch(index),
    )
  other = data.load(_config(**corpus, seed=6, microbatches=1))
  np.testing.assert_array_equal(_held_out_windows(other), windows)
  assert windows[:, 0].tolist() != sorted(windows[:, 0])


def test_smallest_corpora(tmp_path):
  message = _load_error(**_counting_corpus(tmp_path, 4 * 8 - 1))
  assert '31 tokens' in message and 'needs 32' in message
  dataset = data.load(_config(**_counting_corpus(tmp_path, 4 * 8)))
  assert len(np.unique(dataset.batch(1, 0).inputs)) == 4 * 7
  assert dataset.num_held_out_batches == 0
  with pytest.raises(errors.ConfigError, match='--data=.*too few tokens'):
    dataset.held_out_batch(0)
  dataset = data.load(_config(**_counting_corpus(tmp_path, 5 * 8)))
  assert dataset.num_held_out_batches == 1
  assert len(np.unique(dataset.held_out_batch(0).inputs)) == 7


@pytest.mark.parametrize('key', [(0, 0), (-1, 0), (1, -1), (1, 3)])
def test_there_is_no_such_microbatch(tmp_path, key):
  dataset = data.load(_config(**_counting_corpus(tmp_path, 5000)))
  with pytest.raises(ValueError, match='no microbatch'):
    dataset.batch(*key)


@pytest.mark.parametrize('dtype', ['uint16', 'uint32'])
def test_token_file_is_mapped_not_read(tmp_path, dtype):
  path = tmp_path / 'ids.bin'
  ids = np.arange(60_000).astype(dtype) + np.array(5000, dtype)
  ids.tofile(path)
  dataset = data.load(_config(path, data_dtype=dtype))
  assert isinstance(dataset.tokens, np.memmap)
  assert dataset.tokens.mode == 'r'
  # The pipeline reads the mapping, too: no copy of the corpus anywhere.
  assert np.shares_memory(dataset._held_out_windows.tokens, dataset.tokens)
  np.testing.assert_array_equal(dataset.tokens, ids)
  start = dataset.batch(1, 0).inputs[0, 0] - 5000
  np.testing.assert_array_equal(
    dataset.batch(1, 0).labels[0], ids[start + 1 : start + 8]
  )


def _write_folder(folder) -> dict[str, bytes]:
  files = {
    'b.txt': b'second',
    'a/z.txt': b'first' * 9,
    'a/.hidden': b'hidden',
    '.git/x.txt': b'hidden',
    'empty.txt': b'',
    'd.md': b'last\0',
  }
  for name, contents in files.items():
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_bytes(contents)
  return files


@pytest.mark.parametrize(
  'pattern, files',
  [
    ('', ['a/z.txt', 'b.txt', 'd.md']),
    ('a/z.txt', ['a/z.txt']),
    ('**/*.txt', ['a/z.txt', 'b.txt']),
    ('[ab]*', ['b.txt']),
    ('*/*', ['a/z.txt']),
  ],
)
def test_files_are_read_sorted_with_one_zero_byte_between(
  tmp_path, pattern, files
):
  contents = _write_folder(tmp_path)
  config = _config(tmp_path / pattern, sequence_length=1, microbatch_size=1)
  dataset = data.load(config)
  assert dataset.tokens.dtype == np.uint8
  assert not dataset.tokens.flags.writeable
  expected = b'\0'.join(contents[name] for name in files)
  assert dataset.tokens.tobytes() == expected


@pytest.mark.parametrize('step', [1, -1])
def test_order_in_which_a_folder_was_filled_does_not_matter(tmp_path, step):
  for number in range(100, 140)[::step]:
    folder = tmp_path / f'{number // 10}'
    folder.mkdir(exist_ok=True)
    (folder / f'{number}.txt').write_text(f'{number}')
  expected = '\0'.join(map(str, range(100, 140))).encode()
  assert data.load(_config(tmp_path)).tokens.tobytes() == expected
  assert data.load(_config(tmp_path / '*/*')).tokens.tobytes() == expected


def test_default_corpus_is_the_standard_library():
  dataset = data.load(_config(vocab_size=256, sequence_length=100))
  text = dataset.tokens.tobytes()
  assert len(text) > 5_000_000
  for module in (os, json, hashlib):
    source = pathlib.Path(str(module.__file__)).read_bytes()
    assert b'\0' + source + b'\0' in text
  assert pathlib.Path(pytest.__file__).read_bytes() not in text
  printable = np.isin(dataset.batch(1, 0).inputs, [9, 10, *range(32, 127)])
  assert printable.mean() > 0.9


def test_default_corpus_leaves_out_what_is_installed(tmp_path, monkeypatch):
  for name in ('os.py', 'json/a.py', 'site-packages/x.py', 'os.pyc', 'x.bin',
                 'json/__pycache__/a.py', 'dist-packages/x.py'):  # fmt: skip
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text(f'# {name}')
  monkeypatch.setattr(sysconfig, 'get_path', lambda name: str(tmp_path))
  dataset = data.load(_config(sequence_length=1, microbatch_size=1))
  assert dataset.tokens.tobytes() == b'# json/a.py\0# os.py'


@pytest.mark.parametrize(
  'name, reason',
  [
    ('missing', 'no such file'),
    ('missing.bin', 'no such file'),
    ('*.csv', 'matches no file'),
    ('no_files', 'is empty'),
    ('empty.txt', 'is empty'),
    ('empty.bin', 'is empty'),
    ('folder.bin', 'is a folder'),
    ('folder.bin/', 'is a folder'),
    ('fifo', 'is no regular file'),
    ('odd.bin', '41 bytes are no whole number of uint16'),
    ('shards', 'ids.bin holds token ids: name it alone'),
    ('shards/*', 'ids.bin holds token ids: name it alone'),
    ('short.txt', 'has 5 tokens'),
    ('io_error', 'cannot be read'),
  ],
)
def test_unusable_data_is_named(tmp_path, name, reason):
  for folder in ('no_files', 'folder.bin', 'shards'):
    (tmp_path / folder).mkdir()
  (tmp_path / 'empty.txt').touch()
  (tmp_path / 'empty.bin').touch()
  (tmp_path / 'odd.bin').write_bytes(bytes(41))
  (tmp_path / 'shards/ids.bin').write_bytes(bytes(400))
  (tmp_path / 'short.txt').write_bytes(b'short')
  os.mkfifo(tmp_path / 'fifo')
  # A regular file that nobody, root included, can read from its start.
  (tmp_path / 'io_error').symlink_to('/proc/self/mem')
  message = _load_error(f'{tmp_path}/{name}')
  assert reason in message
  assert message.startswith(f'--data={tmp_path}/{name}: ')


@pytest.mark.parametrize(
  'name, module, function',
  [('ids.bin', np, 'memmap'), ('folder', os, 'scandir')],
)
def test_forbidden_data_is_named(tmp_path, monkeypatch, name, module, function):
  def forbid(*args, **kwargs):
    raise PermissionError(13, 'Permission denied', args[0])

  (tmp_path / 'folder').mkdir()
  (tmp_path / 'ids.bin').write_bytes(bytes(400))
  monkeypatch.setattr(module, function, forbid)
  assert 'Permission denied' in _load_error(tmp_path / name)


def test_ids_beyond_the_vocabulary_are_named(tmp_path):
  path = tmp_path / 'text'
  path.write_bytes(b'a' * 100 + b'\xc3\xa9' + b'a' * 100)
  message = _load_error(path, vocab_size=195)
  assert 'token id 195 ' in message and 'vocab_size is 195' in message
  data.load(_config(path, vocab_size=196))

  path = tmp_path / 'ids.bin'
  ids = np.zeros(1000, np.uint32)
  ids[-1] = 2**31 + 5  # negative as int32
  ids.tofile(path)
  message = _load_error(path, data_dtype='uint32')
  assert f'token id {2**31 + 5} ' in message


def test_up_to_the_limit_everything_is_read(tmp_path, monkeypatch):
  monkeypatch.setattr(data, '_CHUNK_BYTES', 100)
  monkeypatch.setattr(data, '_SAMPLED_CHUNKS', 2)
  ids = np.zeros(1000, np.uint16)
  ids[500] = 300
  ids.tofile(tmp_path / 'ids.bin')
  assert 'token id 300 ' in _load_error(tmp_path / 'ids.bin', vocab_size=256)
  dataset = data.load(_config(tmp_path / 'ids.bin'))
  assert dataset.fingerprint()['hashed_bytes'] == 2000


def _sample_ends_only(monkeypatch):
  monkeypatch.setattr(data, '_CHECKED_WHOLE_BYTES', 1000)
  monkeypatch.setattr(data, '_HASHED_WHOLE_BYTES', 1000)
  monkeypatch.setattr(data, '_CHUNK_BYTES', 100)
  monkeypatch.setattr(data, '_SAMPLED_CHUNKS', 2)


@pytest.mark.parametrize('position', [0, 49, 950, 999])
def test_large_file_is_checked_in_samples_at_start(
  tmp_path, monkeypatch, position
):
  _sample_ends_only(monkeypatch)
  ids = np.zeros(1000, np.uint16)
  ids[position] = 300
  ids.tofile(tmp_path / 'ids.bin')
  assert 'token id 300 ' in _load_error(tmp_path / 'ids.bin', vocab_size=256)


@pytest.mark.parametrize(
  'read, read_other',
  [
    (lambda d: d.batch(2, 1), lambda d: d.batch(2, 0)),
    (lambda d: d.held_out_batch(1), lambda d: d.held_out_batch(0)),
  ],
)
def test_large_file_is_checked_where_it_is_read(
  tmp_path, monkeypatch, read, read_other
):
  _sample_ends_only(monkeypatch)
  corpus = _counting_corpus(tmp_path, 2000)
  config = _config(**corpus, vocab_size=2000, microbatch_size=2)
  positions = read(data.load(config)).inputs
  ids = np.arange(2000, dtype=np.uint32)
  ids[positions[(positions > 50) & (positions < 1950)][0]] = 2**32 - 1
  ids.tofile(corpus['path'])
  dataset = data.load(config)
  with pytest.raises(errors.ConfigError, match=f'token id {2**32 - 1} found'):
    read(dataset)
  read_other(dataset)


def test_a_mapped_file_may_change_and_read_text_cannot(tmp_path):
  for name, changes in (('ids.bin', True), ('text', False)):
    (tmp_path / name).write_bytes(b'a\0' * 999)
    opened = data.load(_config(tmp_path / name))
    before = opened.fingerprint()
    with open(tmp_path / name, 'r+b') as file:
      file.write(b'b')
    assert (opened.fingerprint() != before) == changes


def test_fingerprint_tells_contents_apart(tmp_path):
  prints = []
  for name, contents in [
    ('a/corpus', b'x' * 999),
    ('b/corpus', b'x' * 999),
    ('c/corpus', b'x' * 500 + b'y' + b'x' * 498),
    ('d/corpus', b'x' * 998),
  ]:
    (tmp_path / name).parent.mkdir()
    (tmp_path / name).write_bytes(contents)
    prints.append(data.load(_config(tmp_path / name)).fingerprint())
  assert json.loads(json.dumps(prints[0])) == prints[0] == prints[1]
  assert str(tmp_path) not in json.dumps(prints[0])
  assert prints[0] | {'blake2b': ''} == {
    'name': 'corpus',
    'tokens': 999,
    'dtype': 'uint8',
    'bytes': 999,
    'hashed_bytes': 999,
    'blake2b': '',
  }
  assert len({p['blake2b'] for p in prints}) == 3


def test_fingerprint_of_a_large_file_says_that_it_sampled(
  tmp_path, monkeypatch
):
  _sample_ends_only(monkeypatch)

  def fingerprint(num_tokens: int, changed: int | None = None) -> dict:
    ids = np.zeros(num_tokens, np.uint16)
    if changed is not None:
      ids[changed] = 1
    ids.tofile(tmp_path / 'ids.bin')
    return data.load(_config(tmp_path / 'ids.bin')).fingerprint()

  unchanged = fingerprint(1000)
  assert unchanged['bytes'] == 2000
  assert unchanged['hashed_bytes'] == 200
  digests = {fingerprint(1000, i)['blake2b'] for i in (0, 49, 950, 999)}
  digests |= {unchanged['blake2b'], fingerprint(1001)['blake2b']}
  assert len(digests) == 6


@pytest.mark.parametrize(
  'flag, value',
  [
    ('sequence_length', 0),
    ('microbatch_size', -1),
    ('microbatches', 0),
    ('vocab_size', 0),
    ('seed', -1),
    ('data_dtype', 'int32'),
  ],
)
def test_bad_settings_are_named(flag, value):
  with pytest.raises(errors.ConfigError) as info:
    _config(**{flag: value})
  assert (info.value.flag, info.value.value) == (flag, value)
