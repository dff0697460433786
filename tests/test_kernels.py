"""Gaussian kernels: densities against scipy, log-ratios without cancellation, subspaces and their dimension."""

from functools import partial
from itertools import product

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.stats import multivariate_normal

from rnejax.kernels import CentreOfMassFree, FullSpace, Gaussian, Kernel, LinearSubspace

SHAPE = (2, 2)
D = 4
KINDS = ("isotropic", "diagonal", "dense")
PAIRS = list(product(KINDS, KINDS))
PLANE = LinearSubspace(np.linalg.qr(np.random.default_rng(3).normal(size=(D, 2)))[0].T)


def kernel(kind, rng, subspace=None, dtype=np.float64):
    """A kernel with a random mean and covariance; its eigenvalues are within a factor 4 of each other."""
    subspace = FullSpace() if subspace is None else subspace
    anchor, shift = (np.asarray(subspace.project(jnp.asarray(rng.normal(size=SHAPE)))) for _ in range(2))
    variance, excess, basis = rng.uniform(0.5, 1.5), rng.uniform(-0.4, 0.6), None
    if kind == "diagonal":
        excess = rng.uniform(-0.4, 0.6, SHAPE)
    if kind == "dense":
        matrix = rng.normal(size=(D, D)) / D
        matrix = np.stack([np.asarray(subspace.project(jnp.asarray(row.reshape(SHAPE)))).ravel() for row in matrix])
        excess, basis = np.linalg.eigh(matrix.T @ matrix)
    cast = partial(jnp.asarray, dtype=dtype)
    return Gaussian(
        cast(anchor), cast(shift), cast(variance), cast(excess), None if basis is None else cast(basis), subspace
    )


def dense_law(k, basis=None):
    """The same law in numpy, in the coordinates of the orthonormal rows of ``basis``: mean and covariance."""
    excess = np.broadcast_to(np.asarray(k.excess), SHAPE).ravel() if k.basis is None else np.asarray(k.excess)
    vectors = np.eye(D) if k.basis is None else np.asarray(k.basis)
    covariance = float(k.variance) * (vectors * (1 + excess)) @ vectors.T
    basis = np.eye(D) if basis is None else basis
    return basis @ np.asarray(k.mean).ravel(), basis @ covariance @ basis.T


@pytest.fixture(autouse=True)
def double_precision():
    with jax.enable_x64(True):
        yield


# ------------------------------------------------------------------------------------------------------- densities


@pytest.mark.parametrize("kind", KINDS)
def test_log_prob_is_the_density(kind):
    rng = np.random.default_rng(1)
    k, x = kernel(kind, rng), rng.normal(size=SHAPE)
    np.testing.assert_allclose(k.log_prob(x), multivariate_normal.logpdf(x.ravel(), *dense_law(k)), rtol=1e-12)


@pytest.mark.parametrize("kind", ["isotropic", "dense"])
def test_on_a_subspace_the_density_is_that_in_orthonormal_coordinates(kind):
    rng = np.random.default_rng(2)
    k = kernel(kind, rng, PLANE)
    x = np.asarray(PLANE.project(jnp.asarray(rng.normal(size=SHAPE))))
    exact = multivariate_normal.logpdf(PLANE.basis @ x.ravel(), *dense_law(k, PLANE.basis))
    np.testing.assert_allclose(k.log_prob(x), exact, rtol=1e-12)


def test_without_a_centre_of_mass_a_density_has_three_dimensions_less():
    # Helmert's contrasts: an orthonormal basis of the atoms' relative positions.
    atoms, rng = 5, np.random.default_rng(4)
    contrasts = np.linalg.qr(np.eye(atoms) - 1 / atoms)[0][:, : atoms - 1].T
    mean, x = (v - v.mean(axis=0) for v in rng.normal(size=(2, atoms, 3)))
    k = Gaussian(jnp.asarray(mean), jnp.zeros((atoms, 3)), jnp.asarray(0.3), subspace=CentreOfMassFree())
    exact = multivariate_normal.logpdf((contrasts @ (x - mean)).ravel(), cov=0.3 * np.eye(3 * (atoms - 1)))
    np.testing.assert_allclose(k.log_prob(x), exact, rtol=1e-12)
    assert CentreOfMassFree().dimension((atoms, 3)) == 3 * (atoms - 1)


