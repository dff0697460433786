"""Steps of token processes: kernels between two times, and what a network says, for states that are integers.

The formulas and their sources are in `rnejax.processes.tokens`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ..kernels import Array, Categorical, OneToken


@jax.tree_util.register_static
@dataclass(frozen=True)
class Vocabulary:
    """How many tokens there are, and whether MASK, whose number is ``size``, is one more."""

    size: int
    has_mask: bool

    @property
    def mask(self) -> int:
        return self.size

    @property
    def num_categories(self) -> int:
        return self.size + self.has_mask

    def own(self, x: Array) -> Array:
        """Which category each position is in: (length, categories), of truth values."""
        return x[..., None] == jnp.arange(self.num_categories)


class MaskedLevel(NamedTuple):
    """Masked tokens at one time: survival alpha."""

    t: Array
    alpha: Array
    vocabulary: Vocabulary

    def excess(self, output: Array, x: Array, prediction: str) -> Array:
        """log(V mu) at masked positions, zero elsewhere: nobody asks there. (n, length, V).

        The concrete score p_t(x with k at i) / p_t(x) of a masked position is alpha / (1 - alpha) mu_k: its logarithm
        is a logit.
        """
        return jnp.where(self._masked(x), _log_probabilities(output), 0.0)

    def is_valid(self, excess: Array) -> Array:
        return _no_nan(excess)

    def denoised(self, x: Array, excess: Array) -> Array:
        """The probability of every token: mu where masked, 1 for the token that is there."""
        mu = jnp.exp(excess) / self.vocabulary.size
        return jnp.where(self._masked(x), mu, jax.nn.one_hot(x, self.vocabulary.size, dtype=mu.dtype))

    def _masked(self, x: Array) -> Array:
        return (x == self.vocabulary.mask)[..., None]


class UniformLevel(NamedTuple):
    """Resampled tokens at one time: survival alpha."""

    t: Array
    alpha: Array
    vocabulary: Vocabulary

    def excess(self, output: Array, x: Array, prediction: str) -> Array:
        """log(V mu) at all positions, (n, length, V).

        A concrete score s_k = p_t(x with k at i) / p_t(x) is sum_j mu_j q_t(k | j) / q_t(x_i | j), with
        q_t(k | j) = alpha d_jk + (1 - alpha)/V; since s sums to U = sum_j mu_j / q_t(x_i | j), it is undone by
        mu_k = q_t(x_i | k) (s_k - (1 - alpha) U / V) / alpha.

        That is negative where a network's score is less than the noise alone makes it, and belongs to no law; such a
        token gets the least probability that there is in floating point (not 0, so that gradients stay finite).
        """
        if prediction == "logits":
            return _log_probabilities(output)
        own = self.vocabulary.own(x)
        score = jnp.exp(jnp.where(own, 0.0, output))
        rest = (1 - self.alpha) / self.vocabulary.size
        moved = (score - rest * jnp.sum(score, axis=-1, keepdims=True)) / self.alpha
        mu = moved * (self.alpha * own + rest)
        return _log_probabilities(jnp.log(jnp.maximum(mu, jnp.finfo(mu.dtype).tiny)))

    def is_valid(self, excess: Array) -> Array:
        return _no_nan(excess)

    def denoised(self, x: Array, excess: Array) -> Array:
        """The probability of every clean token."""
        return jnp.exp(excess) / self.vocabulary.size


class MaskedTransition(NamedTuple):
    """A step of the masked process. The forward kernel keeps a token with probability alpha_t / alpha_s."""

    s: MaskedLevel
    t: MaskedLevel
    log_keep: Array  # log(alpha_t / alpha_s)
    log_lose: Array
    log_reveal: Array  # log((alpha_s - alpha_t) / (1 - alpha_t)), of a masked token on the way back
    log_stay: Array
    vocabulary: Vocabulary

    def forward(self, x_s: Array) -> Categorical:
        """F(x_t | x_s): keeps or masks every token."""
        own, masked = self.vocabulary.own(x_s), x_s[:, None] == self.vocabulary.mask
        keep = jnp.where(masked, 0.0, self.log_keep)
        return Categorical(jnp.where(own, keep, jnp.where(self._is_mask & ~masked, self.log_lose, -jnp.inf)))

    def reference_reverse(self, x_t: Array) -> Categorical:
        return Categorical(self._anchor(x_t), 0.0)

    def reverse(
        self, x_t: Array, excess: Array, spread: Array | float = 0.0, basis: Array | None = None
    ) -> Categorical:
        """K(x_s | x_t): a masked token is revealed or not, and then it is k with probability mu_k(x_t)."""
        return Categorical(self._anchor(x_t), self.shift(x_t, excess))

    def shift(self, x_t: Array, excess: Array) -> Array:
        """A change of the tokens' log-probabilities (length, V) as one of the categories'; MASK stays."""
        return _pad(jnp.where(x_t[:, None] == self.vocabulary.mask, excess, 0.0))

    def tilted(self, x_t: Array, shift: Array) -> tuple[Categorical, Array]:
        """Tokens from K_ref exp(shift), at positions that are revealed by chance as in K_ref.

        Returns the law, and the log of the mean of exp(shift) / law that it has yet to be weighed with: it depends on
        which positions are revealed, not on which tokens.
        """
        anchor = self._anchor(x_t)
        _, log_means = _normalise(anchor, shift)
        normalised, _ = _normalise(jnp.where(self._is_mask, -jnp.inf, -np.log(self.vocabulary.size)), shift)
        revealed = (x_t[:, None] == self.vocabulary.mask) & ~self._is_mask
        return Categorical(anchor, jnp.where(revealed, normalised, 0.0)), jnp.sum(log_means)

    @property
    def _is_mask(self) -> Array:
        return jnp.arange(self.vocabulary.num_categories) == self.vocabulary.mask

    def _anchor(self, x_t: Array) -> Array:
        revealed = jnp.where(self._is_mask, self.log_stay, self.log_reveal - np.log(self.vocabulary.size))
        masked = x_t[:, None] == self.vocabulary.mask
        return jnp.where(masked, revealed, jnp.where(self.vocabulary.own(x_t), 0.0, -jnp.inf))


class UniformTransition(NamedTuple):
    """A step of the uniform process. The forward kernel resamples a token with probability 1 - alpha_t / alpha_s."""

    s: UniformLevel
    t: UniformLevel
    log_own: Array  # log(a + (1 - a)/V), a = alpha_t / alpha_s
    log_other: Array  # log((1 - a)/V)
    vocabulary: Vocabulary

    def forward(self, x_s: Array) -> Categorical:
        """F(x_t | x_s); symmetric, so that the reference's reverse kernel is the same function."""
        return Categorical(jnp.where(self.vocabulary.own(x_s), self.log_own, self.log_other))

    def reference_reverse(self, x_t: Array) -> Categorical:
        return self.forward(x_t)

    def reverse(
        self, x_t: Array, excess: Array, spread: Array | float = 0.0, basis: Array | None = None
    ) -> Categorical:
        """K(x_s | x_t): x_0 from mu(x_t), then x_s from its law given both; summed over x_0."""
        size, own = self.vocabulary.size, self.vocabulary.own(x_t)
        mu = jnp.exp(excess) / size
        rest_s, rest_t = (1 - self.s.alpha) / size, (1 - self.t.alpha) / size
        here = jnp.sum(jnp.where(own, mu, 0.0), axis=-1, keepdims=True)
        # x_0 elsewhere than x_t, and x_0 = x_t
        elsewhere = (jnp.where(own, 0.0, self.s.alpha * mu) + rest_s * (1 - here)) / rest_t
        same = here * (self.s.alpha * own + rest_s) / (self.t.alpha + rest_t)
        return Categorical(self.forward(x_t).anchor, jnp.log(elsewhere + same))

    def shift(self, x_t: Array, excess: Array) -> Array:
        """A change of the tokens' log-probabilities (length, V) as one of the categories'; x_t stays."""
        own = self.vocabulary.own(x_t)
        return excess - jnp.sum(jnp.where(own, excess, 0.0), axis=-1, keepdims=True)

    def tilted(self, x_t: Array, shift: Array) -> tuple[Categorical, Array]:
        """K_ref exp(shift) = F exp(shift), and the logarithm of its normaliser: no position is special."""
        anchor = self.forward(x_t).anchor
        normalised, log_normalisers = _normalise(anchor, shift)
        return Categorical(anchor, normalised), jnp.sum(log_normalisers)


