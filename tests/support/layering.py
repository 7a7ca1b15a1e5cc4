"""The rules that packages and modules keep, as functions of a tree of files.

Each returns sentences: what is wrong, where, and what to do.
`tests/layering_test.py` applies them to the repository, and breaks each of them
once in a small tree of its own.
"""

from __future__ import annotations

import ast
import pathlib
import re
import sys
from collections.abc import Iterator, Mapping

MAX_MODULES = 12
MAX_LINES = 500
MAX_ARGUMENTS = 6

# Classes that get an attribute late, or too many arguments. None may be added;
# whoever mends one strikes it from this list.
HALF_MADE = frozenset(
  {
    'SegmentWriter._layout',
    'StageRun._programs',
    'Worker()',
  }
)

# A package imports from itself and from packages that stand before it.
ORDER = (
  'moetion_jax',
  'moetion_jax.hostmem',
  'moetion_jax.logs',
  'moetion_jax.state',
  'moetion_jax.programs',
  'moetion_jax.snapshots',
  'moetion_jax.policies',
  'moetion_jax.policies.kinds',
  'moetion_jax.recovery',
  'moetion_jax.recovery.coordinator',
  'moetion_jax.capture',
  'moetion_jax.training',
  'moetion_jax.runtime',
  'moetion_jax.runtime.records',
  'moetion_jax.runtime.checkpoints',
  'moetion_jax.runtime.worker',
  'moetion_jax.runtime.hosts',
  'moetion_jax.runtime.agent',
  'moetion_jax.loop',
  'models',
  'launch.lm',
  'launch.offline',
  'launch.simulate',
  'launch.benchmark.harness',
  'launch.benchmark',
  'launch.chaos',
  'launch',
)

# Those that start processes hand the environment on; XLA reads its flags there,
# which is why it is recorded.
_ENVIRONMENT = frozenset(
  {
    'moetion_jax.runtime.hosts.child_process',
    'moetion_jax.runtime.hosts.crew',
    'moetion_jax.runtime.read_environment',
    'moetion_jax.runtime.worker.main',
    'moetion_jax.runtime.xla_setup',
  }
)

_KINDS = 'moetion_jax.policies.kinds'

Tree = Mapping[str, str]  # source by dotted name of the module


def read_tree(root: pathlib.Path, *folders: str) -> dict[str, str]:
  """Reads the modules below some folders, those that are packages included."""
  return {
    '.'.join(path.relative_to(root).with_suffix('').parts): path.read_text()
    for folder in folders
    for path in sorted((root / folder).rglob('*.py'))
  }


def package_of(module: str) -> str:
  """The package that a module lies in; a package's is itself."""
  return module.rpartition('.')[0]


def imports(source: str, tree: Tree) -> set[str]:
  """Modules of the tree that a module imports, anywhere in it.

  Args:
    source: of the importing module.
    tree: all modules. Importing a package is importing its `__init__`.
  """
  names = set()
  for node in ast.walk(ast.parse(source)):
    if isinstance(node, ast.Import):
      names |= {alias.name for alias in node.names}
    elif isinstance(node, ast.ImportFrom) and node.module:
      for alias in node.names:
        inner = f'{node.module}.{alias.name}'
        is_module = inner in tree or f'{inner}.__init__' in tree
        names.add(inner if is_module else node.module)
  found = set()
  for name in names:
    if name in tree:
      found.add(name)
    elif f'{name}.__init__' in tree:
      found.add(f'{name}.__init__')
  return found


def upward_imports(tree: Tree) -> set[tuple[str, str]]:
  """Pairs (module, imported one) of which the second comes later in ORDER."""
  places = {package: place for place, package in enumerate(ORDER)}
  return {
    (module, used)
    for module, source in tree.items()
    for used in imports(source, tree)
    if places.get(package_of(used), 0) > places.get(package_of(module), 0)
  }


def check_order(tree: Tree) -> Iterator[str]:
  """Imports go to the same package or to one before it in ORDER."""
  for module, used in sorted(upward_imports(tree)):
    yield (
      f'{module} imports {used}, whose package comes later in ORDER '
      '(tests/support/layering.py, the table of the README): move what is '
      'needed into an earlier package, or hand it in as an argument'
    )


