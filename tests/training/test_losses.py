"""Score matching against closed forms: for Gaussian data the exact denoiser and its error are known."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from closed_forms import GAUSSIAN, LINEAR

import rnejax as rj
from rnejax.training import drop_labels, score_matching_loss
from rnejax.training.losses import QUANTITIES

MEAN, STD = 0.7, 0.4
PROCESSES = {
    "vp": rj.processes.VariancePreserving(),
    "cosine": rj.processes.Cosine(),
    "ve": rj.processes.VarianceExploding(),
    "flow": rj.processes.RectifiedFlow(),
}


def exact_prediction(process, quantity):
    """What a perfect network returns for data N(MEAN, STD^2), written from the definitions."""

    def predict(x, t):
        level = process.level(t)
        alpha, sigma = level.alpha, level.sigma
        variance = alpha**2 * STD**2 + sigma**2
        score = -(x - alpha * MEAN) / variance
        x0 = MEAN + alpha * STD**2 / variance * (x - alpha * MEAN)
        noise = -sigma * score
        return {
            "x0": x0,
            "epsilon": noise,
            "score": score,
            "v": alpha * noise - sigma * x0,
            "velocity": level.alpha_rate * x0 + level.sigma_rate * noise,
        }[quantity]

    return predict


def exact_loss(process, quantity, t):
    """Var[quantity | x_t], per dimension: the error that even the perfect network makes."""
    level = process.level(t)
    alpha, sigma = level.alpha, level.sigma
    posterior = STD**2 * sigma**2 / (alpha**2 * STD**2 + sigma**2)
    factor = {
        "x0": 1.0,
        "epsilon": alpha / sigma,
        "score": alpha / sigma**2,
        "v": alpha**2 / sigma + sigma,
        "velocity": level.alpha_rate - level.sigma_rate * alpha / sigma,
    }[quantity]
    return posterior * factor**2


@pytest.mark.parametrize("name", PROCESSES)
@pytest.mark.parametrize("prediction", QUANTITIES)
def test_the_loss_of_the_exact_network_is_the_posterior_variance(name, prediction):
    process, n = PROCESSES[name], 4000
    x0 = MEAN + STD * jax.random.normal(jax.random.key(1), (n, 4))
    t = jnp.full(n, 0.3)
    losses = score_matching_loss(
        jax.random.key(0), process, exact_prediction(process, prediction), x0, prediction=prediction, times=t
    )
    expected = float(exact_loss(process, prediction, 0.3))
    # Each loss is expected * chi^2_4 / 4, with relative standard deviation sqrt(2/4).
    assert abs(float(losses.mean()) / expected - 1.0) < 4 * np.sqrt(0.5 / n)


@pytest.mark.parametrize(("prediction", "weighting"), list(itertools.permutations(QUANTITIES, 2)))
def test_every_prediction_has_the_same_loss_under_one_weighting(prediction, weighting):
    process = PROCESSES["cosine"]
    x0 = MEAN + STD * jax.random.normal(jax.random.key(1), (64, 3))
    t = jnp.linspace(0.05, 0.95, 64)

    def loss(prediction):
        predict = exact_prediction(process, prediction)
        return score_matching_loss(
            jax.random.key(0), process, predict, x0, prediction=prediction, weighting=weighting, times=t
        )

    np.testing.assert_allclose(loss(prediction), loss(weighting), rtol=2e-3)


def test_the_loss_is_one_number_per_example_and_couples_none():
    process = PROCESSES["cosine"]
    predict = exact_prediction(process, "v")
    x0 = jax.random.normal(jax.random.key(1), (8, 3))
    losses = score_matching_loss(jax.random.key(0), process, predict, x0, prediction="v")
    others = score_matching_loss(jax.random.key(0), process, predict, x0.at[1:].add(1.0), prediction="v")
    assert losses.shape == (8,)
    assert float(losses[0]) == float(others[0])
    assert float(losses[1]) != float(others[1])


def test_conditions_reach_the_network_with_their_example():
    def predict(x, t, condition):
        return jnp.full_like(x, condition)

    x0 = jnp.arange(5.0)[:, None]
    losses = score_matching_loss(jax.random.key(0), PROCESSES["flow"], predict, x0, jnp.arange(5.0), prediction="x0")
    np.testing.assert_array_equal(losses, 0.0)


def test_a_batched_network_gives_the_same_losses():
    process = PROCESSES["cosine"]
    x0 = jax.random.normal(jax.random.key(1), (8, 3))
    one = exact_prediction(process, "v")

    def batched(x, t):
        assert x.shape == (8, 3)
        return jax.vmap(one)(x, t)

    arguments = {"prediction": "v"}
    np.testing.assert_array_equal(
        score_matching_loss(jax.random.key(0), process, one, x0, **arguments),
        score_matching_loss(jax.random.key(0), process, batched, x0, batched=True, **arguments),
    )


def test_a_gradient_of_the_loss_vanishes_at_the_exact_network():
    process, n = PROCESSES["cosine"], 20_000
    x0 = MEAN + STD * jax.random.normal(jax.random.key(1), (n, 1))
    exact = exact_prediction(process, "x0")

    def losses(shift):
        return score_matching_loss(jax.random.key(0), process, lambda x, t: exact(x, t) + shift, x0, prediction="x0")

    gradients = jax.jacfwd(losses)(0.0)
    assert abs(float(gradients.mean())) < 4 * float(gradients.std()) / np.sqrt(n)


@pytest.mark.parametrize("argument", ["prediction", "weighting"])
def test_an_unknown_quantity_is_named(argument):
    arguments = {"prediction": "v"} | {argument: "noise"}
    with pytest.raises(ValueError, match=f"{argument} must be one of x0, epsilon, .*: got 'noise'"):
        score_matching_loss(jax.random.key(0), PROCESSES["vp"], lambda x, t: x, jnp.zeros((2, 1)), **arguments)


def test_an_output_of_another_shape_is_an_error_and_is_not_broadcast():
    with pytest.raises(ValueError, match=r"shape of the data \(4, 2\): got \(4,\)"):
        score_matching_loss(jax.random.key(0), PROCESSES["vp"], lambda x, t: x[0], jnp.zeros((4, 2)), prediction="v")


def test_times_must_be_one_per_example():
    with pytest.raises(ValueError, match=r"shape \(4,\): got \(3,\)"):
        score_matching_loss(
            jax.random.key(0), PROCESSES["vp"], lambda x, t: x, jnp.zeros((4, 2)), prediction="v", times=jnp.ones(3)
        )


def test_labels_are_dropped_at_the_given_rate():
    n, rate = 100_000, 0.1
    dropped = drop_labels(jax.random.key(0), jnp.zeros(n, jnp.int32), rate, 10) == 10
    assert abs(float(dropped.mean()) - rate) < 4 * np.sqrt(rate * (1 - rate) / n)


def test_labels_that_are_kept_are_unchanged():
    labels = jnp.arange(1000) % 10
    after = drop_labels(jax.random.key(0), labels, 0.5, 10)
    assert bool(jnp.all((after == labels) | (after == 10)))


def test_a_rate_outside_the_unit_interval_is_an_error():
    with pytest.raises(ValueError, match=r"rate must be in \[0, 1\]: got 1.5"):
        drop_labels(jax.random.key(0), jnp.zeros(3, jnp.int32), 1.5, 10)


class TestSubspace:
    """Without a centre of mass there is no noise in its direction, and one atom's dimensions fewer."""

    PROCESS = rj.processes.Cosine(subspace=rj.kernels.CentreOfMassFree())

    def test_noise_and_error_are_those_of_the_subspace(self):
        x0 = jnp.zeros((4000, 2, 3))
        seen = []

        def nothing(x, t):
            seen.append(x)
            return jnp.zeros_like(x)

        times = jnp.full(4000, 0.5)
        found = score_matching_loss(
            jax.random.key(0), self.PROCESS, nothing, x0, prediction="epsilon", times=times, batched=True
        )
        np.testing.assert_allclose(jnp.mean(seen[0], axis=1), 0, atol=1e-6)
        # |eps|^2 / d with d = 3: mean 1, variance 2 / 3.
        assert abs(float(found.mean()) - 1) < 4 * np.sqrt(2 / 3 / 4000)

    def test_what_is_said_of_the_centre_is_not_heard(self):
        x0 = self.PROCESS.subspace.project(jax.random.normal(jax.random.key(1), (8, 3, 2)))
        values = [
            score_matching_loss(
                jax.random.key(0), self.PROCESS, lambda x, t, c=c: x + c, x0, prediction="v", batched=True
            )
            for c in (0.0, 5.0)
        ]
        np.testing.assert_allclose(*values, rtol=1e-4)


