"""Time grids: increasing, from end to end, uniform in what they say they are; times that are no grid."""

import numpy as np
import pytest

import rnejax as rj
from rnejax.processes import Cosine, DiscreteVariancePreserving, RectifiedFlow, VarianceExploding, VariancePreserving
from rnejax.processes.grids import validate_times

PROCESSES = [
    VariancePreserving(),
    Cosine(),
    RectifiedFlow(),
    VarianceExploding(),
    DiscreteVariancePreserving(np.linspace(1e-4, 0.02, 1000)),
]


@pytest.mark.parametrize("process", PROCESSES, ids=lambda process: type(process).__name__)
@pytest.mark.parametrize("kind", [None, *rj.processes.GaussianProcess.grids])
def test_a_grid_increases_from_end_to_end(process, kind):
    times = rj.time_grid(process, 17, kind)
    assert times.shape == (18,)
    assert times.dtype == np.float64
    assert np.all(np.diff(times) > 0)
    assert (times[0], times[-1]) == (process.t_min, process.t_max)


@pytest.mark.parametrize(
    ("kind", "coordinate"),
    [
        ("uniform", lambda process, t: t),
        ("quadratic", lambda process, t: np.sqrt(t)),
        ("edm", lambda process, t: (process.sigma(t) / process.alpha(t)) ** (1 / 7)),
        ("log_snr", lambda process, t: np.log(process.alpha(t) / process.sigma(t))),
    ],
)
@pytest.mark.parametrize("process", PROCESSES[:-1], ids=lambda process: type(process).__name__)
def test_a_grid_is_uniform_in_its_coordinate(process, kind, coordinate):
    steps = np.diff(coordinate(process, rj.time_grid(process, 25, kind)))
    np.testing.assert_allclose(steps, steps.mean(), rtol=1e-6)


def test_the_edm_grid_is_that_of_the_paper():
    # Karras et al. 2022, eq. 5:
    # sigma_i = (sigma_max^(1/rho) + i / (n - 1) (sigma_min^(1/rho) - sigma_max^(1/rho)))^rho.
    process, n, rho = VarianceExploding(sigma_min=0.002, sigma_max=80.0), 18, 7.0
    ends = 80.0 ** (1 / rho), 0.002 ** (1 / rho)
    paper = (ends[0] + np.arange(n) / (n - 1) * (ends[1] - ends[0])) ** rho
    np.testing.assert_allclose(rj.time_grid(process, n - 1), paper[::-1], rtol=1e-9)


def test_another_range_may_be_asked_for():
    times = rj.time_grid(VariancePreserving(), 4, t_min=0.01, t_max=0.5)
    assert (times[0], times[-1]) == (0.01, 0.5)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"num_steps": 0}, "num_steps must be at least 1, got 0"),
        ({"num_steps": 4, "kind": "karras"}, "unknown grid 'karras'.*uniform, quadratic, edm, log_snr"),
        ({"num_steps": 4, "t_min": 0.8, "t_max": 0.2}, "increase strictly"),
        ({"num_steps": 4, "t_max": 1.5}, r"must lie in \[0, 1\], the domain of RectifiedFlow"),
        ({"num_steps": 4, "t_max": 1.0, "kind": "edm"}, r"needs noise and signal at both ends.*alpha = 0"),
    ],
)
def test_grids_that_cannot_be_are_refused(arguments, words):
    with pytest.raises(ValueError, match=words):
        rj.time_grid(RectifiedFlow(), **arguments)


@pytest.mark.parametrize(
    ("times", "words"),
    [
        ([0.5], r"two or more times, got shape \(1,\)"),
        ([[0.1, 0.5]], r"got shape \(1, 2\)"),
        ([0.1, np.nan, 0.5], "finite; entry 1 is not"),
        ([0.1, 0.3, 0.3], r"times\[1\] = 0.3 >= times\[2\] = 0.3"),
        ([0.9, 0.5, 0.1], "from data to noise: reverse them"),
        ([-0.1, 0.5], r"must lie in \[0, 1\].*VariancePreserving, got \[-0.1, 0.5\]"),
    ],
)
def test_times_that_are_no_grid_are_refused(times, words):
    with pytest.raises(ValueError, match=words):
        validate_times(VariancePreserving(), times)
