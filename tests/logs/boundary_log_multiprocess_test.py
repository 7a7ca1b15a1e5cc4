"""The logs between real processes, some of which die of SIGKILL.

Each script below is one process. Faults are scripted: a process kills itself
at a given point, or says on stdout that it is where it shall be killed.
"""

import functools
import hashlib
import os
import pathlib
import signal
import subprocess
import sys
import time
import uuid

import jax
import numpy as np
import pytest
from jax import numpy as jnp

from moetion_jax import errors, keys
from moetion_jax.hostmem import (
  entry,
  segment,
  segment_reader,
  segment_writer,
  store_folder,
)
from moetion_jax.logs import (
  boundary_log,
  interface as log_interface,
  remote,
  zmq_client,
  zmq_server,
)
from tests.support import runs

_REPOSITORY = pathlib.Path(__file__).resolve().parents[2]
_SECONDS = 60.0
_SECRET = b'0123456789abcdef'

# What every script begins with; `folder` is its store folder.
_HEAD = """
import os, signal, sys, time
import numpy as np
from moetion_jax import keys
from moetion_jax.hostmem import segment, segment_reader, segment_writer
folder, *args = sys.argv[1:]

def key(iteration, stage=0, kind=keys.EntryKind.ACTIVATION, microbatch=0):
  return keys.EntryKey(iteration, stage, 0, kind, microbatch)

def say(word):
  print(word, flush=True)
"""

_JAX_HEAD = (
  _HEAD
  + """
import jax
from jax import numpy as jnp
import functools
from moetion_jax.logs import boundary_log, interface, remote, zmq_client

def start_log(stage, generation=1, secret=None, **settings):
  log = boundary_log.BoundaryLog(
    keys.WorkerId(stage, 0, generation),
    interface.LogSettings(
      **(dict(folder=folder, size_bytes=1 << 20) | settings)),
    functools.partial(zmq_client.StoreClient, secret=secret),
  )
  log.start()
  return log
"""
)


def _key(iteration, stage=0, kind=keys.EntryKind.ACTIVATION, microbatch=0):
  return keys.EntryKey(iteration, stage, 0, kind, microbatch)


class _Process:
  """A script as a process; `expect` reads what it says."""

  def __init__(self, script, folder, *args):
    self.process = subprocess.Popen(
      [sys.executable, '-c', script, str(folder), *map(str, args)],
      cwd=_REPOSITORY,
      stdin=subprocess.PIPE,  # open until `wait` or `kill`
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      env=os.environ | {'JAX_PLATFORMS': 'cpu'},
      text=True,
    )

  def line(self):
    """Its next line; the test's timeout bounds the wait."""
    assert self.process.stdout is not None
    line = self.process.stdout.readline()
    if not line:
      raise AssertionError(self.process.communicate()[1])
    return line.strip()

  def say(self, line):
    """Sends it a line."""
    assert self.process.stdin is not None
    print(line, file=self.process.stdin, flush=True)

  def kill(self):
    self.process.kill()
    self.process.communicate(timeout=_SECONDS)

  def wait(self):
    """Its return code, when it has ended by itself."""
    _, self.errors = self.process.communicate(timeout=_SECONDS)
    return self.process.returncode


@pytest.fixture
def spawn():
  processes = []

  def spawn(script, folder, *args):
    processes.append(_Process(script, folder, *args))
    return processes[-1]

  yield spawn
  for process in processes:
    process.kill()


@pytest.fixture
def folders():
  made = []

  def make():
    folder = store_folder.StoreFolder('/dev/shm', f'test-{uuid.uuid4().hex}')
    folder.start()
    made.append(folder)
    return folder.path

  yield make
  for folder in made:
    folder.remove()


@pytest.fixture
def folder(folders):
  return folders()


def _log(folder, stage, secret=None, **settings):
  settings = {'size_bytes': 1 << 20, **settings}
  log = boundary_log.BoundaryLog(
    keys.WorkerId(stage, 0, 1),
    log_interface.LogSettings(folder=folder, **settings),
    functools.partial(zmq_client.StoreClient, secret=secret),
  )
  log.start()
  return log


