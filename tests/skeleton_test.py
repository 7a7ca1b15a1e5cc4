"""The tree against its own rules: layers, BUILD, README, what is installed."""

import ast
import pathlib
import re
import shutil
import subprocess
import sys

import pytest

pytestmark = pytest.mark.fast

ROOT = pathlib.Path(__file__).resolve().parent.parent
PACKAGES = ('moetion_jax', 'models', 'launch')
# Which of our packages each package may import (DESIGN section 7).
MAY_IMPORT = {
  'moetion_jax': {'moetion_jax'},
  'models': {'moetion_jax', 'models'},
  'launch': {'moetion_jax', 'models', 'launch'},
  'tests': {'moetion_jax', 'models', 'launch', 'tests'},
}
# A module of the library imports only from modules that stand before it.
LIBRARY_ORDER = (
  'base',
  'config',
  'report',
  'stage_model',
  'operators',
  'optimizers',
  'digest',
  'schedule',
  'mesh',
  'programs',
  'residuals',
  'division',
  'sums',
  'shares',
  'stage',
  'room',
  'hostmem',
  'entry',
  'segment',
  'store_index',
  'doorbell',
  'message',
  'buffers',
  'transport',
  'store_server',
  'logs',
  'reads',
  'boundary_log',
  'memory_log',
  'joined_log',
  'verdict',
  'layout',
  'snapshot_blocks',
  'capture_sources',
  'capture_rows',
  'capture_packed',
  'snapshot_manifest',
  'snapshot_file',
  'snapshot_handler',
  'snapshot_store',
  'durable_store',
  'faults',
  'captured',
  'snapshot',
  'capture',
  'slots',
  'window',
  'policies',
  'coverage',
  'recovery',
  'snapshotter',
  'conversion',
  'idle',
  'worker',
  'loop_state',
  'loop',
)


def _imports(path: pathlib.Path) -> set[str]:
  """Dotted names of our own modules that a file imports, anywhere in it."""
  found = set()
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.Import):
      found |= {alias.name for alias in node.names}
    elif isinstance(node, ast.ImportFrom) and node.module:
      for alias in node.names:
        inner = f'{node.module}.{alias.name}'
        file = ROOT / (inner.replace('.', '/') + '.py')
        found.add(inner if file.exists() else node.module)
  return {n for n in found if n.split('.')[0] in MAY_IMPORT}


def _modules(package: str) -> list[pathlib.Path]:
  return sorted((ROOT / package).glob('*.py'))


@pytest.mark.parametrize('package', [*PACKAGES, 'tests'])
def test_imports_only_go_down(package):
  for path in _modules(package):
    packages = {n.split('.')[0] for n in _imports(path)}
    assert packages <= MAY_IMPORT[package], path


def test_library_modules_import_only_earlier_ones():
  modules = {p.stem for p in _modules('moetion_jax')} - {'__init__'}
  assert modules == set(LIBRARY_ORDER), 'LIBRARY_ORDER must name every module'
  for index, name in enumerate(LIBRARY_ORDER):
    for used in _imports(ROOT / 'moetion_jax' / f'{name}.py'):
      if '.' in used:
        assert used.split('.')[1] in LIBRARY_ORDER[:index], (name, used)


def test_no_module_shadows_the_standard_library():
  for package in PACKAGES:
    for path in _modules(package):
      assert path.stem not in sys.stdlib_module_names, path


def test_flags_and_environment_stay_in_launch():
  for package in ('moetion_jax', 'models'):
    for path in _modules(package):
      text = path.read_text()
      assert 'absl import flags' not in text, path
      assert 'os.environ' not in text and 'os.getenv' not in text, path


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


def _build_targets() -> dict[str, dict]:
  """The targets of BUILD; it is Starlark that is Python as well."""
  targets = {}

  def rule(kind):
    def declare(name, **attributes):
      assert name not in targets
      targets[name] = {'kind': kind, **attributes}

    return declare

  def glob(patterns, exclude=()):
    files = {str(p.relative_to(ROOT)) for g in patterns for p in ROOT.glob(g)}
    return sorted(files - set(exclude))

  kinds = ('py_library', 'py_binary', 'py_test')
  scope = {kind: rule(kind) for kind in kinds}
  scope |= {'package': lambda **_: None, 'glob': glob}
  exec((ROOT / 'BUILD').read_text(), scope)
  return targets


def _packages_of(files: list[str]) -> set[str]:
  return {n.split('.')[0] for f in files for n in _imports(ROOT / f)}


def test_build_covers_every_module_and_names_its_imports():
  targets = _build_targets()
  covered = [f for t in targets.values() for f in t['srcs']]
  on_disk = [
    str(p.relative_to(ROOT))
    for package in (*PACKAGES, 'tests')
    for p in _modules(package)
  ]
  libraries = [
    f for t in targets.values() if t['kind'] != 'py_binary' for f in t['srcs']
  ]
  assert sorted(libraries) == sorted(on_disk), 'each module in one target'
  assert set(covered) == set(on_disk)
  for name, target in targets.items():
    wanted = {f':{p}' for p in _packages_of(target['srcs'])}
    if target['kind'] == 'py_test':
      wanted |= {':conftest'}
    if target['kind'] == 'py_binary':
      wanted |= {':launch'}
    wanted = {':helpers' if w == ':tests' else w for w in wanted}
    assert set(target.get('deps', [])) == wanted - {f':{name}'}, name


def test_build_has_one_test_target_for_each_test_file():
  targets = _build_targets()
  tests = {
    t['srcs'][0]: n for n, t in targets.items() if t['kind'] == 'py_test'
  }
  files = {f'tests/{p.name}' for p in (ROOT / 'tests').glob('*_test.py')}
  assert set(tests) == files
  for file, name in tests.items():
    assert name == pathlib.Path(file).stem


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
  assert 'moetion_jax/stage.py' in names
  for other in ('models/', 'launch/', 'tests/'):
    assert other not in names


def test_every_test_module_names_its_tier():
  for path in (ROOT / 'tests').glob('*_test.py'):
    text = path.read_text()
    assert 'pytest.mark.fast' in text or 'pytest.mark.soak' in text, path
