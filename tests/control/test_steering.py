"""steer() against closed forms, against a float64 Python loop, and against itself under other names."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rnejax as rj
from rnejax.control.problem import Steer, control_steps, initial_law
from rnejax.control.proposals import Drift
from rnejax.smc import Resampling, log_mean_exp, run
from rnejax.systems import GaussianMixture

KEY = jax.random.key(31)
STD = 0.6
VP = rj.processes.VariancePreserving(data_std=STD, t_min=0.02)
TIMES = rj.time_grid(VP, 12)
QUIET = {"warn": False, "progress": False}


def gaussian(mean=(0.0, 0.0), process=VP, **options):
    """Gaussian data as wide as the process's reference: reverse kernels are exact, so that any steps are."""
    return GaussianMixture([mean], STD).model(process, **options)


def variance_at_end(process, times):
    return float(process.alpha(times[0]) ** 2 * STD**2 + process.sigma(times[0]) ** 2)


def z_of_normalizer(result, truth):
    """exp(log Z) over groups against exp(truth), in standard errors."""
    relative = np.exp(np.asarray(result.log_normalizer, np.float64) - truth)
    return (relative.mean() - 1) / (relative.std(ddof=1) / np.sqrt(relative.size))


class TestConstantWeights:
    """The reference-matched symmetric proposal has no noise at all where the data are the reference."""

    @pytest.mark.parametrize(
        "process",
        [
            VP,
            rj.processes.Cosine(data_std=STD, t_max=1.0),
            rj.processes.VarianceExploding(data_std=STD),
            rj.processes.RectifiedFlow(data_std=STD, t_max=1.0),
        ],
        ids=lambda process: type(process).__name__,
    )
    def test_tempered_gaussian_on_every_process(self, process):
        kind = "uniform" if process.t_max == 1.0 else None
        times = rj.time_grid(process, 7, kind)
        target = rj.temper(gaussian(process=process, prediction="x0"), 2.0)
        result = rj.steer(KEY, target, times, 32, num_groups=4, **QUIET)
        variance = variance_at_end(process, times)
        truth = 2 * 0.5 * ((1 - 2) * np.log(2 * np.pi * variance) - np.log(2))  # two dimensions, beta = 2
        # Seven steps of sums of a few terms of size 10 at most, each rounded to 6e-8 of itself; small noise magnifies
        # the rounding of x0 - x / (...) by its signal-to-noise ratio, up to 1e2.
        np.testing.assert_allclose(result.log_normalizer, truth, atol=1e-3)
        np.testing.assert_allclose(result.log_weights, 0, atol=1e-3)
        assert not np.any(result.info.resampled)


