"""Sparse snapshots -> dense state, bit for bit, from every valid start."""

import contextlib
import dataclasses
import os
import time

import chex
import hypothesis
import hypothesis.strategies as st
import jax
import numpy as np
import optax
import pytest
from jax import numpy as jnp

from launch.lm import transformer_job
from moetion_jax import config as config_lib, errors
from moetion_jax.capture import conversion
from moetion_jax.policies import decision
from moetion_jax.snapshots import (
  blocks,
  file as snapshot_file,
  manifest as manifest_lib,
)
from tests.support import conversions

# All that could make a replay differ from the first time.
_MODEL = {'dropout_rate': 0.1, 'balance': 'bias'}
_CLIP = {'clip_norm': 0.05}
_CONFIGURATIONS = 55  # that are drawn by hypothesis, all different


def check_all_starts(config, pieces, is_packed=False, until_end=2):
  """Converts every stage from every valid start.

  The first and last few train on to the end, the others for an iteration more.

  Returns:
    How many starts from snapshots every stage had, at least.
  """
  counts = []
  with conversions.recorded(config, pieces, is_packed) as run:
    for index in range(config.train.stages):
      starts = run.starts(index)
      assert starts[0].iteration == 0, starts
      counts.append(len(starts) - 1)
      for number, start in enumerate(starts):
        last = config.train.iterations
        if until_end <= number < len(starts) - until_end:
          last = min(last, start.complete_at + 1)
        # Half of them as if the worker had died when it was just possible: the
        # later iterations' scalars are read from the logs.
        newest = start.complete_at if number % 2 else None
        run.convert(index, start, newest=newest, until=last)
  return min(counts)


@pytest.fixture(scope='module', autouse=True)
def programs_are_shared():
  yield
  conversions.compiled.cache_clear()


@pytest.mark.thorough
@pytest.mark.parametrize(
  ('optimizer', 'train', 'pieces', 'is_packed'),
  [
    pytest.param(
      'adamw',
      {'stages': 3, 'microbatches': 4},
      [conversions.Piece(1, 3, seed=1), conversions.Piece(5, 2, seed=2)],
      False,
      id='adamw, three stages, a reorder with another window',
    ),
    pytest.param(
      'adafactor',
      {'local_devices': 4, 'microbatches': 2},
      [conversions.Piece(1, 3, 'aligned')],
      True,
      id='adafactor, four devices, aligned, packed',
    ),
    pytest.param(
      'muon',
      {'microbatches': 8},
      [conversions.Piece(1, 7)],
      True,
      id='muon, eight microbatches, a window of seven, packed',
    ),
    pytest.param(
      'lion',
      {'microbatches': 1},
      [
        conversions.Piece(1, 1),
        conversions.Piece(4, 3, 'aligned', 1),
        conversions.Piece(7, 3, 'rolling', 2),
      ],
      False,
      id='lion, one microbatch, a window of one, and another mode',
    ),
    pytest.param(
      'sgd',
      {'stages': 2, 'microbatches': 3},
      [conversions.Piece(1, 7, 'aligned', 1)],
      False,
      id='sgd, two stages, an aligned window of seven',
    ),
    pytest.param(
      'adamw',
      {'stages': 2, 'microbatches': 2},
      [
        conversions.Piece(1, 3, seed=1, replay=decision.UPDATES),
        conversions.Piece(6, 2, seed=2, replay=decision.UPDATES),
      ],
      False,
      id='adamw, two stages, recorded gradients, a reorder',
    ),
    pytest.param(
      'lion',
      {'local_devices': 4, 'microbatches': 2},
      [
        conversions.Piece(1, 2, replay=decision.UPDATES, every=2),
        conversions.Piece(6, 2, seed=3),
      ],
      True,
      id='lion, four devices, gradients between slots, then weights, packed',
    ),
    pytest.param(
      'muon',
      {'microbatches': 2},
      [
        conversions.Piece(1, 3, seed=4),
        conversions.Piece(5, 7, seed=5, replay=decision.UPDATES),
      ],
      False,
      id='muon, weights, then gradients with a window of seven',
    ),
  ],
)
def test_every_valid_start_gives_the_undisturbed_state(
  optimizer, train, pieces, is_packed
):
  config = conversions.run_config(
    model=_MODEL, optimizer={**_CLIP, 'optimizer': optimizer}, **train
  )
  assert check_all_starts(config, pieces, is_packed) > 0


