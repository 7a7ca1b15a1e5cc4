"""What the agent says of a final state, or a checkpoint, that is damaged."""

import json

import pytest

from moetion_jax.runtime import messages
from moetion_jax.runtime.agent import final_checkpoint
from moetion_jax.runtime.hosts import child_process
from moetion_jax.runtime.records import recorder, workdir
from tests.support import helpers


@pytest.fixture
def record(tmp_path):
  """A recorder whose run was accepted, and so writes events."""
  folder = workdir.Workdir(str(tmp_path / 'run'), fresh=False)
  folder.lock()
  one = recorder.Recorder(
    helpers.micro_run().job_spec(), folder, helpers.NotesView()
  )
  one.accepted = True
  yield one
  folder.close()


def _events(tmp_path):
  lines = (tmp_path / 'run' / 'events.jsonl').read_text().splitlines()
  return [json.loads(line) for line in lines]


@pytest.mark.parametrize(
  ('is_sent_so', 'says'),
  [
    (False, 'that was 3 times: host memory is damaged'),
    (True, 'that was 3 times: host memory brought what was sent'),
  ],
)
def test_damage_is_named_as_what_it_is(tmp_path, record, is_sent_so, says):
  """What has its checksum was damaged before it came into host memory."""
  one = final_checkpoint.FinalCheckpoint(tmp_path / 'run' / 'checkpoint')
  saver, giver = (child_process.WorkerProcess(stage) for stage in (0, 1))
  message = messages.Damaged(
    stage=1, replica=0, what='stage 1: X', is_sent_so=is_sent_so
  )
  # Nobody is asked again: neither process was started.
  for _ in range(2):
    one.handed_over(giver, [saver, giver], record)
    one.damaged(saver, message, [], record)
  one.handed_over(giver, [saver, giver], record)
  with pytest.raises(child_process.WorkerError) as caught:
    one.damaged(saver, message, [], record)
  assert says in str(caught.value) and 'stage 1: X' in str(caught.value)
  found = _events(tmp_path)
  assert [e['kind'] for e in found] == ['final_state_damaged'] * 3
  assert {e['stage'] for e in found} == {1}


def test_a_checkpoint_that_is_written_again_is_told(tmp_path, record, capfd):
  one = final_checkpoint.FinalCheckpoint(tmp_path / 'run' / 'checkpoint')
  saver = child_process.WorkerProcess(0)
  message = messages.Rewritten(what='W/checkpoint: read otherwise')
  one.rewritten(saver, message, record)
  said = capfd.readouterr().err
  assert said == 'W/checkpoint: read otherwise; it is written once more.\n'
  (event,) = _events(tmp_path)
  assert event['kind'] == 'final_checkpoint_damaged'
  assert event['error'] == 'W/checkpoint: read otherwise'
