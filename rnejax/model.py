"""DiffusionModel: a noising process, a network that predicts something about x_0, and a reverse-kernel covariance."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from .adapters import NnxCall, adapt
from .covariance import Covariance, Evaluation, get_covariance
from .kernels import Array, Kernel
from .processes import Level, LinearProcess, NoiseLevel, Process, Transition
from .processes.gaussian import GaussianProcess, require_scalar
from .processes.process import check_process
from .transforms import Identity, Transform
from .trials import check_output, check_prior, check_transform

NOISE_LEVELS: dict[str, Callable[[Any], Any]] = {
    "t": lambda level: level.t,
    "sigma": lambda level: level.sigma,
    "log_snr": lambda level: level.log_snr,
    # DDPM: step t of the table has index t - 1, an integer
    "index": lambda level: jnp.round(level.t).astype(jnp.int32) - 1,
    "level": lambda level: level,
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
        `rnejax.calibrate` makes. See `rnejax.covariance`.
      shape: of one state.
      params, condition: any pytrees of arrays. They are dynamic: new weights or another class label recompile nothing.
      batched: fn takes a batch: x (n, *shape), t (n,), condition with a leading axis n.
      noise_level: what fn gets as its second argument: ``t``, ``sigma``, ``log_snr`` (log alpha^2/sigma^2), ``index``
        (t - 1 as an integer, for a table of betas), ``level`` (all of the level, as ``process.level(t)``, for what is a
        formula rather than a network; of a linear SDE without ``noise`` and ``signal``), or a function of the level
        that returns a number.
      prior: the law at the largest time, in the network's coordinates and on the process's subspace: anything with
        ``sample(key)`` and ``log_prob(x)``; default: the reference's.
      transform: from the network's coordinates to the user's. Samples, densities and rewards are in the user's.

    Raises:
      ValueError: for a process, covariance or transform that is none, an unknown prediction or noise level, a shape
        that is impossible or does not fit the subspace, a prior off the subspace, or where fn, the prior or the
        transform, tried abstractly on one state, fails or returns another shape or type than it should.
    """

    _children = ("params", "condition", "covariance", "prior")
    _static = ("process", "fn", "prediction", "shape", "batched", "noise_level", "transform", "_static_prior")

    def __init__(
        self,
        process: Process,
        fn: Callable[..., Array] | Any,
        prediction: str | None = None,
        covariance: str | Covariance = "reference",
        shape: tuple[int, ...] | None = None,
        *,
        params: Any = None,
        condition: Any = None,
        batched: bool = False,
        noise_level: str | Callable[[NoiseLevel], Array] = "t",
        prior: Any = None,
        transform: Transform = Identity(),  # noqa: B008 - immutable
    ):
        check_process(process)
        prediction = process.predictions[0] if prediction is None else prediction
        if prediction not in process.predictions:
            raise ValueError(
                f"unknown prediction {prediction!r} for {type(process).__name__}; one of "
                f"{', '.join(process.predictions)}"
            )
        if isinstance(noise_level, str) and noise_level not in NOISE_LEVELS:
            raise ValueError(f"unknown noise_level {noise_level!r}; one of {', '.join(NOISE_LEVELS)}, or a function")
        if not isinstance(noise_level, str) and not callable(noise_level):
            raise ValueError(f"noise_level must be a name or a function of a NoiseLevel, got {noise_level!r}")
        if isinstance(process, LinearProcess) and noise_level in ("sigma", "index"):
            raise ValueError(
                f"{type(process).__name__} has a sigma for every direction and no table of betas: noise_level must be "
                f"'t', 'log_snr' (its mean), 'level', or a function of the level, got {noise_level!r}"
            )
        self.process = process
        self.fn, self.params = adapt(fn, params)
        self.prediction = prediction
        self.covariance = get_covariance(covariance)
        self.shape = process.check_shape(None if shape is None else _as_shape(shape))
        self.condition = condition
        self.batched = bool(batched)
        self.noise_level = noise_level
        self.prior, self._static_prior = _split_prior(prior)
        self.transform = transform
        if process.is_discrete and (self.covariance != get_covariance("reference") or transform != Identity()):
            raise ValueError(
                f"states of {type(process).__name__} are tokens, which have no covariance and no coordinates to "
                f"transform: leave covariance and transform as they are, got {covariance!r} and {transform!r}"
            )
        self._check_euler()
        check_transform(self)
        check_output(self)
        check_prior(self)

    # -- variations ---------------------------------------------------------------------------------------------------

    def with_condition(self, condition: Any) -> DiffusionModel:
        """The same model under another condition; recompiles nothing if shapes and dtypes agree.

        A list of numbers is taken for an array.

        Raises:
          ValueError: where they do not agree, and the network does not take the condition.
        """
        if isinstance(condition, list) and condition and all(isinstance(each, (int, float)) for each in condition):
            condition = jnp.asarray(condition)
        model = self._replace(condition=condition)
        if not _alike(condition, self.condition):
            check_output(model)
        return model

    def with_params(self, params: Any) -> DiffusionModel:
        """The same model with other weights; of an nnx module: an ``nnx.State`` or nested dictionaries.

        Raises:
          ValueError: where the weights have another structure or other shapes than the network takes.
        """
        model = self._replace(params=self.fn.weights(params) if isinstance(self.fn, NnxCall) else params)
        if not _alike(model.params, self.params):
            check_output(model)
        return model

    def with_prior(self, prior: Any) -> DiffusionModel:
        """The same model with another law at the largest time; None for the reference's.

        Raises:
          ValueError: as the constructor does for its ``prior``.
        """
        data, static = _split_prior(prior)
        model = self._replace(prior=data, _static_prior=static)
        check_prior(model)
        return model

    def with_process(self, process: Process) -> DiffusionModel:
        """The same network under another noising process that it was trained for as well, such as other times of one.

        Raises:
          ValueError: as the constructor does for its ``process``.
        """
        check_process(process)
        if process.is_discrete != self.process.is_discrete or self.prediction not in process.predictions:
            raise ValueError(f"a network for {self.process} says nothing about {process}")
        model = self._replace(process=process, shape=process.check_shape(self.shape))
        model._check_euler()
        check_output(model)
        check_prior(model)
        return model

    def with_covariance(self, covariance: str | Covariance) -> DiffusionModel:
        """The same model with another reverse-kernel covariance.

        Raises:
          ValueError: for one that is none, or that the process has not.
        """
        model = self._replace(covariance=get_covariance(covariance))
        model._check_euler()
        return model

    # -- one example --------------------------------------------------------------------------------------------------

    def reverse(self, x_t: Array, t: Any, s: Any, key: Array | None = None) -> Any:
        """K(x_s | x_t) for s < t, in the network's coordinates. ``key`` is used by random covariances only."""
        self.check_state("x_t", x_t)
        transition = self.process.transition(s, t)
        return self.kernel(transition, x_t, self._evaluate_one(x_t, transition.t, key))

    def denoise(self, x: Array, t: Any) -> Array:
        """E[x_0 | x_t = x]; of tokens, the probability of every one at every position, (length, vocab_size)."""
        level = self.process.level(t)
        return level.denoised(x, self._excess(x[None], level)[0])

    def score(self, x: Array, t: Any) -> Array:
        """grad log p_t(x).

        Raises:
          ValueError: for a process of tokens, where there is no gradient.
        """
        if self.process.is_discrete:
            raise ValueError(f"states of {type(self.process).__name__} are tokens, whose density has no score")
        level = self.process.level(t)
        return level.score(x, self._excess(x[None], level)[0])

    def energy(self, x: Array, t: Any) -> Array:
        """E(x, t) = -log p_t(x) in nats, up to whatever constant the network has; in the network's coordinates.

        Raises:
          ValueError: where the network predicts anything else, or x is not one state.
        """
        if self.prediction != "energy":
            raise ValueError(
                f"this model's network predicts {self.prediction!r}, which is no energy: log p_t(x) is what "
                "rnejax.log_density estimates"
            )
        self.check_state("x", x)
        return self.energy_at(x, self.process.level(t))

    def energy_at(self, x: Array, level: Level) -> Array:
        """E at a noise level, of a model that predicts it."""
        return self._call(x[None], level)[0]

    def kernel(self, transition: Transition, x_t: Array, evaluation: Evaluation) -> Kernel:
        """K(x_s | x_t) from what the model said of x_t (one example)."""
        if self.covariance.euler:
            return transition.euler_reverse(x_t, evaluation.excess)  # type: ignore[attr-defined]
        return transition.reverse(x_t, *evaluation)

    # -- a batch of states at one time: the only place where the network is called -------------------------------------

    def evaluate(self, key: Array, x: Array, level: Any, *, after: Array | None = None) -> Evaluation:
        """Excess and covariance of a batch of states (n, *shape) at one noise level: one network evaluation each.

        Not before ``after`` is known, where given. Two large batches of eigendecompositions (``full``) that do not
        depend on each other can hang XLA on CPUs of few cores (jax 0.10, two cores, 2,048 matrices of 6 x 6).
        """
        one = 1.0 if after is None else _one_after(after)

        def at(level: Any) -> Evaluation:
            return self.covariance(
                key, lambda states: one * self._excess(states, level), x, level, self.process.subspace
            )

        needs_signal = getattr(self.covariance, "needs_signal", False)
        if not (needs_signal and isinstance(self.process, GaussianProcess) and self.process.ends_without_signal):
            return at(level)

        def without_signal() -> Evaluation:
            # Just below, alpha is small and not zero: what it changes in the covariance is of order alpha^2, and what
            # rounding it costs of order eps / alpha.
            near = self.process.level(level.t * (1 - float(jnp.finfo(x.dtype).eps) ** (1 / 3)))
            return at(near)._replace(excess=self._excess(x, level))

        return jax.lax.cond(level.alpha == 0, without_signal, lambda: at(level))

    @property
    def _own_prior(self) -> Any:
        return self.prior if self._static_prior is None else self._static_prior.prior

    @property
    def has_prior(self) -> bool:
        """Whether the model was given a prior of its own."""
        return self._own_prior is not None

    def prior_at(self, level: Level) -> Any:
        """The law that generation starts from."""
        return self.process.reference_at(level, self.shape) if self._own_prior is None else self._own_prior

    def _evaluate_one(self, x: Array, level: Any, key: Array | None) -> Evaluation:
        key = jax.random.key(0) if key is None else key
        return jax.tree.map(lambda leaf: leaf[0], self.evaluate(key, x[None], level))

    def _excess(self, x: Array, level: Any) -> Array:
        prediction = "score" if self.prediction == "energy" else self.prediction
        excess: Array = level.excess(self._outputs(x, level), x, prediction)
        return jax.vmap(self.process.subspace.project)(excess)

    def _outputs(self, x: Array, level: Any) -> Array:
        if self.prediction == "energy":
            energies, pullback = jax.vjp(lambda states: self._call(states, level), x)
            return -pullback(jnp.ones_like(energies))[0]
        return self._call(x, level)

    def _call(self, x: Array, level: Any) -> Array:
        convention = NOISE_LEVELS[self.noise_level] if isinstance(self.noise_level, str) else self.noise_level
        time = convention(level)
        if self.noise_level == "level":
            return self._call_at(x, time, time)
        time = jnp.asarray(time)
        if not jnp.issubdtype(time.dtype, jnp.integer):  # an index stays one
            time = time.astype(jnp.result_type(float) if self.process.is_discrete else x.dtype)
        return self._call_at(x, time, jnp.broadcast_to(time, len(x)))

    def _call_at(self, x: Array, time: Any, times: Any) -> Array:
        """What fn says of a batch at one time; ``times`` is what a batched fn is given."""
        plain = self.params is None and self.condition is None
        if not self.batched:
            call = self.fn if plain else lambda state, time: self.fn(self.params, state, time, self.condition)
            return jax.vmap(lambda state: call(state, time))(x)
        if plain:
            return self.fn(x, times)
        conditions = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (len(x), *jnp.shape(leaf))), self.condition)
        return self.fn(self.params, x, times, conditions)

    # -- housekeeping -------------------------------------------------------------------------------------------------

    def _check_euler(self) -> None:
        if self.covariance.euler and isinstance(self.process, LinearProcess):
            require_scalar(self.process, "covariance='euler', an Euler-Maruyama kernel,")

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


