"""Log-weights: compensated sums, means, effective sample size."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rnejax import smc

EPS = float(np.finfo(np.float32).eps)


@pytest.mark.parametrize("transform", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_compensated_sum_keeps_a_thousand_terms_to_half_a_unit_in_the_last_place(transform):
    # One rounding of a result near 1e4 is at most 1e4 * eps / 2 = 6e-4; a plain float32 sum of these terms is 40 times worse.
    terms = 10 + jax.random.normal(jax.random.key(0), (1000, 8))

    def total(terms):
        final, _ = jax.lax.scan(lambda total, term: (total.add(term), None), smc.CompensatedSum.zeros((8,)), terms)
        return final.value

    exact = np.asarray(terms, np.float64).sum(axis=0)
    np.testing.assert_allclose(np.asarray(transform(total)(terms), np.float64), exact, atol=1e4 * EPS / 2 * 1.01, rtol=0)