@pytest.mark.parametrize(("kind", "subspace"), [*((kind, FullSpace()) for kind in KINDS), ("dense", PLANE)])
def test_samples_have_the_mean_and_covariance(kind, subspace):
    n, k = 40_000, kernel(kind, np.random.default_rng(5), subspace)
    draws = np.asarray(jax.vmap(k.sample)(jax.random.split(jax.random.key(0), n))).reshape(n, -1)
    mean, covariance = dense_law(k, subspace.basis if subspace is PLANE else None)
    if subspace is PLANE:
        np.testing.assert_allclose(draws, draws @ PLANE.basis.T @ PLANE.basis, atol=1e-12)
        draws = draws @ PLANE.basis.T
    z = (draws.mean(axis=0) - mean) / np.sqrt(np.diag(covariance) / n)
    assert np.abs(z).max() < 4.5
    # Var of a sample covariance: (C_ij^2 + C_ii C_jj) / n.
    error = np.sqrt((covariance**2 + np.outer(np.diag(covariance), np.diag(covariance))) / n)
    assert (np.abs(np.cov(draws.T) - covariance) / error).max() < 4.5


@pytest.mark.parametrize("kind", KINDS)
def test_covariance_times_is_the_covariance(kind):
    rng = np.random.default_rng(6)
    k, vector = kernel(kind, rng), rng.normal(size=SHAPE)
    np.testing.assert_allclose(k.covariance_times(vector).ravel(), dense_law(k)[1] @ vector.ravel(), rtol=1e-12)


def test_scaling_scales_the_covariance():
    k = kernel("dense", np.random.default_rng(7))
    np.testing.assert_allclose(dense_law(k.scale_covariance(3.0))[1], 3 * dense_law(k)[1])


# ------------------------------------------------------------------------------------------------------ log-ratios