class TestClosedForms:
    """exp(log Z) is unbiased where kernels are exact, however few the steps; 64 groups of 64 particles, |z| < 4."""

    MEANS = ((0.5, -0.2), (-0.3, 0.4))

    @pytest.mark.parametrize(
        "make",
        [
            lambda a, b: rj.product([a, b]),
            lambda a, b: rj.guide(a, b, 2.0),
            lambda a, b: rj.product([a, b], [1.4, -0.6]),
        ],
    )
    def test_products_of_gaussians_of_one_width(self, make):
        target = make(*(gaussian(mean) for mean in self.MEANS))
        result = rj.steer(KEY, target, TIMES, 64, num_groups=64, **QUIET)
        betas, variance = np.array(target.exponents), variance_at_end(VP, TIMES)
        means = float(VP.alpha(TIMES[0])) * np.array(self.MEANS)
        total, centre = betas.sum(), betas @ means / betas.sum()
        misfit = (betas * (means**2).sum(-1)).sum() - total * (centre**2).sum()
        truth = -0.5 * misfit / variance + (1 - total) * np.log(2 * np.pi * variance) - np.log(total)
        # The models start from N(0, V) instead of N(alpha m, V): alpha^2 |m - m'|^2 / V at t_max, or 3e-4. Where the
        # exponents sum to 1 nothing else is left, for weights are then constant.
        found = float(log_mean_exp(result.log_normalizer))
        assert abs(found - truth) < 4 * float(result.standard_error) + 5e-4
        mean, error = rj.weighted_mean(lambda x: x, result)
        assert np.all(np.abs(mean - centre) < 4 * error + 5e-4)

    @pytest.mark.parametrize("exact", [True, False])
    @pytest.mark.parametrize(("slope", "curvature"), [(0.8, 0.0), (-0.5, 2.0)])
    def test_linear_and_quadratic_rewards(self, exact, slope, curvature):
        reward = jax.tree_util.Partial(
            lambda p, x: jnp.sum(p[0] * x - 0.5 * p[1] * x**2), jnp.array([slope, curvature])
        )
        result = rj.steer(KEY, rj.tilt(gaussian(), reward, exact=exact), TIMES, 64, num_groups=64, **QUIET)
        variance = variance_at_end(VP, TIMES)
        narrowed = variance / (1 + curvature * variance)
        truth = slope**2 * narrowed - np.log(1 + curvature * variance)  # two dimensions
        assert abs(z_of_normalizer(result, truth)) < 4
        mean, error = rj.weighted_mean(lambda x: x, result)
        assert np.all(np.abs(mean - slope * narrowed) < 4 * error)

    def test_reward_at_predicted_x0_ends_at_the_state_itself(self):
        # At t_min = 0.02 the predicted x0 differs from the state enough (by a fifth of its variance) to be seen.
        reward = lambda x: -2.0 * jnp.sum((x - 0.5) ** 2)  # noqa: E731
        result = rj.steer(KEY, rj.tilt(gaussian(), reward, at="x0"), TIMES, 64, num_groups=64, **QUIET)
        widened = 1 + 4 * variance_at_end(VP, TIMES)
        truth = -np.log(widened) - 2 * 2 * 0.25 / widened
        assert abs(z_of_normalizer(result, truth)) < 4

    def test_temper_and_tilt_together(self):
        target = rj.tilt(rj.temper(gaussian(), 2.0), lambda x: -jnp.sum(x**2), exact=False)
        result = rj.steer(KEY, target, TIMES, 64, num_groups=64, **QUIET)
        variance = variance_at_end(VP, TIMES)
        truth = -2 * np.log(2 * np.pi * variance) + np.log(2 * np.pi / (2 / variance + 2))
        assert abs(z_of_normalizer(result, truth)) < 4

    def test_a_prior_that_is_no_gaussian_is_corrected_by_the_initial_weights(self):
        # The grid ends where the modes are still apart, so that the reference's square is a poor start.
        mixture = GaussianMixture([[-1.5, 0.0], [1.0, 0.5]], STD, weights=[1, 3])
        times = rj.time_grid(VP, 12, t_max=0.3)
        prior = mixture.noised(VP.level(times[-1]))
        model = mixture.model(VP, covariance="full", prior=prior)
        result = rj.steer(KEY, rj.temper(model, 2.0), times, 256, num_groups=32, **QUIET)
        truth = mixture.noised(VP.level(times[0])).log_normalizer(2)
        # The kernels are Gaussians and the true ones are not: 12 steps leave a bias of a few hundredths.
        assert abs(float(log_mean_exp(result.log_normalizer)) - truth) < 4 * float(result.standard_error) + 0.05


# ------------------------------------------------------------------------------- the same weights, written down again

FIRST = GaussianMixture([[-0.8, 0.2], [0.7, -0.4]], 0.4, weights=[1, 2])
SECOND = GaussianMixture([[0.5, 0.5], [-0.2, -0.6]], 0.5, weights=[1, 1])


def growing(t):
    return 2.0 - t


def pull(x):
    return -0.5 * jnp.sum((x - 0.3) ** 2)


