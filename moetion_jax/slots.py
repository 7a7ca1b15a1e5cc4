"""Which operators each snapshot captures: order, slots, bytes, decisions.

A slot is the operators whose training state one snapshot holds, a window the
slots that together cover every operator (DESIGN sections 2 and 5). All of it
is pure: the leader plans, and every replica follows the published `Decision`.
The paper is arXiv 2412.15411 (section 3.5, appendix B).
"""

from __future__ import annotations

import bisect
import collections
import dataclasses
import heapq
import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from moetion_jax import base

ORDERS = ('static', 'count', 'soft_count', 'time_decayed', 'capacity_aware')
MODES = ('rolling', 'aligned')
# Snapshots without compute weights: what is missing is taken from older ones.
PARTIAL = 'partial'

Rates = Mapping[base.OperatorId, float]
Bytes = Mapping[base.OperatorId, int]
Slots = tuple[frozenset[base.OperatorId], ...]
# Device of the 'expert' axis that holds an operator; None when all hold it.
DeviceOf = Callable[[base.OperatorId], int | None]


def check_known(flag: str, value: str, known: tuple[str, ...]) -> None:
  """Raises ConfigError unless `value` is among those known for the flag."""
  if value not in known:
    raise base.ConfigError(flag, value, f'known are {", ".join(known)}')


def on_no_device(operator: base.OperatorId) -> None:
  """The `DeviceOf` of a worker with one device."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Popularity:
  """Counts of experts in the last iterations (paper, appendix B).

  Attributes:
    kind: one of ORDERS; 'static' counts nothing. 'count' takes routed tokens,
      'soft_count' sums of router probabilities; in 'time_decayed' an iteration
      n ago weighs decay**n; 'capacity_aware' takes routed tokens in shares of
      the capacity: those beyond it are dropped and do not train the expert.
    window_iterations: that are looked back on.
    decay: per iteration, in (0, 1], of 'time_decayed'.
    capacity: tokens that an expert takes in one iteration at most (all its
      microbatches), of 'capacity_aware'.
    history: counts of the last iterations, oldest first.
  """

  kind: str
  window_iterations: int = 100
  decay: float = 0.95
  capacity: float | None = None
  history: tuple[Rates, ...] = ()

  def __post_init__(self) -> None:
    check_known('order', self.kind, ORDERS)
    if self.window_iterations < 1 or not 0 < self.decay <= 1:
      raise ValueError(f'{self.window_iterations=}, {self.decay=}')
    if self.kind == 'capacity_aware' and not (self.capacity or 0) > 0:
      raise ValueError(f'{self.capacity=} must be positive')


def observe(popularity: Popularity, counts: Rates) -> Popularity:
  """Takes one iteration's counts in; an expert that is missing had none."""
  for operator, count in counts.items():
    if not 0 <= count < math.inf:
      raise ValueError(f'{operator} has a count of {count}')
  if popularity.kind == 'static':
    return popularity
  history = (*popularity.history, dict(counts))
  history = history[-popularity.window_iterations :]
  return dataclasses.replace(popularity, history=history)


def rates(popularity: Popularity) -> dict[base.OperatorId, float]:
  """Weighted mean per iteration of each expert that was observed."""
  decay = popularity.decay if popularity.kind == 'time_decayed' else 1.0
  share = popularity.kind == 'capacity_aware'
  capacity = (popularity.capacity or 1.0) if share else 1.0
  total: dict[base.OperatorId, float] = {}
  weights = 0.0
  for counts in popularity.history:
    weights = weights * decay + 1.0
    for expert in sorted(total.keys() | counts.keys()):
      count = counts.get(expert, 0.0) / capacity
      count = min(count, 1.0) if share else count
      total[expert] = total.get(expert, 0.0) * decay + count
  return {expert: count / weights for expert, count in total.items()}