def check_missing(tree: Tree) -> Iterator[str]:
  """What an import takes from the tree is there, also inside a function."""
  roots = {name.partition('.')[0] for name in tree}
  for module, source in sorted(tree.items()):
    for node in ast.walk(ast.parse(source)):
      if not isinstance(node, ast.ImportFrom) or not node.module:
        continue
      if node.module.partition('.')[0] not in roots:
        continue
      found = tree.get(node.module, tree.get(f'{node.module}.__init__', ''))
      for alias in node.names:
        inner = f'{node.module}.{alias.name}'
        if inner in tree or f'{inner}.__init__' in tree:
          continue
        if not re.search(rf'\b{re.escape(alias.name)}\b', found):
          yield (
            f'{module}:{node.lineno} imports {inner}, which is nowhere: name '
            'the module in which it is now'
          )


def check_relative(tree: Tree) -> Iterator[str]:
  """Imports name the whole module, so that everybody sees it."""
  for module, source in sorted(tree.items()):
    for node in ast.walk(ast.parse(source)):
      if isinstance(node, ast.ImportFrom) and node.level:
        yield (
          f'{module}:{node.lineno} has a relative import: write the name of '
          'the module from its root on'
        )


def check_circles(tree: Tree) -> Iterator[str]:
  """No module imports itself by way of others, also inside a package."""
  uses = {module: imports(source, tree) for module, source in tree.items()}
  done: set[str] = set()

  def walk(module: str, path: tuple[str, ...]) -> Iterator[str]:
    if module in path:
      circle = ' -> '.join((*path[path.index(module) :], module))
      yield (
        f'a circle of imports: {circle}. Move what both need into a module of '
        'its own below them'
      )
    elif module not in done:
      for used in sorted(uses[module]):
        yield from walk(used, (*path, module))
      done.add(module)

  for module in sorted(tree):
    yield from walk(module, ())


def check_packages(tree: Tree) -> Iterator[str]:
  """Every package has a place in ORDER, and each of those is there."""
  found = {package_of(module) for module in tree}
  for package in sorted(found - set(ORDER)):
    yield (
      f'package {package} has no place in ORDER: put it behind all that it '
      'imports, before all that import it'
    )
  for package in sorted(set(ORDER) - found):
    yield f'there is no package {package} any more: strike it from ORDER'


def check_sizes(tree: Tree) -> Iterator[str]:
  """No folder of more than 12 modules, no module of more than 500 lines."""
  folders: dict[str, list[str]] = {}
  for module in tree:
    if not module.endswith('__init__'):
      folders.setdefault(package_of(module), []).append(module)
  for folder, modules in sorted(folders.items()):
    if len(modules) > MAX_MODULES:
      yield (
        f'{folder} has {len(modules)} modules, more than {MAX_MODULES}: put '
        'those that belong together into a package of their own'
      )
  for module, source in sorted(tree.items()):
    lines = source.count('\n')
    if lines > MAX_LINES:
      yield (
        f'{module} has {lines} lines, more than {MAX_LINES}: find the second '
        'purpose in it and give that a module'
      )


def _fields(node: ast.ClassDef) -> tuple[set[str], dict[str, int]]:
  """Attributes that a class has from the start, and those that come later."""
  own, later = set(), {}
  for part in node.body:
    if isinstance(part, ast.AnnAssign | ast.Assign):
      targets = part.targets if isinstance(part, ast.Assign) else [part.target]
      own |= {t.id for t in targets if isinstance(t, ast.Name)}
    elif isinstance(part, ast.FunctionDef):
      own.add(part.name)
      for inner in ast.walk(part):
        if (
          isinstance(inner, ast.Attribute)
          and isinstance(inner.ctx, ast.Store)
          and isinstance(inner.value, ast.Name)
          and inner.value.id == 'self'
        ):
          if part.name in ('__init__', '__post_init__'):
            own.add(inner.attr)
          else:
            later.setdefault(inner.attr, inner.lineno)
  return own, later


