"""What the presets must learn from the default text (by hand: minutes)."""

import json
import pathlib

import pytest

from tests.support import helpers

pytestmark = [pytest.mark.soak, pytest.mark.timeout(1500)]


def _held_out(workdir, *flags):
  result = helpers.launch(
    'train', f'--workdir={workdir}', *flags, timeout_seconds=1400
  )
  assert result.returncode == 0, result.stderr
  lines = [json.loads(x) for x in open(pathlib.Path(workdir, 'metrics.jsonl'))]
  seconds = sum(x['seconds'] for x in lines)
  return lines[-1]['eval_loss'], seconds


def test_tiny_default_run(tmp_path):
  loss, _ = _held_out(tmp_path / 'run')
  assert loss < 2.3  # nats per byte


def test_small_in_ten_minutes(tmp_path):
  loss, seconds = _held_out(tmp_path / 'run', '--preset=small')
  assert loss < 2.0
  assert seconds < 600