def should_reorder(
  old_rates: Rates, new_rates: Rates, change: float = 0.10, share: float = 0.25
) -> bool:
  """Whether expert popularity moved enough for a new order (section 3.5).

  Args:
    old_rates: those that the order in force was made from.
    new_rates: those of now. Whoever is in only one of the two had 0.
    change: an expert changed when its rate moved by more than this fraction of
      the old one; from 0, when it moved at all.
    share: of all experts that must have changed, at least.
  """
  if change < 0 or not 0 < share <= 1:
    raise ValueError(f'change={change}, share={share}')
  experts = old_rates.keys() | new_rates.keys()
  pairs = [(old_rates.get(e, 0.0), new_rates.get(e, 0.0)) for e in experts]
  changed = sum(abs(new - old) > change * old for old, new in pairs)
  return changed > 0 and changed >= share * len(experts)


def order_operators(
  kind: str, operators: Iterable[base.OperatorId], popularity: Rates
) -> tuple[base.OperatorId, ...]:
  """Orders a stage's operators for capture; equals go by OperatorId.

  Args:
    kind: one of ORDERS. 'static' takes the experts of all layers in turn:
      expert 0 of each, expert 1 of each, and so on. The others take them by
      ascending popularity: what is captured last stays frozen longest in a
      replay.
    operators: of the stage.
    popularity: rate of each expert (0 when missing); 'static' ignores it.

  Returns:
    The experts, then all other operators: every token trains those.
  """
  check_known('order', kind, ORDERS)
  ordered = sorted(operators)
  _check_distinct(ordered)
  experts = [o for o in ordered if o.expert >= 0]
  others = [o for o in ordered if o.expert < 0]
  if kind == 'static':
    experts.sort(key=lambda o: o.expert)
  else:
    experts.sort(key=lambda o: popularity.get(o, 0.0))
  return (*experts, *others)


def make_slots(
  order: Sequence[base.OperatorId],
  bytes_of: Bytes,
  window_length: int,
  device_of: DeviceOf = on_no_device,
  *,
  keep_order: bool = True,
) -> Slots:
  """Cuts operators into slots, balanced by `busiest_device_bytes`.

  With `keep_order` slots are contiguous pieces of the order, slot 0 the first,
  and the largest slot is as small as contiguous pieces can be. Without, it is
  the better of that and the longest-processing-time greedy: never larger than
  with `keep_order`, and on one device at most 4/3 of the best there is.

  Args:
    order: from `order_operators`.
    bytes_of: what capturing an operator costs, in general its training state.
    window_length: slots to make; none is empty if there are operators enough.
    device_of: where each operator is.
    keep_order: False for 'static', True for orders by popularity.

  Returns:
    Disjoint slots that cover `order`.

  Raises:
    ConfigError: window_length is below 1.
    ValueError: an operator comes twice, or has no or a negative size.
  """
  if window_length < 1:
    raise base.ConfigError('window_length', window_length, 'must be at least 1')
  _check_distinct(order)
  for operator in order:
    if bytes_of.get(operator, -1) < 0:
      raise ValueError(f'{operator} has {bytes_of.get(operator)} bytes')
  cut = _cut(order, bytes_of, window_length, device_of)
  if keep_order:
    return cut
  greedy = _greedy(order, bytes_of, window_length, device_of)
  return min(
    (greedy, cut),
    key=lambda slots: sorted(
      busiest_device_bytes(slots, bytes_of, device_of), reverse=True
    ),
  )


