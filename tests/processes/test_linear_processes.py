"""Linear SDEs: exact kernels, canonical coordinates, what is refused."""

import dataclasses
import warnings
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
import scipy.stats
from closed_forms import GAUSSIAN, LINEAR, A, G, Q, U, moments

import rnejax as rj
from rnejax.increments import transitions
from rnejax.processes import (
    CriticallyDamped,
    LinearSDE,
    NonReversible,
    PhaseSpaceLangevin,
    VariancePreserving,
)
from rnejax.processes.matrix_kernels import correlate, transition_kernel

every_linear = pytest.mark.parametrize("process", LINEAR, ids=lambda process: f"{type(process).__name__}")
ONE = np.eye(3)


@pytest.fixture(autouse=True)
def double_precision():
    with jax.enable_x64(True):
        yield


def dense(law, shape):
    """The covariance of a kernel as a matrix of the flattened state."""
    units = jnp.eye(int(np.prod(shape))).reshape(-1, *shape)
    return np.asarray(jax.vmap(law.covariance_times)(units)).reshape(len(units), -1)


def linear_map(function, shape):
    units = jnp.eye(int(np.prod(shape))).reshape(-1, *shape)
    return np.asarray(jax.vmap(function)(units)).reshape(len(units), -1).T


# ------------------------------------------------------------------------------------------------------ on the host


@pytest.mark.parametrize("duration", [1e-6, 1e-3, 0.3, 4.0])
def test_the_kernel_of_a_step_is_van_loans_integral(duration):
    drift, noise_rate = A[None], (G @ G.T)[None]
    decay, noise = transition_kernel(drift, noise_rate, duration)
    nodes, weights = np.polynomial.legendre.leggauss(80)
    flows = [scipy.linalg.expm(-A * duration * 0.5 * (1 + node)) for node in nodes]
    integral = sum(0.5 * duration * w * f @ noise_rate[0] @ f.T for w, f in zip(weights, flows, strict=True))
    np.testing.assert_allclose(decay[0], scipy.linalg.expm(-A * duration), rtol=1e-10, atol=1e-13)
    np.testing.assert_allclose(noise[0], integral, rtol=1e-10, atol=1e-12 * np.abs(integral).max())


def test_entries_of_high_order_in_the_time_keep_their_digits():
    # A position pushed by noisy velocities: to leading order 2D [[h^3 / 3, h^2 / 2], [h^2 / 2, h]].
    h = 1e-5
    _, noise = transition_kernel(np.array([[[0.0, -1.0], [0.0, 0.0]]]), np.array([[[0.0, 0.0], [0.0, 3.0]]]), h)
    np.testing.assert_allclose(noise[0], 3 * np.array([[h**3 / 3, h**2 / 2], [h**2 / 2, h]]), rtol=1e-12)


def test_critical_damping_has_no_eigenbasis_and_an_exact_kernel():
    drift = CriticallyDamped().system.drift
    values, vectors = np.linalg.eig(drift[0])
    assert np.linalg.cond(vectors) > 1e6
    np.testing.assert_allclose(values, 2.0, atol=1e-6)
    decay, _ = transition_kernel(drift, np.zeros((1, 2, 2)), 0.7)
    np.testing.assert_allclose(decay[0], np.exp(-1.4) * (np.eye(2) - 0.7 * (drift[0] - 2 * np.eye(2))), rtol=1e-12)


def test_canonical_coordinates_keep_the_digits_of_both_small_noise_and_small_signal():
    kappa, u = np.array([1.0, 0.9, 1e-4, 1e-9]), np.array([1e-14, 0.19, 1 - 1e-8, 1.0])
    rng = np.random.default_rng(0)
    target, source = rng.normal(size=(2, 4, 4))
    regression = target * kappa @ np.linalg.inv(source)
    found = correlate(
        source[None], regression[None], (target * np.sqrt(u))[None], (target @ np.linalg.qr(target)[0])[None]
    )
    # Rounding eps of whitened matrices, over sqrt(u) and kappa where they are small.
    np.testing.assert_allclose(found.u[0], u, rtol=1e-7)
    np.testing.assert_allclose(found.kappa[0], kappa, rtol=1e-5)
    diagonal = found.target_inverse @ regression @ found.source
    np.testing.assert_allclose(diagonal[0], np.diag(kappa), atol=1e-10)
    for one, inverse in ((found.source, found.source_inverse), (found.target, found.target_inverse)):
        np.testing.assert_allclose(one @ inverse, np.eye(4)[None], atol=1e-12)


