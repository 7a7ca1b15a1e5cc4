"""JSON of records by their type hints: forms by hand, and what is refused."""

import dataclasses
import enum
import json
import math
import typing
from collections.abc import Mapping
from typing import Any

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from moetion_jax import codec, keys, report
from moetion_jax.policies import decision as decision_lib, planner, slots
from moetion_jax.recovery import notices, orders
from moetion_jax.runtime import messages
from moetion_jax.runtime.hosts import host_messages
from tests.support import words


class _Colour(enum.StrEnum):
  RED = 'red'


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Inner:
  number: int = 3


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Other:
  text: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Record:
  name: str
  rate: float = 0.5
  is_on: bool = False
  inner: _Inner = _Inner()
  either: _Inner | _Other | None = None
  colour: _Colour | None = None
  pairs: tuple[tuple[str, int], ...] = ()
  known: Mapping[str, float] = dataclasses.field(default_factory=dict)
  sizes: Mapping[keys.OperatorId, int] = dataclasses.field(default_factory=dict)
  names: keys.Operators = frozenset()
  other: Any = None


def test_each_type_by_hand():
  one = _Record(
    name='x',
    rate=math.inf,
    is_on=True,
    inner=_Inner(number=4),
    either=_Other(text='t'),
    colour=_Colour.RED,
    pairs=(('a', 1), ('b', 2)),
    known={'k': 1.5},
    sizes={keys.OperatorId('a', 1): 12},
    names=frozenset({keys.OperatorId('b'), keys.OperatorId('a', 1)}),
    other={'any': [1, None]},
  )
  value = codec.encode(one)
  assert value == {
    'name': 'x',
    'rate': math.inf,
    'is_on': True,
    'inner': {'number': 4},
    'either': {'kind': '_Other', 'text': 't'},
    'colour': 'red',
    'pairs': [['a', 1], ['b', 2]],
    'known': {'k': 1.5},
    'sizes': [[['a', 1], 12]],
    'names': [['a', 1], ['b', -1]],
    'other': {'any': [1, None]},
  }
  assert codec.decode(_Record, json.loads(json.dumps(value))) == one
  assert codec.decode(_Record, {'name': 'x'}) == _Record(name='x')
  assert math.isnan(codec.decode(float, json.loads('NaN')))


@pytest.mark.parametrize(
  ('fields', 'words'),
  [
    ({'nme': 1}, '_Record has no field nme'),
    ({'name': 1}, '_Record.name must be of type str, not 1'),
    ({'rate': '1'}, "_Record.rate must be of type int or float, not '1'"),
    ({'is_on': 1}, '_Record.is_on must be of type bool, not 1'),
    ({'inner': {'number': True}}, '_Inner.number must be of type int'),
    ({'inner': [3]}, '_Inner must be of type dict'),
    ({'either': {'kind': 'X'}}, "_Record.either has no kind 'X'"),
    ({'either': {'text': ''}}, '_Record.either has no kind None'),
    ({'colour': 'blue'}, "_Record.colour: 'blue' is not a valid _Colour"),
    ({'pairs': {'a': 1}}, '_Record.pairs must be of type list'),
    ({'pairs': [['a']]}, '_Record.pairs must have 2 elements'),
    ({'known': []}, '_Record.known must be of type dict'),
    ({'sizes': [[['a', 'b'], 1]]}, "OperatorId must be of type int, not 'b'"),
    ({'sizes': [[['a', 1, 2], 1]]}, 'OperatorId must have 2 elements'),
  ],
)
def test_what_is_refused_and_why(fields, words):
  with pytest.raises(ValueError) as caught:
    codec.decode(_Record, {'name': 'x'} | fields)
  assert str(caught.value).startswith(words)


def test_a_missing_field_is_named():
  with pytest.raises(ValueError, match='_Record.*name'):
    codec.decode(_Record, {})


@hypothesis.settings(deadline=None)
@hypothesis.given(
  words.stages(),
  st.integers(0, 10**9),
  st.sampled_from(decision_lib.MODES),
  st.data(),
)
def test_a_decision_comes_back_as_it_was(stage, first, mode, data):
  bytes_of, length, device_of = stage
  decision = decision_lib.CaptureDecision(
    first_iteration=first,
    window_length=length,
    mode=mode,
    every=1 if length > 1 else data.draw(st.integers(1, 9)),
    slots=slots.make_slots(tuple(bytes_of), bytes_of, length, device_of),
  )
  assert (
    _sent(orders.Decide(decision=decision), messages.ToWorker).decision
    == decision
  )


@hypothesis.given(st.floats(allow_nan=False), st.floats(allow_nan=False))
def test_a_report_comes_back_bit_for_bit(loss, norm):
  one = report.Report(
    iteration=3,
    stage=1,
    loss=loss,
    auxiliary_loss=-0.0,
    grad_norm=norm,
    dropped=0,
    updated=True,
    digests={keys.OperatorId('a', 1): np.array([7, 1 << 31], np.uint32)},
    eval_loss=None,
    seconds=0.1,
    waited_seconds=0.0,
    load={keys.OperatorId('a', 1): 5},
  )
  back = _sent(notices.Reported(report=one), messages.FromWorker).report
  assert back.loss.hex() == loss.hex() and back.grad_norm.hex() == norm.hex()
  assert math.copysign(1, back.auxiliary_loss) == -1
  (digest,) = back.digests.values()
  assert digest.dtype == np.uint32 and digest.tolist() == [7, 1 << 31]
  assert back.load == one.load


@pytest.mark.parametrize(
  'union',
  [
    messages.FromWorker,
    messages.ToWorker,
    host_messages.FromHost,
    host_messages.ToHost,
  ],
)
def test_a_kind_names_one_message(union):
  kinds = typing.get_args(union)
  assert len({kind.__name__ for kind in kinds}) == len(kinds)


def test_messages_within_messages():
  sizes = planner.StageSizes(
    state_bytes={keys.OperatorId('a', 1): 12},
    compute_bytes={keys.OperatorId('a', 1): 2},
    gradient_bytes={keys.OperatorId('a', 1): 4},
    device={keys.OperatorId('a', 1): None},
  )
  ready = notices.Ready(
    device='cpu',
    platform='cpu',
    lowering_platform='cpu',
    state_bytes=12,
    operators=sizes,
    environment={'versions': {'jax': '1'}},
  )
  failed = notices.Failed(error='e', iteration=4, suspects=(3,), corrupt=(1, 2))
  said = host_messages.Said(stage=2, message=ready)
  tell = host_messages.Tell(stage=2, message=messages.Exit())
  assert _sent(failed, messages.FromWorker) == failed
  assert _sent(said, host_messages.FromHost) == said
  assert _sent(tell, host_messages.ToHost) == tell


def test_nobody_says_what_is_not_his_to_say():
  with pytest.raises(ValueError, match="has no kind 'Exit'"):
    _sent(messages.Exit(), messages.FromWorker)


def _sent(message, kinds):
  line = messages.pack(message)
  assert line.endswith(b'\n') and line.count(b'\n') == 1
  return messages.unpack(kinds, line)
