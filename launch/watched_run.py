"""A real run of `launch.train`, seen from outside through what it writes."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import pathlib
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from launch import parent_death, scratch

_TIMEOUT_SECONDS = 300.0
_POLL_SECONDS = 0.002


class WatchedRun:
  """A running `launch.train`; see the module.

  Attributes:
    workdir: of the run.
    process: the agent.
  """

  def __init__(self, folder: pathlib.Path, flags: Sequence[str]):
    self.workdir = folder / 'run'
    self._read: dict[str, tuple[Any, list[dict[str, Any]]]] = {}
    self._output = open(folder / 'output', 'wb')
    self.process = subprocess.Popen(
      [
        sys.executable,
        '-m',
        'launch.train',
        f'--workdir={self.workdir}',
        *flags,
      ],
      stdout=self._output,
      stderr=subprocess.STDOUT,
      preexec_fn=functools.partial(parent_death.die_with, os.getpid()),
    )

  def lines(self, name: str) -> list[dict[str, Any]]:
    """Of a .jsonl file; a line that is being written does not count."""
    path = self.workdir / name
    found = path.stat() if path.exists() else None
    version = (found.st_size, found.st_mtime_ns) if found else None
    known = self._read.get(name)
    # Read again only when it has grown: looking must cost next to nothing.
    if known is None or known[0] != version:
      text = path.read_text() if found else ''
      lines = text[: text.rfind('\n') + 1].splitlines()
      known = self._read[name] = version, [json.loads(line) for line in lines]
    return known[1]

  def output(self) -> str:
    """What it printed so far."""
    self._output.flush()
    return pathlib.Path(self._output.name).read_text()

  def newest(self) -> int:
    """Iteration of the newest line."""
    lines = self.lines('metrics.jsonl')
    return lines[-1]['iteration'] if lines else 0

  def workers(self) -> list[dict[str, Any]]:
    """Of workers.json."""
    path = self.workdir / 'workers.json'
    return json.loads(path.read_text())['workers'] if path.exists() else []

  def wait_for(self, condition: Callable[[], Any]) -> Any:
    """What `condition` returns once that is true.

    Raises:
      RuntimeError: the run ended before, or nothing changed for too long.
    """
    deadline = time.monotonic() + _TIMEOUT_SECONDS
    while not (value := condition()):
      if self.process.poll() is not None or time.monotonic() > deadline:
        raise RuntimeError(f'the run ended or hangs:\n{self.output()[-2000:]}')
      time.sleep(_POLL_SECONDS)
    return value

  def close(self) -> None:
    """Ends it, if it has not ended."""
    self.process.send_signal(signal.SIGINT)
    try:
      self.process.wait(60)
    except subprocess.TimeoutExpired:
      self.process.kill()
      self.process.wait()
    self._output.close()


@contextlib.contextmanager
def running(flags: Sequence[str], hostmem_dir: str) -> Iterator[WatchedRun]:
  """Starts a run in folders of its own; ends it, and they are gone.

  Args:
    flags: of `launch.train`.
    hostmem_dir: in tmpfs.
  """
  with scratch.folder() as folder, scratch.folder(hostmem_dir) as memory:
    run = WatchedRun(folder, [*flags, f'--hostmem_dir={memory}'])
    try:
      yield run
    finally:
      run.close()
