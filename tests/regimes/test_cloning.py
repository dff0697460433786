"""Cloning experiments against theory, and the exact model of a data set."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from test_skew import rates

import rnejax as rj
from rnejax.processes import Cosine, CriticallyDamped, NonReversible, RectifiedFlow, VarianceExploding
from rnejax.regimes import (
    Cloning,
    class_separation,
    cloning_probability,
    commitment_times,
    empirical_model,
    nearest_point,
    optimal_skew,
    random_skew,
    same_class_probability,
)
from rnejax.systems import GaussianMixture

KEY = jax.random.key(5)
SIZE = 8
RATES = rates(SIZE)
MEAN = np.full(SIZE, 1.2)
CLASSES = GaussianMixture([MEAN, -MEAN], 1.0)
POINTS = np.random.default_rng(0).normal(size=(40, 3))


def side(x):
    return jnp.asarray(MEAN, x.dtype) @ x > 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("skew", "own"),
    [(None, False), (random_skew(0, SIZE, 4.0), False), (optimal_skew(RATES), False), (optimal_skew(RATES), True)],
    ids=["none", "random", "best", "own samples"],
)
def test_clones_of_two_classes_end_alike_as_theory_says(skew, own):
    process = NonReversible(RATES, skew, data_covariance=1.0, t_max=10.0)
    model = CLASSES.model(process, "x0")
    points = None if own else jax.vmap(CLASSES.sample)(jax.random.split(KEY, 4000))
    times = rj.time_grid(process, 240)  # with 60 steps the error of the kernels would be seen
    found = cloning_probability(KEY, model, times, side, num_pairs=2000, num_times=6, data=points)
    theory = same_class_probability(class_separation(process, found.time, MEAN, 1.0))
    errors = np.sqrt(theory * (1 - theory) / 2000)
    # Beside chance, the classes overlap: a clone on the wrong side of the plane is counted as of the other class.
    overlap = scipy.stats.norm.sf(np.linalg.norm(MEAN))
    assert np.all(np.abs(found.probability - theory) < 3 * errors + 4 * overlap)
    assert np.all(np.diff(found.time) > 0)
    assert found.probability[0] > 0.95
    assert abs(found.probability[-1] - 0.5) < 0.15


def test_the_interval_is_wilsons_and_the_chunks_are_all_counted():
    process = Cosine()
    model = CLASSES.model(process, "x0")
    found = cloning_probability(
        KEY, model, rj.time_grid(process, 7), side, num_pairs=50, num_times=3, chunk_size=20, confidence=0.9
    )
    assert found.num_pairs == 50
    np.testing.assert_array_equal(found.time, rj.time_grid(process, 7)[[2, 4, 6]])
    counts = found.probability * 50
    np.testing.assert_allclose(counts, np.round(counts))
    z, n, p = scipy.stats.norm.ppf(0.95), 50, found.probability
    centre, half = (p + z**2 / (2 * n)), z * np.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    np.testing.assert_allclose(found.lower, np.maximum((centre - half) / (1 + z**2 / n), 0), atol=1e-12)
    np.testing.assert_allclose(found.upper, np.minimum((centre + half) / (1 + z**2 / n), 1), atol=1e-12)


def test_a_level_is_found_between_the_times():
    found = Cloning(np.array([1.0, 2.0, 3.0]), np.array([1.0, 0.9, 0.6]), *np.zeros((2, 3)), 10)
    assert found.time_at(0.75) == pytest.approx(2.5)
    assert np.isnan(found.time_at(0.5))
    assert np.isnan(Cloning(np.arange(2.0), np.array([0.5, 0.4]), *np.zeros((2, 2)), 10).time_at(0.9))


# -------------------------------------------------------------------------------------------- the model of a data set


@pytest.mark.parametrize(
    "process",
    [
        Cosine(),
        RectifiedFlow(),
        VarianceExploding(),
        NonReversible(rates(3), random_skew(0, 3, 2.0)),
        CriticallyDamped(),
    ],
    ids=lambda process: type(process).__name__,
)
@pytest.mark.parametrize("chunk_size", [1024, 7])
def test_the_denoiser_of_a_data_set_is_the_posterior_mean_over_its_points(process, chunk_size):
    model = empirical_model(process, POINTS, chunk_size=chunk_size)
    for t in (0.05 * process.t_max, 0.5 * process.t_max):
        x = process.marginal(jnp.asarray(POINTS[3], jnp.float32), t).sample(KEY)
        log_weights = jax.vmap(lambda x0, x=x, t=t: process.marginal(x0, t).log_prob(x))(jnp.asarray(POINTS))
        expected = jax.nn.softmax(log_weights) @ POINTS
        np.testing.assert_allclose(model.denoise(x, t), expected, atol=2e-4)


def test_it_generates_its_points():
    process = Cosine(t_min=1e-4)
    points = jnp.asarray(POINTS, jnp.float32)
    samples = rj.sample(KEY, empirical_model(process, points), rj.time_grid(process, 100), 50)
    distance = np.linalg.norm(np.asarray(samples.x)[:, None] - POINTS, axis=-1).min(axis=1)
    # The last kernel is as wide as the reference's at the last but one time at most.
    assert distance.max() < 6 * float(process.sigma(rj.time_grid(process, 100)[1])) * np.sqrt(3)
    label = jax.jit(jax.vmap(nearest_point(points)))
    np.testing.assert_array_equal(
        label(samples.x), np.linalg.norm(np.asarray(samples.x)[:, None] - POINTS, axis=-1).argmin(axis=1)
    )


def test_clones_end_at_one_point_after_collapse_and_commit_there():
    process = Cosine(t_min=1e-3)
    model, label = empirical_model(process, POINTS), nearest_point(POINTS)
    times = rj.time_grid(process, 60)
    found = cloning_probability(KEY, model, times, label, num_pairs=400, num_times=6)
    assert found.probability[0] > 0.97  # some points are near each other
    assert found.probability[-1] < 5 / len(POINTS)
    changes = commitment_times(KEY, model, times, label, 400)
    assert changes.shape == (400,)
    # Who has committed before t cannot be told apart by cloning at t: in the median the two agree to a grid's piece.
    assert abs(np.median(changes) - found.time_at(0.5)) < found.time[1] + 0.15


def test_the_last_change_is_at_the_time_where_the_denoised_state_has_another_label():
    process = Cosine(t_min=1e-3)
    model = rj.DiffusionModel(process, lambda x, t: jnp.where(t > 0.5, 1.0, -1.0) * jnp.ones(2), "x0", shape=(2,))
    times = rj.time_grid(process, 9)
    changes = commitment_times(KEY, model, times, lambda x: x[0] > 0, 3)
    np.testing.assert_allclose(changes, times[times <= 0.5].max())
    changes = commitment_times(KEY, model, times, lambda x: x[0] > 2, 3)
    np.testing.assert_allclose(changes, times[-1])  # decided from the start


def test_no_two_chunks_are_of_the_same_pairs():
    process = Cosine()
    times = rj.time_grid(process, 4)
    model = CLASSES.model(process, "x0")
    found = cloning_probability(KEY, model, times, side, num_pairs=60, num_times=1, chunk_size=1)
    # At t_max clones end alike with probability 1/2: all 60, or none, with 1e-17.
    assert 0.1 < found.probability[-1] < 0.9


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"label": lambda x: x[0]}, "label must return one integer or boolean"),
        ({"label": lambda x: x > 0}, "label must return one integer or boolean"),
        ({"label": 3}, "label must be a function"),
        ({"num_pairs": 0}, "num_pairs must be at least 1"),
        ({"num_times": 0}, "num_times must be at least 1"),
        ({"chunk_size": 0}, "chunk_size must be at least 1"),
        ({"confidence": 1.5}, "confidence must be between 0 and 1"),
        ({"data": np.zeros((3, 2))}, r"x must have shape \(n, 8\)"),
    ],
)
def test_what_is_no_experiment_is_refused(change, words):
    process = Cosine()
    options = {"label": side, **change}
    label = options.pop("label")
    with pytest.raises(ValueError, match=words):
        cloning_probability(KEY, CLASSES.model(process, "x0"), rj.time_grid(process, 4), label, **options)


@pytest.mark.parametrize("points", [np.zeros(3), np.zeros((0, 3)), np.full((2, 3), np.nan)])
def test_what_is_no_data_set_is_refused(points):
    with pytest.raises(ValueError, match="points must be finite numbers of shape"):
        empirical_model(Cosine(), points)
