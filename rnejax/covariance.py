r"""The covariance of the reverse kernel: the choice that decides the accuracy of everything else.

Exactly, Cov[x_0 | x_t] = (sigma_t^2 / alpha_t) dD/dx_t with the denoiser D. Each choice below is one way to know it;
all are kept relative to the Gaussian reference, as Cov[x_0 | x_t] / Cov_ref[x_0 | x_t] - 1 (the *spread*), because

    d(excess)/dx = dD/dx - dD_ref/dx   gives it directly, without subtraction.

Of linear SDEs, where Cov_ref is a matrix, the spread is that in the coordinates of clean data in which it is diagonal,
C^{-1/2} (Cov[x_0 | x_t] - C) C^{-1/2}; the level of noise says along which changes of the state it is to be had
(``level.probe`` and ``level.relative``), and in what form it is kept.

=========== ============================================================ ====================
choice       Cov[x_0 given x_t]                                            cost per step
=========== ============================================================ ====================
euler        none: drift and diffusion frozen at t (Euler-Maruyama)        1 evaluation
reference    that of the Gaussian reference                                1
analytic     E|x_0 - D|^2 / d times I, tabulated (``rnejax.calibrate``)    1
hutchinson   (sigma^2/alpha) tr(dD/dx) / d times I, one Rademacher probe   1 and a JVP
diagonal     the diagonal of (sigma^2/alpha) dD/dx                         1 and d JVPs
full         all of it, symmetrised and made positive semi-definite        1 and d JVPs
elastic      of particles: that of springs between them, tabulated         1
             (``rnejax.calibrate_elastic_network``)
=========== ============================================================ ====================

Where alpha_t = 0 the Jacobian of the denoiser says nothing about its covariance (D does not depend on x_t there). The
choices that need it are then evaluated at a time just below, where alpha_t is small: Cov[x_0 | x_t] changes with
alpha_t^2 only (``DiffusionModel.evaluate``).

Sources: Bao et al. 2022 (Analytic-DPM); mathematics.md, section 2.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from .kernels import Array, FullSpace, Subspace
from .processes import LinearLevel, NoiseLevel


class Evaluation(NamedTuple):
    """What a model says of a batch of states at one noise level; every leaf has the batch as its leading axis.

    Attributes:
      excess: denoiser minus the reference's denoiser, (n, *shape).
      spread: eigenvalues of Cov[x_0 | x_t] / Cov_ref[x_0 | x_t] - 1: (n,), (n, *shape) or, with a basis, (n, d); of
        a linear SDE (n,), a diagonal (n, k, b, m), matrices (n, d, d), or None for none.
      basis: eigenvectors (n, d, d), or None.
    """

    excess: Array
    spread: Any
    basis: Array | None = None


ExcessFn = Callable[[Array], Array]


class Covariance(Protocol):
    """A choice of Cov[x_0 | x_t]. ``excess_fn`` maps a batch of states to the batch of excesses, row by row."""

    @property
    def euler(self) -> bool:
        """Whether the kernel is the Euler-Maruyama one instead of the exact-mean one."""
        ...

    # An attribute ``needs_signal = True`` says that the choice looks at the Jacobian of the denoiser.

    def __call__(
        self, key: Array, excess_fn: ExcessFn, x: Array, level: NoiseLevel, subspace: Subspace
    ) -> Evaluation: ...


@jax.tree_util.register_static
@dataclass(frozen=True)
class Reference:
    """The reference's posterior covariance: exact for data that are the reference."""

    euler: bool = False

    def __call__(self, key: Array, excess_fn: ExcessFn, x: Array, level: NoiseLevel, subspace: Subspace) -> Evaluation:
        return Evaluation(excess_fn(x), None if isinstance(level, LinearLevel) else jnp.zeros(len(x), x.dtype))


@jax.tree_util.register_static
@dataclass(frozen=True)
class Euler(Reference):
    """Euler-Maruyama: not a covariance of x_0 but another kernel, kept for comparison with the papers."""

    euler: bool = True