@pytest.mark.parametrize("num_noisy", [0, 2])
def test_where_little_signal_is_left_its_directions_are_told_apart_by_it(num_noisy):
    # The noise is the same in all of them up to rounding: 1 - kappa^2 is 1.
    kappa = np.array([1e-5, 1e-8, 1e-11])
    rng = np.random.default_rng(1)
    source, target = rng.normal(size=(3, 3)), rng.normal(size=(3 + num_noisy, 3 + num_noisy))
    regression = target[:, :3] * kappa @ np.linalg.inv(source)
    turned = target @ np.linalg.qr(rng.normal(size=target.shape))[0]
    found = correlate(source[None], regression[None], turned[None], target[None])
    np.testing.assert_allclose(found.kappa[0], kappa, rtol=1e-4)  # rounding of the largest, over the smallest
    again = found.target[0, :, :3] * found.kappa[0] @ found.source_inverse[0]
    np.testing.assert_allclose(again, regression, rtol=1e-9, atol=1e-12 * np.abs(regression).max())


@every_linear
def test_increments_of_gaussian_data_are_exact_over_steps_of_any_length(process):
    drift, noise_rate, beta, auxiliary = LINEAR[process]
    end = 30 / (beta * np.linalg.eigvals(drift).real.min())
    blocks = process.system.data  # data of the reference's covariance, and another mean: all covariances are right
    covariance = blocks[0] if blocks.shape[-1] == 3 else np.diag(np.broadcast_to(blocks[:, 0, 0], 3))
    mean = np.array([0.7, -0.4, 0.2])
    process = dataclasses.replace(process, t_max=end)
    model = rj.systems.GaussianMixture([mean], covariances=covariance[None]).model(process, "x0")

    def log_density(x, t):
        decay = scipy.linalg.expm(-drift * beta * t)
        law = scipy.linalg.solve_continuous_lyapunov(drift, noise_rate)
        start = np.diag([0.0, auxiliary]) if len(drift) == 2 else 0.0  # of a phase space: what velocities start with
        noise = law - decay @ (law - start) @ decay.T
        if len(drift) == 2:
            decay, noise = np.kron(decay, np.eye(3)), np.kron(noise, np.eye(3))
        signal = decay[:, :3]
        return scipy.stats.multivariate_normal.logpdf(
            np.asarray(x).reshape(-1), signal @ mean, signal @ covariance @ signal.T + noise
        )

    for s, t in ((0.05 * end, 0.3 * end), (0.3 * end, end), (0.02 * end, end)):
        x_s, x_t = (0.5 * jax.random.normal(key, model.shape) for key in jax.random.split(jax.random.key(3)))
        expected = log_density(x_s, s) - log_density(x_t, t)
        np.testing.assert_allclose(rj.increment(model, x_s, x_t, s, t), expected, atol=1e-9)


# ------------------------------------------------------------------------------------------------------------ kernels


@every_linear
def test_marginals_are_those_of_the_stationary_law_less_what_is_remembered(process):
    x0 = jnp.asarray([0.3, -1.2, 0.5])
    for t in (0.05, 0.6):
        law = process.marginal(x0, t)
        signal, noise = moments(process, t, 3)
        shape = process.state_shape((3,))
        np.testing.assert_allclose(law.mean.reshape(-1), signal @ x0, rtol=1e-10, atol=1e-12)
        np.testing.assert_allclose(dense(law, shape), noise, rtol=1e-9, atol=1e-12)


@every_linear
def test_forward_kernels_compose(process):
    # Chapman-Kolmogorov: E_rt = E_st E_rs and V_rt = E_st V_rs E_st^T + V_st.
    r, s, t, shape = 0.05, 0.3, 0.9, process.state_shape((3,))
    pairs = {"rs": (r, s), "st": (s, t), "rt": (r, t)}
    decay = {name: linear_map(lambda x, p=p: process.forward(x, *p).mean, shape) for name, p in pairs.items()}
    noise = {name: dense(process.forward(jnp.zeros(shape), *p), shape) for name, p in pairs.items()}
    np.testing.assert_allclose(decay["st"] @ decay["rs"], decay["rt"], atol=1e-10)
    composed = decay["st"] @ noise["rs"] @ decay["st"].T + noise["st"]
    np.testing.assert_allclose(composed, noise["rt"], atol=1e-10)


