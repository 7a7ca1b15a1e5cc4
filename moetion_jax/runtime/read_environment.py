"""Records what this process computes with; see `environment`.

Every option of JAX is in one of two lists here. One that is in neither is
recorded: a new JAX may have it. A test fails until it is put into one of them.
"""

from __future__ import annotations

import contextlib
import enum
import hashlib
import itertools
import os
import pathlib
import platform
import pwd
import re
import sys
from collections.abc import Iterable, Mapping
from importlib import metadata, util
from typing import Any

import jax

from moetion_jax.runtime import environment, xla_setup

_PACKAGES = (
  'jax',
  'jaxlib',
  'flax',
  'optax',
  'orbax-checkpoint',
  'grain',
  'numpy',
  'ml_dtypes',
)
# Where they are imported from, if not by their own names.
_MODULES = {'orbax-checkpoint': 'orbax.checkpoint'}
# Beginnings of the names of packages that bring a runtime or a compiler for
# accelerators, as they are spelled in the names of their folders.
_RUNTIMES = (
  'jax_cuda',
  'jax_rocm',
  'jax_plugin',
  'jax_metal',
  'nvidia_',
  'libtpu',
  'triton',
  'intel_extension_for_openxla',
)
# Parts of the instruction set that XLA makes use of on CPU; the other flags in
# /proc/cpuinfo come and go with the kernel.
_INSTRUCTIONS = re.compile(
  r'(sse|ssse|avx|fma|f16c|bmi|amx|gfni|vaes|vpclmul|neon|asimd|sve|sme|bf16)'
)
_DIGEST_DIGITS = 16
_LIBM = re.compile(r'/libm[.-]\S+$')
_PRELOAD, _TUNABLES = 'LD_PRELOAD', 'GLIBC_TUNABLES'
_DRIVER = '/proc/driver/nvidia/version'

# Options of JAX that can change a program or its bits.
MATTERS = frozenset(
  {
    # How numbers are made: widths, promotion, precision.
    'jax_enable_x64',
    'jax_explicit_x64_dtypes',
    'jax_numpy_dtype_promotion',
    'jax_default_matmul_precision',
    'jax_allow_f16_reductions',
    # Random numbers.
    'jax_default_prng_impl',
    'jax_enable_custom_prng',
    'jax_random_seed_offset',
    'jax_threefry_partitionable',
    'jax_threefry_gpu_kernel_lowering',
    'jax_high_dynamic_range_gumbel',
    # Tracing, differentiation and lowering.
    'check_vma',
    'eager_constant_folding',
    'jax2tf_associative_scan_reductions',
    'jax_auto_pcast',
    'jax_bcoo_cusparse_lowering',
    'jax_custom_vjp3',
    'jax_disable_jit',
    'jax_embedded_constants_max_bytes',
    'jax_mosaic_allow_hlo',
    'jax_no_execution',
    'jax_pallas_enable_debug_checks',
    'jax_pallas_poison_buffers',
    'jax_pallas_use_mosaic_gpu',
    'jax_ragged_dot_use_gpu_pallas_triton_lowering',
    'jax_ragged_dot_use_ragged_dot_instruction',
    'jax_refs_to_pins',
    'jax_remat3',
    'jax_remove_size_one_mesh_axis_from_type',
    'jax_scan3',
    'jax_softmax_custom_jvp',
    'jax_use_direct_linearize',
    'jax_use_emit_pipeline_primitive',
    'jax_use_magma',
    'jax_use_shardy_partitioner',
    'jax_use_simplified_jaxpr_constants',
    # Checks that put something into programs.
    'jax_debug_infs',
    'jax_debug_nans',
    'jax_error_checking_behavior_divide',
    'jax_error_checking_behavior_nan',
    'jax_error_checking_behavior_oob',
    # The compiler's effort, and what it optimises by.
    'jax_compiler_enable_remat_pass',
    'jax_disable_most_optimizations',
    'jax_enable_pgle',
    'jax_compilation_cache_expect_pgle',
    'jax_pgle_aggregation_percentile',
    'jax_pgle_profiling_runs',
    'jax_xla_profile_version',
    'jax_exec_time_optimization_effort',
    'jax_memory_fitting_effort',
    'jax_memory_fitting_level',
    'jax_optimization_level',
    # Devices: their order, and what sums over them.
    'jax_backend_target',
    'jax_cpu_collectives_implementation',
    'jax_mock_gpu_topology',
    'jax_pjrt_client_create_options',
    'jax_sort_devices_by_process_index',
    'mock_num_gpu_processes',
  }
)