@partial(jax.tree_util.register_dataclass, data_fields=["log_snr", "ratio"], meta_fields=["euler"])
@dataclass(frozen=True)
class Analytic:
    """The denoising loss per dimension, tabulated over log-SNR as a ratio to the reference's. Built by ``calibrate``.

    Attributes:
      log_snr: increasing, (k,).
      ratio: E|x_0 - D(x_t, t)|^2 / (d Cov_ref[x_0 | x_t]) at these, (k,); interpolated linearly, constant outside.
    """

    log_snr: Array
    ratio: Array
    euler: bool = False

    def __call__(self, key: Array, excess_fn: ExcessFn, x: Array, level: NoiseLevel, subspace: Subspace) -> Evaluation:
        ratio = jnp.interp(level.log_snr, self.log_snr, self.ratio).astype(x.dtype)
        return Evaluation(excess_fn(x), jnp.broadcast_to(ratio - 1, len(x)))


@jax.tree_util.register_static
@dataclass(frozen=True)
class Hutchinson:
    """tr(dD/dx) / d from one Rademacher probe per state, clipped to [0, sigma^2 / alpha^2].

    The draw belongs to the state: the model's kernel and the proposal that moves it must share it, or exactness is
    lost.
    """

    euler: bool = False
    needs_signal: ClassVar[bool] = True

    def __call__(self, key: Array, excess_fn: ExcessFn, x: Array, level: NoiseLevel, subspace: Subspace) -> Evaluation:
        shape = jax.eval_shape(excess_fn, x).shape
        probe = jax.vmap(subspace.project)(jax.random.rademacher(key, shape, x.dtype))
        directions = jax.vmap(lambda probe: level.probe(probe, x.shape[1:]))(probe)
        excess, directional = jax.jvp(excess_fn, (x,), (directions,))
        trace = jnp.sum((probe * level.relative(directional)).reshape(len(x), -1), axis=-1)
        spread = level.mean_spread(trace, subspace.dimension(shape[1:]))
        return Evaluation(excess, jnp.clip(spread, -1.0, level.largest_spread))


@jax.tree_util.register_static
@dataclass(frozen=True)
class Diagonal:
    """The diagonal of (sigma^2 / alpha) dD/dx from d JVPs, made non-negative."""

    euler: bool = False
    needs_signal: ClassVar[bool] = True

    def __call__(self, key: Array, excess_fn: ExcessFn, x: Array, level: NoiseLevel, subspace: Subspace) -> Evaluation:
        if not isinstance(subspace, FullSpace):
            raise ValueError(
                f"a diagonal covariance has no meaning on {subspace}; use 'full', 'hutchinson' or 'analytic'"
            )
        excess, jacobian = _jacobian(excess_fn, x, level)
        diagonal = jnp.diagonal(jacobian, axis1=-2, axis2=-1).reshape(excess.shape)
        return Evaluation(excess, level.clipped(diagonal))