def check_objects(
  tree: Tree, allowed: frozenset[str] = frozenset()
) -> Iterator[str]:
  """Every attribute is there from the start; constructors are short.

  Args:
    tree: the packages.
    allowed: what is known to break that: `Class.attribute`, `Class()`.
  """
  classes = {
    (module, node.name): node
    for module, source in tree.items()
    for node in ast.walk(ast.parse(source))
    if isinstance(node, ast.ClassDef)
  }
  by_name: dict[str, list[ast.ClassDef]] = {}
  for (_, name), node in classes.items():
    by_name.setdefault(name, []).append(node)

  def inherited(node: ast.ClassDef) -> set[str]:
    own = _fields(node)[0]
    for base in node.bases:
      name = ast.unparse(base).partition('[')[0].rpartition('.')[2]
      own = own.union(*map(inherited, by_name.get(name, ())))
    return own

  found = {}
  for (module, name), node in sorted(classes.items()):
    own = inherited(node)
    for attribute, line in _fields(node)[1].items():
      if attribute not in own:
        found[f'{name}.{attribute}'] = (
          f'{module}:{line} makes {name}.{attribute}, which is not there '
          'before: let the constructor be given it (by a factory), or make two '
          'classes of it'
        )
    for part in node.body:
      if isinstance(part, ast.FunctionDef) and part.name == '__init__':
        count = len(part.args.args) + len(part.args.kwonlyargs) - 1
        if count > MAX_ARGUMENTS:
          found[f'{name}()'] = (
            f'{module}:{part.lineno} constructs {name} of {count} arguments, '
            f'more than {MAX_ARGUMENTS}: those that belong together are a class'
          )
  for what in sorted(found.keys() - allowed):
    yield found[what]
  for what in sorted(allowed - found.keys()):
    yield f'{what} is as it should be: strike it from HALF_MADE'


def check_names(tree: Tree) -> Iterator[str]:
  """No module is called like one of the standard library."""
  for module in sorted(tree):
    name = module.rpartition('.')[2]
    if name in sys.stdlib_module_names and not name.startswith('__'):
      yield (
        f'{module} shadows the standard library when a file beside it is run '
        'as a program: call it otherwise'
      )


def check_commands(tree: Tree) -> Iterator[str]:
  """`launch` itself holds commands, nothing else."""
  for module, source in sorted(tree.items()):
    is_init = module.endswith('__init__')
    if package_of(module) != 'launch' or is_init:
      continue
    if 'command_line.run_main(' not in source:
      yield (
        f'{module} is no command (it does not call command_line.run_main): '
        'move it into a package below launch (lm, offline, ...)'
      )


def check_flags(tree: Tree) -> Iterator[str]:
  """Only `launch` has flags, and reads the environment for settings."""
  for module, source in sorted(tree.items()):
    if module.startswith('launch') or module in _ENVIRONMENT:
      continue
    for word in ('absl import flags', 'os.environ', 'os.getenv'):
      if word in source:
        yield (
          f'{module} uses {word.rpartition(" ")[2]}: the library is told by '
          'its settings; read flags and environment in launch and hand them in'
        )


def check_policies(tree: Tree) -> Iterator[str]:
  """No one outside their package tells policies apart by class or by name."""
  classes, names = {'Policy', 'Planner', 'Inventory'}, set()
  for module, source in tree.items():
    if package_of(module) != _KINDS:
      continue
    for node in ast.walk(ast.parse(source)):
      if isinstance(node, ast.ClassDef):
        classes.add(node.name)
      if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant):
        if [ast.unparse(target) for target in node.targets] == ['name']:
          names.add(node.value.value)
  for module, source in sorted(tree.items()):
    if package_of(module) == _KINDS:
      continue
    for node in ast.walk(ast.parse(source)):
      if any(word in classes | names for word in _told_apart_by(node)):
        yield (
          f'{module}:{getattr(node, "lineno", "")} tells policies apart '
          f'({ast.unparse(node)}): ask the policy, with an attribute or a '
          'method of `Policy` that each has'
        )


def _told_apart_by(node: ast.AST) -> Iterator[object]:
  """Classes that a node checks for, and constants that it compares with."""
  match node:
    case ast.Call(
      func=ast.Name(id='isinstance' | 'issubclass'), args=[_, kind]
    ):
      for part in ast.walk(kind):
        if isinstance(part, ast.Name | ast.Attribute):
          yield ast.unparse(part).rpartition('.')[2]
    case ast.Compare():
      for side in (node.left, *node.comparators):
        is_several = isinstance(side, ast.Tuple | ast.List | ast.Set)
        for part in (
          side.elts if is_several and side is not node.left else [side]
        ):
          if isinstance(part, ast.Constant):
            yield part.value
    case ast.MatchValue(value=ast.Constant(value=value)):
      yield value


def check_tests(tree: Tree, tests: Tree) -> Iterator[str]:
  """Tests lie in the folder of the package that they test.

  Args:
    tree: of the packages.
    tests: of the folder `tests`.
  """
  packages = {package_of(module) for module in tree}
  for module in sorted(tests):
    folder = package_of(module).removeprefix('tests').removeprefix('.')
    if not module.endswith('_test') or not folder:
      continue
    if not {folder, f'moetion_jax.{folder}'} & packages:
      yield (
        f'{module} lies in a folder that mirrors no package: move it to '
        'tests/<package>, without `moetion_jax`'
      )