@every_linear
@pytest.mark.parametrize(("s", "t"), [(0.3, 0.301), (0.02, 0.8)], ids=["short", "long"])
def test_the_reference_reverse_kernel_is_bayes_rule(process, s, t):
    # ref_s(x_s) F(x_t | x_s) = ref_t(x_t) K_ref(x_s | x_t) for every pair of states.
    shape, rng = process.state_shape((3,)), np.random.default_rng(1)
    x_s = jnp.asarray(rng.normal(size=shape))
    x_t = process.forward(x_s, s, t).sample(jax.random.key(0))
    forward, backward = process.forward(x_s, s, t).log_prob(x_t), process.reference_reverse(x_t, t, s).log_prob(x_s)
    reference_s, reference_t = process.reference(s, shape).log_prob(x_s), process.reference(t, shape).log_prob(x_t)
    # Quadratic forms of up to 1e5 where a state is far out for a stiff process; each rounded.
    scale = sum(abs(float(each)) for each in (forward, backward, reference_s, reference_t))
    np.testing.assert_allclose(reference_s + forward, reference_t + backward, atol=1e-11 * (1 + scale))


@every_linear
@pytest.mark.parametrize("exponent", [0.3, 2.0, 5.0])
@pytest.mark.parametrize(("s", "t"), [(0.3, 0.35), (0.05, 2.0)], ids=["short", "long"])
def test_the_tempered_step_is_reversible_for_the_tempered_reference(process, exponent, s, t):
    # ref_t^bar A = ref_s^bar B up to a constant, for any pairs of states.
    shape, rng = process.state_shape((3,)), np.random.default_rng(2)
    step, exponent = process.transition(s, t), jnp.asarray(exponent)
    pairs = jnp.asarray(rng.normal(size=(5, 2, *shape)))

    def excess(pair):
        x_s, x_t = pair
        down = exponent * process.reference(t, shape).log_prob(x_t) + step.tempered_reverse(x_t, exponent).log_prob(x_s)
        up = exponent * process.reference(s, shape).log_prob(x_s) + step.tempered_forward(x_s, exponent).log_prob(x_t)
        return down - up, jnp.abs(down)

    found, sizes = jax.vmap(excess)(pairs)
    np.testing.assert_allclose(found, found[0], atol=1e-11 * float(sizes.max()))
    # The same quadratic variation as the noise, coordinate by coordinate, wherever a step is short enough.
    variance = np.minimum(step.u, 1 / exponent)
    np.testing.assert_allclose(step.tempered_forward(pairs[0, 0], exponent).variance, variance, rtol=1e-12)


@every_linear
def test_all_that_is_known_of_x0_is_in_the_reverse_kernel(process):
    # Given x_0 exactly, K is the bridge: F(x_t | x_s) times the marginal of x_s given x_0, normalised.
    s, t, x0 = 0.1, 0.7, jnp.asarray([0.3, -1.2, 0.5])
    shape = process.state_shape((3,))
    step = process.transition(s, t)
    x_t = process.marginal(x0, t).sample(jax.random.key(3))
    known = step.t.data.coordinates(x0) - step.t.alpha * step.t.frame.coordinates(x_t)[: step.t.alpha.shape[0]]
    # alpha S alpha with S = -1: nothing of x_0 is uncertain.
    certain = -jnp.broadcast_to(step.t.alpha**2, known.shape)
    bridge = step.reverse(x_t, known, certain)
    x_s = process.marginal(x0, s).sample(jax.random.key(4))
    others = process.marginal(x0, s), process.forward(x_s, s, t), process.marginal(x0, t)
    bayes = others[0].log_prob(x_s) + others[1].log_prob(x_t) - others[2].log_prob(x_t)
    np.testing.assert_allclose(bridge.log_prob(x_s), bayes, atol=1e-7)
    assert bridge.mean.shape == shape


