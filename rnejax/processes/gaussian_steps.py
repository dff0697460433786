"""What is known of a scalar Gaussian process at one time and between two: levels and transitions.

See `rnejax.processes.gaussian` for what they are relative to.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp

from ..kernels import Array, Gaussian, Subspace


class NoiseLevel(NamedTuple):
    """The coefficients of x_t = alpha x_0 + sigma eps at one time (or at several, stacked)."""

    t: Array
    alpha: Array
    sigma: Array
    alpha_rate: Array  # d alpha / dt
    sigma_rate: Array
    log_snr: Array  # log(alpha^2 / sigma^2)
    reference_variance: Array  # V_t = alpha^2 data_std^2 + sigma^2
    reference_gain: Array  # D_ref(x_t, t) = reference_gain * x_t
    reference_posterior_variance: Array  # Cov_ref[x_0 | x_t]

    def excess(self, output: Array, x: Array, prediction: str) -> Array:
        """The network's denoiser minus the reference's, from whatever the network predicts. Exact.

        score, epsilon and energy divide by alpha: they say nothing about x_0 where no signal is left.
        """
        alpha, sigma, reference = self.alpha, self.sigma, self.reference_gain * x
        if prediction == "x0":
            return output - reference
        if prediction == "score":
            return (sigma**2 / alpha) * (output + x / self.reference_variance)
        if prediction == "epsilon":
            return -(sigma / alpha) * (output - sigma * x / self.reference_variance)
        # v = alpha eps - sigma x0 and velocity = alpha' x0 + sigma' eps, with eps = (x - alpha x0) / sigma
        if prediction == "v":
            return ((alpha / sigma) * x - output) / (alpha**2 / sigma + sigma) - reference
        slope = self.alpha_rate - self.sigma_rate * alpha / sigma
        return (output - (self.sigma_rate / sigma) * x) / slope - reference

    def is_valid(self, excess: Array) -> Array:
        """Whether every number of an excess is finite, of each state of a batch."""
        return jnp.all(jnp.isfinite(excess.reshape(len(excess), -1)), axis=1)

    def denoised(self, x: Array, excess: Array) -> Array:
        """E[x_0 | x_t]."""
        return self.reference_gain * x + excess

    def clean_state(self, x: Array, excess: Array) -> Array:
        """The denoised state, of the shape of a state."""
        return self.denoised(x, excess)

    def score(self, x: Array, excess: Array) -> Array:
        """grad log p_t(x)."""
        return self.excess_score(x, excess) - x / self.reference_variance

    def excess_score(self, x: Array, excess: Array) -> Array:
        """grad log p_t(x) - grad log ref_t(x), of the shape of x."""
        return (self.alpha / self.sigma**2) * excess

    def reference_score(self, x: Array) -> Array:
        return -x / self.reference_variance

    def whiten(self, x: Array) -> Array:
        """A state in coordinates, (m,), in which the noise of x_t given x_0 is standard."""
        return x.reshape(-1) / self.sigma

    def whiten_mean(self, x0: Array) -> Array:
        """E[x_t | x_0] in these coordinates."""
        return (self.alpha / self.sigma) * x0.reshape(-1)

    # -- training ----------------------------------------------------------------------------------------------------

    def noised(self, x0: Array, noise: Array) -> Array:
        """x_t for a standard noise of the state's shape."""
        return self.alpha * x0 + self.sigma * noise

    def target(self, prediction: str, x0: Array, noise: Array) -> Array:
        """What a network that predicts this should say of a noised state."""
        if prediction == "x0":
            return x0
        if prediction == "epsilon":
            return noise
        if prediction == "score":
            return -noise / self.sigma
        if prediction == "v":
            return self.alpha * noise - self.sigma * x0
        return self.alpha_rate * x0 + self.sigma_rate * noise

    # -- what a covariance of x_0 given x_t is measured in -------------------------------------------------------------

    def probe(self, direction: Array, shape: tuple[int, ...]) -> Array:
        """The change of a state along which the excess changes by `relative` of the posterior covariance."""
        return direction.reshape(shape)

    def relative(self, change: Array) -> Array:
        """(sigma^2 / alpha) times a change of the excess, in units of the reference's posterior variance.

        Zero where alpha = 0 and there is no such thing.
        """
        has_signal = self.alpha > 0
        return jnp.where(has_signal, 1 / jnp.where(has_signal, self.reference_gain, 1), 0) * change

    def mean_spread(self, trace: Array, dimension: int) -> Array:
        """One number for all directions, from a trace in the units above."""
        return trace / dimension

    def spectrum(self, spread: Array) -> tuple[Array, Array]:
        """A dense spread as it is kept: eigenvalues, where those of a covariance can be, and eigenvectors."""
        values, basis = jnp.linalg.eigh(spread)
        return self.clipped(values), basis

    def clipped(self, diagonal: Array) -> Array:
        """A diagonal spread, where a covariance can be."""
        return jnp.maximum(diagonal, -1.0)

    def in_posterior_std(self, error: Array) -> Array:
        """An error of the denoiser in units of the standard deviation of the reference's posterior."""
        return error / jnp.sqrt(self.reference_posterior_variance)

    @property
    def largest_spread(self) -> Array:
        """That of data of which nothing else is known: sigma^2 / alpha^2 over the reference's, less 1."""
        return 1 / (self.alpha * self.reference_gain) - 1

    @property
    def state_scale(self) -> Array:
        """The reference's root mean square of an entry of x_t."""
        return jnp.sqrt(self.reference_variance)

    @property
    def posterior_scale(self) -> Array:
        """The root mean square error of the reference's denoiser on its own data, of an entry."""
        return jnp.sqrt(self.reference_posterior_variance)