# --- Writers that die --------------------------------------------------------

_WRITER_KILLED_BEFORE_COMMIT = (
  _HEAD
  + """
commit = segment_writer.SegmentWriter._commit

def commit_or_die(self, cell, header):
  if header.key == key(3):  # its payload is written
    os.kill(os.getpid(), signal.SIGKILL)
  commit(self, cell, header)

segment_writer.SegmentWriter._commit = commit_or_die
writer = segment_writer.SegmentWriter(folder, keys.WorkerId(0, 0, 1), 16384, 8)
writer.start()
for iteration in range(1, 5):
  writer.put(key(iteration), np.full(5000, iteration, np.uint8))
"""
)

_WRITER_KILLED_IN_COMMIT = _WRITER_KILLED_BEFORE_COMMIT.replace(
  '    os.kill(os.getpid(), signal.SIGKILL)\n',
  """\
    start = segment.cell_offset(cell)
    packed = header.pack()
    self._layout.map[start : start + 100] = packed[:100]
    self._layout.commits[cell] = int.from_bytes(packed[-8:], 'little')
    os.kill(os.getpid(), signal.SIGKILL)
""",
)


@pytest.mark.parametrize(
  'script',
  [_WRITER_KILLED_BEFORE_COMMIT, _WRITER_KILLED_IN_COMMIT],
  ids=['before commit', 'half a header'],
)
def test_entry_of_a_writer_killed_in_the_middle(spawn, folder, script):
  assert spawn(script, folder).wait() == -signal.SIGKILL
  index = segment_reader.StoreIndex(folder)
  found = index.entries()
  assert [header.key for header in found] == [_key(1), _key(2)]
  assert index.take(_key(3)) is None
  replacement = segment_writer.SegmentWriter(
    folder, keys.WorkerId(0, 0, 2), 16384, 8
  )
  replacement.start()
  # Its space is free: a third entry just fits, a fourth does not.
  for iteration in range(1, 4):
    array = np.full(5000, iteration, np.uint8)
    assert replacement.put(_key(iteration), array) == (iteration == 3)
    taken = index.take(_key(iteration))
    assert taken is not None
    header, stored = taken
    np.testing.assert_array_equal(stored, array)
    entry.verify(header, stored)
    del taken, stored
  with pytest.raises(segment_writer.SegmentFullError):
    replacement.put(_key(4), np.full(5000, 4, np.uint8))
  replacement.close()
  index.close()


_PRODUCER = (
  _JAX_HEAD
  + """
generation, iterations, last = map(int, args)
log = start_log(0, generation)
for iteration in range(1, iterations + 1):
  x = jax.random.normal(jax.random.key(iteration), (1000,))
  log.publish(key(iteration), x + (iteration == last))
log.flush()
say('published')
sys.stdin.read()
"""
)


@pytest.mark.thorough
def test_entries_outlive_their_producer_and_equal_those_of_its_heir(
  spawn, folder
):
  reader = _log(folder, 1)
  first = spawn(_PRODUCER, folder, 1, 3, -1)
  assert first.line() == 'published'
  first.kill()
  expected = [
    jax.random.normal(jax.random.key(iteration), (1000,))
    for iteration in range(1, 5)
  ]
  for iteration in range(1, 4):
    found = reader.read(_key(iteration), timeout_seconds=_SECONDS)
    np.testing.assert_array_equal(found, expected[iteration - 1])
  reader.prefetch(_key(4))
  heir = spawn(_PRODUCER, folder, 2, 4, -1)
  found = reader.read(_key(4), timeout_seconds=_SECONDS)
  np.testing.assert_array_equal(found, expected[3])
  assert heir.line() == 'published'
  generations = [
    h.generation for h in segment_reader.StoreIndex(folder).entries()
  ]
  assert generations == [1, 1, 1, 2]
  heir.kill()
  diverged = spawn(_PRODUCER, folder, 3, 4, 2)
  assert diverged.wait() == 1
  assert 'EntryMismatchError' in diverged.errors
  assert 'iteration 2' in diverged.errors
  # What diverged has replaced nothing.
  found = reader.read(_key(2))
  np.testing.assert_array_equal(found, expected[1])
  del found
  late = spawn(_PRODUCER, folder, 2, 1, -1)
  assert late.wait() == 1
  assert 'generation 3 fences off 2' in late.errors
  reader.close()


