"""Every scalar Gaussian process through the same identities."""

import copy
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rnejax.kernels import CentreOfMassFree, FullSpace
from rnejax.processes import (
    Cosine,
    DiscreteVariancePreserving,
    RectifiedFlow,
    VarianceExploding,
    VariancePreserving,
)
from rnejax.processes.gaussian_steps import tempered_slopes

BETAS = np.linspace(1e-4, 0.02, 1000)
PROCESSES = [
    VariancePreserving(data_std=0.7),
    VariancePreserving(beta_min=0.5, beta_max=8.0),
    Cosine(data_std=2.0),
    RectifiedFlow(data_std=0.7),
    VarianceExploding(data_std=0.7),
    VarianceExploding(sigma_min=0.01, sigma_max=80.0),
    DiscreteVariancePreserving(BETAS, data_std=0.7),
]
every_process = pytest.mark.parametrize("process", PROCESSES, ids=lambda process: f"{type(process).__name__}")


@pytest.fixture(autouse=True)
def double_precision():
    with jax.enable_x64(True):
        yield


def times_of(process, *fractions):
    """Times at the given fractions of the range, spread evenly in log t."""
    low, high = np.log(process.t_min), np.log(process.t_max)
    return tuple(float(np.exp(low + f * (high - low))) for f in fractions)


@every_process
def test_the_endpoints_are_data_and_noise(process):
    assert process.alpha(process.t_min) / process.sigma(process.t_min) > 9
    assert process.alpha(process.t_max) * process.data_std / process.sigma(process.t_max) < 0.2


@every_process
def test_forward_kernels_compose(process):
    # Chapman-Kolmogorov: r to s to t is r to t, with a_rt = a_st a_rs and v_rt = a_st^2 v_rs + v_st.
    r, s, t = times_of(process, 0.1, 0.6, 0.9)
    rs, st_, rt = process.transition(r, s), process.transition(s, t), process.transition(r, t)
    np.testing.assert_allclose(rt.decay, st_.decay * rs.decay, rtol=1e-12)
    np.testing.assert_allclose(rt.variance, st_.decay**2 * rs.variance + st_.variance, rtol=1e-12)


@every_process
def test_the_marginal_is_the_forward_kernel_from_clean_data(process):
    t, x0 = *times_of(process, 0.7), jnp.asarray([0.3, -1.2])
    marginal, forward = process.marginal(x0, t), process.forward(x0, 0.0, t)
    np.testing.assert_allclose(marginal.mean, process.alpha(t) * x0, rtol=1e-13)
    np.testing.assert_allclose(marginal.variance, process.sigma(t) ** 2, rtol=1e-13)
    np.testing.assert_allclose(marginal.log_ratio(forward, x0), 0, atol=1e-11)


@every_process
def test_clean_data_are_a_noise_level_like_any_other(process):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step = process.transition(0.0, times_of(process, 0.1)[0])
    assert (step.s.alpha, step.s.sigma) == (1, 0)
    np.testing.assert_allclose(step.reference_covariance, step.t.reference_posterior_variance, rtol=1e-12)


@every_process
def test_the_reference_is_the_noised_gaussian(process):
    t = times_of(process, 0.5)[0]
    variance = process.alpha(t) ** 2 * process.data_std**2 + process.sigma(t) ** 2
    reference = process.reference(t, (3,))
    np.testing.assert_allclose(reference.log_prob(jnp.ones(3)), -1.5 * np.log(2 * np.pi * variance) - 1.5 / variance)
    assert reference.sample(jax.random.key(0)).shape == (3,)


@every_process
@settings(max_examples=15, deadline=None)
@given(fractions=st.tuples(st.floats(0, 1), st.floats(0, 1)), seed=st.integers(0, 99))
def test_the_reference_reverse_kernel_is_bayes_rule(process, fractions, seed):
    # ref_s(x_s) F(x_t | x_s) = ref_t(x_t) K_ref(x_s | x_t) for every pair of states, likely or not.
    s, t = times_of(process, *sorted(fractions))
    if t <= s * (1 + 1e-9):
        return
    x_s, x_t = np.random.default_rng(seed).normal(size=(2, 2))
    x_t = np.asarray(process.forward(jnp.asarray(x_s), s, t).mean) + 0.3 * process.sigma(t) * x_t
    forward, backward = process.forward(x_s, s, t).log_prob(x_t), process.reference_reverse(x_t, t, s).log_prob(x_s)
    reference_s, reference_t = process.reference(s).log_prob(x_s), process.reference(t).log_prob(x_t)
    # The quadratics may be large: rounding is relative to them, and to v = sigma_t^2 - a^2 sigma_s^2 for close times.
    scale = 1 + abs(float(forward)) + abs(float(backward)) + abs(float(reference_s)) + abs(float(reference_t))
    np.testing.assert_allclose(reference_s + forward, reference_t + backward, atol=1e-13 * scale * (1 + t / (t - s)))


