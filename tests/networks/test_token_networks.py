"""Networks of tokens: shapes, batching, symmetries they must not have, and what they refuse."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rnejax.networks import build, functional, tokens

KEY = jax.random.key(0)
NETWORKS = {
    "token_transformer": {"length": 16, "width": 16, "num_layers": 2, "num_heads": 2},
    "token_unet": {"grid": [4, 4], "channels": [8, 16], "embedding": 16},
}


def make(name, **arguments):
    """With weights that are not zero where a network starts as zero."""
    apply, params = functional(build(name, KEY, vocab_size=5, **NETWORKS[name], **arguments))
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(KEY, len(leaves))
    moved = [leaf + 0.1 * jax.random.normal(key, leaf.shape) for leaf, key in zip(leaves, keys, strict=True)]
    return apply, jax.tree.unflatten(tree, moved)


X = jax.random.randint(jax.random.key(1), (3, 16), 0, 6)
T = jnp.asarray([0.1, 0.5, 0.9])


@pytest.mark.parametrize("name", NETWORKS)
def test_a_batch_is_its_examples_and_leading_axes_pass_through(name):
    apply, params = make(name, condition_sizes=[2, 3], time=True)
    condition = jnp.asarray([[0, 3], [1, 0], [2, 2]])
    together = apply(params, X, T, condition)
    assert together.shape == (3, 16, 5)
    one_by_one = jnp.stack([apply(params, x, t, c) for x, t, c in zip(X, T, condition, strict=True)])
    np.testing.assert_allclose(together, one_by_one, atol=1e-5)
    np.testing.assert_allclose(apply(params, X[None], T[None], condition[None])[0], together, atol=1e-5)


@pytest.mark.parametrize("name", NETWORKS)
def test_every_logit_depends_on_every_token(name):
    """And so on the order of the tokens, on the condition, and on the time where it is asked to."""
    apply, params = make(name, condition_sizes=[2], time=True)
    x, c = X[0], jnp.asarray([0])
    base = np.asarray(apply(params, x, T[0], c))
    for position in (0, 15):
        changed = apply(params, x.at[position].set((x[position] + 1) % 6), T[0], c)
        assert (np.abs(np.asarray(changed) - base).max(axis=1) > 0).all()
    assert np.abs(np.asarray(apply(params, x, T[0], jnp.asarray([2]))) - base).max() > 1e-4
    assert np.abs(np.asarray(apply(params, x, T[2], c)) - base).max() > 1e-4


@pytest.mark.parametrize("name", NETWORKS)
def test_by_default_a_network_is_free_of_time(name):
    apply, params = make(name)
    np.testing.assert_array_equal(apply(params, X, T), apply(params, X, 1 - T))


@pytest.mark.parametrize("name", NETWORKS)
def test_a_key_turns_dropout_on(name):
    apply, params = make(name, dropout_rate=0.5)
    plain, dropped = apply(params, X, T), apply(params, X, T, key=KEY)
    assert np.abs(np.asarray(plain - dropped)).max() > 1e-4


@pytest.mark.parametrize("name", NETWORKS)
def test_tokens_and_classes_that_do_not_exist_give_nan(name):
    apply, params = make(name, condition_sizes=[2])
    fine = jnp.asarray([2])
    assert np.isfinite(np.asarray(apply(params, X[0], T[0], fine))).all()
    for bad in (-1, 6):
        assert np.isnan(np.asarray(apply(params, X[0].at[3].set(bad), T[0], fine))).any()
    for bad in (-1, 3):
        assert np.isnan(np.asarray(apply(params, X[0], T[0], jnp.asarray([bad])))).all()


@pytest.mark.parametrize("name", NETWORKS)
def test_sequences_of_another_length_and_conditions_of_another_size_are_refused(name):
    apply, params = make(name, condition_sizes=[2])
    with pytest.raises(ValueError, match=r"x must have shape \(..., 16\)"):
        apply(params, jnp.zeros(17, int), T[0], jnp.asarray([0]))
    with pytest.raises(ValueError, match=r"condition must have shape \(..., 1\)"):
        apply(params, X[0], T[0], jnp.asarray([0, 1]))


def test_impossible_sizes_are_refused():
    with pytest.raises(ValueError, match="2 num_heads must divide width: got 4 heads for a width of 12"):
        build("token_transformer", KEY, vocab_size=5, length=4, width=12, num_heads=4)
    with pytest.raises(ValueError, match="multiples of 2"):
        build("token_unet", KEY, vocab_size=5, grid=[3, 4])


def test_how_a_token_looks_at_another_depends_on_how_far_apart_they_are():
    """The same query and the same key everywhere: scores are constant along diagonals, and differ between them."""
    query, key = jax.random.normal(KEY, (2, 1, 1, 8))
    turned = [tokens._turned(jnp.broadcast_to(each, (12, 1, 8)))[:, 0] for each in (query, key)]
    scores = np.asarray(turned[0] @ turned[1].T, np.float64)
    np.testing.assert_allclose(scores[1:, 1:], scores[:-1, :-1], atol=1e-5)
    # By plane geometry: the pair (i, i + 4) of both, turned by (distance) * 10000^(-i / 4).
    for distance in (0, 1, 5):
        angle = distance * 10_000.0 ** (-np.arange(4) / 4)
        q, k = (np.asarray(each, np.float64).ravel() for each in (query, key))
        q, k = q[:4] + 1j * q[4:], k[:4] + 1j * k[4:]
        np.testing.assert_allclose(scores[distance, 0], np.sum(np.real(q * np.exp(1j * angle) * np.conj(k))), atol=1e-5)