class Loop:
    """Weights of given paths by the formulas of mathematics.md, section 4, in float64 and without any of the library.

    Scores are those of the mixtures; nothing is cached, so nothing can be stale.
    """

    def __init__(self, process, times, exponents, strengths):
        self.process, self.times, self.exponents, self.strengths = process, times, exponents, strengths

    def score(self, mixture, x, t):
        alpha, sigma = float(self.process.alpha(t)), float(self.process.sigma(t))
        means, weights = (
            alpha * np.asarray(mixture.means, np.float64),
            np.exp(np.asarray(mixture.log_weights, np.float64)),
        )
        variance = alpha**2 * float(mixture.variances[0, 0]) + sigma**2
        residuals = x[:, None] - means
        logits = np.log(weights) - 0.5 * (residuals**2).sum(-1) / variance
        share = np.exp(logits - logits.max(-1, keepdims=True))
        share /= share.sum(-1, keepdims=True)
        return -(share[..., None] * residuals).sum(1) / variance

    def widths(self, t):
        alpha, sigma = float(self.process.alpha(t)), float(self.process.sigma(t))
        return alpha, sigma, alpha**2 * self.process.data_std**2 + sigma**2

    def increments(self, k, x_t, x_s, carried):
        """Log-weights of the step from times[k + 1] to times[k], and the models' log-densities there."""
        t, s = self.times[k + 1], self.times[k]
        (alpha_t, sigma_t, v_ref_t), (alpha_s, sigma_s, v_ref_s) = self.widths(t), self.widths(s)
        a = alpha_t / alpha_s
        v = sigma_t**2 - (a * sigma_s) ** 2
        beta_t, beta_s = self.exponents[k + 1], self.exponents[k]
        bar = 0.5 * (beta_t.sum() + beta_s.sum())
        c_a, c_b = 0.5 * (1 + 1 / bar), 0.5 * (1 - 1 / bar)
        rho = min(1.0, v_ref_t / (bar * v))
        r = np.sqrt(max(0.0, v_ref_s - bar * rho * v * v_ref_s / v_ref_t) / v_ref_t)
        covariance = v_ref_s * v / v_ref_t
        log_forward = log_normal(x_t, a * x_s, v)
        arrived, pull_t, pull_s = [], np.zeros_like(x_t), np.zeros_like(x_s)
        for i, mixture in enumerate((FIRST, SECOND)):
            score_t, score_s = self.score(mixture, x_t, t), self.score(mixture, x_s, s)
            denoised = (x_t + sigma_t**2 * score_t) / alpha_t
            mean = (a * sigma_s**2 * x_t + alpha_s * v * denoised) / sigma_t**2
            arrived.append(carried[i] + log_normal(x_s, mean, covariance) - log_forward)
            pull_t += beta_t[i] * (score_t + x_t / v_ref_t)
            pull_s += beta_s[i] * (score_s + x_s / v_ref_s)
        gradient_t, gradient_s = -self.strengths[k + 1] * (x_t - 0.3), -self.strengths[k] * (x_s - 0.3)
        tilt = [
            -0.5 * strength * ((x - 0.3) ** 2).sum(-1)
            for strength, x in ((self.strengths[k + 1], x_t), (self.strengths[k], x_s))
        ]
        proposal_mean = r * x_t + c_a * v / a * pull_t + 0.5 * rho * covariance * gradient_t
        auxiliary_mean = r * v_ref_t / v_ref_s * x_s + c_b * v * pull_s + 0.5 * v * gradient_s
        target = sum(beta_s[i] * arrived[i] - beta_t[i] * carried[i] for i in range(2)) + tilt[1] - tilt[0]
        moves = log_normal(x_t, auxiliary_mean, rho * v) - log_normal(x_s, proposal_mean, rho * covariance)
        return target + moves, arrived


def log_normal(x, mean, variance):
    return -0.5 * ((x - mean) ** 2).sum(-1) / variance - 0.5 * x.shape[-1] * np.log(2 * np.pi * variance)


