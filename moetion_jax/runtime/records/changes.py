"""The environments that a run had, and where it changed, in config.json.

`environment` is the record of what the run computes with now. `changes` has an
entry for each time that a user accepted another one: `names`, the values `from`
and `to`, and the fields of the splice; `pending` while what the old software
did after the splice is not removed yet.
"""

from __future__ import annotations

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from moetion_jax import codec, errors
from moetion_jax.recovery import splice as splice_lib
from moetion_jax.runtime import environment
from moetion_jax.runtime.records import files as record_files

ENVIRONMENT, CHANGES = 'environment', 'changes'
# Of versions of this program before there was an environment.
SOFTWARE = 'software'
_PENDING = 'pending'


class Changes:
  """Compares a run's environment with the recorded one, and records it.

  Set `known`, then call `check` and `write`; where `is_due`, `begin` and
  `finish` as well.

  Attributes:
    known: the content of config.json; {} for a run that is new.
  """

  def __init__(
    self, path: pathlib.Path, accepted: Sequence[str] = (), mode: int = 0o644
  ):
    """Stores the arguments.

    Args:
      path: path of config.json.
      accepted: names of what may have changed.
      mode: the file's mode.
    """
    self._mode = mode
    self.known: dict[str, Any] = {}
    self._path = path
    self._accepted = tuple(accepted)
    self._changed: list[environment.Change] = []
    self._here: environment.Record = {}

  @property
  def splices(self) -> tuple[splice_lib.Splice, ...]:
    """The places where the run went on with another environment, in order."""
    return splices_of(self.known.get(CHANGES, ()))

  @property
  def accepted_before(self) -> int:
    """The number of finished changes, but for one of this start."""
    return finished_of(self.known.get(CHANGES, ()))

  @property
  def may_splice(self) -> bool:
    """True if the run was spliced, or may be now."""
    return bool(self._accepted or self.known.get(CHANGES))

  def check(self, here: environment.Record) -> None:
    """Compares the recorded environment with that of all workers.

    Args:
      here: the environment of now.

    Raises:
      errors.ConfigError: something has changed that is not accepted, or an
        accepted name is unknown.
    """
    if refused := self.refused(here):
      raise errors.ConfigError(
        'workdir',
        str(self._path.parent),
        f'holds a run made with {environment.describe(refused)}: other bits '
        'would follow. Go on with what it was made with, or pass '
        f'--accept_changes={environment.names_of(self._changed)}',
      )

  def refused(self, here: environment.Record) -> list[environment.Change]:
    """Compares the recorded environment with that of now.

    Args:
      here: the environment of now.

    Returns:
      What has changed and is not accepted.

    Raises:
      errors.ConfigError: an accepted name is unknown.
    """
    self._here = here
    self._changed = []
    if self.known:
      self._changed = environment.changes(recorded(self.known, here), here)
    earlier = {n for one in self.known.get(CHANGES, ()) for n in one['names']}
    environment.check_names(self._accepted, self._changed, here, earlier)
    return [x for x in self._changed if x.name not in self._accepted]

  def write(
    self,
    config: Mapping[str, Any],
    marks: Mapping[str, Any] | None = None,
    replaced: Sequence[str] = (),
  ) -> None:
    """Records the environment; one that has changed is left to `begin`.

    Args:
      config: the content of config.json of a new run, without environment.
      marks: further content, which says which run it is.
      replaced: names of what is left out, unless it is in `marks`.
    """
    here = {} if self.known and self._changed else {ENVIRONMENT: self._here}
    known = {k: v for k, v in self.known.items() if k not in replaced}
    value = {**(known or config), **here, **(marks or {})}
    if value != self.known:
      self._replace(value)

  def is_due(self, start: int) -> bool:
    """Returns whether going on from `start` needs a splice.

    It does if the environment has changed, if the last splice was not finished,
    and if nothing is left from which the run could go on behind it.
    """
    is_pending = pending_of(self.known.get(CHANGES, ())) is not None
    splices = self.splices
    is_before = bool(splices) and start < splices[-1].exact_until
    return bool(self._changed) or is_pending or is_before

  def begin(self, splice: splice_lib.Splice) -> None:
    """Records a splice, before anything is removed for it.

    Whoever dies before `finish` has it done again by the next start.
    """
    entries = [dict(entry) for entry in self.known.get(CHANGES, ())]
    if self._changed:
      what: dict[str, Any] = {
        'names': [one.name for one in self._changed],
        'from': {one.name: one.was for one in self._changed},
        'to': {one.name: one.now for one in self._changed},
      }
    else:
      what = {name: entries[-1][name] for name in ('names', 'from', 'to')}
    if entries and entries[-1].pop(_PENDING, False) and not self._changed:
      entries.pop()
    entries.append({**what, **codec.encode(splice), _PENDING: True})
    self._changed = []
    self._replace({**self.known, ENVIRONMENT: self._here, CHANGES: entries})

  @property
  def newest(self) -> dict[str, Any]:
    """The last splice, whether it is finished or not.

    It has `names`, `from`, `to`, `exact_until`, `complete_at`.
    """
    last = self.known[CHANGES][-1]
    return {name: value for name, value in last.items() if name != _PENDING}

  def finish(self) -> dict[str, Any]:
    """Records that all is removed that the splice left behind.

    Returns:
      The entry, as `newest` has it.
    """
    last = self.newest
    self._replace({**self.known, CHANGES: [*self.known[CHANGES][:-1], last]})
    return last

  def _replace(self, value: Mapping[str, Any]) -> None:
    # Until the environment is there, `software` says what the run is of.
    self.known = {
      k: v
      for k, v in value.items()
      if k != SOFTWARE or ENVIRONMENT not in value
    }
    record_files.write_json(str(self._path), self.known, self._mode)


