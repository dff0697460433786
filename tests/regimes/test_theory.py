"""Speciation and collapse times against the numbers of mathematics.md, section 8, and closed forms."""

import numpy as np
import pytest
import scipy.linalg
import scipy.stats
from test_skew import rates

from rnejax.processes import Cosine, LinearSDE, Masked, NonReversible, VarianceExploding
from rnejax.regimes import (
    class_separation,
    collapse_time,
    optimal_skew,
    random_skew,
    same_class_probability,
    speciation_time,
)

SIZE = 32
RATES = rates()
OPTIMAL = optimal_skew(RATES, basis=scipy.linalg.hadamard(SIZE) / np.sqrt(SIZE))
DIRECTIONS = {"slowest": np.eye(SIZE)[0], "uniform": np.ones(SIZE) / np.sqrt(SIZE), "fastest": np.eye(SIZE)[-1]}
ORNSTEIN_UHLENBECK = LinearSDE(1.0)


@pytest.mark.parametrize(
    ("skew", "direction", "expected"),
    [
        (None, "slowest", 6.1901), (None, "uniform", 2.9382), (None, "fastest", 0.7070),
        (OPTIMAL, "slowest", 0.9505), (OPTIMAL, "uniform", 2.5794), (OPTIMAL, "fastest", 2.4411),
    ],
)  # fmt: skip
def test_speciation_times_of_the_fixed_example(skew, direction, expected):
    process = NonReversible(RATES, skew)
    found = speciation_time(process, np.sqrt(SIZE) * DIRECTIONS[direction], 1.0)
    assert found == pytest.approx(expected, abs=5e-5)
    assert class_separation(process, found, np.sqrt(SIZE) * DIRECTIONS[direction], 1.0) == pytest.approx(1)


@pytest.mark.parametrize(
    ("skew", "num", "isotropic", "stationary"),
    [
        (None, 10**2, 0.7596, 1.6015), (None, 10**4, 0.4224, 0.8095), (None, 10**8, 0.1902, 0.3237),
        (OPTIMAL, 10**2, 0.8197, 0.9018), (OPTIMAL, 10**4, 0.4573, 0.5865), (OPTIMAL, 10**8, 0.1913, 0.2926),
    ],
)  # fmt: skip
def test_collapse_times_of_the_fixed_example(skew, num, isotropic, stationary):
    process = NonReversible(RATES, skew)
    assert collapse_time(process, num, 1.0) == pytest.approx(isotropic, abs=5e-5)
    assert collapse_time(process, num, 1 / RATES) == pytest.approx(stationary, abs=5e-5)


@pytest.mark.parametrize("skew", [random_skew(0, 4, 3.0), optimal_skew(np.diag([0.5, 1.0, 1.5, 2.0]))])
def test_a_circulation_changes_nothing_where_all_is_isotropic(skew):
    mean = np.array([1.5, -1.0, 0.5, 2.0])
    found = [NonReversible(np.ones(4), q) for q in (None, skew)]
    for call in (
        lambda process: speciation_time(process, mean, 0.7),
        lambda process: speciation_time(process, data_covariance=3.0 * np.ones(4)),
        lambda process: collapse_time(process, 100, 0.7),
    ):
        assert call(found[0]) == pytest.approx(call(found[1]), rel=1e-9)


@pytest.mark.parametrize(("dimension", "published"), [(256, 1.299), (1024, 1.978), (4096, 2.667)])
def test_published_collapse_times_of_isotropic_data(dimension, published):
    found = collapse_time(ORNSTEIN_UHLENBECK, 20_000, np.ones(dimension))
    assert found == pytest.approx(published, abs=5e-4)
    assert found == pytest.approx(0.5 * np.log(1 + 1 / (20_000 ** (2 / dimension) - 1)), rel=1e-9)


def test_isotropic_classes_part_where_their_distance_is_the_noise():
    # alpha^2 |m|^2 = sigma^2 + alpha^2 c.
    mean, c = np.array([2.0, 1.0]), 0.5
    for process in (Cosine(), VarianceExploding(), ORNSTEIN_UHLENBECK):
        t = speciation_time(process, mean, c)
        moments = process.moments(t)
        alpha, noise = float(moments.signal[0, 0, 0]), float(moments.noise[0, 0, 0])
        assert alpha**2 * 5.0 == pytest.approx(noise + alpha**2 * c)
    # exp(-2 t) lambda = 1 - exp(-2 t) for the covariance criterion: t = log(1 + lambda) / 2.
    found = speciation_time(ORNSTEIN_UHLENBECK, data_covariance=[3.0, 1.0])
    assert found == pytest.approx(0.5 * np.log(4))


