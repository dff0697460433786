"""Arguments of the wrong kind are refused where they are given, by name, and not deep inside."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import rnejax as rj
from rnejax.kernels import CentreOfMassFree, Gaussian, LinearSubspace
from rnejax.processes import DiscreteVariancePreserving, VariancePreserving
from rnejax.smc import log_normalizer_with_error
from rnejax.transforms import Affine

PROCESS = VariancePreserving()
KEY = jax.random.key(0)
TIMES = rj.time_grid(PROCESS, 3)
CENTRED = VariancePreserving(subspace=CentreOfMassFree())


def standard(x, t):
    return -x


def model(fn=standard, shape=(2,), process=PROCESS, **options):
    return rj.DiffusionModel(process, fn, "score", shape=shape, **options)


def steer(target=None, **options):
    return rj.steer(KEY, model() if target is None else target, TIMES, **{"num_particles": 4, "warn": False} | options)


def first(x):
    return x[0]


class ThreeWide(nnx.Module):
    def __init__(self):
        self.layer = nnx.Linear(3, 3, rngs=nnx.Rngs(0))

    def __call__(self, x, t):
        return self.layer(x)


class WantsABatch(nnx.Module):
    def __init__(self):
        self.layer = nnx.Linear(2, 2, rngs=nnx.Rngs(0))

    def __call__(self, x, t):
        return x + self.layer(x) * t[:, None]


SCALED = {"fn": lambda params, x, t, condition: -x * params["a"], "params": {"a": 1.0}}
CONDITIONED = {"fn": lambda params, x, t, condition: -x * condition, "condition": jnp.asarray(1.0)}


@pytest.mark.parametrize(
    ("call", "words"),
    [
        # models
        (lambda: model(ThreeWide()), r"fn failed when it was tried on one state of shape \(2,\).*Is shape= right"),
        (lambda: model(WantsABatch()), r"Does fn take a batch \(batched=True, now False\)"),
        (lambda: model().with_condition(jnp.asarray(1)), r"fn must accept fn\(params, x, t, condition\)"),
        (lambda: model().with_params({"a": 1.0}), r"fn must accept fn\(params, x, t, condition\)"),
        (lambda: model(**SCALED).with_params({"b": 1.0}), r"with its params \(KeyError: 'a'\)"),
        (lambda: model(**CONDITIONED).with_condition(jnp.ones(3)), "with its condition"),
        (lambda: model(CONDITIONED["fn"], condition="cat"), "condition must be an array or a number, got 'cat'"),
        (lambda: model(SCALED["fn"], params={"a": "b"}), r"params\['a'\] must be an array or a number"),
        (lambda: model(transform=2.0), "float has no to_data and no to_model and no log_det"),
        (lambda: model(transform=Affine(np.ones(3))), r"transform.to_data failed on one state of shape \(2,\)"),
        (lambda: model(transform=Affine(np.ones((4, 2)))), r"transform.to_data must return shape \(2,\)"),
        (lambda: Affine(1.0, np.nan), "shift must be finite"),
        (lambda: model(covariance=3.0), "covariance must be one of euler.*got 3.0"),
        (lambda: model(noise_level=3), "noise_level must be a name or a function"),
        # processes and grids
        (lambda: VariancePreserving(subspace="com"), r"subspace must be FullSpace\(\).*got 'com'"),
        (lambda: VariancePreserving(data_std="a"), "data_std must be a number, got 'a'"),
        (lambda: VariancePreserving(t_min="a"), "t_min must be a number, got 'a'"),
        (
            lambda: model(shape=(6,), process=CENTRED),
            r"CentreOfMassFree needs configurations of shape \(atoms, space\)",
        ),
        (
            lambda: model(process=VariancePreserving(subspace=LinearSubspace(np.eye(3)[:2]))),
            r"the subspace lives in 3 dimensions, but the event shape is \(2,\)",
        ),
        (lambda: LinearSubspace(np.ones(3)), r"basis must be a matrix.*got shape \(3,\)"),
        (lambda: rj.time_grid(PROCESS, 5, "edm", rho=-7), "rho must be positive, got -7"),
        (lambda: rj.sample(KEY, model(), "a", 2), "times must be a vector of numbers, got 'a'"),
        # points
        (lambda: rj.log_density(KEY, model(), jnp.asarray([[0.0, 1.0], [0.0, jnp.nan]]), TIMES), r"1 of 2.*x\[1\]"),
        (
            lambda: rj.log_density(KEY, model(shape=(3, 2), process=CENTRED), jnp.ones((1, 3, 2)), TIMES),
            r"x must lie on CentreOfMassFree\(\).*x\[0\] is off it by 1",
        ),
        (lambda: rj.probability_flow_log_density(KEY, model(), jnp.zeros((1, 2)), TIMES, rtol="a"), "rtol must be a"),
        (lambda: rj.probability_flow_log_density(KEY, model(), jnp.zeros((1, 2)), TIMES, num_probes=1.5), "num_probes"),
        # targets
        (lambda: rj.temper(model(), "2"), "an exponent must be a number, got '2'"),
        (lambda: rj.temper(model(), None), "an exponent must be a number, got None"),
        (lambda: rj.temper(model(), [2.0]), r"an exponent must be a number, got \[2.0\]"),
        (lambda: rj.guide(model(), model(), "a"), "scale must be a number, got 'a'"),
        (lambda: rj.product(model()), r"product takes a list.*product\(\[model, ...\]\)"),
        (lambda: rj.product({"a": model()}), "product takes a list of models.*got a dict"),
        (lambda: rj.product([model(), model()], 2.0), "exponents must be a list, one per factor, got 2.0"),
        (lambda: rj.tilt(model(), first, scale="a"), "scale must be a number, got 'a'"),
        (lambda: rj.tilt(model(), first, scale=lambda t: t), "scale must be a number; .* is a schedule"),
        (lambda: rj.tilt(model(), first, 1.0), r"schedule must be a function of time.*got 1.0 \(multiply .* scale=\)"),
        (lambda: rj.tilt(model(), lambda x: float(np.sum(np.asarray(x)))), "write it in jax.numpy, or pass host=True"),
        (lambda: rj.tilt(model(), lambda x: x), r"must return a scalar, got shape \(2,\)"),
        (lambda: rj.tilt(model(), jax.tree_util.Partial(first), host=True), "a plain function of a numpy batch"),
        (lambda: rj.observe(model(), lambda x: x, jnp.zeros(2), jnp.ones(2)), "noise_std must be a number"),
        (
            lambda: rj.observe(model(), lambda x: x, jnp.zeros(2), 0.5, error=0.3),
            "what .*prediction_error returns, got",
        ),
        (lambda: rj.observe(model(), lambda x: x @ jnp.ones((3, 3)), jnp.zeros(3), 0.5), "operator failed on one"),
        (
            lambda: rj.control.prediction_error(KEY, model(), lambda x: x @ jnp.ones((3, 3)), TIMES),
            r"operator failed on one example of shape \(2,\)",
        ),
        (lambda: rj.control.prediction_error(KEY, model(), lambda x: (x, x), TIMES), "operator must return one array"),
        (lambda: rj.tilt(model(), lambda x: x["a"]), r"reward failed on one example of shape \(2,\) \(TypeError"),
        (lambda: rj.observe(model(), lambda x: x, jnp.asarray([0.0, jnp.nan]), 0.5), "y must be finite"),
        # steering
        (
            lambda: steer(rj.temper(model(), lambda t: "a")),
            "exponent of model 0 must be one finite number at every time",
        ),
        (lambda: steer(rj.temper(model(), lambda: 2.0)), "but its schedule failed: .*takes 0 positional arguments"),
        (lambda: steer(num_particles=8.0), "num_particles must be an integer, got 8.0"),
        (lambda: steer(num_particles="8"), "num_particles must be an integer, got '8'"),
        (lambda: steer(num_groups=2.0), "num_groups must be an integer, got 2.0"),
        (lambda: steer(ess_threshold="0.5"), "ess_threshold must be a number, got '0.5'"),
        (lambda: steer(ess_threshold=float("nan")), "ess_threshold must be finite"),
        (lambda: steer(every=2.5), "every.* must be an integer, got 2.5"),
        (lambda: steer(partial_fraction="a"), "partial must be a number, got 'a'"),
        (lambda: steer(proposal=("a", "b")), "c_a must be a number, got 'a'"),
        (lambda: steer(window=0.5), r"window must be a pair of times \(low, high\), got 0.5"),
        (lambda: steer(window=(0.9, 0.1)), r"window must be \(low, high\) with low <= high, got \(0.9, 0.1\)"),
        (lambda: steer(window=("a", "b")), r"window\[0\] must be a number, got 'a'"),
        (lambda: rj.resample(KEY, steer(), 8.0), "num_samples must be an integer, got 8.0"),
    ],
)
def test_an_argument_of_the_wrong_kind_is_named(call, words):
    with pytest.raises(ValueError, match=words):
        call()


def test_resampling_wants_a_typed_key():
    with pytest.raises(TypeError, match="single typed key"):
        rj.resample(jax.random.PRNGKey(0), steer())


def test_weighted_means_are_of_weighted_particles():
    samples = rj.sample(KEY, model(), TIMES, 4)
    words = "{} takes the weighted particles of steer or smc.run; Samples has no particles, no log_weights"
    with pytest.raises(TypeError, match=words.format("weighted_mean")):
        rj.weighted_mean(lambda x: x, samples)
    with pytest.raises(TypeError, match=words.format("resample")):
        rj.resample(KEY, samples)
    with pytest.raises(TypeError, match=words.format("log_normalizer_with_error")):
        log_normalizer_with_error(samples)
    with pytest.raises(TypeError, match="f must be a function of one particle, got 'f'"):
        rj.weighted_mean("f", steer())


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda: rj.guide(None, model()), "unconditional"),
        (lambda: rj.guide(model(), None), "conditional"),
        (lambda: rj.product([model(), None]), "factor 1 of a product"),
        (lambda: rj.temper(None, 2.0), "what is tempered"),
        (lambda: rj.tilt(None, first), "what is tilted"),
        (lambda: rj.steer(KEY, None, TIMES, 4), "the target"),
    ],
)
def test_what_should_have_been_a_model_is_named(call, name):
    with pytest.raises(TypeError, match=f"^{name} must be a DiffusionModel or a Target, got NoneType"):
        call()


def test_the_flow_wants_a_typed_key_also_where_it_draws_nothing():
    with pytest.raises(TypeError, match="single typed key"):
        rj.probability_flow_log_density(None, model(), jnp.zeros((1, 2)), TIMES)


def test_an_ess_threshold_may_be_infinite():
    assert bool(steer(ess_threshold=float("inf")).info.resampled[1:].all())


@pytest.mark.parametrize(
    ("compiled", "argument", "words"),
    [
        (lambda times: rj.log_density(KEY, model(), jnp.zeros((1, 2)), times), TIMES, "times must be known when"),
        (
            lambda given: steer(rj.observe(given, lambda x: x, jnp.zeros(2), 0.5)).log_normalizer,
            rj.calibrate(KEY, model(), TIMES, num_samples=8),
            "covariance table must be known when the program is traced",
        ),
    ],
    ids=["times", "observe"],
)
def test_what_must_be_known_when_a_program_is_traced_says_so(compiled, argument, words):
    with pytest.raises(ValueError, match=words):
        jax.jit(compiled)(jnp.asarray(argument) if isinstance(argument, np.ndarray) else argument)


# ------------------------------------------------------------------------------------------------- priors on a subspace


@dataclasses.dataclass(frozen=True)
class OffCentre:
    """Draws of unit variance on the whole space."""

    def sample(self, key):
        return jax.random.normal(key, (3, 2))

    def log_prob(self, x):
        return -0.5 * jnp.sum(x**2)


@dataclasses.dataclass(frozen=True)
class Shifted:
    """A prior that holds an array, so that it can be neither hashed nor compared."""

    mean: np.ndarray

    def sample(self, key):
        return self.mean + jax.random.normal(key, (2,))

    def log_prob(self, x):
        return -0.5 * jnp.sum((x - self.mean) ** 2) - np.log(2 * np.pi)


def test_a_prior_lives_where_the_process_does():
    zeros, one = jnp.zeros((3, 2)), jnp.ones(())
    with pytest.raises(ValueError, match=r"must be a law on CentreOfMassFree\(\).*it is one on FullSpace\(\)"):
        model(shape=(3, 2), process=CENTRED, prior=Gaussian(zeros, zeros, one))
    with pytest.raises(ValueError, match=r"a draw of OffCentre is off it by"):
        model(shape=(3, 2), process=CENTRED).with_prior(OffCentre())
    centred = model(shape=(3, 2), process=CENTRED, prior=Gaussian(zeros, zeros, one, subspace=CentreOfMassFree()))
    assert abs(float(rj.sample(KEY, centred, TIMES, 4).x.mean(axis=1).max())) < 1e-5


def test_points_that_rounding_took_off_the_subspace_are_fine():
    x = 50.0 + jax.random.normal(KEY, (5, 30, 3))
    x = x - x.mean(axis=1, keepdims=True)
    assert float(jnp.abs(x.mean(axis=1)).max()) > 0
    assert bool(jnp.isfinite(rj.log_density(KEY, model(shape=(30, 3), process=CENTRED), x, TIMES, 2).log_density).all())


def test_a_prior_that_cannot_be_compared_is_kept_for_what_it_is():
    x = jnp.asarray([[0.3, -0.2]])
    for mean in (np.asarray([3.0, -1.0]), np.asarray([0.5, 0.0])):  # the second must not be taken for the first
        own = model(prior=Shifted(mean))
        same = own.with_prior(Gaussian(jnp.asarray(mean, jnp.float32), jnp.zeros(2), jnp.ones(())))
        expected = rj.log_density(KEY, same, x, TIMES, 4).per_path
        np.testing.assert_allclose(rj.log_density(KEY, own, x, TIMES, 4).per_path, expected, rtol=1e-5)
    assert not own.with_prior(None).has_prior


def test_a_model_is_saved_without_its_prior_and_given_it_again(tmp_path):
    own = model(prior=Shifted(np.asarray([3.0, -1.0])), fn=SCALED["fn"], params={"a": jnp.ones(())})
    path = tmp_path / "model.safetensors"
    with pytest.raises(ValueError, match=re.escape("save model.with_prior(None)")):
        rj.save_model(path, own)
    rj.save_model(path, own.with_prior(None))
    loaded = rj.load_model(path, fn=SCALED["fn"]).with_prior(own.prior_at(None))
    np.testing.assert_array_equal(rj.sample(KEY, loaded, TIMES, 2).x, rj.sample(KEY, own, TIMES, 2).x)


def test_equal_subspaces_are_equal():
    one, same, other = (LinearSubspace(np.eye(3)[rows]) for rows in ([0, 1], [0, 1], [0, 2]))
    assert one == same
    assert hash(one) == hash(same)
    assert one != other
    assert VariancePreserving(subspace=one) == VariancePreserving(subspace=same)


# ------------------------------------------------------------------------------------------------------ tables of betas

TABLE = DiscreteVariancePreserving(np.linspace(1e-4, 0.02, 1000))


def from_a_table(x, index):
    """A network that was trained on the table: it looks its noise level up, which takes an integer."""
    return -x * jnp.ones(1000)[index]


@pytest.mark.parametrize("kind", [None, "uniform", "quadratic", "edm", "log_snr"])
@pytest.mark.parametrize("num_steps", [7, 50, 999])
def test_a_grid_on_a_table_has_step_numbers_only(kind, num_steps):
    times = rj.time_grid(TABLE, num_steps, kind)
    assert (len(times), times[0], times[-1]) == (num_steps + 1, 1, 1000)
    np.testing.assert_array_equal(times, np.round(times))
    assert np.all(np.diff(times) >= 1)


def test_a_grid_on_a_table_is_the_nearest_one():
    exact = np.linspace(1, 1000, 51)
    np.testing.assert_allclose(rj.time_grid(TABLE, 50), exact, atol=0.5)


def test_more_steps_than_a_table_has_are_refused():
    with pytest.raises(ValueError, match=r"1000 steps does not fit between the step numbers 1 and 1000.* at most 999"):
        rj.time_grid(TABLE, 1000)
    with pytest.raises(ValueError, match="between the step numbers 2 and 4"):
        rj.time_grid(TABLE, 3, t_min=1.5, t_max=4.9)


def test_a_network_on_a_table_is_asked_at_step_numbers_by_their_index():
    own = rj.DiffusionModel(TABLE, from_a_table, "score", shape=(2,), noise_level="index")
    assert bool(jnp.isfinite(rj.sample(KEY, own, rj.time_grid(TABLE, 10), 2).x).all())
    for call in (rj.sample, rj.steer):
        with pytest.raises(ValueError, match=r"asks the network for step numbers, but times\[1\] = 500.5"):
            call(KEY, own, np.asarray([1.0, 500.5, 1000.0]), 2)
    with pytest.raises(ValueError, match="at times of its own choice"):
        rj.probability_flow_log_density(KEY, own, jnp.zeros((1, 2)), np.asarray([1.0, 1000.0]))
