"""Why a checkpoint cannot be read, for people: the file, in one line.

Orbax keeps all arrays in one OCDBT database: a manifest, nodes of a tree, and
values in data files. What it raises names the array, seldom the file.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import tensorstore

_TREE_METADATA = '_METADATA'  # Orbax's, of the tree's structure
_MANIFEST = 'manifest.ocdbt'
_ARRAY = '/.zarray'  # ends the key of an array's description
_MAX_CHARACTERS = 300
# TensorStore and Orbax add where in their sources they were, and all settings.
_INTERNAL = re.compile(r'\s*\[(source locations|tensorstore_spec)=.*')


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
    The end of a sentence.
  """
  text = str(error)
  try:
    found = _damaged_file(path) or _file_of_array(path, text) or _misfit(path)
  except Exception as other:  # TensorStore raises many kinds
    found = first_line(other)
  # All else that is read has checksums.
  doubt = f'perhaps its file {_TREE_METADATA} is damaged: {first_line(error)}'
  return found or doubt


@contextlib.contextmanager
def quiet() -> Iterator[None]:
  """Keeps reads that are given up from printing tracebacks.

  Orbax reads arrays in parallel and raises the first error. Nobody asks for
  those of the other reads, which asyncio reports; some end later, in
  TensorStore's threads, and find the event loop closed. After an error this
  stays so: they are still to come.
  """
  before, logger = sys.unraisablehook, logging.getLogger('asyncio')
  logger.addFilter(_is_asked_for)  # once, however often it is added
  if not isinstance(before, _IgnoresClosedLoop):
    sys.unraisablehook = _IgnoresClosedLoop(before)
  yield
  sys.unraisablehook = before
  logger.removeFilter(_is_asked_for)


def _is_asked_for(record: logging.LogRecord) -> bool:
  """Filters what asyncio says of errors that nobody asked for."""
  return 'exception was never retrieved' not in record.getMessage()


class _IgnoresClosedLoop:
  """A `sys.unraisablehook` that passes on all but what late reads raise."""

  def __init__(self, inner: Callable[[Any], object]):
    """Stores the hook for everything else."""
    self._inner = inner

  def __call__(self, unraisable: Any) -> None:
    """Handles an exception that nobody can catch."""
    error = unraisable.exc_value
    is_late = isinstance(error, RuntimeError) and 'Event loop is' in str(error)
    if not is_late:
      self._inner(unraisable)


class _Place(NamedTuple):
  """A node or value of a database.

  Attributes:
    key: the value's key; '' for a node.
    location: its name for OCDBT, 'KIND:FOLDER:FILE:OFFSET:SIZE'.
  """

  key: str
  location: str

  @property
  def file(self) -> str:
    """The file that it is in, below the checkpoint's folder."""
    _, folder, file, *_ = self.location.split(':')
    return folder + file

  @property
  def end(self) -> int:
    """The bytes that the file has at least."""
    *_, offset, size = self.location.split(':')
    return int(offset) + int(size)


def _damaged_file(path: str) -> str:
  """Says which file is missing, torn or damaged, as far as OCDBT can tell."""
  for name in (_TREE_METADATA, _MANIFEST):
    if not os.path.exists(os.path.join(path, name)):
      return f'its file {name} is missing'
  try:
    with open(os.path.join(path, _TREE_METADATA), 'rb') as opened:
      json.load(opened)
  except (OSError, ValueError) as error:
    return f'its file {_TREE_METADATA} is damaged: {first_line(error)}'
  name = _MANIFEST
  try:
    for place in _places(path):
      name, file = place.file, os.path.join(path, place.file)
      if not os.path.exists(file):
        return f'its file {name} is missing'
      if (found := os.path.getsize(file)) < place.end:
        return (
          f'its file {name} is torn: it has {found} bytes, and needs '
          f'{place.end} or more'
        )
  except ValueError:  # TensorStore's, of the last node
    return f'its file {name} is damaged'
  return ''


def _file_of_array(path: str, text: str) -> str:
  """Says which file the array is in that an error names."""
  for place in _places(path):
    if place.key and f'"{place.key}"' in text:
      return f'its file {place.file} is damaged, in {place.key}'
  return ''


def _misfit(path: str) -> str:
  """Says which array the tree's structure names wrongly, or not at all."""
  base = {'driver': 'file', 'path': os.path.abspath(path) + '/'}
  spec = {'driver': 'ocdbt', 'base': base}
  store = tensorstore.KvStore.open(spec).result()
  found = (key.decode() for key in store.list().result())
  there = {n.removesuffix(_ARRAY) for n in found if n.endswith(_ARRAY)}
  with open(os.path.join(path, _TREE_METADATA), 'rb') as opened:
    tree = json.load(opened)['tree_metadata']
  named = {
    '.'.join(str(part.get('key')) for part in leaf['key_metadata'])
    for leaf in tree.values()
  }
  wrong = [f'names {name}, which is not there' for name in named - there]
  wrong += [f'lacks {name}' for name in there - named]
  if not wrong:
    return ''
  return f'its file {_TREE_METADATA} is damaged: it {min(wrong)}'


def _places(path: str) -> Iterator[_Place]:
  """Yields all nodes and values of a database, a node before what it names.

  Raises:
    ValueError: the manifest is damaged, or the node that was yielded last.
  """
  spec = {'driver': 'file', 'path': os.path.abspath(path) + '/'}
  base = tensorstore.KvStore.open(spec).result()
  manifest = tensorstore.ocdbt.dump(base).result()
  nodes = [manifest['versions'][-1]['root']['location']]
  while nodes:
    location = nodes.pop()
    yield _Place('', location)
    node = tensorstore.ocdbt.dump(base, location).result()
    for entry in node['entries']:
      if 'location' in entry:
        nodes.append(entry['location'])
      elif 'indirect_value' in entry:
        yield _Place(entry['key'].decode(), entry['indirect_value'])