def recorded(
  config: Mapping[str, Any], here: environment.Record
) -> environment.Record:
  """Returns a run's recorded environment, completed by that of now.

  Args:
    config: the content of config.json, perhaps of an earlier version.
    here: the environment of now.
  """
  if known := config.get(ENVIRONMENT):
    return environment.completed(known, here)
  return environment.from_software(config.get(SOFTWARE) or {}, here)


def check_content(config: Mapping[str, Any], stages: int | None = None) -> None:
  """Checks what a file says of environments: it may be damaged, or edited.

  Args:
    config: the content of the file.
    stages: the number of stages; None: any.

  Raises:
    ValueError: it cannot be used; says what is wrong where.
  """
  for name in (ENVIRONMENT, SOFTWARE):
    sections = config.get(name, {})
    if not isinstance(sections, dict):
      raise ValueError(f'"{name}" in it is no object')
  for name, section in config.get(ENVIRONMENT, {}).items():
    if not isinstance(section, dict):
      raise ValueError(f'"{ENVIRONMENT}.{name}" in it is no object')
  entries = config.get(CHANGES, [])
  if not isinstance(entries, list):
    raise ValueError(f'"{CHANGES}" in it is no list')
  for number, entry in enumerate(entries, 1):
    if wrong := _wrong_field(entry, stages):
      raise ValueError(f'"{CHANGES}" in it, entry {number}: {wrong}')
    if _PENDING in entry and number < len(entries):
      raise ValueError(
        f'"{CHANGES}" in it, entry {number}: "{_PENDING}", but not the last'
      )


def _wrong_field(entry: Any, stages: int | None) -> str:
  """Says what is wrong with an entry of `changes`; '' if nothing is."""
  if not isinstance(entry, dict):
    return 'no object'
  names, until = entry.get('names'), entry.get('exact_until')
  complete_at = entry.get('complete_at')
  if not isinstance(names, list) or not all(isinstance(n, str) for n in names):
    return '"names" is no list of names'
  for name in ('from', 'to'):
    if not isinstance(entry.get(name), dict):
      return f'"{name}" is no object'
  if type(until) is not int or until < 0:
    return '"exact_until" is no iteration'
  if not isinstance(complete_at, list) or any(
    type(iteration) is not int or iteration < until for iteration in complete_at
  ):
    return '"complete_at" is no list of iterations from "exact_until" on'
  if not complete_at or stages not in (None, len(complete_at)):
    return f'"complete_at" has {len(complete_at)} numbers, not one a stage'
  return ''


def pending_of(
  entries: Sequence[Mapping[str, Any]],
) -> splice_lib.Splice | None:
  """Returns the splice that was begun and not finished; None for none."""
  if not entries or _PENDING not in entries[-1]:
    return None
  return codec.decode_part(splice_lib.Splice, entries[-1])


def finished_of(entries: Sequence[Mapping[str, Any]]) -> int:
  """Returns the number of changes that were accepted and spliced to the end.

  Until then the place where the splice was begun holds what it is to remove.
  """
  return len(entries) - (pending_of(entries) is not None)


def splices_of(
  entries: Sequence[Mapping[str, Any]],
) -> tuple[splice_lib.Splice, ...]:
  """Returns the splices of `changes` in config.json."""
  return tuple(codec.decode_part(splice_lib.Splice, entry) for entry in entries)
