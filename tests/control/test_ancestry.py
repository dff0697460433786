"""The weights of steer() written down again: a float64 Python loop along the saved ancestry."""

import jax
import jax.numpy as jnp
import numpy as np
from steering_problems import FIRST, SECOND, TIMES, VP, growing, log_normal, pull

import rnejax as rj
from rnejax.control.problem import Steer, initial_law
from rnejax.control.proposals import Drift
from rnejax.control.steps import control_steps
from rnejax.smc import Resampling, run

KEY = jax.random.key(31)


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
        control_steps(VP, TIMES, TIMES, exponents, strengths, evaluate_last=True),
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


def test_looking_at_the_first_state_changes_no_density():
    """With Euler-Maruyama kernels, too, whose increments would not vanish for a step that is not made."""
    target = rj.temper(FIRST.model(VP, covariance="euler"), 2.0)
    exponents, top = target.exponents_at(TIMES), VP.level(TIMES[-1])
    initial = initial_law(target.models, top, exponents[-1])
    problem = Steer(target.models, (), initial, top, jnp.asarray(exponents[-1], float), Drift())
    steps = control_steps(VP, TIMES, TIMES, exponents, target.strengths_at(TIMES), True)
    particles, _ = problem.init(KEY, 4)
    looked_at, _, _ = problem.step(KEY, particles, jax.tree.map(lambda leaf: leaf[0], steps))
    np.testing.assert_array_equal(looked_at.excess_log_densities.value, particles.excess_log_densities.value)


def test_one_particle_does_not_depend_on_the_others():
    target = rj.tilt(rj.temper(FIRST.model(VP), 2.0), pull, exact=False)
    exponents, strengths = target.exponents_at(TIMES), target.strengths_at(TIMES)
    top = VP.level(TIMES[-1])
    rewards = tuple(reward.without_schedule() for reward in target.rewards)
    initial = initial_law(target.models, top, exponents[-1])
    problem = Steer(target.models, rewards, initial, top, jnp.asarray(exponents[-1], float), Drift())
    steps = control_steps(VP, TIMES, TIMES, exponents, strengths, True)

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
