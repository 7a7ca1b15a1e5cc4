"""Slots: the operators that each snapshot captures, in order, and their bytes.

A slot is the operators whose training state one snapshot holds, a window the
slots that together cover every operator. All of it is pure: the leader plans,
and every replica follows the published `decision.CaptureDecision`. The paper is
arXiv 2412.15411 (section 3.5, appendix B).
"""

from __future__ import annotations

import bisect
import collections
import heapq
import itertools
from collections.abc import Iterable, Mapping, Sequence

from moetion_jax import errors, keys
from moetion_jax.policies import decision, popularity as popularity_lib
from moetion_jax.state import division

Bytes = Mapping[keys.OperatorId, int]


def order_operators(
  kind: str,
  operators: Iterable[keys.OperatorId],
  popularity: popularity_lib.Rates,
) -> tuple[keys.OperatorId, ...]:
  """Orders a stage's operators for capture; ties go by OperatorId.

  Args:
    kind: one of `popularity.ORDERS`. 'static' takes the experts of all layers
      in turn: expert 0 of each, expert 1 of each, and so on. The others take
      them by ascending popularity: what is captured last stays frozen longest
      in a replay.
    operators: all operators of the stage.
    popularity: rate of each expert (0 when missing); 'static' ignores it.

  Returns:
    The experts, then all other operators: every token trains those.
  """
  errors.check_known('order', kind, popularity_lib.ORDERS)
  ordered = sorted(operators)
  decision.check_distinct(ordered)
  experts = [o for o in ordered if o.expert >= 0]
  others = [o for o in ordered if o.expert < 0]
  if kind == 'static':
    experts.sort(key=lambda o: o.expert)
  else:
    experts.sort(key=lambda o: popularity.get(o, 0.0))
  return (*experts, *others)


def make_slots(
  order: Sequence[keys.OperatorId],
  bytes_of: Bytes,
  window_length: int,
  device_of: division.DeviceOf = division.on_no_device,
  *,
  keep_order: bool = True,
) -> decision.Slots:
  """Cuts operators into slots, balanced by `busiest_device_bytes`.

  With `keep_order` slots are contiguous pieces of the order, slot 0 the first,
  and the largest slot is as small as contiguous pieces can be. Without, the cut
  is the better of that and the longest-processing-time greedy: its largest slot
  is never larger than with `keep_order`, and on one device at most 4/3 of the
  best there is.

  Args:
    order: the result of `order_operators`.
    bytes_of: bytes that capturing each operator costs, in general its training
      state.
    window_length: number of slots to make; none is empty if there are enough
      operators.
    device_of: device of each operator.
    keep_order: False for 'static', True for orders by popularity.

  Returns:
    Disjoint slots that cover `order`.

  Raises:
    errors.ConfigError: `window_length` is below 1.
    ValueError: an operator comes twice, or has no size or a negative one.
  """
  if window_length < 1:
    raise errors.ConfigError(
      'window_length', window_length, 'must be at least 1'
    )
  decision.check_distinct(order)
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
  slots: decision.Slots,
  bytes_of: Bytes,
  device_of: division.DeviceOf = division.on_no_device,
) -> tuple[int, ...]:
  """Returns the bytes that the busiest device of a slot has to copy, by slot.

  Devices are those of the 'expert' axis. An operator on one device is copied
  from there. One that all devices hold costs its bytes once: its leaves are
  copied from whichever devices have the least to copy, so that they count only
  in the average over devices.
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
  slots: decision.Slots, state_bytes: Bytes, compute_bytes: Bytes, mode: str
) -> tuple[int, ...]:
  """Returns the bytes of each snapshot of a window, all devices together.

  'rolling': training state of the slot and compute weights of all others.
  'aligned': training state of the slot and compute weights of later slots.
  """
  errors.check_known('window_mode', mode, decision.MODES)
  state = [sum(state_bytes[o] for o in slot) for slot in slots]
  compute = [sum(compute_bytes[o] for o in slot) for slot in slots]
  total = sum(compute)
  done = itertools.accumulate(compute)  # this slot included
  left_out = compute if mode == 'rolling' else done
  return tuple(s + total - c for s, c in zip(state, left_out, strict=True))


def _devices(
  operators: Iterable[keys.OperatorId], device_of: division.DeviceOf
) -> list[int]:
  """Returns the devices of the 'expert' axis that hold operators alone."""
  return sorted({d for o in operators if (d := device_of(o)) is not None})


def _cut(
  order: Sequence[keys.OperatorId],
  bytes_of: Bytes,
  window_length: int,
  device_of: division.DeviceOf,
) -> decision.Slots:
  """Returns the contiguous cut whose largest slot is smallest."""
  count = len(order)
  devices = _devices(order, device_of)
  # Bytes before each position: all devices together, then each alone; each list
  # comes with the number of devices that share its bytes.
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
      # At least one operator is left for every later slot.
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
  order: Sequence[keys.OperatorId],
  bytes_of: Bytes,
  window_length: int,
  device_of: division.DeviceOf,
) -> decision.Slots:
  """Longest processing time first (Graham 1969), ignoring the order."""
  devices = _devices(order, device_of)
  members: list[list[keys.OperatorId]] = [[] for _ in range(window_length)]
  own = [collections.Counter[int | None]() for _ in range(window_length)]

  def load(i: int, device: int | None) -> tuple[int, ...]:
    """Returns how full slot i is for an operator on the device, to compare."""
    total = own[i].total()
    average = -(-total // max(1, len(devices)))
    local = 0 if device is None else own[i][device]
    return max(local, average), total, len(members[i]), i

  # Loads only grow: a heap's first entry is the least once it is up to date.
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