class AnyOrderTransition(NamedTuple):
    """One token is masked; on the way back, one of the masked ones is revealed."""

    s: MaskedLevel
    t: MaskedLevel
    vocabulary: Vocabulary

    def forward(self, x_s: Array) -> OneToken:
        """F(x_t | x_s): masks one token, every one with the same probability."""
        masked = x_s[:, None] == self.vocabulary.mask
        is_mask = jnp.arange(self.vocabulary.num_categories) == self.vocabulary.mask
        return OneToken(x_s, jnp.where(~masked & is_mask, -jnp.log(jnp.sum(~masked)), -jnp.inf))

    def reference_reverse(self, x_t: Array) -> OneToken:
        return OneToken(x_t, self._anchor(x_t))

    def reverse(self, x_t: Array, excess: Array, spread: Array | float = 0.0, basis: Array | None = None) -> OneToken:
        """K(x_s | x_t): one masked position, every one with the same probability, then token k with mu_k(x_t)."""
        return OneToken(x_t, self._anchor(x_t), self.shift(x_t, excess))

    def shift(self, x_t: Array, excess: Array) -> Array:
        return _pad(jnp.where(x_t[:, None] == self.vocabulary.mask, excess, 0.0))

    def tilted(self, x_t: Array, shift: Array) -> tuple[OneToken, Array]:
        """As of `MaskedTransition`."""
        anchor = self._anchor(x_t)
        _, log_mean = _normalise(anchor.reshape(-1), shift.reshape(-1))
        normalised, _ = _normalise(jnp.full(shift[:, :-1].shape, -np.log(self.vocabulary.size)), shift[:, :-1])
        return OneToken(x_t, anchor, _pad(normalised)), log_mean

    def _anchor(self, x_t: Array) -> Array:
        masked = x_t[:, None] == self.vocabulary.mask
        is_mask = jnp.arange(self.vocabulary.num_categories) == self.vocabulary.mask
        log_each = -jnp.log(jnp.sum(masked)) - np.log(self.vocabulary.size)
        return jnp.where(masked & ~is_mask, log_each, -jnp.inf)


