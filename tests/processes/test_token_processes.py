"""Token processes: exact kernels, posteriors and references by counting, schedules, grids, and what they refuse."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rnejax as rj
from rnejax.processes import AnyOrder, Masked, Uniform
from rnejax.processes.tokens import SCHEDULES

V, L = 3, 3
SURVIVALS = [*SCHEDULES, lambda t: (1 - t) ** 2]
FAMILIES = [
    *(Masked(V, L, schedule) for schedule in SURVIVALS),
    *(Uniform(V, L, schedule) for schedule in SURVIVALS),
    AnyOrder(V, L),
]
MASKED = Masked(V, L)


def name(process) -> str:
    return f"{type(process).__name__}-{process.schedule if isinstance(process.schedule, str) else 'function'}"


def states(process) -> np.ndarray:
    return np.asarray(list(itertools.product(range(V + process.has_mask), repeat=L)), np.int32)


def probabilities(kernel, x) -> np.ndarray:
    return np.exp(np.asarray(jax.vmap(kernel.log_prob)(jnp.asarray(x)), np.float64))


def table(law, starts, ends) -> np.ndarray:
    """law(start).prob(end), (starts, ends)."""
    return np.exp(np.asarray(jax.vmap(lambda x: jax.vmap(law(x).log_prob)(jnp.asarray(ends)))(jnp.asarray(starts))))


def three_times(process):
    if isinstance(process, AnyOrder):
        return 0.0, 1.0, 2.0
    return process.t_min, 0.35, 0.8


@pytest.mark.parametrize("process", FAMILIES, ids=name)
def test_kernels_are_laws_and_forward_kernels_compose_to_the_marginal(process):
    """F(x_t | x_s) sums to 1, and F(t | s) F(s | 0) = F(t | 0) (Chapman-Kolmogorov), from clean tokens."""
    s, t = (2.0, 3.0) if isinstance(process, AnyOrder) else (0.35, 0.8)
    every = states(process)
    clean = every[(every < V).all(axis=1)]
    to_s = table(lambda x: process.marginal(x, s), clean, every)
    reached = to_s.sum(axis=0) > 0
    step = table(process.transition(s, t).forward, every[reached], every)
    to_t = table(lambda x: process.marginal(x, t), clean, every)
    np.testing.assert_allclose(to_s.sum(axis=1), 1, atol=1e-5)
    np.testing.assert_allclose(step.sum(axis=1), 1, atol=1e-5)
    np.testing.assert_allclose(to_s[:, reached] @ step, to_t, atol=1e-5)


@pytest.mark.parametrize("process", FAMILIES, ids=name)
def test_the_references_reverse_kernel_is_its_posterior(process):
    """ref_s(x_s) F(x_t | x_s) = ref_t(x_t) K_ref(x_s | x_t) for every pair of states."""
    s, t = (1.0, 2.0) if isinstance(process, AnyOrder) else (0.35, 0.8)
    every = states(process)
    at_s, at_t = (probabilities(process.reference_at(process.level(u), (L,)), every) for u in (s, t))
    assert at_s.sum() == pytest.approx(1, abs=1e-5)
    assert at_t.sum() == pytest.approx(1, abs=1e-5)
    some, more = at_s > 0, at_t > 0
    forward = table(process.transition(s, t).forward, every[some], every[more])
    reverse = table(process.transition(s, t).reference_reverse, every[more], every[some])
    np.testing.assert_allclose(at_s[some, None] * forward, (at_t[more, None] * reverse).T, atol=1e-6)


@pytest.mark.parametrize("process", FAMILIES, ids=name)
def test_a_network_that_knows_the_clean_tokens_has_the_posterior(process):
    """K(x_s | x_t) with mu = the clean tokens is q(x_s | x_t, x_0) by Bayes' rule."""
    _, s, t = three_times(process)
    every, x0 = states(process), jnp.asarray([2, 0, 1])
    at_s = probabilities(process.marginal(x0, s), every)
    at_t = probabilities(process.marginal(x0, t), every)
    some, more = at_s > 0, at_t > 0
    forward = table(process.transition(s, t).forward, every[some], every[more])
    posterior = (at_s[some, None] * forward).T / at_t[more, None]
    logits = jnp.where(jax.nn.one_hot(x0, V) > 0, 0.0, -jnp.inf)
    model = rj.DiffusionModel(process, lambda x, t: logits)
    reverse = table(lambda x: model.reverse(x, t, s), every[more], every[some])
    np.testing.assert_allclose(reverse, posterior, atol=1e-5)