def test_weights_equal_a_python_loop_along_the_saved_ancestry():
    """Everything at once: two models, an exponent that varies, a reward, resampling at every step.

    The loop follows the ancestors and looks at every state anew, so a cache (score, reward, carried log-density) that
    is not gathered with its particle, or a step that uses the wrong end's exponents, shows here.
    """
    target = rj.tilt(rj.product([FIRST.model(VP), SECOND.model(VP)], [growing, 0.5]), pull, exact=False)
    exponents, strengths = target.exponents_at(TIMES), target.strengths_at(TIMES)
    top = VP.level(TIMES[-1])
    problem = Steer(
        target.models,
        tuple(reward.without_schedule() for reward in target.rewards),
        initial_law(target.models, top, exponents[-1]),
        top,
        jnp.asarray(exponents[-1], float),
        Drift(),
    )
    saved = run(
        KEY,
        problem,
        control_steps(VP, TIMES, exponents, strengths, evaluate_last=True),
        num_particles=16,
        resampling=Resampling(ess_threshold=1.01, window=(1, len(TIMES))),
        save=("ancestors", "particles", "log_increments"),
    ).info.saved
    ancestors = np.asarray(saved["ancestors"])
    positions, increments = (np.asarray(saved[name], np.float64) for name in ("particles", "log_increments"))
    assert any(len(np.unique(row)) < 16 for row in ancestors)  # otherwise nothing is tested
    loop = Loop(VP, TIMES, exponents, strengths[:, 0])
    _, _, v_ref = loop.widths(TIMES[-1])
    carried = [log_normal(positions[0], 0.0, v_ref)] * 2
    for step in range(1, len(TIMES)):
        parents = ancestors[step]
        wanted, carried = loop.increments(
            len(TIMES) - 1 - step, positions[step - 1][parents], positions[step], [own[parents] for own in carried]
        )
        # Terms of size 30 rounded in float32, divided by kernel widths of 0.05: a few 1e-4.
        np.testing.assert_allclose(increments[step], wanted, atol=1e-3)


def test_one_particle_does_not_depend_on_the_others():
    target = rj.tilt(rj.temper(FIRST.model(VP), 2.0), pull, exact=False)
    exponents, strengths = target.exponents_at(TIMES), target.strengths_at(TIMES)
    top = VP.level(TIMES[-1])
    rewards = tuple(reward.without_schedule() for reward in target.rewards)
    initial = initial_law(target.models, top, exponents[-1])
    problem = Steer(target.models, rewards, initial, top, jnp.asarray(exponents[-1], float), Drift())
    steps = control_steps(VP, TIMES, exponents, strengths, True)

    @jax.jit
    def two_steps(particles):
        for k in range(2):
            step = jax.tree.map(lambda leaf, k=k: leaf[k], steps)
            particles, increments, _ = problem.step(jax.random.fold_in(KEY, k), particles, step)
        return particles, increments

    particles, _ = problem.init(KEY, 4)
    others = particles._replace(x=particles.x.at[1:].mul(-3.0))
    (ours, weight), (again, same_weight) = two_steps(particles), two_steps(others)
    first = lambda tree: [np.asarray(leaf[0]) for leaf in jax.tree.leaves(tree)]  # noqa: E731
    assert all(np.array_equal(a, b) for a, b in zip(first(ours), first(again), strict=True))
    assert weight[0] == same_weight[0]
    assert weight[1] != same_weight[1]


# --------------------------------------------------------------------------------------------------------- proposals


