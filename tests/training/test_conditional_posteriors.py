"""Amortised posteriors: one network for p(x) exp(b . x) / Z(b) of every b at once, against closed forms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rnejax as rj
from rnejax.processes import Cosine
from rnejax.systems import GaussianMixture
from rnejax.training import (
    Examples,
    FineTuned,
    back_and_forth_residual,
    batch_log_normalizer,
    trajectory_balance_loss,
    trajectory_balance_residual,
)

KEY = jax.random.key(5)
MEAN = np.array([0.4, -0.3])
COVARIANCE = np.array([[0.5, 0.2], [0.2, 0.3]])
PROCESS = Cosine(t_min=0.01, t_max=1.0)
TIMES = rj.time_grid(PROCESS, 6)
ALPHA, SIGMA = float(PROCESS.alpha(PROCESS.t_min)), float(PROCESS.sigma(PROCESS.t_min))
AT_T_MIN = ALPHA**2 * COVARIANCE + SIGMA**2 * np.eye(2)
TILTS = np.array([[0.8, -0.5], [0.0, 1.0], [0.8, -0.5], [-0.3, 0.2], [0.0, 1.0], [0.8, -0.5]])


@pytest.fixture(autouse=True)
def double_precision():
    with jax.enable_x64(True):
        yield


def log_reward(x, b):
    return x @ b


def log_normalizer(b):
    return ALPHA * b @ MEAN + 0.5 * b @ AT_T_MIN @ b


def moved(matrix, x, level, b):
    """What the data would be if their mean were moved by the matrix times b."""
    return (
        GaussianMixture([MEAN], covariances=COVARIANCE[None])
        ._replace(means=jnp.asarray([MEAN + matrix @ b]))
        .denoise(x, level)
    )


def model(matrix):
    return rj.DiffusionModel(
        PROCESS, moved, "x0", "full", (2,), params=jnp.asarray(matrix), condition=jnp.zeros(2), noise_level="level"
    )


EXACT = AT_T_MIN / ALPHA  # the mean of x_{t_min} moves by its covariance times b
PRIOR = np.zeros((2, 2))


@pytest.mark.parametrize("up", [False, True], ids=["generated", "noised"])
def test_every_path_of_every_condition_is_balanced(up):
    data = {"x": jnp.asarray(np.random.default_rng(0).normal(size=(6, 2)))} if up else {"num_paths": 6}
    expected = np.array([log_normalizer(b) for b in TILTS])
    paths = trajectory_balance_residual(
        KEY, model(EXACT), model(PRIOR), TIMES, log_reward, expected, condition=jnp.asarray(TILTS), **data
    )
    np.testing.assert_allclose(paths.residual, 0, atol=1e-9)
    assert np.std(paths.log_ratio) > 0.1
    wrong = paths.residual - expected + expected[::-1]
    assert np.abs(wrong).max() > 0.1, "log Z must differ between conditions"


def test_back_and_forth_knows_conditions():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(6, 2)))
    differences, back = back_and_forth_residual(
        KEY, model(EXACT), model(PRIOR), TIMES[:4], log_reward, x, condition=jnp.asarray(TILTS)
    )
    np.testing.assert_allclose(differences, 0, atol=1e-9)
    assert np.std(back.log_ratio) > 0.01


def test_a_prior_has_conditions_of_its_own():
    """Under one condition both are the same model, which no reward of 1 changes."""
    c = jnp.asarray(TILTS[::-1].copy())

    def reward(x, b):
        return 0.0 * x[0]

    paths = trajectory_balance_residual(
        KEY, model(EXACT), model(EXACT), TIMES, reward, condition=c, prior_condition=c, num_paths=6
    )
    np.testing.assert_allclose(paths.log_ratio, 0, atol=1e-12)
    other = trajectory_balance_residual(KEY, model(EXACT), model(EXACT), TIMES, reward, condition=c, num_paths=6)
    assert np.abs(other.log_ratio).min() > 1e-3, "without it, the prior has the condition that it was made with"


@pytest.mark.parametrize("normalizer", ["batch", lambda matrix, b: ALPHA * b @ MEAN + 0.5 * b @ matrix @ b])
def test_the_loss_vanishes_for_every_source(normalizer):
    sources = {"generated": 0.5, "inflated": 0.2, "noised": 0.2, "back_and_forth": 0.1}
    loss = trajectory_balance_loss(
        model(EXACT), model(PRIOR), TIMES, log_reward, sources=sources, normalizer=normalizer, paths_per_condition=3
    )
    x = jnp.asarray(np.random.default_rng(0).normal(size=(18, 2)))
    batch = Examples(x, jnp.asarray(np.concatenate([TILTS] * 3)))
    values, report = loss(KEY, FineTuned(jnp.asarray(EXACT), jnp.asarray(AT_T_MIN)), batch)
    assert values.shape == (18,)
    np.testing.assert_allclose(values, 0, atol=1e-15)
    values, _ = loss(KEY, FineTuned(jnp.asarray(0.5 * EXACT), jnp.asarray(AT_T_MIN)), batch)
    assert np.median(values) > 1e-4
    assert np.isfinite(report["log_normalizer"]).all()


def test_log_z_of_every_condition_is_learned():
    """The gradient of log Z(b)'s weights is that of the mean square residual."""
    loss = trajectory_balance_loss(
        model(EXACT), model(PRIOR), TIMES, log_reward, normalizer=lambda table, label: table[label[0].astype(int)]
    )
    batch = Examples(jnp.zeros((6, 2)), jnp.asarray(TILTS) * 0 + jnp.asarray([[0, 0], [1, 0]] * 3))
    tuned = FineTuned(jnp.asarray(EXACT), jnp.asarray([0.3, -0.4]))

    def mean(table):
        return loss(KEY, tuned._replace(log_normalizer=table), batch)[0].mean()

    exact = np.array([0.0, log_normalizer(np.array([1.0, 0.0]))])
    np.testing.assert_allclose(jax.grad(mean)(tuned.log_normalizer), 0.5 * (tuned.log_normalizer - exact), rtol=1e-8)


