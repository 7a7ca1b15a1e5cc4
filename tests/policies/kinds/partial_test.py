"""What the leader decides when only some experts are saved, by hand."""

from moetion_jax.policies import (
  decision as decision_lib,
  planner as planner_lib,
)
from moetion_jax.policies.kinds import partial
from moetion_jax.snapshots import coverage
from tests.support import planning


def test_partial_saves_experts_in_turn():
  run = planning.Run(planning.make_planner('partial', interval=4))
  run.report(30)
  assert run.taken(1, 30) == {
      4: [0], 8: [1], 12: [2], 16: [3], 20: [0], 24: [1], 28: [2],
    }  # fmt: skip
  decision = decision_lib.active(run.decisions, 8)
  assert decision.captured(8) == coverage.Contents(
    state=frozenset({planning.other(), planning.expert(1)})
  )


def test_partial_saves_those_that_were_trained_most():
  load = {
    planning.expert(0): 1,
    planning.expert(1): 7,
    planning.expert(2): 3,
    planning.expert(3): 2,
  }
  run = planning.Run(
    planning.make_planner('partial', interval=4, partial_select='load_aware'),
    load,
  )
  run.report(60)
  # After 1, 5, ... reported iterations; in 12 expert 1 has 7 tokens, 2 has 27.
  assert list(run.taken(1, 12).values()) == [[1], [2], [1]]
  # In a round or two everybody is saved.
  assert {x[0] for x in run.taken(1, 60).values()} == {0, 1, 2, 3}


def test_an_unpopular_expert_is_saved_in_the_end():
  load = {planning.expert(3): 9, planning.expert(1): 5}
  run = planning.Run(
    planning.make_planner('partial', interval=4, partial_select='popularity'),
    load,
  )
  run.report(120)
  saved = [x[0] for x in run.taken(1, 120).values()]
  assert saved[:7] == [3] * 7
  assert saved[7:10] == [1, 0, 2]  # not for 8 checkpoints
  assert saved.count(3) > 15


def test_what_a_restore_of_partial_loses():
  load = {planning.expert(i): 2 for i in range(planning.EXPERTS)}
  planner = planning.make_planner('partial', interval=4, plt_budget=0.2)
  assert isinstance(planner, partial.PartialPlanner)
  run = planning.Run(planner, load)
  run.report(14)
  versions = {
    planning.expert(0): 4,
    planning.expert(1): 8,
    planning.expert(2): 12,
    planning.expert(3): 0,
  }
  loss = planner.restart_from(12, versions)
  # Of 12 iterations with 8 tokens each: 8 + 4 + 0 + 12 iterations of 2 tokens.
  assert loss == planner_lib.Loss(lost_tokens=48.0, plt=0.5, experts=2)
  (decision,) = planner.decisions(12)
  assert (decision.first_iteration, decision.every) == (12, 4)
  assert (
    planner.pools()[0].size_bytes
    == planning.OTHER_BYTES + 2 * planning.EXPERT_BYTES
  )
  # The same again: all that there is to lose is lost in two restores.
  second = planner.restart_from(12, versions)
  assert (second.plt, second.experts) == (1.0, 4)


def test_popular_experts_that_lost_tokens_take_more_of_them():
  load = {planning.expert(i): 2 for i in range(planning.EXPERTS)}
  planner = planning.make_planner(
    'partial', interval=4, partial_select='popularity'
  )
  assert isinstance(planner, partial.PartialPlanner)
  run = planning.Run(planner, load)
  run.report(14)
  versions = {
    planning.expert(0): 4,
    planning.expert(1): 8,
    planning.expert(2): 12,
    planning.expert(3): 10,
  }
  loss = planner.restart_from(12, versions)
  # For 8 iterations, as long as expert 0 was not saved: what 8, 4, 0 and 2
  # iterations brought, on top of what 8 bring.
  assert loss.capacity_until == 20
  assert planner.capacity(0) == (
    ('layers/0/experts', 0, 2.0),
    ('layers/0/experts', 1, 1.5),
    ('layers/0/experts', 2, 1.0),
    ('layers/0/experts', 3, 1.25),
  )
  nothing = planner.restart_from(12, dict.fromkeys(versions, 12))
  assert nothing.capacity_until == 0 and planner.capacity(0) == ()
