"""Speed of entries from one process to another (`launch.benchmark`).

A publisher and a reader run on cores of their own, as two workers do, and for
TCP the agent's server runs beside them. The baselines, measured in turn with
them, are a plain copy of the same bytes in memory and one through a socket.
What the verification of entries costs is measured beside the copy.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import multiprocessing
import os
import secrets
import socket
import time
from collections.abc import Callable, Iterator
from multiprocessing import connection
from typing import Any

import numpy as np

from launch.benchmark.harness import scratch, summary
from launch.lm import settings as run_settings
from moetion_jax import keys
from moetion_jax.hostmem import raw_bytes, run_store, segment
from moetion_jax.logs import remote, size as log_size
from moetion_jax.runtime import linux_process, placement

SIZES_BYTES = (64 << 10, 8 << 20, 64 << 20)
# Size of one transfer; large enough that its start and end do not count.
_TRANSFER_BYTES = 256 << 20
_MAX_ENTRIES = 400
_WINDOW_BYTES = 32 << 20
_LATENCY_ROUNDS = 10
_TRANSPORTS = ('host', 'tcp', 'tcp, CURVE')


def _window(nbytes: int) -> int:
  """Returns the number of entries that may be on their way at once."""
  return max(2, min(16, _WINDOW_BYTES // nbytes))


def _entries(nbytes: int) -> int:
  """Returns the number of entries of one transfer."""
  return max(4, min(_MAX_ENTRIES, _TRANSFER_BYTES // nbytes))


def _key(number: int) -> keys.EntryKey:
  return keys.EntryKey(number, 0, 0, keys.EntryKind.ACTIVATION, 0)


def _log(
  folder: str,
  stage: int,
  size_bytes: int,
  secret: bytes | None = None,
  **settings: Any,
):
  from moetion_jax.logs import (
    boundary_log,
    interface as log_interface,
    zmq_client,
  )

  log = boundary_log.BoundaryLog(
    keys.WorkerId(stage, 0, 1),
    log_interface.LogSettings(folder=folder, size_bytes=size_bytes, **settings),
    functools.partial(zmq_client.StoreClient, secret=secret),
  )
  log.start()
  return log


def _on_cores(cores: tuple[int, ...]) -> None:
  os.sched_setaffinity(0, cores)  # before JAX starts its threads
  from moetion_jax.runtime import xla_setup

  xla_setup.configure(local_devices=1, compilation_cache_dir='')


# ---- The three processes -----------------------------------------------------


def _serve(folder: str, secret: bytes | None, pipe: connection.Connection):
  """Runs a store server, as an agent does, until the pipe is closed."""
  from moetion_jax.logs import zmq_server

  server = zmq_server.StoreServer(folder, secret=secret)
  server.start()
  pipe.send(server.address)
  with contextlib.suppress(EOFError):
    pipe.recv()
  server.close()


def _read(
  cores: tuple[int, ...],
  folders: dict[str, str],
  places: dict[str, tuple[str, bytes | None]],
  pipe: connection.Connection,
) -> None:
  """Runs the reader: reads on request, and reports when each entry arrived.

  Args:
    cores: the cores to run on.
    folders: the reader's store folder, by transport.
    places: address and secret of the server, by transport; address '' for none.
    pipe: the connection to the publisher.
  """
  _on_cores(cores)

  logs = {}
  for name, folder in folders.items():
    address, secret = places[name]
    logs[name] = _log(folder, 1, 1 << 20, host='reader', secret=secret)
    if address:
      place = remote.Location(host='publisher', address=address)
      logs[name].update_locations({(0, 0): place})
  with socket.create_server(('127.0.0.1', 0)) as server:
    pipe.send(server.getsockname())
    stream, _ = server.accept()
  with contextlib.suppress(EOFError), stream:
    buffers: dict[int, list[np.ndarray]] = {}
    while True:
      name, first, count, nbytes = pipe.recv()
      if name == 'socket':
        if nbytes not in buffers:
          buffers = {nbytes: _touched(_window(nbytes) + 2, nbytes)}
        for number in range(count):
          _receive(stream, buffers[nbytes][number % len(buffers[nbytes])])
        pipe.send(time.monotonic_ns())
        continue
      log = logs[name]
      log.prefetch(_key(first))
      for number in range(first, first + count):
        array = log.read(_key(number))
        if number + 1 < first + count:
          log.prefetch(_key(number + 1))
        array.block_until_ready()
        del array
        pipe.send(time.monotonic_ns())
  for log in logs.values():
    log.close()


def _receive(stream: socket.socket, buffer: np.ndarray) -> None:
  view = memoryview(buffer.data)
  while view:
    view = view[stream.recv_into(view) :]


def _touched(count: int, nbytes: int) -> list[np.ndarray]:
  """Returns buffers whose pages all exist."""
  return [np.full(nbytes, number, np.uint8) for number in range(count)]


def _publish(
  cores: tuple[int, ...],
  folders: dict[str, str],
  sizes: tuple[int, ...],
  rounds: int,
  reader: connection.Connection,
  pipe: connection.Connection,
) -> None:
  """Runs the publisher: measures, and sends seconds by size and subject."""
  _on_cores(cores)
  ring_bytes = max((_window(n) + 2) * (n + 64) for n in sizes)
  logs = {name: _log(f, 0, ring_bytes) for name, f in folders.items()}
  numbers = itertools.count(1)  # no two entries have the same key
  with socket.create_connection(reader.recv()) as stream:
    result = {
      nbytes: _measure(nbytes, rounds, logs, numbers, stream, reader)
      for nbytes in sizes
    }
  for log in logs.values():
    log.close()
  reader.close()
  pipe.send(result)


def _measure(
  nbytes: int,
  rounds: int,
  logs: dict[str, Any],
  numbers: Iterator[int],
  stream: socket.socket,
  reader: connection.Connection,
) -> dict[str, list[float]]:
  """Returns seconds an entry by subject: one per round, or each latency."""
  import jax

  window, count = _window(nbytes), _entries(nbytes)
  sources = [jax.device_put(x) for x in _touched(window, nbytes)]
  hosts = [np.asarray(x) for x in sources]
  targets = _touched(window + 2, nbytes)

  def copy() -> float:
    begin = time.monotonic_ns()
    for number in range(count):
      np.copyto(targets[number % len(targets)], hosts[number % window])
    return time.monotonic_ns() - begin

  def verify() -> float:
    begin = time.monotonic_ns()
    for number in range(count):
      raw_bytes.checksum(hosts[number % window])
    return time.monotonic_ns() - begin

  def send() -> float:
    reader.send(('socket', 0, count, nbytes))
    begin = time.monotonic_ns()
    for number in range(count):
      stream.sendall(hosts[number % window].data)
    return reader.recv() - begin

  def transfer(name: str, count: int, window: int) -> Iterator[tuple[int, int]]:
    """Yields each entry's time of publication and of arrival, in ns."""
    log = logs[name]
    first, *_ = [next(numbers) for _ in range(count)]
    begins: list[int] = []
    reader.send((name, first, count, nbytes))
    for number in range(first, first + count):
      if len(begins) >= window:
        yield begins[-window], reader.recv()
      log.retain(number - window)
      begins.append(time.monotonic_ns())
      log.publish(_key(number), sources[number % len(sources)])
    for begin in begins[-window:]:
      yield begin, reader.recv()

  def stream_through(name: str) -> float:
    times = list(transfer(name, count, window))
    return times[-1][1] - times[0][0]

  subjects: dict[str, Callable[[], float]] = {
    'memcpy': copy,
    'checksum': verify,
    'socket': send,
  }
  for name in logs:
    subjects[name] = lambda name=name: stream_through(name)
  seconds: dict[str, list[float]] = {name: [] for name in subjects}
  for name in logs:
    seconds[f'{name}, latency'] = []
  for number in range(rounds + 1):  # the first round is a warm-up
    for name, subject in subjects.items():
      value = subject() / 1e9 / count
      if number:
        seconds[name].append(value)
    for name in logs:
      times = list(transfer(name, _LATENCY_ROUNDS, 1))
      if number:
        seconds[f'{name}, latency'] += [(e - b) / 1e9 for b, e in times]
  for log in logs.values():
    log.retain(1 << 40)
  return seconds


