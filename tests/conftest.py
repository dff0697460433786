"""Settings of the whole test run."""

import os

import jax

# Most of the time goes into compiling, and tests compile many programs twice: a new function object each time, or in
# another process. A cache on disk lets them share; it lies in pytest's own cache folder, and removing it is harmless.
jax.config.update("jax_compilation_cache_dir", os.path.join(os.path.dirname(__file__), "..", ".pytest_cache", "jax"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)
