"""Which noise levels a loss looks at: laws of times, and uniform numbers that cover [0, 1) evenly."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


def low_discrepancy_uniforms(key: jax.Array, count: int) -> jax.Array:
    """(u_0 + i / count) mod 1 for i < count with u_0 ~ U[0, 1) (Kingma et al. 2021, appendix I.1).

    Each number alone is uniform, and together they hit every interval of length 1/count exactly once: the loss of a
    batch no longer varies because one batch happened to see more noise than another.
    """
    return jnp.mod(jax.random.uniform(key) + jnp.arange(count) / count, 1.0)


class TimeLaw(NamedTuple):
    """A law of times, as its quantile function: cumulative probabilities and the times where they are reached."""

    cumulative: jax.Array
    times: jax.Array

    def __call__(self, uniforms: jax.Array) -> jax.Array:
        """Times at these cumulative probabilities, the shape of `uniforms`."""
        return jnp.interp(uniforms, self.cumulative, self.times)


def time_law(
    process: Any,
    *,
    log_snr_share: float = 0.5,
    log_snr_range: tuple[float, float] | None = None,
    num_nodes: int = 4097,
) -> TimeLaw:
    """A mixture: with probability 1 - `log_snr_share` uniform in t, else uniform in the log signal-to-noise ratio.

    With log-SNR = log(alpha^2 / sigma^2), -log p <= constant + 1/2 int E|eps - eps_hat|^2 d(log-SNR) (Kingma et al.
    2021): every unit of log-SNR counts the same for the likelihood, and near the data there are many of them in a
    sliver of t. Uniform t, on the other hand, looks where images take shape.

    Args:
        process: a process of numbers that diffuse.
        log_snr_share: probability of the second component, in [0, 1].
        log_snr_range: (lowest, highest) log-SNR of the second component; default, all of [t_min, t_max].
        num_nodes: nodes of the table; they are uniform in log-SNR and in t, half and half.

    Raises:
        ValueError: if the share is outside [0, 1], or the range is empty or outside the process's.
    """
    if not 0.0 <= log_snr_share <= 1.0:
        raise ValueError(f"log_snr_share must be in [0, 1]: got {log_snr_share}")
    span = float(process.t_max) - float(process.t_min)
    if not np.isfinite(span) or span <= 0:
        raise ValueError(f"the process must have a finite time range: got [{process.t_min}, {process.t_max}]")

    fine = process.t_min + span * np.geomspace(1e-9, 1.0, 200_001)
    fine[-1] = process.t_max
    fine = np.unique(np.concatenate([[process.t_min], fine, process.t_max - span * np.geomspace(1e-9, 1.0, 200_001)]))
    fine = fine[(fine >= process.t_min) & (fine <= process.t_max)]
    log_snr = process.log_snr(fine)
    finite = np.isfinite(log_snr)
    lowest, highest = float(log_snr[finite].min()), float(log_snr[finite].max())
    low, high = (lowest, highest) if log_snr_range is None else log_snr_range
    if not (lowest - 1e-6 <= low < high <= highest + 1e-6):
        raise ValueError(
            f"log_snr_range must be (low, high) with {lowest:.4g} <= low < high <= {highest:.4g}, the range of the "
            f"process on [{process.t_min}, {process.t_max}]: got ({low:.4g}, {high:.4g})"
        )
    by_log_snr = np.clip((high - log_snr) / (high - low), 0.0, 1.0)
    by_time = (fine - process.t_min) / span
    # The nodes are the quantiles of an even mixture, so that either component is resolved whatever the share is.
    resolved = 0.5 * by_time + 0.5 * (highest - np.where(finite, log_snr, lowest)) / (highest - lowest)
    nodes = np.interp(np.linspace(0.0, 1.0, num_nodes), resolved, fine)
    cumulative = np.interp(nodes, fine, log_snr_share * by_log_snr + (1.0 - log_snr_share) * by_time)
    return TimeLaw(jnp.asarray(cumulative, jnp.float32), jnp.asarray(nodes, jnp.float32))
