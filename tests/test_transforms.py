"""Transforms: inverse of each other, with the Jacobian that a density needs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rnejax.kernels import CentreOfMassFree, FullSpace
from rnejax.transforms import Affine, Identity

SHAPE = (2, 3)
X = jnp.asarray(np.random.default_rng(0).normal(size=SHAPE), jnp.float32)
TRANSFORMS = [
    Identity(),
    Affine(scale=-2.5, shift=1.0),
    Affine(scale=np.array([[1.0, -2.0, 0.5], [3.0, 0.1, 7.0]]), shift=np.arange(3.0)),
    Affine(scale=np.array([2.0, 3.0, 4.0])),  # broadcast over the first axis
]


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_there_and_back(transform):
    np.testing.assert_allclose(transform.to_model(transform.to_data(X)), X, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_log_det_is_that_of_the_jacobian(transform):
    jacobian = jax.jacobian(lambda flat: transform.to_data(flat.reshape(SHAPE)).ravel())(X.ravel())
    np.testing.assert_allclose(transform.log_det(X, FullSpace()), np.linalg.slogdet(jacobian)[1], rtol=1e-5, atol=1e-6)


def test_one_scale_counts_the_dimensions_of_the_subspace():
    np.testing.assert_allclose(Affine(2.0).log_det(X, CentreOfMassFree()), 3 * np.log(2), rtol=1e-6)


def test_different_scales_do_not_map_a_subspace_to_itself():
    with pytest.raises(ValueError, match=r"does not map CentreOfMassFree\(\) to itself; use one number"):
        TRANSFORMS[2].log_det(X, CentreOfMassFree())


@pytest.mark.parametrize("scale", [0.0, np.nan, [1.0, np.inf]])
def test_scales_that_cannot_be_undone_are_refused(scale):
    with pytest.raises(ValueError, match="scale must be finite and non-zero"):
        Affine(scale)


def test_transforms_are_static_and_compared_by_value():
    assert Affine([1.0, 2.0], 3.0) == Affine(np.array([1.0, 2.0]), 3)
    assert hash(Affine([1.0, 2.0])) == hash(Affine([1.0, 2.0]))
    assert Affine(1.0) != Affine([1.0])
    assert jax.tree.leaves(Affine([1.0, 2.0])) == []
