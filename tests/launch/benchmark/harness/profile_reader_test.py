"""Copies that go beside computation, from a profile."""

import gzip
import json
import os

import pytest

from launch.benchmark.harness import profile_reader

_NAMES = [
  {
    'ph': 'M',
    'name': 'process_name',
    'pid': 1,
    'args': {'name': '/device:GPU:0'},
  },
  {'ph': 'M', 'name': 'process_name', 'pid': 7, 'args': {'name': '/host:CPU'}},
  *(
    {'ph': 'M', 'name': 'thread_name', 'pid': p, 'tid': t, 'args': {'name': n}}
    for p, t, n in (
      (1, 10, 'Stream #14(Compute)'),
      (1, 11, 'Stream #20(MemcpyD2H)'),
      (1, 12, 'XLA Ops'),
      (7, 10, 'Stream of a host thread'),
    )
  ),
]


def _event(name, begin_ms, end_ms, tid=10, pid=1):
  return {
    'ph': 'X',
    'name': name,
    'pid': pid,
    'tid': tid,
    'ts': begin_ms * 1e3,
    'dur': (end_ms - begin_ms) * 1e3,
  }


def test_what_overlaps():
  events = [
    *_NAMES,
    _event('fusion_3', 10, 14),
    _event('gemm', 13, 16),  # another stream's would overlap like that
    _event('MemcpyH2D', 30, 32),
    _event('MemcpyD2H', 15, 19, tid=11),  # a quarter of it
    _event('MemcpyD2H', 31, 35, tid=11),  # a quarter
    _event('MemcpyD2H', 40, 42, tid=11),  # nothing
    _event('the same as an operation', 5, 60, tid=12),
    _event('gemm', 0, 90, pid=7),
  ]
  found = profile_reader.overlap(events)
  assert found == profile_reader.Overlap(
    span_ms=32.0, busy_ms=8.0, copies_ms=10.0, overlapped=0.2
  )


def test_no_copies_and_no_streams():
  only = profile_reader.overlap([*_NAMES, _event('gemm', 1, 3)])
  assert (only.busy_ms, only.copies_ms, only.overlapped) == (2.0, 0.0, 0.0)
  none = profile_reader.overlap([*_NAMES, _event('gemm', 1, 3, pid=7)])
  assert none == profile_reader.Overlap(0.0, 0.0, 0.0, 0.0)


def test_the_newest_profile_is_read(tmp_path):
  with pytest.raises(FileNotFoundError, match='no profile'):
    profile_reader.read(str(tmp_path))
  for number, name in enumerate('ba'):
    path = tmp_path / 'plugins' / name / 'host.trace.json.gz'
    path.parent.mkdir(parents=True)
    events = [*_NAMES, _event('gemm', 0, number + 1)]
    path.write_bytes(
      gzip.compress(json.dumps({'traceEvents': events}).encode())
    )
    os.utime(path, (number, number))
  assert profile_reader.read(str(tmp_path)).busy_ms == 2.0
