"""Runs with stages of several replicas, for tests of what becomes of them."""

from tests.support import runs

STAGES, REPLICAS = 2, 2
ITERATIONS = 10
WINDOW = 3
SECONDS = 240.0


def train(host, workdir, *faults, replicas=REPLICAS, flags=(), **how):
  """Starts one; see `runs.Host.train`."""
  return host.train(
    workdir,
    f'--stages={STAGES}',
    f'--replicas={replicas}',
    f'--iterations={ITERATIONS}',
    f'--window_length={WINDOW}',
    f'--microbatches={6 // replicas}',
    '--dropout_rate=0.1',
    *(f'--fail={fault}' for fault in faults),
    *flags,
    **how,
  )


def undisturbed_metrics(tmp_path_factory):
  """Of a run that nothing happens to."""
  return runs.undisturbed_metrics(tmp_path_factory, train, ITERATIONS, SECONDS)


def generations(workdir):
  """Of each worker, by stage and replica."""
  return {
    (w['stage'], w['replica']): w['generation'] for w in runs.workers(workdir)
  }
