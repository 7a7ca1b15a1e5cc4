"""The environments of a run in its config.json."""

import json

import pytest

from moetion_jax import errors
from moetion_jax.recovery import splice
from moetion_jax.runtime.records import changes
from tests.support import helpers

_HERE = {
  'versions': {'jax': '2'},
  'device': {'platform': 'cpu', 'cores': '2'},
  'options': {'jax_enable_x64': False},
  'xla_flags': {},
  'libtpu_flags': {},
  'variables': {},
}
_BEFORE = {**_HERE, 'versions': {'jax': '1'}}


def _changes(path, *accepted, environment=_HERE):
  """Compares the environment of now, as a start does."""
  one = changes.Changes(path, accepted)
  one.known = json.loads(path.read_text())
  one.check(environment)
  one.write({})
  return one


def _write(path, **fields):
  path.write_text(json.dumps({'seed': 1} | fields))
  return path


def _splice(exact_until, *complete_at):
  return splice.Splice(exact_until=exact_until, complete_at=complete_at)


@pytest.fixture
def path(tmp_path):
  return tmp_path / 'config.json'


def test_a_new_run_is_recorded(path):
  one = changes.Changes(path)
  one.check(_HERE)
  one.write({'seed': 1})
  assert json.loads(path.read_text()) == {'seed': 1, 'environment': _HERE}
  again = _changes(path)
  assert not again.is_due(0) and not again.may_splice


@pytest.mark.parametrize('is_new', [True, False])
def test_an_unknown_name_is_refused_of_a_new_run_too(path, is_new):
  one = changes.Changes(path, ['jxa'])
  one.known = {} if is_new else {'environment': _HERE}
  with pytest.raises(errors.ConfigError, match='--accept_changes=jxa'):
    one.check(_HERE)
  known = changes.Changes(path, ['jax'])
  known.check(_HERE)
  known.write({'seed': 1})
  assert json.loads(path.read_text()) == {'seed': 1, 'environment': _HERE}


@pytest.mark.parametrize(
  'known',
  [
    {},
    {'software': {'jax': '2', 'cores': '2'}},
    {'environment': {'versions': {'jax': '2'}}},
  ],
)
def test_what_an_earlier_version_did_not_record_is_added(path, known):
  one = _changes(_write(path, **known))
  assert not one.is_due(0)
  assert json.loads(path.read_text()) == {'seed': 1, 'environment': _HERE}


def test_a_change_is_refused_and_nothing_is_written(path):
  _write(path, environment=_BEFORE)
  before = path.read_text()
  with pytest.raises(errors.ConfigError) as refused:
    _changes(path)
  assert str(refused.value) == (
    f'--workdir={path.parent}: holds a run made with jax=1, here 2: other bits '
    'would follow. Go on with what it was made with, or pass '
    '--accept_changes=jax'
  )
  assert path.read_text() == before


def test_an_accepted_change_is_recorded_with_its_splice(path):
  one = _changes(_write(path, environment=_BEFORE), 'jax')
  # Not before the splice: a start that dies here leaves the old record.
  assert json.loads(path.read_text())['environment'] == _BEFORE
  assert one.may_splice and one.is_due(4)
  one.begin(_splice(4, 6, 7))
  entry = helpers.make_change()
  assert json.loads(path.read_text()) == {
    'seed': 1,
    'environment': _HERE,
    'changes': [entry | {'pending': True}],
  }
  assert one.finish() == entry
  assert not one.is_due(4)
  value = {'seed': 1, 'environment': _HERE, 'changes': [entry]}
  assert json.loads(path.read_text()) == value
  again = _changes(path)
  assert again.splices == (_splice(4, 6, 7),) and again.may_splice
  # If all that came after is lost, what is left is spliced once more.
  assert [again.is_due(start) for start in (3, 4, 8)] == [True, False, False]
  again.begin(_splice(3, 5, 5))
  again.finish()
  assert again.splices == (_splice(4, 6, 7), _splice(3, 5, 5))
  assert json.loads(path.read_text())['changes'][1]['names'] == ['jax']


def test_a_start_that_died_in_the_middle_is_done_again(path):
  one = _changes(_write(path, environment=_BEFORE), 'jax')
  one.begin(_splice(4, 6))
  again = _changes(path)  # nothing needs to be accepted again
  assert again.is_due(4)
  # Until it is finished, what it is to remove is still there.
  assert again.accepted_before == 0
  again.begin(_splice(4, 6))
  again.finish()
  assert again.accepted_before == 1
  (entry,) = json.loads(path.read_text())['changes']
  assert entry['names'] == ['jax'] and 'pending' not in entry


