"""infill(): a model of masked tokens, given some of them: the others are what it fills in."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .checks import is_traced
from .kernels import Array, Kernel
from .model import DiffusionModel
from .processes import AnyOrder, Masked


@partial(jax.tree_util.register_dataclass, data_fields=["template"], meta_fields=["vocab_size"])
@dataclass(frozen=True)
class Template:
    """The state from which blanks are filled in, as a law: itself. What is no blank is given, and has no density.

    Attributes:
      template: tokens, MASK where there is a blank, (length,).
      vocab_size: number of tokens, and MASK's number.
    """

    template: Array
    vocab_size: int

    @property
    def num_given(self) -> Array:
        return jnp.sum(self.template != self.vocab_size)

    def sample(self, key: Array) -> Array:
        return self.template

    def restored(self, x: Array) -> Array:
        """A state with the given tokens, of one in which they were noised as the others were: they never are."""
        return jnp.where(self.template == self.vocab_size, x, self.template)

    def log_prob(self, x: Array) -> Array:
        return jnp.where(jnp.all(x == self.template), 0.0, -jnp.inf)

    def relative_to(self, other: Kernel, x: Array) -> Array:
        """log of this over the reference's law of the blanks alone times uniform tokens elsewhere.

        The reference counts the tokens that are given as log(1/V) each, at every time; a density of the others only
        must not count them.
        """
        return jnp.where(jnp.all(x == self.template), self.num_given * np.log(self.vocab_size), -jnp.inf)


def infill(model: DiffusionModel, template: Any) -> DiffusionModel:
    """The model of what stands in the blanks of a template: p(blanks | the other tokens), for sample and steer.

    Densities and log Z are those of the blanks alone. With one token per step (``AnyOrder``) the grid has as many steps
    as there are blanks, ``time_grid(process, blanks, t_max=blanks)``. Another template recompiles nothing.

    Args:
      model: of masked tokens.
      template: tokens, MASK (``process.mask_token``) where something is to be filled in, (length,).

    Raises:
      ValueError: for another process, tokens that are none, or a template without a blank.
    """
    process = model.process
    if not isinstance(process, (Masked, AnyOrder)):
        raise ValueError(f"only masked tokens can be filled in; the process is {process}")
    tokens = process.check_tokens("template", template, clean=False, batch=False)
    if not is_traced(tokens) and not bool(jnp.any(tokens == process.mask_token)):
        raise ValueError(f"template has no blank: it needs MASK, {process.mask_token}, where something is wanted")
    return model.with_prior(Template(tokens, process.vocab_size))


def common_template(models: tuple[DiffusionModel, ...]) -> Template | None:
    """The template that all models of a target are given; None where none is.

    Raises:
      ValueError: where some have one and others none or another.
    """
    priors = [model._own_prior for model in models]
    templates = [prior for prior in priors if isinstance(prior, Template)]
    if not templates:
        return None
    different = len(templates) != len(models) or (
        not is_traced([each.template for each in templates])
        and any(bool(jnp.any(each.template != templates[0].template)) for each in templates)
    )
    if different:
        raise ValueError("all models of a target must be given the same template: infill each of them with it")
    return replace(templates[0])


def check_grid(model: DiffusionModel, times: np.ndarray) -> None:
    """Raises ValueError where one token per step does not end with as many blanks as the model's template has."""
    prior = model._own_prior
    if isinstance(prior, Template) and isinstance(model.process, AnyOrder) and not is_traced(prior.template):
        blanks = int(model.process.length - prior.num_given)
        if times[-1] != blanks:
            raise ValueError(
                f"the template has {blanks} blanks, so one token per step starts at t = {blanks}, and the times end at "
                f"{times[-1]:g}: take time_grid(process, {blanks}, t_max={blanks})"
            )
