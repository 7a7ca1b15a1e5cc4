"""The tree against its own rules: layers, BUILD, README, what is installed."""

import graphlib
import pathlib
import re
import shutil
import subprocess
import sys

import pytest

from tests.support import build_file, layering

ROOT = pathlib.Path(__file__).resolve().parent.parent
PACKAGES = ('moetion_jax', 'models', 'launch')


def test_top_level_folders():
  listed = subprocess.run(
    ['git', 'ls-files'], cwd=ROOT, capture_output=True, text=True
  ).stdout.split('\n')
  folders = {p.split('/')[0] for p in listed if '/' in p}
  assert folders == {*PACKAGES, 'tests', '.ci'}
  for name in (
    'BUILD',
    'requirements.txt',
    'pyproject.toml',
    'README.md',
    'LICENSE',
    '.ci/run',
  ):
    assert (ROOT / name).is_file(), name


def _build_targets() -> dict[str, list[str]]:
  """Deps of the targets of BUILD; it is Starlark that is Python as well."""
  targets = {}

  def declare(name, srcs, deps=(), **_):
    assert name not in targets
    targets[name] = [dep.removeprefix(':') for dep in deps]

  kinds = ('py_library', 'py_binary', 'py_test')
  scope = dict.fromkeys(kinds, declare)
  scope |= {'package': lambda **_: None, 'glob': list}
  exec((ROOT / 'BUILD').read_text(), scope)
  return targets


def test_build_is_of_this_tree():
  assert (ROOT / 'BUILD').read_text() == build_file.build_file(ROOT), (
    'modules or imports changed: mend what tests/layering_test.py says, if it '
    'says anything, then run `python -m tests.support.build_file`'
  )


def test_build_has_no_circle():
  targets = _build_targets()
  order = list(graphlib.TopologicalSorter(targets).static_order())
  assert set(order) == set(targets), 'a target depends on one that is not there'


@pytest.mark.skipif(not shutil.which('bazel'), reason='bazel is not installed')
@pytest.mark.timeout(240)
def test_bazel_loads_build(tmp_path):
  copy = tmp_path / 'tree'
  ignore = shutil.ignore_patterns('.git', '.venv', '__pycache__')
  shutil.copytree(ROOT, copy, ignore=ignore)
  (copy / 'WORKSPACE').touch()
  result = subprocess.run(
    [
      'bazel',
      f'--output_user_root={tmp_path}/out',
      '--batch',
      'query',
      '//:all',
    ],
    cwd=copy,
    capture_output=True,
    text=True,
    timeout=220,
  )
  assert result.returncode == 0, result.stderr
  assert set(result.stdout.split()) == {f'//:{n}' for n in _build_targets()}


def test_readme_opens_with_the_two_commands_and_ci_runs_the_second():
  block = re.search(
    r'```(?:sh|bash)\n(.*?)```', (ROOT / 'README.md').read_text(), re.S
  )
  assert block
  first, second = [
    line for line in block[1].splitlines() if line and line[0] != '#'
  ]
  assert 'python -m launch.train' in first
  assert 'python -m pytest' in second and '-m fast' in second
  ci = (ROOT / '.ci' / 'run').read_text()
  assert 'README.md' in ci  # it takes the command from there


def test_wheel_holds_the_library_alone(tmp_path):
  source = tmp_path / 'source'
  ignore = shutil.ignore_patterns('.git', '.venv', '__pycache__', 'tests')
  shutil.copytree(ROOT, source, ignore=ignore)
  subprocess.run(
    [
      sys.executable,
      '-m',
      'pip',
      'wheel',
      '-q',
      '--no-deps',
      '-w',
      tmp_path,
      '.',
    ],
    cwd=source,
    check=True,
    timeout=180,
  )
  (wheel,) = tmp_path.glob('*.whl')
  names = subprocess.run(
      [sys.executable, '-m', 'zipfile', '-l', str(wheel)],
      capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
  tree = layering.read_tree(ROOT, 'moetion_jax')
  for module in tree:
    assert module.replace('.', '/') + '.py' in names, module
  for other in ('models/', 'launch/', 'tests/'):
    assert other not in names
  works = sorted(m.removesuffix('.__init__') for m in tree)
  code = (
    'import importlib, sys\n'
    'sys.path.insert(0, sys.argv[1])\n'
    'for name in sys.argv[2:]:\n'
    '  assert sys.argv[1] in importlib.import_module(name).__file__, name\n'
  )
  subprocess.run(
    [sys.executable, '-c', code, wheel, *works],
    cwd=tmp_path,
    check=True,
    timeout=120,
  )
