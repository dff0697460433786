"""Settings of the whole test run."""

import os
import subprocess
import sys

import pytest

# Nearly all the time of these tests goes into compiling programs that run for milliseconds, so the compiler is told to
# work less: half the time of the whole run. Flags that are set already stay as they are: XLA_FLAGS= tests what users
# run.
# A flag that XLA does not know ends the process, so that another process tries them first.
_FLAGS = (
    "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true --xla_cpu_use_fusion_emitters=false"
)
if "XLA_FLAGS" not in os.environ:
    trial = subprocess.run(
        [sys.executable, "-c", "import jax; jax.devices()"], env=os.environ | {"XLA_FLAGS": _FLAGS}, capture_output=True
    )
    os.environ["XLA_FLAGS"] = "" if trial.returncode else _FLAGS

import jax  # noqa: E402

# Tests compile many programs twice: a new function object each time, or in another process. A cache on disk lets them
# share; it lies in pytest's own cache folder, and removing it is harmless.
jax.config.update("jax_compilation_cache_dir", os.path.join(os.path.dirname(__file__), "..", ".pytest_cache", "jax"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)


@pytest.fixture(autouse=True, scope="module")
def forget_what_other_files_compiled():
    """JAX keeps traced constants in the precision they were first used in: a file that computes in float64 would find
    the float32 ones of the file before it in the same process. Compiled programs come back from the cache on disk.
    """
    jax.clear_caches()


@pytest.fixture(autouse=True)
def forget_before_memory_maps_run_out():
    """Every compiled program takes memory maps, some five hundred a test with jax 0.12, and Linux allows a process
    65,530 of them; the compiler crashes at the next one.
    """
    yield
    try:
        with open("/proc/self/maps", "rb") as maps:
            num_maps = sum(block.count(b"\n") for block in iter(lambda: maps.read(1 << 20), b""))
    except OSError:  # no such limit elsewhere
        return
    if num_maps > 30_000:
        jax.clear_caches()