@every_linear
@pytest.mark.parametrize("spread", [2.0, -0.4])
def test_a_number_of_spread_multiplies_the_posterior_covariance_of_the_reference(process, spread):
    # C_ref + spread G Cov_ref G^T with C_ref = V_s - V_s E^T V_t^{-1} E V_s and the gain G = E^{-1} V M_t^{-1} S_t.
    s, t, shape = 0.1, 0.6, process.state_shape((3,))
    step, zeros = process.transition(s, t), jnp.zeros(shape)
    decay, noise = (
        linear_map(lambda x: process.forward(x, s, t).mean, shape),
        dense(process.forward(zeros, s, t), shape),
    )
    total_s, total_t = (dense(process.reference(u, shape), shape) for u in (s, t))
    signal, noise_t = (np.asarray(each) for each in moments(process, t, 3))
    data = dense(process.reference(0.0, shape), shape)[:3, :3]
    posterior = np.linalg.inv(np.linalg.inv(data) + signal.T @ np.linalg.solve(noise_t, signal))
    gain = np.linalg.solve(decay, noise @ np.linalg.solve(noise_t, signal))
    reference = total_s - total_s @ decay.T @ np.linalg.solve(total_t, decay @ total_s)
    law = step.reverse(zeros, jnp.zeros_like(step.t.alpha * jnp.ones((1, 1, 3 // step.t.alpha.size))), spread)
    expected = reference + spread * gain @ posterior @ gain.T
    np.testing.assert_allclose(dense(law, shape), expected, rtol=1e-7, atol=1e-9)
    # And what an excess of the denoiser adds to the mean is the gain.
    excess = jnp.asarray([0.3, -0.2, 0.5])
    moved = step.reverse(zeros, step.t.data.coordinates(excess)).mean.reshape(-1)
    np.testing.assert_allclose(moved, gain @ excess, rtol=1e-7, atol=1e-10)


@pytest.mark.parametrize("covariance", ["reference", "hutchinson", "diagonal", "full"])
def test_a_direction_whose_signal_is_gone_overflows_nothing(covariance):
    rates = np.geomspace(0.01, 2.0, 4)  # where the slowest has decayed, the fastest has by e^200
    with jax.enable_x64(False), warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        process = NonReversible(np.diag(rates), t_max=200.0)
        mixture = rj.systems.GaussianMixture([np.ones(4), -np.ones(4)], 0.5)
        model = mixture.model(process, "x0", covariance)
        found = rj.sample(jax.random.key(0), model, rj.time_grid(process, 5), 100)
        assert np.isfinite(found.x).all()
        assert np.isfinite(found.log_density).all()


@every_linear
def test_clean_data_are_a_noise_level_like_any_other(process):
    step = process.transition(0.0, 0.2)
    x0 = jnp.asarray([0.3, -1.2, 0.5])
    state = x0 if step.t.frame.matrix.shape[-1] == step.t.data.matrix.shape[-1] else jnp.stack([x0, 0.1 * x0])
    forward = step.forward(state)
    np.testing.assert_allclose(process.reference(0.0, state.shape).log_prob(state), process.reference(
        1e-9, state.shape).log_prob(state), atol=1e-5)  # fmt: skip
    assert np.isfinite(forward.log_prob(state))
    assert np.isfinite(step.reference_reverse(state).log_prob(state))


def test_a_number_makes_the_scalar_process():
    # dx = -beta x / 2 dt + sqrt(beta) dW with beta linear in time is VariancePreserving.
    scalar = VariancePreserving(data_std=0.7)
    process = LinearSDE(0.5, 1.0, data_covariance=0.49, t_max=1.0, beta=(0.1, 20.0))
    by_function = LinearSDE(0.5, 1.0, data_covariance=0.49, t_max=1.0, beta=lambda t: 0.1 + 19.9 * t)
    x, y, zero = jnp.asarray([0.3, -0.8]), jnp.asarray([0.5, -0.9]), jnp.zeros((2,))
    for s, t in ((0.1, 0.2), (0.01, 0.9)):
        one, other = scalar.transition(s, t), process.transition(s, t)
        for name in ("forward", "reference_reverse"):
            expected = getattr(one, name)(x).log_prob(y)
            np.testing.assert_allclose(getattr(other, name)(x).log_prob(y), expected, rtol=1e-10)
            np.testing.assert_allclose(getattr(by_function.transition(s, t), name)(x).log_prob(y), expected, rtol=1e-9)
        np.testing.assert_allclose(other.t.log_snr, one.t.log_snr, rtol=1e-10)
        # An excess of 0.2 over the reference's denoiser, with twice and half of its posterior variance.
        for spread in (1.0, -0.5):
            expected = one.reverse(x, zero + 0.2, spread).log_prob(y)
            excess = other.t.data.coordinates(zero + 0.2)
            np.testing.assert_allclose(other.reverse(x, excess, spread).log_prob(y), expected, rtol=1e-9)
    np.testing.assert_allclose(process.alpha(0.3), scalar.alpha(0.3), rtol=1e-12)
    np.testing.assert_allclose(process.signal_fraction(0.3), scalar.signal_fraction(0.3), rtol=1e-10)


def test_a_stationary_reference_stays_what_it_is():
    process = LinearSDE(A, G, data_covariance="stationary")
    law = scipy.linalg.solve_continuous_lyapunov(A, G @ G.T)
    for t in (0.01, 1.0, process.t_max):
        np.testing.assert_allclose(dense(process.reference(t, (3,)), (3,)), law, rtol=1e-9, atol=1e-12)


def test_the_default_range_ends_where_a_thousandth_is_left():
    for process in (LinearSDE(A, 1.3), NonReversible(U, Q), LinearSDE(0.5, 1.0)):
        assert process.signal_fraction(process.t_max) == pytest.approx(1e-3, rel=0.01)


def test_steps_of_one_grid_that_are_equal_are_computed_once(monkeypatch):
    process, durations = NonReversible(U, Q, t_max=2.0), []
    original = LinearSDE.flow
    monkeypatch.setattr(NonReversible, "flow", lambda self, h: durations.append(h) or original(self, h))
    process.transition(*(lambda times: (times[:-1], times[1:]))(rj.time_grid(process, 50, "uniform")))
    assert len(durations) == 51 + 1  # every level, and one step


def test_the_steps_of_the_last_grid_are_kept_in_either_order_and_precision(monkeypatch):
    process, made = NonReversible(U, Q, t_max=2.0), []
    original = NonReversible._transitions_of
    monkeypatch.setattr(NonReversible, "_transitions_of", lambda self, s, t: made.append(0) or original(self, s, t))
    times = rj.time_grid(process, 5)
    down, up = transitions(process, times), transitions(process, times, towards_noise=True)
    inside = jax.jit(lambda: transitions(process, times).u)()  # nothing traced is kept
    again = transitions(process, times)
    assert len(made) == 1
    assert again.gain is down.gain
    np.testing.assert_array_equal(up.gain, down.gain[::-1])
    np.testing.assert_array_equal(inside, down.u)
    np.testing.assert_array_equal(up.gain, process.transition(times[:-1], times[1:]).gain)
    with jax.enable_x64(False):
        assert transitions(process, times).gain.dtype == jnp.float32
    other = rj.time_grid(process, 6)
    assert len(transitions(process, other).u) == 6
    fresh = NonReversible(U, Q, t_max=2.0)
    jax.jit(lambda: transitions(fresh, times).u)()
    np.testing.assert_array_equal(np.asarray(transitions(fresh, times).gain), down.gain)


def test_grids_of_linear_processes():
    process = NonReversible(U, Q, t_max=2.0)
    np.testing.assert_allclose(np.diff(np.log(rj.time_grid(process, 5, "log_time"))), np.log(2e3) / 5, rtol=1e-9)
    even = (np.sqrt(2.0) - np.sqrt(1e-3)) / 5
    np.testing.assert_allclose(np.diff(np.sqrt(rj.time_grid(process, 5))), even, rtol=1e-9)
    with pytest.raises(ValueError, match=r"unknown grid 'edm' for NonReversible; choose one of uniform, .*, log_time"):
        rj.time_grid(process, 5, "edm")
    with pytest.raises(ValueError, match="times above 0, got t_min = 0"):
        rj.time_grid(process, 5, "log_time", t_min=0.0)


def test_processes_are_compared_by_their_numbers():
    assert LinearSDE(A, G) == LinearSDE(A.copy(), G.copy())
    assert hash(LinearSDE(A, G)) == hash(LinearSDE(A.copy(), G.copy()))
    assert LinearSDE(A, G) != LinearSDE(A, 1.1 * G)
    assert LinearSDE(A, G) != NonReversible(U, Q)


# ---------------------------------------------------------------------------------------------- non-reversible noise


@pytest.mark.parametrize("size", [3, 40])
def test_a_circulation_keeps_the_stationary_law_and_the_volume(size):
    rng = np.random.default_rng(size)
    root_of = rng.normal(size=(size, size))
    precision = root_of @ root_of.T / size + 0.2 * np.eye(size)
    skew = 2 * rng.normal(size=(size, size))
    process = NonReversible(precision, skew - skew.T)
    drift, covariance = process.system.drift[0], np.linalg.inv(precision)
    # A U^{-1} + U^{-1} A^T = 2 I, and det exp(-A t) = exp(-t tr U).
    np.testing.assert_allclose(drift @ covariance + covariance @ drift.T, 2 * np.eye(size), atol=1e-10)
    decay, _ = process.flow(0.3)
    sign, log_det = np.linalg.slogdet(decay[0])
    assert sign == 1
    np.testing.assert_allclose(log_det, -0.3 * np.trace(precision), rtol=1e-10)


def test_what_a_circulation_does_is_said():
    process, reversible = NonReversible(U, Q), NonReversible(U)
    drift = (np.eye(3) + Q) @ U
    np.testing.assert_allclose(sorted(process.eigenvalues.real), sorted(np.linalg.eigvals(drift).real))
    assert process.spectral_gap == pytest.approx(np.linalg.eigvals(drift).real.min())
    assert reversible.spectral_gap == pytest.approx(np.linalg.eigvalsh(U).min())
    assert (reversible.entropy_production, reversible.steps_needed()) == (0, 1)
    # The mean of |Q U x|^2 under the stationary law, by sampling.
    x = np.random.default_rng(0).multivariate_normal(np.zeros(3), np.linalg.inv(U), 40_000)
    rates = np.sum((x @ (Q @ U).T) ** 2, axis=1)
    assert abs(rates.mean() - process.entropy_production) < 4 * rates.std() / np.sqrt(len(rates))
    assert process.stiffness == pytest.approx(np.linalg.norm(drift, 2) / process.spectral_gap)
    turns = np.abs(np.linalg.eigvals(drift).imag).max() * (process.t_max - process.t_min)
    assert process.steps_needed() == np.ceil(turns)
    assert process.steps_needed(angle=0.1) == np.ceil(10 * turns)
    assert process.steps_needed(0.0, 0.0) == 1


def test_a_diagonal_precision_without_circulation_needs_no_matrices():
    process, same = NonReversible([2.0, 0.5]), NonReversible(np.diag([2.0, 0.5]))
    assert process.system.drift.shape == (2, 1, 1)
    x, y = jnp.asarray([0.3, 0.4]), jnp.asarray([0.2, -0.1])
    for one, other in ((process, same), (process, NonReversible([2.0, 0.5], np.zeros((2, 2))))):
        found, expected = (p.forward(x, 0.1, 0.4).log_prob(y) for p in (one, other))
        np.testing.assert_allclose(found, expected, rtol=1e-12)


# --------------------------------------------------------------------------------------------------------- velocities


def test_what_is_asked_of_the_velocities_says_the_whole_score():
    process, t = CriticallyDamped(data_std=0.8), 0.2
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3)))
    score = jax.grad(lambda x: GAUSSIAN.log_density(CLD, x, t))(x)
    CLD_model = {name: GAUSSIAN.model(CLD, name) for name in ("score", "epsilon", "x0", "energy")}
    for name, model in CLD_model.items():
        np.testing.assert_allclose(model.score(x, t), score, rtol=1e-8, err_msg=name)
        np.testing.assert_allclose(model.denoise(x, t), GAUSSIAN.posterior(CLD, x, t)[0], rtol=1e-8, err_msg=name)
    assert process.prediction_shape((2, 3)) == (3,)


CLD = next(process for process in LINEAR if isinstance(process, CriticallyDamped))


def test_positions_and_velocities_become_their_stationary_laws():
    process = PhaseSpaceLangevin(friction=0.5, mass=0.5, beta=2.0)
    late = process.marginal(jnp.asarray([1.0]), 20.0)
    np.testing.assert_allclose(late.mean, 0, atol=1e-6)
    np.testing.assert_allclose(dense(late, (2, 1)), np.diag([1.0, 0.5]), atol=1e-6)
    assert CriticallyDamped().friction == 2 * np.sqrt(0.25)


# ------------------------------------------------------------------------------------------------------- what is wrong


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: NonReversible([[1.0, 0.2], [0.1, 1.0]]), r"precision must be symmetric: \|C - C\^T\| is 0.1"),
        (lambda: NonReversible([[1.0, 2.0], [2.0, 1.0]]), "precision must be positive definite: .* eigenvalue is -1"),
        (lambda: NonReversible(U, np.eye(3)), r"skew must satisfy Q \+ Q\^T = 0: the largest entry .* is 2"),
        (lambda: NonReversible(U, np.zeros((2, 2))), r"sizes differ: precision 3, skew \(2, 2\)"),
        (lambda: NonReversible(np.ones((2, 3))), "square matrix or its diagonal, got shape"),
        (lambda: NonReversible(U, data_covariance="reference"), "numbers or 'stationary', got 'reference'"),
        (lambda: NonReversible(U, data_covariance=[1.0, 2.0]), "data_covariance must be a number"),
        (lambda: LinearSDE(A, [1.0, 2.0]), "sizes differ: drift 3, diffusion 2"),
        (lambda: LinearSDE(np.ones((2, 3))), "square matrix, got shape"),
        (lambda: LinearSDE([1.0, np.nan]), "drift must be finite, but 1 of its entries"),
        (lambda: LinearSDE("fast"), "drift must be numbers, got 'fast'"),
        (lambda: LinearSDE(-A, 1.0, data_covariance="stationary"), "the real part -1.11, and all must be positive"),
        (
            lambda: LinearSDE([1.0, 2.0], [1.0, 0.0], data_covariance="stationary"),
            "directions that noise does not reach",
        ),
        (lambda: LinearSDE(-1.0, 1.0), "does not forget its data: .* smallest real part, -1, .* t_max="),
        (lambda: LinearSDE(0.0, 1e-4), "does not forget its data: at t = 1e\\+06 .* t_max="),
        (lambda: LinearSDE(A, 1.0, data_covariance=-1.0), "must be positive definite"),
        (lambda: LinearSDE(A, 1.0, beta=-1.0), "beta must be a positive number, a pair"),
        (lambda: LinearSDE(A, 1.0, beta="fast"), "beta must be a positive number, a pair"),
        (lambda: LinearSDE(A, 1.0, beta=lambda t: 0.5 - t, t_max=2.0).moments(2.0), "beta must be a positive function"),
        (lambda: LinearSDE(A, 1.0, beta=lambda t: 0.5 - t), "beta must be a positive function"),
        (lambda: LinearSDE(A, 1.0, t_min=2.0, t_max=1.0), "t_min < t_max"),
        (lambda: CriticallyDamped(friction=3.0), r"friction = 2 sqrt\(mass\) = 1, got 3; PhaseSpaceLangevin"),
        (lambda: PhaseSpaceLangevin(mass=0.0), "mass must be positive"),
        (lambda: LinearSDE(A, 1.0).check_shape((4,)), r"acts on 3 coordinates: .* got shape \(4,\)"),
        (lambda: CriticallyDamped().check_shape((6,)), "2 coordinates"),
        (lambda: jax.jit(LinearSDE(A, 1.0).level)(0.3), "must be known when the program is traced"),
        (
            lambda: jax.jit(lambda t: LinearSDE(A, 1.0).steps(t[:-1], t[1:], True).u)(jnp.asarray([0.1, 0.2])),
            "must be known when the program is traced",
        ),
    ],
)
def test_what_is_no_process_is_refused(make, words):
    with pytest.raises(ValueError, match=words):
        make()