def test_two_living_writers_are_refused(spawn, folder):
  first = spawn(_PRODUCER, folder, 1, 1, -1)
  assert first.line() == 'published'
  second = spawn(_PRODUCER, folder, 2, 1, -1)
  assert second.wait() == 1
  assert 'another living process writes it' in second.errors


# --- Those that live on ------------------------------------------------------

_LIVES_ON = (
  _JAX_HEAD
  + """
stage, generation = map(int, args)
log = start_log(stage, generation, resend_seconds=0.2)
say('started')
for line in sys.stdin:
  what, iteration = line.split()
  if what == 'publish':
    log.publish(key(int(iteration), stage), jnp.ones(3))
    log.flush()
  elif what == 'read':
    log.read(key(int(iteration)))
  else:
    log.prefetch(key(int(iteration)))
  say('done')
"""
)


def _outlive(process, act):
  """Stops a process, acts, and lets it go on."""
  os.kill(process.process.pid, signal.SIGSTOP)
  act()
  os.kill(process.process.pid, signal.SIGCONT)


@pytest.mark.thorough
@pytest.mark.parametrize('what', ['publish', 'read'])
def test_a_process_that_lives_on_is_fenced_off(spawn, folder, what):
  producer = _log(folder, 0)
  producer.publish(_key(1), jnp.ones(3))
  producer.flush()
  old = spawn(_LIVES_ON, folder, 1, 1)
  assert old.line() == 'started'
  old.say('publish 1')
  assert old.line() == 'done'
  old.say('read 1')
  assert old.line() == 'done'
  _outlive(old, lambda: segment.fence(folder, keys.WorkerId(1, 0, 2)))
  old.say(f'{what} 2' if what == 'publish' else f'{what} 1')
  assert old.wait() == 1
  assert 'FencedError: generation 2 fences off 1' in old.errors
  found = {h.key for h in segment_reader.StoreIndex(folder).entries()}
  assert found == {_key(1), _key(1, 1)}
  heir = spawn(_LIVES_ON, folder, 1, 2)
  assert heir.line() == 'started'
  for line in ('publish 2', 'read 1'):
    heir.say(line)
    assert heir.line() == 'done'
  producer.close()


@pytest.mark.thorough
def test_a_read_that_waits_is_fenced_off(spawn, folder):
  producer = _log(folder, 0)
  old = spawn(_LIVES_ON, folder, 1, 1)
  assert old.line() == 'started'
  old.say('prefetch 1')
  assert old.line() == 'done'
  _outlive(old, lambda: segment.fence(folder, keys.WorkerId(1, 0, 2)))
  old.say('read 1')
  assert old.wait() == 1
  assert 'FencedError: generation 2 fences off 1' in old.errors
  producer.close()


_HOSTS = (
  _HEAD
  + """
import pathlib, selectors
from moetion_jax.hostmem import run_store
from moetion_jax.runtime.hosts import hosts
path = pathlib.Path(folder)
store = run_store.open_store(str(path.parent), path.name)
both = hosts.Hosts(2, 2, store)
both.start(())
with selectors.DefaultSelector() as selector:
  both.register(selector, print)
  while not both.agents()[1]['address']:
    for ready, _ in selector.select():
      ready.data()
say(both.secret)
for agent in both.agents():
  say(agent['address'])
for path in both.stores():
  say(path)
for line in sys.stdin:
  both.fence(keys.WorkerId(*map(int, line.split())))
  say('fenced')
both.close()
run_store.close_store(store, keep=False)
"""
)

_ASKS = (
  _HEAD
  + """
from moetion_jax.logs import zmq_client
secret, address, generation = args
nothing, _ = os.pipe()
client = zmq_client.StoreClient(
  keys.WorkerId(0, 0, int(generation)), 0.1, bytes.fromhex(secret))
say('started')
for line in sys.stdin:
  client.want(key(int(line), 1), address)
  arrived = []
  while not arrived:
    client.wait(nothing, 0.05)
    arrived = client.collect()
  result = arrived[0].result
  say(type(result).__name__ if isinstance(result, Exception) else result[0])
client.close()
"""
)


