"""Reports of replicas and stages become one line of metrics."""

import dataclasses

import numpy as np
import pytest

from moetion_jax import keys, report
from moetion_jax.runtime.records import merge


def _report(stage=0, iteration=1, loss=1.5, seed=0, **more):
  fields = {
    'iteration': iteration,
    'stage': stage,
    'loss': loss,
    'auxiliary_loss': 0.25,
    'grad_norm': 2.0,
    'dropped': 3,
    'updated': True,
    'digests': {
      keys.OperatorId(f'layers/{stage}'): np.array([seed, 7], np.uint32)
    },
    'eval_loss': None,
    'seconds': 0.5,
    'waited_seconds': 0.0,
  }
  return report.Report(**{**fields, **more})


def test_line_has_the_contract_fields():
  line = merge.make_line(
    [_report(0), _report(1, seconds=0.75, eval_loss=2.5)], 64
  )
  assert line['loss_hex'] == (1.5).hex() and line['seconds'] == 0.75
  assert line['eval_loss'] == 2.5
  assert set(line) >= {
      'iteration', 'loss', 'loss_hex', 'tokens', 'seconds', 'digest',
      'snapshot_bytes', 'blocked_seconds', 'grad_norm',
    }  # fmt: skip


def test_digest_is_of_all_stages_and_of_no_order():
  one, two = _report(0, seed=1), _report(1, seed=2)
  whole = merge.make_line([one, two], 64)['digest']
  merged = _report(1, digests={**two.digests, **one.digests})
  assert merge.make_line([merged], 64)['digest'] == whole
  assert merge.make_line([one, _report(1, seed=3)], 64)['digest'] != whole


def test_replicas_become_one_report():
  fields = {'snapshot_bytes': 10, 'blocked_seconds': 0.5, 'seconds': 2.0}
  first = _report(replica=0, copy_bytes_per_second=9.0)
  second = _report(replica=1, copy_bytes_per_second=5.0)
  merged = merge.merge_replicas([first, dataclasses.replace(second, **fields)])
  assert merged.replica == 0
  assert merged.snapshot_bytes == first.snapshot_bytes + 10
  assert merged.blocked_seconds == 0.5
  assert merged.seconds == 2.0
  assert merged.copy_bytes_per_second == 5.0


def test_replicas_with_other_bits_are_named():
  first, second = _report(replica=0), _report(replica=1, seed=1)
  operator = next(iter(first.digests))
  with pytest.raises(merge.ReplicaMismatchError) as error:
    merge.merge_replicas([first, second])
  for word in ('replica 1', str(operator), 'iteration 1', 'corruption'):
    assert word in str(error.value)


def _sharing(replica, *operators, **fields):
  """Of a replica that has only these operators of its stage."""
  digests = {keys.OperatorId(o): np.array([7, 7], np.uint32) for o in operators}
  return _report(replica=replica, digests=digests, **fields)


def test_replicas_that_share_the_state_become_one_report():
  merged = merge.merge_replicas([_sharing(0, 'a', 'c'), _sharing(1, 'b')])
  assert [o.group for o in sorted(merged.digests)] == ['a', 'b', 'c']
  # In the line nobody can tell them from one that has everything.
  one = merge.make_line([_sharing(0, 'a', 'b', 'c')], 64)
  assert merge.make_line([merged], 64) == one


@pytest.mark.parametrize('field', ['loss', 'grad_norm', 'auxiliary_loss'])
def test_what_all_replicas_compute_is_compared(field):
  other = _sharing(1, 'b', **{field: np.nextafter(2.0, 3.0)})
  with pytest.raises(merge.ReplicaMismatchError, match=f'another {field}'):
    merge.merge_replicas([_sharing(0, 'a', **{field: 2.0}), other])


def test_an_operator_that_two_have_is_compared():
  other = _sharing(2, 'b')
  other.digests[keys.OperatorId('a')] = np.array([7, 8], np.uint32)
  with pytest.raises(merge.ReplicaMismatchError, match='another a than'):
    merge.merge_replicas([_sharing(1, 'a'), other])


@pytest.mark.parametrize(
  ('reported', 'team', 'is_whole'),
  [
    ({0: 'a', 1: 'b'}, (0, 1), True),
    ({0: 'a'}, (0, 1), False),
    ({1: 'b'}, (0, 1), False),
    # Replica 0 left: what both said before, then what is said without it.
    ({0: 'a', 1: 'b'}, (1,), True),
    ({1: 'b'}, (1,), False),
    ({1: 'ab'}, (1,), True),
    # It came back: it had said all, and now says its part.
    ({0: 'ab', 1: 'b'}, (0, 1), True),
    ({0: 'a', 1: 'ab'}, (0, 1), True),
  ],
)
def test_a_stage_has_reported_when_all_its_operators_are_there(
  reported, team, is_whole
):
  reports = {r: _sharing(r, *names) for r, names in reported.items()}
  merged = merge.merge_stage(reports, team, operators=2)
  assert (merged is not None) == is_whole
  assert merged is None or len(merged.digests) == 2