class _ByIdentity:
    """A prior that cannot be compared by value (a dataclass of arrays): what is compiled is kept for this object."""

    def __init__(self, prior: Any):
        self.prior = prior


@dataclass(frozen=True)
class _ByValue:
    prior: Any


def _split_prior(prior: Any) -> tuple[Any, _ByIdentity | _ByValue | None]:
    """A prior that is a pytree travels as data; any other object as configuration."""
    if prior is None or not jax.tree_util.all_leaves([prior]):
        return prior, None
    try:
        hash(prior)
    except TypeError:
        return None, _ByIdentity(prior)
    return None, _ByValue(prior)


def _alike(one: Any, other: Any) -> bool:
    """Whether two pytrees of arrays have one structure and the same shapes."""
    structures: list[Any] = [jax.tree.structure(tree) for tree in (one, other)]
    shapes = [[jnp.shape(leaf) for leaf in jax.tree.leaves(tree)] for tree in (one, other)]
    return bool(structures[0] == structures[1]) and shapes[0] == shapes[1]


def _one_after(known: Array) -> Array:
    """1.0, but not before ``known`` is: its first number, if finite, is multiplied by a zero.

    ``optimization_barrier`` is gone by the time that XLA schedules, so the dependence has to be one of numbers, and one
    that no compiler may simplify, for it cannot know that the number is finite.
    """
    first = known.reshape(-1)[0]
    return 1.0 + jnp.where(jnp.isfinite(first), 0 * first, 0.0)


def _as_shape(shape: Any) -> tuple[int, ...]:
    try:
        sizes = tuple(operator.index(n) for n in (shape if hasattr(shape, "__iter__") else (shape,)))
    except TypeError:
        raise ValueError(f"shape must be a tuple of integers, got {shape!r}") from None
    if any(n < 1 for n in sizes):
        raise ValueError(f"every size in shape must be at least 1, got {sizes}")
    return sizes
