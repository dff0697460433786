"""Gaussian kernels in a frame against multivariate normal laws, written out as matrices."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from rnejax.kernels import Gaussian
from rnejax.linear import Frame, apply

D = 6
RNG = np.random.default_rng(0)


@pytest.fixture(autouse=True)
def double_precision():
    with jax.enable_x64(True):
        yield


def make_frame(blocks, size, drift=True):
    """Coordinates of events of D entries in blocks of this size."""
    matrix = RNG.normal(size=(blocks, size, size)) + 2 * np.eye(size)
    change = 0.3 * RNG.normal(size=(blocks, size, size)) if drift else None
    arrays = (matrix, np.linalg.inv(matrix), np.linalg.slogdet(matrix)[1].sum())
    return Frame(*(jnp.asarray(each) for each in arrays), None if change is None else jnp.asarray(change))


FRAMES = {"dense": (1, 6), "blocks": (1, 2), "diagonal": (6, 1), "several blocks": (3, 2)}
every_frame = pytest.mark.parametrize("kind", FRAMES)


def law_in(frame, excess=0.0, basis=None, variance=None, anchor=None):
    b, k, _ = frame.matrix.shape
    view = (k, b, D // (b * k))
    variance = jnp.asarray(RNG.uniform(0.2, 2.0, (k, b, 1))) if variance is None else variance
    anchor = jnp.asarray(RNG.normal(size=D)) if anchor is None else anchor
    return Gaussian(anchor, jnp.asarray(RNG.normal(size=view)), variance, excess, basis, frame=frame)


def matrix_of(function):
    """A linear map of events as a matrix."""
    return np.asarray(jax.vmap(function, out_axes=1)(jnp.eye(D)))


def written_out(law):
    """Mean and covariance, from the definitions."""
    frame = law.frame
    view = frame.view(law.anchor).shape
    root = matrix_of(lambda x: apply(frame.matrix, x).reshape(-1))
    drift = np.zeros((D, D)) if frame.drift is None else matrix_of(lambda x: apply(frame.drift, x).reshape(-1))
    std = np.sqrt(np.broadcast_to(law.variance, view).reshape(-1))
    excess = np.broadcast_to(np.asarray(law.excess), (D,) if law.basis is not None else view).reshape(-1)
    basis = np.eye(D) if law.basis is None else np.asarray(law.basis)
    inner = np.eye(D) + basis * excess @ basis.T
    mean = law.anchor + drift @ np.asarray(law.anchor) + root @ np.broadcast_to(law.shift, view).reshape(-1)
    return mean, root @ (std[:, None] * inner * std) @ root.T


def dense_part():
    basis = np.linalg.qr(RNG.normal(size=(D, D)))[0]
    return jnp.asarray(RNG.uniform(-0.7, 1.5, D)), jnp.asarray(basis)


def variants(frame):
    """Isotropic, diagonal and dense excess in one frame."""
    view = (frame.matrix.shape[1], frame.matrix.shape[0], D // (frame.matrix.shape[0] * frame.matrix.shape[1]))
    diagonal = jnp.asarray(RNG.uniform(-0.5, 1, view))
    return [law_in(frame), law_in(frame, 0.4), law_in(frame, diagonal), law_in(frame, *dense_part())]


@every_frame
@pytest.mark.parametrize("drift", [True, False])
def test_density_mean_and_covariance_are_those_of_the_matrices(kind, drift):
    x = jnp.asarray(RNG.normal(size=D))
    for law in variants(make_frame(*FRAMES[kind], drift)):
        mean, covariance = written_out(law)
        np.testing.assert_allclose(law.mean, mean, rtol=1e-10)
        np.testing.assert_allclose(matrix_of(law.covariance_times), covariance, rtol=1e-9, atol=1e-10)
        exact = scipy.stats.multivariate_normal(mean, covariance).logpdf(x)
        np.testing.assert_allclose(law.log_prob(x), exact, rtol=1e-9)


@every_frame
def test_samples_have_the_mean_and_the_covariance(kind):
    law = law_in(make_frame(*FRAMES[kind]), *dense_part())
    n = 40_000
    draws = np.asarray(jax.vmap(law.sample)(jax.random.split(jax.random.key(1), n)))
    mean, covariance = written_out(law)
    variances = np.diag(covariance)
    assert np.abs((draws.mean(axis=0) - mean) / np.sqrt(variances / n)).max() < 4.5
    errors = np.sqrt((np.outer(variances, variances) + covariance**2) / n)
    assert np.abs((np.cov(draws.T) - covariance) / errors).max() < 4.5


@every_frame
@pytest.mark.parametrize("same_variance", [True, False])
@pytest.mark.parametrize("same_anchor", [True, False])
def test_ratios_are_differences_of_log_densities(kind, same_variance, same_anchor):
    frame, x = make_frame(*FRAMES[kind]), jnp.asarray(RNG.normal(size=D))
    laws = variants(frame)
    if same_variance:
        laws = [replace(law, variance=laws[0].variance) for law in laws]
    if same_anchor:
        laws = [replace(law, anchor=laws[0].anchor) for law in laws]
    for one in laws:
        for other in laws:
            expected = one.log_prob(x) - other.log_prob(x)
            np.testing.assert_allclose(one.log_ratio(other, x), expected, rtol=1e-8, atol=1e-9)


def test_laws_in_frames_that_differ_are_compared_all_the_same():
    x = jnp.asarray(RNG.normal(size=D))
    one, other, plain = law_in(make_frame(1, 6)), law_in(make_frame(1, 2)), Gaussian(x, 0.1 * x, jnp.asarray(0.7))
    for p, q in ((one, other), (one, plain), (plain, one)):
        np.testing.assert_allclose(p.log_ratio(q, x + 0.3), p.log_prob(x + 0.3) - q.log_prob(x + 0.3), rtol=1e-12)


@every_frame
def test_a_pull_is_the_covariance_applied_and_is_as_short_as_it_is_trusted(kind):
    vector = jnp.asarray(RNG.normal(size=D))
    for law in variants(make_frame(*FRAMES[kind])):
        moved = replace(law, shift=law.shift + law.pull(vector))
        np.testing.assert_allclose(moved.mean - law.mean, written_out(law)[1] @ vector, rtol=1e-8, atol=1e-10)
        divergence = 0.5 * vector @ written_out(law)[1] @ vector
        for trust in (0.1 * divergence, 10 * divergence):
            shorter = replace(law, shift=law.shift + law.pull(vector, float(trust)))
            step = shorter.mean - law.mean
            found = 0.5 * step @ np.linalg.solve(written_out(law)[1], step)
            np.testing.assert_allclose(found, min(trust, divergence), rtol=1e-6)


@every_frame
def test_what_is_known_of_a_draw_says_the_same_as_the_draw(kind):
    frame = make_frame(*FRAMES[kind])
    anchor, variance = jnp.asarray(RNG.normal(size=D)), None
    for same in (True, False):
        for law in variants(frame):
            law = replace(law, anchor=anchor)
            x, coordinates = law.draw(jax.random.key(0))
            np.testing.assert_array_equal(x, law.sample(jax.random.key(0)))
            variance = law.variance if same else None
            others = [law_in(frame, 0.3, variance=variance), law_in(frame, *dense_part(), variance=variance)]
            for other in [*others, *(replace(each, anchor=anchor) for each in others)]:
                np.testing.assert_allclose(
                    law.log_ratio(other, x, coordinates), law.log_ratio(other, x), rtol=1e-9, atol=1e-9
                )
