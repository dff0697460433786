"""Whole models in one file: network, process, prediction, covariance, transform. Safetensors and JSON, never pickle."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from . import covariance as covariances
from . import processes
from .adapters import weights_like
from .checkpoint import CheckpointError, load_arrays, load_metadata, save_arrays
from .kernels import CentreOfMassFree, FullSpace, Gaussian, LinearSubspace
from .model import NOISE_LEVELS, DiffusionModel
from .transforms import Affine, Identity

PROCESSES = (
    "AnyOrder",
    "Cosine",
    "CriticallyDamped",
    "DiscreteVariancePreserving",
    "LinearSDE",
    "Masked",
    "NonReversible",
    "PhaseSpaceLangevin",
    "RectifiedFlow",
    "Uniform",
    "VarianceExploding",
    "VariancePreserving",
)
SUBSPACES: dict[str, Callable[..., Any]] = {"FullSpace": FullSpace, "CentreOfMassFree": CentreOfMassFree}

# Covariances that are tables, and what they consist of.
MEASURED = {
    "Analytic": ("log_snr", "ratio"),
    "ElasticNetwork": ("log_snr", "stiffness", "confinement", "knots", "classes", "least", "softest"),
}


def shipped_models() -> list[str]:
    """Names that `load_model` knows: the diffusion models that come with the package."""
    folder = resources.files("rnejax") / "checkpoints"
    files = sorted(Path(str(folder)).glob("*.safetensors"))
    return [file.stem for file in files if "diffusion" in load_metadata(file)]


def num_classes(name_or_path: str | os.PathLike[str]) -> int | None:
    """How many classes the network of a stored model knows; None where its file does not say, or there is no file."""
    from .networks import default_arguments

    try:
        network = _header(_find(name_or_path)).get("network")
    except FileNotFoundError:
        return None
    if not network:
        return None
    number: int | None = (default_arguments(network["name"]) | network["arguments"]).get("num_classes")
    return number


def stored_network(name_or_path: str | os.PathLike[str]) -> tuple[str, dict[str, Any]] | None:
    """(name, arguments) of a stored model's network for ``rnejax.networks.build``; None where its file does not say."""
    network = _header(_find(name_or_path)).get("network")
    return (network["name"], network["arguments"]) if network else None


def trained_on(name_or_path: str | os.PathLike[str]) -> dict[str, Any] | None:
    """The system that a stored model was trained on, as a configuration; None where its file does not say.

    Its ``biases`` are left out: models of differently biased potentials belong to one molecule.
    """
    system = _training_data(name_or_path).get("system")
    return None if system is None else {name: value for name, value in system.items() if name != "biases"}


def training_temperature(name_or_path: str | os.PathLike[str]) -> float | None:
    """Of the samples that a stored model was trained on, in their system's unit; None where its file does not say."""
    return _training_data(name_or_path).get("temperature")


def training_data_of(name_or_path: str | os.PathLike[str]) -> Any:
    """What a stored model was trained on, as its configuration calls it; None where its file does not say."""
    try:
        return _header(_find(name_or_path))["settings"]["data"]
    except (FileNotFoundError, KeyError, TypeError):
        return None


def _training_data(name_or_path: str | os.PathLike[str]) -> dict[str, Any]:
    """The section ``data`` of the configuration that a stored model was trained with; empty where there is none."""
    data = training_data_of(name_or_path)
    return data if isinstance(data, dict) else {}