class GaussianTransition(NamedTuple):
    """Everything that is known about the step between ``s`` (less noise) and ``t`` (more noise).

    The forward kernel is F(x_t | x_s) = N(a x_s, v I) and the reference's reversal N(r x_t, C_ref I).
    Shifts are relative to the state the kernel starts from, so that the difference between states is formed once,
    exactly.
    """

    s: NoiseLevel
    t: NoiseLevel
    decay: Array  # a = alpha_t / alpha_s
    decay_shift: Array  # a - 1
    variance: Array  # v
    reference_shift: Array  # a V_s / V_t - 1
    reference_covariance: Array  # V_s v / V_t
    gain: Array  # alpha_s v / sigma_t^2
    share: Array  # of the reference's reverse covariance that knowing x_0 would take away
    duration: Array  # t - s
    subspace: Subspace

    # -- exact kernels -------------------------------------------------------------------------------------------

    def forward(self, x_s: Array) -> Gaussian:
        """F(x_t | x_s)."""
        return Gaussian(x_s, self.decay_shift * x_s, self.variance, subspace=self.subspace)

    def reference_reverse(self, x_t: Array) -> Gaussian:
        """The reference's reverse kernel K_ref(x_s | x_t), exact."""
        return Gaussian(x_t, self.reference_shift * x_t, self.reference_covariance, subspace=self.subspace)

    def reverse(self, x_t: Array, excess: Array, spread: Array | float = 0.0, basis: Array | None = None) -> Gaussian:
        """K(x_s | x_t) for a denoiser with this excess, and a posterior covariance with this relative excess.

        ``spread`` holds the eigenvalues of Cov[x_0 | x_t] / Cov_ref[x_0 | x_t] - 1: a scalar, a diagonal, or, with
        their ``basis``, those of a dense matrix.
        """
        shift = self.reference_shift * x_t + self.gain * excess
        return Gaussian(x_t, shift, self.reference_covariance, self.share * spread, basis, self.subspace)

    def tempered_reverse(self, x_t: Array, exponent: Array) -> Gaussian:
        """The step down of the reference's tempered path, ref^exponent: A = N(r x_t, rho C_ref)."""
        rho, slope = self._tempered(exponent)
        slope = slope * jnp.sqrt(self.s.reference_variance / self.t.reference_variance)
        shift = self.reference_shift * x_t + slope * x_t
        return Gaussian(x_t, shift, rho * self.reference_covariance, subspace=self.subspace)

    def tempered_forward(self, x_s: Array, exponent: Array) -> Gaussian:
        """The step up, B = N((r V_t / V_s) x_s, rho v I): both are each other's reversal with respect to that path."""
        rho, slope = self._tempered(exponent)
        slope = slope * jnp.sqrt(self.t.reference_variance / self.s.reference_variance)
        return Gaussian(x_s, self.decay_shift * x_s + slope * x_s, rho * self.variance, subspace=self.subspace)

    def _tempered(self, exponent: Array) -> tuple[Array, Array]:
        v_s, v_t = self.s.reference_variance, self.t.reference_variance
        return tempered_slopes(exponent, self.variance / v_t, self.decay * jnp.sqrt(v_s / v_t))

    # -- Euler-Maruyama kernels ----------------------------------------------------------------------------------

    def euler_reverse(self, x_t: Array, excess: Array) -> Gaussian:
        """x_s = x_t - h f(x_t, t) + h g_t^2 score(x_t, t) + g_t sqrt(h) eps: drift and diffusion frozen at t."""
        linear, diffusion = drift_and_diffusion(self.t)
        shift = self.duration * (diffusion * self.t.score(x_t, excess) - linear * x_t)
        base = self.reference_covariance
        return Gaussian(x_t, shift, base, self.duration * diffusion / base - 1, subspace=self.subspace)

    def euler_forward(self, x_s: Array) -> Gaussian:
        """x_t = x_s + h f(x_s, s) + g_s sqrt(h) eps."""
        linear, diffusion = drift_and_diffusion(self.s)
        return Gaussian(x_s, self.duration * linear * x_s, self.duration * diffusion, subspace=self.subspace)


