"""All outside a run's settings that can change its programs and so its bits.

A record is plain JSON, a section for each source: `read_environment` makes it
in a process that has a backend; here it is parsed, compared and put into words,
without JAX.

Not recorded, since none of it reaches a program: fractions of memory and
allocators, huge pages and GLIBC_TUNABLES but for those of the processor, JAX's
cache folder (a program that is loaded has the bits with which it was compiled),
which of equal devices are visible, logs, dumps and profiles, timeouts and
addresses. Nor is the version of this program itself: a new one has to go on
with the same bits (a test finishes a run of an earlier one). What JAX itself
records of a program's cache key (`jax/_src/cache_key.py`) is recorded here too,
but for the program and the compile options, which follow from the settings.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

from moetion_jax import errors

# By section: 'versions' of libraries, 'device', the C library of the 'system',
# 'options' of JAX, 'xla_flags', 'libtpu_flags', environment 'variables', and
# contents of 'files' that flags and variables name; in each by name.
Record = dict[str, dict[str, Any]]

# Reductions and scatters of GPUs in a fixed order (FACTS: exactness).
DETERMINISM = ('xla_gpu_deterministic_ops', 'true')
# Sections in which a name that is missing says nothing: an earlier version did
# not record it, or another version of JAX has no such option.
_OPEN = ('device', 'options')
_XLA_FLAGS, _FILES = 'xla_flags', 'files'
# The one thing that may differ between the workers of a run.
CORES = 'cores'

# Flags of XLA that cannot change a program, such as what it writes down. The
# number of devices is recorded as such.
_HARMLESS_FLAGS = (
  'xla_dump_',
  'xla_gpu_dump_',
  'xla_log_',
  'xla_vlog',
  'xla_detailed_logging',
  'xla_hlo_profile',
  'xla_force_host_platform_device_count',
  'xla_gpu_experimental_autotune_cache_mode',
  'xla_tpu_sdc_checker_',
)

_PREFIXES = (
  'XLA_',
  'LIBTPU_',
  'TPU_',
  'CUBLAS_',
  'CUBLASLT_',
  'CUDNN_',
  'CUSPARSE_',
  'CUFFT_',
  'NVIDIA_TF32',
  'NCCL_',
  'RCCL_',
  'ROCBLAS_',
  'HIPBLAS',
  'MIOPEN_',
  # Not all of 'TF_': Terraform's variables, secrets among them, begin so.
  'TF_CUDNN_',
  'TF_DETERMINISTIC',
  'TF_ENABLE_',
  'TF_USE_',
  'TF_XLA_',
  'TRITON_',
  'MOSAIC_',
  'PALLAS_',
  'FLAX_',
  'DNNL_',
  'ONEDNN_',
  'OMP_',
  'MKL_',
  'OPENBLAS_',
)
# The number of XLA's threads on CPU, whatever the cores are.
_THREADS = 'NPROC'
_HARMLESS_VARIABLES = (
  # Recorded by flag.
  'XLA_FLAGS',
  'LIBTPU_INIT_ARGS',
  # Memory: how much, and from which allocator.
  'XLA_PYTHON_CLIENT_',
  'XLA_CLIENT_MEM_FRACTION',
  # Logs, profiles.
  'FLAX_PROFILE',
  'NCCL_DEBUG',
  'NCCL_SOCKET_',
  'RCCL_DEBUG',
  'CUDNN_LOG',
  'CUBLAS_LOG',
  'CUBLASLT_LOG',
  'DNNL_VERBOSE',
  'ONEDNN_VERBOSE',
  'MKL_VERBOSE',
  'OPENBLAS_VERBOSE',
  'MIOPEN_ENABLE_LOGGING',
  'MIOPEN_LOG_LEVEL',
  'OMP_DISPLAY_',
  'TPU_MIN_LOG_LEVEL',
  'TPU_STDERR_LOG_LEVEL',
  'TPU_MAX_LOG_SIZE_MB',
  'TPU_LOG_DIR',
  'TPU_VMODULE',
  # Addresses and names: which host and device this is, and where to ask.
  'TF_GCS_',
  'TF_USE_MODULAR_FILESYSTEM',
  'TPU_LIBRARY_PATH',  # the version of what lies there is recorded
  'TPU_NAME',
  'TPU_SKIP_MDS_QUERY',
  'TPU_VISIBLE_',
  'TPU_WORKER_',
  'TPU_HOSTNAME',
  'TPU_PROCESS_',
  'TPU_HOST_BOUNDS',
  'TPU_CHIPS_PER_',
  'TPU_ACCELERATOR_TYPE',
  'TPU_TOPOLOGY',
  'CLOUD_TPU_TASK_ID',
  'NCCL_COMM_ID',
  # What is compiled is kept here.
  'TRITON_CACHE_DIR',
  'TRITON_HOME',
  'MIOPEN_USER_DB_PATH',
  'MIOPEN_CUSTOM_CACHE_DIR',
)

# A flag or variable may name a file. What XLA reads there decides about bits as
# the flag does: autotune results and overrides choose an algorithm for each
# product, profiles and tables of costs the order of a program. So the content
# counts, by its digest (`files`).
#
# What XLA writes counts by its path alone, since its content grows in every
# run: a cache of kernels, or of autotune results
# (`xla_gpu_per_fusion_autotune_cache_dir`). Such a cache makes later compiles
# choose what the first one measured to be fastest; in another folder, or an
# emptied one, it is measured again, and other bits may come out. Of an emptied
# one we cannot know: what holds then is that JAX's own cache still has the
# program, or that GPUs are told to be deterministic (`DETERMINISM`).
_WRITTEN_FILES = (
  'xla_gpu_kernel_cache_file',
  'NCCL_GRAPH_DUMP_FILE',
  'NCCL_TOPO_DUMP_FILE',
)
# Names whose values are paths, also where those have no slash: another value,
# such as `true`, may by chance be the name of a file here.
_NAMES_FILE = re.compile(r'file|path|_from$', re.IGNORECASE)
# These may name a folder, all files of which are read.
_READ_FOLDERS = ('xla_gpu_pgle_profile_file_or_directory_path',)
# These name a folder of tools, of which those are read that make code.
_TOOLS = {
  'xla_gpu_cuda_data_dir': (
    'nvvm/libdevice/libdevice.10.bc',
    'bin/ptxas',
    'bin/nvlink',
  ),
}
# Recorded since there are `files`.
_ONCE_HARMLESS = ('xla_gpu_per_fusion_autotune_cache_dir',)

_LISTED = 5  # changes that a message names; of the others it says the number
_LONGEST = 60  # characters of a value in a message


@dataclasses.dataclass(frozen=True, kw_only=True)
class Change:
  """Something that is not as it was.

  Attributes:
    name: the name of the library, option, flag or variable.
    was: its value then; None where it was not set.
    now: its value here.
  """

  name: str
  was: Any
  now: Any


def flags_of(
  text: str, read_file: Callable[[str], str] | None = None
) -> list[str]:
  """Splits flags as XLA does: blanks between them, or the name of a file.

  Args:
    text: the value of XLA_FLAGS or LIBTPU_INIT_ARGS.
    read_file: reads the file that `text` names; None: reads it from disk.
  """
  text = text.strip()
  if text and not text.startswith('-'):
    text = (read_file or _read)(text)
  return text.split()


def parse_flags(
  text: str, read_file: Callable[[str], str] | None = None
) -> dict[str, str]:
  """Returns the flags that can change a program, sorted by name.

  Of most flags that are given twice the last one holds, but some add up
  (`xla_disable_hlo_passes`): all their values are there, in order. A flag
  without a value is 'true'.

  Args:
    text: see `flags_of`.
    read_file: see `flags_of`.
  """
  found = {}
  for flag in flags_of(text, read_file):
    name, _, value = flag.lstrip('-').partition('=')
    value = value or 'true'
    if found.get(name, value) != value:
      value = f'{found[name]} {value}'
    found[name] = value
  return {
    name: value
    for name, value in sorted(found.items())
    if not name.startswith(_HARMLESS_FLAGS)
  }


def contents(
  named: Mapping[str, str], digest: Callable[[str, bool], str | None]
) -> dict[str, str]:
  """Returns the digests of files that flags and variables name, by their names.

  Args:
    named: the values of flags and variables, by name.
    digest: returns the digest of the file at a path, or if the second argument
      is true of a folder there; None if there is none.
  """
  found = {}
  for name, value in sorted(named.items()):
    # A flag that was given twice has both values.
    tools = [f'{value}/{tool}' for tool in _TOOLS.get(name, ())]
    digests = [
      digest(path, name in _READ_FOLDERS)
      for path in dict.fromkeys([value, *value.split(), *tools])
      if '/' in path or _NAMES_FILE.search(name)
    ]
    text = ' '.join(filter(None, digests))
    if text and name not in _WRITTEN_FILES:
      found[name] = f'a file with {text}'
  return found


def with_determinism(
  text: str, read_file: Callable[[str], str] | None = None
) -> str:
  """Returns XLA_FLAGS with the determinism flag, unless the user set it.

  The flags of a file are taken out of it: XLA reads a file or flags, not both.
  """
  flags = flags_of(text, read_file)
  if not any(DETERMINISM[0] in flag for flag in flags):
    flags.append('--{}={}'.format(*DETERMINISM))
  return ' '.join(flags)


def variables(environment: Mapping[str, str]) -> dict[str, str]:
  """Returns the variables that can change a program, sorted by name."""
  return {
    name: value
    for name, value in sorted(environment.items())
    if may_matter(name)
  }


def may_matter(name: str) -> bool:
  """Returns whether an environment variable can change a program."""
  is_named = name == _THREADS or name.startswith(_PREFIXES)
  return is_named and not name.startswith(_HARMLESS_VARIABLES)


def joined(records: Sequence[Record]) -> Record:
  """Joins the records of all workers of a run into the run's.

  The workers may have different numbers of cores: then the run's is a list.

  Args:
    records: by worker; equal but for the cores.
  """
  cores = [record['device'].get(CORES) for record in records]
  if len(set(cores)) == 1:
    return records[0]
  device = {**records[0]['device'], CORES: ','.join(map(str, cores))}
  return {**records[0], 'device': device}


def of_worker(record: Record, number: int) -> Record:
  """Inverts `joined`: returns what one worker's record has to be.

  Args:
    record: the run's record.
    number: the worker's position in the records that were joined.
  """
  cores = str(record.get('device', {}).get(CORES, '')).split(',')
  if len(cores) == 1:
    return record
  return {**record, 'device': {**record['device'], CORES: cores[number]}}


def completed(known: Record, here: Record) -> Record:
  """Fills in what an earlier version did not record, as it is here.

  Args:
    known: the recorded one; it may lack sections, and names in open ones.
    here: the record of now.
  """
  filled = {**here, **known}
  for section in set(_OPEN) & filled.keys():
    filled[section] = {**here.get(section, {}), **known.get(section, {})}
  # There were `files` before the folders of tools counted.
  later = (*_TOOLS, *(_ONCE_HARMLESS if _FILES not in known else ()))
  for section in {_XLA_FLAGS, _FILES} & known.keys():
    found = here.get(section, {})
    added = {name: found[name] for name in later if name in found}
    filled[section] = {**added, **known[section]}
  return filled


def from_software(software: Mapping[str, Any], here: Record) -> Record:
  """Makes a record of the versions that config.json once had as `software`.

  Args:
    software: names and values, of section 'versions' or 'device'.
    here: the record of now, which fills in the rest.
  """
  made = {section: dict(values) for section, values in here.items()}
  for name, value in software.items():
    section = 'device' if name in made['device'] else 'versions'
    if name == 'platform':
      section = 'device'
    # The first worker's cores were recorded only.
    if name == CORES and str(made['device'].get(name)).split(',')[0] == value:
      continue
    made[section][name] = value
  return made


def changes(known: Record, here: Record) -> list[Change]:
  """Returns what is not as it was, sorted by name.

  An option that only one of two versions of JAX has is no change of its own:
  the version is.
  """
  found: dict[str, Change] = {}
  # A flag comes before the content of the file that it names.
  for section in sorted(known.keys() | here.keys(), reverse=True):
    before, now = known.get(section, {}), here.get(section, {})
    names = before.keys() | now.keys()
    if section in _OPEN:
      names = before.keys() & now.keys()
    for name in names:
      was, value = before.get(name), now.get(name)
      if json.dumps(was) != json.dumps(value):
        found.setdefault(name, Change(name=name, was=was, now=value))
  return [found[name] for name in sorted(found)]


def describe(
  found: Sequence[Change], here: str = 'here', limit: int = _LISTED
) -> str:
  """Puts changes into words: each name with both values.

  Args:
    found: the changes.
    here: the name of the place of the second value.
    limit: the number of changes that are named; of the others only the number.
  """
  texts = [
    f'{one.name}={_text(one.was)}, {here} {_text(one.now)}'
    for one in found[:limit]
  ]
  if more := len(found) - limit:
    texts += [f'and {more} more'] if more > 0 else []
  return '; '.join(texts)


def names_of(found: Sequence[Change]) -> str:
  """Returns the names of changes as --accept_changes takes them."""
  return ','.join(one.name for one in found)


def canonical(names: Iterable[str]) -> tuple[str, ...]:
  """Returns names as records have them: JAX_X, a variable, is option jax_x."""
  return tuple(n.lower() if n.startswith('JAX_') else n for n in names)


def check_names(
  names: Collection[str],
  found: Sequence[Change],
  here: Record,
  earlier: Collection[str] = (),
) -> None:
  """Checks the names in --accept_changes: each could be that of a change.

  Args:
    names: the names.
    found: the changes that there are.
    here: the record of now.
    earlier: names of changes that were accepted before.

  Raises:
    errors.ConfigError: nothing has that name.
  """
  known = {name for section in here.values() for name in section}
  known |= {one.name for one in found} | {*earlier}
  for name in names:
    if name in known or may_matter(name) or name.startswith('xla_'):
      continue
    reason = 'is nothing that is recorded; '
    reason += (
      f'what changed is {names_of(found)}' if found else 'nothing has changed'
    )
    raise errors.ConfigError('accept_changes', name, reason)


def check_same_everywhere(records: Mapping[str, Record]) -> None:
  """Checks that all workers of a run compute with the same things.

  Args:
    records: by worker's name.

  Raises:
    errors.MoetionError: two differ; names both.
  """
  (first, expected), *others = records.items()
  for name, record in others:
    cores = record['device'].get(CORES)
    if CORES in expected['device']:
      device = {**expected['device'], CORES: cores}
      expected = {**expected, 'device': device}
    if found := changes(expected, record):
      raise errors.MoetionError(
        f'{name} does not compute as {first} does: there '
        f'{describe(found, "here")}; give all workers the same software, '
        'devices and variables'
      )


def check_replacement(known: Record, here: Record) -> None:
  """Checks that a worker may take the place of one that was lost.

  Args:
    known: the record that the worker's has to equal; {} where none is known.
    here: the worker's record.

  Raises:
    errors.ConfigError: something has changed since the run began.
  """
  if found := changes(completed(known, here), here):
    raise errors.ConfigError(
      'accept_changes',
      '',
      f'since the run began {describe(found, "now")}: the lost state would not '
      'come back with the same bits. Undo that and give the same command, or '
      f'pass --accept_changes={names_of(found)}',
    )


def _read(path: str) -> str:
  """Reads a file of flags; '' if there is none, as XLA does."""
  try:
    with open(path) as file:
      return file.read()
  except OSError:
    return ''


def _text(value: Any) -> str:
  if value is None:
    return '(not set)'
  text = value if isinstance(value, str) else json.dumps(value)
  return text if len(text) <= _LONGEST else text[: _LONGEST - 3] + '...'
