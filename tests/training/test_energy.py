"""Energy-based training: residuals that vanish for exact energies, and only for true noising pairs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from closed_forms import GAUSSIAN, LINEAR, moments

import rnejax as rj
from rnejax.kernels import CentreOfMassFree
from rnejax.systems import GaussianMixture
from rnejax.systems.mixture import random_mixture
from rnejax.training import energy_loss, fokker_planck_residual, noising_pair, rne_residual, score_of_energy

KEY = jax.random.key(0)
PROCESS = rj.processes.VariancePreserving(data_std=0.6)
MIXTURE = random_mixture(jax.random.key(1), 5, 2, 0.2)


def pairs(mixture, s, t, n=2000, key=KEY, process=PROCESS):
    """n noising pairs of samples of a mixture."""
    key_data, key_noise, key_pair = jax.random.split(key, 3)
    x0 = jax.vmap(mixture.sample)(jax.random.split(key_data, n))
    noise = jax.random.normal(key_noise, x0.shape)
    return noising_pair(key_pair, process, x0, jnp.full(n, s), jnp.full(n, t), noise)


def residuals(model, pair, **options):
    s, t = float(pair.s[0]), float(pair.t[0])
    return jax.jit(jax.vmap(lambda a, b: rne_residual(model, a, b, s, t, **options)))(pair.x_s, pair.x_t)


class TestPairs:
    def test_a_pair_is_a_noising_transition(self):
        """Both marginals, and the covariance of a transition, Cov[x_s, x_t] = a Var[x_s], of Gaussian data."""
        s, t, n = 0.2, 0.35, 40_000
        pair = pairs(GaussianMixture(jnp.zeros((1, 2)), 0.5), s, t, n)
        step = PROCESS.transition(s, t)
        var_s = step.s.alpha**2 * 0.25 + step.s.sigma**2
        var_t = step.t.alpha**2 * 0.25 + step.t.sigma**2
        bound = 4 * np.sqrt(2 / (2 * n))  # four standard errors of a variance of 2 n numbers, relative
        np.testing.assert_allclose(jnp.var(pair.x_s), var_s, rtol=bound)
        np.testing.assert_allclose(jnp.var(pair.x_t), var_t, rtol=bound)
        np.testing.assert_allclose(jnp.mean(pair.x_s * pair.x_t), step.decay * var_s, rtol=1.5 * bound)
        fresh = (pair.x_t - step.decay * pair.x_s) / jnp.sqrt(step.variance)
        assert abs(float(jnp.mean(fresh * pair.x_s))) < 4 * float(jnp.sqrt(var_s / (2 * n)))
        np.testing.assert_allclose(jnp.var(fresh), 1, rtol=bound)

    def test_pairs_stay_on_the_subspace(self):
        process = rj.processes.Cosine(t_min=0.01, subspace=CentreOfMassFree())
        x0 = jax.vmap(process.subspace.project)(jax.random.normal(KEY, (8, 4, 3)))
        pair = noising_pair(KEY, process, x0, jnp.full(8, 0.2), jnp.full(8, 0.3), jnp.zeros_like(x0))
        np.testing.assert_allclose(pair.x_s.mean(axis=1), 0, atol=1e-6)


class TestRneResidual:
    @pytest.mark.parametrize("covariance", ["reference", "full"])
    def test_it_vanishes_for_gaussian_data_whatever_the_step(self, covariance):
        with jax.enable_x64(True):  # where nothing but rounding is left
            process = rj.processes.VariancePreserving(data_std=0.5)
            mixture = GaussianMixture(jnp.zeros((1, 2)), 0.5)
            model = mixture.model(process, "energy", covariance)
            pair = pairs(mixture, 0.1, 0.7, 64, process=process)
            np.testing.assert_allclose(residuals(model, pair), 0, atol=1e-9)

    def test_the_covariance_makes_it_smaller_and_the_paper_needs_small_steps(self):
        exact = MIXTURE.model(PROCESS, "energy", "full")
        size = {}
        for name, model in {"full": exact, "euler": exact.with_covariance("euler")}.items():
            for t in (0.102, 0.12):
                size[name, t] = float(jnp.std(residuals(model, pairs(MIXTURE, 0.1, t))))
        # What the covariance leaves is of order step^1.5, what Euler-Maruyama leaves of order step.
        assert size["full", 0.12] < size["euler", 0.12] / 2
        assert size["full", 0.102] < size["euler", 0.102] / 8
        assert size["euler", 0.102] < 1.5 * size["euler", 0.12] / 10

    def test_independent_noises_are_no_pair(self):
        """A mistake seen in public code: x_s and x_t noised independently of each other."""
        model = MIXTURE.model(PROCESS, "energy", "full")
        pair = pairs(MIXTURE, 0.1, 0.12)
        apart = pair._replace(x_s=pairs(MIXTURE, 0.1, 0.12, key=jax.random.key(9)).x_s)
        assert float(jnp.std(residuals(model, apart))) > 50 * float(jnp.std(residuals(model, pair)))

    def test_only_the_two_energies_have_a_gradient(self):
        def energy(params, x, t, condition):
            return params * jnp.sum(x**2) * (1 + t)

        def model(params):
            return rj.DiffusionModel(PROCESS, energy, "energy", "full", (2,), params=params)

        x_s, x_t = jnp.asarray([0.3, -0.2]), jnp.asarray([0.5, 0.1])
        gradient = jax.grad(lambda params: rne_residual(model(params), x_s, x_t, 0.1, 0.2))(0.7)
        np.testing.assert_allclose(gradient, jnp.sum(x_t**2) * 1.2 - jnp.sum(x_s**2) * 1.1, rtol=1e-5)

    def test_a_model_of_another_prediction_is_refused(self):
        with pytest.raises(ValueError, match="predicts 'score', which is no energy"):
            rne_residual(MIXTURE.model(PROCESS, "score"), jnp.zeros(2), jnp.zeros(2), 0.1, 0.2)


class TestFokkerPlanckResidual:
    def test_its_mean_vanishes_for_the_exact_energy(self):
        """Over probes and states; and not for an energy whose time runs wrong."""
        n = 4000
        model = MIXTURE.model(PROCESS, "energy")
        x = pairs(MIXTURE, 0.2, 0.3, n).x_t
        found = jax.vmap(lambda key, x: fokker_planck_residual(key, model, x, 0.3))(jax.random.split(KEY, n), x)
        scale = float(jnp.std(found))
        assert abs(float(jnp.mean(found))) < 4 * scale / np.sqrt(n)
        slow = rj.DiffusionModel(
            PROCESS, lambda x, t: MIXTURE.noised(PROCESS.level(0.5 * t + 0.15)).energy(x), "energy", shape=(2,)
        )
        wrong = jax.vmap(lambda key, x: fokker_planck_residual(key, slow, x, 0.3))(jax.random.split(KEY, n), x)
        difference = wrong - found  # of the same probes: the rate in time that is missing
        assert float(jnp.mean(difference**2)) > 1

    def test_it_vanishes_at_every_point_and_not_only_on_average(self):
        """Over probes at fixed points: on average over p the Laplacian and |score|^2 cancel, whatever their factor.

        float64, where a central difference of 1e-3 in time is good to 1e-5 of the terms, which are of order 10.
        """
        with jax.enable_x64(True):
            process = rj.processes.VariancePreserving(data_std=0.6)
            model = GaussianMixture(jnp.zeros((1, 2)), 0.6).model(process, "energy")
            n = 20_000
            for point in ([0.0, 0.0], [1.0, -0.5], [2.0, 2.0]):
                x = jnp.asarray(point)
                found = jax.vmap(lambda key, x=x: fokker_planck_residual(key, model, x, 0.3))(jax.random.split(KEY, n))
                assert abs(float(jnp.mean(found))) < 4 * float(jnp.std(found)) / np.sqrt(n) + 1e-3

    def test_two_probes_multiply_to_the_square(self):
        """The product of two is free of the probes' own variance; one probe squared is not."""
        n = 4000
        model = MIXTURE.model(PROCESS, "energy")
        x = pairs(MIXTURE, 0.2, 0.3, n).x_t
        both = [
            jax.vmap(lambda key, x: fokker_planck_residual(key, model, x, 0.3))(jax.random.split(key, n), x)
            for key in jax.random.split(KEY)
        ]
        product, square = both[0] * both[1], both[0] ** 2
        assert abs(float(jnp.mean(product))) < 4 * float(jnp.std(product)) / np.sqrt(n)
        assert float(jnp.mean(square)) > 10 * float(jnp.std(square)) / np.sqrt(n)

    def test_without_a_centre_of_mass_the_dimension_is_that_of_the_subspace(self):
        """Gaussian clusters, of whose normalising constant 3 (n - 1) dimensions know; in 3 n it would be off by 3 f."""
        process = rj.processes.VariancePreserving(data_std=0.6, subspace=CentreOfMassFree())

        def energy(x, t):
            level = process.level(t)
            variance = 0.36 * level.alpha**2 + level.sigma**2
            return 0.5 * jnp.sum(x**2) / variance + 4.5 * jnp.log(2 * jnp.pi * variance)

        model = rj.DiffusionModel(process, energy, "energy", shape=(4, 3))
        n, t = 4000, 0.3
        x = jax.vmap(process.subspace.project)(jax.random.normal(KEY, (n, 4, 3)))
        keys = jax.random.split(jax.random.key(3), n)
        found = np.asarray(jax.vmap(lambda key, x: fokker_planck_residual(key, model, x, t))(keys, x))
        error = found.std() / np.sqrt(n)
        # The probe's noise is all there is, and the central difference in time: its error is below 1e-3 here.
        assert abs(found.mean()) < 4 * error + 1e-3
        linear, _ = rj.training.energy.drift_and_diffusion(process.level(t))
        assert 10 * error < 3 * abs(float(linear)), "the check must be able to fail"

    def test_steps_must_be_positive(self):
        with pytest.raises(ValueError, match="time_step and probe_std must be positive"):
            fokker_planck_residual(KEY, MIXTURE.model(PROCESS, "energy"), jnp.zeros(2), 0.3, time_step=0.0)