def busiest_device_bytes(
  slots: Slots, bytes_of: Bytes, device_of: DeviceOf = on_no_device
) -> tuple[int, ...]:
  """Bytes that the busiest device of the 'expert' axis has to copy, by slot.

  An operator on one device is copied from there. One that all devices hold
  costs its bytes once: its leaves are copied from whichever devices have the
  least to copy, so that they count only in the average over devices.
  """
  devices = _devices(itertools.chain.from_iterable(slots), device_of)
  busiest = []
  for slot in slots:
    own = collections.Counter[int | None]()
    for operator in slot:
      own[device_of(operator)] += bytes_of[operator]
    average = -(-own.total() // max(1, len(devices)))
    busiest.append(max(average, *(own[d] for d in devices), 0))
  return tuple(busiest)


def snapshot_bytes(
  slots: Slots, state_bytes: Bytes, compute_bytes: Bytes, mode: str
) -> tuple[int, ...]:
  """Bytes of each snapshot of a window, all devices together.

  'rolling': training state of the slot and compute weights of all others.
  'aligned': training state of the slot and compute weights of later slots.
  """
  check_known('window_mode', mode, MODES)
  state = [sum(state_bytes[o] for o in slot) for slot in slots]
  compute = [sum(compute_bytes[o] for o in slot) for slot in slots]
  total = sum(compute)
  done = itertools.accumulate(compute)  # this slot included
  left_out = compute if mode == 'rolling' else done
  return tuple(s + total - c for s, c in zip(state, left_out, strict=True))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Decision:
  """What snapshots hold from one iteration on, as the leader published it.

  Attributes:
    first_iteration: from which it holds; its snapshot is that of slot 0.
    window_length: number of slots.
    mode: one of MODES, or PARTIAL.
    every: a snapshot each so many iterations. More than 1 only with a window
      of 1: a frozen operator needs its compute weights of *every* replayed
      iteration, so snapshots with gaps must each be whole.
    slots: disjoint, together all operators of the stage; in a PARTIAL one
      those that the next snapshots hold beside what `always` names.
    always: operators whose training state every snapshot holds.
  """

  first_iteration: int
  window_length: int
  mode: str
  every: int = 1
  slots: Slots
  always: frozenset[base.OperatorId] = frozenset()

  def __post_init__(self) -> None:
    check_known('window_mode', self.mode, (*MODES, PARTIAL))
    if self.first_iteration < 0:
      raise ValueError(f'first_iteration={self.first_iteration} is negative')
    if self.window_length < 1 or self.window_length != len(self.slots):
      raise ValueError(f'{len(self.slots)} slots, not {self.window_length}')
    _check_distinct(list(itertools.chain.from_iterable(self.slots)))
    if self.every < 1 or (self.every > 1 and self.window_length > 1):
      raise ValueError(
        f'every={self.every} with window_length={self.window_length}: no '
        'replay gets across iterations without a snapshot unless each is whole'
      )

  @property
  def is_whole(self) -> bool:
    """Whether every snapshot holds the training state of all operators."""
    return self.window_length == 1 and self.mode != PARTIAL

  def slot_index(self, iteration: int) -> int | None:
    """Position in the window; None when the iteration has no snapshot.

    Raises:
      ValueError: the decision does not hold yet.
    """
    passed = iteration - self.first_iteration
    if passed < 0:
      raise ValueError(f'iteration {iteration} < {self.first_iteration=}')
    snapshots, skipped = divmod(passed, self.every)
    return None if skipped else snapshots % self.window_length

  def captured(
    self, iteration: int
  ) -> tuple[frozenset[base.OperatorId], frozenset[base.OperatorId]] | None:
    """Operators of which the snapshot holds training state, compute weights."""
    index = self.slot_index(iteration)
    if index is None:
      return None
    if self.mode == PARTIAL:
      return self.slots[index] | self.always, frozenset()
    others = list(self.slots[index + 1 :])
    if self.mode == 'rolling':
      others += self.slots[:index]
    return self.slots[index], frozenset().union(*others)

  def to_json(self) -> dict[str, Any]:
    """The decision in plain JSON values; `from_json` is the exact inverse."""
    slots = [base.operators_to_json(s) for s in self.slots]
    always = base.operators_to_json(self.always)
    return vars(self) | {'slots': slots, 'always': always}

  @classmethod
  def from_json(cls, value: Mapping[str, Any]) -> Decision:
    """The inverse of `to_json`; ValueError when it has not those fields."""
    if value.keys() != {f.name for f in dataclasses.fields(cls)}:
      raise ValueError(f'no decision has the fields {sorted(value)}')
    slots = tuple(base.operators_from_json(s) for s in value['slots'])
    always = base.operators_from_json(value['always'])
    return cls(**{**value, 'slots': slots, 'always': always})


def active(decisions: Iterable[Decision], iteration: int) -> Decision:
  """The decision that holds at an iteration: the last one begun by then.

  Raises:
    ValueError: none holds yet, or two different ones begin together.
  """
  begun = [d for d in decisions if d.first_iteration <= iteration]
  if not begun:
    raise ValueError(f'no decision holds at iteration {iteration}')
  newest = max(d.first_iteration for d in begun)
  last, *others = (d for d in begun if d.first_iteration == newest)
  if any(other != last for other in others):
    raise ValueError(f'two decisions begin with iteration {newest}')
  return last


def _check_distinct(operators: Sequence[base.OperatorId]) -> None:
  if len(set(operators)) < len(operators):
    twice = [o for o, n in collections.Counter(operators).items() if n > 1]
    raise ValueError(f'operators come twice: {", ".join(map(str, twice))}')


def _devices(
  operators: Iterable[base.OperatorId], device_of: DeviceOf
) -> list[int]:
  """The devices of the 'expert' axis that hold operators of their own."""
  return sorted({d for o in operators if (d := device_of(o)) is not None})


def _cut(
  order: Sequence[base.OperatorId],
  bytes_of: Bytes,
  window_length: int,
  device_of: DeviceOf,
) -> Slots:
  """The contiguous cut whose largest slot is smallest."""
  count = len(order)
  devices = _devices(order, device_of)
  # Bytes before each position: of each device, and of all, each with the
  # number of devices that share them.
  sizes = [bytes_of[o] for o in order]
  sums = [(list(itertools.accumulate(sizes, initial=0)), max(1, len(devices)))]
  for device in devices:
    own = (bytes_of[o] * (device_of(o) == device) for o in order)
    sums.append((list(itertools.accumulate(own, initial=0)), 1))

  def ends(limit: int) -> list[int]:
    """Fills each slot up to the limit; the last end is `count` if all fit."""
    found, start = [], 0
    for later in reversed(range(window_length)):
      end = min(bisect.bisect_right(s, s[start] + limit * n) for s, n in sums)
      # One operator at least is left for every later slot.
      start = min(end - 1, count - min(later, max(0, count - start - 1)))
      found.append(start)
    return found

  # All limits from the smallest feasible one up are feasible: a slot never
  # gets cheaper by getting larger.
  total = sums[0][0][-1]
  limit = bisect.bisect_left(
    range(total), True, key=lambda limit: ends(limit)[-1] == count
  )
  starts = [0, *ends(limit)]
  return tuple(frozenset(order[a:b]) for a, b in itertools.pairwise(starts))


def _greedy(
  order: Sequence[base.OperatorId],
  bytes_of: Bytes,
  window_length: int,
  device_of: DeviceOf,
) -> Slots:
  """Longest processing time first (Graham 1969), ignoring the order."""
  devices = _devices(order, device_of)
  members: list[list[base.OperatorId]] = [[] for _ in range(window_length)]
  own = [collections.Counter[int | None]() for _ in range(window_length)]

  def load(i: int, device: int | None) -> tuple[int, ...]:
    """How full slot i is for an operator on the device."""
    total = own[i].total()
    average = -(-total // max(1, len(devices)))
    local = 0 if device is None else own[i][device]
    return max(local, average), total, len(members[i]), i

  # Loads only grow, so a heap's first entry is the least if it is up to date.
  empty = [load(i, None) for i in range(window_length)]
  heaps = {device: empty.copy() for device in (None, *devices)}
  for operator in sorted(order, key=lambda o: -bytes_of[o]):
    device = device_of(operator)
    heap = heaps[device]
    while (now := load(heap[0][-1], device)) != heap[0]:
      heapq.heapreplace(heap, now)
    index = heap[0][-1]
    members[index].append(operator)
    own[index][device] += bytes_of[operator]
  return tuple(frozenset(m) for m in members)
