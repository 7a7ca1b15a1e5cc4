"""`markov_train`, with snapshots in a `plain_store`: the same arguments."""

import sys

from tests.support import markov_train, plain_store


def make_stages(*arguments):
  from tests.support import markov_job  # needs JAX, which no agent has

  return markov_job.MarkovJob(*arguments)


# Of the agent as well as of its workers, which import this for their job.
plain_store.use()

if __name__ == '__main__':
  factory = 'tests.support.plain_train:make_stages'
  sys.exit(markov_train.main(*sys.argv[1:], factory=factory))
