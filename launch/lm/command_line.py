"""Runs a command's main: a wrong flag ends in one line on stderr."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
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
  called `streams.outlive`; so it does at Ctrl-C.

  Args:
    name: the command's name in error lines.
    main: does the command's work; takes the arguments that are no flags.
  """

  def parse(argv: Sequence[str]) -> list[str]:
    try:
      return flags.FLAGS(list(argv))
    except flags.Error as e:
      _refuse(name, str(e).splitlines()[0])

  def guarded(argv: list[str]) -> int:
    if not flags.FLAGS['verbosity'].present:  # libraries narrate at INFO
      logging.set_verbosity(logging.WARNING)
    return errors.exit_code_of(lambda: main(argv), name)

  streams.prepare()
  _check_text(name)
  try:
    try:
      app.run(guarded, flags_parser=parse)
    except BaseException as ended:
      try:  # at its exit the interpreter would complain
        sys.stdout.flush()
      except streams.LostError:
        if isinstance(ended, SystemExit) and not ended.code:
          raise
      raise  # what failed counts, not that nobody reads it
  except KeyboardInterrupt:  # ends as whoever does not catch it, in silence
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    os.kill(os.getpid(), signal.SIGINT)
  except streams.LostError as lost:
    if lost.errno == errno.EPIPE:
      sys.exit(streams.BROKEN_PIPE_CODE)
    _say(f'{name}: error: {lost.filename} cannot be written: {lost.strerror}')
    sys.exit(errors.ExitCode.FAILED)


def _check_text(name: str) -> None:
  """Refuses arguments and folders whose names libraries cannot take."""
  try:
    for text in (*sys.argv, os.getcwd()):
      text.encode()
  except UnicodeEncodeError as error:
    _refuse(
      name,
      f'{error.object!a}: is no text as this locale has it; set PYTHONUTF8=1, '
      'or name it in UTF-8',
    )
  except OSError as error:
    _refuse(name, f'the current folder: {error.strerror}; change to another')


def _refuse(name: str, reason: str) -> NoReturn:
  _say(f'{name}: error: {reason}')
  sys.exit(errors.ExitCode.REFUSED)


def _say(text: str) -> None:
  with contextlib.suppress(streams.LostError):  # the exit code says enough
    print(text, file=sys.stderr)