class TestProposals:
    @pytest.mark.parametrize(
        ("proposal", "order"),
        [(Drift(None, matched=False), 1.5), ((1.0, 0.0), 1.0), ((1.0, 1.0), 0.5)],
        ids=["symmetric", "sum 1", "sum 2"],
    )
    def test_order_of_the_noise_of_one_step(self, proposal, order):
        """Gaussian data narrower than the reference: noise of order 1/2 in the step is absent iff c_a + c_b = 1.

        The covariance is the true one: the reference's is wrong by a share of order 1 in the step, and so are weights.
        """
        mixture, t = GaussianMixture([[0.0, 0.0]], 0.3), 0.2
        variance = mixture.noised(VP.level(t)).variances[0, 0]
        prior = rj.kernels.Gaussian(jnp.zeros(2), jnp.zeros(2), variance)
        model = mixture.model(VP, covariance="diagonal", prior=prior)
        noise = []
        for step in (0.002, 0.0005):
            times = np.array([t - step, t])
            result = rj.steer(
                KEY, rj.temper(model, 2.0), times, 4096, proposal=proposal, save=("log_increments",), **QUIET
            )
            noise.append(float(np.std(result.info.saved["log_increments"][0])))
        # The ratio of noises at steps 4 : 1 is 4^order: up to the next order, step^(1/2) = 0.04 of it, and the error of
        # two standard deviations.
        assert np.log(noise[0] / noise[1]) / np.log(4) == pytest.approx(order, abs=0.1)

    def test_proposal_of_the_users_own_is_unbiased_however_poor(self):
        result = rj.steer(KEY, rj.temper(gaussian(), 1.5), TIMES, 512, num_groups=64, proposal=Sluggish(), **QUIET)
        variance = variance_at_end(VP, TIMES)
        truth = (1 - 1.5) * np.log(2 * np.pi * variance) - np.log(1.5)
        assert abs(z_of_normalizer(result, truth)) < 4

    def test_feynman_kac_correctors_converge_with_the_steps(self):
        truth = FIRST.noised(VP.level(TIMES[0])).log_normalizer(2)
        target = rj.temper(FIRST.model(VP), 2.0)
        errors = []
        for num_steps in (25, 400):
            times = rj.time_grid(VP, num_steps)
            result = rj.steer(KEY, target, times, 512, proposal="feynman_kac", num_groups=16, **QUIET)
            errors.append(float(log_mean_exp(result.log_normalizer)) - truth)
        assert abs(errors[1]) < 4 * float(result.standard_error) + abs(errors[0]) / 8  # first order in the step: 1/16

    def test_scheduled_exponent_reaches_the_same_normalizer(self):
        target = rj.temper(gaussian(), lambda t: 2.0 - (t - TIMES[0]))
        result = rj.steer(KEY, target, TIMES, 64, num_groups=64, **QUIET)
        truth = -np.log(2 * np.pi * variance_at_end(VP, TIMES)) - np.log(2)
        assert abs(z_of_normalizer(result, truth)) < 4

    def test_constant_schedule_is_the_constant(self):
        number = rj.steer(KEY, rj.temper(FIRST.model(VP), 2.0), TIMES, 64, num_groups=64, **QUIET)
        schedule = rj.steer(KEY, rj.temper(FIRST.model(VP), lambda t: 2.0), TIMES, 64, num_groups=64, **QUIET)
        assert np.array_equal(number.log_normalizer, schedule.log_normalizer)
        assert np.array_equal(number.particles, schedule.particles)


@jax.tree_util.register_static
class Sluggish:
    """Moves with the model's kernel shifted off to one side and a third wider; looks at no model on the way back."""

    def needs_auxiliary(self, total_exponents):
        return False

    def reverse(self, transition, at_t, exponent, kernels):
        (kernel,) = kernels
        shift = kernel.shift + 0.1 * jnp.sqrt(kernel.variance)
        return rj.kernels.Gaussian(kernel.anchor, shift, 1.3 * kernel.variance, kernel.excess)

    def forward(self, transition, at_s, exponent):
        return transition.forward(at_s.x)


# ------------------------------------------------------------------------------------------- options and what returns


@pytest.fixture(scope="module")
def plain():
    return rj.steer(KEY, rj.temper(FIRST.model(VP), 2.0), TIMES, 64, num_groups=64, **QUIET)


@pytest.fixture(scope="module")
def with_options():
    window = (float(TIMES[3]), float(TIMES[6]))
    names = ("ancestors", "log_weights", "log_increments", "particles")
    target = rj.temper(FIRST.model(VP), 2.0)
    options = {"ess_threshold": 1.01, "window": window, "save": names, "final_resampling": True, "num_groups": 3}
    return window, rj.steer(KEY, target, TIMES, 32, **options, **QUIET)


