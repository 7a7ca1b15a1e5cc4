"""A model small enough to compile in a second, and runs of it."""

from __future__ import annotations

import contextlib
import math
import os
import pathlib
import resource
import shutil
import subprocess
import sys
from typing import Any

import jax
import numpy as np
import pytest
from jax import numpy as jnp

from launch.chaos import draw
from launch.lm import settings as run_settings
from models import config as model_config, stages
from moetion_jax import config as config_lib, keys, report
from moetion_jax.programs import mesh, stage as stage_lib
from moetion_jax.runtime import spec as spec_lib
from moetion_jax.runtime.hosts import child_process
from moetion_jax.snapshots import file as snapshot_file, manifest
from moetion_jax.state import partition
from tests.support import one_process

ROOT = pathlib.Path(__file__).resolve().parents[2]
# A text that stays what it is: what a test finds must not depend on commits.
DATA = ROOT / 'LICENSE'
# Shared by all tests and kept between sessions: compiling is most of the time.
CACHE = os.path.expanduser('~/.cache/moetion_jax_tests')
# fp32 and dropless: sequences do not meet, and rounding is small.
FP32_MODEL = model_config.ModelConfig(
  vocab_size=13,
  sequence_length=6,
  num_layers=4,
  model_dim=8,
  num_heads=2,
  num_kv_heads=1,
  head_dim=4,
  num_experts=4,
  experts_per_token=2,
  expert_dim=6,
  shared_dim=4,
  dense_dim=8,
  first_dense_layers=1,
  capacity_factor=0.0,
  compute_dtype='float32',
)
MICRO_FLAGS = [f'--model={k}={v}' for k, v in draw.MICRO_FIELDS.items()]


def micro_model(**fields: Any) -> model_config.ModelConfig:
  return model_config.ModelConfig(**{**draw.MICRO_FIELDS, **fields})


def micro_run(
  model: dict[str, Any] | None = None,
  optimizer: dict[str, Any] | None = None,
  **train: Any,
) -> run_settings.RunConfig:
  """A run of the micro model: 4 microbatches of 8 sequences by default."""
  defaults = {
    'iterations': 4,
    'microbatches': 4,
    'microbatch_size': 8,
    'eval_every': 2,
    'eval_microbatches': 2,
  }
  return run_settings.RunConfig(
    preset='tiny',
    model=micro_model(**(model or {})),
    train=config_lib.TrainConfig(
      **{**defaults, **train},
      optimizer=config_lib.OptimizerConfig(
        **{'decay_iterations': 8, 'warmup_iterations': 2, **(optimizer or {})}
      ),
    ),
    data=str(DATA),
  )


def worker_spec(config: run_settings.RunConfig, **fields: Any) -> spec_lib.Spec:
  """What a worker of a run on one host is told, for what reads it only."""
  defaults: dict[str, Any] = {
    'stage': spec_lib.STANDBY,
    'generation': 0,
    'agent_pid': os.getpid(),
    'cores': (0, 1),
    'compilation_cache_dir': '',
    'folder': '',
    'handover_folder': '',
    'host': '',
    'secret': '',
    'platform': 'cpu',
    'status_fd': -1,
    'control_fd': -1,
  }
  return spec_lib.Spec(job=config.job_spec(), **{**defaults, **fields})


def train_locally(config: run_settings.RunConfig):
  """(reports by iteration and stage, workers) of a whole run in-process."""
  workers = one_process.make_workers(config)
  reports: list[list] = []
  one_process.train(config, workers, lambda r: reports.append(list(r)))
  return reports, workers


def digests_of(
  stage: stage_lib.Stage, state: partition.State
) -> dict[keys.OperatorId, np.ndarray]:
  """Of a worker's training state, without compiling all of its programs."""
  digest = jax.shard_map(
    stage.functions.digest,
    mesh=stage.mesh,
    in_specs=(stage.state_specs,),
    out_specs=mesh.SAME,
    check_vma=False,
  )
  return stage.partition.by_operator(jax.jit(digest)(state))


@contextlib.contextmanager
def small_tmpfs(path: pathlib.Path):
  """Mounts a tmpfs of 64 MiB at a new folder; skips the test if it may not."""
  path.mkdir()
  mount = ['mount', '-t', 'tmpfs', '-o', 'size=64m', 'none', str(path)]
  if subprocess.run(mount, capture_output=True).returncode:
    pytest.skip('mounting a tmpfs is not allowed here')
  yield path
  subprocess.run(['umount', '--lazy', str(path)], check=True)