def exact_energy(params, x, t, *condition):
    """The energies of the noised mixture, times params, on a batch."""
    return params * jax.vmap(lambda x, t: MIXTURE.noised(PROCESS.level(t)).energy(x))(x, t)


@functools.cache
def compiled(weights):
    """The loss of the exact energy, compiled once for all values of its factor."""
    return jax.jit(energy_loss(PROCESS, exact_energy, weights=dict(weights), times=lambda u: 0.05 + 0.4 * u))


class TestEnergyLoss:
    DATA = jax.vmap(MIXTURE.sample)(jax.random.split(jax.random.key(5), 512))

    def value(self, weights, params=1.0):
        return compiled(tuple(weights.items()))(KEY, jnp.asarray(params), self.DATA)[0]

    def test_residuals_vanish_for_the_exact_energy_and_not_for_another(self):
        for name in ("rne", "prior"):
            exact, wrong = (self.value({name: 1.0}, params=params) for params in (1.0, 1.3))
            assert float(jnp.min(exact)) >= 0
            assert float(jnp.mean(exact)) < 0.1 * float(jnp.mean(wrong)), name

    def test_a_residual_is_a_rate_per_unit_of_log_snr_and_root_of_a_dimension(self):
        """An exact energy of Gaussian data plus c log-SNR(t): the residual is c of every unit, of every pair."""
        process, c = rj.processes.VariancePreserving(data_std=0.6), 0.7

        def energy(params, x, t):
            level = process.level(t)
            variance = level.reference_variance
            return 0.5 * jnp.sum(x**2, -1) / variance + jnp.log(2 * jnp.pi * variance) + params * level.log_snr

        with jax.enable_x64(True):
            loss = energy_loss(process, energy, weights={"rne": 1.0}, covariance="reference", bound=np.inf, thinning={})
            data = 0.6 * jax.random.normal(KEY, (64, 2))
            np.testing.assert_allclose(loss(KEY, jnp.asarray(c), data)[0], c**2 / 2, rtol=1e-6)
            np.testing.assert_allclose(loss(KEY, jnp.asarray(0.0), data)[0], 0, atol=1e-12)

    def test_fokker_planck_is_zero_in_the_mean_for_the_exact_energy(self):
        exact, wrong = (self.value({"fokker_planck": 1.0}, params=params) for params in (1.0, 2.0))
        error = [float(jnp.std(each)) / np.sqrt(512) for each in (exact, wrong)]
        assert abs(float(jnp.mean(exact))) < 4 * error[0]
        assert float(jnp.mean(wrong)) > 4 * error[1]

    def test_the_paper_s_residual_has_noise_of_its_own_which_the_covariance_takes_away(self):
        """For small steps Euler-Maruyama leaves the Hessian's noise, of the order of the step, whatever the step."""
        euler, corrected = (float(jnp.mean(self.value({name: 1.0}))) for name in ("rne_euler", "rne"))
        assert corrected < 0.25 * euler
        assert float(jnp.mean(self.value({"rne_euler": 1.0}, params=1.5))) > 2 * euler

    def test_score_matching_is_that_of_the_score(self):
        """|eps - eps_theta|^2 / d at the same times, whatever the random numbers: within four standard errors."""
        n = 20_000
        data = jax.vmap(MIXTURE.sample)(jax.random.split(jax.random.key(6), n))
        law = lambda u: 0.05 + 0.4 * u  # noqa: E731
        ours = energy_loss(PROCESS, exact_energy, weights={"score": 1.0}, times=law)(KEY, jnp.asarray(1.0), data)[0]
        theirs = rj.training.score_matching_loss(
            KEY,
            PROCESS,
            lambda x, t: score_of_energy(exact_energy)(jnp.asarray(1.0), x, t),
            data,
            prediction="score",
            weighting="epsilon",
            times=law,
            batched=True,
        )
        error = float(jnp.sqrt((jnp.var(ours) + jnp.var(theirs)) / n))
        assert abs(float(jnp.mean(ours) - jnp.mean(theirs))) < 4 * error

    def test_terms_add_up_by_their_weights(self):
        weights = {"score": 0.5, "rne": 2.0, "rne_euler": 3.0, "fokker_planck": 0.1, "prior": 4.0}
        total = self.value(weights, params=1.1)
        parts = [weight * self.value({name: 1.0}, params=1.1) for name, weight in weights.items()]
        np.testing.assert_allclose(total, sum(parts), rtol=2e-3, atol=1e-3)

    @pytest.mark.parametrize("bound", [0.3, 1.0])
    def test_the_influence_of_a_residual_is_bounded(self, bound):
        """u^2 becomes 2 c^2 (sqrt(1 + u^2 / c^2) - 1), of every example, and nothing else changes."""
        weights = {"score": 1.0, "rne": 1.0, "rne_euler": 1.0}
        both = [
            jax.jit(energy_loss(PROCESS, exact_energy, weights=weights, thinning={}, bound=each))(
                KEY, jnp.asarray(1.6), self.DATA
            )[1]
            for each in (np.inf, bound)
        ]
        square = np.asarray(both[0]["rne"], np.float64)
        assert square.min() < 0.1 * bound**2, "what is small has to be seen"
        assert square.max() > 10 * bound**2, "what is large has to be seen"
        np.testing.assert_allclose(both[1]["rne"], 2 * bound**2 * (np.sqrt(1 + square / bound**2) - 1), rtol=2e-4)
        for name in ("score", "rne_euler"):
            np.testing.assert_array_equal(both[0][name], both[1][name])

    def test_a_bound_has_to_be_positive(self):
        with pytest.raises(ValueError, match="bound must be positive"):
            energy_loss(PROCESS, exact_energy, weights={"rne": 1.0}, bound=0.0)

    def test_terms_are_told_beside_their_sum(self):
        weights = {"score": 0.5, "rne": 2.0}
        total, terms = compiled(tuple(weights.items()))(KEY, jnp.asarray(1.1), self.DATA)
        assert terms.keys() == weights.keys()
        np.testing.assert_allclose(total, 0.5 * terms["score"] + 2.0 * terms["rne"], rtol=1e-6)

    def test_the_exact_energy_is_a_minimum_of_every_term(self):
        """The gradient with respect to a factor on the energy, in standard errors, is zero at 1 and not elsewhere."""
        for name in ("score", "rne", "prior"):
            slopes = {}
            for params in (1.0, 1.2):
                step = 1e-2
                up, down = (self.value({name: 1.0}, params=params + d) for d in (step, -step))
                slope = np.asarray(up - down) / (2 * step)
                slopes[params] = slope.mean() / (slope.std() / np.sqrt(len(slope)) + 1e-3)
            assert abs(slopes[1.0]) < 4, name
            assert slopes[1.2] > 6, name

    @staticmethod
    def by_condition(thinning):
        """The roots of the prior term of four examples whose energies are their conditions, 0 to 3,000."""

        def energy(params, x, t, condition):
            return condition + 0 * jnp.sum(x, axis=-1)

        loss = energy_loss(
            PROCESS,
            energy,
            lambda key, batch: (batch, 1000.0 * jnp.arange(len(batch))),
            weights={"prior": 1.0},
            thinning=thinning,
        )
        return jnp.sqrt(2 * loss(KEY, None, jnp.zeros((4, 2)))[0])  # the term is divided by the dimension

    def test_a_weight_means_the_same_in_any_dimension(self):
        """Normal data with their exact energy: what Euler-Maruyama leaves is independent noise per dimension."""
        process = rj.processes.VariancePreserving()
        level = process.level(0.1)
        variance = level.alpha**2 * 0.25 + level.sigma**2
        means, errors = [], []
        for d in (2, 40):
            loss = energy_loss(
                process,
                lambda params, x, t: 0.5 * params * jnp.sum(x**2, axis=-1) / variance,
                weights={"rne_euler": 1.0},
                times=lambda u: 0.1 + 0 * u,  # and the step of 1e-4 changes the variance by next to nothing
            )
            value = np.asarray(jax.jit(loss)(KEY, jnp.asarray(1.0), 0.5 * jax.random.normal(KEY, (20_000, d)))[0])
            means.append(value.mean())
            errors.append(value.std() / np.sqrt(len(value)))
        assert means[0] > 10 * errors[0]
        assert abs(means[0] - means[1]) < 4 * np.hypot(*errors)

    def test_conditions_reach_the_network(self):
        np.testing.assert_allclose(self.by_condition({}), [0, 1000, 2000, 3000], atol=30)  # a log-density: a few nats

    def test_a_thinned_term_stands_for_what_was_left_out(self):
        """Every second example, twice; every third of four, the first and the last, twice too."""
        twice = np.sqrt(2)
        np.testing.assert_allclose(self.by_condition({"prior": 2}), [0, 0, 2000 * twice, 0], atol=50)
        np.testing.assert_allclose(self.by_condition({"prior": 3}), [0, 0, 0, 3000 * twice], atol=50)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"weights": {"rnd": 1.0}}, "must name terms of the loss, score, rne, .*: got rnd"),
            ({"weights": {}}, "got none"),
            ({"weights": {"rne": 0.0}}, "a weight must be positive; leave out.*rne: 0.0"),
            ({"weights": {"rne": 1.0}, "step_ratio": (0.9, 1.2)}, "step_ratio must be"),
            ({"weights": {"rne": 1.0}, "thinning": {"rne": 0}}, "thinning of rne must be at least 1, got 0"),
        ],
    )
    def test_what_cannot_be_is_refused(self, options, message):
        with pytest.raises(ValueError, match=message):
            energy_loss(PROCESS, exact_energy, **options)


