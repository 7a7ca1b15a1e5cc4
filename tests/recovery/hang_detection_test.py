"""Who hangs, who was stopped, and whether everybody waits."""

import pytest

from moetion_jax.recovery import hang_detection


def _seen(state='running', state_seconds=0.1, silent_seconds=0.2, **fields):
  """A worker as it is seen at the time 0."""
  return hang_detection.Seen(
    **{
      'stage': 2,
      'state': hang_detection.WorkerState(state),
      'detail': 'update',
      'state_since': -state_seconds,
      'heard_at': -silent_seconds,
      **fields,
    }
  )


@pytest.mark.parametrize(
  ('seen', 'words'),
  [
    pytest.param(_seen(), '', id='at work'),
    pytest.param(_seen(state_seconds=100.0), '', id='exactly so long'),
    pytest.param(
      _seen(state_seconds=100.1),
      'hung: it has been running update for 100 s (--hang_timeout=100)',
      id='longer',
    ),
    pytest.param(_seen('waiting', state_seconds=1e6), '', id='a waiter'),
    pytest.param(_seen('compiling', state_seconds=1e6), '', id='a compiler'),
    pytest.param(_seen('done', state_seconds=1e6), '', id='one that is done'),
    pytest.param(
      _seen('waiting', state_seconds=50.0, silent_seconds=10.1),
      'said nothing for 10 s',
      id='one that says no more that it waits',
    ),
    pytest.param(_seen(silent_seconds=9.9), '', id='silent, but not yet long'),
    pytest.param(
      _seen('starting', silent_seconds=100.0), '', id='one that imports'
    ),
    pytest.param(
      _seen('starting', silent_seconds=100.1),
      'said nothing for 100 s',
      id='one that never said anything',
    ),
    pytest.param(
      _seen(silent_seconds=100.0, is_starved=True), '', id='one that starves'
    ),
    pytest.param(
      _seen(silent_seconds=100.1, is_starved=True),
      'said nothing for 100 s',
      id='one that starves for longer than a program may run',
    ),
    pytest.param(
      _seen(stopped_looks=2, silent_seconds=0.7, is_starved=True),
      'was stopped (SIGSTOP) while running update',
      id='one that starves, and is stopped',
    ),
    pytest.param(
      _seen(stopped_looks=2, silent_seconds=0.7),
      'was stopped (SIGSTOP) while running update',
      id='stopped',
    ),
    pytest.param(
      _seen('waiting', detail='', stopped_looks=2, silent_seconds=0.7),
      'was stopped (SIGSTOP) while waiting',
      id='stopped while it waited',
    ),
    pytest.param(
      _seen(stopped_looks=2, silent_seconds=0.5), '', id='stopped just now'
    ),
    pytest.param(
      _seen(stopped_looks=1, silent_seconds=5.0), '', id='stopped at one look'
    ),
  ],
)
def test_hanging(seen, words):
  assert hang_detection.hanging(seen, 100.0, 0.0) == words


@pytest.mark.parametrize(
  ('worked', 'queued', 'is_held', 'starves'),
  [
    pytest.param(0.0, 0.0, False, False, id='it sleeps'),
    pytest.param(9.0, 0.1, True, False, id='it spins, and nobody else does'),
    pytest.param(0.1, 5.0, False, True, id='it waited half of the time'),
    pytest.param(0.1, 4.9, False, False, id='not quite'),
    pytest.param(0.0, 0.0, True, True, id='it waits for the first time'),
    pytest.param(0.5, 0.0, True, True, id='it waits, and got little'),
    pytest.param(0.6, 0.0, True, False, id='it waits, and got more'),
    pytest.param(3.0, 7.0, True, True, id='it shares a core'),
  ],
)
def test_is_starved(worked, queued, is_held, starves):
  before = hang_detection.Usage(
    worked_seconds=70.0, queued_seconds=90.0, is_held=True
  )
  now = hang_detection.Usage(
    worked_seconds=70 + worked, queued_seconds=90 + queued, is_held=is_held
  )
  assert hang_detection.is_starved(before, now, 10.0) is starves


