"""What the agent says of a final state, or a checkpoint, that is damaged."""

import json
import os

import numpy as np
import pytest

from moetion_jax import keys
from moetion_jax.policies import planner
from moetion_jax.runtime import messages
from moetion_jax.runtime.agent import final_checkpoint
from moetion_jax.runtime.hosts import child_process
from moetion_jax.runtime.records import files, recorder, workdir
from tests.support import helpers, power


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


def test_lines_are_on_disk_before_a_checkpoint_can_be(tmp_path):
  """It alone says that a run is finished, whoever died beside it."""
  with power.disk(tmp_path) as disk:
    folder = workdir.Workdir(str(disk.path / 'run'), fresh=False)
    folder.lock()
    os.sync()
    operator = keys.OperatorId('head')
    ready = messages.Ready(
      device='',
      platform='cpu',
      lowering_platform='cpu',
      state_bytes=0,
      operators=planner.StageSizes(
        state_bytes={operator: 0}, compute_bytes={}, device={}
      ),
      environment={},
      data_fingerprint={},
    )
    job = helpers.micro_run().job_spec()
    with recorder.Recorder(job, folder, helpers.NotesView()) as one:
      one.accept({0: ready}, {})
      digests = {operator: np.zeros(2, np.uint32)}
      one.add(helpers.make_report(1, loss=1.0, digests=digests), [[0]])
      saver = child_process.WorkerProcess(0)
      told, saver._control_fd = os.pipe()
      final = final_checkpoint.FinalCheckpoint(folder.checkpoint)
      final.handed_over(saver, [saver], one)
    sent = messages.unpack(os.read(told, 1 << 16))
    assert isinstance(sent, messages.Save)
    os.close(told)
    saver.close()
    folder.close()
    disk.cut()
    assert list(files.read_lines(folder.path / 'metrics.jsonl')) == [1]