SOME = [list(LINEAR)[i] for i in (1, 2, 4, 6)]  # diagonal, dense, circulating, a phase space
every_linear = pytest.mark.parametrize("process", SOME, ids=lambda process: type(process).__name__)


def covariance_at(process, t):
    """Of the noised Gaussian data, centred, of the flattened state."""
    signal, noise = moments(process, t, 3)
    return signal @ jnp.asarray(GAUSSIAN.covariances[0]) @ signal.T + noise


@every_linear
class TestLinearNoise:
    """Gaussian data, whose energy is known at all times by matrices that the library does not use."""

    @pytest.fixture(autouse=True)
    def double_precision(self):
        with jax.enable_x64(True):
            yield
        jax.clear_caches()

    @staticmethod
    def data(n):
        root = np.linalg.cholesky(GAUSSIAN.covariances[0])
        return jnp.asarray(np.random.default_rng(3).normal(size=(n, 3)) @ root.T)

    @staticmethod
    def losses(process, weights, factors, n=256, **options):
        def energy(params, x, t):
            def one(x, t):
                covariance, x = covariance_at(process, t), x.reshape(-1)
                log_det = jnp.linalg.slogdet(2 * jnp.pi * covariance)[1]
                return 0.5 * x @ jnp.linalg.solve(covariance, x) + 0.5 * log_det

            return params * jax.vmap(one)(x, t)

        loss = jax.jit(energy_loss(process, energy, weights=weights, thinning={}, bound=np.inf, **options))
        return [np.asarray(loss(KEY, jnp.asarray(factor), TestLinearNoise.data(n))[0]) for factor in factors]

    def test_pairs_are_noising_transitions(self, process):
        n = 20_000
        s, t = process.t_min + 0.2 * (process.t_max - process.t_min), 0.5 * process.t_max
        noise = jax.random.normal(KEY, (n, *process.state_shape((3,))))
        pair = noising_pair(jax.random.key(2), process, self.data(n), jnp.full(n, s), jnp.full(n, t), noise)
        x_s, x_t = (np.asarray(x).reshape(n, -1) for x in (pair.x_s, pair.x_t))
        at_s, at_t = covariance_at(process, s), covariance_at(process, t)
        forward = jax.vmap(lambda x: process.forward(x, s, t).mean)(pair.x_s)
        between = np.asarray(x_t - np.asarray(forward).reshape(n, -1))  # knows nothing of where it starts
        for one, other, expected in [(x_s, x_s, at_s), (x_t, x_t, at_t), (between, x_s, np.zeros_like(at_s))]:
            errors = np.sqrt(2 / n) * one.std(axis=0)[:, None] * other.std(axis=0)  # of a product's mean, at most
            assert np.all(np.abs(one.T @ other / n - expected) < 5 * errors)

    def test_the_residual_vanishes_for_the_exact_energy_and_for_no_other(self, process):
        exact, wrong = self.losses(process, {"rne": 1.0}, (1.0, 1.2))
        # A residual is a difference of energies of up to 1e3 nats, rounded to 1e-16 of themselves and magnified by
        # covariances of a condition of 1e6 (phase space at little noise), over a step of 1e-2 in log-SNR.
        assert exact.max() < 1e-10
        assert wrong.mean() > 1e-3

    def test_the_exact_energy_is_a_minimum_of_score_matching(self, process):
        step = 1e-3
        for factor, has_slope in ((1.0, False), (1.3, True)):
            down, up = self.losses(process, {"score": 1.0}, (factor - step, factor + step), n=4000)
            slope = (up - down) / (2 * step)
            z = slope.mean() / (slope.std() / np.sqrt(len(slope)))
            assert (abs(z) > 6) == has_slope, z
            assert abs(z) < 4 or has_slope, z

    def test_the_prior_pins_the_constant(self, process):
        at_end = np.asarray(covariance_at(process, process.t_max))
        reference = process.reference(process.t_max, process.state_shape((3,)))
        exact, wrong = self.losses(process, {"prior": 1.0}, (1.0, 1.5))
        units = jnp.eye(len(at_end)).reshape(-1, *process.state_shape((3,)))
        theirs = np.asarray(jax.vmap(reference.covariance_times)(units)).reshape(len(at_end), -1)
        # log p - log reference is a quadratic form in the difference of the two covariances.
        difference = np.linalg.inv(at_end) - np.linalg.inv(theirs)
        mean = -0.5 * np.trace(difference @ at_end) + 0.5 * np.linalg.slogdet(theirs @ np.linalg.inv(at_end))[1]
        variance = 0.5 * np.trace(difference @ at_end @ difference @ at_end)
        expected = (mean**2 + variance) / 3
        assert abs(exact.mean() - expected) < 5 * exact.std() / np.sqrt(len(exact)) + 1e-12
        assert wrong.mean() > 10 * exact.mean()

    def test_terms_of_scalar_processes_are_refused(self, process):
        for name in ("rne_euler", "fokker_planck"):
            with pytest.raises(ValueError, match=f"the term {name} exists for scalar Gaussian processes only"):
                energy_loss(process, exact_energy, weights={name: 1.0})
