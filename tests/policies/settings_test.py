"""Settings of what is captured: which are refused, and what they keep."""

import pytest

from moetion_jax import errors
from moetion_jax.policies import settings as capture_settings
from moetion_jax.policies.kinds import registry


def _settings(**fields):
  policy = registry.of_name(fields.pop('policy', 'sparse'))
  return capture_settings.CaptureSettings(policy=policy, **fields)


@pytest.mark.parametrize(
  ('fields', 'words'),
  [
    ({'policy': 'gemini'}, '--policy=gemini: known are sparse, dense'),
    ({'interval': 2}, '--interval=2: means nothing with --policy=sparse'),
    ({'policy': 'dense', 'interval': -1}, '--interval=-1: must be at least 0'),
    (
      {'policy': 'dense', 'window_length': 2},
      '--window_length=2: is of --policy=sparse',
    ),
    ({'partial_experts': 0}, '--partial_experts=0: must be at least 1'),
    ({'partial_select': 'all'}, '--partial_select=all: known are sequential'),
    ({'overhead_budget': 0.0}, '--overhead_budget=0.0: must be in (0, 1]'),
    ({'plt_budget': 1.5}, '--plt_budget=1.5: must be in (0, 1]'),
    ({'order': 'random'}, '--order=random: known are static, count'),
    ({'window_mode': 'free'}, '--window_mode=free: known are rolling, aligned'),
    ({'window_length': -1}, '--window_length=-1: must be at least 0'),
    ({'max_window_length': 0}, '--max_window_length=0: must be at least 1'),
    ({'keep_windows': 0}, '--keep_windows=0: must be at least 1'),
    ({'overlap_target': 1.5}, '--overlap_target=1.5: must be in'),
    ({'overlap_target': -0.1}, '--overlap_target=-0.1: must be in'),
    (
      {'log_iterations': 5},
      '--log_iterations=5: must be at least 7 with --window_length=1 and '
      '--keep_windows=2',
    ),
    (
      {'window_length': 5, 'log_iterations': 13},
      '--log_iterations=13: must be at least 14 with --window_length=5',
    ),
    ({'log_iterations': -1}, '--log_iterations=-1'),
  ],
)
def test_impossible_settings_are_refused(fields, words):
  with pytest.raises(errors.ConfigError) as caught:
    _settings(**fields)
  assert words in str(caught.value)


@pytest.mark.parametrize(
  ('fields', 'longest', 'iterations', 'snapshots'),
  [
    # Two windows and four more; a third where windows may change.
    ({'window_length': 3}, 3, 10, 10),
    ({'window_length': 3, 'window_mode': 'rolling'}, 3, 10, 10),
    ({'window_length': 3, 'window_mode': 'aligned'}, 3, 13, 13),
    ({'window_length': 3, 'order': 'count'}, 3, 13, 13),
    ({'window_length': 3, 'keep_windows': 1}, 3, 7, 7),
    ({}, 8, 28, 28),
    ({'max_window_length': 5}, 5, 19, 19),
    ({'max_window_length': 5, 'window_length': 7}, 7, 18, 18),
    # Logs that are smaller bound the window, larger ones are used.
    ({'log_iterations': 20}, 5, 20, 19),
    ({'log_iterations': 7}, 1, 7, 7),
    ({'log_iterations': 100}, 8, 100, 28),
    ({'window_length': 3, 'log_iterations': 10}, 3, 10, 10),
    # Recorded gradients lead to newer states than those at the line.
    ({'window_length': 3, 'replay': 'updates'}, 3, 10, 10),
    ({'replay': 'updates', 'log_lag': 0}, 8, 13, 28),
    ({'replay': 'updates', 'log_iterations': 17}, 8, 17, 28),
  ],
)
def test_what_is_kept(fields, longest, iterations, snapshots):
  settings = _settings(**fields)
  assert settings.longest_window == longest
  assert settings.kept_iterations == iterations
  assert settings.kept_snapshots == snapshots