# Options of JAX that cannot.
HARMLESS = frozenset(
  {
    # Caches: what is loaded was compiled with the same key.
    'jax_compilation_cache_check_contents',
    'jax_compilation_cache_dir',
    'jax_compilation_cache_include_metadata_in_key',
    'jax_compilation_cache_max_size',
    'jax_enable_compilation_cache',
    'jax_explain_cache_misses',
    'jax_persistent_cache_enable_xla_caches',
    'jax_persistent_cache_min_compile_time_secs',
    'jax_persistent_cache_min_entry_size_bytes',
    'jax_raise_persistent_cache_errors',
    'jax_remove_custom_partitioning_ptr_from_cache_key',
    'jax_share_binary_between_hosts',
    'jax_share_binary_between_hosts_timeout_ms',
    # Which devices: their platform, kind and number are recorded as such.
    'jax_cuda_visible_devices',
    'jax_default_device',
    'jax_num_cpu_devices',
    'jax_oneapi_visible_devices',
    'jax_platform_name',
    'jax_platforms',
    'jax_rocm_visible_devices',
    'jax_xla_backend',
    # When something runs, and how long others are waited for.
    'jax_cpu_enable_async_dispatch',
    'jax_cpu_get_global_topology_timeout_minutes',
    'jax_cpu_get_local_topology_timeout_minutes',
    'jax_enable_preemption_service',
    'jax_enable_recoverability',
    # The way of bytes between hosts.
    'jax_cross_host_transfer_socket_address',
    'jax_cross_host_transfer_timeout_seconds',
    'jax_cross_host_transfer_transfer_size',
    'jax_cross_host_transport_addresses',
    'jax_force_dcn_cross_host_transfers',
    # Programs that are written to files, which ours are not.
    'jax2tf_default_native_serialization',
    'jax_export_calling_convention_version',
    'jax_export_ignore_forward_compatibility',
    'jax_serialization_version',
    # Checks that raise or warn, and leave programs as they are.
    'jax_array_garbage_collection_guard',
    'jax_captured_constants_report_frames',
    'jax_captured_constants_warn_bytes',
    'jax_check_proxy_envs',
    'jax_check_static_indices',
    'jax_numpy_rank_promotion',
    'jax_enable_checks',
    'jax_mutable_array_checks',
    'jax_disable_bwd_checks',
    'jax_no_tracing',
    'jax_disable_vmap_shmap_error',
    'jax_legacy_prng_key',
    'jax_check_tracer_leaks',
    'jax_debug_key_reuse',
    'jax_debug_leaked_clients_on_clear_backends',
    'jax_disallow_mesh_context_manager',
    'jax_experimental_unsafe_xla_runtime_errors',
    'jax_thread_guard',
    'jax_transfer_guard',
    'jax_transfer_guard_device_to_device',
    'jax_transfer_guard_device_to_host',
    'jax_transfer_guard_host_to_device',
    # Logs, dumps, tracebacks.
    'jax_compiler_detailed_logging_min_ops',
    'jax_debug_log_modules',
    'jax_distributed_debug',
    'jax_dump_ir_modes',
    'jax_dump_ir_to',
    'jax_hlo_source_file_canonicalization_regex',
    'jax_include_debug_info_in_dumps',
    'jax_include_full_tracebacks_in_locations',
    'jax_log_checkpoint_residuals',
    'jax_log_compiles',
    'jax_logging_level',
    'jax_pallas_verbose_errors',
    'jax_pprint_use_color',
    'jax_send_traceback_to_runtime',
    'jax_source_url_schema',
    'jax_traceback_filtering',
    'jax_traceback_in_locations_limit',
    'jax_tracer_error_num_traceback_frames',
  }
)