def test_is_quiet():
  assert hang_detection.is_quiet(_seen(silent_seconds=1.1), 0.0)
  assert not hang_detection.is_quiet(_seen(silent_seconds=1.0), 0.0)


def _waiting(stage, seconds=30.0, state='waiting'):
  return _seen(
    state, stage=stage, detail=f'entry {stage}', state_seconds=seconds
  )


def _full(seconds=30.0):
  return _seen(
    'blocked',
    shortage=hang_detection.Shortage.SNAPSHOTS,
    state_seconds=seconds,
  )


@pytest.mark.parametrize(
  ('one', 'other', 'is_to_blame'),
  [
    (_full(), _seen('waiting', stage=1, state_seconds=30.0), True),
    (_full(), _full(), True),
    (_full(29.0), _seen('waiting', stage=1, state_seconds=30.0), False),
    (_full(), _seen('waiting', stage=1, state_seconds=29.0), False),
    (_full(), _seen(stage=1, state_seconds=99.0), False),
    (_full(), _seen('done', stage=1, state_seconds=99.0), False),
    (_seen('blocked', state_seconds=99.0), _full(), False),
  ],
)
def test_snapshots_that_stay_full_while_nobody_moves(one, other, is_to_blame):
  why = hang_detection.hanging(one, 100.0, 0.0, [one, other])
  assert why == (
    'hung: all its snapshots are needed for 30 s, and nobody does anything'
    if is_to_blame
    else ''
  )


@pytest.mark.parametrize(
  ('everyone', 'words'),
  [
    pytest.param([], '', id='nobody'),
    pytest.param([_waiting(0), _waiting(1, 29.9)], '', id='one not yet long'),
    pytest.param([_waiting(0), _waiting(1, 99, 'running')], '', id='one runs'),
    pytest.param(
      [_waiting(0), _waiting(1, 99, 'compiling')], '', id='compiles'
    ),
    pytest.param(
      [_waiting(0), _waiting(1, 99, 'done')],
      'every stage waits: stage 0 for entry 0',
      id='one is done',
    ),
    pytest.param([_waiting(0, 99, 'done')], '', id='all are done'),
    pytest.param(
      [_waiting(0), _waiting(1, 31.0)],
      'every stage waits: stage 0 for entry 0; stage 1 for entry 1',
      id='all',
    ),
    pytest.param(
      [_waiting(0, 1e5)], 'every stage waits: stage 0 for entry 0', id='alone'
    ),
  ],
)
def test_deadlock(everyone, words):
  assert hang_detection.deadlock(everyone, 0.0) == words


_LONG = 1e3


@pytest.mark.parametrize(
  ('other', 'is_to_blame'),
  [
    pytest.param(_seen('waiting', replica=1), False, id='one waits'),
    pytest.param(_seen('compiling', replica=1), False, id='one compiles'),
    pytest.param(_seen('blocked', replica=1), False, id='one has no room'),
    pytest.param(_seen('running', replica=1), True, id='one is at work'),
    pytest.param(_seen('waiting', stage=1), True, id='another stage waits'),
  ],
)
def test_a_world_in_which_a_member_waits_is_not_to_blame(other, is_to_blame):
  one = _seen(detail='reduce', state_seconds=_LONG)
  why = hang_detection.hanging(one, 100.0, 0.0, [one, other])
  assert bool(why) is is_to_blame


def test_a_deadlock_is_seen_through_a_collective():
  waiter = _seen('waiting', detail='an entry', state_seconds=_LONG)
  partner = _seen(detail='reduce', state_seconds=_LONG, replica=1)
  assert 'stage 2 for an entry' in hang_detection.deadlock(
    [waiter, partner], 0.0
  )
  busy = _seen(detail='forward', state_seconds=_LONG, replica=1)
  assert not hang_detection.deadlock([waiter, busy], 0.0)
  alone = _seen(detail='reduce', state_seconds=_LONG, stage=1)
  assert not hang_detection.deadlock([waiter, alone], 0.0)
