"""What a posterior adds to its prior: a network, a multiple of the reward's gradient, low-rank changes of weights."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import rnejax as rj
from rnejax.networks import MLP, TokenTransformer, UNet, adapted, functional, low_rank_adapters
from rnejax.processes import Cosine, CriticallyDamped, Masked, NonReversible
from rnejax.systems import GaussianMixture
from rnejax.training import (
    FineTuned,
    Guidance,
    Guided,
    fit,
    low_rank_model,
    partial_model,
    trajectory_balance_loss,
)

KEY = jax.random.key(3)
TILT = np.array([0.6, -0.4])
U, Q = np.array([[1.5, 0.3], [0.3, 0.8]]), np.array([[0.0, 1.2], [-1.2, 0.0]])
PROCESSES = [
    Cosine(t_min=0.01, t_max=1.0, data_std=0.7),
    NonReversible(U, Q, data_covariance=0.49, t_min=0.01, t_max=20.0),
    CriticallyDamped(data_std=0.7, t_min=0.05),
]
every_process = pytest.mark.parametrize("process", PROCESSES, ids=lambda process: type(process).__name__)


def prior_of(process):
    return GaussianMixture([(0.2, -0.1)], 0.7).model(process, "x0")


def log_reward(x):
    return jnp.asarray(TILT, x.dtype) @ x.reshape(-1)[:2]  # of a phase space, of the positions


def nothing(params, x, t):
    return params * jnp.ones(2)


@every_process
def test_without_a_network_it_is_the_tilt_of_a_gaussian(process):
    with jax.enable_x64(True):
        prior = prior_of(process)
        x = jax.random.normal(KEY, prior.shape)
        for t in (0.1, 0.5):
            level = process.level(t)
            plain = prior.denoise(x, t)
            guided = Guided(prior, nothing, log_reward).model(Guidance(jnp.zeros(()), jnp.ones(())))
            moved = guided.denoise(x, t)
            # The posterior of x_0 is normal with the reference's covariance: of isotropic data c^2 on average.
            np.testing.assert_allclose(moved - plain, level.posterior_scale**2 * TILT, rtol=1e-9)
            alone = Guided(prior, nothing).model(Guidance(jnp.asarray(2.0), jnp.ones(())))
            np.testing.assert_allclose(alone.denoise(x, t) - plain, 2 * level.posterior_scale * np.ones(2), rtol=1e-9)


def test_the_transform_and_the_law_of_noise_are_the_priors():
    process = PROCESSES[0]
    law = GaussianMixture([(0.2, -0.1)], 0.7)
    start = process.reference(1.0, (2,))
    prior = law.model(process, "x0", transform=rj.transforms.Affine(2.0, 1.0), prior=start)
    model = Guided(prior, nothing, log_reward).model(Guidance(jnp.zeros(()), jnp.ones(())))
    assert model.transform == prior.transform
    np.testing.assert_array_equal(model.prior_at(None).mean, start.mean)
    level = process.level(0.3)
    x = jnp.asarray([0.3, 0.4])
    # d log r / d x of r at 2 x + 1.
    expected = prior.denoise(x, 0.3) + 2 * level.posterior_scale**2 * TILT
    np.testing.assert_allclose(model.denoise(x, 0.3), expected, rtol=1e-5)


def test_a_reward_of_zero_guides_nowhere():
    process = PROCESSES[0]
    model = Guided(prior_of(process), nothing, lambda x: jnp.log(jnp.maximum(x[0] - 100.0, 0.0))).model(
        Guidance(jnp.zeros(()), jnp.ones(()))
    )
    x = jnp.asarray([0.3, 0.4])
    np.testing.assert_allclose(model.denoise(x, 0.3), prior_of(process).denoise(x, 0.3), rtol=1e-6)


def test_a_gradient_that_is_no_number_is_not_mended():
    process = PROCESSES[0]
    broken = Guided(prior_of(process), nothing, lambda x: jnp.sqrt(0.0 * x[0]))  # 0, of gradient 0 / 0
    model = broken.model(Guidance(jnp.zeros(()), jnp.ones(())))
    assert np.all(np.isnan(model.denoise(jnp.asarray([0.3, 0.4]), 0.3)[:1]))


def test_a_steep_reward_is_followed_as_far_as_it_is_trusted():
    process = PROCESSES[0]
    prior, level, x = prior_of(process), process.level(0.5), jnp.asarray([0.3, 0.4])
    for trust in (0.5, 2.0):
        steep = Guided(prior, nothing, lambda x: 1e3 * log_reward(x), trust=trust)
        moved = steep.model(Guidance(jnp.zeros(()), jnp.ones(()))).denoise(x, 0.5) - prior.denoise(x, 0.5)
        divergence = 0.5 * float(jnp.sum(moved**2)) / float(level.posterior_scale) ** 2
        assert divergence == pytest.approx(trust, rel=1e-4)
        assert moved @ TILT > 0
    with pytest.raises(ValueError, match="trust must be positive"):
        Guided(prior, nothing, log_reward, trust=0.0)


def test_tokens_are_told_to_add_logits():
    prior = rj.DiffusionModel(Masked(4, 3), lambda x, t: jnp.zeros((3, 4)))
    with pytest.raises(ValueError, match="tokens: add logits"):
        Guided(prior, nothing)


@pytest.mark.parametrize("strength", [0.0, 0.7])
def test_without_a_network_of_its_own_the_priors_weights_are_tuned(strength):
    """And the posterior's condition is the tuned network's and the reward's: here a class, of which rows are tuned."""
    process = PROCESSES[0]
    apply, params = functional(MLP((2,), 8, 1, num_classes=3, rngs=nnx.Rngs(0)))
    params = jax.tree.map(lambda leaf: leaf + 0.1 * jnp.cos(jnp.arange(leaf.size)).reshape(leaf.shape), params)
    prior = rj.DiffusionModel(
        process, apply.as_prediction(), "v", shape=(2,), params=params, condition=jnp.int32(3), batched=True
    )
    other = jax.tree.map(lambda leaf: 1.1 * leaf, params)

    def reward(x, label):
        return (1.0 + label) * log_reward(x)

    guided = Guided(prior, log_reward=reward, trust=10.0)
    model = guided.model(Guidance(other, jnp.asarray(strength)), condition=jnp.int32(3))
    x, level = jnp.asarray([0.3, 0.4]), process.level(0.4)
    for label in (3, 1):
        tuned = prior.with_params(other).with_condition(jnp.int32(label)).denoise(x, 0.4)
        shift = strength * (1.0 + label) * level.posterior_scale**2 * TILT
        found = model.with_condition(jnp.int32(label)).denoise(x, 0.4)
        np.testing.assert_allclose(found, tuned + shift, rtol=1e-4)
    plain = Guided(prior).model(Guidance(other, jnp.ones(())))
    np.testing.assert_allclose(plain.denoise(x, 0.4), prior.with_params(other).denoise(x, 0.4), rtol=1e-5)


