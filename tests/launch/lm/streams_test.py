"""Commands whose output nobody reads, or cannot be written."""

import os
import select
import signal
import subprocess
import sys

import pytest

from launch.lm import streams
from tests.support import helpers

# Prints lines, says which file it opened first, and returns 3.
_COMMAND = """
import os, sys
from launch.lm import command_line, streams
from moetion_jax import errors
from moetion_jax.runtime import linux_process

def main(argv):
  if argv[1] == 'outlive':
    streams.outlive('it')
    linux_process.exit_when_stopped(75, streams.hurry)
  fd = os.open('/dev/null', os.O_RDONLY)
  for i in range(int(argv[2])):
    print('line', i)
  if argv[1] == 'refuse':
    raise errors.ConfigError('flag', 1, 'is wrong')
  if argv[1] == 'crash':
    raise ValueError('a bug')
  if argv[1] == 'interrupt':
    os.kill(os.getpid(), 2)
  if argv[1] == 'table':
    import rich.console
    rich.console.Console().print('a table')
  if argv[1] == 'umlaut':
    print(chr(252))
  sys.stdout.flush()
  print(f'opened {fd}', file=sys.stderr)
  return 3

command_line.run_main('it', main)
"""
_MANY = '30000'  # lines: more than a pipe holds


def _start(*arguments, **streams_of):
  return subprocess.Popen(
    [sys.executable, '-c', _COMMAND, *arguments],
    cwd=helpers.ROOT,
    text=True,
    **streams_of,
  )


def _end_after_one_line(process):
  """Reads a line of a process, as `head -1`; returns code and errors."""
  assert process.stdout.readline() == 'line 0\n'
  process.stdout.close()
  err = process.stderr.read() if process.stderr else ''
  return process.wait(60), err


