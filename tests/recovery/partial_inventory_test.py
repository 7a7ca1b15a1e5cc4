"""What the leader knows of checkpoints that hold some experts only."""

from moetion_jax.recovery import partial_inventory
from moetion_jax.snapshots import coverage
from tests.support import planning


def _stored(found, iteration, experts):
  state = frozenset({planning.other(), *(planning.expert(i) for i in experts)})
  found.stored(
    0,
    coverage.Share(iteration=iteration, state=state, compute=frozenset()),
  )


def test_the_inventory_keeps_what_the_line_needs():
  found = partial_inventory.PartialInventory([planning.sizes().state_bytes], 4)

  def starts():
    return [s.iteration for s in found.starts(0)]

  assert starts() == [0]
  for number, iteration in enumerate(range(4, 24, 4)):
    _stored(found, iteration, [number % planning.EXPERTS])
  assert starts() == [0, 4, 8, 12, 16, 20]
  assert found.versions(12) == {
    planning.expert(0): 4,
    planning.expert(1): 8,
    planning.expert(2): 12,
    planning.expert(3): 0,
  }
  # Nothing may go while an expert is the initial one.
  assert found.advance(9, frozen=False) and found.line == 0
  assert starts() == [0, 4, 8, 12, 16, 20]
  assert not found.advance(9, frozen=False)
  # At 16 expert 0 is of iteration 4: that is kept, though no start any more.
  assert found.advance(20, frozen=False) and found.line == 4
  assert starts() == [0, 16, 20]
  assert found.versions(16)[planning.expert(0)] == 4
  _stored(found, 24, [1])
  assert found.advance(24, frozen=False) and found.line == 8
  assert not found.advance(24, frozen=True)
  _stored(found, 28, [2])
  found.lose(0, 28)
  assert starts() == [0, 20, 24]


def test_an_inventory_that_begins_somewhere():
  found = partial_inventory.PartialInventory([planning.sizes().state_bytes], 4)
  for number, iteration in enumerate(range(4, 28, 4)):
    _stored(found, iteration, [number % planning.EXPERTS])
  found.begin_at(20)
  assert found.line == 8
  assert [s.iteration for s in found.starts(0)] == [0, 20, 24]
