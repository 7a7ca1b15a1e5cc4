"""Sets JAX up for in-process tests, before its backend exists."""

import os

import jax

jax.config.update('jax_num_cpu_devices', 4)
# Programs of earlier sessions: compiling them is most of the tests' time.
jax.config.update(
  'jax_compilation_cache_dir', os.path.expanduser('~/.cache/moetion_jax_tests')
)
jax.config.update('jax_persistent_cache_min_compile_time_secs', 0)
jax.config.update('jax_persistent_cache_min_entry_size_bytes', -1)
