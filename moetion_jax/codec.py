"""JSON of records, by their type hints alone, and strict.

A dataclass of keyword-only fields is an object, any other one (`OperatorId`) a
list. A union of dataclasses says which one it is in the field `kind`. A mapping
whose keys are no strings is a list of pairs. Numbers keep their digits: floats
are written as Python's `json` does, infinite ones and NaN too.
"""

from __future__ import annotations

import collections.abc
import contextlib
import dataclasses
import enum
import functools
import json
import types
import typing
from collections.abc import Callable, Mapping
from typing import Any

_KIND = 'kind'
_MAPPINGS = (dict, collections.abc.Mapping)
_UNIONS = (typing.Union, types.UnionType)
# What JSON has itself; True is no number.
_PLAIN = {str: (str,), bool: (bool,), int: (int,), float: (int, float)}


@dataclasses.dataclass(frozen=True)
class Form:
  """A form of one field's own, given as `Annotated[type, Form(...)]`.

  Attributes:
    encode: makes plain JSON of a value.
    decode: inverts `encode`.
  """

  encode: Callable[[Any], Any]
  decode: Callable[[Any], Any]


def read_object(text: bytes) -> dict[str, Any]:
  """Returns the JSON object in a text; an empty one if it is none.

  A line of a file may be torn by a death, or be of somebody else.
  """
  with contextlib.suppress(ValueError, RecursionError):
    value = json.loads(text)
    if isinstance(value, dict):
      return value
  return {}


def encode(value: Any, hint: Any = None) -> Any:
  """Converts a value to plain JSON values; `decode` is the inverse.

  Args:
    value: the value; it is not checked.
    hint: its type; None for that of the value itself.
  """
  hint = type(value) if hint is None else hint
  if hint in _PLAIN or hint is Any:
    return value
  origin, arguments = _parts(hint)
  if origin is typing.Annotated:
    return arguments[1].encode(value)
  if origin in _UNIONS:
    members = _members(hint)
    if value is None:
      return None
    if len(members) == 1:
      return encode(value, members[0])
    return encode_kind(value)
  if dataclasses.is_dataclass(hint):
    fields = {n: encode(vars(value)[n], h) for n, h in _hints(hint).items()}
    return fields if _is_object(hint) else list(fields.values())
  if isinstance(value, enum.Enum):
    return value.value
  if origin in _MAPPINGS:
    if arguments[0] is str:
      return {k: encode(v, arguments[1]) for k, v in value.items()}
    return [list(map(encode, pair, arguments)) for pair in value.items()]
  if origin is tuple:
    fixed = arguments[-1] is not ...
    hints = arguments if fixed else arguments[:1] * len(value)
    return list(map(encode, value, hints))
  return value


def encode_kind(value: Any) -> dict[str, Any]:
  """Converts a record to JSON as one of a union, see `encode`."""
  return {_KIND: type(value).__name__, **encode(value)}


def decode(hint: Any, value: Any, name: str = '') -> Any:
  """Makes a value of a type from plain JSON values.

  Args:
    hint: the type.
    value: what `encode` returned, or JSON made of that.
    name: the name of the value in errors; '' for that of its type.

  Raises:
    ValueError: `value` is of another type, or a field is unknown or missing;
      names class and field.
  """
  name = name or _name(hint)
  if hint is Any:
    return value
  if hint in _PLAIN:
    return _checked(_PLAIN[hint], value, name)
  origin, arguments = _parts(hint)
  if origin is typing.Annotated:
    return arguments[1].decode(value)
  if origin in _UNIONS:
    return _decode_union(hint, value, name)
  if isinstance(hint, type) and dataclasses.is_dataclass(hint):
    return _decode_record(hint, value)
  if isinstance(hint, type) and issubclass(hint, enum.Enum):
    try:
      return hint(value)
    except ValueError as error:
      raise ValueError(f'{name}: {error}') from error
  if origin in _MAPPINGS:
    is_object = arguments[0] is str
    found = _checked((dict if is_object else list,), value, name)
    return dict(
      _decode_each(arguments, pair, name)
      for pair in (map(list, found.items()) if is_object else found)
    )
  if origin is tuple and arguments[-1] is not ...:
    return _decode_each(arguments, value, name)
  if origin is tuple:
    items = _checked((list,), value, name)
    return tuple(decode(arguments[0], x, name) for x in items)
  return _checked((hint,), value, name)


def decode_part(kind: type, value: Mapping[str, Any]) -> Any:
  """Makes a record of an object that may have more fields; see `decode`."""
  return decode(kind, {n: value[n] for n in _hints(kind) if n in value})


def _decode_each(hints: Any, value: Any, name: str) -> tuple[Any, ...]:
  if len(_checked((list,), value, name)) != len(hints):
    raise ValueError(f'{name} must have {len(hints)} elements, not {value}')
  return tuple(decode(h, x, name) for h, x in zip(hints, value, strict=True))


def _decode_union(union: Any, value: Any, name: str) -> Any:
  members = _members(union)
  if value is None and types.NoneType in typing.get_args(union):
    return None
  if len(members) == 1:
    return decode(members[0], value, name)
  fields = dict(_checked((dict,), value, name))
  kind = fields.pop(_KIND, None)
  for one in members:
    if one.__name__ == kind:
      return _decode_record(one, fields)
  raise ValueError(f'{name} has no kind {kind!r}')


def _decode_record(kind: type, value: Any) -> Any:
  hints = _hints(kind)
  if not _is_object(kind):
    return kind(*_decode_each(hints.values(), value, kind.__name__))
  if unknown := _checked((dict,), value, kind.__name__).keys() - hints.keys():
    raise ValueError(f'{kind.__name__} has no field {sorted(unknown)[0]}')
  decoded = {
    field: decode(hints[field], x, f'{kind.__name__}.{field}')
    for field, x in value.items()
  }
  try:
    return kind(**decoded)
  except TypeError as error:  # its text names class and field
    raise ValueError(str(error)) from error


def _checked(kinds: tuple[type, ...], value: Any, name: str) -> Any:
  if type(value) not in kinds:
    wanted = ' or '.join(one.__name__ for one in kinds)
    raise ValueError(f'{name} must be of type {wanted}, not {value!r}')
  return value


def _members(union: Any) -> tuple[Any, ...]:
  kinds = typing.get_args(union)
  return tuple(one for one in kinds if one is not types.NoneType)


@functools.cache
def _name(hint: Any) -> str:
  return getattr(hint, '__name__', str(hint))


@functools.cache
def _parts(hint: Any) -> tuple[Any, tuple[Any, ...]]:
  return typing.get_origin(hint), typing.get_args(hint)


@functools.cache
def _is_object(kind: Any) -> bool:
  return all(field.kw_only for field in dataclasses.fields(kind))


@functools.cache
def _hints(kind: type) -> Mapping[str, Any]:
  return typing.get_type_hints(kind, include_extras=True)
