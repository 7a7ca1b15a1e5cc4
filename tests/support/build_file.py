"""Writes BUILD from the tree: `python -m tests.support.build_file`.

A library target a package, a binary a program, a test target a test file; their
deps are the packages that their sources import.
"""

from __future__ import annotations

import pathlib
from collections.abc import Iterable, Mapping, Sequence

from tests.support import layering

ROOT = pathlib.Path(__file__).resolve().parents[2]
# Parts of a package with a target of their own, by target.
_PARTS = {
  # Imported by all that lie in them; the rest of them imports those.
  'launch_packages': ('launch.__init__', 'launch.benchmark.__init__'),
}
# Programs that others start; the commands are those of `launch` itself.
_CHILDREN = (
  'launch.benchmark.harness.dense_job',
  'launch.benchmark.promotion',
  'moetion_jax.runtime.hosts.host_agent',
  'moetion_jax.runtime.worker.main',
)
# Targets whose programs a target starts as processes, by name.
_STARTS = {
  'launch_benchmark': ('launch', 'launch_benchmark_harness'),
  'launch_benchmark_harness': ('launch_lm',),
  'launch_chaos': ('launch',),
  'moetion_jax_runtime_hosts': ('moetion_jax_runtime_worker',),
  'tests_support': ('launch', 'launch_chaos', 'launch_simulate'),
}
_HEAD = """# One library a package, a binary a program, a test a test file.
# Written by `python -m tests.support.build_file`, and held against the
# tree by //:skeleton_test. Third-party packages come from the Python
# environment (requirements.txt).

package(default_visibility = ["//visibility:public"])
"""


def target_of(module: str) -> str:
  """The library target that a module belongs to."""
  for target, modules in _PARTS.items():
    if module in modules:
      return target
  if module.startswith('tests.'):
    return 'tests_conftest' if module == 'tests.conftest' else 'tests_support'
  return layering.package_of(module).replace('.', '_')


def is_test(module: str) -> bool:
  """Whether a module is a test file."""
  return module.startswith('tests.') and module.endswith('_test')


def _path(module: str) -> str:
  return module.replace('.', '/') + '.py'


def _deps(
  modules: Iterable[str], tree: Mapping[str, str], target: str
) -> list[str]:
  used = {
    name
    for module in modules
    for name in (module, *layering.imports(tree[module], tree))
  }
  # To import a module is to import the packages that it lies in.
  parents = {
    f'{".".join(name.split(".")[:depth])}.__init__'
    for name in used
    for depth in range(1, name.count('.') + 1)
  }
  found = {target_of(name) for name in used - set(modules)}
  found |= {target_of(name) for name in parents & tree.keys()}
  return sorted((found | set(_STARTS.get(target, ()))) - {target})


def _rule(kind: str, name: str, **attributes: str | Sequence[str]) -> str:
  lines = [f'\n{kind}(', f'    name = "{name}",']
  for key, value in attributes.items():
    if isinstance(value, str):
      lines.append(f'    {key} = {value},')
    elif len(value) == 1:
      lines.append(f'    {key} = ["{value[0]}"],')
    elif value:
      lines += [f'    {key} = [', *(f'        "{x}",' for x in value), '    ],']
  return '\n'.join([*lines, ')', ''])


def libraries(tree: Mapping[str, str]) -> dict[str, list[str]]:
  """Modules by library target, both in order."""
  found: dict[str, list[str]] = {}
  for module in sorted(tree):
    if not is_test(module):
      found.setdefault(target_of(module), []).append(module)
  return found


def build_file(root: pathlib.Path = ROOT) -> str:
  """The text of BUILD."""
  tree = layering.read_tree(root, 'moetion_jax', 'models', 'launch', 'tests')
  rules = [_HEAD]
  for target, modules in sorted(libraries(tree).items()):
    deps = [f':{d}' for d in _deps(modules, tree, target)]
    data = {}
    if target == 'launch_simulate':
      data = {'data': 'glob(["launch/simulate/clusters/*.json"])'}
    rules.append(
      _rule(
        'py_library', target, srcs=[*map(_path, modules)], **data, deps=deps
      )
    )
  programs = [
    module
    for module, source in sorted(tree.items())
    if not module.startswith('tests.')
    if module in _CHILDREN or "\n  command_line.run_main('" in source
  ]
  for module in programs:
    name = module.removesuffix('.__main__').replace('.', '_')
    deps = _deps([module], tree, '')
    rules.append(
      _rule(
        'py_binary',
        f'{name}_program',
        srcs=[_path(module)],
        main=f'"{_path(module)}"',
        deps=[f':{d}' for d in sorted({*deps, target_of(module)})],
      )
    )
  for module in sorted(filter(is_test, tree)):
    deps = {'tests_conftest', *_deps([module], tree, '')}
    rules.append(
      _rule(
        'py_test',
        module.removeprefix('tests.').replace('.', '_'),
        srcs=[_path(module)],
        deps=[f':{d}' for d in sorted(deps)],
      )
    )
  return ''.join(rules)


if __name__ == '__main__':
  text = build_file()  # first: an error must not leave half a file
  (ROOT / 'BUILD').write_text(text)
