"""A model comes back from its file as it was, and a file that is not one says so."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rnejax as rj
from rnejax.checkpoint import CheckpointError, load_arrays, save_arrays
from rnejax.covariance import Analytic, Reference
from rnejax.kernels import CentreOfMassFree, LinearSubspace
from rnejax.persistence import num_classes
from rnejax.transforms import Affine

PROCESSES = [
    rj.processes.VariancePreserving(beta_max=15.0, data_std=0.7),
    rj.processes.Cosine(t_max=1.0),
    rj.processes.RectifiedFlow(t_min=0.01),
    rj.processes.VarianceExploding(sigma_min=0.01, sigma_max=5.0, subspace=CentreOfMassFree()),
    rj.processes.DiscreteVariancePreserving(np.linspace(1e-4, 0.02, 10)),
    rj.processes.LinearSDE(0.7, np.eye(4) + 0.3 * np.eye(4, k=1), t_max=3.0, beta=(0.1, 2.0)),
    rj.processes.NonReversible(np.arange(1.0, 5.0), rj.regimes.random_skew(0, 4, 1.0), data_covariance=0.5),
    rj.processes.PhaseSpaceLangevin(friction=0.3),
]


def linear(params, x, t, condition):
    return params["scale"] * x + condition


def of_positions(params, x, t, condition):
    return linear(params, x[0], t, condition)


@pytest.mark.parametrize("process", PROCESSES, ids=lambda process: type(process).__name__)
def test_every_process_and_part_of_a_model_survives_its_file(tmp_path, process):
    table = Analytic(jnp.asarray([-1.0, 0.0, 2.0]), jnp.asarray([0.9, 0.5, 0.1]))
    function = linear if process.prediction_shape((4, 3)) == (4, 3) else of_positions
    shape = (4, 3) if function is linear else (2, 3)
    model = rj.DiffusionModel(
        process, function, "x0", table, shape,
        params={"scale": jnp.float32(0.3)}, condition=jnp.float32(0.1), noise_level="log_snr", transform=Affine(2.0),
    )  # fmt: skip
    rj.save_model(tmp_path / "model.safetensors", model)
    loaded = rj.load_model(tmp_path / "model.safetensors", fn=function)
    assert loaded.process == process
    assert jax.tree.structure(loaded) == jax.tree.structure(model)
    for before, after in zip(jax.tree.leaves(model), jax.tree.leaves(loaded), strict=True):
        np.testing.assert_array_equal(before, after)


def test_a_network_of_the_library_needs_no_function(tmp_path):
    from rnejax.networks import build, functional

    arguments = {"shape": (2,), "hidden": 8, "num_classes": 3}
    apply, params = functional(build("mlp", jax.random.key(0), **arguments))
    model = rj.DiffusionModel(
        rj.processes.VariancePreserving(), apply, "x0", shape=(2,), params=params, condition=jnp.int32(1)
    )
    rj.save_model(tmp_path / "model.safetensors", model, network=("mlp", arguments))
    loaded = rj.load_model(tmp_path / "model.safetensors")
    x = jnp.ones(2)
    np.testing.assert_array_equal(loaded.denoise(x, 0.5), model.denoise(x, 0.5))


def test_errors_name_the_file_and_the_remedy(tmp_path):
    with pytest.raises(FileNotFoundError, match="no shipped model of that name; shipped"):
        rj.load_model("digitz")
    save_arrays(tmp_path / "other.safetensors", {"a": np.zeros(2)})
    with pytest.raises(CheckpointError, match="holds no diffusion model"):
        rj.load_model(tmp_path / "other.safetensors")
    model = rj.DiffusionModel(rj.processes.Cosine(), lambda x, t: x, "x0", shape=(2,))
    rj.save_model(tmp_path / "plain.safetensors", model)
    with pytest.raises(CheckpointError, match="fn="):
        rj.load_model(tmp_path / "plain.safetensors")


def test_a_truncated_file_is_told_as_such(tmp_path):
    model = rj.DiffusionModel(rj.processes.Cosine(), lambda x, t: x, "x0", shape=(2,), params=None)
    path = tmp_path / "model.safetensors"
    rj.save_model(path, model)
    path.write_bytes(path.read_bytes()[:-10] if path.stat().st_size > 200 else path.read_bytes()[:20])
    with pytest.raises(CheckpointError, match="complete safetensors"):
        rj.load_model(path)


def test_options_that_are_not_the_defaults_survive_too(tmp_path):
    basis = np.linalg.qr(np.random.default_rng(0).normal(size=(4, 3)))[0].T
    process = rj.processes.RectifiedFlow(subspace=LinearSubspace(basis))
    model = rj.DiffusionModel(
        process, lambda x, t: x, "x0", "full", (4,), batched=True, transform=Affine(2.0, np.arange(4.0))
    )
    rj.save_model(tmp_path / "model.safetensors", model)
    loaded = rj.load_model(tmp_path / "model.safetensors", fn=lambda x, t: x)
    assert loaded.batched
    assert loaded.covariance == model.covariance
    np.testing.assert_array_equal(loaded.process.subspace.basis, basis)
    x = jnp.arange(4.0)
    np.testing.assert_array_equal(loaded.transform.to_data(x), model.transform.to_data(x))


def test_weights_are_stored_in_the_type_that_is_asked_for_and_the_table_as_it_is(tmp_path):
    table = Analytic(jnp.asarray([-1.0, 2.0]), jnp.asarray([0.9, 1 / 3]))
    model = rj.DiffusionModel(
        rj.processes.Cosine(), linear, "x0", table, (2,), params={"scale": jnp.float32(1 / 3)}, condition=jnp.int32(1)
    )
    rj.save_model(tmp_path / "model.safetensors", model, dtype=jnp.bfloat16)
    arrays, _ = load_arrays(tmp_path / "model.safetensors")
    assert arrays["params"]["scale"].dtype == jnp.bfloat16
    assert arrays["condition"].dtype == np.int32
    np.testing.assert_array_equal(arrays["covariance"]["ratio"], table.ratio)


class Wide:
    """A prior that is no pytree."""

    def sample(self, key):
        return 2 * jax.random.normal(key, (2,))

    def log_prob(self, x):
        return -0.125 * jnp.sum(x**2)


class OwnCovariance(Reference):
    pass


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prior": Wide()}, "a prior of type Wide has no form in a file"),
        ({"noise_level": lambda level: level.t}, "noise_level must be one of"),
        ({"covariance": OwnCovariance()}, "a covariance of type OwnCovariance cannot be saved"),
    ],
)
def test_what_has_no_form_in_a_file_is_refused(tmp_path, options, message):
    model = rj.DiffusionModel(rj.processes.Cosine(), lambda x, t: x, "x0", shape=(2,), **options)
    with pytest.raises(ValueError, match=message):
        rj.save_model(tmp_path / "model.safetensors", model)
    assert not (tmp_path / "model.safetensors").exists()


def test_the_number_of_classes_is_known_where_the_file_leaves_it_to_the_networks_default():
    assert num_classes("digits") == 10
    assert num_classes("no_such_model") is None


@pytest.mark.parametrize("kind", ["isotropic", "diagonal", "dense", "subspace"])
def test_a_gaussian_prior_is_saved_with_the_model(tmp_path, kind):
    space = CentreOfMassFree() if kind == "subspace" else rj.kernels.FullSpace()
    process = rj.processes.RectifiedFlow(subspace=space)
    mean = space.project(jnp.asarray([[0.3, -1.0], [2.0, 0.5]]))
    excess = {"diagonal": jnp.asarray([[0.5, 0.1], [0.2, 0.9]]), "dense": jnp.asarray([0.5, 0.1, 0.2, 0.9])}
    basis = jnp.asarray(np.linalg.qr(np.arange(16.0).reshape(4, 4) ** 0.5)[0]) if kind == "dense" else None
    prior = rj.kernels.Gaussian(mean, 0.5 * mean, jnp.float32(1.7), excess.get(kind, 0.0), basis, space)
    model = rj.DiffusionModel(process, lambda x, t: x, "x0", shape=(2, 2), prior=prior)
    rj.save_model(tmp_path / "model.safetensors", model)
    loaded = rj.load_model(tmp_path / "model.safetensors", fn=model.fn).prior_at(None)
    x = space.project(jnp.asarray([[1.0, 2.0], [-0.5, 0.3]]))
    np.testing.assert_allclose(loaded.log_prob(x), prior.log_prob(x), rtol=1e-6)
    np.testing.assert_allclose(loaded.sample(jax.random.key(0)), prior.sample(jax.random.key(0)), rtol=1e-5)