@every_process
def test_rates_are_derivatives(process):
    for t in times_of(process, 0.2, 0.5, 0.97):
        t = np.floor(t) + 0.5 if isinstance(process, DiscreteVariancePreserving) else t  # between the table's knots
        h = 1e-5 * t
        for value, rate in ((process.alpha, process.alpha_rate), (process.sigma, process.sigma_rate)):
            central = (value(t + h) - value(t - h)) / (2 * h)
            # Rounding eps / h, and h^2 / 6 of a third derivative of up to (1 / t)^2 times the rate.
            np.testing.assert_allclose(rate(t), central, rtol=1e-8, atol=1e-10 / t)


@every_process
def test_drift_and_diffusion_generate_the_variances(process):
    # dV/dt = 2 f V + g^2 for the reference, from the one-step forward kernels of a short interval.
    (t,) = times_of(process, 0.6)
    t = np.floor(t) + 0.5 if isinstance(process, DiscreteVariancePreserving) else t
    h = 1e-6 * t
    step, exact = process.transition(t, t + h), process.transition(t, t + h)
    x = jnp.asarray([1.0])
    euler = step.euler_forward(x)
    np.testing.assert_allclose(euler.shift / h, exact.forward(x).shift / h, rtol=1e-4, atol=1e-9)
    np.testing.assert_allclose(euler.variance / h, exact.variance / h, rtol=1e-4)


@every_process
def test_coefficients_on_the_host_and_traced_in_single_precision_agree(process):
    s, t = times_of(process, 0.55, 0.6)
    host = process.transition(s, t)
    with jax.enable_x64(False):
        traced = jax.jit(process.transition)(jnp.float32(s), jnp.float32(t))
    # Differences of nearby numbers (v, the shifts) lose a factor t / (t - s) < 20 of their 6e-8, times the slopes of
    # alpha and sigma in log t (up to 10 at the steep end of a schedule).
    for name in ("decay", "decay_shift", "variance", "reference_shift", "reference_covariance", "gain"):
        np.testing.assert_allclose(getattr(traced, name), getattr(host, name), rtol=1e-4, atol=1e-7, err_msg=name)
    for name in ("alpha", "sigma", "alpha_rate", "sigma_rate", "log_snr", "reference_variance", "reference_gain"):
        np.testing.assert_allclose(getattr(traced.t, name), getattr(host.t, name), rtol=1e-4, atol=1e-6, err_msg=name)


@every_process
def test_times_stacked_give_transitions_stacked(process):
    times = np.asarray(times_of(process, 0.1, 0.4, 0.8))
    stacked = process.transition(times[:-1], times[1:])
    single = process.transition(times[1], times[2])
    jax.tree.map(lambda many, one: np.testing.assert_array_equal(many[1], one), stacked, single)


# ------------------------------------------------------------------------------------------- the tempered reference


@every_process
def test_for_exponent_one_the_tempered_step_is_the_reference_itself(process):
    step, x = process.transition(*times_of(process, 0.3, 0.7)), jnp.asarray([0.3, -1.2])
    down, up = step.tempered_reverse(x, jnp.asarray(1.0)), step.tempered_forward(x, jnp.asarray(1.0))
    for law, expected in ((down, step.reference_reverse(x)), (up, step.forward(x))):
        np.testing.assert_array_equal(law.shift, expected.shift)
        np.testing.assert_array_equal(law.variance, expected.variance)


@every_process
@pytest.mark.parametrize("exponent", [0.3, 2.0, 5.0])
@pytest.mark.parametrize("fractions", [(0.3, 0.35), (0.2, 0.95)], ids=["short", "long"])
def test_the_tempered_step_is_reversible_for_the_tempered_reference(process, exponent, fractions):
    # A(x_s | x_t) ref_t(x_t)^bar and B(x_t | x_s) ref_s(x_s)^bar are the same joint law up to a constant: A's slope
    # times V_t / bar is B's slope times V_s / bar, and the variances V / bar are carried into each other.
    step, one = process.transition(*times_of(process, *fractions)), jnp.ones(1)
    down, up = (each(one, jnp.asarray(exponent)) for each in (step.tempered_reverse, step.tempered_forward))
    v_s, v_t = step.s.reference_variance, step.t.reference_variance
    slope_a, slope_b = down.mean, up.mean
    np.testing.assert_allclose(slope_a * v_t, slope_b * v_s, rtol=1e-10, atol=1e-15 * float(v_t))
    np.testing.assert_allclose(slope_b**2 * v_s / exponent + up.variance, v_t / exponent, rtol=1e-10)
    np.testing.assert_allclose(slope_a**2 * v_t / exponent + down.variance, v_s / exponent, rtol=1e-10)
    assert up.variance / step.variance == pytest.approx(down.variance / step.reference_covariance)


