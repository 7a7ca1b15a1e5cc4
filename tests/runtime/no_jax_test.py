"""Whoever supervises must not import JAX, let alone create a backend."""

import subprocess
import sys

import pytest

from tests.support import helpers

# An agent, the agent of a further host, and the commands that only look.
_WITHOUT_JAX = (
  'moetion_jax.runtime.agent.run',
  'moetion_jax.runtime.hosts.host_agent',
  'moetion_jax.recovery.coordinator.coordinator',
  'launch.train',
  'launch.show',
  'launch.chaos.__main__',
)


@pytest.mark.parametrize('module', _WITHOUT_JAX)
def test_it_imports_no_jax(module):
  code = (
    f'import sys, {module}\n'
    'if "jax" in sys.modules:\n'
    f'  sys.exit("{module} imports JAX: find the new import with "\n'
    f'           "python -X importtime -c \'import {module}\'")\n'
  )
  ended = subprocess.run(
    [sys.executable, '-c', code],
    cwd=helpers.ROOT,
    capture_output=True,
    text=True,
    timeout=60,
  )
  assert ended.returncode == 0, ended.stderr