def read() -> environment.Record:
  """Records what this process computes with; creates the backend.

  Call it after `xla_setup.configure`, when all that has options is imported.
  """
  device = jax.local_devices()[0]
  flags = environment.parse_flags(os.environ.get('XLA_FLAGS', ''))
  libtpu = environment.parse_flags(os.environ.get('LIBTPU_INIT_ARGS', ''))
  settings = {} if device.platform == 'cpu' else nccl_settings(_nccl_files())
  variables = environment.variables({**settings, **os.environ})
  return {
    'versions': dict(_VERSIONS),
    'device': _device(device),
    'system': system(_content('/proc/self/maps'), os.environ),
    'options': options(jax.config.values),
    'xla_flags': flags,
    'libtpu_flags': libtpu,
    'variables': variables,
    'files': environment.contents(variables | libtpu | flags, digest_of),
  }


def _nccl_files() -> list[str]:
  """Lists the files that NCCL reads, of which the first one to set holds."""
  files = [os.environ.get('NCCL_CONF_FILE', ''), '/etc/nccl.conf']
  with contextlib.suppress(KeyError):  # a user without an entry
    home = pwd.getpwuid(os.getuid()).pw_dir
    files[0] = files[0] or os.path.join(home, '.nccl.conf')
  return files


def nccl_settings(files: Iterable[str]) -> dict[str, str]:
  """Returns the variables that NCCL sets itself where they are not set.

  Args:
    files: paths of files with lines NAME=VALUE; of two lines the first holds.
  """
  found: dict[str, str] = {}
  for file in files:
    for line in _content(file).splitlines():
      name, is_set, value = line.partition('=')
      if is_set and not line.startswith('#'):
        found.setdefault(name, value)
  return found


def system(maps: str, variables: Mapping[str, str]) -> dict[str, str]:
  """Records the C library, its mathematics, and what is loaded before them.

  Args:
    maps: the content of /proc/self/maps.
    variables: the environment variables.
  """
  found = {'libc': ' '.join(platform.libc_ver())}
  mapped = filter(_LIBM.search, maps.splitlines())
  for name in sorted({line.split()[-1] for line in mapped}):
    found['libm'] = digest_of(name) or name
  if preloaded := variables.get(_PRELOAD, ''):
    files = [digest_of(path) for path in re.split('[ :]+', preloaded)]
    found[_PRELOAD] = ' '.join([preloaded, *filter(None, files)])
  tunables = variables.get(_TUNABLES, '').split(':')
  if chosen := ':'.join(x for x in tunables if x.startswith('glibc.cpu.')):
    found[_TUNABLES] = chosen  # it chooses between variants of functions
  return found


def digest_of(path: str, reads_folder: bool = False) -> str | None:
  """Returns the digest of a file, or of all files in a folder.

  Args:
    path: its path.
    reads_folder: whether a folder has a digest too.

  Returns:
    The digest, and how it was made; None where there is nothing to read.
  """
  found = pathlib.Path(path)
  try:
    files = [found] if found.is_file() else []
    if reads_folder and found.is_dir():
      files = sorted(file for file in found.iterdir() if file.is_file())
    whole = hashlib.sha256()
    for file in files:
      with file.open('rb') as opened:
        whole.update(hashlib.file_digest(opened, 'sha256').digest())
  except (OSError, ValueError):  # no path has a null byte
    return None
  return f'sha256 {whole.hexdigest()[:_DIGEST_DIGITS]}' if files else None