def save_model(
    path: str | os.PathLike[str],
    model: DiffusionModel,
    *,
    network: tuple[str, Mapping[str, Any]] | None = None,
    metadata: Mapping[str, Any] | None = None,
    dtype: Any = None,
) -> None:
    """Write a model to one file.

    Args:
      path: the file, by convention ending in ``.safetensors``.
      model: with the reference or a Gaussian as its prior.
      network: (name, arguments) for ``rnejax.networks.build``, so that the file alone is enough. Without it, whoever
        loads the model has to bring its function.
      metadata: more to keep, JSON: command, seed, metrics.
      dtype: store floating-point weights in this type.

    Raises:
      ValueError: for a part that has no form in a file: a prior or noise level of the user's own, say.
      OSError: if the file cannot be written, with its path.
    """
    prior = model._own_prior
    if prior is not None and not isinstance(prior, Gaussian):
        raise ValueError(
            f"a prior of type {type(prior).__name__} has no form in a file: save model.with_prior(None), and give the "
            "prior again after loading, load_model(path).with_prior(prior)"
        )
    if not isinstance(model.noise_level, str):
        raise ValueError(f"noise_level must be one of {', '.join(NOISE_LEVELS)} to be saved, not a function")
    chosen = model.covariance
    kind = type(chosen).__name__
    table = {name: jnp.asarray(getattr(chosen, name)) for name in MEASURED.get(kind, ())}
    if not table and covariances.CHOICES.get(kind.lower()) != model.covariance:
        raise ValueError(f"a covariance of type {kind} cannot be saved; use one of {', '.join(covariances.CHOICES)}")
    described = {
        "process": _process_to_json(model.process),
        "prediction": model.prediction,
        "covariance": kind.lower(),
        "shape": list(model.shape),
        "batched": model.batched,
        "noise_level": model.noise_level,
        "transform": _transform_to_json(model.transform),
    }
    header = dict(metadata or {}) | {"diffusion": described}
    if network is not None:
        header["network"] = {"name": network[0], "arguments": dict(network[1])}
    arrays = {"params": model.params, "condition": model.condition}
    tree = {name: value for name, value in arrays.items() if value is not None}
    if dtype is not None:  # the covariance table is small, and its accuracy is the density's
        tree = jax.tree.map(lambda x: x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x, tree)
    try:
        save_arrays(path, tree | ({"covariance": table} if table else {}) | _prior_to_arrays(prior), header)
    except OSError as error:
        raise OSError(
            error.errno,
            f"cannot write the model ({error.strerror}); give a file in a folder that you may write",
            str(path),
        ) from error


def load_model(name_or_path: str | os.PathLike[str], fn: Callable[..., Any] | None = None) -> DiffusionModel:
    """Read a model.

    Args:
      name_or_path: the name of a shipped model, or a file that `save_model` wrote.
      fn: the network's function ``fn(params, x, t, condition)`` or flax module, where the file does not say how to
        build it. The weights are the file's; those of an nnx module only say what they must look like.

    Raises:
      FileNotFoundError: if there is neither; the message lists the shipped models.
      CheckpointError: if the file is truncated, no model, of a network that does not exist here or has another
        architecture, has a header that cannot be understood, or needs ``fn`` (or another one).
    """
    path = _find(name_or_path)
    header = _header(path)
    described = header.get("diffusion")
    if not isinstance(described, dict):
        raise CheckpointError(f"{path} holds no diffusion model: its header has no entry 'diffusion'")
    arrays, _ = load_arrays(path)
    like = None
    brought = fn is not None
    if fn is None:
        if "network" not in header:
            raise CheckpointError(f"{path} does not say how to build its network: load_model({str(path)!r}, fn=...)")
        fn, like = _network(path, header["network"])
    else:
        fn, like = weights_like(fn)
    params = arrays.get("params")
    if like is not None:
        stored = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), arrays) | {"params": like}
        params = load_arrays(path, stored)[0]["params"]
    elif params is not None:
        params = jax.tree.map(jnp.asarray, params)
    condition = arrays.get("condition")
    try:
        process = _process_from_json(path, described["process"])
        chosen = _covariance(described["covariance"], arrays.get("covariance"))
        options = {
            "prediction": described["prediction"],
            "shape": tuple(described["shape"]),
            "batched": described["batched"],
            "noise_level": described["noise_level"],
            "transform": _transform_from_json(described["transform"]),
        }
    except CheckpointError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        what = f"lacks the entry {error}" if isinstance(error, KeyError) else f"cannot be understood ({error})"
        raise CheckpointError(f"the header of {path} {what}: it was written by another version or by hand") from error
    try:
        return DiffusionModel(
            process,
            fn,
            covariance=chosen,
            params=params,
            prior=_prior_from_arrays(arrays.get("prior"), process),
            condition=None if condition is None else jax.tree.map(jnp.asarray, condition),
            **options,
        )
    except Exception as error:  # whatever a function that does not suit these weights may raise
        remedy = "is fn= the function that it was made with?" if brought else "its header and its arrays disagree"
        raise CheckpointError(f"{path} does not fit its network: {remedy} ({type(error).__name__}: {error})") from error


def _header(path: Path) -> dict[str, Any]:
    header: Any = load_metadata(path)
    if not isinstance(header, dict):
        raise CheckpointError(f"the header of {path} is not a JSON object but {type(header).__name__}")
    return header