@st.composite
def _pieces(draw):
  """Windows of a run, with up to two changes of length, mode and order."""
  firsts = draw(
    st.lists(st.integers(2, conversions.ITERATIONS), max_size=2, unique=True)
  )
  return [
    draw(
      st.one_of(
        st.builds(
          conversions.Piece,
          st.just(first),
          st.sampled_from([1, 3, 7]),
          st.sampled_from(['rolling', 'aligned']),
          st.integers(0, 3),
        ),
        st.builds(
          conversions.Piece,
          st.just(first),
          st.sampled_from([1, 3, 7, 16]),
          st.just('rolling'),
          st.integers(0, 3),
          st.just(decision.UPDATES),
          st.integers(1, 2),
        ),
      )
    )
    for first in [1, *sorted(firsts)]
  ]


@st.composite
def _configs(draw):
  return conversions.run_config(
    model={
      'dropout_rate': draw(st.sampled_from([0.0, 0.1])),
      'balance': draw(st.sampled_from(['loss', 'bias'])),
      'capacity_factor': draw(st.sampled_from([0.0, 1.0, 1.5])),
      'remat': draw(st.booleans()),
    },
    optimizer={
      'optimizer': draw(st.sampled_from([*config_lib.OPTIMIZERS])),
      'clip_norm': draw(st.sampled_from([0.0, 0.05, 1.0])),
      'warmup_iterations': draw(st.sampled_from([0, 3])),
    },
    stages=draw(st.integers(1, 3)),
    local_devices=draw(st.sampled_from([1, 1, 4])),
    microbatches=draw(st.integers(1, 8)),
    seed=draw(st.integers(0, 3)),
  )


@pytest.mark.soak
@pytest.mark.timeout(7200)
def test_every_valid_start_of_any_run():
  seen, counts = set(), []

  @hypothesis.settings(
    max_examples=4 * _CONFIGURATIONS,
    deadline=None,
    database=None,
    derandomize=True,
    phases=[hypothesis.Phase.generate],  # shrinking would take hours
    suppress_health_check=list(hypothesis.HealthCheck),
  )
  @hypothesis.given(
    _configs(), st.lists(_pieces(), min_size=2, max_size=2), st.booleans()
  )
  def check(config, runs, is_packed):
    # Simple ones are drawn again and again.
    if config in seen or len(seen) >= _CONFIGURATIONS:
      return
    begin = time.monotonic()
    for pieces in runs:
      # None, where each piece ends before its window is full.
      counts.append(
        check_all_starts(config, pieces, is_packed, conversions.ITERATIONS)
      )
    seen.add(config)
    seconds = time.monotonic() - begin
    print(f'configuration {len(seen)}: {seconds:.1f} s, starts {counts[-2:]}')

  check()
  assert len(seen) >= _CONFIGURATIONS
  print(f'starts from snapshots: {sum(counts)} in {len(counts)} runs')
  assert sum(map(bool, counts)) > 0.5 * len(counts)


# ---- damage ------------------------------------------------------------------


@pytest.fixture(scope='module')
def two_stages():
  """A run with windows of three; the tests put back what they change."""
  config = conversions.run_config(
    model=_MODEL,
    optimizer=_CLIP,
    stages=2,
    microbatches=3,
  )
  with conversions.recorded(config, [conversions.Piece(1, 3)]) as run:
    yield run


@contextlib.contextmanager
def _put_back(path):
  """Restores a snapshot at the end, whatever was done to it."""
  kept = {p.name: p.read_bytes() for p in path.iterdir()}
  try:
    yield
  finally:
    path.mkdir(exist_ok=True)
    for name, data in kept.items():
      (path / name).write_bytes(data)


def _flip(path, offset):
  with open(path, 'r+b') as file:
    file.seek(offset)
    byte = file.read(1)[0]
    file.seek(offset)
    file.write(bytes([byte ^ 16]))