def test_a_command_ends_quietly():
  process = _start('end', _MANY, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
  assert _end_after_one_line(process) == (streams.BROKEN_PIPE_CODE, '')


@pytest.mark.parametrize('lines', ['1', _MANY])
def test_one_whose_reader_was_gone_before(lines):
  """Also if all of it is written at the end only."""
  reader, writer = os.pipe()
  os.close(reader)
  process = _start('end', lines, stdout=writer, stderr=subprocess.PIPE)
  os.close(writer)
  _, err = process.communicate(timeout=60)
  assert (process.returncode, err) == (streams.BROKEN_PIPE_CODE, '')


def test_a_command_outlives_its_reader():
  process = _start(
    'outlive', _MANY, stdout=subprocess.PIPE, stderr=subprocess.PIPE
  )
  code, err = _end_after_one_line(process)
  assert code == 3
  said, last = sorted(err.splitlines())
  assert said.startswith('it: standard output can no longer be written')
  assert 'Broken pipe' in said and last.startswith('opened')


def test_a_command_outlives_the_reader_of_both():
  process = _start(
    'outlive', _MANY, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
  )
  assert _end_after_one_line(process)[0] == 3


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_the_wait_for_a_reader_and_not_the_meaning(number):
  """All is done, and who is to read that does not: the code is a known one."""
  before = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # not as under nohup
  process = _start(
    'outlive', _MANY, stdout=subprocess.PIPE, stderr=subprocess.PIPE
  )
  signal.signal(signal.SIGHUP, before)
  assert process.stderr.readline().startswith('opened')
  process.send_signal(number)
  assert process.wait(60) in (3, 75)  # 75: it was not quite at its end
  assert process.stderr.read() == ''


def test_a_command_outlives_a_full_disk():
  with open('/dev/full', 'wb') as full:
    process = _start('outlive', '5', stdout=full, stderr=subprocess.PIPE)
    _, err = process.communicate(timeout=60)
  assert process.returncode == 3 and 'No space left' in err


@pytest.mark.parametrize('closed', [(1,), (2,), (0, 1, 2)])
@pytest.mark.parametrize('kind', ['end', 'outlive'])
def test_closed_streams_are_no_files(tmp_path, kind, closed):
  """No file that is opened later takes their numbers."""
  code = f"""
import os, sys
for fd in {closed}:
  os.close(fd)
os.execv(sys.executable, [sys.executable, '-c', {_COMMAND!r}, {kind!r}, '3'])
"""
  process = subprocess.Popen(
    [sys.executable, '-c', code],
    cwd=helpers.ROOT,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )
  out, err = process.communicate(timeout=60)
  assert process.returncode == 3
  assert len(out.splitlines()) == (0 if 1 in closed else 3)
  if 2 not in closed:
    assert int(err.removeprefix('opened ')) > 2


@pytest.mark.parametrize(
  ('how', 'code', 'says'),
  [('refuse', 2, '--flag=1: is wrong'), ('crash', 1, 'ValueError: a bug')],
)
def test_what_failed_counts_not_that_nobody_reads_it(how, code, says):
  reader, writer = os.pipe()
  os.close(reader)
  # Written when it ends: a setting that undoes that would let `print` fail.
  buffered = {k: v for k, v in os.environ.items() if k != 'PYTHONUNBUFFERED'}
  process = _start(
    how, '1', stdout=writer, stderr=subprocess.PIPE, env=buffered
  )
  os.close(writer)
  _, err = process.communicate(timeout=60)
  assert process.returncode == code and says in err
  assert 'BrokenPipe' not in err


def test_an_interrupt_ends_it_without_a_traceback():
  # A shell has what it runs in the background ignore it, and so its children.
  before = signal.signal(signal.SIGINT, signal.SIG_DFL)
  process = _start('interrupt', '1', stderr=subprocess.PIPE)
  signal.signal(signal.SIGINT, before)
  _, err = process.communicate(timeout=60)
  assert (process.returncode, err) == (-signal.SIGINT, '')


@pytest.mark.parametrize('is_full', [False, True])
def test_a_refusal_that_nobody_reads(is_full):
  """Its code counts."""
  reader, writer = os.pipe()
  os.close(reader)
  with open('/dev/full', 'wb') as full:
    process = _start('refuse', '0', stderr=full if is_full else writer)
  os.close(writer)
  assert process.wait(60) == 2


@pytest.mark.parametrize('lines', ['1', _MANY])
def test_a_full_disk_is_named(lines):
  with open('/dev/full', 'wb') as full:
    process = _start('end', lines, stdout=full, stderr=subprocess.PIPE)
    _, err = process.communicate(timeout=60)
  said = 'it: error: standard output cannot be written: No space left on device'
  assert (process.returncode, err.splitlines()[-1]) == (1, said)
  assert 'Traceback' not in err and 'ignored' not in err


def test_a_table_that_nobody_reads():
  """The library that draws it would end the process with a code of its own."""
  reader, writer = os.pipe()
  os.close(reader)
  process = _start('table', '0', stdout=writer, stderr=subprocess.PIPE)
  os.close(writer)
  _, err = process.communicate(timeout=60)
  assert (process.returncode, err) == (streams.BROKEN_PIPE_CODE, '')


def test_names_that_a_stream_has_no_letters_for():
  ascii_only = os.environ | {'PYTHONIOENCODING': 'ascii'}
  process = _start('umlaut', '0', stdout=subprocess.PIPE, env=ascii_only)
  out, _ = process.communicate(timeout=60)
  assert (process.returncode, out) == (3, '\\xfc\n')


def test_print_config_into_a_pipe_that_is_closed():
  """It is no run, which would go on."""
  reader, writer = os.pipe()
  os.close(reader)
  process = subprocess.Popen(
    [sys.executable, '-m', 'launch.train', '--print_config'],
    cwd=helpers.ROOT,
    stdout=writer,
    stderr=subprocess.PIPE,
    text=True,
  )
  os.close(writer)
  _, err = process.communicate(timeout=60)
  assert (process.returncode, err) == (streams.BROKEN_PIPE_CODE, '')


def test_a_whole_reader_gets_everything():
  process = _start('outlive', '5', stdout=subprocess.PIPE)
  out, _ = process.communicate(timeout=60)
  assert out.splitlines() == [f'line {i}' for i in range(5)]


@pytest.mark.parametrize(
  ('lines', 'is_whole'), [(30_000, True), (200_000, False)]
)
def test_nobody_waits_for_a_slow_reader(lines, is_whole):
  """As a terminal after Ctrl-S; what was printed is there when it goes on."""
  process = _start(
    'outlive', str(lines), stdout=subprocess.PIPE, stderr=subprocess.PIPE
  )
  assert select.select([process.stderr], [], [], 60)[0], 'it waits'
  assert process.stderr.readline().startswith('opened')
  out, _ = process.communicate(timeout=60)
  assert process.returncode == 3
  read = out.splitlines()
  if is_whole:
    assert read == [f'line {i}' for i in range(lines)]
  else:
    assert read[:9] == [f'line {i}' for i in range(9)]
    assert len(read) < lines and 'while nobody read is left out' in out
