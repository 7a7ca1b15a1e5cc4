"""Reads a device's copies to the host from a JAX profile.

The source is the trace that `jax.profiler.trace` writes for Perfetto: on a GPU
it holds every kernel and every copy, by stream.
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
  """Overlap of copies and computation, over all devices of a profile.

  Attributes:
    span_ms: time from the first activity of any device to the last.
    busy_ms: time with computation, or with copies that do not go to the host.
    copies_ms: time with a copy to the host.
    overlapped: share of `copies_ms` that is also part of `busy_ms`.
  """

  span_ms: float
  busy_ms: float
  copies_ms: float
  overlapped: float


def read(folder: str) -> Overlap:
  """Reads the newest profile in a folder; all 0 if devices have no streams.

  Raises:
    OSError: the folder has no profile.
  """
  found = sorted(pathlib.Path(folder).glob('**/*.trace.json.gz'))
  if not found:
    raise FileNotFoundError(f'{folder}: no profile is in it')
  newest = max(found, key=lambda path: path.stat().st_mtime)
  with gzip.open(newest) as file:
    return overlap(json.load(file)['traceEvents'])


def overlap(events: Iterable[Mapping[str, Any]]) -> Overlap:
  """Computes the overlap from `traceEvents`, as the trace file has them."""
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
