"""How every command of ours ends: one line for a wrong flag, exit code 2."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from absl import app, flags, logging

from moetion_jax import base


def run_main(main: Callable[[list[str]], int | None]) -> None:
  """Parses flags, runs `main`, exits with its code; never returns.

  A wrong flag or setting is one line on stderr and exit code 2.
  """
  name = os.path.basename(sys.argv[0])

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
    except base.ConfigError as e:
      _refuse(name, str(e))

  app.run(guarded, flags_parser=parse)


def _refuse(name: str, reason: str) -> NoReturn:
  print(f'{name}: error: {reason}', file=sys.stderr)
  sys.exit(2)