def _damage(path, kind):
  data, manifest = path / 'data', path / 'manifest.json'
  if kind == 'torn':  # the pages that were written last never came
    used = snapshot_file.read_manifest(path).used_bytes
    with open(data, 'r+b') as file:
      file.seek(used // 2)
      file.write(bytes(used - used // 2))
  elif kind == 'flipped':
    _flip(data, 1000)
  elif kind == 'truncated':
    os.truncate(data, 1000)
  elif kind == 'torn manifest':
    os.truncate(manifest, manifest.stat().st_size // 2)
  elif kind == 'flipped manifest':
    _flip(manifest, 300)
  elif kind == 'no data':
    data.unlink()
  elif kind == 'no manifest':
    manifest.unlink()
  else:
    assert kind == 'gone'
    for file in (data, manifest):
      file.unlink()
    path.rmdir()


_SILENT = ('torn', 'flipped')  # seen only when all of it is read


@pytest.mark.parametrize('iteration', [8, 9, 10])
@pytest.mark.parametrize(
  'kind',
  [
    'torn',
    'flipped',
    'truncated',
    'torn manifest',
    'flipped manifest',
    'no data',
    'no manifest',
    'gone',
  ],
)
def test_an_older_start_is_used_when_a_snapshot_is_damaged(
  two_stages, kind, iteration
):
  run, index = two_stages, 1
  assert run.starts(index)[-1].iteration == 8  # and ends with snapshot 10
  path = run.snapshots(index)[iteration]
  with _put_back(path):
    _damage(path, kind)
    if kind != 'no manifest' and kind != 'gone':
      with pytest.raises(errors.StoreError, match=f'/{iteration}/'):
        run.load(index, iteration)
    rebuilt, lost = run.recover(index)
  assert lost == ([iteration] if kind in _SILENT else [])
  # The newest start whose three snapshots are all before the damaged one.
  assert rebuilt.start.iteration == iteration - 3


def test_a_lost_snapshot_is_named(two_stages):
  run = two_stages
  path = run.snapshots(0)[9]
  start = run.starts(0)[-1]
  with _put_back(path):
    _damage(path, 'flipped')
    with pytest.raises(conversion.SnapshotLostError) as caught:
      run.convert(0, start)
  assert caught.value.suspects == (9,)
  assert 'snapshot 9 is needed and lost' in str(caught.value)
  assert f'{path}/data' in str(caught.value)


def test_a_damaged_snapshot_that_is_not_needed_is_only_noted(two_stages):
  run = two_stages
  path = run.snapshots(0)[7]
  start = next(s for s in run.starts(0) if s.iteration == 3)
  with _put_back(path):
    _damage(path, 'flipped')
    assert run.convert(0, start).damaged == {7}


def _plant(path, is_it, bit=1):
  """Flips one bit in a buffer, with a right checksum; returns its name."""
  with snapshot_file.open_snapshot(path, verify=True) as stored:
    arrays = {name: np.array(a) for name, a in stored.arrays.items()}
    metadata = stored.metadata
  name = next(n for n in sorted(arrays) if is_it(n))
  words = arrays[name].reshape(-1).view(np.uint8)
  # The sign and exponent of its first number: no rounding hides it.
  words[arrays[name].itemsize - 1] ^= bit
  (path / snapshot_file.DATA_NAME).unlink()
  snapshot_file.write(
    path,
    [manifest_lib.Buffer(n, a.dtype, a.shape, [a]) for n, a in arrays.items()],
    metadata,
  )
  return name


@pytest.mark.parametrize('leaf', ['master/', 'optimizer/'])
@pytest.mark.parametrize('iteration', [4, 5, 6])
def test_a_planted_bit_of_training_state_is_found(two_stages, leaf, iteration):
  run, index = two_stages, 1
  path = run.snapshots(index)[iteration]
  start = next(s for s in run.starts(index) if s.iteration == 4)
  with _put_back(path):
    name = _plant(path, lambda n: n.startswith('state|') and leaf in n)
    run.load(index, iteration)  # its checksums are right
    with pytest.raises(conversion.DivergedError) as caught:
      run.convert(index, start)
  operator = blocks.parse(name).operators[0]
  assert caught.value.operator == operator
  assert caught.value.iteration == iteration
  assert caught.value.suspects == (iteration,)
  assert str(operator) in str(caught.value)
  assert f'state {iteration}' in str(caught.value)


@pytest.mark.parametrize('iteration', [4, 5])
@pytest.mark.parametrize('index', [0, 1])
def test_a_planted_bit_of_compute_weights_is_found(
  two_stages, index, iteration
):
  """It changes what is published, or the update of who is active already."""
  run = two_stages
  path = run.snapshots(index)[iteration]
  start = next(s for s in run.starts(index) if s.iteration == 4)
  with _put_back(path):
    _plant(path, lambda n: n.startswith('compute|') and 'norm' in n, 0x40)
    with pytest.raises(
      (conversion.DivergedError, errors.EntryMismatchError)
    ) as caught:
      run.convert(index, start)
  assert f'{iteration + 1}' in str(caught.value)


# ---- recorded gradients ------------------------------------------------------


def _recording(optimizer=None, **train):
  """A run of two stages whose snapshots hold gradients, with windows of 3."""
  config = conversions.run_config(
    model=_MODEL,
    optimizer=optimizer or _CLIP,
    stages=2,
    microbatches=2,
    **train,
  )
  pieces = [conversions.Piece(1, 3, replay=decision.UPDATES)]
  return conversions.recorded(config, pieces)


@pytest.fixture(scope='module')
def recording():
  """Such a run; the tests put back what they change."""
  with _recording() as run:
    yield run


@pytest.mark.parametrize('iteration', [5, 6, 8])
def test_a_planted_bit_of_a_gradient_is_found_with_its_record(
  recording, iteration
):
  """The record alone is suspect: all before it came out right."""
  run, index = recording, 1
  path = run.snapshots(index)[iteration]
  start = next(s for s in run.starts(index) if s.iteration == 4)
  active = run.load(index, start.iteration).state.keys()

  def is_used(name):
    block = blocks.parse(name)
    kind = block.kind if block else ''
    return kind == 'gradients' and active & set(block.operators)

  with _put_back(path):
    _plant(path, is_used, 0x40)
    run.load(index, iteration)  # its checksums are right
    with pytest.raises(conversion.DivergedError) as caught:
      run.convert(index, start)
  assert caught.value.iteration == iteration
  assert caught.value.suspects == (iteration,)


@pytest.mark.parametrize('kind', ['flipped', 'gone'])
@pytest.mark.parametrize('iteration', [9, 10])
def test_an_iteration_without_its_record_is_done_again(
  recording, kind, iteration
):
  run, index = recording, 0
  with _put_back(path := run.snapshots(index)[iteration]):
    _damage(path, kind)
    rebuilt, lost = run.recover(index)
  assert lost == ([iteration] if kind == 'flipped' else [])
  assert rebuilt.start.applied_until == iteration - 1
  assert rebuilt.start.iteration == iteration - 3


def test_nothing_is_read_of_other_stages(recording):
  """No entry is needed up to the newest record, whatever the logs have."""
  run, index = recording, 0
  start = run.starts(index)[-1]
  assert start.applied_until == conversions.ITERATIONS
  kept = dict(run.entries.entries)
  run.entries.entries.clear()
  try:
    run.convert(index, start)
  finally:
    run.entries.entries.update(kept)


def test_a_state_is_digested_once(recording):
  """What the conversion compared is what the worker reports."""
  run, index = recording, 1
  calls = []
  one = run.stages[index]

  def digest(state):
    calls.append(None)
    return one.programs.digest(state)

  programs = dataclasses.replace(one.programs, digest=digest)
  counted = dataclasses.replace(
    run,
    stages=tuple(
      dataclasses.replace(x, programs=programs) if x is one else x
      for x in run.stages
    ),
  )
  start = next(s for s in run.starts(index) if s.iteration)
  last = start.applied_until
  assert last > start.iteration
  counted.convert(index, start, until=last)
  assert len(calls) == 1 + last - start.iteration


def test_updates_that_are_left_out_are_left_out_again():
  """A record says that; its gradients are not finite."""
  with _recording(
    {'clip_norm': 0.0, 'learning_rate': 1e30}, skip_nonfinite=True
  ) as run:
    skipped = {r.iteration for r in run.reports[0] if not r.updated}
    assert skipped and skipped != {*range(1, conversions.ITERATIONS + 1)}
    for index in range(2):
      for start in run.starts(index):
        run.convert(index, start)


def test_an_optimizer_that_makes_nans_of_zeros(monkeypatch):
  """What a frozen operator becomes of none is thrown away."""

  def update(updates, state, params=None):
    del params
    scale = lambda g: -0.01 * g / jnp.sqrt(jnp.sum(g * g))  # noqa: E731
    return jax.tree.map(scale, updates), state

  optimizer = optax.GradientTransformation(lambda params: {}, update)
  monkeypatch.setattr(
    transformer_job.TransformerJob, 'optimizer', lambda job: optimizer
  )
  conversions.compiled.cache_clear()
  try:
    with _recording(seed=1) as run:
      for start in run.starts(1)[1:]:
        run.convert(1, start)
  finally:
    conversions.compiled.cache_clear()


# ---- a second time -----------------------------------------------------------


def test_snapshots_taken_again_after_a_conversion_hold_the_same(two_stages):
  run, index, since = two_stages, 1, 7
  with contextlib.ExitStack() as stack:
    before = {}
    for iteration, path in run.snapshots(index).items():
      if iteration >= since:
        with snapshot_file.open_snapshot(path) as stored:
          before[iteration] = (
            {
              n: (b.checksum, b.identity)
              for n, b in stored.manifest.buffers.items()
            },
            stored.metadata,
          )
        stack.enter_context(_put_back(path))
        _damage(path, 'gone')
    start = run.starts(index)[-1]
    assert start.complete_at == since - 1
    again = run.snapshotter(index, [conversions.Piece(1, 3)])
    again.start()
    stack.callback(again.close)
    run.convert(index, start, snapshots=again)
    again.flush()
    after = {}
    for iteration, path in run.snapshots(index).items():
      if iteration >= since:
        with snapshot_file.open_snapshot(path, verify=True) as stored:
          after[iteration] = (
            {
              n: (b.checksum, b.identity)
              for n, b in stored.manifest.buffers.items()
            },
            stored.metadata,
          )
    chex.assert_equal(after, before)
    # And from those a stage can be rebuilt once more.
    assert run.recover(index)[0].start.iteration == 8
