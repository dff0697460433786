r"""What to sample instead: a target path q_t proportional to prod_i p_{i,t}(x)^{beta_{i,t}} exp(sum_j lambda_{j,t}
r_j(x)).

Annealing is one model with an exponent, composition several models, classifier-free guidance two models with exponents
(1 - w, w), reward tilting one model and a reward. They are all one `Target`, and targets compose.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import numpy as np

from ..checks import check_count, check_number
from ..kernels import Array
from ..model import DiffusionModel
from .rewards import Reward

Schedule = Callable[[Any], Any]
Exponent = float | Schedule


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["models", "rewards"],
    meta_fields=["exponents"],
)
@dataclass(frozen=True)
class Target:
    """A path of unnormalised densities.

    Attributes:
      models: diffusion models that share one noising process, shape and transform.
      exponents: one per model: a number, or a function of time.
      rewards: rewards with their schedules and schemes.
    """

    models: tuple[DiffusionModel, ...]
    exponents: tuple[Exponent, ...]
    rewards: tuple[Reward, ...] = ()

    @property
    def process(self) -> Any:
        return self.models[0].process

    @property
    def _is_one_model(self) -> bool:
        return len(self.models) == 1 and not callable(self.exponents[0]) and bool(self.exponents[0] == 1)

    @property
    def is_generated_law(self) -> bool:
        """Whether this is the law that one model generates, tilted by rewards of the exact scheme only (or by none)."""
        return self._is_one_model and all(reward.exact for reward in self.rewards)

    def check_exactness(self) -> None:
        """Raises ValueError where a reward claims to be exact on anything but one model with exponent 1."""
        if any(reward.exact for reward in self.rewards) and not self._is_one_model:
            raise ValueError(
                f"tilt(exact=True) is exact for one model with exponent 1, but this target has {len(self.models)} "
                f"model(s) with exponents {self.exponents}; use tilt(..., exact=False)"
            )

    def exponents_at(self, times: np.ndarray) -> np.ndarray:
        """Exponents at every time: (len(times), number of models).

        Raises:
          ValueError: where a schedule returns something that is not a finite number per time.
        """
        columns = [
            _evaluate_schedule(beta, times, f"the exponent of model {i}") for i, beta in enumerate(self.exponents)
        ]
        return np.stack(columns, axis=1)

    def strengths_at(self, times: np.ndarray) -> np.ndarray:
        """Reward strengths at every time: (len(times), number of rewards)."""
        columns = [reward.strengths_at(self.process, times) for reward in self.rewards]
        return np.stack(columns, axis=1) if columns else np.zeros((len(times), 0))


def as_target(model_or_target: DiffusionModel | Target, name: str = "the target") -> Target:
    """A model as a target with exponent 1; a target as it is.

    Raises:
      TypeError: for anything else, under the name of the argument.
    """
    if isinstance(model_or_target, Target):
        return model_or_target
    if isinstance(model_or_target, DiffusionModel):
        return Target((model_or_target,), (1.0,))
    raise TypeError(f"{name} must be a DiffusionModel or a Target, got {type(model_or_target).__name__}")


def temper(model_or_target: DiffusionModel | Target, beta: Exponent) -> Target:
    """q^beta: annealing to the temperature 1 / beta of the model's.

    Args:
      model_or_target: the base. Of a target, every exponent and every reward is multiplied by beta.
      beta: a number, or a function of time.

    Raises:
      ValueError: if the base has a reward of the exact scheme, which is exact for exponent 1 only.
    """
    base = as_target(model_or_target, "what is tempered")
    _check_exponent("an exponent", beta)
    if not callable(beta) and beta == 1:
        return base
    if any(reward.exact for reward in base.rewards):
        raise ValueError(
            "cannot temper a tilt(exact=True), which is exact for exponent 1 only; use tilt(..., exact=False)"
        )
    exponents = tuple(_multiply(beta, own) for own in base.exponents)
    rewards = tuple(replace(reward, factors=(*reward.factors, beta)) for reward in base.rewards)
    return Target(base.models, exponents, rewards)


def product(
    models_or_targets: Sequence[DiffusionModel | Target], exponents: Sequence[Exponent] | None = None
) -> Target:
    """prod_i q_i^{beta_i}: composition.

    Args:
      models_or_targets: on one noising process, of one shape.
      exponents: one per factor, 1 by default; negative ones divide. Their sum must be positive.

    Raises:
      ValueError: for no factors, exponents that do not match them, or factors on different processes, shapes or
        transforms.
    """
    if not isinstance(models_or_targets, Iterable) or isinstance(models_or_targets, (str, Mapping)):
        kind = type(models_or_targets).__name__
        raise ValueError(f"product takes a list of models or targets, product([model, ...]), got a {kind}")
    if exponents is not None and not isinstance(exponents, Iterable):
        raise ValueError(f"exponents must be a list, one per factor, got {exponents!r}; for a single power use temper")
    factors = list(models_or_targets)
    if not factors:
        raise ValueError("a product needs at least one model")
    exponents = [1.0] * len(factors) if exponents is None else list(exponents)
    if len(exponents) != len(factors):
        raise ValueError(f"exponents must match models: got {len(exponents)} exponents for {len(factors)} models")
    parts = [
        temper(as_target(factor, f"factor {i} of a product"), beta)
        for i, (factor, beta) in enumerate(zip(factors, exponents, strict=True))
    ]
    models = tuple(model for part in parts for model in part.models)
    first = models[0]
    for i, model in enumerate(models[1:], start=1):
        for attribute in ("process", "shape", "transform"):
            ours, theirs = getattr(first, attribute), getattr(model, attribute)
            if ours != theirs:
                raise ValueError(
                    f"models of a target must share one {attribute}: model 0 has {ours}, model {i} has {theirs}"
                )
    target = Target(
        models,
        tuple(beta for part in parts for beta in part.exponents),
        tuple(reward for part in parts for reward in part.rewards),
    )
    target.check_exactness()
    return target


def guide(
    unconditional: DiffusionModel | Target, conditional: DiffusionModel | Target, scale: Exponent = 2.0
) -> Target:
    """p_u^{1 - w} p_c^w: what classifier-free guidance with scale w means to sample, and does not (Ho and Salimans
    2022).

    ``scale`` is a number or a function of time; 1 is the conditional model itself.
    """
    _check_exponent("scale", scale)
    complement = (lambda t: 1.0 - scale(t)) if callable(scale) else 1.0 - scale
    return product(
        [as_target(unconditional, "unconditional"), as_target(conditional, "conditional")], [complement, scale]
    )


def tilt(
    model_or_target: DiffusionModel | Target,
    reward: Callable[[Array], Array],
    schedule: Any = None,
    exact: bool = True,
    *,
    at: str = "x",
    gradient: bool | None = None,
    host: bool = False,
    scale: float = 1.0,
    draws: int = 1,
) -> Target:
    """q exp(r): reward tilting.

    Args:
      model_or_target: the base.
      reward: ``reward(x)`` on one example in the user's coordinates, a scalar in nats. -inf forbids,
        for good: paths that are forbidden where the strength is not zero never count again, so a hard constraint on
        the result alone needs a schedule that is zero before t_min. With ``host=True`` a numpy function of a batch,
        (n, *shape) -> (n,), called back on the host.
      schedule: its strength lambda(t), a function of time that is 1 at t_min (or an object with a method
        ``strengths(process, times)``, as `rnejax.observe` uses). Default: the fraction of the reference's
        variance that is signal, alpha_t^2 data_std^2 / V_t (of tokens, the survival), normalised to 1 at t_min; for
        ``at="x"``, times data_std^2 / V_t where noisy states are larger than data, so that a quadratic reward of them
        vanishes at t_max.
      exact: True: the law *generated* by the model times exp(r), exactly, for any error of the network and any step
        (auxiliary kernel = noising kernel). False: lower variance, exact only as far as noising and denoising agree.
        Beside an exact reward it needs ``gradient=False``, for its gradient would shift the auxiliary kernel.
      at: where intermediate rewards are evaluated: ``x`` (the noisy state) or ``x0`` (the predicted clean state; of
        tokens, a completion drawn from what the model predicts). At t_min it is always the state itself.
      gradient: let the proposal follow the reward's gradient. Default: yes, but not for a host reward, nor for tokens.
        Of tokens, a reward with a gradient is given rows of probabilities instead, (length, vocab_size): one-hot at
        t_min; before, what the model predicts for ``x0``, and zeros where MASK is for ``x``. The proposal is told what
        the change of each position to each token would do to the reward, to first order; a reward whose first order is
        no guide (the logarithm of something improbable) can have a method ``changes(rows)`` that returns it,
        (length, vocab_size).
      host: the reward is a numpy function.
      scale: multiplies the reward.
      draws: of tokens at ``x0``, over how many completions the reward is averaged: log of the mean of exp(reward), then
        times scale and strength.

    Raises:
      ValueError: for ``exact=True`` on anything but one model with exponent 1, an unknown ``at``, the gradient of a
        host reward, or a JAX reward that, tried abstractly on one example, returns no scalar.
      RewardError: from `steer`, where a host reward raises.
    """
    base = as_target(model_or_target, "what is tilted")
    _check_exponent("scale", scale)
    if callable(scale):
        raise ValueError("scale must be a number; a strength that changes over time is a schedule")
    added = Reward.of(
        reward,
        schedule=schedule,
        exact=exact,
        at=at,
        gradient=not (host or base.process.is_discrete) if gradient is None else gradient,
        host=host,
        factors=(float(scale),),
        draws=check_count("draws", draws),
    )
    added.check_on(base.process, base.models[0].shape)
    target = replace(base, rewards=(*base.rewards, added))
    target.check_exactness()
    return target


def _check_exponent(name: str, value: Exponent) -> None:
    """Raises ValueError for anything but a finite number or a function, or what is known only to compiled code."""
    if isinstance(value, jax.core.Tracer):
        raise ValueError(
            f"{name} must be known when the program is traced, because schedules and proposals are computed from it on "
            "the host: build the target outside jax.jit, or mark the number as static (static_argnames)"
        )
    if not callable(value):
        check_number(name, value)


def _multiply(first: Exponent, second: Exponent) -> Exponent:
    if not callable(first) and not callable(second):
        return float(first) * float(second)
    return _Product(first, second)


@dataclass(frozen=True)
class _Product:
    """A product of schedules, equal to another of equal factors (so that it does not recompile)."""

    first: Exponent
    second: Exponent

    def __call__(self, t: Any) -> Any:
        value = self.first(t) if callable(self.first) else self.first
        return value * (self.second(t) if callable(self.second) else self.second)


def _evaluate_schedule(schedule: Exponent, times: np.ndarray, name: str) -> np.ndarray:
    if not callable(schedule):
        return np.full(len(times), float(schedule))
    try:
        values = np.asarray([np.asarray(schedule(t), np.float64) for t in times])
    except (TypeError, ValueError) as error:  # of what the function returns, or of a call that it does not take
        raise ValueError(f"{name} must be one finite number at every time, but its schedule failed: {error}") from error
    if values.shape != times.shape or not np.isfinite(values).all():
        raise ValueError(f"{name} must be one finite number at every time, got {values} (shape {values.shape})")
    return values
