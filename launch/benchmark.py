"""Measures what we claim: `python -m launch.benchmark SUBCOMMAND`.

Runs are paired (A B A B ...), so that a machine whose speed drifts does not
decide; figures are medians with 95 % intervals. `--out` gets a JSON file with
the table and the machine it was measured on.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Sequence
from typing import Any

from absl import flags

from launch import command
from moetion_jax import base

_PRESET = flags.DEFINE_string('preset', 'small', 'Shape of the model.')
_ROUNDS = flags.DEFINE_integer('rounds', 30, 'Measured pairs.')
_OUT = flags.DEFINE_string('out', '', 'Folder for tables as JSON.')

_WARM_UP_ROUNDS = 3


def _interleave(
  subjects: dict[str, Callable[[int], None]], rounds: int
) -> dict[str, list[float]]:
  """Seconds of each subject in each measured round, run in turn."""
  seconds: dict[str, list[float]] = {name: [] for name in subjects}
  for number in range(_WARM_UP_ROUNDS + rounds):
    for name, subject in subjects.items():
      begin = time.perf_counter()
      subject(number + 1)
      if number >= _WARM_UP_ROUNDS:
        seconds[name].append(time.perf_counter() - begin)
  return seconds


def pipeline(preset: str, rounds: int) -> dict[str, Any]:
  """Split programs against plain single-jit steps; digest against AdamW."""
  import jax
  import numpy as np

  from launch import baseline, local, settings, summary
  from moetion_jax import optimizers

  config = settings.make(
    preset,
    model_overrides=[],
    train_overrides={'stages': 1, 'eval_every': 0, 'iterations': 10_000},
    optimizer_overrides={},
  )
  train = config.train
  data = local.load_data(config)
  (ours,) = local.make_workers(config, data)

  def run_ours(number: int) -> None:
    ours.train(
      config.train,
      lambda _: None,
      stop=_after(1),
      first_iteration=number,
    )

  subjects: dict[str, Callable[[int], None]] = {'ours': run_ours}
  for name, unrolled in (('plain_scan', False), ('plain_unrolled', True)):
    step, initial = baseline.make_step(
      ours.stage.model,
      optimizers.make(train.optimizer),
      clip_norm=train.optimizer.clip_norm,
      microbatches=train.microbatches,
      unrolled=unrolled,
    )
    subjects[name] = _plain(step, initial(), data, train.microbatches)
  seconds = _interleave(subjects, rounds)

  # The digest beside a plain AdamW update of the same state.
  adamw, carry = baseline.make_update(
    ours.stage.model, optimizers.make(train.optimizer)
  )
  holder = [carry]
  gradients = jax.tree.map(lambda m: np.full(m.shape, 1e-3, 'f4'), carry[0])
  gradients = jax.device_put(gradients)

  def run_adamw(_: int) -> None:
    holder[0] = jax.block_until_ready(adamw(holder[0], gradients))

  small_parts = _interleave(
    {
      'digest': lambda _: jax.block_until_ready(
        ours.programs.digest(ours.state)
      ),
      'adamw': run_adamw,
    },
    max(rounds, 30),
  )
  tokens = (
    train.microbatches * train.microbatch_size * config.model.sequence_length
  )
  fastest = min(
    ('plain_scan', 'plain_unrolled'), key=lambda n: np.median(seconds[n])
  )
  rows = [
    _row(
      'tokens/s, ours', summary.summarize([tokens / s for s in seconds['ours']])
    ),  # fmt: skip # noqa: E501
  ]
  for name in ('plain_scan', 'plain_unrolled'):
    rows.append(
      _row(
        f'tokens/s, {name}',
        summary.summarize([tokens / s for s in seconds[name]]),
      )
    )
  rows += [
    _row(
      f'ours / faster plain step ({fastest})',
      summary.paired_ratio(seconds[fastest], seconds['ours']),
      '>= 0.95',
    ),
    _row(
      'digest / plain AdamW update',
      summary.paired_ratio(small_parts['digest'], small_parts['adamw']),
      '<= 0.7',
    ),
  ]
  return {'subcommand': 'pipeline', 'preset': preset, 'rows': rows}


def _after(count: int) -> Callable[[], bool]:
  """A `stop` that says yes when asked for the (count + 1)-th time."""
  asked = 0

  def stop() -> bool:
    nonlocal asked
    asked += 1
    return asked > count

  return stop


def _plain(step, carry, data, microbatches: int) -> Callable[[int], None]:
  import numpy as np

  holder = [carry]

  def run(number: int) -> None:
    batches = [data.batch(number, m) for m in range(microbatches)]
    holder[0], loss = step(
      holder[0],
      np.stack([b.inputs for b in batches]),
      np.stack([b.labels for b in batches]),
    )
    import jax

    jax.block_until_ready((holder[0], loss))

  return run


def _row(name: str, value: Any, goal: str = '') -> dict[str, Any]:
  return {'name': name, 'goal': goal, **vars(value)}


def show(result: dict[str, Any]) -> None:
  """Prints the table; writes it to --out."""
  import rich.console
  import rich.table

  from launch import runtime

  table = rich.table.Table(title=f'{result["subcommand"]}, {result["preset"]}')
  for column in ('figure', 'median', '95 % interval', 'quartiles', 'n', 'goal'):
    table.add_column(column)
  for row in result['rows']:
    table.add_row(
      row['name'],
      f'{row["median"]:.4g}',
      f'{row["low"]:.4g} .. {row["high"]:.4g}',
      f'{row["quartile_1"]:.4g} .. {row["quartile_3"]:.4g}',
      str(row['count']),
      row['goal'],
    )
  rich.console.Console(width=110).print(table)
  if _OUT.value:
    os.makedirs(_OUT.value, exist_ok=True)
    path = os.path.join(_OUT.value, f'{result["subcommand"]}.json')
    with open(path, 'w') as f:
      json.dump(
        result | {'software': runtime.software(), 'cores': os.cpu_count()},
        f,
        indent=2,
      )
    print(f'Written: {path}')


_SUBCOMMANDS: dict[str, Callable[[str, int], dict[str, Any]]] = {
  'pipeline': pipeline
}


def main(argv: Sequence[str]) -> None:
  """Runs one subcommand."""
  if len(argv) != 2 or argv[1] not in _SUBCOMMANDS:
    raise base.ConfigError(
      'subcommand', ' '.join(argv[1:]), f'one of {", ".join(_SUBCOMMANDS)}'
    )
  from launch import runtime

  runtime.configure(local_devices=1, compilation_cache_dir='')
  show(_SUBCOMMANDS[argv[1]](_PRESET.value, _ROUNDS.value))


if __name__ == '__main__':
  command.run_main(main)