class TestResult:
    def test_standard_error_is_that_of_the_mean_over_groups(self, plain):
        normalizers = np.exp(np.asarray(plain.log_normalizer, np.float64))
        wanted = normalizers.std(ddof=1) / np.sqrt(normalizers.size) / normalizers.mean()
        assert float(plain.standard_error) == pytest.approx(wanted, rel=1e-4)

    def test_standard_error_agrees_with_the_spread_of_halves(self, plain):
        halves = np.asarray(log_mean_exp(plain.log_normalizer.reshape(2, 32)))
        assert abs(halves[0] - halves[1]) < 4 * np.sqrt(2) * np.sqrt(2) * float(plain.standard_error)

    def test_mean_weight_is_one(self, plain):
        np.testing.assert_allclose(np.exp(np.asarray(plain.log_weights)).mean(axis=1), 1, rtol=1e-5)

    def test_increments_and_initial_weights_make_the_normalizer(self, plain):
        # log Z is the log-mean of the initial weights plus all increments; here the initial law is the normalised
        # square of the reference, whose constant is known.
        total = np.asarray(plain.info.log_normalizer_increments, np.float64).sum(axis=1)
        variance = float(VP.reference(TIMES[-1], (2,)).variance)
        start = -np.log(2 * np.pi * variance) - np.log(2)
        np.testing.assert_allclose(plain.log_normalizer, start + total, atol=1e-4)

    def test_info_runs_from_noise_to_data(self, plain):
        np.testing.assert_allclose(plain.info.time, TIMES[::-1][1:], rtol=1e-6)
        assert plain.info.ess.shape == plain.info.resampled.shape == (64, len(TIMES) - 1)

    def test_log_densities_are_those_of_the_model(self):
        # Exact kernels: the density along the path is the density of the state.
        result = rj.steer(KEY, rj.temper(gaussian(), 2.0), TIMES, 64, num_groups=64, **QUIET)
        variance = variance_at_end(VP, TIMES)
        x = np.asarray(result.particles, np.float64)
        np.testing.assert_allclose(result.log_densities[..., 0], log_normal(x, 0.0, variance), atol=1e-3)

    def test_without_groups_there_is_no_standard_error(self):
        result = rj.steer(KEY, rj.temper(FIRST.model(VP), 2.0), TIMES, 1, **QUIET)
        assert result.particles.shape == (1, 2)
        assert result.log_normalizer.shape == ()
        assert np.isnan(result.standard_error)

    def test_zero_particles_are_refused(self):
        with pytest.raises(ValueError, match="num_particles"):
            rj.steer(KEY, rj.temper(FIRST.model(VP), 2.0), TIMES, 0)


class TestOptions:
    def test_resampling_happens_in_steps_that_begin_inside_the_window(self, with_options):
        (low, high), result = with_options
        begins = TIMES[::-1][:-1]
        inside = (begins >= low) & (begins <= high)
        assert np.array_equal(result.info.resampled, np.broadcast_to(inside, (3, len(inside))))

    def test_final_resampling_leaves_equal_weights(self, with_options):
        _, result = with_options
        np.testing.assert_allclose(result.log_weights, 0, atol=1e-6)

    def test_saved_are_one_per_step_and_only_what_was_asked_for(self, with_options, plain):
        _, result = with_options
        shapes = {name: value.shape for name, value in result.info.saved.items()}
        steps = len(TIMES) - 1
        assert shapes.pop("particles") == (3, steps, 32, 2)
        assert shapes == dict.fromkeys(("ancestors", "log_weights", "log_increments"), (3, steps, 32))
        assert plain.info.saved == {}

    def test_last_saved_particles_are_those_before_the_final_resampling(self, with_options):
        _, result = with_options
        last, final = np.asarray(result.info.saved["particles"])[:, -1], np.asarray(result.particles)
        assert all(set(map(tuple, final[g])) <= set(map(tuple, last[g])) for g in range(3))

    def test_result_under_jit_is_the_result(self, plain):
        @jax.jit
        def compiled(key, model):
            return rj.steer(key, rj.temper(model, 2.0), TIMES, 64, num_groups=64)

        result = compiled(KEY, FIRST.model(VP))
        # Fusion may round differently; after twelve steps without chaos that stays at 1e-5.
        np.testing.assert_allclose(result.log_normalizer, plain.log_normalizer, atol=1e-3)
        assert int(np.max(result.info.fault.code)) == 0


def test_other_conditions_weights_and_exponents_recompile_nothing():
    traces = []

    def fn(params, x, t, condition):
        traces.append(1)
        return -(x - params * condition) / (VP.alpha(t) ** 2 * STD**2 + VP.sigma(t) ** 2)

    model = rj.DiffusionModel(VP, fn, shape=(2,), params=jnp.float32(1.0), condition=jnp.zeros(2))
    results = []
    for other, beta in (
        (model, 2.0),
        (model.with_condition(jnp.ones(2)), 2.0),
        (model.with_params(jnp.float32(3.0)), 1.5),
    ):
        before = len(traces)
        results.append(rj.steer(KEY, rj.temper(other, beta), TIMES, 8, **QUIET).log_normalizer)
    assert len(traces) == before
    assert results[0] != results[1]
