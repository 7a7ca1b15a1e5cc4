"""What a JAX profile says of a device's copies to the host.

Reads the trace that `jax.profiler.trace` writes for Perfetto: of a GPU every
kernel and every copy, by stream.
"""

from __future__ import annotations

import dataclasses
import gzip
import json
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

_DEVICE, _STREAM, _TO_HOST = '/device:', 'Stream', 'MemcpyD2H'
_Span = tuple[float, float]  # begin, end


@dataclasses.dataclass(frozen=True)
class Overlap:
  """Of all devices in a profile together.

  Attributes:
    span_ms: from the first thing that a device did to the last.
    busy_ms: in which it computed, or copied what does not go to the host.
    copies_ms: in which something was copied to the host.
    overlapped: share of `copies_ms` that is part of `busy_ms`, too.
  """

  span_ms: float
  busy_ms: float
  copies_ms: float
  overlapped: float


def read(folder: str) -> Overlap:
  """Of the newest profile in a folder; all is 0 where devices have no streams.

  Raises:
    OSError: there is none.
  """
  found = sorted(pathlib.Path(folder).glob('**/*.trace.json.gz'))
  if not found:
    raise FileNotFoundError(f'{folder}: no profile is in it')
  newest = max(found, key=lambda path: path.stat().st_mtime)
  with gzip.open(newest) as file:
    return overlap(json.load(file)['traceEvents'])


def overlap(events: Iterable[Mapping[str, Any]]) -> Overlap:
  """Of the events of a trace, in its format."""
  events = list(events)
  processes: dict[int, str] = {}
  threads: dict[tuple[int, int], str] = {}
  for event in events:
    if event.get('ph') == 'M' and event['name'] == 'process_name':
      processes[event['pid']] = event['args']['name']
    if event.get('ph') == 'M' and event['name'] == 'thread_name':
      threads[event['pid'], event['tid']] = event['args']['name']
  busy: list[_Span] = []
  copies: list[_Span] = []
  for event in events:
    if event.get('ph') != 'X':
      continue
    process = processes.get(event['pid'], '')
    thread = threads.get((event['pid'], event['tid']), '')
    if not process.startswith(_DEVICE) or not thread.startswith(_STREAM):
      continue
    is_copy = event['name'].startswith(_TO_HOST)
    begin = event['ts'] / 1e3
    span = begin, begin + event.get('dur', 0) / 1e3
    (copies if is_copy else busy).append(span)
  if not busy:
    return Overlap(0.0, 0.0, 0.0, 0.0)
  busy, copies = _union(busy), _union(copies)
  both = _total(busy) + _total(copies) - _total(_union([*busy, *copies]))
  everything = _union([*busy, *copies])
  return Overlap(
    span_ms=everything[-1][1] - everything[0][0],
    busy_ms=_total(busy),
    copies_ms=_total(copies),
    overlapped=both / _total(copies) if copies else 0.0,
  )


def _union(spans: Iterable[_Span]) -> list[_Span]:
  out: list[_Span] = []
  for begin, end in sorted(spans):
    if out and begin <= out[-1][1]:
      out[-1] = out[-1][0], max(out[-1][1], end)
    else:
      out.append((begin, end))
  return out


def _total(spans: Iterable[_Span]) -> float:
  return sum(end - begin for begin, end in spans)
