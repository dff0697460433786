"""Circulations: what each is built to do."""

import numpy as np
import pytest
import scipy.linalg

from rnejax.processes import NonReversible
from rnejax.regimes import optimal_skew, random_skew, rotation_skew


def precision(size):
    root = np.random.default_rng(size).normal(size=(size, size))
    return root @ root.T / size + 0.1 * np.eye(size)


def rates(size=32, ratio=25.0):
    """The fixed example of mathematics.md, section 8."""
    values = ratio ** (np.arange(size) / (size - 1))
    return values * size / values.sum()


@pytest.mark.parametrize("size", [2, 3, 32, 256])
def test_the_optimal_circulation_forgets_everything_at_the_mean_rate(size):
    matrix = precision(size)
    process = NonReversible(matrix, optimal_skew(matrix), t_max=1.0)
    np.testing.assert_allclose(process.eigenvalues.real, np.trace(matrix) / size, atol=1e-8)


def test_the_fixed_example():
    matrix = rates()
    skew = optimal_skew(matrix, basis=scipy.linalg.hadamard(32) / np.sqrt(32), values=np.arange(1, 33))
    process = NonReversible(matrix, skew, t_max=1.0)
    np.testing.assert_allclose(process.eigenvalues.real, 1.0, atol=1e-12)
    assert np.linalg.norm(skew, 2) == pytest.approx(35.05, abs=5e-3)
    assert np.abs(process.eigenvalues.imag).max() == pytest.approx(10.85, abs=5e-3)
    # Another V and another lambda are optimal, too, and other circulations.
    other = optimal_skew(matrix, values=np.linspace(1.0, 2.0, 32))
    np.testing.assert_allclose(NonReversible(matrix, other, t_max=1.0).eigenvalues.real, 1.0, atol=1e-10)
    assert np.abs(other - skew).max() > 1


def test_no_circulation_forgets_faster():
    matrix, gaps = rates(), []
    for strength in (1.0, 5.0, 50.0):
        gaps.append(NonReversible(matrix, random_skew(0, 32, strength), t_max=1.0).spectral_gap)
    assert matrix.min() < min(gaps)
    assert max(gaps) < 1


def test_a_random_circulation_has_the_strength_asked_for():
    skew = random_skew(3, 7, 2.5)
    np.testing.assert_array_equal(skew, -skew.T)
    assert np.linalg.norm(skew, 2) == pytest.approx(2.5)
    np.testing.assert_array_equal(skew, random_skew(3, 7, 2.5))


@pytest.mark.parametrize("size", [4, 5])
def test_rotations_pair_slow_with_fast_directions(size):
    matrix = precision(size)
    values = np.linalg.eigvalsh(matrix)
    strength = 0.3
    found = NonReversible(matrix, rotation_skew(matrix, strength), t_max=1.0).eigenvalues
    expected = []
    for slow, fast in zip(values[: size // 2], values[::-1][: size // 2], strict=True):
        root = np.emath.sqrt((fast - slow) ** 2 / 4 - strength**2 * slow * fast)
        expected += [(slow + fast) / 2 + root, (slow + fast) / 2 - root]
    expected += [values[size // 2]] * (size % 2)
    np.testing.assert_allclose(np.sort_complex(found), np.sort_complex(np.array(expected, complex)), atol=1e-8)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: optimal_skew([[1.0, 0.5], [0.0, 1.0]]), "precision must be symmetric: .* is 0.5"),
        (lambda: optimal_skew([1.0, -1.0]), "precision must be positive definite: .* is -1"),
        (lambda: optimal_skew(np.ones((2, 3))), "square matrix or its diagonal"),
        (lambda: optimal_skew([1.0, 3.0], basis=np.eye(2)), "equal tr.U. / d = 2: the largest difference is 1"),
        (lambda: optimal_skew([1.0, 3.0], basis=2 * np.eye(2)), r"orthonormal: \|V\^T V - I\| is 3"),
        (lambda: optimal_skew([1.0, 3.0], basis=np.eye(3)), "sizes differ: precision 2, basis"),
        (lambda: optimal_skew([1.0, 3.0], values=[1.0, 1.0]), "positive and distinct"),
        (lambda: optimal_skew([1.0, 3.0], values=[1.0]), "sizes differ: precision 2, values"),
        (lambda: random_skew(0, 3, -1.0), "strength must be positive"),
        (lambda: random_skew(0, 1, 1.0), "size must be at least 2"),
    ],
)
def test_what_makes_no_circulation_is_refused(make, words):
    with pytest.raises(ValueError, match=words):
        make()
