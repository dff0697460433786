r"""How far samples of a molecular system are from its reference, in the metrics of the literature.

Every metric compares samples ``x`` (n, atoms, space), with log-weights where they have any, to reference samples. A
metric of two finite sets is not zero when their laws agree: compare it with the *floor*, the same metric between two
independent reference sets of the same sizes.

Distances between laws come from POT (``pip install pot``, rnejax's extra ``molecules``).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class Histogram(NamedTuple):
    """Shares of a histogram whose first and last bins hold all that is below and above the range."""

    edges: np.ndarray
    shares: np.ndarray

    @property
    def outside(self) -> float:
        return float(self.shares[0] + self.shares[-1])


def weights_of(log_weights: Any, count: int) -> np.ndarray:
    """Normalised weights (count,), equal ones for None."""
    if log_weights is None:
        return np.full(count, 1 / count)
    log_weights = np.asarray(log_weights, np.float64)
    if log_weights.shape != (count,):
        raise ValueError(f"log_weights must have shape ({count},), one per sample, got {log_weights.shape}")
    weights = np.exp(log_weights - log_weights.max())
    return weights / weights.sum()


def pair_distances(x: Any) -> np.ndarray:
    """All distances |x_i - x_j|, i < j, of configurations (n, atoms, space): (n, pairs)."""
    x = np.asarray(x, np.float64)
    first, second = np.triu_indices(x.shape[1], k=1)
    return np.sqrt(((x[:, first] - x[:, second]) ** 2).sum(-1))


def wasserstein(values: Any, reference: Any, order: int, weights: Any = None) -> float:
    """The Wasserstein distance of order 1 or 2 of numbers on a line, in their unit; weights of ``values`` or None.

    Infinite values have an infinite distance.
    """
    import ot

    values, reference = np.asarray(values, np.float64).ravel(), np.asarray(reference, np.float64).ravel()
    if weights is not None:
        weights = np.asarray(weights, np.float64).ravel()
        values, weights = values[weights > 0], weights[weights > 0]
    if not np.all(np.isfinite(values)):
        return float("inf")
    equal = np.full(len(reference), 1 / len(reference))
    cost = float(ot.wasserstein_1d(values, reference, weights, equal, p=order))
    return cost ** (1 / order)


def energy_wasserstein(energy: Any, reference: Any, weights: Any = None, order: int = 1) -> float:
    """W_1 (or W_2) between the laws of the energy, in the system's unit of energy."""
    return wasserstein(energy, reference, order, weights)


def distance_wasserstein(x: Any, reference: Any, weights: Any = None, order: int = 2) -> float:
    """W_2 between the laws of the distance of a random pair, in the system's unit of length."""
    distances = pair_distances(x)
    if weights is not None:
        weights = np.repeat(np.asarray(weights)[:, None], distances.shape[1], axis=1) / distances.shape[1]
    return wasserstein(distances, pair_distances(reference), order, weights)


def histogram(values: Any, low: float, high: float, bins: int, weights: Any = None) -> Histogram:
    """``bins`` bins between low and high, and two more for what lies outside: nothing is dropped. Inf is above."""
    values = np.asarray(values, np.float64).ravel()
    weights = np.full(values.size, 1 / values.size) if weights is None else np.asarray(weights, np.float64).ravel()
    edges = np.linspace(low, high, bins + 1)
    index = np.searchsorted(edges, values, side="right")  # 0 below, bins + 1 above
    index = np.where(values == high, bins, index)
    return Histogram(edges, np.bincount(index, weights=weights, minlength=bins + 2)[: bins + 2])


def total_variation(values: Any, reference: Any, bins: int = 100, weights: Any = None) -> float:
    """Half the absolute difference of two histograms over the range of the reference, what lies outside included."""
    reference = np.asarray(reference, np.float64).ravel()
    low, high = float(reference.min()), float(reference.max())
    ours = histogram(values, low, high, bins, weights)
    theirs = histogram(reference, low, high, bins)
    return 0.5 * float(np.abs(ours.shares - theirs.shares).sum())


def distance_total_variation(x: Any, reference: Any, bins: int = 100, weights: Any = None) -> float:
    """Total variation between histograms of all pair distances."""
    distances = pair_distances(x)
    if weights is not None:
        weights = np.repeat(np.asarray(weights)[:, None], distances.shape[1], axis=1) / distances.shape[1]
    return total_variation(distances, pair_distances(reference), bins, weights)


