"""RNE increments: exact where the kernels are, and each named form as its formula says."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from closed_forms import GAUSSIAN, MIXTURE, PROCESSES

import rnejax as rj
from rnejax.increments import ESTIMATORS, transitions
from rnejax.processes import VarianceExploding, VariancePreserving


def pairs(process, num=40):
    """Noising pairs (s, t, x_s, x_t) with steps from tiny to the whole range."""
    rng = np.random.default_rng(0)
    low, high = np.log(process.t_min), np.log(process.t_max)
    s, t = np.exp(low + np.sort(rng.uniform(size=(num, 2)), axis=1) * (high - low)).T
    s[0], t[0] = process.t_min, process.t_max
    x0 = np.asarray(GAUSSIAN.sample(jax.random.key(1), num))
    x_s = process.alpha(s)[:, None] * x0 + process.sigma(s)[:, None] * rng.normal(size=(num, 3))
    step = process.transition(s, t)
    x_t = np.asarray(step.decay)[:, None] * x_s + np.sqrt(step.variance)[:, None] * rng.normal(size=(num, 3))
    return s, t, x_s, x_t


@pytest.mark.parametrize(("double", "tolerance"), [(True, 1e-9), (False, 1e-3)], ids=["double", "single"])
@pytest.mark.parametrize("process", PROCESSES, ids=lambda process: type(process).__name__)
def test_for_gaussian_data_and_full_covariance_an_increment_is_exact_for_every_pair(process, double, tolerance):
    with jax.enable_x64(True):
        s, t, x_s, x_t = (jnp.asarray(v) for v in pairs(process))
        truth = jax.jit(jax.vmap(partial(GAUSSIAN.log_density, process)))
        exact = truth(x_s, s) - truth(x_t, t)
        steps = process.transition(np.asarray(s), np.asarray(t))
    with jax.enable_x64(double):
        dtype = jnp.result_type(float)
        model = GAUSSIAN.model(process, "x0", "full")
        x_s, x_t, steps = jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf, dtype)), (x_s, x_t, steps))

        @jax.jit
        @jax.vmap
        def per_pair(step, x_s, x_t):
            evaluation = model._evaluate_one(x_t, step.t, None)
            return rj.increments.reference_difference(process, step, x_s, x_t) + ESTIMATORS["exact"](
                model, step, x_s, x_t, evaluation
            )

        np.testing.assert_allclose(per_pair(steps, x_s, x_t), exact, atol=tolerance)


def increment(model, x_s, x_t, s, t, estimator=None):
    """The public function, compiled: many small operations one by one take seconds."""
    return jax.jit(lambda x_s, x_t: rj.increment(model, x_s, x_t, s, t, estimator))(jnp.asarray(x_s), jnp.asarray(x_t))


def test_one_pair_is_the_same_through_the_public_function():
    process = VariancePreserving()
    model = GAUSSIAN.model(process, "x0", "full")
    s, t, x_s, x_t = (v[3] for v in pairs(process))
    truth = jax.jit(partial(GAUSSIAN.log_density, process))
    np.testing.assert_allclose(increment(model, x_s, x_t, s, t), truth(x_s, s) - truth(x_t, t), atol=1e-3)


def normal_log_density(x, mean, variance):
    return float(-0.5 * np.sum((x - mean) ** 2) / variance - 0.5 * x.size * np.log(2 * np.pi * variance))


# Drift f and diffusion g^2 from the definitions of the two processes, not from the library's rates.
CLOSED = [
    (VarianceExploding(data_std=0.8), 1.0, 1.3, lambda t: (0.0, 2 * t)),
    (VariancePreserving(data_std=0.8), 0.5, 0.52, lambda t: (-0.5 * (0.1 + 19.9 * t), 0.1 + 19.9 * t)),
]


@pytest.mark.parametrize(("process", "s", "t", "coefficients"), CLOSED, ids=["exploding", "preserving"])
def test_the_euler_forms_are_their_formulas(process, s, t, coefficients):
    with jax.enable_x64(True):
        model = MIXTURE.model(process, "x0", "euler")
        x_s, x_t = np.array([0.4, -0.7]), np.array([0.9, -0.2])
        score = np.asarray(jax.jit(jax.grad(lambda x: MIXTURE.log_density(process, x, t)))(jnp.asarray(x_t)))
        h, (f_t, g2_t), (f_s, g2_s) = t - s, coefficients(t), coefficients(s)
        variances = [process.alpha(u) ** 2 * 0.64 + process.sigma(u) ** 2 for u in (s, t)]
        at_ends = normal_log_density(x_s, 0, variances[0]) - normal_log_density(x_t, 0, variances[1])

        def reverse(score):
            return normal_log_density(x_s, x_t - h * f_t * x_t + h * g2_t * score, g2_t * h)

        expected = {
            # The reference's score at (x_t, t): at x_s it would raise the variance (pitfalls, 4).
            "reference": reverse(score) - reverse(-x_t / variances[1]) + at_ends,
            "plain": reverse(score) - normal_log_density(x_t, x_s + h * f_s * x_s, g2_s * h),
            "ito": score @ (x_s - x_t) + h * (2 * f_t + f_t * score @ x_t - g2_t * score @ score / 2),
        }
        for name, value in expected.items():
            np.testing.assert_allclose(increment(model, x_s, x_t, s, t, name), value, rtol=1e-9, err_msg=name)


def test_all_forms_agree_on_short_steps():
    # Per step the Euler forms differ from the truth by o(h): over one step of 1e-4 from about 1, by less than 1e-3.
    with jax.enable_x64(True):
        process = VarianceExploding()
        x_s, noise = jnp.asarray([0.4, -0.7]), jnp.asarray([0.6, -0.8])
        s, t = 1.0, 1.0001
        x_t = x_s + np.sqrt(t**2 - s**2) * noise
        truth = jax.jit(partial(MIXTURE.log_density, process))
        exact = truth(x_s, s) - truth(x_t, t)
        for name in ESTIMATORS:
            model = MIXTURE.model(process, "x0", "full" if name == "exact" else "euler")
            np.testing.assert_allclose(increment(model, x_s, x_t, s, t, name), exact, atol=1e-3, err_msg=name)


def test_the_default_form_follows_the_covariance():
    process = VarianceExploding()
    for covariance, name in (("euler", "reference"), ("reference", "exact"), ("full", "exact")):
        assert rj.increments.get_estimator(None, MIXTURE.model(process, "x0", covariance)) == name


def test_a_form_that_does_not_suit_the_kernels_is_refused():
    model = MIXTURE.model(VarianceExploding(), "x0", "reference")
    with pytest.raises(ValueError, match=r"unknown estimator 'rne'.*exact, reference, plain, ito"):
        rj.increments.get_estimator("rne", model)
    with pytest.raises(ValueError, match=r"'plain' is made of Euler-Maruyama.*'reference'.*with_covariance\('euler'\)"):
        rj.increments.get_estimator("plain", model)


def test_transitions_run_in_order_of_execution():
    times = np.array([0.1, 0.3, 0.7])
    down = transitions(VariancePreserving(), times)
    up = transitions(VariancePreserving(), times, towards_noise=True)
    np.testing.assert_allclose(down.t.t, [0.7, 0.3])
    np.testing.assert_allclose(down.s.t, [0.3, 0.1])
    np.testing.assert_allclose(up.s.t, [0.1, 0.3])
