"""The names that the library offers, and what an agent imports of them."""

import subprocess
import sys

import pytest

import moetion_jax
from tests.support import helpers

# What an agent and whoever plans needs; none of it may import JAX.
_OF_AGENTS = (
  'JobSpec TrainConfig OptimizerConfig AgentSettings CaptureSettings POLICIES '
  'View run plan StageInventory RecoveryPlan valid_starts choose_window '
  'make_slots MoetionError ConfigError ExitCode exit_code_of parse_faults'
)


@pytest.mark.parametrize('name', moetion_jax.__all__)
def test_each_name_is_there(name):
  assert getattr(moetion_jax, name) is not None


def test_any_other_is_not():
  with pytest.raises(AttributeError, match='moetion_jax has no attribute jobs'):
    _ = moetion_jax.jobs


def test_an_agent_needs_no_jax():
  code = (
    f'import sys\nfrom moetion_jax import {_OF_AGENTS.replace(" ", ", ")}\n'
    'assert "jax" not in sys.modules\n'
  )
  subprocess.run([sys.executable, '-c', code], cwd=helpers.ROOT, check=True)
