"""What cannot be right is refused where it is given, in words that say what to do."""

import json
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

import rnejax as rj
from rnejax.checkpoint import HEADER, CheckpointError, load_arrays, load_metadata
from rnejax.cli import main
from rnejax.density import SignalAtEndWarning
from rnejax.processes import Cosine, DiscreteVariancePreserving, VarianceExploding, VariancePreserving

PROCESS = Cosine()
X = jnp.asarray([0.4, -0.7])


def model_of(fn=lambda x, t: 0.5 * x, shape=(2,), process=PROCESS, **options):
    return rj.DiffusionModel(process, fn, "x0", shape=shape, **options)


# -------------------------------------------------------------------------------------------------------- flax modules


class Linear(nnx.Module):
    def __init__(self, seed):
        self.layer = nnx.Linear(2, 2, rngs=nnx.Rngs(seed))

    def __call__(self, x, t):
        return self.layer(x)


class Noisy(nnx.Module):
    """Dropout and batch normalisation: both change the module when it is trained."""

    def __init__(self, kind, seed=0):
        rngs = nnx.Rngs(seed)
        self.layer = nnx.Linear(2, 2, rngs=rngs)
        self.noise = nnx.Dropout(0.5, rngs=rngs) if kind == "dropout" else nnx.BatchNorm(2, rngs=rngs)

    def __call__(self, x, t):
        return self.noise(self.layer(x))


def test_weights_that_are_given_replace_those_of_an_nnx_module():
    one, other = Linear(0), Linear(1)
    expected = other(X, 0.3)
    state = nnx.state(other)
    for params in (state, nnx.to_pure_dict(state)):
        np.testing.assert_allclose(model_of(one, params=params).denoise(X, 0.3), expected, rtol=1e-5)
        np.testing.assert_allclose(model_of(one).with_params(params).denoise(X, 0.3), expected, rtol=1e-5)


def test_a_file_of_an_nnx_module_is_loaded_into_another_of_its_kind(tmp_path):
    path = tmp_path / "model.safetensors"
    rj.save_model(path, model_of(Linear(0)))
    loaded = rj.load_model(path, fn=Linear(1))
    np.testing.assert_allclose(loaded.denoise(X, 0.3), Linear(0)(X, 0.3), rtol=1e-5)


@pytest.mark.parametrize(
    ("params", "words"),
    [
        ({"layer": {"kernel": np.zeros((2, 2))}}, "layer/bias is missing"),
        ({"layer": {"kernel": np.zeros((3, 2)), "bias": np.zeros(2)}}, r"layer/kernel is \(3, 2\), not \(2, 2\)"),
        ({"layer": {"kernel": np.zeros((2, 2)), "bias": np.zeros(2), "b": 1.0}}, "layer/b is not wanted"),
    ],
)
def test_weights_of_another_nnx_module_are_refused(params, words):
    with pytest.raises(ValueError, match=words):
        model_of(Linear(0), params=params)
    with pytest.raises(ValueError, match=words):
        model_of(Linear(0)).with_params(params)


def test_weights_of_another_linen_module_are_refused():
    class Timeless(linen.Module):
        @linen.compact
        def __call__(self, x, t):
            return linen.Dense(2)(x)

    variables = Timeless().init(jax.random.key(0), X, 0.3)
    model_of(Timeless(), params=variables)
    with pytest.raises(ValueError, match=r"not those of the linen module Timeless: .*extra is not wanted"):
        model_of(Timeless(), params={"params": variables["params"] | {"extra": 1.0}})
    with pytest.raises(ValueError, match="is missing"):
        model_of(Timeless(), params={"params": {}})


def test_random_streams_are_no_weights():
    module = Noisy("dropout")
    module.eval()
    model = model_of(module)
    assert set(model.params) == {"layer"}
    np.testing.assert_allclose(model.denoise(X, 0.3), module(X, 0.3), rtol=1e-5)


@pytest.mark.parametrize("kind", ["dropout", "batch_norm"])
def test_a_module_in_training_mode_is_refused(kind):
    with pytest.raises(ValueError, match=r"changes its own state.*call module.eval\(\) first"):
        model_of(Noisy(kind), batched=True)


# ------------------------------------------------------------------------------------------------- models, their parts


class Flat:
    def __init__(self, shape):
        self.shape = shape

    def sample(self, key):
        return jax.random.uniform(key, self.shape)

    def log_prob(self, x):
        return jnp.zeros(x.shape[1:])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"prior": object()}, "prior needs .* no sample and no log_prob"),
        ({"prior": Flat((3,))}, r"prior.sample\(key\) must return shape \(2,\).*gives \(3,\)"),
        ({"prior": Flat((2, 2)), "shape": (2, 2)}, r"prior.log_prob\(x\) must return shape \(\).*gives \(2,\)"),
        ({"process": Cosine}, r"an instance, Cosine\(\), not the class"),
        ({"process": "cosine"}, "got 'cosine'"),
        ({"shape": (-2,)}, r"at least 1, got \(-2,\)"),
        ({"shape": (0,)}, r"at least 1, got \(0,\)"),
        ({"shape": (2.5,)}, "tuple of integers"),
        ({"fn": lambda x, t: jnp.zeros(2, int)}, "floating-point numbers, got int"),
    ],
)
def test_a_model_of_impossible_parts_is_refused(options, words):
    with pytest.raises(ValueError, match=words):
        model_of(**options)


