"""Whoever supervises must not import JAX, let alone create a backend.

Nor does a process import what only others need: it would start later.
"""

import subprocess
import sys

import pytest

from tests.support import helpers

_HOSTS = 'moetion_jax.runtime.hosts.host_messages'
_EVENTS = 'moetion_jax.recovery.events'
# An agent, the agent of a further host, and the commands that only look; what
# each does without.
_WITHOUT = {
  'moetion_jax.runtime.agent.run': ('jax', _HOSTS),
  'moetion_jax.runtime.hosts.host_agent': ('jax', _EVENTS),
  'moetion_jax.recovery.coordinator.coordinator': ('jax',),
  'moetion_jax.runtime.worker.main': ('jax', _HOSTS, _EVENTS),
  'launch.train': ('jax', 'rich', _HOSTS),
  'launch.show': ('jax',),
  'launch.chaos.__main__': ('jax',),
}


@pytest.mark.parametrize('module', _WITHOUT)
def test_it_does_not_import(module):
  code = (
    f'import sys, {module}\n'
    f'if found := sys.modules.keys() & {set(_WITHOUT[module])}:\n'
    f'  sys.exit(f"{module} imports {{found}}: find the new import with "\n'
    f'           "python -X importtime -c \'import {module}\'")\n'
  )
  ended = subprocess.run(
    [sys.executable, '-c', code],
    cwd=helpers.ROOT,
    capture_output=True,
    text=True,
    timeout=180,
  )
  assert ended.returncode == 0, ended.stderr