def _covariance(kind: str, table: Mapping[str, Any] | None) -> covariances.Covariance:
    for name in MEASURED:
        if name.lower() == kind:
            of_kind: covariances.Covariance = getattr(covariances, name)(**jax.tree.map(jnp.asarray, dict(table or {})))
            return of_kind
    return covariances.get_covariance(kind)


def _prior_to_arrays(prior: Gaussian | None) -> dict[str, Any]:
    if prior is None:
        return {}
    if prior.frame is not None:
        raise ValueError(
            "a prior in coordinates of its own, such as a marginal of a linear SDE, is not stored: leave the model "
            "without one (the reference's is its default), and give it after loading, model.with_prior(...)"
        )
    parts = {"mean": prior.mean, "variance": prior.variance, "excess": prior.excess, "basis": prior.basis}
    return {"prior": {name: jnp.asarray(part) for name, part in parts.items() if part is not None}}


def _prior_from_arrays(arrays: Mapping[str, Any] | None, process: Any) -> Gaussian | None:
    if arrays is None:
        return None
    parts = {name: jnp.asarray(part) for name, part in arrays.items()}
    mean = parts["mean"]
    basis = parts.get("basis")
    return Gaussian(mean, jnp.zeros_like(mean), parts["variance"], parts["excess"], basis, process.subspace)


def _find(name_or_path: str | os.PathLike[str]) -> Path:
    path = Path(name_or_path)
    if path.is_file():
        return path
    shipped = Path(str(resources.files("rnejax") / "checkpoints" / f"{name_or_path}.safetensors"))
    if shipped.is_file():
        return shipped
    raise FileNotFoundError(
        f"there is no file {str(name_or_path)!r}, and no shipped model of that name; "
        f"shipped: {', '.join(shipped_models()) or 'none'}"
    )


def _network(path: Path, recipe: Mapping[str, Any]) -> tuple[Callable[..., Any], Any]:
    """The function and the abstract weights of a network by its recipe."""
    from flax import nnx

    from .networks import build, functional

    try:
        module = nnx.eval_shape(lambda: build(recipe["name"], jax.random.key(0), **recipe["arguments"]))
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path} was made for a network that this version does not have: {error}") from error
    apply, like = functional(module)
    return apply.as_prediction(), like


def _process_to_json(process: Any) -> dict[str, Any]:
    name = type(process).__name__
    if name not in PROCESSES:
        raise ValueError(f"a process of type {name} cannot be saved; one of {', '.join(PROCESSES)}")
    arguments = process.arguments()
    if process.is_discrete:
        if callable(process.schedule):
            raise ValueError("a schedule that is a function has no form in a file: use the name of one")
        return {"name": name, "arguments": arguments}
    if isinstance(process, processes.LinearProcess):
        if callable(process.beta):
            raise ValueError("a process whose beta is a function cannot be saved: give a number or a pair")
        plain = {key: value.tolist() if hasattr(value, "tolist") else value for key, value in arguments.items()}
        return {"name": name, "arguments": plain}
    subspace = arguments.pop("subspace")
    if isinstance(subspace, LinearSubspace):
        arguments["subspace"] = {"name": "LinearSubspace", "basis": subspace.basis.tolist()}
    else:
        arguments["subspace"] = {"name": type(subspace).__name__}
    return {"name": name, "arguments": arguments}


def _process_from_json(path: Path, described: Mapping[str, Any]) -> Any:
    arguments = dict(described["arguments"])
    if described["name"] not in PROCESSES:
        raise CheckpointError(f"{path} was made for a process that this version does not have: {described['name']!r}")
    family = getattr(processes, described["name"])
    if family.is_discrete or issubclass(family, processes.LinearProcess):
        return family(**arguments)
    subspace = arguments.pop("subspace")
    if subspace["name"] == "LinearSubspace":
        space: Any = LinearSubspace(np.asarray(subspace["basis"]))
    else:
        space = SUBSPACES[subspace["name"]]()
    return family(**arguments, subspace=space)


def _transform_to_json(transform: Any) -> dict[str, Any]:
    if isinstance(transform, Identity):
        return {"name": "identity"}
    if isinstance(transform, Affine):
        return {"name": "affine", "scale": transform.scale.tolist(), "shift": transform.shift.tolist()}
    raise ValueError(f"a transform of type {type(transform).__name__} cannot be saved; use Identity or Affine")


def _transform_from_json(described: Mapping[str, Any]) -> Any:
    return Identity() if described["name"] == "identity" else Affine(described["scale"], described["shift"])
