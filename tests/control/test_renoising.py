"""Going up again, and candidates, for numbers that diffuse: the same code as for tokens, against closed forms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rnejax as rj

KEY = jax.random.key(0)
QUIET = {"warn": False, "progress": False}
PROCESS = rj.processes.VariancePreserving(data_std=1.3)
TIMES = rj.time_grid(PROCESS, 12)


def reference_model(dimension=3):
    """Of data that are the reference, N(0, data_std^2 I): all kernels are exact."""
    level = PROCESS.level
    return rj.DiffusionModel(PROCESS, lambda x, t: level(t).reference_gain * x, "x0", shape=(dimension,))


@pytest.mark.parametrize("renoise", [None, lambda t: min(1.0, 1.5 * t)], ids=["down", "up"])
@pytest.mark.parametrize("beta", [1.0, 2.0])
def test_going_up_again_keeps_the_target_of_numbers(beta, renoise):
    """p^beta of a Gaussian that is the reference: log Z is exact in every run, and the variance is right over 200."""
    model = reference_model()
    times = rj.time_grid(PROCESS, 12)
    variance = float(PROCESS.level(times[0]).reference_variance)
    log_z = 1.5 * ((1 - beta) * np.log(2 * np.pi * variance) - np.log(beta))
    options = {"num_groups": 200, "renoise": renoise, **QUIET}
    result = rj.steer(KEY, rj.temper(model, beta), times, 32, 0.5, (1.0, 0.0), **options)
    log_normalizer = np.asarray(result.log_normalizer, np.float64) - log_z
    # The reference's own tempered kernels are each other's reversal, up as well as down: every weight is the same.
    np.testing.assert_allclose(log_normalizer, 0, atol=1e-4)
    weights = np.exp(np.asarray(result.log_weights, np.float64) + log_normalizer[:, None])
    squares = (weights * np.sum(np.square(np.asarray(result.particles)), axis=-1)).mean(axis=1)
    assert abs(squares.mean() - 3 * variance / beta) < 4 * squares.std(ddof=1) / np.sqrt(200)


@pytest.mark.parametrize("renoise", [None, lambda t: min(1.0, 1.5 * t)], ids=["down", "up"])
@pytest.mark.parametrize("count", [1, 5])
def test_candidates_of_numbers_have_the_tilted_law(count, renoise):
    """r = b . x under N(0, V I): log E[e^r] = V |b|^2 / 2 and mean V b, over 300 runs of 16 particles."""
    b = jnp.asarray([0.6, -0.4, 0.2])
    model = reference_model()
    variance = float(PROCESS.level(TIMES[0]).reference_variance)
    target = rj.tilt(model, lambda x: jnp.sum(b * x), gradient=False)
    proposal = rj.control.Candidates(count, rj.control.Drift((1.0, 0.0)))
    options = {"num_groups": 300, "renoise": renoise, **QUIET}
    result = rj.steer(KEY, target, TIMES, 16, 0.5, proposal, **options)
    log_normalizer = np.asarray(result.log_normalizer, np.float64) - 0.5 * variance * float(jnp.sum(b**2))
    z = np.exp(log_normalizer)
    assert abs(z.mean() - 1) < 4 * z.std(ddof=1) / np.sqrt(300)
    weights = np.exp(np.asarray(result.log_weights, np.float64) + log_normalizer[:, None])
    means = np.einsum("gn,gnk->gk", weights, np.asarray(result.particles)) / 16
    wanted = variance * np.asarray(b)
    assert np.all(np.abs(means.mean(axis=0) - wanted) < 4.5 * means.std(axis=0, ddof=1) / np.sqrt(300))


@pytest.mark.parametrize("proposal", [(1.0, 0.0), rj.control.Candidates(3, rj.control.Drift((1.0, 0.0)))])
def test_a_mixture_that_is_tempered_on_the_way_up_and_down_keeps_its_normaliser(proposal):
    """p^2 of a mixture with exact scores and covariances, whose integral is known: exp(log Z) over 200 runs."""
    mixture = rj.systems.GaussianMixture(jnp.asarray([[-1.0], [0.8]]), 0.5)
    process = rj.processes.VariancePreserving()
    times = rj.time_grid(process, 100)
    noised = mixture.noised(process.level(times[0]))
    _, exact = noised.product(noised)
    options = {"num_groups": 200, "renoise": lambda t: min(1.0, 1.1 * t), **QUIET}
    target = rj.temper(mixture.model(process, covariance="full"), 2.0)
    result = rj.steer(KEY, target, times, 64, 0.5, proposal, **options)
    z = np.exp(np.asarray(result.log_normalizer, np.float64) - exact)
    assert abs(z.mean() - 1) < 4 * z.std(ddof=1) / np.sqrt(200)


def test_more_candidates_make_weights_more_even():
    b = jnp.asarray([1.5, -1.0, 0.5])
    target = rj.tilt(reference_model(), lambda x: jnp.sum(b * x), gradient=False)
    spreads = []
    for count in (1, 16):
        proposal = rj.control.Candidates(count, rj.control.Drift((1.0, 0.0)))
        result = rj.steer(KEY, target, TIMES, 64, 0.5, proposal, num_groups=100, **QUIET)
        spreads.append(float(np.std(np.asarray(result.log_normalizer))))
    assert spreads[1] < 0.7 * spreads[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"renoise": lambda t: t}, None),
        ({"renoise": lambda t: min(1.0, 2 * t)}, "renoise needs exponents that are constant"),
        ({"proposal": rj.control.Candidates(4, rj.control.Drift())}, "candidates are chosen before"),
        ({"proposal": "feynman_kac", "renoise": lambda t: min(1.0, 2 * t)}, "renoise needs"),
    ],
)
def test_auxiliary_kernels_that_look_back_are_refused(options, message):
    target = rj.temper(reference_model(), 2.0)
    if message is None:
        rj.steer(KEY, target, TIMES, 8, **options, **QUIET)
        return
    with pytest.raises(ValueError, match=message):
        rj.steer(KEY, target, TIMES, 8, **options, **QUIET)


def test_a_candidate_is_one_at_least():
    with pytest.raises(ValueError, match="num_candidates must be at least 1"):
        rj.control.Candidates(0)
