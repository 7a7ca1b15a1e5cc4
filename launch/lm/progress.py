"""Shows people how a run goes on."""

from __future__ import annotations

import datetime
import math
import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from moetion_jax.runtime.records import recorder

if TYPE_CHECKING:
  import rich.progress


class Progress(recorder.View):
  """One line an iteration; on a terminal a live bar instead.

  The rate shown is that of the line's iteration; the
  estimate of the time left omits the first iteration, which warms caches.
  """

  def __init__(self, iterations: int, tokens_per_iteration: int):
    self._iterations = iterations
    self._tokens = tokens_per_iteration
    self._terminal = sys.stdout.isatty()
    self._bar: rich.progress.Progress | None = None
    self._task: Any = None
    self._first: tuple[int, float] | None = None

  def __enter__(self) -> Progress:
    if self._terminal:
      # Here: it is a tenth of what a command imports before its workers start.
      import rich.console
      import rich.progress

      self._bar = rich.progress.Progress(
        rich.progress.TextColumn('{task.completed}/{task.total}'),
        rich.progress.BarColumn(),
        rich.progress.TextColumn('{task.fields[text]}'),
        rich.progress.TextColumn('{task.fields[stages]}', markup=False),
        console=rich.console.Console(),
      )
      self._task = self._bar.add_task(
        '', total=self._iterations, text='', stages=''
      )
      self._bar.start()
    return self

  def __exit__(self, *unused: object) -> None:
    if self._bar:
      self._bar.stop()

  def stages(self, states: Sequence[str]) -> None:
    """Shows what each worker does at this moment, on a terminal."""
    if self._bar:
      text = '\n'.join(f'{i}: {state}' for i, state in enumerate(states))
      self._bar.update(self._task, stages=text)

  def show(self, line: dict[str, Any], busy: Sequence[float]) -> None:
    """Shows one line of `metrics.jsonl`, see `View`."""
    iteration, now = line['iteration'], time.monotonic()
    if self._first is None:
      self._first = (iteration, now)
    since, begun = self._first
    left = math.nan
    if iteration > since:
      left = (
        (now - begun) / (iteration - since) * (self._iterations - iteration)
      )
    parts = [
      f'loss {line["loss"]:.4f}',
      f'norm {line["grad_norm"]:.2f}',
      f'{self._tokens / max(line["seconds"], 1e-9):,.0f} tokens/s',
    ]
    parts.append('busy ' + '/'.join(f'{share:.0%}' for share in busy))
    if not math.isnan(left):
      parts.append(f'ETA {datetime.timedelta(seconds=round(left))}')
    if line['skipped']:
      parts.append(f'SKIPPED (not finite), {line["skipped"]} in a row')
    if 'eval_loss' in line:
      parts.append(f'held-out {line["eval_loss"]:.4f}')
    text = '  '.join(parts)
    if self._bar:
      self._bar.update(self._task, completed=iteration, text=text)
      if 'eval_loss' in line:
        self.note(f'iteration {iteration}  {text}')
    else:
      print(f'iteration {iteration}/{self._iterations}  {text}', flush=True)

  def note(self, text: str) -> None:
    """Prints a line beside the progress."""
    if self._bar:
      self._bar.console.print(text, highlight=False)
    else:
      print(text, flush=True)
