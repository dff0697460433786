"""Decompositions of several models at once, on a machine of two cores, where XLA can wait for itself for ever."""

import os
import subprocess
import sys

import pytest

PROGRAM = """
import jax, rnejax as rj
process = rj.processes.VariancePreserving()
def model(std):
    def score(x, t):  # linear, so that no decomposition depends on a state
        return -x / (process.alpha(t) ** 2 * std**2 + process.sigma(t) ** 2)
    return rj.DiffusionModel(process, score, "score", "full", shape=(6,))
target = {target}
for seed in range(3):
    result = rj.steer(jax.random.key(seed), target, rj.time_grid(process, 50), 2048, progress=False, warn=False)
    print(float(result.log_normalizer))
"""


@pytest.mark.parametrize(
    "target", ["rj.product([model(0.5), model(0.7), model(0.9)])", "rj.guide(model(0.9), model(0.6), 1.5)"]
)
def test_several_full_covariances_at_once_come_to_an_end(target):
    environment = os.environ | {"NPROC": "2", "JAX_PLATFORMS": "cpu"}  # NPROC: how many threads XLA takes
    program = PROGRAM.format(target=target)
    # Some ten seconds, or never.
    run = subprocess.run(
        [sys.executable, "-c", program], env=environment, timeout=240, capture_output=True, text=True, check=True
    )
    assert len(run.stdout.split()) == 3
