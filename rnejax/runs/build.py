"""From configurations to the arguments of the library's functions."""

from __future__ import annotations

import importlib
import os
import zipfile
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import rnejax as rj
from rnejax.covariance import Analytic, ElasticNetwork
from rnejax.density import check_points
from rnejax.persistence import num_classes

from ..config import (
    ClassReward,
    ConfigError,
    Device,
    FunctionReward,
    Grid,
    Guide,
    InkReward,
    ModelRun,
    Plain,
    Product,
    Temper,
    Tilt,
)
from .tokens import TOKEN_DATA, TokenReward, build_token_reward, condition_of, load_tokens

SHIPPED_DATA = ("digits_train", "digits_validation", "digits_test")


def apply_device(device: Device) -> None:
    """Settings that JAX reads when it first touches a device; call before anything else does.

    Raises:
      ConfigError: where the machine has no device of the kind.
    """
    if device.memory_fraction is not None:
        os.environ["XLA_PYTHON_CLIENT_MEM_FRACTION"] = str(device.memory_fraction)
    if device.platform is not None:
        jax.config.update("jax_platforms", device.platform)
    if device.num_cpu_devices is not None:
        jax.config.update("jax_num_cpu_devices", device.num_cpu_devices)
    if device.matmul_precision is not None:
        jax.config.update("jax_default_matmul_precision", device.matmul_precision)
    jax.config.update("jax_enable_x64", device.float64)
    if device.platform is not None:
        try:
            jax.devices()
        except RuntimeError as error:
            raise ConfigError(
                f"device.platform = {device.platform}, but JAX finds no such device here ({error}); leave it out to "
                "use what there is"
            ) from error


def load_model(config: ModelRun) -> rj.DiffusionModel:
    """The model, with the covariance that was asked for.

    Raises:
      ConfigError: if there is no such model, or it cannot be read.
    """
    model = load_named(config.model)
    if config.grid.kind == "one_token":
        if not isinstance(model.process, rj.processes.Masked):
            raise ConfigError(f"grid.kind = one_token is of masked tokens; {config.model} is of {model.process}")
        model = model.with_process(model.process.one_token_per_step())
    return model if config.covariance is None else model.with_covariance(config.covariance)


def load_named(name: str) -> rj.DiffusionModel:
    """A shipped or saved model.

    Raises:
      ConfigError: if there is none, or it cannot be read.
    """
    try:
        return rj.load_model(name)
    except (FileNotFoundError, ValueError) as error:
        raise ConfigError(f"model = {name} cannot be loaded: {error}") from error


def make_times(grid: Grid, process: Any, blanks: int | None = None) -> np.ndarray:
    """The time grid of a configuration; one token per step, of the blanks of a template only where there is one.

    Raises:
      ConfigError: for one that the process cannot have.
    """
    one_by_one = isinstance(process, rj.processes.AnyOrder)
    try:
        if one_by_one and grid.kind == "one_token":
            steps = process.length if blanks is None else blanks
            return rj.time_grid(process, steps, t_max=float(steps))
        return rj.time_grid(process, grid.num_steps, grid.kind, t_min=grid.t_min, t_max=grid.t_max)
    except ValueError as error:
        raise ConfigError(f"grid: {error}") from error


def build_process(process: Any, data: Any) -> Any:
    """A noising process from its configuration, for the states that the data are."""
    tokens = {"masked": rj.processes.Masked, "uniform": rj.processes.Uniform}
    if (process.kind in tokens) != hasattr(data, "vocab_size"):
        what = "tokens: take process.kind = masked" if hasattr(data, "vocab_size") else "numbers, not tokens"
        raise ConfigError(f"process.kind = {process.kind}, but the data are {what}")
    if process.kind in tokens:
        return tokens[process.kind](data.vocab_size, data.length, process.schedule)
    kinds = {
        "cosine": rj.processes.Cosine,
        "rectified_flow": rj.processes.RectifiedFlow,
        "variance_preserving": rj.processes.VariancePreserving,
        "variance_exploding": rj.processes.VarianceExploding,
    }
    try:
        arguments = process.model_dump(exclude={"kind"}, exclude_none=True)
        return kinds[process.kind](**arguments, subspace=data.subspace)
    except ValueError as error:
        raise ConfigError(f"process: {error}") from error