def test_scalar_processes_and_the_same_ones_as_matrices_agree():
    scalar, matrix = LinearSDE(1.0), LinearSDE(np.eye(3), np.sqrt(2.0))
    rng = np.random.default_rng(0)
    root = rng.normal(size=(3, 3))
    covariance, mean = root @ root.T + 0.3 * np.eye(3), np.array([2.0, -1.0, 0.5])
    for call in (
        lambda process: speciation_time(process, 3 * mean, covariance),
        lambda process: speciation_time(process, data_covariance=covariance),
        lambda process: collapse_time(process, 50, covariance),
        lambda process: class_separation(process, [0.1, 0.5], mean, covariance),
    ):
        np.testing.assert_allclose(call(scalar), call(matrix), rtol=1e-9)


def test_the_last_time_counts_where_a_circulation_turns_the_class_direction():
    # A slow rotation of fast and slow directions: the separation oscillates around 1 before it goes for good.
    process = NonReversible([0.3, 3.0], [[0.0, 20.0], [-20.0, 0.0]])
    mean = np.array([0.0, 4.0])
    t = speciation_time(process, mean, 1.0)
    later = np.linspace(1.001 * t, process.t_max, 300)
    assert class_separation(process, later, mean, 1.0).max() < 1
    assert class_separation(process, [0.999 * t], mean, 1.0) > 1


def test_clones_of_two_gaussian_classes_by_the_integral_over_states():
    s = np.array([0.3, 1.0, 2.5])
    y = np.linspace(-12, 15, 40_001)
    p = 1 / (1 + np.exp(-2 * s[:, None] * y))
    density = 0.5 * (scipy.stats.norm.pdf(y - s[:, None]) + scipy.stats.norm.pdf(y + s[:, None]))
    expected = np.trapezoid((p**2 + (1 - p) ** 2) * density, y, axis=1)
    np.testing.assert_allclose(same_class_probability(s), expected, rtol=1e-6)
    np.testing.assert_allclose(same_class_probability([0.0, 1.0, 40.0]), [0.5, 0.7752, 1.0], atol=1e-5)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: speciation_time(ORNSTEIN_UHLENBECK), "class_mean .* or data_covariance, and not both"),
        (lambda: speciation_time(ORNSTEIN_UHLENBECK, [1.0], 1.0, data_covariance=[1.0]), "and not both"),
        (lambda: speciation_time(ORNSTEIN_UHLENBECK, [1.0]), "need their within_covariance"),
        (lambda: speciation_time(ORNSTEIN_UHLENBECK, [0.1], 1.0), "is nowhere above 1: it is 0.0999"),
        (
            lambda: speciation_time(ORNSTEIN_UHLENBECK, [0.0, 0.0], 1.0),
            "class_mean is zero: both classes have the same",
        ),
        (lambda: speciation_time(LinearSDE(-1.0, 1.0, t_max=1.0), [9.0], 1.0), "s_t is still .* > 1 at t = "),
        (lambda: speciation_time(NonReversible(RATES), np.ones(3), 1.0), "acts on 32 coordinates, the data have 3"),
        (lambda: class_separation(ORNSTEIN_UHLENBECK, 0.1, [1.0, 2.0], np.ones(3)), r"number, \(2,\) or \(2, 2\)"),
        (lambda: class_separation(ORNSTEIN_UHLENBECK, 0.1, [1.0], -1.0), "positive definite: .* is -1"),
        (lambda: class_separation(ORNSTEIN_UHLENBECK, 0.1, 1.0, 1.0), "vector of finite numbers"),
        (lambda: collapse_time(ORNSTEIN_UHLENBECK, 1, [1.0]), "one training point .* at least 2"),
        (lambda: collapse_time(ORNSTEIN_UHLENBECK, 10, 1.0), "how many dimensions there are"),
        (lambda: collapse_time(ORNSTEIN_UHLENBECK, 10, [[1.0, 0.5], [0.0, 1.0]]), r"symmetric: \|C - C\^T\| is 0.5"),
        (lambda: collapse_time(Masked(3, 4), 10, [1.0]), "are tokens, which have no mean"),
    ],
)
def test_what_has_no_answer_is_refused(call, words):
    with pytest.raises(ValueError, match=words):
        call()