def random_bits(seed: int, shape, dtype='float32') -> np.ndarray:
  """Any bits, NaNs and infinities included."""
  rng = np.random.default_rng(seed)
  if dtype == 'bool':
    return rng.integers(0, 2, shape).astype(bool)
  dtype = jnp.dtype(dtype)
  words = rng.bytes(math.prod(shape) * dtype.itemsize)
  return np.frombuffer(words, dtype).reshape(shape)


def launch(module: str, *arguments: str, timeout_seconds: float = 120):
  """Runs `python -m launch.MODULE` to its end; captures its output."""
  return subprocess.run(
    [sys.executable, '-m', f'launch.{module}', *arguments],
    cwd=ROOT,
    capture_output=True,
    text=True,
    timeout=timeout_seconds,
  )


def train_flags(workdir: object, *more: str) -> list[str]:
  """Flags of a quick run of the micro model.

  No standby: to prepare one is half of what such a run computes.
  """
  return [
    f'--workdir={workdir}',
    f'--compilation_cache_dir={CACHE}',
    f'--data={DATA}',
    *MICRO_FLAGS,
    '--iterations=6',
    '--microbatches=3',
    '--microbatch_size=8',
    '--eval_every=3',
    '--eval_microbatches=2',
    '--nostandby',
    *more,
  ]


def bits_of(tree: Any) -> Any:
  """A tree's leaves as (dtype, shape, bytes): NaNs compare by their bits."""
  return jax.tree.map(
    lambda a: (str(a.dtype), a.shape, np.asarray(a).tobytes()), tree
  )


def make_report(iteration: int, stage: int = 0, **fields: Any) -> report.Report:
  """What a worker reports of an iteration in which nothing was special."""
  plain = {
    'iteration': iteration,
    'stage': stage,
    'loss': 1.0,
    'auxiliary_loss': 0.0,
    'grad_norm': 1.0,
    'dropped': 0,
    'updated': True,
    'digests': {},
    'eval_loss': None,
    'seconds': 1.0,
    'waited_seconds': 0.0,
  }
  return report.Report(**{**plain, **fields})


def make_change():
  """An entry of `changes` in config.json, of a splice that is finished."""
  return {
    'names': ['jax'],
    'from': {'jax': '1'},
    'to': {'jax': '2'},
    'exact_until': 4,
    'complete_at': [6, 7],
  }


def make_lie(path, words):
  """Gives a snapshot another number, in a leaf with words, and checksums."""
  with snapshot_file.open_snapshot(path) as old:
    arrays = {name: np.array(a) for name, a in old.arrays.items()}
    metadata = old.metadata
  name = next(n for n in arrays if n.startswith('state|') and words in n)
  arrays[name].reshape(-1)[0] += 1
  shutil.rmtree(path)
  path.mkdir()
  buffers = [
    manifest.Buffer(n, a.dtype, a.shape, [a]) for n, a in arrays.items()
  ]
  snapshot_file.write(path, buffers, metadata)


def num_parameters(
  config: model_config.ModelConfig, *, active: bool = False
) -> int:
  """Counts the whole model's parameters.

  Args:
    config: the model's shape.
    active: whether only those that one token meets are counted.
  """
  (spec,) = stages.cut(config, 1)
  total = 0
  for name, leaf in stages.build_stage(config, spec, seed=0).shapes.items():
    size = leaf.size
    if active and stages.partition(name).stacked:
      size = size // config.num_experts * config.experts_per_token
    total += size
  return total


def fill(folder, left_bytes=0):
  """Fills the file system of a folder, but for so much, with a file `fill`."""
  path = pathlib.Path(folder, 'fill')
  with contextlib.suppress(OSError), open(path, 'wb', buffering=0) as file:
    while True:
      file.write(bytes(4096))
  os.truncate(path, path.stat().st_size - left_bytes)


@contextlib.contextmanager
def no_descriptor(left=0):
  """Lets this process open no further file, or a few, while this lasts."""
  soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
  lowest = os.open(os.devnull, os.O_RDONLY)
  os.close(lowest)
  resource.setrlimit(resource.RLIMIT_NOFILE, (lowest + left, hard))
  try:
    yield
  finally:
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def print_as(child: child_process.ChildProcess, line: str) -> None:
  """Has a child's output end with a line, as if the child had printed it."""
  fd = os.open(f'/proc/self/fd/{child.output_fd}', os.O_WRONLY)
  os.write(fd, line.encode() + b'\n')
  os.close(fd)