def build_system(system: Any) -> Any:
    """A molecular system from its configuration."""
    from .. import systems

    try:
        return systems.build(**system.model_dump())
    except ValueError as error:
        raise ConfigError(f"system: {error}") from error


def load_reference_of(key: str, system: Any, name: str, temperature: float) -> Any:
    """Reference samples of a configured system at one temperature; ``key`` is what the configuration calls them.

    A file with an array x (n, *shape) instead holds the user's own frames at that temperature.

    Raises:
      ConfigError: for samples that are not there, or are of another system.
    """
    from ..systems.references import find_reference, from_frames, load_reference

    try:
        frames = _frames(find_reference(name))
        if frames is not None:
            return from_frames(build_system(system), frames, temperature, system.model_dump(mode="json"))
        stored = load_reference(name, temperature)
    except (ValueError, FileNotFoundError) as error:
        raise ConfigError(f"{key}: {error}") from error
    if stored.system != build_system(system):
        raise ConfigError(f"{key} = {name} holds samples of {stored.system}, not of {build_system(system)}")
    return stored


def _frames(path: Any) -> np.ndarray | None:
    """The array x of an .npz file; None where it has none, or is no such file."""
    try:
        with np.load(path) as file:
            return np.asarray(file["x"]) if "x" in file else None
    except (OSError, TypeError, ValueError, zipfile.BadZipFile):
        return None


def check_classes(name: str, *conditions: int | str | None) -> None:
    """Raises ConfigError for a class that the network of a stored model does not have: its embedding would be NaN."""
    known = num_classes(name)
    for condition in conditions:
        if isinstance(condition, int) and known is not None and not 0 <= condition < known:
            raise ConfigError(
                f"condition = {condition}, but the classes of model = {name} are 0 to {known - 1} (null: no class)"
            )


def with_condition(model: rj.DiffusionModel, condition: int | str | None) -> rj.DiffusionModel:
    """The model under a class or a prompt; null leaves the condition that it was saved with, which is none.

    Raises:
      ConfigError: for a class or prompt given to a model that takes none.
    """
    if condition is None:
        return model
    if isinstance(condition, str):
        return model.with_condition(condition_of(model, condition))
    if model.condition is None:
        raise ConfigError(f"condition = {condition}, but this model takes no condition")
    if np.shape(model.condition) != ():
        raise ConfigError(f"condition = {condition} is a class, but this model takes a prompt, such as 'a bold seven'")
    return model.with_condition(jnp.asarray(condition, jnp.asarray(model.condition).dtype))


def build_target(model: rj.DiffusionModel, target: Any) -> Any:
    """What to sample, from its configuration.

    Raises:
      ConfigError: for a target that cannot be, such as exponents that do not match.
    """
    try:
        if isinstance(target, Plain):
            return with_condition(model, target.condition)
        if isinstance(target, Temper):
            return rj.temper(with_condition(model, target.condition), target.exponent)
        if isinstance(target, Product):
            factors = [with_condition(model, condition) for condition in target.conditions]
            others = [load_named(name) for name in target.models]
            # A covariance that was measured belongs to its model; one that was asked for is that of all.
            if not isinstance(model.covariance, (Analytic, ElasticNetwork)):
                others = [other.with_covariance(model.covariance) for other in others]
            factors += others
            return rj.product(factors, exponents=target.exponents)
        if isinstance(target, Guide):
            return rj.guide(model, with_condition(model, target.condition), scale=target.scale)
        if isinstance(target, Tilt):
            function, host = build_reward(target.reward)
            return rj.tilt(
                build_target(model, target.base), function, exact=target.exact, at=target.at,
                gradient=target.gradient, host=host, scale=target.reward.strength, draws=target.draws,
            )  # fmt: skip
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(f"target: {error}") from error
    raise TypeError(f"unknown target {type(target).__name__}")


def build_reward(reward: Any) -> tuple[Callable[..., Any], bool]:
    """A reward function without its strength, and whether it runs on the host."""
    if isinstance(reward, TokenReward):
        return build_token_reward(reward), False
    if isinstance(reward, ClassReward):
        return jax.tree_util.Partial(class_log_probability, load_classifier(reward.classifier), reward.label), False
    if isinstance(reward, InkReward):
        from ..systems.ink import stroke_thickness

        return stroke_thickness, True
    module, _, name = reward.function.partition(":")
    try:
        function = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(
            f"function = {reward.function} cannot be imported ({error}); it must be package.module:name"
        ) from error
    return function, reward.host