def options(values: Mapping[str, Any]) -> dict[str, Any]:
  """Returns those options of JAX that can change a program, as JSON.

  Args:
    values: all options, by name.
  """
  return {
    name: _json(value)
    for name, value in sorted(values.items())
    if name not in HARMLESS
  }


def _device(device: Any) -> dict[str, Any]:
  """Describes a device and its platform, and how many a worker has."""
  found: dict[str, Any] = {
    'platform': jax.default_backend(),
    'platform_version': device.client.platform_version,
    'device': device.device_kind,
    'local_devices': jax.local_device_count(),
  }
  if found['platform'] == 'cpu':
    model, instructions = processor(_first_block('/proc/cpuinfo'))
    return found | {
      environment.CORES: xla_setup.cores(),
      'processor': model,
      'instructions': instructions,
    }
  if driver := _content(_DRIVER):
    found['driver'] = driver.splitlines()[0]
  return found


def processor(cpuinfo: str) -> tuple[str, str]:
  """Returns the model and the instruction sets of a processor.

  Args:
    cpuinfo: the content of /proc/cpuinfo.
  """
  fields: dict[str, str] = {}
  for line in cpuinfo.splitlines():
    name, colon, value = line.partition(':')
    if colon:
      fields.setdefault(name.strip().lower(), value.strip())
  model = fields.get('model name') or ' '.join(
    fields.get(name, '') for name in ('cpu implementer', 'cpu part')
  )
  flags = fields.get('flags') or fields.get('features') or ''
  found = sorted(x for x in set(flags.split()) if _INSTRUCTIONS.match(x))
  return model.strip() or platform.processor(), ' '.join(found)


def installed(
  folders: Iterable[str], prefixes: tuple[str, ...]
) -> dict[str, str]:
  """Finds installed packages by the beginnings of their names.

  The folder NAME-VERSION.dist-info of each says both, and is read much faster
  than what is in it.

  Args:
    folders: the folders in which Python looks for modules.
    prefixes: the beginnings, in lower case, with '_' for '-'.

  Returns:
    Versions by name.
  """
  found: dict[str, str] = {}
  for folder in folders:
    for path in sorted(pathlib.Path(folder or '.').glob('*.dist-info')):
      name, _, version = path.stem.partition('-')
      if name.lower().replace('-', '_').startswith(prefixes):
        found.setdefault(name, version)
  return dict(sorted(found.items()))


def _versions() -> dict[str, str]:
  found = {'python': platform.python_version()}
  for name in _PACKAGES:
    try:
      package = metadata.distribution(name)
    except metadata.PackageNotFoundError:
      continue
    found[name] = package.version + _elsewhere(name, package)
  return found | installed(sys.path, _RUNTIMES)


def _elsewhere(name: str, package: metadata.Distribution) -> str:
  """Says where a package is imported from, if not from where it is installed.

  A source tree on PYTHONPATH hides the installed package, whose version then
  says nothing.
  """
  spec = None
  module = _MODULES.get(name, name.replace('-', '_'))
  with contextlib.suppress(ImportError, ValueError):
    spec = util.find_spec(module)
  installed_at = str(package.locate_file(''))
  found = spec.origin if spec else None
  if found is None or os.path.realpath(found).startswith(
    os.path.realpath(installed_at) + os.sep
  ):
    return ''
  return f' at {os.path.dirname(os.path.realpath(found))}'


def _content(path: str) -> str:
  """Reads a file; '' if there is none."""
  try:
    return pathlib.Path(path).read_text()
  except OSError:
    return ''


def _first_block(path: str) -> str:
  """Reads a file up to the first empty line; '' if there is none."""
  try:
    with open(path) as file:
      return ''.join(itertools.takewhile(str.strip, file))
  except OSError:
    return ''


def _json(value: Any) -> Any:
  if isinstance(value, enum.Enum):
    return value.name
  if value is None or isinstance(value, bool | int | float | str):
    return value
  return str(value)


# Read now: this is what is imported, whatever is installed while it runs.
_VERSIONS = _versions()
