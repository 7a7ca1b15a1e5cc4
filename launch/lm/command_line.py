"""Runs a command's main: a wrong flag ends in one line on stderr."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from absl import app, flags, logging

from launch.lm import streams
from moetion_jax import errors


def run_main(name: str, main: Callable[[list[str]], int | None]) -> None:
  """Parses flags, runs `main`, exits with its code; never returns.

  A wrong flag or setting is one line on stderr and `ExitCode.REFUSED`. When
  nobody reads the output any more the command ends quietly, unless `main`
  called `streams.outlive`.

  Args:
    name: the command's name in error lines.
    main: does the command's work; takes the arguments that are no flags.
  """

  def parse(argv: Sequence[str]) -> list[str]:
    try:
      return flags.FLAGS(list(argv))
    except flags.Error as e:
      _refuse(name, str(e).splitlines()[0])

  def guarded(argv: list[str]) -> int | None:
    if not flags.FLAGS['verbosity'].present:  # libraries narrate at INFO
      logging.set_verbosity(logging.WARNING)
    try:
      return main(argv)
    except errors.ConfigError as e:
      _refuse(name, str(e))

  streams.open_missing()
  try:
    try:
      app.run(guarded, flags_parser=parse)
    except BaseException as ended:
      is_success = isinstance(ended, SystemExit) and not ended.code
      _flush(is_needed=is_success or isinstance(ended, BrokenPipeError))
      raise
  except BrokenPipeError:
    broken = [fd for fd in (1, 2) if streams.is_broken(fd)]
    if not broken:
      raise  # it is another pipe
    for fd in broken:
      streams.silence(fd)
    sys.exit(streams.BROKEN_PIPE_CODE)


def _flush(*, is_needed: bool) -> None:
  """Writes what was printed; at its exit the interpreter would complain.

  Args:
    is_needed: whether it counts that nobody reads it: not in a command that
      failed anyway.
  """
  try:
    sys.stdout.flush()
  except BrokenPipeError:
    if is_needed:
      raise
    streams.silence(1)


def _refuse(name: str, reason: str) -> NoReturn:
  print(f'{name}: error: {reason}', file=sys.stderr)
  sys.exit(errors.ExitCode.REFUSED)