def distance_mmd(x: Any, reference: Any, weights: Any = None, *, most: int = 4000) -> float:
    """Maximum mean discrepancy between the laws of all pair distances together, sorted, so that names do not matter.

    MMD^2 = E k(x, x') - 2 E k(x, y) + E k(y, y'), without the terms of one sample with itself, k the mean of Gaussian
    kernels whose widths are 1/4, 1/2, 1, 2 and 4 times the median distance within the reference (Gretton et al. 2012);
    negative where chance makes it so, and then given as a negative root. Of either set ``most`` are used, spread
    evenly; NaN where one of them is a single sample.
    """
    weights = np.full(len(x), 1 / len(x)) if weights is None else np.asarray(weights, np.float64)
    some, others = (
        np.unique(np.linspace(0, len(each) - 1, min(most, len(each))).astype(int)) for each in (x, reference)
    )
    ours, theirs = (
        np.sort(pair_distances(each), axis=1) for each in (np.asarray(x)[some], np.asarray(reference)[others])
    )
    weights = weights[some] / weights[some].sum()
    equal = np.full(len(theirs), 1 / len(theirs))
    if min(int(np.count_nonzero(weights)), len(theirs)) < 2:
        return float("nan")

    def squares(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return np.maximum((a**2).sum(1)[:, None] + (b**2).sum(1)[None] - 2 * a @ b.T, 0)

    within = squares(theirs, theirs)
    median = np.median(within[np.triu_indices(len(theirs), k=1)])

    def kernel(squares: np.ndarray) -> np.ndarray:
        return np.mean([np.exp(-squares / (2 * width**2 * median)) for width in (0.25, 0.5, 1, 2, 4)], axis=0)

    def among(squares: np.ndarray, weights: np.ndarray) -> float:
        found = kernel(squares)
        return float((weights @ found @ weights - np.diag(found) @ weights**2) / (1 - weights @ weights))

    square = (
        among(squares(ours, ours), weights)
        - 2 * float(weights @ kernel(squares(ours, theirs)) @ equal)
        + among(within, equal)
    )
    return float(np.sign(square) * np.sqrt(abs(square)))


def align(x: Any, onto: Any) -> np.ndarray:
    """Every configuration (n, atoms, 3) rotated onto one (atoms, 3), in the least squares (Kabsch 1976). No mirrors."""
    x, onto = np.asarray(x, np.float64), np.asarray(onto, np.float64)
    x, onto = x - x.mean(-2, keepdims=True), onto - onto.mean(-2, keepdims=True)
    left, _, right = np.linalg.svd(np.einsum("nai,aj->nij", x, onto))
    handed = np.sign(np.linalg.det(left @ right))
    left[:, :, -1] *= handed[:, None]
    return x @ (left @ right)


def aligned_wasserstein(x: Any, reference: Any, weights: Any = None) -> float:
    """W_2 of configurations that were aligned to the first reference, exact optimal transport, in units of length."""
    import ot

    ours, theirs = (align(each, np.asarray(reference)[0]).reshape(len(each), -1) for each in (x, reference))
    equal = np.full(len(theirs), 1 / len(theirs))
    weights = np.full(len(ours), 1 / len(ours)) if weights is None else np.asarray(weights, np.float64)
    cost = ot.dist(ours, theirs, metric="sqeuclidean")
    return float(np.sqrt(ot.emd2(weights, equal, cost, numItermax=1_000_000)))


def _angles(angles: Any) -> np.ndarray:
    """In [-pi, pi]: the largest float32 of an angle lies a rounding above pi. ValueError for what does not."""
    angles = np.asarray(angles, np.float64)
    if not np.all(np.abs(angles) <= np.pi + 1e-6):
        raise ValueError("angles must lie in [-pi, pi]")
    return np.clip(angles, -np.pi, np.pi)


def torsion_histogram(angles: Any, bins: int = 64, weights: Any = None) -> np.ndarray:
    """Shares of a Ramachandran plot, (bins, bins): phi along the first axis, from -pi to pi."""
    angles = _angles(angles)
    edges = np.linspace(-np.pi, np.pi, bins + 1)
    shares, _, _ = np.histogram2d(angles[:, 0], angles[:, 1], bins=[edges, edges], weights=weights)
    return shares / shares.sum()


def jensen_shannon(p: Any, q: Any) -> float:
    """The Jensen-Shannon divergence of two histograms, in nats (at most log 2)."""
    from scipy.spatial.distance import jensenshannon

    return float(jensenshannon(np.asarray(p).ravel(), np.asarray(q).ravel()) ** 2)


def torsion_free_energy(angles: Any, bins: int = 36, weights: Any = None, resolution: float = 2.5e-4) -> np.ndarray:
    """-log of the share of every bin of an angle in (-pi, pi], in kT, zero at the lowest: (bins,).

    ``resolution`` is added to all shares, half a sample of 2,000 by default: what is rarer cannot be told from what
    never happened, and both get the same finite number, in any two sets that are compared.
    """
    shares = histogram(_angles(angles).ravel(), -np.pi, np.pi, bins, weights).shares
    free_energy = -np.log(shares[1:-1] + resolution)
    return np.asarray(free_energy - free_energy.min())


def torsion_free_energy_error(angles: Any, reference: Any, weights: Any = None, bins: int = 36) -> float:
    """How far two free energies along an angle differ, in kT, up to the constant that neither has.

    The root of the mean square over angles drawn from either set alike: a difference counts where one of them is.
    """
    ours = torsion_free_energy(angles, bins, weights)
    theirs = torsion_free_energy(reference, bins)
    angles, reference = (_angles(each).ravel() for each in (angles, reference))
    shares = 0.5 * (
        histogram(angles, -np.pi, np.pi, bins, weights).shares + histogram(reference, -np.pi, np.pi, bins).shares
    )
    difference, shares = ours - theirs, shares[1:-1]
    return float(np.sqrt(shares @ (difference - shares @ difference) ** 2))


def standard_form(system: Any, x: Any) -> np.ndarray:
    """One configuration for all that differ by a symmetry of the energy, where the system has a ``standard_form``.

    A network of distances that takes some atoms for alike generates mirror images and exchanged atoms, all with one
    density; what depends on the hand or on names, such as a torsion, is to be read after this.
    """
    if not hasattr(system, "standard_form"):
        return np.asarray(x)
    return np.asarray(jax.lax.map(system.standard_form, jnp.asarray(x), batch_size=1000))


def energies(system: Any, x: Any, batch_size: int = 1000) -> np.ndarray:
    """The system's energy of many configurations, (n,)."""
    return np.asarray(jax.lax.map(system.energy, jnp.asarray(x), batch_size=batch_size))


def compare(
    system: Any,
    x: Any,
    reference: Any,
    log_weights: Any = None,
    *,
    energy: Any = None,
    reference_energy: Any = None,
    bins: int = 100,
    most_aligned: int = 2000,
) -> dict[str, float]:
    """All metrics of energies and, of particles, of their distances at once.

    Args:
      system: an energy.
      x: samples (n, atoms, space); ``log_weights`` (n,) of them, or None.
      reference: (m, atoms, space).
      energy, reference_energy: where they are known already.

    Returns:
      energy_w1, energy_w2 (units of energy), distance_w2 (of length), energy_tvd, distance_tvd (shares), distance_mmd;
      the shares of samples, by weight, of ``infinite`` energy, and ``outside`` the reference's range of energies; of
      molecules with torsions also aligned_w2 (units of length, of at most ``most_aligned`` of either set, the samples
      resampled by weight), phi_free_energy (kT), and ramachandran_js (nats), of configurations in `standard_form`.
    """
    weights = weights_of(log_weights, len(x))
    energy = energies(system, x) if energy is None else np.asarray(energy)
    reference_energy = energies(system, reference) if reference_energy is None else np.asarray(reference_energy)
    shares = histogram(energy, float(reference_energy.min()), float(reference_energy.max()), bins, weights)
    found = {
        "energy_w1": energy_wasserstein(energy, reference_energy, weights),
        "energy_w2": energy_wasserstein(energy, reference_energy, weights, order=2),
        "energy_tvd": total_variation(energy, reference_energy, bins, weights),
        "outside": shares.outside,
        "infinite": float(weights[~np.isfinite(energy)].sum()),
    }
    if len(system.shape) == 2:
        found["distance_w2"] = distance_wasserstein(x, reference, weights)
        found["distance_tvd"] = distance_total_variation(x, reference, bins, weights)
        found["distance_mmd"] = distance_mmd(x, reference, weights)
    if hasattr(system, "torsions"):
        # Above 1,000 K an atom's four bonds turn inside out now and then, in references too.
        x, reference = (standard_form(system, each) for each in (x, reference))
        angles, theirs = (np.asarray(jax.lax.map(system.torsions, each, batch_size=1000)) for each in (x, reference))
        found["phi_free_energy"] = torsion_free_energy_error(angles[:, 0], theirs[:, 0], weights)
        plots = torsion_histogram(angles, weights=weights), torsion_histogram(theirs)
        found["ramachandran_js"] = jensen_shannon(*plots)
        # Optimal transport takes the square of the number of samples; of weighted ones, equal ones by their quantiles.
        count = min(most_aligned, len(x))
        chosen = np.minimum(np.searchsorted(np.cumsum(weights), (np.arange(count) + 0.5) / count), len(x) - 1)
        others = np.unique(np.linspace(0, len(reference) - 1, min(most_aligned, len(reference))).astype(int))
        found["aligned_w2"] = aligned_wasserstein(np.asarray(x)[chosen], np.asarray(reference)[others])
    return found


def relative_energy_distance(x: np.ndarray, y: np.ndarray) -> float:
    """Of points (n, d) and (m, d): (2 E|x - y| - E|x - x'| - E|y - y'|) / (2 E|x - y|).

    Unbiased above the bar, and so negative by chance; 0 for equal laws.

    Szekely & Rizzo 2013: between 0 and 1 in expectation.
    """
    from scipy.spatial.distance import cdist

    def within(z: np.ndarray) -> float:
        return float(cdist(z, z).sum() / (len(z) * (len(z) - 1)))

    between = 2 * float(cdist(x, y).mean())
    return (between - within(x) - within(y)) / between