class TestAntithetic:
    PROCESS = PROCESSES["cosine"]
    X0 = MEAN + STD * jax.random.normal(jax.random.key(3), (64, 2))

    def loss(self, predict, antithetic, key=None, times=None):
        key = jax.random.key(0) if key is None else key
        return score_matching_loss(
            key, self.PROCESS, predict, self.X0, prediction="v", times=times, antithetic=antithetic, batched=True
        )

    def test_it_is_the_mean_over_a_noise_and_its_opposite(self):
        seen = []

        def predict(x, t):
            seen.append((x, t))
            return jnp.sin(x)

        found = self.loss(predict, True)
        (up, t), (down, same) = seen
        level = self.PROCESS.level(t)
        alpha, sigma = level.alpha[:, None], level.sigma[:, None]
        np.testing.assert_array_equal(t, same)
        np.testing.assert_allclose(0.5 * (up + down), alpha * self.X0, atol=1e-5)
        noise = (up - alpha * self.X0) / sigma
        expected = sum(
            jnp.mean((jnp.sin(x) - (alpha * e - sigma * self.X0)) ** 2, axis=1)
            for x, e in ((up, noise), (down, -noise))
        )
        np.testing.assert_allclose(found, expected / 2, rtol=2e-3)

    def test_where_noise_is_small_the_gradient_has_almost_none(self):
        times = jnp.full(64, 0.01)

        def gradient(key, antithetic):
            def mean(slope):
                return self.loss(lambda x, t: slope * jnp.cos(x), antithetic, key, times).mean()

            return jax.grad(mean)(1.0)

        keys = jax.random.split(jax.random.key(7), 200)
        plain, opposite = (jax.vmap(lambda key, a=a: gradient(key, a))(keys) for a in (False, True))
        assert float(jnp.std(opposite)) < 0.1 * float(jnp.std(plain))
        error = float(jnp.std(plain)) / np.sqrt(200)
        assert abs(float(plain.mean() - opposite.mean())) < 4 * error