@pytest.mark.thorough
def test_a_process_that_lives_on_is_fenced_off_on_another_host(spawn):
  """Of two hosts, as `--local_hosts=2` has them, with their agents."""
  hosts = spawn(_HOSTS, f'/dev/shm/test-{uuid.uuid4().hex}')
  secret, _, address, _, store = (hosts.line() for _ in range(5))
  log = _log(pathlib.Path(store), 1)
  log.publish(_key(1, 1), np.full(3, 7, np.int32))
  log.flush()
  old, heir = (spawn(_ASKS, store, secret, address, g) for g in (1, 2))
  for process in (old, heir):
    assert process.line() == 'started'
    process.say('1')
    assert process.line() == '7'

  def replace():
    hosts.say('0 0 2')
    assert hosts.line() == 'fenced'
    heir.say('1')
    assert heir.line() == '7'

  _outlive(old, replace)
  old.say('1')
  while old.line() != 'FencedError':  # until that host's agent was told
    old.say('1')
  old.say('1')
  assert old.line() == 'FencedError'
  hosts.say('1 0 2')
  assert hosts.line() == 'fenced'
  with pytest.raises(errors.FencedError, match='generation 2 fences off 1'):
    while True:  # the agent of that host takes the message when it comes
      log.publish(_key(1, 1), np.full(3, 7, np.int32))
  log.close()
  assert hosts.wait() == 0


# --- Readers that die --------------------------------------------------------

_READER_THAT_HOLDS = (
  _HEAD
  + """
index = segment_reader.StoreIndex(folder)
held = index.take(key(1))
say(int(held[1].sum()))
sys.stdin.read()
"""
)

_JAX_READER_THAT_HOLDS = (
  _JAX_HEAD
  + """
log = start_log(1)
held = log.read(key(1))
say(int(held.sum()))
sys.stdin.read()
"""
)


@pytest.mark.parametrize(
  'script', [_READER_THAT_HOLDS, _JAX_READER_THAT_HOLDS], ids=['view', 'jax']
)
def test_lease_of_a_reader_that_is_killed(spawn, folder, script):
  log = _log(folder, 0, size_bytes=4096)
  log.publish(_key(1), np.ones(1024, np.int32))
  log.flush(_SECONDS)
  reader = spawn(script, folder)
  assert reader.line() == '1024'
  log.retain(2)
  log.publish(_key(2), np.full(1024, 2, np.int32))
  assert runs.wait_for(lambda: log.blocked_for, _SECONDS).startswith(
    f'{_key(2)}: '
  )
  with pytest.raises(TimeoutError):
    log.flush(0.2)
  assert log.blocked_for.startswith(f'{_key(2)}: ')
  reader.kill()
  log.flush(_SECONDS)
  assert not log.blocked_for
  log.close()


# --- Pipelines ---------------------------------------------------------------

_STAGE = (
  _JAX_HEAD
  + """
import hashlib
stage, stages, iterations = map(int, args[:3])
addresses = args[3:]
log = start_log(
  stage, host=str(stage), resend_seconds=0.5, size_bytes=1 << 18,
  secret=b'0123456789abcdef' if addresses else None)
if addresses:
  log.update_locations({
    (s, 0): remote.Location(host=str(s), address=address)
    for s, address in enumerate(addresses)})
microbatches = 3
digest = hashlib.sha256()
step = jax.jit(lambda x: jnp.cos(x) * 1.5)
KIND = keys.EntryKind
for i in range(1, iterations + 1):
  log.retain(i - 1)
  if stage:
    log.prefetch(key(i, stage - 1))
  for m in range(microbatches):
    if stage == 0:
      x = jax.random.normal(jax.random.key(i * 100 + m), (50, 100))
    else:
      x = log.read(key(i, stage - 1, microbatch=m))
      if m + 1 < microbatches:
        log.prefetch(key(i, stage - 1, microbatch=m + 1))
    y = step(x)
    if stage < stages - 1:
      log.publish(key(i, stage, microbatch=m), y)
    digest.update(np.asarray(y).tobytes())
  log.publish(key(i, stage, KIND.SCALARS), jnp.sum(y))
  for s in range(stages):
    digest.update(np.asarray(log.read(key(i, s, KIND.SCALARS))).tobytes())
log.flush()
say(digest.hexdigest())
sys.stdin.read()  # others may still read
log.close()
"""
)


