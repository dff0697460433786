"""Averages of weights and the learning rate, against closed forms."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rnejax.training import ema_decay, ema_update, learning_rate_schedule, make_optimizer


def test_an_average_towards_a_constant_follows_the_closed_form():
    decay, start, constant, steps = 0.9, 5.0, 2.0, 20
    average = {"w": jnp.float32(start)}
    for _ in range(steps):
        average = ema_update(average, {"w": jnp.float32(constant)}, decay)
    assert float(average["w"]) == pytest.approx(constant + decay**steps * (start - constant), rel=1e-5)


def test_one_step_of_a_long_memory_moves_the_average_by_little():
    # With the decay the wrong way round the average would jump to 0.999.
    assert float(ema_update(0.0, jnp.float32(1.0), 0.999)) == pytest.approx(0.001, rel=1e-4)


def test_the_memory_is_short_at_first_and_long_later():
    decays = [float(ema_decay(jnp.int32(step), 0.999)) for step in (0, 10, 10**6)]
    assert decays == pytest.approx([0.1, 11 / 20, 0.999])


def test_the_learning_rate_warms_up_stays_and_decays_to_zero():
    schedule = learning_rate_schedule(2.0, 100, warmup_steps=10, decay_steps=40)
    assert [float(schedule(step)) for step in (0, 4, 9, 10, 59)] == pytest.approx([0.2, 1.0, 2.0, 2.0, 2.0])
    # Half a cosine over the last 40 steps, from 60 on: half-way down at 80.
    assert float(schedule(80)) == pytest.approx(1.0)
    assert float(schedule(100)) == pytest.approx(0.0, abs=1e-6)


def test_without_a_plateau_the_decay_starts_after_the_warmup():
    schedule = learning_rate_schedule(1.0, 110, warmup_steps=10)
    assert float(schedule(60)) == pytest.approx(0.5)


def test_the_plateau_does_not_depend_on_the_number_of_steps():
    short, long = (learning_rate_schedule(1e-3, n, warmup_steps=10, decay_steps=20) for n in (100, 1000))
    assert all(float(short(step)) == float(long(step)) for step in range(81))


def test_a_schedule_that_does_not_fit_is_an_error():
    with pytest.raises(ValueError, match=r"60 \+ 50 > 100"):
        learning_rate_schedule(1.0, 100, warmup_steps=60, decay_steps=50)


def test_large_gradients_are_clipped_by_their_common_norm():
    optimizer = make_optimizer(1.0, num_steps=10, clip_norm=1.0)
    params = {"a": jnp.zeros(1), "b": jnp.zeros(1)}
    state = optimizer.init(params)
    _, state = optimizer.update({"a": jnp.array([30.0]), "b": jnp.array([40.0])}, state, params)
    moments = optax.tree_utils.tree_get(state, "mu")
    np.testing.assert_allclose(jax.tree.leaves(moments), [[0.06], [0.08]], rtol=1e-5)  # (1 - 0.9) * (0.6, 0.8)


def test_muon_moves_hidden_matrices_evenly_in_all_directions_and_the_rest_as_nadam_does():
    key = jax.random.key(0)
    params = {
        "blocks": {0: {"up": {"kernel": jnp.zeros((6, 24)), "bias": jnp.zeros(24)}}},
        "convolution": {"kernel": jnp.zeros((3, 3, 6, 6))},
        "embed": {"embedding": jnp.zeros((10, 6))},
        "head": {"kernel": jnp.zeros((6, 10))},
    }
    gradient = jax.tree.map(lambda leaf: jax.random.normal(key, leaf.shape), params)
    muon = make_optimizer(0.01, num_steps=10, decay_steps=0, method="muon")
    adam = optax.chain(optax.clip_by_global_norm(1.0), optax.nadam(0.01))
    ours, adams = (each.update(gradient, each.init(params), params)[0] for each in (muon, adam))
    matrix = ours["blocks"][0]["up"].pop("kernel")
    adams["blocks"][0]["up"].pop("kernel")
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), ours, adams)
    # Five Newton-Schulz steps take every singular value to between 0.68 and 1.13 (Jordan et al. 2024).
    sizes = jnp.linalg.svd(matrix, compute_uv=False) / (0.01 * 0.2 * np.sqrt(24))
    assert np.all((sizes > 0.65) & (sizes < 1.2))
    before = jnp.linalg.svd(gradient["blocks"][0]["up"]["kernel"], compute_uv=False)
    assert before[0] > 2 * before[-1]
    assert jnp.sum(matrix * gradient["blocks"][0]["up"]["kernel"]) < 0


def test_muon_decays_weights_by_the_learning_rate():
    params = {"layer": {"kernel": jnp.ones((4, 4))}, "embed": {"embedding": jnp.ones((4, 4))}}
    optimizer = make_optimizer(0.01, num_steps=10, decay_steps=0, weight_decay=0.5, method="muon")
    updates, _ = optimizer.update(jax.tree.map(jnp.zeros_like, params), optimizer.init(params), params)
    for update in jax.tree.leaves(updates):
        np.testing.assert_allclose(update, -0.01 * 0.5, rtol=1e-5)


def test_an_unknown_method_is_named_in_the_error():
    with pytest.raises(ValueError, match="'adam' or 'muon': got 'sgd'"):
        make_optimizer(1.0, num_steps=10, method="sgd")