def test_the_strength_is_learned():
    """Of a Gaussian tilted by exp(b . x) the gradient alone is the posterior: its multiple goes to one, and log Z."""
    process = PROCESSES[0]
    prior = prior_of(process)
    guided = Guided(prior, lambda params, x, t: jnp.zeros(2), log_reward)
    weights = Guidance({"unused": jnp.zeros(())}, jnp.zeros(()))
    posterior = guided.model(weights)
    loss = trajectory_balance_loss(posterior, prior, rj.time_grid(process, 8), log_reward)
    fitted = fit(
        KEY,
        loss,
        FineTuned(weights, jnp.zeros(())),
        jnp.zeros((64, 2)),
        optax.adam(optax.cosine_decay_schedule(0.1, 200)),
        num_steps=200,
        batch_size=64,
        steps_per_call=50,
        report_every=200,
        save_every=200,
    )
    # r is of x at t_min, where the law is wider than the data by sigma^2 / 0.49 = 5e-4.
    assert abs(fitted.params.weights.strength - 1) < 2e-3
    at_end = float(process.reference(process.t_min).variance)
    mean = float(process.alpha(process.t_min)) * np.array([0.2, -0.1])
    assert abs(fitted.params.log_normalizer - (TILT @ mean + 0.5 * at_end * TILT @ TILT)) < 1e-3


class TestAdapters:
    def test_they_begin_at_nothing_and_change_by_their_rank(self):
        _, params = functional(MLP((2,), 16, 1, rngs=nnx.Rngs(0)))
        adapters = low_rank_adapters(KEY, params, 3)
        for one, other in zip(jax.tree.leaves(adapted(params, adapters)), jax.tree.leaves(params), strict=True):
            np.testing.assert_array_equal(one, other)
        moved = jax.tree.map(lambda leaf: leaf + 1.0, adapters)
        changes = jax.tree.map(lambda one, other: one - other, adapted(params, moved, 0.5), params)
        ranks = [
            np.linalg.matrix_rank(np.asarray(leaf), tol=1e-5) for leaf in jax.tree.leaves(changes) if leaf.ndim == 2
        ]
        assert max(ranks) <= 3
        for path, leaf in jax.tree_util.tree_leaves_with_path(changes):
            name = jax.tree_util.keystr(path)
            if leaf.ndim < 2:
                np.testing.assert_array_equal(leaf, 0)
            else:
                expected = 0.5 * (moved[name].down @ moved[name].up).reshape(leaf.shape)
                np.testing.assert_allclose(leaf, expected, rtol=1e-4, atol=1e-5)

    def test_only_they_have_a_gradient(self):
        apply, params = functional(MLP((2,), 16, 1, rngs=nnx.Rngs(0)))
        params = jax.tree.map(lambda leaf: leaf + 0.1, params)
        adapters = low_rank_adapters(KEY, params, 2)

        def value(params, adapters):
            return jnp.sum(apply(adapted(params, adapters), jnp.ones((3, 2)), jnp.full(3, 0.5)) ** 2)

        of_params, of_adapters = jax.grad(value, argnums=(0, 1))(params, adapters)
        assert all(np.all(np.asarray(leaf) == 0) for leaf in jax.tree.leaves(of_params))
        assert max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(of_adapters)) > 0

    def test_convolutions_have_adapters_too(self):
        shape = (8, 8, 1)
        apply, params = functional(UNet(shape, channels=(8, 8), rngs=nnx.Rngs(0)))
        adapters = low_rank_adapters(KEY, params, 2)
        assert any(jnp.ndim(leaf) == 4 for leaf in jax.tree.leaves(params))
        moved = jax.tree.map(lambda leaf: leaf + 0.01, adapters)
        arguments = jax.random.normal(KEY, (2, *shape)), jnp.full(2, 0.5), jnp.zeros(2, int)
        # The last layer begins at zero, and so does its adapter.
        assert float(jnp.abs(apply(adapted(params, moved), *arguments)).max()) > 0

    def test_what_has_no_rank_is_refused(self):
        with pytest.raises(ValueError, match="no weight of two axes"):
            low_rank_adapters(KEY, {"bias": jnp.zeros(3)}, 2)
        with pytest.raises(ValueError, match="rank must be at least 1"):
            low_rank_adapters(KEY, {"w": jnp.zeros((3, 3))}, 0)
        adapters = low_rank_adapters(KEY, {"w": jnp.zeros((3, 3))}, 1)
        with pytest.raises(ValueError, match=r"there is no \['w'\]"):
            adapted({"v": jnp.zeros((3, 3))}, adapters)


