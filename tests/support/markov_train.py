"""Trains `markov_job`: `python -m tests.support.markov_train WORKDIR MEMORY`.

This is the agent, which needs no JAX. Further arguments: the number of
replicas, then faults as `launch.train --fail` takes them. It ends with the exit
codes of `launch.train`.
"""

import dataclasses
import sys

from moetion_jax import (
  POLICIES,
  AgentSettings,
  CaptureSettings,
  JobSpec,
  TrainConfig,
  View,
  exit_code_of,
  parse_faults,
  run,
)

LENGTH, DIM = 8, 8


FACTORY = 'tests.support.markov_job:MarkovJob'


def make_job(replicas, factory=FACTORY):
  train = TrainConfig(
    iterations=40,
    stages=2,
    replicas=replicas,
    microbatches=4,
    microbatch_size=8,
    eval_every=10,
  )
  tokens = train.global_microbatches * train.microbatch_size * LENGTH
  return JobSpec(
    factory=factory,
    config={'name': 'markov', 'train': dataclasses.asdict(train)},
    hidden_bytes=train.microbatch_size * LENGTH * DIM * 4,
    tokens_per_iteration=tokens,
    expert_capacity=tokens,
  )


def main(workdir, hostmem_dir, replicas, *script, factory=FACTORY):
  job = make_job(int(replicas), factory)
  where = AgentSettings(
    workdir=workdir,
    hostmem_dir=hostmem_dir,
    captures=CaptureSettings(policy=POLICIES['sparse']),
    compilation_cache_dir='~/.cache/moetion_jax_tests',
    faults=parse_faults(script, job.train.stages, job.train.replicas),
  )
  return run(job, where, View())


if __name__ == '__main__':
  sys.exit(exit_code_of(lambda: main(*sys.argv[1:])))