@partial(jax.tree_util.register_dataclass, data_fields=["count", "clean"], meta_fields=["vocabulary", "length"])
@dataclass(frozen=True)
class Scattered:
    """``count`` masks at random positions of ``clean`` tokens; where that is None, of uniform tokens."""

    count: Array
    vocabulary: Vocabulary
    length: int
    clean: Array | None = None

    def sample(self, key: Array) -> Array:
        key_order, key_tokens = jax.random.split(key)
        tokens = self.clean
        if tokens is None:
            tokens = jax.random.randint(key_tokens, (self.length,), 0, self.vocabulary.size, jnp.int32)
        order = jax.random.permutation(key_order, self.length)
        return jnp.where(order < self.count, self.vocabulary.mask, tokens).astype(jnp.int32)

    def log_prob(self, x: Array) -> Array:
        masked = x == self.vocabulary.mask
        n, m = float(self.length), self.count
        log_subsets = jax.lax.lgamma(n + 1.0) - jax.lax.lgamma(m + 1.0) - jax.lax.lgamma(n - m + 1.0)
        log_tokens = -(n - m) * np.log(self.vocabulary.size) if self.clean is None else 0.0
        possible = jnp.sum(masked) == m
        if self.clean is not None:
            possible &= jnp.all(masked | (x == self.clean))
        return jnp.where(possible, log_tokens - log_subsets, -jnp.inf)


def _pad(tokens: Array) -> Array:
    """(length, V) to (length, V + 1): nothing is said of MASK."""
    return jnp.pad(tokens, ((0, 0), (0, 1)))


def _no_nan(excess: Array) -> Array:
    return ~jnp.any(jnp.isnan(excess.reshape(len(excess), -1)), axis=1)


def _log_probabilities(logits: Array) -> Array:
    """log(V mu); NaN in a row that has no finite logit, or an infinite one."""
    logits = logits.astype(jnp.result_type(float))
    return jax.nn.log_softmax(logits, axis=-1) + np.log(logits.shape[-1])


def _normalise(anchor: Array, shift: Array) -> tuple[Array, Array]:
    """The shift with which exp(anchor + shift) sums to 1 over the last axis, and the logarithms of the sums before.

    Where nothing is possible (-inf) the shift is zero, so that something can be drawn: the weight of it is zero.
    """
    log_normaliser = jax.nn.logsumexp(anchor + shift, axis=-1, keepdims=True)
    possible = log_normaliser > -jnp.inf
    return jnp.where(possible, shift - jnp.where(possible, log_normaliser, 0.0), 0.0), log_normaliser[..., 0]