@jax.tree_util.register_static
@dataclass(frozen=True)
class Full:
    """All of (sigma^2 / alpha) dD/dx from d JVPs, symmetrised and projected to positive semi-definite.

    A learned denoiser is no gradient, so its Jacobian need be neither. A Jacobian of d x d numbers per state and an
    eigendecomposition of each: for tens of dimensions, not for images. Eigenvectors have no derivative where
    eigenvalues coincide (isotropic data, alpha = 0), so that gradients of densities are NaN there; take another choice
    for those. On CPUs of few cores XLA (seen with jax 0.10) can wait for ever where one compiled program has two large
    batches of eigendecompositions that do not depend on each other: ``steer`` keeps those of its models in order, a
    program of your own should call one estimate after another.
    """

    euler: bool = False
    needs_signal: ClassVar[bool] = True

    def __call__(self, key: Array, excess_fn: ExcessFn, x: Array, level: NoiseLevel, subspace: Subspace) -> Evaluation:
        excess, jacobian = _jacobian(excess_fn, x, level)
        symmetric = 0.5 * (jacobian + jnp.swapaxes(jacobian, -1, -2))
        if not isinstance(subspace, FullSpace):
            flat_project = jax.vmap(lambda row: subspace.project(row.reshape(x.shape[1:])).reshape(-1))
            project_rows = jax.vmap(flat_project)
            symmetric = jnp.swapaxes(project_rows(jnp.swapaxes(project_rows(symmetric), -1, -2)), -1, -2)
        return Evaluation(excess, *level.spectrum(symmetric))


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["log_snr", "stiffness", "confinement", "knots", "classes", "least", "softest"],
    meta_fields=["euler"],
)
@dataclass(frozen=True)
class ElasticNetwork:
    r"""That of springs between particles, tabulated over log-SNR. Built by ``rnejax.calibrate_elastic_network``.

    What is known of x_0 under noise that is large against a bond and small against a torsion is far from isotropic:
    along the bond nothing is uncertain, across it everything is. ``full`` knows that, for one derivative per coordinate
    and step. Here it is that of an elastic network (Atilgan et al. 2001) around the denoised configuration D(x_t, t),

        (Cov[x_0 | x_t] + least Cov_ref[x_0 | x_t])^{-1} = (alpha^2 / sigma^2 + c) I
                              + sum_{i<j} (e_i - e_j)(e_i - e_j)^T (x) [a_ij u u^T + b_ij (I - u u^T)]

    with u the direction of D_i - D_j, and a_ij, b_ij functions of its length, piecewise linear, one for each pair of
    kinds of particles, at each noise level. Precisions of springs add up, however stiff they are; covariances do not.
    ``least`` is a number that keeps the stiffness of what does not move at all finite.

    A step costs one evaluation, and one eigendecomposition per particle, but no derivative.

    Attributes:
      log_snr: increasing, (k,); between them all else is interpolated linearly, and constant outside.
      stiffness: (k, 2, classes, knots): a and b of every class of pairs where its distance is at a knot.
      confinement: c, (k,).
      knots: distances in the network's coordinates, increasing, (classes, knots); a and b are constant outside.
      classes: of every pair, integers (n, n), symmetric.
      least: see above.
      softest: the smallest precision that is believed, as a share of alpha^2 / sigma^2.
    """

    log_snr: Array
    stiffness: Array
    confinement: Array
    knots: Array
    classes: Array
    least: float | Array = 0.0
    softest: float | Array = 0.25
    euler: bool = False

    def __call__(self, key: Array, excess_fn: ExcessFn, x: Array, level: NoiseLevel, subspace: Subspace) -> Evaluation:
        excess = excess_fn(x)
        stiffness, confinement = (
            _interpolate(level.log_snr, self.log_snr, table) for table in (self.stiffness, self.confinement)
        )

        def one(clean: Array) -> tuple[Array, Array]:
            precision, basis = self.spectrum(clean, confinement, stiffness, level, subspace)
            softest = self.softest * level.alpha**2 / level.sigma**2
            variance = 1 / jnp.maximum(precision, softest)
            return jnp.maximum(variance / level.reference_posterior_variance - (1 + self.least), -1.0), basis

        spread, basis = jax.vmap(one)(level.denoised(x, excess))
        return Evaluation(excess, spread, basis)

    def spectrum(
        self, clean: Array, confinement: Array, stiffness: Array, level: NoiseLevel, subspace: Subspace
    ) -> tuple[Array, Array]:
        """Eigenvalues and eigenvectors of the precision of x_0 around one denoised configuration.

        Off the subspace nothing moves: the precision there makes the covariance that of the reference.
        """
        unit = jnp.eye(clean.size, dtype=clean.dtype)
        signal = level.alpha**2 / level.sigma**2
        on = jax.vmap(lambda row: subspace.project(row.reshape(clean.shape)).reshape(-1))(unit)
        precision = on @ (self.springs(clean, stiffness) + (signal + confinement) * unit) @ on
        precision = precision + (unit - on) / ((1 + self.least) * level.reference_posterior_variance)
        values, basis = jnp.linalg.eigh(0.5 * (precision + precision.T))
        return values, basis

    def springs(self, clean: Array, stiffness: Array) -> Array:
        """The precision of the springs around one configuration (n, space), as a matrix (n space, n space)."""
        n, space = clean.shape
        direction, shares = pair_directions(clean, self.knots, self.classes)
        along, across = jnp.einsum("ijk,aijk->aij", shares, stiffness[:, self.classes])
        blocks = across[..., None, None] * jnp.eye(space, dtype=clean.dtype)
        blocks += (along - across)[..., None, None] * direction[..., :, None] * direction[..., None, :]
        blocks = blocks * (1 - jnp.eye(n, dtype=clean.dtype))[..., None, None]
        own = jnp.eye(n, dtype=clean.dtype)[:, :, None, None] * jnp.sum(blocks, axis=1)[:, None]
        return jnp.swapaxes(own - blocks, 1, 2).reshape(n * space, n * space)


