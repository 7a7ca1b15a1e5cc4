"""Modes of files and folders, whatever the umask is."""

import os
import stat

import pytest

from moetion_jax.hostmem import doorbell, private, store_folder


def _mode(path):
  return stat.S_IMODE(os.lstat(path).st_mode)


@pytest.fixture(params=[0, 0o077, 0o777], ids=oct)
def any_umask(request):
  before = os.umask(request.param)
  yield
  os.umask(before)


def test_modes(tmp_path, any_umask):
  folder = tmp_path / 'folder'
  private.make_folder(folder)
  private.write(folder / 'written', b'what')
  os.close(private.create(folder / 'created', exclusive=True))
  assert _mode(folder) == 0o700
  assert _mode(folder / 'written') == _mode(folder / 'created') == 0o600
  assert (folder / 'written').read_bytes() == b'what'
  private.write(folder / 'written', b'x')
  assert (folder / 'written').read_bytes() == b'x'


def test_a_file_that_others_could_read_is_theirs_no_longer(tmp_path):
  path = tmp_path / 'old'
  path.write_text('of an earlier version')
  path.chmod(0o666)
  private.write(path, b'new')
  assert _mode(path) == 0o600


def test_a_folder_of_that_name_keeps_its_mode(tmp_path):
  """It is refused by whoever checks it (`store_folder.check_private`)."""
  path = tmp_path / 'open'
  path.mkdir()
  path.chmod(0o755)
  private.make_folder(path, exist_ok=True)
  assert _mode(path) == 0o755
  with pytest.raises(FileExistsError):
    private.make_folder(path)
  (tmp_path / 'file').touch()
  with pytest.raises(FileExistsError):
    private.make_folder(tmp_path / 'file', exist_ok=True)


def test_what_is_not_new_is_not_created(tmp_path):
  (tmp_path / 'there').touch()
  with pytest.raises(FileExistsError):
    private.create(tmp_path / 'there', exclusive=True)
  (tmp_path / 'link').symlink_to(tmp_path / 'elsewhere')
  with pytest.raises(OSError):
    private.create(tmp_path / 'link')
  assert not (tmp_path / 'elsewhere').exists()


def test_a_store_with_its_lock_and_a_bell(tmp_path, any_umask):
  store = store_folder.StoreFolder(tmp_path, 'run')
  store.start()
  bell = doorbell.Doorbell(store.path, 'one')
  bell.start()
  os.close(store_folder.reserve(store.path / 'reserved', 4096))
  assert _mode(store.path) == 0o700
  names = {path.name: _mode(path) for path in store.path.iterdir()}
  assert names == dict.fromkeys(
    ('lock', 'owner', 'one.bell', 'reserved'), 0o600
  )
  assert stat.S_ISSOCK(os.lstat(store.path / 'one.bell').st_mode)
  bell.ring()
  bell.drain()
  bell.close()
  store.remove()
