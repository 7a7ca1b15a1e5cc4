"""The tree of packages keeps its rules, and each rule says so when broken."""

import pytest

from tests.support import helpers, layering

_PACKAGES = ('moetion_jax', 'models', 'launch')


@pytest.fixture(scope='module')
def tree():
  return layering.read_tree(helpers.ROOT, *_PACKAGES)


def _assert_kept(sentences):
  found = list(sentences)
  assert not found, '\n' + '\n'.join(found)


def test_imports_only_go_down(tree):
  _assert_kept(layering.check_order(tree))


def test_what_is_imported_is_there(tree):
  tests = layering.read_tree(helpers.ROOT, 'tests')
  _assert_kept(layering.check_missing({**tree, **tests}))


def test_no_import_is_relative(tree):
  _assert_kept(layering.check_relative(tree))


def test_no_circles(tree):
  _assert_kept(layering.check_circles(tree))


def test_every_package_has_its_place(tree):
  _assert_kept(layering.check_packages(tree))


def test_folders_and_modules_are_small(tree):
  _assert_kept(layering.check_sizes(tree))


def test_objects_are_whole_from_the_start(tree):
  _assert_kept(layering.check_objects(tree, layering.HALF_MADE))


def test_no_module_shadows_the_standard_library(tree):
  _assert_kept(layering.check_names(tree))


@pytest.mark.parametrize('package', _PACKAGES)
def test_no_module_refers_to_a_document_that_is_not_here(package):
  files = (helpers.ROOT / package).rglob('*.py')
  assert not [str(file) for file in files if 'DESIGN' in file.read_text()]


def test_launch_holds_commands(tree):
  _assert_kept(layering.check_commands(tree))


def test_flags_and_environment_stay_in_launch(tree):
  _assert_kept(layering.check_flags(tree))


def test_policies_are_asked_not_told_apart(tree):
  _assert_kept(layering.check_policies(tree))


def test_tests_mirror_the_packages(tree):
  tests = layering.read_tree(helpers.ROOT, 'tests')
  _assert_kept(layering.check_tests(tree, tests))


# ---- broken on purpose -------------------------------------------------------

_SMALL = {
  'moetion_jax.__init__': '',
  'moetion_jax.keys': '',
  'moetion_jax.hostmem.__init__': '',
  'moetion_jax.hostmem.entry': 'from moetion_jax import keys\n',
  'moetion_jax.logs.__init__': '',
  'moetion_jax.logs.log': 'from moetion_jax.hostmem import entry\n',
  'launch.__init__': '',
  'launch.train': 'command_line.run_main(main)\n',
}


def _says(sentences, *words):
  (sentence,) = sentences
  for word in words:
    assert word in sentence, sentence


@pytest.mark.parametrize(
  'source',
  [
    'from moetion_jax.logs import gone\n',
    'def f():\n  from moetion_jax.gone import log\n',
    'from moetion_jax.hostmem.entry import gone\n',
  ],
)
def test_an_import_of_what_is_gone(source):
  assert not list(layering.check_missing(_SMALL))
  tree = {**_SMALL, 'launch.show': source}
  _says(layering.check_missing(tree), 'launch.show:', 'gone')


@pytest.mark.parametrize(
  'source',
  [
    'from moetion_jax.logs import log\n',
    'import moetion_jax.logs.log\n',
    'from moetion_jax.logs.log import Log\n',
    'def f():\n  from moetion_jax.logs import log\n',
    'if TYPE_CHECKING:\n  from moetion_jax.logs import log as other\n',
  ],
)
def test_an_import_that_points_up(source):
  broken = {**_SMALL, 'moetion_jax.hostmem.entry': source}
  _says(
    layering.check_order(broken),
    'moetion_jax.hostmem.entry imports moetion_jax.logs.log',
    'hand it in',
  )


def test_a_relative_import():
  broken = {**_SMALL, 'moetion_jax.logs.log': 'from ..hostmem import entry\n'}
  _says(layering.check_relative(broken), 'moetion_jax.logs.log:1', 'root')


