"""Runs a command's main: a wrong flag ends in one line and exit code 2."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from absl import app, flags, logging

from moetion_jax import errors


def run_main(name: str, main: Callable[[list[str]], int | None]) -> None:
  """Parses flags, runs `main`, exits with its code; never returns.

  A wrong flag or setting is one line on stderr and exit code 2.

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

  app.run(guarded, flags_parser=parse)


def _refuse(name: str, reason: str) -> NoReturn:
  print(f'{name}: error: {reason}', file=sys.stderr)
  sys.exit(2)
