"""The leader's handling of logs that are damaged, cut or gone."""

import numpy as np
import pytest

from moetion_jax import keys, report
from moetion_jax.hostmem import (
  segment,
  segment_check,
  segment_writer,
  store_folder,
)
from moetion_jax.runtime.hosts import hosts, stores
from moetion_jax.runtime.worker import fault_damage
from moetion_jax.snapshots import folders, manifest, registry
from tests.support import plain_store


def _key(iteration, stage):
  return keys.EntryKey(iteration, stage, 0, keys.EntryKind.ACTIVATION, 0)


@pytest.fixture
def one(shm_folder, tmp_path):
  """Makes the stores of two stages, whose logs have iterations 3 to 6."""
  store = store_folder.StoreFolder(shm_folder, 'moetion-test')
  store.start()
  for stage in (0, 1):
    writer = segment_writer.SegmentWriter(
      store.path, keys.WorkerId(stage, 0, 1), 1 << 14, 16
    )
    writer.start()
    for iteration in range(3, 7):
      writer.put(_key(iteration, stage), np.full(100, iteration))
    writer.close()
  yield stores.Stores(2, 1, hosts.Hosts(2, 1, store))
  store.close()


def test_damaged_entries_are_dropped_also_where_the_log_is_gone(one):
  (path,) = one.log_paths(1)
  for iteration in (4, 6):
    assert fault_damage.damage_entry(path, _key(iteration, 1))
  assert one.drop_damaged(1, 5).entries == (
    segment_check.Damage(6, 1, 0, str(_key(6, 1))),
  )
  assert one.drop_damaged(1, 5).entries == ()
  path.unlink()
  assert one.drop_damaged(1, 1).entries == ()


def test_all_logs_are_checked(one):
  checked = one.check_logs(False)
  assert checked.checks == (segment_check.SegmentCheck(4, ()),) * 2
  assert checked.newest == (6, 6)
  (first,), (second,) = one.log_paths(0), one.log_paths(1)
  assert fault_damage.damage_entry(second, _key(4, 1))
  damage = segment_check.Damage(4, 1, 0, str(_key(4, 1)))
  found = one.check_logs(False).checks[1]
  assert found == segment_check.SegmentCheck(4, (damage,))
  second.unlink()
  assert len(one.check_logs(False).checks) == 1
  first.write_bytes(b'\0' * (1 << 13))
  checked = one.check_logs(False)  # nothing of it is to be believed
  assert not checked.checks
  assert [one[:2] for one in checked.unreadable] == [(0, 0)]
  checked = one.check_logs(True)
  assert not checked.checks and not checked.unreadable
  assert not first.exists()


def test_a_scan_says_what_logs_there_are(one):
  found = one.scan([1])
  assert found.shares == {1: ()} and found.newest == {1: 6}
  (first,), (second,) = one.log_paths(0), one.log_paths(1)
  assert found.log_bytes == (first.stat().st_size, second.stat().st_size)
  first.unlink()
  assert one.scan([]).log_bytes[0] == 0


@pytest.mark.parametrize('what', ['link', 'folder', 'cut'])
def test_a_log_that_cannot_be_fenced_is_lost(one, what):
  """Not the run: its worker begins a new log, as if it were gone."""
  (path,) = one.log_paths(1)
  moved = path.rename(path.with_name('moved'))
  if what == 'link':
    path.symlink_to(moved)
  elif what == 'cut':
    path.write_bytes(moved.read_bytes()[:-1])
  else:
    path.mkdir()
    (path / 'file').touch()
  assert one.scan([]).log_bytes[1] == 0
  worker = keys.WorkerId(1, 0, 2)
  segment.fence(path.parent, worker)
  assert not path.exists() and moved.exists()
  writer = segment_writer.SegmentWriter(path.parent, worker, 1 << 14, 16)
  writer.start()
  writer.close()
  assert one.scan([]).log_bytes[1]


@pytest.mark.parametrize('kind', ['own', 'plain'])
def test_snapshots_are_those_of_the_store_in_use(one, kind, monkeypatch):
  if kind == 'plain':
    for name in ('make', 'stored'):  # put back afterwards
      monkeypatch.setattr(registry, name, getattr(registry, name))
    plain_store.use()
  root = one.log_paths(1)[0].parent
  for replica in (0, 1):
    folder = folders.snapshots_folder(root, 1, replica)
    store = registry.make(folder, 1 << 12, 4)
    store.start()
    for iteration in (3, 4, 5):
      share = {'replica': replica, 'replicas': 2, 'state': [], 'compute': []}
      store.save(iteration, {'iteration': iteration, **share}, [])
    store.close()

  def shares():
    return [(s.replica, s.iteration) for s in one.scan([1]).shares[1]]

  assert shares() == [(r, i) for r in (0, 1) for i in (3, 4, 5)]
  one.forget_newer({1: 4})
  assert shares() == [(r, i) for r in (0, 1) for i in (3, 4)]
  one.orphan(1, [0])
  assert shares() == [(r, i) for r in (0, 1) for i in (3, 4)]
  one.line_moved(4)
  assert shares() == [(0, 3), (0, 4), (1, 4)]
  left = folders.snapshots_folder(root, 1, 1)
  assert list(left.iterdir()) == [left / '4']  # its room is given back
  for stored in folders.find_shares(root, 1, 4):
    with stored.open(4, verify=True) as snapshot:
      assert snapshot.metadata['iteration'] == 4
  one.forget_snapshots([1])
  assert shares() == []


def _store(root, stage, replica, replicas, rows, operators, iteration=4):
  """Stores a share: its operators, and the digests of some or all."""
  store = registry.make(
    folders.snapshots_folder(root, stage, replica), 1 << 12, 2
  )
  store.start()
  metadata = {
    'iteration': iteration,
    'replica': replica,
    'replicas': replicas,
    'state': keys.operators_to_json(operators),
    'compute': [],
  }
  if len(rows) == len(operators) and replicas > 1:
    metadata[folders.DIGESTS] = metadata['state']
  store.save(
    iteration,
    metadata,
    [manifest.Buffer('digests', rows.dtype, rows.shape, [rows])],
  )
  store.close()


@pytest.mark.parametrize('is_divided', [False, True])
def test_digests_of_states_are_read(one, is_divided):
  """Of all replicas, whether each has those of all operators or its own."""
  root = one.log_paths(1)[0].parent
  expected, operators = {}, []
  for stage, replicas in ((0, 1), (1, 2)):
    names = [keys.OperatorId(f'{stage}', e) for e in range(4)]
    operators.append(names)
    rows = np.arange(8, dtype=np.uint32).reshape(4, 2) + stage
    expected |= dict(zip(names, rows, strict=True))
    for replica in range(replicas):
      own = slice(replica, None, replicas)
      has = rows[own] if is_divided else rows
      assert one.digests([4], [names] * 2) == {}
      _store(root, stage, replica, replicas, has, names[own])
  assert one.digests([3, 4, 5], operators) == {4: report.combine(expected)}
  assert one.digests([4], [operators[0], operators[1][:3]]) == {}
  path = folders.snapshots_folder(root, 1, 0) / '4' / 'data'
  with open(path, 'r+b') as file:
    (byte,) = file.read(1)
    file.seek(0)
    file.write(bytes([byte ^ 1]))
  assert one.digests([4], operators) == {}  # a damaged one says nothing