CHOICES: dict[str, Covariance] = {
    "euler": Euler(),
    "reference": Reference(),
    "hutchinson": Hutchinson(),
    "diagonal": Diagonal(),
    "full": Full(),
}


def get_covariance(choice: str | Covariance) -> Covariance:
    """A covariance by name, or the object itself.

    Raises:
      ValueError: for a name that is not one of the choices, or something that is no covariance.
    """
    if not isinstance(choice, str):
        if not callable(choice) or not hasattr(choice, "euler"):
            raise ValueError(
                f"covariance must be one of {', '.join(CHOICES)}, or an object such as rnejax.covariance.Analytic, got "
                f"{choice!r}"
            )
        return choice
    if choice == "analytic":
        raise ValueError(
            "the analytic covariance is a table that has to be measured: model = rnejax.calibrate(key, model, times)"
        )
    if choice not in CHOICES:
        raise ValueError(f"unknown covariance {choice!r}; choose one of {', '.join(CHOICES)}, or pass an object")
    return CHOICES[choice]


def _jacobian(excess_fn: ExcessFn, x: Array, level: Any) -> tuple[Array, Array]:
    """Excesses (n, *shape) and the spreads that their Jacobians are, (n, d, d), one JVP of the batch per coordinate."""
    excess, jvp = jax.linearize(excess_fn, x)
    d = int(excess[0].size)
    units = jnp.eye(d, dtype=x.dtype).reshape(d, *excess.shape[1:])

    def column(unit: Array) -> Array:
        direction = level.probe(unit, x.shape[1:])
        return level.relative(jvp(jnp.broadcast_to(direction, x.shape))).reshape(len(x), d)

    return excess, jnp.moveaxis(jax.lax.map(column, units), 0, -1)


def _interpolate(at: Array, where: Array, table: Array) -> Array:
    """Linear in the first axis of a table, constant outside."""
    upper = jnp.clip(jnp.searchsorted(where, at), 1, max(len(where) - 1, 1))
    lower = upper - 1
    upper = jnp.minimum(upper, len(where) - 1)
    width = jnp.where(upper > lower, where[upper] - where[lower], 1.0)
    share = jnp.clip((at - where[lower]) / width, 0.0, 1.0).astype(table.dtype)
    return (1 - share) * table[lower] + share * table[upper]


def pair_directions(clean: Array, knots: Array, classes: Array) -> tuple[Array, Array]:
    """Unit vectors of all pairs (n, n, space), and how much of each knot is in their distances (n, n, knots)."""
    differences = clean[:, None] - clean[None]
    distances = jnp.sqrt(jnp.sum(differences**2, axis=-1) + 1e-12)
    direction = differences / distances[..., None]
    own = knots[classes]
    count = own.shape[-1]
    if count == 1:
        return direction, jnp.ones_like(own)
    # Piecewise linear: a hat function at every knot, whose flanks are flat outside.
    ones = jnp.ones_like(own[..., :1])
    rising = jnp.clip((distances[..., None] - own[..., :-1]) / (own[..., 1:] - own[..., :-1]), 0.0, 1.0)
    reached = jnp.concatenate([ones, rising], axis=-1)
    return direction, reached - jnp.concatenate([rising, jnp.zeros_like(ones)], axis=-1)
