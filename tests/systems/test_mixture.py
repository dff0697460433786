"""Mixtures of Gaussians: the answers everything else is held against, held against quadrature and differentiation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rnejax as rj
from rnejax.systems.mixture import GaussianMixture, density_benchmark, many_modes

KEY = jax.random.key(11)
PROCESSES = {
    "vp": rj.processes.VariancePreserving(),
    "cosine": rj.processes.Cosine(),
    "ve": rj.processes.VarianceExploding(),
    "flow": rj.processes.RectifiedFlow(),
}


def diagonal():
    return GaussianMixture([[-1.0, 0.2], [0.8, -0.5], [0.1, 1.0]], std=[0.5, 0.3, 0.4], weights=[2, 3, 5])


def dense():
    covariances = [[[0.4, 0.2], [0.2, 0.3]], [[0.2, -0.1], [-0.1, 0.5]]]
    return GaussianMixture([[-1.0, 0.2], [0.8, -0.5]], covariances=covariances, weights=[1, 3])


def integrate(f, half_width=6.0, points=601):
    """Midpoint sum over a square; spectrally accurate for what has decayed at the edge."""
    axis = np.linspace(-half_width, half_width, points)
    grid = jnp.asarray(np.stack(np.meshgrid(axis, axis), -1).reshape(-1, 2))
    return np.asarray(jax.vmap(f)(grid), np.float64).sum(axis=0) * (axis[1] - axis[0]) ** 2


@pytest.mark.parametrize("mixture", [diagonal(), dense()], ids=["diagonal", "dense"])
class TestLaw:
    # Sums of 4e5 float32 terms of relative rounding 1e-6 each: 1e-5 is ample, and any wrong constant is far above.
    def test_density_integrates_to_one(self, mixture):
        assert integrate(lambda x: jnp.exp(mixture.log_prob(x))) == pytest.approx(1, abs=1e-5)

    def test_mean_and_covariance_are_the_integrals(self, mixture):
        mean = integrate(lambda x: jnp.exp(mixture.log_prob(x)) * x)
        second = integrate(lambda x: jnp.exp(mixture.log_prob(x)) * jnp.outer(x, x))
        np.testing.assert_allclose(mixture.mean, mean, atol=1e-5)
        np.testing.assert_allclose(mixture.covariance, second - np.outer(mean, mean), atol=1e-5)

    def test_score_is_the_gradient(self, mixture):
        x = jnp.array([0.3, -0.7])
        np.testing.assert_allclose(mixture.score(x), jax.grad(mixture.log_prob)(x), rtol=1e-5, atol=1e-5)

    def test_draws_have_the_moments(self, mixture):
        n = 20000
        x = jax.vmap(mixture.sample)(jax.random.split(KEY, n))
        error = np.sqrt(np.diag(mixture.covariance) / n)
        assert np.all(np.abs(np.mean(x, axis=0) - mixture.mean) < 4 * error)
        cross = (x[:, 0] - mixture.mean[0]) * (x[:, 1] - mixture.mean[1])
        assert abs(cross.mean() - mixture.covariance[0, 1]) < 4 * cross.std() / np.sqrt(n)

    @pytest.mark.parametrize("beta", [1, 2, 3])
    def test_closed_form_of_a_power_is_the_integral(self, mixture, beta):
        exact = np.log(integrate(lambda x: jnp.exp(beta * mixture.log_prob(x))))
        assert mixture.log_normalizer(beta) == pytest.approx(exact, abs=2e-5)

    def test_product_is_a_normalised_mixture(self, mixture):
        other = diagonal()
        law, log_normalizer = mixture.product(other)
        exact = np.log(integrate(lambda x: jnp.exp(mixture.log_prob(x) + other.log_prob(x))))
        assert log_normalizer == pytest.approx(exact, abs=2e-5)
        x = jnp.array([0.2, -0.4])
        pointwise = mixture.log_prob(x) + other.log_prob(x) - log_normalizer
        np.testing.assert_allclose(law.log_prob(x), pointwise, atol=1e-5)

    @pytest.mark.parametrize("beta", [0.5, 2.0, 2.7])
    def test_importance_sample_of_a_power_has_its_normalizer_and_bounded_weights(self, mixture, beta):
        n = 20000
        _, log_weights = mixture.sample_power(KEY, beta, n)
        exact = integrate(lambda x: jnp.exp(beta * mixture.log_prob(x)), half_width=9.0)
        weights = np.exp(np.asarray(log_weights, np.float64))
        assert abs(weights.mean() - exact) < 4 * weights.std() / np.sqrt(n)
        spread = log_weights.max() - log_weights.min()
        assert spread <= abs(beta - 1) * np.log(mixture.num_components) + 1e-4


@pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES)
class TestModel:
    def test_every_prediction_is_the_same_denoiser(self, process):
        mixture, x, t = dense(), jnp.array([0.4, -0.9]), 0.3
        exact = mixture.denoise(x, process.level(t))
        for prediction in ("score", "x0", "epsilon", "v", "velocity", "energy"):
            np.testing.assert_allclose(mixture.model(process, prediction).denoise(x, t), exact, rtol=2e-5, atol=2e-5)

    def test_denoiser_is_the_posterior_mean(self, process):
        mixture, x, t = diagonal(), jnp.array([0.4, -0.9]), 0.4
        joint = lambda x0: jnp.exp(mixture.log_prob(x0) + process.marginal(x0, t).log_prob(x))  # noqa: E731
        mean = integrate(lambda x0: joint(x0) * x0) / integrate(joint)
        np.testing.assert_allclose(mixture.denoise(x, process.level(t)), mean, atol=2e-5)

    def test_noised_law_is_the_convolution(self, process):
        mixture, x, t = dense(), jnp.array([0.4, -0.9]), 0.4
        density = integrate(lambda x0: jnp.exp(mixture.log_prob(x0) + process.marginal(x0, t).log_prob(x)))
        assert mixture.noised(process.level(t)).log_prob(x) == pytest.approx(np.log(density), abs=2e-5)


def test_denoiser_at_no_signal_is_the_mean():
    mixture = diagonal()
    level = rj.processes.RectifiedFlow(t_max=1.0).level(1.0)
    np.testing.assert_allclose(mixture.denoise(jnp.array([3.0, -2.0]), level), mixture.mean, rtol=1e-6)


def test_float32_keeps_the_score_at_small_noise():
    # std 0.03 and sigma 1e-3: the score is of size 30, and rounding of x - m (1e-7 / 9e-4) leaves 1e-4.
    mixture = density_benchmark(KEY)
    level = rj.processes.VarianceExploding().level(1e-3)
    x = jax.vmap(mixture.noised(level).sample)(jax.random.split(KEY, 50))
    single = jax.vmap(mixture.noised(level).score)(x)
    with jax.enable_x64(True):
        to64 = lambda tree: jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), tree)  # noqa: E731
        double = jax.vmap(to64(mixture).noised(to64(level)).score)(to64(x))
    assert np.abs(np.asarray(single) - np.asarray(double)).max() < 5e-3


def test_condition_replaces_the_weights():
    mixture, x = diagonal(), jnp.array([0.4, -0.9])
    only_second = jnp.array([-jnp.inf, 0.0, -jnp.inf])
    model = mixture.model(PROCESSES["vp"], condition=only_second)
    alone = GaussianMixture([[0.8, -0.5]], std=0.3).model(PROCESSES["vp"])
    np.testing.assert_allclose(model.score(x, 0.2), alone.score(x, 0.2), rtol=1e-5)


def test_mode_weights_count_by_weight():
    mixture = GaussianMixture([[-5.0], [5.0]], std=0.1)
    x = jnp.array([[-5.1], [4.9], [5.2]])
    np.testing.assert_allclose(mixture.mode_weights(x), [1 / 3, 2 / 3], rtol=1e-6)
    np.testing.assert_allclose(mixture.mode_weights(x, jnp.log(jnp.array([6.0, 1, 1]))), [0.75, 0.25], rtol=1e-6)


def test_named_problems_have_the_published_sizes():
    problem = density_benchmark(KEY)
    assert problem.means.shape == (40, 10)
    assert float(jnp.sqrt(problem.variances[0, 0])) == pytest.approx(0.02975, abs=1e-5)
    assert many_modes(KEY).shape == (2,)
    assert float(jnp.abs(many_modes(KEY).means).max()) <= 40


def test_package_finds_the_mixture_when_asked():
    import rnejax.systems

    assert rnejax.systems.GaussianMixture is GaussianMixture
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        _ = rnejax.systems.Nothing


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"means": [0.0, 1.0], "std": 1.0}, "means must have shape"),
        ({"means": [[0.0]]}, "either std or covariances"),
        ({"means": [[0.0], [1.0]], "std": [1.0, 1.0, 1.0]}, "std must be a number or have shape"),
        ({"means": [[0.0]], "std": 0.0}, "positive definite"),
        ({"means": [[0.0]], "covariances": [1.0]}, "covariances must have shape"),
        ({"means": [[0.0], [1.0]], "std": 1.0, "weights": [1.0, -1.0]}, "non-negative"),
    ],
)
def test_bad_input_is_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        GaussianMixture(**arguments)


def test_powers_without_a_closed_form_are_refused():
    with pytest.raises(ValueError, match="whole exponent"):
        diagonal().log_normalizer(1.5)
    with pytest.raises(ValueError, match="max_components"):
        diagonal().product(diagonal(), max_components=8)
    with pytest.raises(ValueError, match="one dimension"):
        diagonal().product(GaussianMixture([[0.0]], 1.0))