def test_states_of_another_shape_are_refused():
    model = model_of()
    with pytest.raises(ValueError, match=r"x_t must be one state of shape \(2,\), got \(5, 2\); for a batch use"):
        model.reverse(jnp.zeros((5, 2)), 0.5, 0.3)
    with pytest.raises(ValueError, match=r"x_s must be one state of shape \(2,\), got \(\)"):
        rj.increment(model, 0.0, X, 0.3, 0.5)
    with pytest.raises(ValueError, match="x_t must be one state"):
        rj.increment(model, X, jnp.zeros(3), 0.3, 0.5)


@pytest.mark.parametrize(("s", "t"), [(0.5, 0.3), (0.3, 0.3), ([0.1, 0.5], [0.2, 0.4])])
def test_a_step_leads_to_less_noise(s, t):
    with pytest.raises(ValueError, match=f"s = {np.ravel(s)[-1]:g} and t = {np.ravel(t)[-1]:g}"):
        PROCESS.transition(s, t)
    jax.eval_shape(PROCESS.transition, jnp.asarray(s), jnp.asarray(t))  # traced times are not known


# ---------------------------------------------------------------------------------------------------- processes, grids


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: VarianceExploding(10, 1), "sigma_min < sigma_max .* sigma_min = 10 and sigma_max = 1"),
        (lambda: Cosine(t_min=0.5, t_max=0.5), "t_min < t_max"),
        (lambda: Cosine(t_max=1.5), "t_max <= 1, got .* t_max = 1.5"),
        (lambda: Cosine(t_min=-0.1), "0 <= t_min"),
        (lambda: DiscreteVariancePreserving([0.1, 0.2], t_max=3.0), "t_max <= 2"),
        (lambda: Cosine(data_std=0.0), "data_std must be positive"),
        (lambda: VariancePreserving(beta_min=-1.0), "beta_min >= 0"),
        (lambda: VariancePreserving(beta_max=-1.0), "beta_max > 0"),
        (lambda: rj.time_grid(PROCESS, 4.5), "num_steps must be an integer, got 4.5"),
        (lambda: rj.time_grid(PROCESS, 0), "num_steps must be at least 1, got 0"),
        (lambda: rj.time_grid(PROCESS, 4, t_min=-0.1), r"must lie in \[0, 1\], the domain of Cosine, got \[-0.1"),
        (lambda: rj.time_grid(PROCESS, 4, t_min=0.5, t_max=0.2), "increase strictly"),
        (lambda: rj.time_grid(Cosine, 4), r"an instance, Cosine\(\), not the class"),
    ],
)
def test_an_impossible_process_or_grid_is_refused(make, words):
    with np.errstate(all="raise"), pytest.raises(ValueError, match=words):
        make()


# --------------------------------------------------------------------------------------------- samples, points, counts

KEY = jax.random.key(5)
TIMES = rj.time_grid(PROCESS, 3)


@pytest.mark.parametrize("number", [0, -1, 2.5, "3"])
@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("num_samples", lambda n: rj.sample(KEY, model_of(), TIMES, n)),
        ("num_paths", lambda n: rj.log_density(KEY, model_of(), X[None], TIMES, n)),
        ("num_samples", lambda n: rj.calibrate(KEY, model_of(), TIMES, num_samples=n)),
        ("repeats", lambda n: rj.calibrate(KEY, model_of(), TIMES, data=X[None], repeats=n)),
    ],
)
def test_a_number_of_things_is_an_integer_of_at_least_one(name, call, number):
    with pytest.raises(ValueError, match=f"{name} must be"):
        call(number)


def test_calibrate_wants_a_typed_key():
    with pytest.raises(TypeError, match="single typed key"):
        rj.calibrate(np.zeros(2, np.uint32), model_of(), TIMES, data=X[None])


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_points_of_half_precision_are_computed_on_in_the_default_type(dtype):
    half = X[None].astype(dtype)
    result = rj.log_density(KEY, model_of(), half, TIMES, 2)
    assert result.log_density.dtype == jnp.float32
    full = rj.log_density(KEY, model_of(), half.astype(jnp.float32), TIMES, 2)
    np.testing.assert_array_equal(result.per_path, full.per_path)


