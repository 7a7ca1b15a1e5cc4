"""Runs over several virtual hosts: stages that talk over TCP (issue 3)."""

import json
import os
import signal
import socket
import time

import pytest
import zmq

from moetion_jax import errors
from moetion_jax.hostmem import run_store, store_folder
from moetion_jax.recovery import hang_detection
from moetion_jax.runtime.records import held_run
from tests.support import helpers, runs

pytestmark = pytest.mark.timeout(600)

_TWO = '--local_hosts=2'


@pytest.fixture(scope='module')
def undisturbed(tmp_path_factory):
  """On one host."""
  return runs.undisturbed(tmp_path_factory)


def _agents(workdir):
  path = workdir / 'workers.json'
  return json.loads(path.read_text())['agents'] if path.exists() else []


def _begin(workdir):
  """Leaves a workdir as a kill before the run begins does; returns its id."""
  workdir.mkdir()
  run_id = held_run.new_id()
  (workdir / '.lock').write_text(f'{run_id}\n')
  return run_id


def _stores(host):
  return sorted(os.listdir(host.path))


def test_the_bits_of_the_one_process_cut(host, tmp_path):
  """What is left of a run that was killed before it could begin is removed."""
  workdir = tmp_path / 'run'
  run_id = _begin(workdir)
  for index in range(3):
    name = run_store.host_id(run_id, index)
    store = store_folder.StoreFolder(host.path, name, str(workdir))
    store.start()
    store.close()
  flags = '--stages=3', '--iterations=4', f'--data={helpers.DATA}'
  out, _ = runs.end(host.train(workdir, _TWO, *flags))
  assert out.count('removed as soon as the new run can begin.') == 3
  assert host.is_clean()
  lines = runs.bits(runs.metrics(workdir))
  assert lines == runs.one_process_bits(workdir)
  first, second = (a['host'] for a in _agents(workdir))
  assert [w['host'] for w in runs.workers(workdir)] == [first, first, second]
  assert len({a['address'] for a in _agents(workdir)}) == 2


def test_more_hosts_than_stages(host, tmp_path):
  run = host.train(tmp_path / 'run', '--stages=2', '--local_hosts=3')
  _, err = runs.end(run, 2)
  assert '--local_hosts=3' in err and len(err.strip().splitlines()) == 1
  assert not (tmp_path / 'run').exists()
  assert host.is_clean()


@pytest.mark.thorough
def test_a_host_agent_that_was_killed(host, tmp_path, undisturbed):
  """The run ends, goes on, is stopped, goes on, is ended at once, goes on."""
  workdir = tmp_path / 'run'
  run = host.train(workdir, _TWO)
  runs.until(run, 'iteration 6/')
  stores = _stores(host)
  name, pid = (_agents(workdir)[1][key] for key in ('host', 'pid'))
  os.kill(pid, signal.SIGKILL)
  _, err = runs.end(run, 1)
  assert f'{name}: its agent (pid {pid}) was killed by SIGKILL' in err
  assert 'stage(s) 1' in err and 'The same command goes on' in err
  event = runs.events(workdir)[-1]
  assert event['kind'] == 'failed' and name in event['error']
  assert {w['state'] for w in runs.workers(workdir)} == {'failed'}
  assert host.has_ended() and _stores(host) == stores
  run = host.train(workdir, _TWO)
  runs.until_trained(run, 3)
  said = runs.stop(run)
  last = runs.metrics(workdir)[-1]['iteration']
  assert said.startswith(
    f'Stopped after iteration {last}. The same command goes on'
  )
  assert ' and '.join(f'{host.path}/{store}' for store in stores) in said
  assert {(w['state'], w['iteration']) for w in runs.workers(workdir)} == {
    ('stopped', last)
  }
  assert host.has_ended() and _stores(host) == stores
  run = host.train(workdir, _TWO)
  runs.until_trained(run, 3)
  os.kill(runs.workers(workdir)[1]['pid'], signal.SIGSTOP)
  runs.stop_at_once(run)
  assert host.has_ended() and _stores(host) == stores
  # One host does not have the other's snapshots, but ends the use of them.
  out, _ = runs.end(host.train(workdir))
  assert out.count('the run goes on with it') == 2 and 'done again' in out
  first = runs.resumptions(workdir)
  assert len(first) == 2 and min(first) > 1
  assert runs.bits(runs.metrics(workdir)) == undisturbed
  assert host.is_clean()