def test_a_circle_inside_a_package():
  broken = {
    **_SMALL,
    'moetion_jax.logs.log': 'from moetion_jax.logs import size\n',
    'moetion_jax.logs.size': 'from moetion_jax.logs import log\n',
  }
  _says(
    layering.check_circles(broken),
    'moetion_jax.logs.log -> moetion_jax.logs.size -> moetion_jax.logs.log',
    'module of its own',
  )


def test_a_package_without_a_place():
  broken = {**_SMALL, 'moetion_jax.extra.__init__': ''}
  found = [x for x in layering.check_packages(broken) if 'extra' in x]
  _says(found, 'package moetion_jax.extra', 'ORDER')


def test_a_package_that_is_gone():
  found = [x for x in layering.check_packages(_SMALL) if 'launch.lm ' in x]
  _says(found, 'strike it from ORDER')


def test_a_folder_that_is_too_full():
  more = {f'moetion_jax.logs.m{i}': '' for i in range(12)}
  _says(layering.check_sizes({**_SMALL, **more}), 'logs has 13', 'package')


def test_a_module_that_is_too_long():
  broken = {**_SMALL, 'moetion_jax.keys': 'x = 1\n' * 501}
  _says(layering.check_sizes(broken), 'moetion_jax.keys has 501', 'purpose')


@pytest.mark.parametrize(
  ('known', 'source'),
  [
    ('A.x', 'class A:\n  def start(self):\n    self.x = 1\n'),
    ('A.x', 'class A(B):\n  def start(self):\n    self.x, y = 1, 2\n'),
    (
      'A()',
      'class A:\n  def __init__(self, a, b, c, d, *, e, f, g):\n    pass\n',
    ),
  ],
)
def test_an_object_that_is_not_whole(known, source):
  broken = {**_SMALL, 'moetion_jax.keys': source}
  _says(layering.check_objects(broken), 'moetion_jax.keys:', 'class')
  assert not list(layering.check_objects(broken, frozenset({known})))
  _says(layering.check_objects(_SMALL, frozenset({known})), known, 'strike')


def test_attributes_that_are_there_from_the_start():
  source = (
    'class A:\n  x = 1\n  def __init__(self):\n    self.y = 2\n'
    'class B(keys.A):\n  def start(self):\n    self.x = self.y = 3\n'
  )
  assert not list(
    layering.check_objects({**_SMALL, 'moetion_jax.keys': source})
  )


def test_a_module_called_like_one_of_python():
  broken = {**_SMALL, 'moetion_jax.logs.queue': ''}
  _says(layering.check_names(broken), 'moetion_jax.logs.queue', 'otherwise')


def test_a_module_of_launch_that_is_no_command():
  broken = {**_SMALL, 'launch.helper': 'def f(): pass\n'}
  _says(layering.check_commands(broken), 'launch.helper', 'move it')


@pytest.mark.parametrize('word', ['os.environ', 'absl import flags'])
def test_a_library_module_that_reads_what_it_should_be_told(word):
  broken = {**_SMALL, 'moetion_jax.keys': f'from {word}\n'}
  _says(layering.check_flags(broken), 'moetion_jax.keys', 'hand them in')


@pytest.mark.parametrize(
  'line',
  [
    'isinstance(x, whole.DensePlanner)',
    'isinstance(x, int | Inventory)',
    "x.policy == 'dense'",
    "x.policy not in ('sparse', 'dense')",
    "match x:\n  case 'dense':\n    pass",
  ],
)
def test_a_module_that_tells_policies_apart(line):
  kinds = "class DensePlanner: pass\nclass Dense:\n  name = 'dense'\n"
  broken = {**_SMALL, 'moetion_jax.policies.kinds.whole': kinds}
  assert not list(layering.check_policies(broken))
  broken['moetion_jax.keys'] = f"y = 'dense'\nz = x == y\n{line}\n"
  _says(layering.check_policies(broken), 'moetion_jax.keys:', 'ask the policy')


def test_a_test_in_no_package():
  tests = {'tests.logs.log_test': '', 'tests.elsewhere.log_test': ''}
  _says(
    layering.check_tests(_SMALL, tests), 'tests.elsewhere.log_test', 'move it'
  )