@pytest.mark.parametrize("process", FAMILIES, ids=name)
def test_draws_have_the_probabilities_that_kernels_say(process):
    """Frequencies of 40,000 draws, chi-squared over the states that are possible."""
    _, s, t = three_times(process)
    every, count = states(process), 40_000
    x0 = jnp.asarray([2, 0, 1])
    model = rj.DiffusionModel(process, lambda x, t: jnp.asarray([[0.3, -1.0, 1.0]] * L))
    noised = process.marginal(x0, t).sample(jax.random.key(3))
    base = V + process.has_mask
    for law in (process.marginal(x0, s), model.reverse(noised, t, s), process.reference_at(process.level(s), (L,))):
        drawn = jax.vmap(law.sample)(jax.random.split(jax.random.key(0), count))
        found = np.bincount(np.asarray(drawn) @ base ** np.arange(L)[::-1], minlength=len(every))
        expected = count * probabilities(law, every)
        possible = expected > 1e-6
        assert found[~possible].sum() == 0
        degrees = possible.sum() - 1
        statistic = np.sum((found - expected)[possible] ** 2 / expected[possible])
        assert statistic < degrees + 5 * np.sqrt(2 * degrees) + 5


@pytest.mark.parametrize("process", [p for p in FAMILIES if not isinstance(p, AnyOrder)], ids=name)
def test_time_grids_span_the_range_and_are_uniform_in_what_they_say(process):
    for kind in (None, *process.grids):
        if kind == "geometric" and isinstance(process, Masked):
            continue
        times = rj.time_grid(process, 13, kind)
        assert (times[0], times[-1]) == (process.t_min, process.t_max)
        assert (np.diff(times) > 0).all()
        coordinate = process.coordinate(kind or process.default_grid, times, 7.0)
        np.testing.assert_allclose(np.diff(coordinate), np.diff(coordinate).mean(), rtol=1e-6)


def test_uniform_grids_end_where_one_token_in_a_hundred_is_lost():
    for process in FAMILIES:
        if isinstance(process, Uniform):
            assert process.alpha(process.t_min) == pytest.approx(0.99, abs=1e-9)


def test_one_token_per_step_is_a_grid_of_its_own():
    process = Masked(V, 5, "cosine").one_token_per_step()
    np.testing.assert_array_equal(rj.time_grid(process, 5), np.arange(6))
    np.testing.assert_allclose(1 - process.alpha(np.arange(6.0)), np.arange(6) / 5)
    # The network is given the time at which as many are expected to be masked.
    level = process.level(np.arange(6.0))
    np.testing.assert_allclose(Masked(V, 5, "cosine").alpha(np.asarray(level.t)), 1 - np.arange(6) / 5, atol=1e-6)
    with pytest.raises(ValueError, match="it takes 5 steps, got 3"):
        rj.time_grid(process, 3)
    with pytest.raises(ValueError, match="one token per step"):
        process.transition(1.0, 3.0)


def test_concrete_scores_are_converted_exactly():
    """s_k = p_t(x with k at i) / p_t(x), from a law of two tokens whose marginals at t are summed by hand."""
    joint = np.asarray([[0.05, 0.3, 0.1], [0.2, 0.02, 0.03], [0.1, 0.05, 0.15]])
    for process in (Masked(V, 2), Uniform(V, 2)):
        alpha = float(process.alpha(0.6))
        lost = (1 - alpha) * (np.eye(V + 1)[V] if process.has_mask else np.full(V, 1 / V))
        kernel = alpha * np.eye(V, V + process.has_mask) + lost
        marginal = kernel.T @ joint @ kernel
        x = np.asarray([V, 1]) if process.has_mask else np.asarray([2, 1])
        here = marginal[tuple(x)]
        log_scores = np.log(
            [[marginal[k, x[1]] / here for k in range(V)], [marginal[x[0], k] / here for k in range(V)]]
        )
        posterior = joint * np.multiply.outer(kernel[:, x[0]], kernel[:, x[1]])
        posterior /= posterior.sum()
        model = rj.DiffusionModel(process, lambda x, t, s=log_scores: jnp.asarray(s), "concrete_score")
        found = model.denoise(jnp.asarray(x), 0.6)
        expected = np.stack([posterior.sum(axis=1), posterior.sum(axis=0)])
        np.testing.assert_allclose(found, expected, atol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((1, 4), "vocab_size must be at least 2"),
        ((4, 0), "length must be at least 1"),
        ((4.5, 3), "vocab_size must be an integer"),
        ((4, 3, "quadratic"), "unknown schedule 'quadratic'; one of linear, cosine, log_linear"),
        ((4, 3, lambda t: t), "survival alpha"),
        ((4, 3, lambda t: 0.5 + 0 * t), "survival alpha"),
        ((4, 3, lambda t: np.linalg.inv(t)), "schedule failed on an array of times"),
        ((4, 3, 5), "a name or a function"),
    ],
)
def test_impossible_processes_are_refused(arguments, message):
    for family in (Masked, Uniform, AnyOrder):
        with pytest.raises(ValueError, match=message):
            family(*arguments)


