"""Particles of a molecular system against its reference samples and its true energy."""

from __future__ import annotations

import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import rnejax as rj

from .. import plot
from ..config import ConfigError, MoleculeComparison, Plain, Product, Temper
from ..persistence import trained_on, training_temperature
from .build import build_system, load_reference_of
from .folder import RunFolder, require_molecules


class Comparison:
    """The system, its temperature, and the last of its reference sets; ``name`` is that of the model.

    Warns on stderr where ``target``, a section of the configuration, is of another temperature.

    Raises:
      ConfigError: for a system that is not the model's, reference samples that are not there, or a missing package.
    """

    def __init__(self, config: MoleculeComparison, model: rj.DiffusionModel, name: str, target: Any):
        require_molecules()
        self.system = build_system(config.system)
        self.reweight = config.reweight
        if self.system.shape != model.shape:
            raise ConfigError(
                f"molecule.system = {config.system.kind} has configurations of shape {self.system.shape}, the model "
                f"states of shape {model.shape}"
            )
        named, trained = config.system.model_dump(mode="json", exclude={"biases"}), trained_on(name)
        if trained is not None and trained != named:
            raise ConfigError(f"molecule.system is {named}, but model = {name} was trained on {trained}")
        law = temperature_of(name, target)
        if law is not None and abs(law / config.temperature - 1) > 1e-3:
            print(
                f"warning: the target is the law of temperature {law:g}, and is held against molecule.temperature = "
                f"{config.temperature:g}",
                file=sys.stderr,
            )
        self.thermal_energy = self.system.thermal_energy(config.temperature)
        self.reference = None
        if config.reference is not None:
            stored = load_reference_of("molecule.reference", config.system, config.reference, config.temperature)
            self.reference = stored.x[-1]

    def record(self, folder: RunFolder, target: Any, result: rj.control.Steered) -> None:
        """Metrics of the particles by their weights, and of the same ones weighed for the true energy; pictures."""
        from ..systems.metrics import standard_form

        log_weights = _pooled(result)
        x = standard_form(self.system, np.asarray(result.particles).reshape(len(log_weights), *self.system.shape))
        energy = self._energies(x)
        folder.record(infinite_energies=int(np.sum(~np.isfinite(energy))))
        found = {"target": log_weights}
        self._measure(folder, "against_reference", x, energy, log_weights)
        kernel_ratios = bool(np.all(result.info.kernel_ratios))
        if self.reweight and not kernel_ratios:
            print("feynman_kac has no weights that lead to the true energy: molecule.reweight is left out")
        if self.reweight and kernel_ratios and not getattr(target, "rewards", ()):
            # Of a mirror image, the energy that it has once it is turned back: a bias may tell the two apart.
            turned = getattr(self.system, "standard_form", lambda x: x)
            again = rj.reweight(result, target, lambda x: -self.system.energy(turned(x)) / self.thermal_energy)
            new = _pooled(again)
            estimate, error = rj.smc.log_normalizer_with_error(again)
            folder.record(
                reweighted={
                    "log_normalizer_nats": float(estimate),
                    "log_normalizer_standard_error_nats": float(error),
                    "effective_sample_size": float(rj.smc.effective_sample_size(jnp.asarray(new))),
                    "pareto_k": float(rj.smc.pareto_k(jnp.asarray(new))),
                }
            )
            self._measure(folder, "reweighted_against_reference", x, energy, new)
            found["true energy"] = new
        self._draw(folder, x, energy, found)

    def record_uncorrected(self, folder: RunFolder, x: np.ndarray) -> None:
        """The same metrics of particles without weights."""
        from ..systems.metrics import standard_form

        x = standard_form(self.system, x)
        self._measure(folder, "uncorrected_against_reference", x, self._energies(x), None)

    def _energies(self, x: np.ndarray) -> np.ndarray:
        from ..systems.metrics import energies

        return energies(self.system, x)

    def _measure(self, folder: RunFolder, name: str, x: np.ndarray, energy: np.ndarray, log_weights: Any) -> None:
        from ..systems.metrics import compare

        if self.reference is not None:
            folder.record(**{name: compare(self.system, x, self.reference, log_weights, energy=energy)})

    def _draw(self, folder: RunFolder, x: np.ndarray, energy: np.ndarray, found: dict[str, np.ndarray]) -> None:
        from ..systems.metrics import pair_distances, torsion_histogram, weights_of

        shares = {name: weights_of(each, len(x)) for name, each in found.items()}
        energies = dict.fromkeys(found, energy)
        if self.reference is not None:
            energies["reference"] = self._energies(self.reference)
        folder.picture("energies.png", plot.histograms(energies, weights=shares, over="reference", xlabel="energy"))
        if len(self.system.shape) == 2:
            distances = {name: pair_distances(x) for name in found}
            repeated = {name: np.repeat(each, distances[name].shape[1]) for name, each in shares.items()}
            if self.reference is not None:
                distances["reference"] = pair_distances(self.reference)
            figure = plot.histograms(distances, weights=repeated, over="reference", xlabel="distance of a pair")
            folder.picture("distances.png", figure)
        if hasattr(self.system, "torsions"):
            angles = np.asarray(jax.lax.map(self.system.torsions, x, batch_size=1000))
            plots = {name: torsion_histogram(angles, weights=each) for name, each in shares.items()}
            if self.reference is not None:
                theirs = np.asarray(jax.lax.map(self.system.torsions, self.reference, batch_size=1000))
                plots["reference"] = torsion_histogram(theirs)
            folder.picture("ramachandran.png", plot.ramachandran(plots, over="reference"))


def temperature_of(name: str, target: Any) -> float | None:
    """T of the exp(-U / kT) that a target of Boltzmann models is: 1 / T = sum of beta_i / T_i, over its factors.

    None where a factor's file does not say at which it was trained, for other kinds of targets, and where it is not
    positive.
    """
    if isinstance(target, Plain):
        names, exponents = [name], [1.0]
    elif isinstance(target, Temper):
        names, exponents = [name], [target.exponent]
    elif isinstance(target, Product):
        names = [name] * len(target.conditions) + target.models
        exponents = target.exponents or [1.0] * len(names)
    else:
        return None
    inverse = 0.0
    for each, beta in zip(names, exponents, strict=True):
        trained = training_temperature(each)
        if trained is None:
            return None
        inverse += beta / trained
    return 1 / inverse if inverse > 0 else None


def _pooled(result: rj.control.Steered) -> np.ndarray:
    """Log-weights of all particles of all groups, on one scale."""
    scale = np.asarray(result.log_normalizer, np.float64)[..., None]
    return (np.asarray(result.log_weights, np.float64) + scale).ravel()