@pytest.mark.parametrize("pair", PAIRS, ids="-".join)
def test_log_ratio_is_the_difference_of_log_densities(pair):
    rng = np.random.default_rng(8)
    (p, q), x = (kernel(kind, rng) for kind in pair), rng.normal(size=SHAPE)
    np.testing.assert_allclose(p.log_ratio(q, x), p.log_prob(x) - q.log_prob(x), rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("pair", list(product(["isotropic", "dense"], repeat=2)), ids="-".join)
def test_log_ratio_on_a_subspace_counts_only_its_dimensions(pair):
    rng = np.random.default_rng(9)
    p, q = (kernel(kind, rng, PLANE) for kind in pair)
    x = np.asarray(PLANE.project(jnp.asarray(rng.normal(size=SHAPE))))
    exact = [multivariate_normal.logpdf(PLANE.basis @ x.ravel(), *dense_law(k, PLANE.basis)) for k in (p, q)]
    np.testing.assert_allclose(p.log_ratio(q, x), exact[0] - exact[1], rtol=1e-11, atol=1e-12)


with jax.enable_x64(True):
    KERNELS = {kind: [kernel(kind, np.random.default_rng(seed)) for seed in (20, 21, 22)] for kind in KINDS}


def triple(kinds, numbers):
    """Three kernels and a point from a vector of numbers in [-2, 2]."""
    moved = [
        Gaussian(k.anchor, k.shift + numbers[i], k.variance * jnp.exp(numbers[3 + i]), k.excess, k.basis)
        for i, k in enumerate(KERNELS[kind][i] for i, kind in enumerate(kinds))
    ]
    return *moved, numbers[6:].reshape(SHAPE)


@partial(jax.jit, static_argnums=0)
def identities(kinds, numbers):
    """What must vanish (antisymmetry, the chain rule, the ratio of a kernel to itself), and the scale of its terms."""
    p, q, r, x = triple(kinds, numbers)
    terms = p.log_ratio(q, x), q.log_ratio(r, x), p.log_ratio(r, x)
    vanish = terms[0] + q.log_ratio(p, x), terms[0] + terms[1] - terms[2], p.log_ratio(p, x)
    return jnp.stack(vanish), sum(jnp.abs(k.log_prob(x)) for k in (p, q, r)) + 1


NUMBERS = arrays(np.float64, 10, elements=st.floats(-2, 2))


@settings(max_examples=40, deadline=None)
@given(
    kinds=st.sampled_from([KINDS, ("dense", "dense", "diagonal"), ("diagonal", "isotropic", "dense")]), numbers=NUMBERS
)
def test_log_ratios_are_antisymmetric_add_up_and_vanish_for_equal_kernels(kinds, numbers):
    vanish, scale = identities(kinds, numbers)
    np.testing.assert_allclose(vanish, 0, atol=1e-12 * float(scale))


@pytest.mark.parametrize("kind", KINDS)
def test_a_kernel_over_itself_is_exactly_zero(kind):
    rng = np.random.default_rng(11)
    k, x = kernel(kind, rng, dtype=np.float32), jnp.asarray(rng.normal(size=SHAPE), jnp.float32)
    assert k.log_ratio(k, x) == 0


@pytest.mark.parametrize("pair", PAIRS, ids="-".join)
def test_a_density_ratio_has_mean_one(pair):
    rng = np.random.default_rng(12)
    p, q = (kernel(kind, rng) for kind in pair)
    # Twice the variance for q, so that the ratio has a second moment and a standard error; means close together.
    q = Gaussian(p.anchor, p.shift + 0.3, 4 * q.variance, q.excess, q.basis)
    x = jax.vmap(q.sample)(jax.random.split(jax.random.key(1), 20_000))
    ratio = np.exp(np.asarray(jax.vmap(lambda x: p.log_ratio(q, x))(x)))
    assert abs(ratio.mean() - 1) < 4 * ratio.std(ddof=1) / np.sqrt(len(ratio))


@pytest.mark.parametrize("kind", ["isotropic", "diagonal"])
def test_in_single_precision_close_kernels_keep_their_digits(kind):
    # 10^4 coordinates around 1e3, a step of 1e-2, kernels that differ by 1e-4 of it. Each log-density is 3e4 and known
    # to 2e-3 at best; a mean formed as anchor + shift is rounded to 6e-5, far more than the difference of 1e-6.
    rng, shape = np.random.default_rng(13), (10_000,)
    anchor = (1e3 * rng.normal(size=shape)).astype(np.float32)
    shift = (1e-2 * rng.normal(size=shape)).astype(np.float32)
    moved = (shift + 1e-6 * rng.normal(size=shape)).astype(np.float32)
    excess = (rng.uniform(-0.4, 0.6, shape if kind == "diagonal" else ())).astype(np.float32)
    x = (anchor + 1e-2 * rng.normal(size=shape)).astype(np.float32)

    def ratio(dtype):
        cast = partial(jnp.asarray, dtype=dtype)
        p = Gaussian(cast(anchor), cast(moved), cast(np.float32(1e-4)), cast(excess * np.float32(1.0001)))
        q = Gaussian(cast(anchor), cast(shift), cast(np.float32(1e-4)), cast(excess))
        return float(p.log_ratio(q, cast(x)))

    # 10^4 terms of magnitude 1e-4, each with a few roundings of 6e-8.
    assert abs(ratio(np.float32) - ratio(np.float64)) < 1e-6


# ------------------------------------------------------------------------------------------ the rest of the contract


@pytest.mark.parametrize("kind", KINDS)
def test_a_kernel_is_a_pytree_that_maps_and_compiles(kind):
    rng = np.random.default_rng(14)
    kernels = [kernel(kind, rng) for _ in range(3)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *kernels)
    x = jnp.asarray(rng.normal(size=(3, *SHAPE)))
    mapped = jax.jit(jax.vmap(lambda k, x: k.log_prob(x)))(stacked, x)
    np.testing.assert_allclose(mapped, [k.log_prob(x) for k, x in zip(kernels, x, strict=True)], rtol=1e-12)
    assert isinstance(kernels[0], Kernel)


def test_a_basis_that_is_not_orthonormal_is_refused():
    with pytest.raises(ValueError, match=r"orthonormal.*numpy\.linalg\.qr"):
        LinearSubspace(np.array([[1.0, 1.0, 0.0]]))


def test_a_subspace_refuses_events_of_another_size():
    with pytest.raises(ValueError, match=r"4 dimensions.*\(5,\)"):
        PLANE.dimension((5,))
    with pytest.raises(ValueError, match=r"\(atoms, space\), got \(12,\)"):
        CentreOfMassFree().dimension((12,))


@settings(max_examples=20, deadline=None)
@given(x=arrays(np.float64, SHAPE, elements=st.floats(-1e3, 1e3)))
def test_projections_project(x):
    for subspace in (PLANE, CentreOfMassFree(), FullSpace()):
        once = subspace.project(jnp.asarray(x))
        np.testing.assert_allclose(subspace.project(once), once, atol=1e-9)
        # What is taken away is orthogonal to what is left.
        np.testing.assert_allclose(jnp.sum((x - once) * once), 0, atol=1e-6)
