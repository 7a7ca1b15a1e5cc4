"""Four virtual CPU devices for every in-process test, set before JAX starts."""

import jax

jax.config.update('jax_num_cpu_devices', 4)
