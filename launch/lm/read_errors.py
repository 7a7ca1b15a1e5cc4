"""Errors of reading a checkpoint, for people: one line that names the file."""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import re
from collections.abc import Iterator

_MAX_CHARACTERS = 300
# TensorStore and Orbax add where in their sources they were, and all settings.
_INTERNAL = re.compile(r'\s*\[(source locations|tensorstore_spec)=.*')
_QUOTED = re.compile(r"""["']([^"']+)["']""")


def first_line(error: BaseException) -> str:
  """Returns the first line of an error, without what is for programmers."""
  lines = [x for x in map(str.strip, str(error).splitlines()) if x]
  text = _INTERNAL.sub('', lines[0]) if lines else type(error).__name__
  if len(text) > _MAX_CHARACTERS:
    text = text[:_MAX_CHARACTERS].rpartition(' ')[0] + ' ...'
  return text


def explain(path: str, error: BaseException) -> str:
  """Says which file of a checkpoint is why it cannot be read.

  Args:
    path: the checkpoint's folder.
    error: what reading it raised.

  Returns:
    The end of a sentence; without a file where the error names none.
  """
  folder = os.path.realpath(path)
  text = str(error)
  for name in reversed(_QUOTED.findall(text)):  # the innermost cause is last
    file = os.path.realpath(os.path.join(folder, name))
    if file.startswith(folder + os.sep) and not os.path.isdir(file):
      short = os.path.relpath(file, folder)
      if not os.path.exists(file):
        return f'its file {short} is missing'
      return f'its file {short} is damaged: {first_line(error)}'
  return first_line(error)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
  """Keeps asyncio from printing errors of tasks that nobody asked for.

  Orbax reads leaves in parallel; when several fail, it raises one error, and
  asyncio prints the tracebacks of the others.
  """
  logger = logging.getLogger('asyncio')
  level = logger.level
  logger.setLevel(logging.CRITICAL + 1)
  try:
    yield
  except BaseException:
    gc.collect()  # tasks are asked for their errors when they are collected
    raise
  finally:
    logger.setLevel(level)