def test_another_change_in_the_middle_is_another_entry(path):
  one = _changes(_write(path, environment=_BEFORE), 'jax')
  one.begin(_splice(4, 6))
  wide = {**_HERE, 'options': {'jax_enable_x64': True}}
  again = _changes(path, 'jax_enable_x64', environment=wide)
  again.begin(_splice(4, 6))
  again.finish()
  first, second = json.loads(path.read_text())['changes']
  assert (first['names'], second['names']) == (['jax'], ['jax_enable_x64'])
  assert 'pending' not in first and 'pending' not in second


def test_a_run_of_before_is_known_until_its_splice(path):
  """Whoever dies in between leaves a config.json that says what it is of."""
  one = changes.Changes(_write(path, software={'jax': '1'}), ('jax',))
  one.known = json.loads(path.read_text())
  one.check(_HERE)
  one.write({}, {'run_id': 'x'})
  held = json.loads(path.read_text())
  assert held == {'seed': 1, 'software': {'jax': '1'}, 'run_id': 'x'}
  one.begin(_splice(4, 6))
  assert 'software' not in json.loads(path.read_text())


_ENTRY = helpers.make_change()


@pytest.mark.parametrize(
  ('field', 'words'),
  [
    ({}, ''),
    ({'changes': []}, ''),
    ({'changes': [_ENTRY]}, ''),
    ({'changes': [_ENTRY, _ENTRY | {'pending': True}]}, ''),
    ({'changes': {}}, '"changes" in it is no list'),
    ({'changes': ['jax']}, 'entry 1: no object'),
    ({'changes': [_ENTRY, {}]}, 'entry 2: "names"'),
    ({'changes': [_ENTRY | {'names': 'jax'}]}, 'entry 1: "names"'),
    ({'changes': [_ENTRY | {'names': [3]}]}, 'entry 1: "names"'),
    ({'changes': [_ENTRY | {'exact_until': '4'}]}, 'entry 1: "exact_until"'),
    ({'changes': [_ENTRY | {'exact_until': True}]}, 'entry 1: "exact_until"'),
    ({'changes': [_ENTRY | {'exact_until': -1}]}, 'entry 1: "exact_until"'),
    ({'changes': [_ENTRY | {'complete_at': 6}]}, 'entry 1: "complete_at"'),
    ({'changes': [_ENTRY | {'complete_at': [6]}]}, 'has 1 numbers'),
    ({'changes': [_ENTRY | {'complete_at': [3, 6]}]}, 'from "exact_until" on'),
    ({'changes': [_ENTRY | {'from': 1}]}, 'entry 1: "from" is no object'),
    ({'changes': [_ENTRY | {'to': None}]}, 'entry 1: "to" is no object'),
    (
      {'changes': [_ENTRY | {'pending': True}, _ENTRY]},
      'entry 1: "pending", but not the last',
    ),
    ({'environment': []}, '"environment" in it'),
    ({'environment': {'versions': 1}}, '"environment.versions" in it'),
    ({'software': 'jax'}, '"software" in it'),
  ],
)
def test_a_file_that_is_damaged_or_was_edited(field, words):
  if not words:
    changes.check_content(field, 2)
    return
  with pytest.raises(ValueError, match='in it') as refused:
    changes.check_content(field, 2)
  assert words in str(refused.value)


def test_a_splice_that_is_pending():
  pending = _ENTRY | {'pending': True}
  assert changes.pending_of([pending]) == _splice(4, 6, 7)
  assert changes.pending_of([_ENTRY]) is None
  assert changes.pending_of([]) is None


def test_the_same_command_goes_on_where_something_is_gone(path):
  before = {**_HERE, 'versions': {'jax': '2', 'nvidia_cudnn_cu12': '9'}}
  one = _changes(_write(path, environment=before), 'nvidia_cudnn_cu12')
  one.begin(_splice(4, 6))
  one.finish()
  assert not _changes(path, 'nvidia_cudnn_cu12').is_due(4)
  with pytest.raises(errors.ConfigError, match='cu11'):
    _changes(path, 'nvidia_cudnn_cu11')
