"""Trying what a model is made of, abstractly, on one state: a wrong signature, shape or type of the network, the
transform or the prior is found, and told in words, before anything is computed.
"""

from __future__ import annotations

import inspect
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .adapters import LinenCall
from .checks import is_traced
from .kernels import FullSpace, Gaussian
from .processes import LinearLevel


def check_output(model: Any) -> None:
    """Try fn abstractly: a wrong signature or shape is found before anything is computed."""
    arguments = ("x", "t") if model.params is None and model.condition is None else ("params", "x", "t", "condition")
    try:
        inspect.signature(model.fn).bind(*arguments)
    except TypeError as error:
        raise ValueError(f"fn must accept fn({', '.join(arguments)}), but {error}") from None
    except ValueError:  # no signature to be had (a builtin): the call below decides
        pass
    level = model.process.level(0.5 * (model.process.t_min + model.process.t_max))
    if isinstance(level, LinearLevel):
        level = level.in_a_step
    states = jax.ShapeDtypeStruct((2, *model.shape), model.process.dtype)
    if isinstance(model.fn, LinenCall):
        _check_variables(model, model.fn, states)
    _check_arrays("params", model.params)
    _check_arrays("condition", model.condition)
    try:
        output = jax.eval_shape(lambda x: model._call(x, level), states)
    except Exception as error:  # whatever the user's function may raise
        one = f"one state of shape {model.shape}"
        tried = f"a batch of shape (2, {', '.join(map(str, model.shape))})" if model.batched else one
        given = ["params"] * (model.params is not None) + ["condition"] * (model.condition is not None)
        also = f" with its {' and '.join(given)}" if given else ""
        raise ValueError(
            f"fn failed when it was tried on {tried}{also} "
            f"({type(error).__name__}: {error}). Is shape= right? Does fn take a batch (batched=True, now "
            f"{model.batched})?"
        ) from error
    single = () if model.prediction == "energy" else model.process.prediction_shape(model.shape)
    expected = (2, *single)
    if getattr(output, "shape", None) != expected:
        what = "a scalar" if model.prediction == "energy" else f"shape {single}"
        raise ValueError(
            f"fn with prediction={model.prediction!r} must return {what} for one state of shape {model.shape}; "
            f"on a batch of 2 it gave {getattr(output, 'shape', output)} instead of {expected}. Is shape= right? "
            f"Does fn take a batch (batched=True, now {model.batched})?{model.process.hint_of_output}"
        )
    if not jnp.issubdtype(output.dtype, jnp.floating):
        raise ValueError(f"fn must return floating-point numbers, got {output.dtype}")


def _check_variables(model: Any, call: LinenCall, states: jax.ShapeDtypeStruct) -> None:
    """A linen module's variables against those that it would make itself."""
    if model.batched:
        n = states.shape[0]
        arguments: list[Any] = [states, jax.ShapeDtypeStruct((n,), jnp.result_type(float))]
        condition = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct((n, *jnp.shape(leaf)), jnp.result_type(leaf)), model.condition
        )
    else:
        arguments = [jax.ShapeDtypeStruct(model.shape, states.dtype), jax.ShapeDtypeStruct((), jnp.result_type(float))]
        condition = model.condition
    call.check(model.params, *arguments, *([] if condition is None else [condition]))


def check_transform(model: Any) -> None:
    """Try the transform abstractly on one state."""
    name = type(model.transform).__name__
    missing = [m for m in ("to_data", "to_model", "log_det") if not callable(getattr(model.transform, m, None))]
    if missing:
        raise ValueError(
            f"transform must be Affine(scale, shift) or have the methods of rnejax.transforms.Transform; {name} "
            f"has no {' and no '.join(missing)}"
        )
    state = jax.ShapeDtypeStruct(model.shape, model.process.dtype)
    subspace = model.process.subspace
    for method, expected in (("to_data", model.shape), ("to_model", model.shape), ("log_det", ())):
        call = getattr(model.transform, method)
        arguments = (subspace,) if method == "log_det" else ()
        try:
            got = jax.eval_shape(lambda x, call=call, arguments=arguments: call(x, *arguments), state).shape
        except (TypeError, ValueError) as error:
            raise ValueError(f"transform.{method} failed on one state of shape {model.shape}: {error}") from error
        if got != expected:
            raise ValueError(
                f"transform.{method} must return shape {expected} for one state of shape {model.shape}, but {name} "
                f"gives {got}: do its scale and shift have the state's shape?"
            )


def check_prior(model: Any) -> None:
    """Try a prior of the user's own, as generation will use it."""
    prior = model._own_prior
    if prior is None:
        return
    name = type(prior).__name__
    missing = [method for method in ("sample", "log_prob") if not callable(getattr(prior, method, None))]
    if missing:
        raise ValueError(f"a prior needs sample(key) and log_prob(x); {name} has no {' and no '.join(missing)}")
    try:
        x = jax.eval_shape(lambda key: prior.sample(key), jax.random.key(0))
        log_prob = jax.eval_shape(lambda x: prior.log_prob(x), jax.ShapeDtypeStruct(model.shape, model.process.dtype))
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"prior.sample(key) must draw one state of shape {model.shape}, and prior.log_prob(x) take it, but "
            f"{name} failed: {error}"
        ) from error
    for method, got, expected in (("sample(key)", x, model.shape), ("log_prob(x)", log_prob, ())):
        if getattr(got, "shape", None) != expected:
            raise ValueError(
                f"prior.{method} must return shape {expected} for one state of shape {model.shape}, but {name} "
                f"gives {getattr(got, 'shape', got)}"
            )
    _check_prior_is_on_subspace(model, prior)


def _check_prior_is_on_subspace(model: Any, prior: Any) -> None:
    """A law on the whole space would be drawn off the subspace, and normalised in too many dimensions."""
    subspace = model.process.subspace
    if isinstance(subspace, FullSpace):
        return
    remedy = (
        f"the prior must be a law on {subspace}, the process's subspace, with respect to the volume there: for a "
        "Gaussian, Gaussian(..., subspace=process.subspace)"
    )
    if isinstance(prior, Gaussian) and prior.subspace != subspace:
        raise ValueError(f"{remedy}; it is one on {prior.subspace}")
    if is_traced(prior):
        return
    x = jax.vmap(prior.sample)(jax.random.split(jax.random.key(0), 16))
    offset = float(jnp.max(jnp.abs(x - jax.vmap(subspace.project)(x))))
    if offset > x[0].size * float(jnp.finfo(x.dtype).eps) * float(jnp.max(jnp.abs(x))):
        raise ValueError(f"{remedy}; a draw of {type(prior).__name__} is off it by {offset:.3g}")


def _check_arrays(name: str, tree: Any) -> None:
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        if not isinstance(leaf, (jax.Array, np.ndarray, np.generic, jax.ShapeDtypeStruct, int, float, complex)):
            words = "; what a prompt says is digit_tokens.parse(prompt)" if isinstance(leaf, str) else ""
            raise ValueError(f"{name}{jax.tree_util.keystr(path)} must be an array or a number, got {leaf!r}{words}")