def check_rewards(targets: Sequence[Any], model: rj.DiffusionModel) -> None:
    """Try every reward that is a JAX function abstractly on one state, so that what it raises is told before a run.

    Raises:
      ConfigError: naming the function and what it raised.
    """
    for tilt in targets:
        check_reward(tilt.reward, model, tilt.gradient)


def check_reward(reward: Any, model: rj.DiffusionModel, gradient: bool | None, key: str = "target.reward") -> None:
    """Likewise of one; ``key`` is what the configuration calls it.

    Raises:
      ConfigError: naming the function and what it raised.
    """
    process, shape, dtype = model.process, model.shape, model.process.dtype
    if isinstance(reward, TokenReward) != process.is_discrete and not isinstance(reward, FunctionReward):
        what = "tokens" if isinstance(reward, TokenReward) else "pictures of numbers"
        raise ConfigError(f"{key}.kind = {reward.kind} is for {what}, which are not the states of the model")
    function, host = build_reward(reward)
    if host:
        return
    if process.is_discrete and gradient:
        shape, dtype = process.relaxed_shape(shape), jnp.result_type(float)
    name = getattr(reward, "function", reward.kind)
    try:
        out = jax.eval_shape(function, jax.ShapeDtypeStruct(shape, dtype))
    except Exception as error:  # whatever the user's function may raise
        raise ConfigError(
            f"the reward {name} failed on one state of shape {shape} ({type(error).__name__}: {error}); "
            + (
                "a reward takes one example, as a JAX array; a numpy function of a batch needs host: true"
                if isinstance(reward, FunctionReward)
                else f"is it one for what {model.process} makes?"
            )
        ) from error
    if getattr(out, "shape", None) != ():
        raise ConfigError(f"function = {name} must return one number for one state, got {out}")


def class_log_probability(log_probabilities: Callable[[Any], Any], label: Any, x: Any) -> Any:
    """log P(label | x), for one image; of several labels, that of any of them."""
    found = log_probabilities(x)[jnp.asarray(label)]
    return jax.nn.logsumexp(found) if jnp.ndim(found) else found


def load_classifier(name: str) -> Callable[[Any], Any]:
    """A shipped classifier of digits: log-probabilities of images.

    Raises:
      ConfigError: if it is not there.
    """
    from ..systems import digits

    try:
        return digits.load_classifier(name)
    except (FileNotFoundError, ValueError) as error:
        raise ConfigError(f"classifier {name} cannot be loaded: {error}") from error


def load_points(key: Any, data: str, num_points: int | None, model: rj.DiffusionModel) -> tuple[Any, str | None]:
    """Points of a data set, and how they were dequantised (None for points that were continuous already).

    Raises:
      ConfigError: for data that do not exist, or are no points of the model's.
    """
    if data in TOKEN_DATA:
        try:
            return check_points(model, load_tokens(data)[0][:num_points]), None
        except (ValueError, ImportError) as error:
            raise ConfigError(f"data = {data}: {error}") from error
    if data in SHIPPED_DATA:
        from ..systems import digits

        try:
            images = digits.load(data.removeprefix("digits_")).images[:num_points]
        except (ValueError, ImportError) as error:
            raise ConfigError(f"data = {data}: {error}") from error
        return digits.dequantise(key, jnp.asarray(images)), "uniform"
    try:
        with np.load(data) as arrays:
            if "x" not in arrays:
                raise ConfigError(f"data = {data} holds {', '.join(arrays)}, but no array x")
            points = arrays["x"]
    except ConfigError:
        raise
    except FileNotFoundError as error:
        raise ConfigError(
            f"data = {data} is neither a file nor one of {', '.join((*SHIPPED_DATA, *TOKEN_DATA))}"
        ) from error
    except (OSError, ValueError, TypeError, zipfile.BadZipFile) as error:  # TypeError: a bare array, no archive
        raise ConfigError(f"data = {data} cannot be read as .npz: {error}") from error
    try:
        return check_points(model, points)[:num_points], None
    except (ValueError, TypeError) as error:
        raise ConfigError(f"data = {data}: {error}") from error