@pytest.mark.parametrize("tokens", [False, True])
def test_a_model_of_low_rank_is_the_model_until_it_is_tuned(tokens):
    if tokens:
        process, shape, network = (
            Masked(5, 4),
            (4,),
            TokenTransformer(5, 4, width=16, num_layers=1, num_heads=2, rngs=nnx.Rngs(0)),
        )
    else:
        process, shape, network = PROCESSES[0], (2,), MLP((2,), 8, 1, rngs=nnx.Rngs(0))
    apply, params = functional(network)
    params = jax.tree.map(lambda leaf: leaf + 0.1 * jnp.cos(jnp.arange(leaf.size)).reshape(leaf.shape), params)
    kind = "logits" if tokens else "v"
    prior = rj.DiffusionModel(process, apply.as_prediction(), kind, shape=shape, params=params, batched=True)
    model = low_rank_model(KEY, prior, 2, scale=0.5)
    x = jnp.asarray([5, 1, 5, 0]) if tokens else jnp.asarray([0.3, 0.4])
    np.testing.assert_allclose(model.denoise(x, 0.5), prior.denoise(x, 0.5), rtol=1e-5)
    moved = jax.tree.map(lambda leaf: leaf + 0.3, model.params)
    merged = prior.with_params(adapted(prior.params, moved, 0.5)).denoise(x, 0.5)
    np.testing.assert_allclose(model.with_params(moved).denoise(x, 0.5), merged, rtol=1e-5)
    assert np.abs(merged - prior.denoise(x, 0.5)).max() > 1e-3
    loss = trajectory_balance_loss(model, prior, rj.time_grid(process, 3), lambda x: 0.1 * x[0])
    gradient = jax.grad(lambda tuned: loss(KEY, tuned, jnp.zeros(3))[0].mean())(FineTuned(moved, jnp.zeros(())))
    assert jax.tree.structure(gradient.weights) == jax.tree.structure(model.params)
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(gradient))
    assert max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(gradient.weights)) > 0
    with pytest.raises(ValueError, match="no weights to adapt"):
        low_rank_model(KEY, rj.DiffusionModel(PROCESSES[0], lambda x, t: x, shape=(2,)), 2)


def test_parts_of_a_network_are_tuned_alone():
    process = PROCESSES[0]
    apply, params = functional(MLP((2,), 8, 1, num_classes=3, rngs=nnx.Rngs(0)))
    params = jax.tree.map(lambda leaf: leaf + 0.1 * jnp.cos(jnp.arange(leaf.size)).reshape(leaf.shape), params)
    prior = rj.DiffusionModel(
        process, apply.as_prediction(), "v", shape=(2,), params=params, condition=jnp.int32(1), batched=True
    )
    model = partial_model(prior, ["class_embedding", "last"])
    x = jnp.asarray([0.3, 0.4])
    np.testing.assert_allclose(model.denoise(x, 0.5), prior.denoise(x, 0.5), rtol=1e-6)
    assert sorted(model.params) == ["class_embedding", "last"]
    moved = jax.tree.map(lambda leaf: leaf + 0.3, model.params)
    whole = prior.with_params(prior.params | moved)
    np.testing.assert_allclose(model.with_params(moved).denoise(x, 0.5), whole.denoise(x, 0.5), rtol=1e-5)
    for parts, words in (([], "parts must be among class_embedding, first"), (["nowhere"], "got nowhere")):
        with pytest.raises(ValueError, match=words):
            partial_model(prior, parts)