def test_the_batchs_normaliser_is_that_of_equal_conditions():
    paths = trajectory_balance_residual(
        KEY, model(0.5 * EXACT), model(PRIOR), TIMES, log_reward, condition=jnp.asarray(TILTS), num_paths=6
    )
    found = batch_log_normalizer(paths, jnp.asarray(TILTS))
    values = np.asarray(paths.log_reward - paths.log_ratio)
    groups = [[0, 2, 5], [1, 4], [0, 2, 5], [3], [1, 4], [0, 2, 5]]
    np.testing.assert_allclose(found, [values[group].mean() for group in groups], rtol=1e-12)
    alike = batch_log_normalizer(paths, {"label": jnp.zeros(6, int), "b": jnp.zeros((6, 0))})
    np.testing.assert_allclose(alike, batch_log_normalizer(paths))


@pytest.mark.parametrize("repeats", [1, 3])
def test_paths_of_one_condition_are_taken_in_turn(repeats):
    """Every source has paths of all conditions of the batch."""
    seen = []

    def reward(x, b):
        jax.debug.callback(lambda b: seen.append(float(b[0])), b)
        return x @ b

    loss = trajectory_balance_loss(
        model(EXACT), model(PRIOR), TIMES, reward, sources={"generated": 2, "noised": 1}, paths_per_condition=repeats
    )
    conditions = jnp.stack([jnp.arange(6.0), jnp.zeros(6)], axis=1)
    loss(KEY, FineTuned(jnp.asarray(EXACT), jnp.zeros(())), Examples(jnp.zeros((6, 2)), conditions))
    assert sorted(seen) == sorted([0, 1, 2, 3, 4, 5] if repeats == 1 else [0, 1] * 3)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"condition": jnp.zeros((5, 2))}, r"condition must have one for each of 6 paths, got leading sizes \[5\]"),
        ({"condition": jnp.asarray(1.0)}, "condition must have one for each of 6 paths"),
        ({"prior_condition": jnp.zeros((2, 2))}, "prior_condition must have one for each of 6 paths"),
        ({"condition": jnp.zeros((6, 3))}, "fn"),
    ],
)
def test_conditions_that_do_not_fit_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        trajectory_balance_residual(KEY, model(EXACT), model(PRIOR), TIMES, log_reward, num_paths=6, **options)


def test_what_has_no_condition_is_told():
    function = trajectory_balance_loss(
        model(EXACT), model(PRIOR), TIMES, log_reward, normalizer=lambda weights, b: weights
    )
    with pytest.raises(ValueError, match=r"give fit Examples\(x, condition\)"):
        function(KEY, FineTuned(jnp.asarray(EXACT), jnp.zeros(())), jnp.zeros((4, 2)))
    uneven = trajectory_balance_loss(model(EXACT), model(PRIOR), TIMES, log_reward, paths_per_condition=3)
    with pytest.raises(ValueError, match="paths_per_condition must divide the batch's size, 4"):
        uneven(KEY, FineTuned(jnp.asarray(EXACT), jnp.zeros(())), Examples(jnp.zeros((4, 2)), jnp.zeros((4, 2))))