# ----------------------------------------------------------------------------------------------------- linear SDEs


@pytest.mark.parametrize("process", LINEAR, ids=lambda process: type(process).__name__)
@pytest.mark.parametrize("prediction", ["x0", "score", "epsilon"])
def test_a_perfect_network_for_a_linear_sde_is_where_the_loss_has_its_minimum(process, prediction):
    # E[(prediction - target) f(x_t)] = 0 for every f: here the data's part of the state itself, and a constant.
    n, t = 2000, float(process._table[0][250])
    x0 = GAUSSIAN.sample(jax.random.key(1), n).astype(jnp.float32)
    output = GAUSSIAN.output(process, prediction)

    def losses(a):
        def predict(x, _):
            return output(x, t) + a[0] * process.data_of(x) + a[1]

        times = jnp.full(n, t)
        return score_matching_loss(jax.random.key(2), process, predict, x0, prediction=prediction, times=times)

    gradients = np.asarray(jax.jit(jax.jacfwd(losses))(jnp.zeros(2)), np.float64)
    z = gradients.mean(axis=0) / (gradients.std(axis=0) / np.sqrt(n))
    assert np.abs(z).max() < 4
    elsewhere = np.asarray(jax.jit(jax.jacfwd(losses))(jnp.asarray([0.2, 0.1])), np.float64).mean(axis=0)
    assert np.all(elsewhere > 0)


def test_the_loss_of_a_linear_sde_is_what_is_uncertain_of_x0():
    process = next(each for each in LINEAR if isinstance(each, rj.processes.NonReversible))
    x0 = GAUSSIAN.sample(jax.random.key(1), 4000).astype(jnp.float32)
    t = float(process._table[0][300])
    exact = float(jnp.trace(GAUSSIAN.posterior(process, jnp.zeros(3), t)[1])) / 3
    output = GAUSSIAN.output(process, "x0")
    predict = lambda x, _: output(x, t)  # noqa: E731
    found = score_matching_loss(jax.random.key(2), process, predict, x0, prediction="x0", times=jnp.full(4000, t))
    assert abs(found.mean() - exact) < 4 * found.std() / np.sqrt(4000)


def test_under_jit_times_of_a_linear_sde_are_those_of_its_table():
    process = next(iter(LINEAR))
    seen = []

    def predict(x, t):
        jax.debug.callback(lambda t: seen.append(float(t)), t)
        return x

    @jax.jit
    def losses(key, times):
        return score_matching_loss(key, process, predict, jnp.zeros((2, 3)), prediction="x0", times=times)

    wanted = jnp.asarray([0.111, 2.222])
    losses(jax.random.key(0), wanted).block_until_ready()
    jax.effects_barrier()
    table = process._table[0]
    spacing = np.diff(table).max()
    for t, each in zip(sorted(seen), np.asarray(wanted), strict=True):
        assert np.abs(table - t).min() < 1e-6
        assert abs(t - each) <= 0.51 * spacing


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"prediction": "x0", "weighting": "epsilon"}, "another quantity than the one that is predicted exists for"),
        ({"prediction": "velocity"}, "prediction must be one of x0, epsilon, score: got 'velocity'"),
    ],
)
def test_what_a_linear_sde_has_no_loss_for_is_refused(options, words):
    with pytest.raises(ValueError, match=words):
        score_matching_loss(jax.random.key(0), next(iter(LINEAR)), lambda x, t: x, jnp.zeros((2, 3)), **options)
