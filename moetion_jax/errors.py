"""Every error that this project raises on purpose."""

from __future__ import annotations

import contextlib
import enum
import errno
import os
import sys
from collections.abc import Callable, Collection, Mapping

# What the system refuses whatever file it is asked for, and what helps.
_LIMITS = {
  errno.EMFILE: 'raise the limit of open files of a process (ulimit -n)',
  errno.ENFILE: 'raise that of the machine (sysctl fs.file-max)',
  errno.ENOMEM: 'free memory',
}
_ACCESS = dict.fromkeys(
  (errno.EACCES, errno.EPERM), 'let this user read it, folders on the way too'
)


class ExitCode(enum.IntEnum):
  """Exit codes of a run, which tell a scheduler whether to start it again."""

  FINISHED = 0
  FAILED = 1  # the last line on stderr says if its cause is gone
  REFUSED = 2  # a setting is wrong
  STOPPED = 75  # by a signal; sysexits.h: temporary, to be tried again
  HUNG = 124  # as of timeout(1)


class MoetionError(Exception):
  """Base of every error this project raises on purpose.

  Attributes:
    exit_code: the exit code of a run that ends with it.
    is_passing: whether its cause ends with the run: the same command does not
      meet it again.
    suspects: iterations of snapshots that may be damaged, which would explain
      it.
  """

  exit_code = ExitCode.FAILED
  is_passing = False
  suspects: tuple[int, ...] = ()


class ConfigError(MoetionError):
  """A setting is unknown, out of range or contradicts another one.

  `exit_code_of` turns it into one line on stderr.

  Attributes:
    flag: name of the setting as the user writes it, without dashes.
    value: the value it was set to.
    reason: the fault, and what would be right.
  """

  exit_code = ExitCode.REFUSED

  def __init__(self, flag: str, value: object, reason: str):
    super().__init__(f'--{flag}={value}: {reason}')
    self.flag = flag
    self.value = value
    self.reason = reason


def exit_code_of(main: Callable[[], int | None], name: str = '') -> int:
  """Runs a command's main, in which settings may turn out to be wrong.

  Args:
    main: makes the settings and does the work; returns its exit code, None for
      `ExitCode.FINISHED`.
    name: the command's name in the error line; '' for that of the program.

  Returns:
    What `main` returned; the error's code after a ConfigError or a
    SystemRefusalError, which is told in one line on stderr.
  """
  try:
    try:
      return main() or ExitCode.FINISHED
    except OSError as error:
      check_limits(error)
      raise
  except (ConfigError, SystemRefusalError) as error:
    with contextlib.suppress(OSError):  # the exit code says enough
      name = name or os.path.basename(sys.argv[0])
      print(f'{name}: error: {error}', file=sys.stderr, flush=True)
    return error.exit_code


class SystemRefusalError(MoetionError):
  """The system refuses something, which says nothing of the file it is about.

  No descriptor is free, say: neither is a file damaged, nor a setting wrong.
  """


def check_limits(error: OSError, path: str | os.PathLike[str] = '') -> None:
  """Raises SystemRefusalError if a limit of the system is why it refused.

  Args:
    error: the system's error.
    path: what it was asked for, if the error does not say that.
  """
  _check_refusal(error, path, _LIMITS)


def check_refusal(error: OSError, path: str | os.PathLike[str] = '') -> None:
  """Raises SystemRefusalError as `check_limits`, or if access is denied."""
  _check_refusal(error, path, _LIMITS | _ACCESS)


def _check_refusal(
  error: OSError, path: str | os.PathLike[str], remedies: Mapping[int, str]
) -> None:
  if remedy := remedies.get(error.errno or 0):
    where = os.fspath(path) or error.filename
    raise SystemRefusalError(
      f'{f"{where}: " if where else ""}{error.strerror}: {remedy}, then start '
      'again'
    ) from error


def check_known(flag: str, value: str, known: Collection[str]) -> None:
  """Raises ConfigError unless `value` is one of the flag's known values."""
  if value not in known:
    raise ConfigError(flag, value, f'known are {", ".join(known)}')


class WrongBitsError(MoetionError):
  """Bits are not what they must be.

  A log entry that was damaged after it was verified may be the cause: whoever
  acts on such an error has all logs checked first.
  """


class NonFiniteError(WrongBitsError):
  """The loss or the gradient norm of an iteration is NaN or infinite.

  Attributes:
    what: the error without the advice.
    advice: what to do if no damage explains it.
  """

  def __init__(self, what: str, advice: str):
    """Makes the message of both."""
    super().__init__(f'{what}; {advice}')
    self.what = what
    self.advice = advice


class EntryMismatchError(WrongBitsError):
  """An entry was published twice with unequal contents: bits diverged."""


class UnmetError(MoetionError):
  """The members of a stage's world did not come together.

  None of them has worked yet: that is no failure of the stage. A run that
  starts again has other ports, and perhaps more time.
  """

  is_passing = True


class StoreError(MoetionError):
  """The host store is full, damaged or not usable here."""


class FencedError(StoreError):
  """This worker was replaced: a newer generation of it exists."""


class DamagedDiskError(StoreError):
  """A disk returned other bits than were written to it, several times."""


class NoRoomError(StoreError):
  """Host memory stayed full for the whole time allowed to wait for room."""
