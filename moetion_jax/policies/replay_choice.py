"""Choice between the ways of replay, by predicted effective training time.

To do iterations again needs smaller snapshots, to apply recorded gradients
needs less time after a failure. Pure functions: the leader feeds them
measurements, the simulator what it reckons for a cluster.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence

from moetion_jax.policies import decision, window


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outlook:
  """The failures that are expected, and what copies cost while none happens.

  Attributes:
    expected_mtbf_seconds: mean time between failures of the whole job.
    hides_copies: whether training loses nothing to a copy that is done before
      the next one begins. It loses all of the copy's time where the cores that
      copy are those that compute.
    fixed_seconds: seconds of a recovery that are the same in every way: from a
      death until a replacement can read snapshots.
  """

  expected_mtbf_seconds: float
  hides_copies: bool
  fixed_seconds: float = 0.0

  def __post_init__(self) -> None:
    if not 0 < self.expected_mtbf_seconds < math.inf:
      raise ValueError(f'{self.expected_mtbf_seconds=} must be positive')


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stage:
  """One stage under one way of replay.

  Attributes:
    operators: its operators; `rest_bytes` is what the way records of them.
    budget: its measured room for copies.
    update_seconds: seconds of one update of the whole stage, if its gradients
      are recorded.
    read_bytes_per_second: rate at which snapshots are read after a failure.
  """

  operators: window.StageOperators
  budget: window.CopyBudget
  update_seconds: float
  read_bytes_per_second: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prediction:
  """The costs of a window under one way of replay, as predicted.

  Attributes:
    replay: one of `decision.REPLAYS`.
    choice: the window.
    overhead: time that copies add to training, as a share of it.
    recovery_seconds: seconds that a failure costs, on average.
    ettr: effective training time ratio that follows.
  """

  replay: str
  choice: window.WindowChoice
  overhead: float
  recovery_seconds: float
  ettr: float

  def fields(self) -> dict[str, int | float]:
    """Returns what an event says of it."""
    return {
      'window_length': self.choice.window_length,
      'every': self.choice.every,
      'overhead': self.overhead,
      'recovery_seconds': self.recovery_seconds,
      'ettr': self.ettr,
    }


def update_seconds(
  operators: window.StageOperators, budget: window.CopyBudget
) -> float:
  """Returns a bound of the seconds that one update of a stage takes.

  An update reads its gradients and the state, and writes the state. A device
  moves these bytes in its own memory, which is faster than its copies to the
  host, whose rate is known. So this is too long rather than too short: updates
  are not preferred because they were thought to be cheap.

  Args:
    operators: the stage's operators, whose `rest_bytes` are the gradients.
    budget: the measured rate of copies.
  """
  moved = 2 * sum(operators.state_bytes.values())
  moved += sum(operators.rest_bytes.values())
  return moved / budget.bandwidth_bytes_per_second


def stages(
  operators: Iterable[window.StageOperators],
  budgets: Iterable[window.CopyBudget],
) -> list[Stage]:
  """Makes stages whose updates take as long as `update_seconds` says.

  Snapshots are read at the rate at which they were copied.
  """
  return [
    Stage(
      operators=one,
      budget=budget,
      update_seconds=update_seconds(one, budget),
      read_bytes_per_second=budget.bandwidth_bytes_per_second,
    )
    for one, budget in zip(operators, budgets, strict=True)
  ]


def predict(
  replay: str,
  choice: window.WindowChoice,
  of: Sequence[Stage],
  outlook: Outlook,
) -> Prediction:
  """Predicts what a window costs under a way of replay.

  All stages go at the pace of the slowest, and any of them may be the one that
  fails: the most expensive counts.

  Args:
    replay: one of `decision.REPLAYS`.
    choice: the window.
    of: all stages under that way.
    outlook: the failures that are expected.
  """
  overhead = max(_overhead(choice, stage, outlook) for stage in of)
  seconds = max(_recovery_seconds(replay, choice, stage) for stage in of)
  seconds += outlook.fixed_seconds
  lost = seconds / outlook.expected_mtbf_seconds
  return Prediction(
    replay=replay,
    choice=choice,
    overhead=overhead,
    recovery_seconds=seconds,
    ettr=1 / ((1 + overhead) * (1 + lost)),
  )


def of_updates(
  of: Sequence[Stage],
  outlook: Outlook,
  lengths: Iterable[int],
  room_bytes: Sequence[float] = (),
) -> Prediction | None:
  """Finds the best window for records of gradients, if there is any.

  Its largest snapshot is within the part of an iteration that a copy may take,
  and within the room in host memory. Of two windows with the same prediction
  the shorter one is taken.

  Args:
    of: all stages, with gradients as `rest_bytes`.
    outlook: the failures that are expected.
    lengths: lengths of windows that there may be.
    room_bytes: by stage, most bytes of a snapshot that host memory has room
      for; () for no limit.
  """
  room = room_bytes or [math.inf] * len(of)
  found: Prediction | None = None
  for length in lengths:
    if not all(
      _largest(stage, length) <= min(stage.budget.target_bytes, most)
      for stage, most in zip(of, room, strict=True)
    ):
      continue
    choice = window.WindowChoice(
      window_length=length,
      mode=decision.MODES[0],
      reason='of the windows whose gradients fit, that of the highest ETTR',
    )
    one = predict(decision.UPDATES, choice, of, outlook)
    if found is None or one.ettr > found.ettr:
      found = one
  return found


def predictions(
  choice: window.WindowChoice,
  again: Sequence[Stage],
  recorded: Sequence[Stage],
  outlook: Outlook,
  *,
  lengths: Iterable[int],
  room_bytes: Sequence[float] = (),
) -> list[Prediction]:
  """Predicts each way of replay, that of microbatches first.

  Args:
    choice: the window chosen for microbatches. If it is pinned, it holds for
      records as well; otherwise they have a window of their own, if one fits.
    again: all stages, with compute weights as `rest_bytes`.
    recorded: all stages, with gradients as `rest_bytes`.
    outlook: the failures that are expected.
    lengths: see `of_updates`.
    room_bytes: see `of_updates`.
  """
  made = [predict(decision.MICROBATCHES, choice, again, outlook)]
  if choice.pinned:
    made.append(predict(decision.UPDATES, choice, recorded, outlook))
  elif updates := of_updates(recorded, outlook, lengths, room_bytes):
    made.append(updates)
  return made


def best(of: Sequence[Prediction]) -> Prediction:
  """Returns the prediction with the highest ETTR; the first of equal ones."""
  return max(of, key=lambda p: p.ettr)


def _largest(stage: Stage, length: int) -> int:
  return max(stage.operators.snapshot_bytes(length, decision.MODES[0]))


def _overhead(
  choice: window.WindowChoice, stage: Stage, outlook: Outlook
) -> float:
  """Returns the time that copies add to iterations, as a share of these."""
  copied = stage.operators.snapshot_bytes(choice.window_length, choice.mode)
  iteration_bytes = stage.budget.iteration_bytes * choice.every
  added = copied
  if outlook.hides_copies:
    added = [max(0.0, one - iteration_bytes) for one in copied]
  return sum(added) / len(added) / iteration_bytes


def _recovery_seconds(
  replay: str, choice: window.WindowChoice, stage: Stage
) -> float:
  """Returns the seconds from the first read of a snapshot to caught up."""
  budget = stage.budget
  all_shares = dataclasses.replace(stage.operators, shares=())
  read = sum(all_shares.snapshot_bytes(choice.window_length, choice.mode))
  seconds = read / stage.read_bytes_per_second
  again = window.done_again(choice, stage.operators, budget, replay)
  seconds += again * budget.iteration_seconds
  if replay == decision.UPDATES:
    seconds += (choice.window_length - 1) * stage.update_seconds
  return seconds