@pytest.mark.thorough
def test_a_leader_that_was_killed(host, tmp_path, undisturbed):
  """All hosts end with it; later one of their agents hangs."""
  workdir = tmp_path / 'run'
  run = host.train(workdir, _TWO)
  runs.until(run, 'iteration 6/')
  run.kill()
  runs.wait_for(lambda: not host.processes(), seconds=10)
  stores = _stores(host)
  assert len(stores) == 2
  run = host.train(workdir, _TWO)
  runs.until_trained(run, 3)
  os.kill(_agents(workdir)[1]['pid'], signal.SIGSTOP)
  assert 'The same command goes on' in runs.stop_at_once(run)
  assert host.has_ended() and _stores(host) == stores
  runs.end(host.train(workdir, _TWO))
  first = runs.resumptions(workdir)
  assert len(first) == 2 and min(first) > 1
  assert runs.bits(runs.metrics(workdir)) == undisturbed
  assert host.is_clean()


@pytest.mark.soak
def test_a_host_agent_that_is_stopped_for_a_while(host, tmp_path, undisturbed):
  """Longer than a worker may be silent: nobody fails; then forever: it ends."""
  workdir = tmp_path / 'run'
  run = host.train(workdir, _TWO)
  runs.until(run, 'iteration 6/')
  pid = _agents(workdir)[1]['pid']
  os.kill(pid, signal.SIGSTOP)
  said = runs.until(run, 'is stopped (SIGSTOP), and all wait for it')
  assert f'its agent (pid {pid})' in said
  time.sleep(hang_detection._SILENCE_SECONDS + 5)
  os.kill(pid, signal.SIGCONT)
  runs.end(run)
  assert not {'failure', 'recovery_started'} & {*runs.kinds(workdir)}
  assert runs.bits(runs.metrics(workdir)) == undisturbed
  assert host.is_clean()

  workdir = tmp_path / 'another'
  run = host.train(workdir, _TWO, '--hang_timeout=5')
  runs.until(run, 'iteration 6/')
  os.kill(_agents(workdir)[1]['pid'], signal.SIGSTOP)
  _, err = runs.end(run, errors.ExitCode.HUNG)
  assert 'was stopped (SIGSTOP) for' in err and 'same command' in err
  assert host.has_ended()


def test_a_store_of_another_host_that_is_in_use(host, tmp_path):
  name = run_store.host_id(_begin(tmp_path / 'run'), 1)
  store = store_folder.StoreFolder(host.path, name)
  store.start()
  _, err = runs.end(host.train(tmp_path / 'run', _TWO), 2)
  assert f'{name}: in use' in err and '--hostmem_dir' in err
  assert not host.processes() and _stores(host) == [store.path.name]
  store.remove()


def _send_garbage(address):
  """Whatever strangers send, to a store server."""
  ip, port = address.removeprefix('tcp://').rsplit(':', 1)
  for data in (
    bytes(range(256)) * 1000,
    b'GET / HTTP/1.1\r\n\r\n',
    b'\xff' + b'\0' * 8 + b'\x7f' + b'garbage' * 100,
    b'',
  ):
    with socket.create_connection((ip, int(port)), 10) as raw:
      try:
        raw.sendall(data)
        raw.shutdown(socket.SHUT_WR)
        while raw.recv(4096):
          pass
      except OSError:  # it hung up on us
        pass
  with zmq.Context() as context, context.socket(zmq.DEALER) as intruder:
    intruder.connect(address)
    intruder.send(b'x' * 100)
    intruder.close(linger=50)


@pytest.mark.thorough
def test_a_worker_of_another_host(host, tmp_path, undisturbed):
  """What it prints is shown; killed, it recovers, whatever strangers send."""
  (tmp_path / 'sitecustomize.py').write_text(
    'import sys\n'
    'if "moetion_jax.runtime.worker.main" in sys.orig_argv:\n'
    '  print("here I am", flush=True)\n'
  )
  workdir = tmp_path / 'run'
  environment = {'PYTHONPATH': str(tmp_path)}
  run = host.train(workdir, _TWO, environment=environment)
  runs.until(run, 'iteration 6/')
  os.kill(runs.workers(workdir)[1]['pid'], signal.SIGKILL)
  assert 'stage(s) 1 recover(s)' in runs.until(run, 'SIGKILL')
  for agent in _agents(workdir):
    _send_garbage(agent['address'])
  out, err = runs.end(run)
  assert 'stage 1 recovered in' in out
  assert runs.bits(runs.metrics(workdir)) == undisturbed
  for agent in _agents(workdir):
    assert f'{agent["address"]}: ignored a connection' in err
  for stage, times in (0, 1), (1, 2):
    assert err.count(f'[stage {stage}] here I am') == times
    log = workdir / 'logs' / f'stage-{stage}.log'
    assert log.read_text().count('here I am') == times
  assert host.is_clean()
