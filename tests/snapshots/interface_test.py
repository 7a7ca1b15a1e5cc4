"""Every snapshot store passes the suite of `store_conformance`."""

import pytest

from moetion_jax.snapshots import durable_store, memory_store, registry
from tests.support import plain_store, store_conformance


def _flip(path, offset):
  with path.open('r+b') as file:
    file.seek(offset)
    byte = file.read(1)[0]
    file.seek(offset)
    file.write(bytes([byte ^ 1]))


class TestEveryStore(store_conformance.StoreConformance):
  @pytest.fixture(params=['memory', 'durable', 'plain'])
  def kind(self, request):
    return request.param

  @pytest.fixture
  def make(self, kind, shm_folder, tmp_path):
    stores = []

    def make():
      store = memory_store.SnapshotStore(
        shm_folder / 'worker',
        store_conformance.DATA_BYTES,
        store_conformance.FILES,
      )
      if kind == 'durable':
        store = durable_store.DurableStore(store, tmp_path / 'worker')
      elif kind == 'plain':
        store = plain_store.PlainStore(tmp_path / 'worker')
      stores.append(store)
      return store

    yield make
    for store in stores:
      store.close()

  @pytest.fixture
  def stored(self, kind, shm_folder, tmp_path):
    folder = (shm_folder if kind == 'memory' else tmp_path) / 'worker'
    if kind == 'plain':
      return plain_store.PlainStore(folder)
    return registry.stored(folder)

  @pytest.fixture
  def damage(self, kind):
    def damage(store, iteration):
      path = store.folder / str(iteration)
      if kind == 'plain':
        used_bytes = store.manifest(iteration).used_bytes
        _flip(path, path.stat().st_size - used_bytes)
      else:
        _flip(path / 'data', 0)

    return damage
