import numpy as np
import pytest

from moetion_jax.training import scalars


def _partial(square, loss=0.0, auxiliary=0.0, dropped=0):
  return np.array([square, loss, auxiliary, dropped], np.float32)


@pytest.mark.parametrize(
  ('partials', 'clip', 'norm', 'factor', 'bad'),
  [
    ([_partial(9.0)], 0.0, 3.0, 1.0, None),
    ([_partial(9.0)], 1.5, 3.0, 0.5, None),
    ([_partial(9.0)], 3.0, 3.0, 1.0, None),  # at the limit: untouched
    ([_partial(9.0), _partial(16.0, loss=2.0)], 2.5, 5.0, 0.5, None),
    ([_partial(0.0)], 1.0, 0.0, 1.0, None),
    ([_partial(1.0), _partial(np.nan)], 1.0, np.nan, None, 1),
    ([_partial(np.inf), _partial(np.nan)], 1.0, np.nan, None, 0),
    ([_partial(1.0), _partial(1.0, loss=np.nan)], 1.0, np.sqrt(2.0), None, 1),
    # Each is finite, their sum is not: no stage is to blame.
    ([_partial(3e38), _partial(3e38)], 1.0, np.inf, None, None),
  ],
)
def test_judge(partials, clip, norm, factor, bad):
  got = scalars.judge(partials, clip)
  assert np.array_equal(got.grad_norm, np.float32(norm), equal_nan=True)
  assert got.bad_stage == bad
  assert got.is_finite == np.isfinite(norm + sum(x[1] for x in partials))
  if factor is not None:
    assert got.clip_factor == np.float32(factor)
    assert got.clip_factor.dtype == np.float32


@pytest.mark.parametrize(
  ('squares', 'words'),
  [
    ([1.0, np.nan], 'not finite, first in stage 1'),
    ([3e38, 3e38], 'each stage is finite, the norm over all stages is not'),
  ],
)
def test_explain(squares, words):
  verdict = scalars.judge([_partial(x) for x in squares], 1.0)
  assert scalars.explain(verdict).endswith(words)


def test_judge_sums_in_stage_order_in_fp32():
  values = [np.float32(x) for x in (1e8, 1.0, -1e8, 1.0)]
  got = scalars.judge([_partial(0.0, loss=float(v)) for v in values], 1.0)
  expected = np.float32(0)
  for v in values:
    expected = np.float32(expected + v)
  assert got.loss == expected
  assert got.loss != np.float32(2)  # order and width do matter