def test_a_grid_that_ends_among_the_data_is_warned_of():
    times = np.asarray([0.1, 0.3])  # alpha^2 = cos(0.15 pi)^2 = 0.79, and data_std = 1
    with pytest.warns(SignalAtEndWarning, match=r"t = 0.3, where 79% of the reference's variance is signal"):
        rj.sample(KEY, model_of(), times, 1)
    with pytest.warns(SignalAtEndWarning, match="give the model a prior"):
        rj.log_density(KEY, model_of(), X[None], times, 1)


def test_a_grid_may_end_early_with_a_prior_or_in_a_calibration():
    times = np.asarray([0.1, 0.3])
    with warnings.catch_warnings():
        warnings.simplefilter("error", SignalAtEndWarning)
        rj.sample(KEY, model_of(), TIMES, 1)
        rj.sample(KEY, model_of(prior=PROCESS.reference(0.3, (2,))), times, 1)
        rj.calibrate(KEY, model_of(), times, num_samples=2)


# --------------------------------------------------------------------------------------------------------------- files


def rewrite(path, change):
    """The file with another header."""
    from safetensors.numpy import load_file, save_file

    header = change(load_metadata(path))
    save_file(load_file(path), path, metadata={HEADER: header if isinstance(header, str) else json.dumps(header)})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda header: "{not json", "is no JSON"),
        (lambda header: [1], "not a JSON object but list"),
        (lambda header: {"diffusion": {}}, "lacks the entry 'process'"),
        (lambda header: {"diffusion": header["diffusion"] | {"process": 3}}, "cannot be understood"),
        (lambda header: {"diffusion": header["diffusion"] | {"covariance": "none"}}, "unknown covariance 'none'"),
    ],
)
def test_a_header_that_says_too_little_names_its_file(tmp_path, change, words):
    path = tmp_path / "model.safetensors"
    rj.save_model(path, model_of(Linear(0)))
    rewrite(path, change)
    with pytest.raises(CheckpointError, match=f"{path.name}.*{words}"):
        rj.load_model(path, fn=Linear(0))


@pytest.mark.parametrize(
    "fn", [Noisy("batch_norm"), lambda x, t: x, lambda params, x, t, condition: params["absent"] * x]
)
def test_a_function_that_does_not_suit_a_file_is_told_with_its_path(tmp_path, fn):
    path = tmp_path / "model.safetensors"
    rj.save_model(path, model_of(Linear(0)))
    with pytest.raises(CheckpointError, match=path.name):
        rj.load_model(path, fn=fn)


def test_a_path_that_cannot_be_written_is_told_with_a_remedy(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"cannot write the model .*; give a file in a folder that you may write.*file"):
        rj.save_model(tmp_path / "file" / "model.safetensors", model_of())


# ---------------------------------------------------------------------------------------------------- the command line


def saved_network(folder):
    """A small conditional network with three classes, in a file."""
    from rnejax.networks import build, functional

    arguments = {"shape": (2,), "hidden": 8, "num_classes": 3}
    apply, params = functional(build("mlp", KEY, **arguments))
    path = folder / "model.safetensors"
    rj.save_model(path, model_of(apply, params=params, condition=jnp.int32(3)), network=("mlp", arguments))
    return path


def failing_reward(x):
    raise ZeroDivisionError("no ink")


@pytest.mark.parametrize(
    ("command", "text"),
    [
        ("sample", "condition: 3"),
        ("sample", "condition: [0, -1]"),
        ("steer", "target: {kind: guide, condition: 7}"),
        ("steer", "target: {kind: product, conditions: [0, 3], exponents: [1, 1]}"),
    ],
)
def test_a_class_that_the_network_does_not_have_is_refused_before_the_folder_is_made(tmp_path, capsys, command, text):
    config = tmp_path / "run.yaml"
    config.write_text(f"model: {saved_network(tmp_path)}\n{text}\n")
    assert main([command, str(config), "--output", str(tmp_path / "out")]) == 2
    assert "are 0 to 2" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_host_reward_that_raises_ends_the_run_with_one_message(tmp_path, capfd, monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    config = tmp_path / "run.yaml"
    config.write_text(
        f"model: {saved_network(tmp_path)}\ngrid: {{num_steps: 2}}\nnum_particles: 4\ntarget: {{kind: tilt, base: "
        "{kind: model}, reward: {kind: function, function: 'test_bad_input:failing_reward', host: true}}\n"
    )
    assert main(["steer", str(config), "--output", str(tmp_path / "out")]) == 1
    said = capfd.readouterr().err
    assert "the reward test_bad_input:failing_reward failed on a batch of states: ZeroDivisionError: no ink" in said
    assert "Traceback" not in said


def test_arrays_with_a_header_that_is_no_json_are_refused_as_a_checkpoint(tmp_path):
    from safetensors.numpy import save_file

    path = tmp_path / "arrays.safetensors"
    save_file({"a": np.zeros(2)}, path, metadata={HEADER: "{no json"})
    for load in (load_arrays, load_metadata):
        with pytest.raises(CheckpointError, match=r"arrays\.safetensors has a header that is no JSON"):
            load(path)
