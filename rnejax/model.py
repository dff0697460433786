"""DiffusionModel: a noising process, a network that predicts something about x_0, and a reverse-kernel covariance."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from .adapters import LinenCall, NnxCall, adapt
from .covariance import Covariance, Evaluation, get_covariance
from .kernels import Array, Gaussian
from .processes import GaussianProcess, GaussianTransition, NoiseLevel
from .processes.gaussian import PREDICTIONS, check_process, reference
from .transforms import Identity, Transform

NOISE_LEVELS: dict[str, Callable[[NoiseLevel], Array]] = {
    "t": lambda level: level.t,
    "sigma": lambda level: level.sigma,
    "log_snr": lambda level: level.log_snr,
    "index": lambda level: level.t - 1,  # DDPM: step t of the table has index t - 1
}


@jax.tree_util.register_pytree_with_keys_class
class DiffusionModel:
    r"""Transition kernels from a network.

    Args:
      process: the noising process the network was trained on.
      fn: ``fn(x, t)`` on one example; with ``params`` or ``condition``: ``fn(params, x, t, condition)``. A flax nnx
        module (called as ``module(x, t)`` or ``module(x, t, condition)``; put it in evaluation mode first; its own
        weights, or those in ``params``) or a flax linen module (with its variables as ``params``) will do as well.
      prediction: what fn returns: ``score`` (grad log p_t), ``x0``, ``epsilon``, ``v`` (alpha eps - sigma x_0),
        ``velocity`` (alpha' x_0 + sigma' eps), or ``energy`` (a scalar E with p_t proportional to exp(-E)). Each is
        converted exactly.
      covariance: ``euler``, ``reference``, ``hutchinson``, ``diagonal``, ``full``, or an object such as the table that
        :func:`rnejax.calibrate` makes. See :mod:`rnejax.covariance`.
      shape: of one state.
      params, condition: any pytrees of arrays. They are dynamic: new weights or another class label recompile nothing.
      batched: fn takes a batch: x (n, *shape), t (n,), condition with a leading axis n.
      noise_level: what fn gets as its second argument: ``t``, ``sigma``, ``log_snr`` (log alpha^2/sigma^2), ``index``
        (t - 1, for a table of betas), or a function of the :class:`~rnejax.processes.NoiseLevel`.
      prior: the law at the largest time, anything with ``sample(key)`` and ``log_prob(x)``; default: the reference's.
      transform: from the network's coordinates to the user's. Samples, densities and rewards are in the user's.

    Raises:
      ValueError: for a process that is none, an unknown prediction or noise level, an impossible shape, or where fn or
        the prior, tried abstractly on one state, returns another shape or type than it should.
    """

    _children = ("params", "condition", "covariance", "prior")
    _static = ("process", "fn", "prediction", "shape", "batched", "noise_level", "transform", "_static_prior")

    def __init__(
        self,
        process: GaussianProcess,
        fn: Callable[..., Array] | Any,
        prediction: str = "score",
        covariance: str | Covariance = "reference",
        shape: tuple[int, ...] = (),
        *,
        params: Any = None,
        condition: Any = None,
        batched: bool = False,
        noise_level: str | Callable[[NoiseLevel], Array] = "t",
        prior: Any = None,
        transform: Transform = Identity(),  # noqa: B008 - immutable
    ):
        check_process(process)
        if prediction not in PREDICTIONS:
            raise ValueError(
                f"unknown prediction {prediction!r} for {type(process).__name__}; one of {', '.join(PREDICTIONS)}"
            )
        if isinstance(noise_level, str) and noise_level not in NOISE_LEVELS:
            raise ValueError(f"unknown noise_level {noise_level!r}; one of {', '.join(NOISE_LEVELS)}, or a function")
        self.process = process
        self.fn, self.params = adapt(fn, params)
        self.prediction = prediction
        self.covariance = get_covariance(covariance)
        self.shape = _as_shape(shape)
        self.condition = condition
        self.batched = bool(batched)
        self.noise_level = noise_level
        # A prior that is a pytree travels as data; any other object as configuration.
        is_data = prior is None or not jax.tree_util.all_leaves([prior])
        self.prior: Any = prior if is_data else None
        self._static_prior: Any = None if is_data else prior
        self.transform = transform
        self._check_output()
        self._check_prior()

    # -- variations ---------------------------------------------------------------------------------------------------

    def with_condition(self, condition: Any) -> DiffusionModel:
        """The same model under another condition; recompiles nothing if shapes and dtypes agree."""
        return self._replace(condition=condition)

    def with_params(self, params: Any) -> DiffusionModel:
        """The same model with other weights; of an nnx module: an ``nnx.State`` or nested dictionaries.

        Raises:
          ValueError: where fn is an nnx module, and the weights have another structure or other shapes.
        """
        return self._replace(params=self.fn.weights(params) if isinstance(self.fn, NnxCall) else params)

    def with_covariance(self, covariance: str | Covariance) -> DiffusionModel:
        """The same model with another reverse-kernel covariance."""
        return self._replace(covariance=get_covariance(covariance))

    # -- one example --------------------------------------------------------------------------------------------------

    def reverse(self, x_t: Array, t: Any, s: Any, key: Array | None = None) -> Gaussian:
        """K(x_s | x_t) for s < t, in the network's coordinates. ``key`` is used by random covariances only."""
        self.check_state("x_t", x_t)
        transition = self.process.transition(s, t)
        return self.kernel(transition, x_t, self._evaluate_one(x_t, transition.t, key))

    def denoise(self, x: Array, t: Any) -> Array:
        """E[x_0 | x_t = x]."""
        level = self.process.level(t)
        return level.denoised(x, self._excess(x[None], level)[0])

    def score(self, x: Array, t: Any) -> Array:
        """grad log p_t(x)."""
        level = self.process.level(t)
        return level.score(x, self._excess(x[None], level)[0])

    def kernel(self, transition: GaussianTransition, x_t: Array, evaluation: Evaluation) -> Gaussian:
        """K(x_s | x_t) from what the model said of x_t (one example)."""
        if self.covariance.euler:
            return transition.euler_reverse(x_t, evaluation.excess)
        return transition.reverse(x_t, *evaluation)

    # -- a batch of states at one time: the only place where the network is called -------------------------------------

    def evaluate(self, key: Array, x: Array, level: NoiseLevel) -> Evaluation:
        """Excess and covariance of a batch of states (n, *shape) at one noise level: one network evaluation each."""
        return self.covariance(key, lambda states: self._excess(states, level), x, level, self.process.subspace)

    @property
    def has_prior(self) -> bool:
        """Whether the model was given a prior of its own."""
        return self.prior is not None or self._static_prior is not None

    def prior_at(self, level: NoiseLevel) -> Any:
        """The law that generation starts from."""
        prior = self.prior if self._static_prior is None else self._static_prior
        return reference(level, self.shape, self.process.subspace) if prior is None else prior

    def _evaluate_one(self, x: Array, level: NoiseLevel, key: Array | None) -> Evaluation:
        key = jax.random.key(0) if key is None else key
        return jax.tree.map(lambda leaf: leaf[0], self.evaluate(key, x[None], level))

    def _excess(self, x: Array, level: NoiseLevel) -> Array:
        prediction = "score" if self.prediction == "energy" else self.prediction
        excess = level.excess(self._outputs(x, level), x, prediction)
        return jax.vmap(self.process.subspace.project)(excess)

    def _outputs(self, x: Array, level: NoiseLevel) -> Array:
        if self.prediction == "energy":
            energies, pullback = jax.vjp(lambda states: self._call(states, level), x)
            return -pullback(jnp.ones_like(energies))[0]
        return self._call(x, level)

    def _call(self, x: Array, level: NoiseLevel) -> Array:
        convention = NOISE_LEVELS[self.noise_level] if isinstance(self.noise_level, str) else self.noise_level
        time = jnp.asarray(convention(level), x.dtype)
        plain = self.params is None and self.condition is None
        if not self.batched:
            call = self.fn if plain else lambda state, time: self.fn(self.params, state, time, self.condition)
            return jax.vmap(lambda state: call(state, time))(x)
        times = jnp.broadcast_to(time, len(x))
        if plain:
            return self.fn(x, times)
        conditions = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (len(x), *jnp.shape(leaf))), self.condition)
        return self.fn(self.params, x, times, conditions)

    # -- housekeeping -------------------------------------------------------------------------------------------------

    def _check_output(self) -> None:
        """Try fn abstractly: a wrong signature or shape is found before anything is computed."""
        arguments = ("x", "t") if self.params is None and self.condition is None else ("params", "x", "t", "condition")
        try:
            inspect.signature(self.fn).bind(*arguments)
        except TypeError as error:
            raise ValueError(f"fn must accept fn({', '.join(arguments)}), but {error}") from None
        except ValueError:  # no signature to be had (a builtin): the call below decides
            pass
        level = self.process.level(0.5 * (self.process.t_min + self.process.t_max))
        states = jax.ShapeDtypeStruct((2, *self.shape), jnp.result_type(float))
        if isinstance(self.fn, LinenCall):
            self._check_variables(self.fn, states)
        output = jax.eval_shape(lambda x: self._call(x, level), states)
        expected = (2,) if self.prediction == "energy" else (2, *self.shape)
        if getattr(output, "shape", None) != expected:
            what = "a scalar" if self.prediction == "energy" else f"shape {self.shape}"
            raise ValueError(
                f"fn with prediction={self.prediction!r} must return {what} for one state of shape {self.shape}; "
                f"on a batch of 2 it gave {getattr(output, 'shape', output)} instead of {expected}. Is shape= right? "
                f"Does fn take a batch (batched=True, now {self.batched})?"
            )
        if not jnp.issubdtype(output.dtype, jnp.floating):
            raise ValueError(f"fn must return floating-point numbers, got {output.dtype}")

    def _check_variables(self, call: LinenCall, states: jax.ShapeDtypeStruct) -> None:
        """A linen module's variables against those that it would make itself."""
        if self.batched:
            n = states.shape[0]
            arguments: list[Any] = [states, jax.ShapeDtypeStruct((n,), states.dtype)]
            condition = jax.tree.map(
                lambda leaf: jax.ShapeDtypeStruct((n, *jnp.shape(leaf)), jnp.result_type(leaf)), self.condition
            )
        else:
            arguments = [jax.ShapeDtypeStruct(self.shape, states.dtype), jax.ShapeDtypeStruct((), states.dtype)]
            condition = self.condition
        call.check(self.params, *arguments, *([] if condition is None else [condition]))

    def _check_prior(self) -> None:
        """Try a prior of the user's own abstractly, as generation will use it."""
        prior = self.prior if self._static_prior is None else self._static_prior
        if prior is None:
            return
        name = type(prior).__name__
        missing = [method for method in ("sample", "log_prob") if not callable(getattr(prior, method, None))]
        if missing:
            raise ValueError(f"a prior needs sample(key) and log_prob(x); {name} has no {' and no '.join(missing)}")
        try:
            x = jax.eval_shape(lambda key: prior.sample(key), jax.random.key(0))
            log_prob = jax.eval_shape(
                lambda x: prior.log_prob(x), jax.ShapeDtypeStruct(self.shape, jnp.result_type(float))
            )
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"prior.sample(key) must draw one state of shape {self.shape}, and prior.log_prob(x) take it, but "
                f"{name} failed: {error}"
            ) from error
        for method, got, expected in (("sample(key)", x, self.shape), ("log_prob(x)", log_prob, ())):
            if getattr(got, "shape", None) != expected:
                raise ValueError(
                    f"prior.{method} must return shape {expected} for one state of shape {self.shape}, but {name} "
                    f"gives {getattr(got, 'shape', got)}"
                )

    def check_state(self, name: str, x: Any) -> None:
        """Raises ValueError where x is not one state."""
        if jnp.shape(x) != self.shape:
            hint = "; for a batch use jax.vmap" if jnp.shape(x)[1:] == self.shape else ""
            raise ValueError(f"{name} must be one state of shape {self.shape}, got {jnp.shape(x)}{hint}")

    def _replace(self, **changes: Any) -> DiffusionModel:
        new = object.__new__(DiffusionModel)
        new.__dict__.update(self.__dict__)
        new.__dict__.update(changes)
        return new

    def tree_flatten_with_keys(self) -> tuple[Any, Any]:
        children = tuple((jax.tree_util.GetAttrKey(name), getattr(self, name)) for name in self._children)
        return children, tuple(getattr(self, name) for name in self._static)

    @classmethod
    def tree_unflatten(cls, static: Any, children: Any) -> DiffusionModel:
        new = object.__new__(cls)
        new.__dict__.update(zip(cls._static, static, strict=True))
        new.__dict__.update(zip(cls._children, children, strict=True))
        return new

    def __repr__(self) -> str:
        return (
            f"DiffusionModel({self.process}, prediction={self.prediction!r}, "
            f"covariance={type(self.covariance).__name__.lower()}, shape={self.shape})"
        )


def _as_shape(shape: Any) -> tuple[int, ...]:
    try:
        sizes = tuple(operator.index(n) for n in (shape if hasattr(shape, "__iter__") else (shape,)))
    except TypeError:
        raise ValueError(f"shape must be a tuple of integers, got {shape!r}") from None
    if any(n < 1 for n in sizes):
        raise ValueError(f"every size in shape must be at least 1, got {sizes}")
    return sizes