@pytest.mark.parametrize("exponent", [1.0, 2.0, 7.3])
def test_where_nothing_of_a_state_remains_the_slope_is_exactly_zero(exponent):
    # 1 - bar rho u is a rounding error there, whose root, 2e-4, is another in each program that computes it.
    with jax.enable_x64(False):
        u = jnp.linspace(1 / exponent, 1, 301)[1:]
        kappa = jnp.sqrt(1 - u)
        rho, difference = tempered_slopes(jnp.float32(exponent), u, kappa)
        cut = np.asarray(exponent * u > 1)
        np.testing.assert_array_equal(np.asarray(difference + kappa)[cut], 0)
        np.testing.assert_allclose(exponent * rho[cut] * u[cut], 1, rtol=1e-6)
        np.testing.assert_array_equal(rho[~cut], 1)
        assert exponent == 1 or cut.sum() > 290
    for of in (0, 1):  # and its derivatives are numbers, on either side and where they meet
        slopes = jax.jacfwd(lambda x: tempered_slopes(x, jnp.asarray(0.5), jnp.sqrt(0.5))[of])  # noqa: B023
        assert all(np.isfinite(slopes(x)) for x in (0.5, 1.0, 3.0))


# --------------------------------------------------------------------------------------- schedules, by definition


def test_the_discrete_process_reproduces_its_table():
    process = DiscreteVariancePreserving(BETAS)
    steps = np.arange(1, 1001)
    np.testing.assert_allclose(process.alpha(steps) ** 2, np.cumprod(1 - BETAS), rtol=1e-12)
    np.testing.assert_allclose(process.transition(9.0, 10.0).variance, BETAS[9], rtol=1e-10)
    assert process.alpha(0) == 1


def test_the_linear_schedule_is_the_integral_of_beta():
    process = VariancePreserving(beta_min=0.1, beta_max=20.0)
    t = np.linspace(0, 1, 100_001)
    integral = np.trapezoid(0.1 + t * 19.9, t)
    np.testing.assert_allclose(process.alpha(1.0), np.exp(-integral / 2), rtol=1e-12)


def test_pure_noise_is_exactly_that():
    for process in (Cosine(t_max=1.0), RectifiedFlow(t_max=1.0)):
        step = process.transition(0.9, 1.0)
        assert process.alpha(1.0) == 0
        # The reverse kernel forgets x_t: what remains is the law of x_s given x_0 = D.
        x_s = step.reverse(jnp.asarray([5.0]), jnp.asarray([0.4]))
        np.testing.assert_allclose(x_s.mean, process.alpha(0.9) * 0.4, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("betas", [[0.1], [0.1, 1.0], [0.0, 0.1], [0.1, -0.1]])
def test_betas_outside_of_zero_one_are_refused(betas):
    with pytest.raises(ValueError, match=r"two or more numbers in \(0, 1\)"):
        DiscreteVariancePreserving(betas)


@every_process
def test_a_process_is_static_and_compared_by_value(process):
    again = copy.deepcopy(process)
    assert jax.tree.leaves(process) == []
    assert again == process
    assert hash(again) == hash(process)
    assert again not in [other for other in PROCESSES if other is not process]


@pytest.mark.parametrize("subspace", [FullSpace(), CentreOfMassFree()])
def test_every_kernel_of_a_process_lives_on_its_subspace(subspace):
    process = VariancePreserving(subspace=subspace)
    x = subspace.project(jnp.asarray(np.random.default_rng(0).normal(size=(3, 2))))
    kernels = [
        process.forward(x, 0.1, 0.5),
        process.reference_reverse(x, 0.5, 0.1),
        process.marginal(x, 0.5),
        process.reference(0.5, (3, 2)),
        process.transition(0.1, 0.5).euler_reverse(x, x),
        process.transition(0.1, 0.5).euler_forward(x),
    ]
    for kernel in kernels:
        sample = kernel.sample(jax.random.key(1))
        np.testing.assert_allclose(subspace.project(sample), sample, atol=1e-12)
