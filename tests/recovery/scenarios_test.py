"""Stories of failures; after a change `python -m tests.support.scenarios`."""

import pytest

from moetion_jax.runtime import faults
from tests.support import scenarios

_STORIES = {
  path.stem: path.read_text() for path in sorted(scenarios.FOLDER.glob('*.txt'))
}


@pytest.mark.parametrize('name', _STORIES)
def test_the_story_is_told_as_it_happens(name):
  assert scenarios.play(_STORIES[name]) == _STORIES[name]


@pytest.mark.parametrize('kind', faults.TABLE)
def test_each_kind_of_scripted_fault_has_a_story(kind):
  assert any(f'\nfault {kind}:' in story for story in _STORIES.values())


def test_a_story_that_is_told_otherwise_is_found():
  story = _STORIES['one_stage_dies']
  told = story.replace('go start=8', 'go start=7')
  assert told != story
  assert scenarios.play(told) == story