def _pipeline_digests(stages, iterations):
  """What `_STAGE` computes, in one process."""
  step = jax.jit(lambda x: jnp.cos(x) * 1.5)
  digests = [hashlib.sha256() for _ in range(stages)]
  for i in range(1, iterations + 1):
    last = []
    for m in range(3):
      x = jax.random.normal(jax.random.key(i * 100 + m), (50, 100))
      last = []
      for digest in digests:
        x = step(x)
        last.append(jnp.sum(x))
        digest.update(np.asarray(x).tobytes())
    for digest in digests:
      for scalar in last:
        digest.update(np.asarray(scalar).tobytes())
  return [digest.hexdigest() for digest in digests]


@pytest.mark.thorough
@pytest.mark.parametrize('hosts', [1, 3], ids=['one host', 'three hosts'])
def test_pipeline_equals_one_process(spawn, folders, hosts):
  made = [folders() for _ in range(hosts)]
  servers = []
  if hosts > 1:
    servers = [zmq_server.StoreServer(f, secret=_SECRET) for f in made]
  for server in servers:
    server.start()
  addresses = [server.address for server in servers]
  stages = [
    spawn(_STAGE, made[stage % hosts], stage, 3, 20, *addresses)
    for stage in range(3)
  ]
  found = [stage.line() for stage in stages]
  assert found == _pipeline_digests(3, 20)
  assert [stage.wait() for stage in stages] == [0, 0, 0]
  for server in servers:
    server.close()
  for path in made:
    assert not list(path.glob('*.bell'))


# --- Servers that die --------------------------------------------------------

_SERVER = (
  _HEAD
  + """
from moetion_jax.logs import zmq_server
server = zmq_server.StoreServer(folder, args[0], b'0123456789abcdef')
server.start()
assert 'jax' not in sys.modules
say(server.address)
while not server._parked:
  time.sleep(0.001)
say('parked')
time.sleep(3600)
"""
)


def test_server_restarted_under_a_parked_read(spawn, folders):
  here, there = folders(), folders()
  server = spawn(_SERVER, there, 'tcp://127.0.0.1:*')
  address = server.line()
  log = _log(here, 1, host='here', secret=_SECRET)
  log.update_locations({(0, 0): remote.Location(host='there', address=address)})
  log.prefetch(_key(1))
  assert server.line() == 'parked'
  server.kill()
  # Committed while no server lives: nobody announces it again.
  producer = spawn(_PRODUCER, there, 1, 1, -1)
  assert producer.line() == 'published'
  producer.kill()
  assert spawn(_SERVER, there, address).line() == address
  began = time.monotonic()
  found = log.read(_key(1), timeout_seconds=_SECONDS)
  assert time.monotonic() - began < _SECONDS / 2
  np.testing.assert_array_equal(
    found, jax.random.normal(jax.random.key(1), (1000,))
  )
  log.close()


def test_nothing_is_left_of_a_store_whose_processes_were_killed(spawn):
  run_id = f'test-{uuid.uuid4().hex}'
  store = store_folder.StoreFolder('/dev/shm', run_id)
  store.start()
  killed = [
    spawn(_PRODUCER, store.path, 1, 1, -1),
    spawn(_SERVER, store.path, 'tcp://127.0.0.1:*'),
  ]
  for process in killed:
    process.line()
    process.kill()
  assert {path.suffix for path in store.path.iterdir()} >= {'.segment', '.bell'}
  store.close()
  found = [
    leftover.run_id for leftover in store_folder.find_leftovers('/dev/shm')
  ]
  assert run_id in found
  store_folder.remove_store(store.path)
  assert not store.path.exists()
