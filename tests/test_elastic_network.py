"""The covariance of an elastic network: exact for springs, equivariant, and what it is of a potential of distances."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rnejax as rj
from rnejax.calibration import _best_step, classes_of_pairs
from rnejax.covariance import ElasticNetwork
from rnejax.kernels import CentreOfMassFree, Gaussian

KEY = jax.random.key(31)
SHAPE = (4, 3)
# Two kinds: springs between equal ones are stiffer than between others.
KINDS = (0, 0, 1, 1)
STIFFNESS = np.array([[0, 9, 1, 1], [9, 0, 1, 1], [1, 1, 0, 4], [1, 1, 4, 0]], float)


def spring_model(covariance="reference", subspace=None):
    """Normally distributed particles on springs without length, whose denoiser is known: (model, samples)."""
    subspace = CentreOfMassFree() if subspace is None else subspace
    process = rj.processes.VariancePreserving(subspace=subspace)
    laplacian = np.diag(STIFFNESS.sum(1)) - STIFFNESS
    values, vectors = np.linalg.eigh(np.kron(laplacian, np.eye(3)))
    moving = values > 1e-9
    variances = np.where(moving, 1 / np.where(moving, values, 1), 0.0)
    vectors, variances = jnp.asarray(vectors, jnp.float32), jnp.asarray(variances, jnp.float32)

    def denoise(x, t):
        level = process.level(t)
        share = level.alpha * variances / (level.alpha**2 * variances + level.sigma**2)
        return (vectors @ (share * (vectors.T @ x.reshape(-1)))).reshape(SHAPE)

    def exact(t):
        """Of noised data: what is to be found of a density."""
        level = process.level(t)
        return level.alpha**2 * variances[3:] + level.sigma**2, vectors[:, 3:]

    model = rj.DiffusionModel(process, denoise, "x0", covariance, SHAPE)
    noise = jax.random.normal(KEY, (600, 12)) * jnp.sqrt(variances)
    return model, (noise @ vectors.T).reshape(-1, *SHAPE), exact


@pytest.fixture(scope="module")
def springs():
    model, x, exact = spring_model()
    times = rj.time_grid(model.process, 20)
    made = rj.calibrate_elastic_network(KEY, model, times, x, kinds=KINDS, num_knots=1, num_samples=200)
    return model, made, x, exact, times


def posterior(model, x, level):
    """Cov[x_0 | x_t] as matrices."""
    found = model.evaluate(KEY, x, level)
    spread = (found.spread + 1) * level.reference_posterior_variance
    return np.asarray(jnp.einsum("nij,nj,nkj->nik", found.basis, spread, found.basis))


def test_springs_are_found_as_they_are(springs):
    """Without length, a = b = k: to 2e-4 of all that holds a particle, springs and noise together (single precision).

    Without a centre of mass, confinement c is the same as springs c / n between all pairs: their sum is what is found.
    """
    model, _, x, _, times = springs
    network = rj.calibrate_elastic_network(KEY, model, times, x, kinds=KINDS, num_knots=1, least=0.0).covariance
    classes, log_snr = np.asarray(network.classes), np.asarray(network.log_snr)
    seen = log_snr > -4
    for first, second in [(0, 1), (0, 2), (2, 3)]:
        found = np.asarray(network.stiffness)[seen][:, :, classes[first, second], 0]
        found = found + np.asarray(network.confinement)[seen][:, None] / 4
        off = np.abs(found - STIFFNESS[first, second]).max(axis=1)
        assert np.all(off < 2e-4 * (STIFFNESS.sum(1).max() + np.exp(log_snr[seen])))


def test_their_covariance_is_that_of_the_exact_jacobian(springs):
    model, made, x, *_ = springs
    for t in (0.02, 0.2, 0.6):
        level = model.process.level(t)
        noisy = level.alpha * x[:5] + level.sigma * jax.vmap(CentreOfMassFree().project)(
            jax.random.normal(KEY, (5, *SHAPE))
        )
        exact = posterior(model.with_covariance("full"), noisy, level)
        scale = np.abs(exact).max()
        np.testing.assert_allclose(posterior(made, noisy, level), exact, atol=0.01 * scale)
        isotropic = posterior_of_scalar(rj.calibrate(KEY, model, np.array([t, t + 0.01]), x), noisy, level)
        assert np.abs(isotropic - exact).max() > 0.03 * scale  # a scalar is far from it


def posterior_of_scalar(model, x, level):
    spread = (model.evaluate(KEY, x, level).spread[0] + 1) * level.reference_posterior_variance
    off = np.kron(np.ones((4, 4)) / 4, np.eye(3))
    return float(spread) * (np.eye(12) - off) + float(level.reference_posterior_variance) * off


def test_densities_of_springs_are_exact_in_few_steps(springs):
    """To the error of the fit: the scalar covariance is off by nats at as many steps."""
    model, made, x, exact, _ = springs
    times = rj.time_grid(model.process, 10)
    points = x[:20]
    variances, vectors = exact(times[0])
    truth = -0.5 * np.asarray(
        jnp.sum((points.reshape(20, -1) @ vectors) ** 2 / variances + jnp.log(2 * jnp.pi * variances), axis=-1)
    )
    off = {}
    for name, each in {"springs": made, "scalar": rj.calibrate(KEY, model, times, x)}.items():
        found = rj.log_density(KEY, each, points, times, num_paths=4)
        off[name] = np.abs(np.asarray(found.log_density) - truth)
    assert off["springs"].max() < 0.1
    assert off["scalar"].mean() > 10 * off["springs"].mean()


def test_of_a_spring_with_a_length_the_precision_is_its_hessian():
    """k / 2 (d - d0)^2 at d = d0: stiff along the bond, free across; at another distance its tension acts across."""

    def energy(x):
        return 0.5 * 7.0 * (jnp.linalg.norm(x[0] - x[1]) - 1.0) ** 2

    for distance in (1.0, 1.5):
        x = jnp.asarray([[0.0, 0, 0], [0.0, 0.6 * distance, 0.8 * distance]])
        hessian = jax.hessian(energy)(x).reshape(6, 6)
        tension = 7.0 * (distance - 1.0) / distance
        stiffness = jnp.asarray([[[7.0, 7.0]], [[tension, tension]]])
        network = ElasticNetwork(
            jnp.zeros(1), stiffness[None], jnp.zeros(1), jnp.asarray([[1.0, 2.0]]), jnp.zeros((2, 2), int)
        )
        np.testing.assert_allclose(network.springs(x, stiffness), hessian, atol=1e-5)


def test_functions_of_the_distance_are_piecewise_linear_and_constant_outside():
    network = ElasticNetwork(
        jnp.zeros(1), jnp.zeros((1, 2, 1, 3)), jnp.zeros(1), jnp.asarray([[1.0, 2.0, 4.0]]), jnp.zeros((2, 2), int)
    )
    stiffness = jnp.asarray([[[10.0, 20.0, 0.0]], [[0.0, 0.0, 0.0]]])
    for distance, expected in [
        (0.3, 10.0),
        (1.0, 10.0),
        (1.25, 12.5),
        (2.0, 20.0),
        (3.0, 10.0),
        (4.0, 0.0),
        (9.0, 0.0),
    ]:
        x = jnp.asarray([[0.0, 0, 0], [distance, 0, 0]])
        np.testing.assert_allclose(network.springs(x, stiffness)[0, 0], expected, rtol=1e-5, atol=1e-5)


def test_a_turned_and_renamed_configuration_has_the_turned_and_renamed_covariance(springs):
    _, made, x, _, _ = springs
    level = made.process.level(0.1)
    turn = np.linalg.qr(np.random.default_rng(0).normal(size=(3, 3)))[0].astype(np.float32)
    order = np.array([1, 0, 3, 2])  # of equal kinds
    found = posterior(made, x[:3], level).reshape(3, 4, 3, 4, 3)
    moved = posterior(made, (x[:3] @ turn)[:, order], level).reshape(3, 4, 3, 4, 3)
    expected = np.einsum("niajb,ac,bd->nicjd", found[:, order][:, :, :, order], turn, turn)
    np.testing.assert_allclose(moved, expected, atol=1e-4 * np.abs(expected).max())


def test_nothing_is_added_off_the_subspace(springs):
    _, made, x, _, _ = springs
    for t in (0.01, 0.5, 0.99):
        level = made.process.level(t)
        found = made.evaluate(KEY, x[:3], level)
        spread = jnp.einsum("nij,nj,nkj->nik", found.basis, found.spread, found.basis)
        together = jnp.tile(jnp.eye(3), (4, 1)) / 2
        np.testing.assert_allclose(spread @ together, 0, atol=1e-4)


def test_on_the_whole_space_confinement_takes_the_place_of_the_centre():
    """x0 standard normal: precision 1 and no springs."""
    process = rj.processes.VariancePreserving()
    model = rj.DiffusionModel(process, lambda x, t: process.level(t).alpha * x, "x0", shape=(3, 2))
    x = jax.random.normal(KEY, (300, 3, 2))
    made = rj.calibrate_elastic_network(KEY, model, rj.time_grid(process, 10), x, num_knots=2, num_samples=128)
    level = process.level(0.3)
    np.testing.assert_allclose(
        posterior(made, x[:4], level), np.broadcast_to(level.sigma**2 * np.eye(6), (4, 6, 6)), atol=0.02
    )


def test_it_is_saved_with_the_model(springs, tmp_path):
    _, made, x, _, _ = springs
    rj.save_model(tmp_path / "springs.safetensors", made)
    read = rj.load_model(tmp_path / "springs.safetensors", fn=made.fn)
    level = made.process.level(0.2)
    np.testing.assert_array_equal(posterior(read, x[:3], level), posterior(made, x[:3], level))


def test_pairs_of_kinds_have_their_own_class():
    classes = classes_of_pairs((4, 3), (5, 5, 2, 9))
    pairs = {(i, j): int(classes[i, j]) for i in range(4) for j in range(4) if i != j}
    assert pairs[0, 2] == pairs[1, 2] == pairs[2, 0]
    assert len(set(pairs.values())) == classes.max() + 1 == 4  # 5-5, 5-2, 5-9, 2-9
    assert np.all(classes_of_pairs((4, 3), None) == 0)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"kinds": (0, 0, 1)}, "kinds must be 4 integers, one per particle"),
        ({"kinds": (0.5, 0, 1, 1)}, "kinds must be 4 integers"),
        ({"num_knots": 0}, "num_knots must be at least 1"),
        ({"num_samples": 0}, "num_samples must be at least 1"),
        ({"least": -0.1}, "weakest and least must not be negative: got 0.001 and -0.1"),
        ({"weakest": float("nan")}, "weakest must be finite"),
        ({"tolerance": 0.0}, "tolerance must be positive"),
    ],
)
def test_bad_arguments_are_named(wrong, words):
    model, x, _ = spring_model()
    with pytest.raises(ValueError, match=words):
        rj.calibrate_elastic_network(KEY, model, rj.time_grid(model.process, 5), x, **wrong)


def test_states_that_are_no_particles_are_refused():
    process = rj.processes.VariancePreserving()
    model = rj.DiffusionModel(process, lambda x, t: x, "x0", shape=(5,))
    with pytest.raises(ValueError, match=r"two or more particles, shape \(n, space\): got \(5,\)"):
        rj.calibrate_elastic_network(KEY, model, rj.time_grid(process, 5), jnp.zeros((9, 5)))


def test_a_network_that_fails_is_named_with_the_time():
    process = rj.processes.VariancePreserving(subspace=CentreOfMassFree())
    model = rj.DiffusionModel(process, lambda x, t: jnp.where(t > 0.5, jnp.nan, x), "x0", shape=SHAPE)
    with pytest.raises(ValueError, match="NaN or infinity at t = "):
        rj.calibrate_elastic_network(KEY, model, rj.time_grid(process, 5), jnp.ones((9, *SHAPE)) * 0)


def test_its_kernel_is_a_gaussian_whose_samples_have_its_covariance(springs):
    _, made, x, _, _ = springs
    kernel = made.reverse(x[0], 0.3, 0.2)
    assert isinstance(kernel, Gaussian)
    drawn = jax.vmap(kernel.sample)(jax.random.split(KEY, 20_000)).reshape(20_000, -1)
    np.testing.assert_allclose(drawn.reshape(-1, *SHAPE).mean(axis=1), 0, atol=1e-5)
    probe = jnp.asarray(np.random.default_rng(1).normal(size=12), jnp.float32)
    probe = CentreOfMassFree().project(probe.reshape(SHAPE)).reshape(-1)
    expected = float(probe @ kernel.covariance_times(probe.reshape(SHAPE)).reshape(-1))
    # A variance from n normal numbers has a relative standard error of sqrt(2 / n).
    assert abs(float(jnp.var(drawn @ probe)) / expected - 1) < 4 * np.sqrt(2 / 20_000)


def test_a_jacobian_that_is_no_covariance_has_the_springs_of_its_positive_part():
    """A network's errors make some variances negative: with them the likelihood has no maximum.

    At the maximum the derivative by c vanishes: on the points of the fit, the traces of both covariances have one mean.
    """
    model, x, _ = spring_model()
    times = rj.time_grid(model.process, 5)
    level = model.process.level(times[2])
    direction = jax.vmap(CentreOfMassFree().project)(jax.random.normal(jax.random.key(3), (1, *SHAPE)))[0].reshape(-1)
    direction = direction / jnp.linalg.norm(direction)

    def spoilt(x, t):
        """dD/dx with an eigenvalue well below zero along one fixed direction."""
        right = model.fn(x, t).reshape(-1)
        across = right - direction * (direction @ right)
        return (across - 0.5 * direction * (direction @ x.reshape(-1))).reshape(SHAPE)

    bad = rj.DiffusionModel(model.process, spoilt, "x0", shape=SHAPE)
    made = rj.calibrate_elastic_network(KEY, bad, times, x, kinds=KINDS, num_knots=1, num_samples=600)
    assert np.all(np.isfinite(np.asarray(made.covariance.stiffness)))
    on = jax.vmap(CentreOfMassFree().project)(jnp.eye(12).reshape(12, *SHAPE)).reshape(12, 12)
    jacobian = jax.jacfwd(lambda x: spoilt(x, times[2]).reshape(-1))(jnp.zeros(SHAPE)).reshape(12, 12)  # linear
    whole = on @ (0.5 * (jacobian + jacobian.T)) @ on * level.sigma**2 / level.alpha
    values = np.linalg.eigvalsh(whole)
    assert values.min() < -0.1 * values.max()
    noise = jax.vmap(CentreOfMassFree().project)(jax.random.normal(jax.random.key(8), x.shape))
    found = posterior(made, level.alpha * x + level.sigma * noise, level)
    assert np.linalg.eigvalsh(found).min() > -1e-5 * values.max()
    traces = np.einsum("nij,ij->n", found, np.asarray(on))
    # Other noises than those of the fit: two independent means.
    bound = 4 * np.sqrt(2 / len(x)) * traces.std() + 1e-4 * values.max()
    assert abs(traces.mean() - np.maximum(values, 0).sum()) < bound


def test_the_best_step_is_that_of_one_spring():
    """log(1 + s m) - s c is largest at s = 1 / c - 1 / m; it stays inside its domain, and does not go on for ever."""
    np.testing.assert_allclose(_best_step(np.array([0.5]), 0.4), 1 / 0.4 - 1 / 0.5, rtol=1e-9)
    np.testing.assert_allclose(_best_step(np.array([[-0.5], [0.2]]), -1e9), 0.95 / 0.5, rtol=1e-9)
    assert _best_step(np.array([1.0]), 1.0) < 1e-9  # at the maximum
    assert _best_step(np.array([1.0]), 0.0) == pytest.approx(4.0)
