"""A job of one's own before any of its processes: spec, settings, exit code."""

import json
import os
import subprocess
import sys

import pytest

from moetion_jax import ExitCode, JobSpec, TrainConfig, codec, errors, job_spec
from tests.support import helpers, markov_job, markov_train


def test_a_spec_is_equal_to_what_workers_read():
  made = markov_train.make_job(replicas=2)
  read = codec.decode(JobSpec, json.loads(json.dumps(codec.encode(made))))
  assert read == made
  assert isinstance(read.train, TrainConfig) and read.train == made.train
  assert made.train.replicas == 2 and made.train.iterations == 40


def test_a_spec_holds_json_alone():
  fields = codec.encode(markov_train.make_job(replicas=1))
  with pytest.raises(TypeError, match='JobSpec.config must be JSON'):
    JobSpec(**{**fields, 'config': {'train': TrainConfig()}})


def _assert_refused(*command, where, words):
  done = subprocess.run(
    [sys.executable, '-m', *command],
    cwd=where,
    env=os.environ | {'PYTHONPATH': str(helpers.ROOT)},
    capture_output=True,
    text=True,
    timeout=60,
    check=False,
  )
  assert done.returncode == ExitCode.REFUSED, done.stderr
  (line,) = done.stderr.splitlines()
  assert words in line, line


@pytest.mark.parametrize(
  ('changed', 'words'),
  [
    ({0: 'taken'}, 'error: --workdir='),  # by the settings of the run
    ({1: 'nowhere'}, 'error: --hostmem_dir='),  # by those of the agent
    ({2: '0'}, 'error: --replicas=0'),  # by those of the job
    ({3: 'kill:stage=9,iteration=1'}, 'error: --fail=kill:stage=9'),
  ],
)
def test_a_refused_setting_is_one_line(tmp_path, changed, words):
  (tmp_path / 'taken').write_text('no folder')
  given = dict(enumerate(['run', '/dev/shm', '1'])) | changed
  program = 'tests.support.markov_train'
  _assert_refused(program, *given.values(), where=tmp_path, words=words)


def test_the_code_in_the_readme_is_such_a_program(tmp_path):
  _, _, rest = (
    (helpers.ROOT / 'README.md')
    .read_text()
    .partition('```python\n# my/train.py\n')
  )
  (tmp_path / 'my').mkdir()
  (tmp_path / 'my/train.py').write_text(rest.partition('```')[0])
  (tmp_path / 'mine').write_text('no folder')
  _assert_refused('my.train', where=tmp_path, words='error: --workdir=')


def test_another_text_is_refused(monkeypatch):
  data = markov_job.Chain(markov_train.make_job(replicas=1).train)
  known = data.fingerprint()
  job_spec.check_data('', known, data.fingerprint() | {'name': 'elsewhere'})
  monkeypatch.setattr(markov_job, 'TOKENS', 12)
  with pytest.raises(errors.ConfigError, match='has changed since'):
    job_spec.check_data('', known, data.fingerprint())