# ---- Together ----------------------------------------------------------------


def measure(
  hostmem_dir: str, rounds: int, sizes: tuple[int, ...] = SIZES_BYTES
) -> dict[int, dict[str, list[float]]]:
  """Measures the seconds an entry takes, by size and subject.

  Subjects are 'memcpy', 'checksum', 'socket' and the transports (a stream of
  entries), and each transport with ', latency' (one entry at a time, from
  `publish` to the array being ready on the reader's device).

  Raises:
    errors.ConfigError: `hostmem_dir` is missing or has too little space.
  """
  run_store.check_hostmem_dir(hostmem_dir)
  ring_bytes = max((_window(n) + 2) * (n + 64) for n in sizes)
  run_store.check_room(
    hostmem_dir, len(_TRANSPORTS) * segment.file_bytes(ring_bytes, 4096)
  )
  cores = placement.usable_cores()
  half = max(1, len(cores) // 2)
  publisher, reader = cores[:half], cores[half:] or cores
  secret = secrets.token_bytes(32)
  spawn = multiprocessing.get_context('spawn')
  with contextlib.ExitStack() as stack:
    memory = str(stack.enter_context(scratch.folder(hostmem_dir)))

    def folder() -> str:
      store = run_store.open_store(memory, secrets.token_hex(4))
      stack.callback(store.remove)
      return str(store.path)

    def start(target: Callable[..., None], *arguments: Any) -> None:
      process = spawn.Process(
        target=_child, args=(os.getpid(), target, *arguments)
      )
      process.start()
      stack.callback(process.join)
      stack.callback(_ended, process)

    of_publisher = {name: folder() for name in _TRANSPORTS}
    of_reader = {
      name: of_publisher[name] if name == 'host' else folder()
      for name in _TRANSPORTS
    }
    places: dict[str, tuple[str, bytes | None]] = {'host': ('', None)}
    for name, its_secret in (('tcp', None), ('tcp, CURVE', secret)):
      ours, theirs = spawn.Pipe()
      start(_serve, of_publisher[name], its_secret, theirs)
      theirs.close()
      stack.callback(ours.close)
      places[name] = ours.recv(), its_secret
    between = spawn.Pipe()
    ours, theirs = spawn.Pipe(duplex=False)
    start(_read, reader, of_reader, places, between[0])
    start(_publish, publisher, of_publisher, sizes, rounds, between[1], theirs)
    for pipe in (*between, theirs):
      pipe.close()
    return ours.recv()


def _child(parent_pid: int, target: Callable[..., None], *arguments: Any):
  linux_process.die_with(parent_pid)
  target(*arguments)


def _ended(process: Any) -> None:
  """Waits 10 seconds for a process to end by itself, then kills it."""
  process.join(10)
  process.kill()


def rows(
  hostmem_dir: str, rounds: int
) -> list[tuple[str, summary.Summary, str]]:
  """Measures; returns name, value and goal of every figure."""
  found = []
  for nbytes, seconds in measure(hostmem_dir, rounds).items():
    size = f'{nbytes >> 10} KiB' if nbytes < 1 << 20 else f'{nbytes >> 20} MiB'
    is_small = nbytes == min(SIZES_BYTES)
    for name in ('memcpy', 'checksum', 'socket', *_TRANSPORTS):
      speeds = [nbytes / 1e9 / s for s in seconds[name]]
      found.append((f'{size}, {name}, GB/s', summary.summarize(speeds), ''))
    ratio = summary.paired_ratio(seconds['memcpy'], seconds['checksum'])
    found.append((f'{size}, checksum / memcpy', ratio, ''))
    for name in _TRANSPORTS:
      beside, goal = ('memcpy', 0.35) if name == 'host' else ('socket', 0.7)
      ratio = summary.paired_ratio(seconds[beside], seconds[name])
      # For a small entry the latency counts, not the speed.
      goal = '' if is_small else f'>= {goal}'
      found.append((f'{size}, {name} / {beside}', ratio, goal))
    for name in _TRANSPORTS:
      values = [1e3 * s for s in seconds[f'{name}, latency']]
      found.append(
        (
          f'{size}, {name}, latency, ms',
          summary.summarize(values),
          '<= 1' if is_small else '',
        )
      )
  return found


def verification_rows(
  preset: str, rounds: int
) -> list[tuple[str, summary.Summary, str]]:
  """Measures the verification of all entries of one iteration.

  Each is verified twice: when it is read, and two iterations later.

  Args:
    preset: preset of the model, in two stages.
    rounds: number of measurements.
  """
  config = run_settings.make(
    preset,
    model_overrides=[],
    train_overrides={'stages': 2},
    optimizer_overrides={},
  )
  job = config.job_spec()
  sizes = [n for stage in (0, 1) for n in log_size.entry_sizes(job, stage)]
  entries = [np.full(n, number, np.uint8) for number, n in enumerate(sizes)]
  milliseconds = []
  for _ in range(rounds):
    begin = time.monotonic_ns()
    for one in (*entries, *entries):
      raw_bytes.checksum(one)
    milliseconds.append((time.monotonic_ns() - begin) / 1e6)
  what = f'{len(sizes)} entries of an iteration ({sum(sizes) / 1e6:.1f} MB)'
  return [(f'{what}, verified twice, ms', summary.summarize(milliseconds), '')]