def test_noise_that_does_not_reach_every_coordinate_has_no_density():
    # The third coordinate is neither noised nor pushed by those that are.
    drift = np.array([[1.0, 0.3, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
    process = LinearSDE(drift, np.diag([1.0, 1.0, 0.0]), t_max=3.0)
    with pytest.raises(ValueError, match=r"between s = 0 and t = 0.2 has no density: the eigenvalues .* from .* to"):
        process.level(0.2)


def test_steps_that_states_do_not_resolve_are_warned_of():
    process = CriticallyDamped()
    fine, default = rj.time_grid(process, 50, "log_time", t_min=1e-5), rj.time_grid(process, 200)
    with jax.enable_x64(False):
        with pytest.warns(
            rj.processes.PrecisionWarning, match=r"between t = 1e-05 and .*float32 rounds states to 1.2e-07"
        ):
            process.warn_of_grid(fine)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            process.warn_of_grid(default)
    with warnings.catch_warnings():
        warnings.simplefilter("error", rj.processes.PrecisionWarning)
        process.warn_of_grid(fine)


def test_steps_whose_lengths_differ_a_little_are_not_taken_for_equal():
    process = NonReversible(U, Q, t_max=2.0)
    times = np.array([0.1, 0.6, 1.1 + 1e-7])
    steps = process._transitions_of(times[:-1], times[1:])
    for i in range(2):
        decay = scipy.linalg.expm(-process.system.drift[0] * np.diff(times)[i])
        np.testing.assert_allclose(steps.after.drift[i, 0] + np.eye(3), decay, rtol=1e-12, atol=1e-13)


def test_a_reference_that_is_nearly_stationary_is_not():
    law = np.linalg.inv(U)
    near = NonReversible(U, Q, data_covariance=law * (1 + 1e-3), t_max=2.0)
    decay = scipy.linalg.expm(-near.system.drift[0] * 0.5)
    expected = law + 1e-3 * decay @ law @ decay.T
    np.testing.assert_allclose(near.moments(0.5).total[0], expected, rtol=1e-12)


def test_training_steps_are_those_of_their_ratio():
    process = NonReversible(U, Q, t_min=0.01, t_max=2.0)
    t, half = jnp.asarray([0.3, 1.0]), jnp.full(2, 0.5)
    for low, high in ((1.0, 1.2), (2.0, 3.0), (1.0, 1.2)):
        steps = process.training_steps(t, half, (low, high))
        ratios = np.asarray(steps.t.t / steps.s.t)
        np.testing.assert_allclose(steps.t.t, t, rtol=0.02)  # 512 levels, even in the root of time
        assert np.all((ratios >= low) & (ratios <= high))
    with pytest.raises(ValueError, match="t_min must be positive, got 0"):
        NonReversible(U, Q, t_min=0.0, t_max=2.0).training_steps(t, half, (1.0, 1.2))


@pytest.mark.parametrize("covariance", ["hutchinson", "diagonal", "full"])
def test_a_denoiser_may_say_what_no_covariance_can_be(covariance):
    """A network's Jacobian is of any size and sign; kernels stay kernels."""
    process = NonReversible(U, Q, t_min=0.01, t_max=2.0)
    matrix = jnp.asarray(np.random.default_rng(0).normal(size=(3, 3)))
    for scale in (-30.0, 30.0):
        model = rj.DiffusionModel(process, lambda x, t, scale=scale: scale * matrix @ x, "x0", covariance, (3,))
        for s, t in ((0.01, 0.02), (0.3, 1.0), (0.01, 2.0)):
            kernel = model.reverse(jnp.asarray([0.3, -1.0, 0.5]), t, s, key=jax.random.key(0))
            assert np.all(np.asarray(kernel.excess) >= -1)
            assert np.all(np.isfinite(kernel.log_prob(kernel.sample(jax.random.key(1)))))


def test_a_diagonal_that_is_less_than_nothing_is_a_denoiser_that_knows():
    """Clipped in every direction to no covariance of x_0 at all: the kernel of who knows it."""
    process = NonReversible(U, Q, t_min=0.01, t_max=2.0)
    # In the coordinates of states the clean data are alpha times them: minus that is a Jacobian of the wrong sign.
    step = process.transition(0.1, 0.8)
    frame, data = step.t.frame, step.t.data
    fn = partial(_negative, np.asarray(data.matrix[0]), np.asarray(frame.inverse[0]))
    model = rj.DiffusionModel(process, fn, "x0", "diagonal", (3,))
    x = jnp.asarray([0.3, -1.0, 0.5])
    knows = step.reverse(x, jnp.zeros((3, 1, 1)), jnp.asarray(-1.0))
    np.testing.assert_allclose(dense(model.reverse(x, 0.8, 0.1), (3,)), dense(knows, (3,)), rtol=1e-9, atol=1e-12)


def _negative(matrix, inverse, x, t):
    return -30.0 * jnp.asarray(matrix) @ (jnp.asarray(inverse) @ x)


def test_a_score_says_nothing_of_curvature_where_no_signal_is_left():
    with jax.enable_x64(False):
        process = NonReversible(np.diag([0.5, 2.0]), data_covariance=1.0, t_min=0.01, t_max=30.0)
        model = rj.systems.GaussianMixture([(0.5, -0.5)], 1.0).model(process, "score", "full")
        kernel = model.reverse(jnp.asarray([0.3, -1.0]), 25.0, 1.0)
        exact = model.with_covariance("reference").reverse(jnp.asarray([0.3, -1.0]), 25.0, 1.0)
        np.testing.assert_allclose(dense(kernel, (2,)), dense(exact, (2,)), rtol=1e-4, atol=1e-5)


def test_a_grid_too_coarse_for_the_rotation_is_warned_of_with_the_steps_that_would_do():
    process = NonReversible(U, Q, t_max=2.0)
    data = rj.systems.GaussianMixture([np.zeros(3)], 0.7)
    model = data.model(process, "x0", prior=process.reference(2.0))
    rate = np.abs(process.eigenvalues.imag).max()
    with pytest.warns(rj.processes.CoarseGridWarning, match=rf"{process.steps_needed()} steps .* this grid has 2"):
        rj.sample(jax.random.key(0), model, [process.t_min, 1.0, process.t_max], 2)
    enough = np.linspace(process.t_min, process.t_max, process.steps_needed() + 1)
    assert np.all(np.diff(enough) * rate <= 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error", rj.processes.CoarseGridWarning)
        rj.sample(jax.random.key(0), model, enough, 2)
        still = NonReversible(U, t_max=2.0)
        rj.sample(jax.random.key(0), data.model(still, "x0", prior=still.reference(2.0)), [1e-3, 2.0], 2)


def test_a_formula_of_the_level_is_tried_with_what_steps_have():
    process = CriticallyDamped()
    with pytest.raises(ValueError, match="fn failed when it was tried"):
        rj.DiffusionModel(process, lambda x, level: level.signal.sum() * x[0], "x0", shape=(2, 2), noise_level="level")