def tempered_slopes(exponent: Array, u: Array, kappa: Array) -> tuple[Array, Array]:
    r"""A step of the path ref^bar, bar = ``exponent`` > 0, in coordinates where the reference has unit variance.

    There the reference's own step, down or up, is z -> kappa z + sqrt(u) eps with kappa^2 = 1 - u. That of its power,
    with variance 1 / bar and noise of variance rho u, is z -> sqrt(1 - bar rho u) z + sqrt(rho u) eps, in both
    directions alike, with rho = 1 or the largest that leaves a root (mathematics.md, section 4). Returned are rho and
    the *difference* of the two slopes, which vanishes for bar = 1:

        sqrt(1 - bar rho u) - kappa = u (1 - bar rho) / (sqrt(1 - bar rho u) + kappa),

    or -kappa where rho < 1. There it must be nothing else: the root of a rounding error is 2e-4 in single precision,
    and one that the step down has and the step up has not is 1e-3 nats of a weight.
    """
    noise = exponent * u
    is_cut = noise > 1
    rho = jnp.where(is_cut, 1 / jnp.where(is_cut, noise, 1.0), 1.0)
    remaining = jnp.sqrt(1 - jnp.where(is_cut, 0.0, noise)) + kappa
    # At alpha_t = 0 nothing of x_t remains for any exponent >= 1: numerator and denominator both vanish.
    gone = remaining == 0
    slope = jnp.where(gone, 0.0, u * (1 - exponent) / jnp.where(gone, 1.0, remaining))
    return rho, jnp.where(is_cut, -kappa, slope)


def drift_and_diffusion(level: NoiseLevel) -> tuple[Array, Array]:
    """f and g^2 of dx = f x dt + g dW: f = alpha'/alpha, g^2 = d(sigma^2)/dt - 2 f sigma^2."""
    linear = level.alpha_rate / level.alpha
    return linear, 2 * level.sigma * level.sigma_rate - 2 * linear * level.sigma**2