def test_impossible_times_are_refused():
    with pytest.raises(ValueError, match="needs 0 <= t_min < t_max <= 1"):
        Masked(V, L, t_min=0.5, t_max=0.4)
    with pytest.raises(ValueError, match="lost tokens at both ends"):
        rj.time_grid(MASKED, 5, "geometric")
    with pytest.raises(ValueError, match="unknown grid 'edm' for Masked; choose one of uniform, survival, geometric"):
        rj.time_grid(MASKED, 5, "edm")
    with pytest.raises(ValueError, match="no MASK token"):
        _ = Uniform(V, L).mask_token


@pytest.mark.parametrize(
    ("x", "message"),
    [
        ([[0, 1, 5]], r"x\[0, 2\] is 5, but tokens are 0, ..., 2; 1 of 1 rows"),
        ([[0, 1, 2], [0, -1, 2]], r"x\[1, 1\] is -1"),
        ([[0, 1, 3]], r"x\[0, 2\] is MASK \(3\), which clean data have not"),
        ([[0.0, 1.0, 2.0]], "integers"),
        ([[0, 1]], r"shape \(n, 3\)"),
        ([0, 1, 2], "add a batch axis"),
    ],
)
def test_data_that_are_no_tokens_are_refused(x, message):
    model = rj.DiffusionModel(MASKED, lambda x, t: jnp.zeros((L, V)))
    with pytest.raises(ValueError, match=message):
        rj.log_density(jax.random.key(0), model, np.asarray(x), rj.time_grid(MASKED, 4), 2)


def test_uniform_data_have_no_mask():
    model = rj.DiffusionModel(Uniform(V, L), lambda x, t: jnp.zeros((L, V)))
    with pytest.raises(ValueError, match=r"is 3, but tokens are 0, \.\.\., 2"):
        rj.log_density(jax.random.key(0), model, np.asarray([[0, 1, 3]]), rj.time_grid(model.process, 4), 2)


@pytest.mark.parametrize("process", [MASKED, MASKED.one_token_per_step(), Uniform(V, L)])
def test_no_law_is_given_of_what_are_no_tokens(process):
    time = 1
    for x0, message in [
        ([0, 1, 5], r"x0\[2\] is 5, but tokens are 0, \.\.\., 2$"),
        ([0, -1, 2], r"x0\[1\] is -1"),
        ([0, 1], r"x0 must have shape \(3,\), one sequence of that length, got \(2,\)"),
        ([[0, 1, 2]], r"one sequence of that length, got \(1, 3\)"),
        ([0, 1, 3], "x0.2. is"),
    ]:
        with pytest.raises(ValueError, match=message):
            process.marginal(np.asarray(x0), time)
    with pytest.raises(ValueError, match=r"x_s\[0\] is 4, but tokens are 0, \.\.\., \d"):
        process.forward(np.asarray([4, 1, 2]), 0, time)
    jax.eval_shape(lambda x0: process.marginal(x0, time).log_prob(x0), jnp.asarray([9, 9, 9]))  # nobody looks


def test_what_is_masked_may_be_noised_again():
    noised = MASKED.forward(np.asarray([0, 3, 3]), 0.2, 0.5).sample(jax.random.key(0))
    assert list(noised[1:]) == [3, 3]
