"""Compares the simulator with the runs of `launch.benchmark ettr`.

The costs of a policy are the averages over its runs with one MTBF. The pace of
iterations without failures is taken once from the run itself, which tests the
simulator's treatment of failures alone, and once from the runs beside it, where
this machine's noise from run to run counts as well.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import statistics
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from launch.benchmark.harness import runs as benchmark_runs
from launch.simulate import predict as simulate_predict
from moetion_jax.policies.kinds import registry, sparse
from moetion_jax.runtime import faults

# About how far the iteration is when a phase begins for the first time. The
# phases of stages overlap; the error is a small part of an iteration.
_FRACTIONS = {'forward': 0.05, 'backward': 0.3, 'update': 0.9}


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeasuredPace:
  """Pace of a run's iterations where nothing fails.

  Attributes:
    iteration_seconds: length of an iteration, without `blocked_seconds`.
    blocked_seconds: time that each snapshot adds to an iteration.
  """

  iteration_seconds: float
  blocked_seconds: float = 0.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeasuredCosts:
  """Average costs of a policy's failures; see `simulate_predict.Measured`.

  Attributes:
    detect_seconds: time until a death is known.
    start_seconds: time until the dead worker is replaced.
    fetch_seconds: time until snapshots are read.
    replay_seconds: length of an iteration that is done again.
    warming_seconds: total time that iterations take longer after a recovery,
      while another standby is prepared on the same cores.
  """

  detect_seconds: float
  start_seconds: float
  fetch_seconds: float
  replay_seconds: float
  warming_seconds: float = 0.0


def disturbed(run: benchmark_runs.RunOutcome) -> set[int]:
  """Returns the iterations whose length says nothing about the pace.

  A worker died in them or in one beside them: an iteration is reported when the
  next one is under way, which other stages may have ended by then.
  """
  failing = [fault.iteration for fault in _script(run)]
  return {i + near for i in failing for near in (-1, 0, 1)}


def quiet_seconds(
  run: benchmark_runs.RunOutcome,
  first: int,
  without: Collection[int] = (),
  without_times: Sequence[tuple[float, float]] = (),
) -> float:
  """Returns the mean length of iterations, by when they were written down.

  Args:
    run: the run that did them.
    first: iterations up to this one do not count.
    without: further iterations that do not count.
    without_times: spans (begin, end) in seconds since the run was started;
      iterations that overlap one do not count.

  Raises:
    ValueError: no iteration is left.
  """
  seconds, count = 0.0, 0
  for begin, end, passed in _passed(run, first):
    if any(i in without for i in passed):
      continue
    if any(begin < until and end > since for since, until in without_times):
      continue
    seconds += end - begin
    count += len(passed)
  if not count:
    raise ValueError('no iteration was quiet')
  return seconds / count


def own_pace(run: benchmark_runs.RunOutcome, first: int) -> MeasuredPace:
  """Returns the pace of the run itself, snapshots included.

  Leaves out the iterations in which a standby was prepared: where it shares the
  cores, they take longer. If there are no others, they count.
  """
  times = [(since, until) for since, _, until in _unsettled(run)]
  try:
    seconds = quiet_seconds(run, first, disturbed(run), times)
  except ValueError:
    seconds = quiet_seconds(run, first, disturbed(run))
  return MeasuredPace(iteration_seconds=seconds)


def _passed(
  run: benchmark_runs.RunOutcome, first: int
) -> Iterator[tuple[float, float, range]]:
  """Yields begin, end and the iterations written down at the end."""
  for (begin, before), (end, after) in itertools.pairwise(run.progress):
    passed = range(before + 1, after + 1)
    if before >= first and passed:
      yield begin, end, passed


def _unsettled(
  run: benchmark_runs.RunOutcome,
) -> list[tuple[float, float, float]]:
  """Returns each failure's time, end of recovery, and time of the next standby.

  In seconds since the run was started; infinite if the run's end came first,
  and no later than the next failure.
  """
  found: list[list[float]] = []
  for event in run.events:
    now = event.get('time', 0.0) - run.began
    if event['kind'] == 'failure':
      if found:
        found[-1][1:] = [min(now, x) for x in found[-1][1:]]
      found.append([now, math.inf, math.inf])
    elif event['kind'] == 'recovered' and found:
      found[-1][1] = now  # the last stage counts
    elif event['kind'] == 'standby' and found:
      found[-1][2] = min(found[-1][2], now)
  return [(since, back, warm) for since, back, warm in found]


def _warming_seconds(run: benchmark_runs.RunOutcome, first: int) -> float:
  """Returns the total delay of iterations while standbys were prepared."""
  times = _unsettled(run)
  slow = [
    (end - begin, len(passed))
    for begin, end, passed in _passed(run, first)
    if any(back <= begin < warm for _, back, warm in times)
    and not any(begin <= since < end for since, _, _ in times)
  ]
  if not slow:
    return 0.0
  pace = own_pace(run, first).iteration_seconds
  return sum(seconds - count * pace for seconds, count in slow)


def pace_beside(
  base: benchmark_runs.RunOutcome,
  quiet: benchmark_runs.RunOutcome,
  first: int,
) -> MeasuredPace:
  """Returns the pace taken from undisturbed runs.

  Args:
    base: a run without snapshots.
    quiet: a run of the policy.
    first: iterations up to this one do not count.
  """
  iteration_seconds = quiet_seconds(base, first)
  longer = quiet_seconds(quiet, first) - iteration_seconds
  return MeasuredPace(
    iteration_seconds=iteration_seconds,
    blocked_seconds=max(0.0, longer) * rhythm(quiet, first)[1],
  )


def rhythm(run: benchmark_runs.RunOutcome, first: int) -> tuple[int, int]:
  """Returns an iteration with a snapshot, and the interval between snapshots.

  Args:
    run: the run that took the snapshots.
    first: snapshots up to this iteration do not count: the run was still
      measuring which interval suits it.
  """
  taken = [i for i in _taken(run) if i > first]
  gaps = [after - before for before, after in itertools.pairwise(taken)]
  if not gaps:
    return first, len(run.lines)
  interval = round(statistics.median(gaps))
  return taken[-1], interval


def _taken(run: benchmark_runs.RunOutcome) -> list[int]:
  """Returns the iterations with a snapshot."""
  return [x['iteration'] for x in run.lines if x['snapshot_bytes']]


def costs(
  runs: Sequence[benchmark_runs.RunOutcome], first: int
) -> MeasuredCosts:
  """Returns the average costs of all failures; all 0 without failures.

  Args:
    runs: runs of one policy.
    first: iterations up to this one do not count.
  """
  events = [event for run in runs for event in _of_those_that_died(run.events)]
  seconds = [event['seconds'] for event in events]

  def mean(name: str) -> float:
    return statistics.fmean(x[name] for x in seconds) if seconds else 0.0

  iterations = sum(event['replayed_iterations'] for event in events)
  return MeasuredCosts(
    detect_seconds=mean('detect'),
    start_seconds=mean('start'),
    fetch_seconds=mean('fetch'),
    replay_seconds=sum(x['replay'] for x in seconds) / max(1, iterations),
    warming_seconds=sum(_warming_seconds(run, first) for run in runs)
    / max(1, len(seconds)),
  )


def predicted_seconds(
  run: benchmark_runs.RunOutcome,
  *,
  policy: str,
  stages: int,
  first: int,
  pace: MeasuredPace,
  costs: MeasuredCosts,
) -> float:
  """Simulates a run; returns the seconds from one iteration to the end.

  Args:
    run: the run whose settings and failures are simulated.
    policy: the run's policy.
    stages: number of stages of the run.
    first: the iteration from whose end time counts; no failure comes earlier.
    pace: the pace of its iterations.
    costs: the costs of its failures.
  """
  anchor, interval = rhythm(run, first)
  has_windows = registry.POLICIES[policy].has_windows
  # The simulator takes snapshots at multiples of the interval.
  shift = anchor % interval
  measured = simulate_predict.Measured(
    policy=policy,
    iterations=run.lines[-1]['iteration'] - shift,
    iteration_seconds=pace.iteration_seconds,
    blocked_seconds=pace.blocked_seconds,
    # Nobody goes back to an iteration before it was reported, one later.
    landing_seconds=max(
      _landing_seconds(run, first),
      0.0 if has_windows and interval == 1 else pace.iteration_seconds,
    ),
    failures=tuple(
      (fault.iteration - shift, _FRACTIONS[fault.phase], fault.stage)
      for fault in _script(run)
    ),
    stages=stages,
    interval=interval,
    # two_phase keeps tuning its interval, by how long iterations take.
    taken=tuple(i - shift for i in _taken(run) if i > shift),
    **_window(run) if has_windows else {},
    detect_seconds=costs.detect_seconds,
    start_seconds=costs.start_seconds,
    fetch_seconds=costs.fetch_seconds,
    replay_seconds=costs.replay_seconds,
  )
  undisturbed = dataclasses.replace(
    measured, iterations=first - shift, failures=()
  )
  return (
    simulate_predict.predict(measured).wall_seconds
    - simulate_predict.predict(undisturbed).wall_seconds
    + len(measured.failures) * costs.warming_seconds
  )


def _script(run: benchmark_runs.RunOutcome) -> tuple[faults.Fault, ...]:
  return faults.parse_faults(run.script, stages=1 << 30)  # the run accepted it


def _window(run: benchmark_runs.RunOutcome) -> dict[str, Any]:
  """Returns the window that was decided on last."""
  chosen = run.of_kind('window')[-1:]
  if not chosen:
    return {'window_length': sparse.FIRST_WINDOW}
  return {
    'window_length': chosen[0]['window_length'],
    'window_mode': chosen[0]['mode'],
  }


def _landing_seconds(run: benchmark_runs.RunOutcome, first: int) -> float:
  """Returns a snapshot's median copy time; it is similar in all stages."""
  found = [
    line['snapshot_bytes'] / sum(line['copy_bytes_per_second'])
    for line in run.lines
    if line['iteration'] > first
    and line['snapshot_bytes']
    and all(line['copy_bytes_per_second'])
  ]
  return statistics.median(found) if found else 0.0


def _of_those_that_died(
  events: Sequence[Mapping[str, Any]],
) -> list[Mapping[str, Any]]:
  """Returns the `recovered` events of stages that failed themselves."""
  died: set[int] = set()
  found = []
  for event in events:
    if event['kind'] == 'failure':
      died.add(event['stage'])
    elif event['kind'] == 'recovered' and event['stage'] in died:
      died.discard(event['stage'])
      found.append(event)
  return found
