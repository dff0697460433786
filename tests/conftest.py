"""Settings of the whole test run."""

import os

import jax
import pytest

# Most of the time goes into compiling, and tests compile many programs twice: a new function object each time, or in
# another process. A cache on disk lets them share; it lies in pytest's own cache folder, and removing it is harmless.
jax.config.update("jax_compilation_cache_dir", os.path.join(os.path.dirname(__file__), "..", ".pytest_cache", "jax"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)


@pytest.fixture(autouse=True, scope="module")
def forget_what_other_files_compiled():
    """JAX keeps traced constants in the precision they were first used in: a file that computes in float64 would find
    the float32 ones of the file before it in the same process. Compiled programs come back from the cache on disk.
    """
    jax.clear_caches()
