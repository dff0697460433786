"""What a model is trained on: digits, molecules, or tokens. The rest of training does not know which."""

from __future__ import annotations

from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

import rnejax as rj

from .. import plot
from ..config import ConfigError, MoleculeData, TextData
from ..kernels import FullSpace
from ..transforms import Affine, Identity
from .build import build_system, load_reference_of
from .folder import RunFolder, require_molecules, summary
from .token_data import DigitTokens, Text


class TrainingData(Protocol):
    """Examples, and what is done with a model of them.

    Attributes:
      train: a pytree of arrays with a leading axis of examples.
      held_out: (x0, condition), prepared validation examples in the network's coordinates.
      shape: of one state.
      subspace: where states live.
      transform: from the network's coordinates to the data's.
      condition: what the network is given where nothing is asked for; None where it takes no condition.
      null_label: of label dropout, or None.
    """

    train: Any
    held_out: Any
    shape: tuple[int, ...]
    subspace: Any
    transform: Any
    condition: Any
    null_label: Any

    def prepare(self, key: jax.Array, batch: Any) -> tuple[jax.Array, Any]:
        """(x0, condition) of a batch, in the network's coordinates."""
        ...

    def bound(self, nats: float) -> dict[str, float]:
        """The name and value of an upper bound on -log p of one example, given in nats in the network's coordinates."""
        ...

    def draw(self, folder: RunFolder, model: rj.DiffusionModel, times: np.ndarray, n: int, key: jax.Array) -> None:
        """``n`` samples of the model, numbers and pictures of them."""
        ...


def load(data: Any, key: jax.Array, label_dropout: float = 0.0) -> TrainingData:
    """The training data of a configuration; ``key`` prepares the validation examples.

    Raises:
      ConfigError: for data that are not there, or samples of another system.
    """
    try:
        if isinstance(data, TextData) or data == "verses":
            return Text(data)
        if data == "digit_tokens":
            return DigitTokens(label_dropout)
        return Molecules(data) if isinstance(data, MoleculeData) else Digits(key)
    except ConfigError:
        raise
    except (ValueError, ImportError, FileNotFoundError) as error:
        raise ConfigError(f"data: {error}") from error


class Digits:
    """Handwritten digits, dequantised, with their classes."""

    subspace: Any = FullSpace()
    transform: Any = Identity()

    def __init__(self, key: jax.Array):
        from ..systems import digits

        self.digits = digits
        self.shape: tuple[int, ...] = digits.IMAGE_SHAPE
        self.train = digits.load("train")
        self.held_out = digits.training_batch(key, digits.load("validation"))
        self.null_label = digits.NUM_CLASSES
        self.condition = jnp.int32(self.null_label)

    def prepare(self, key: jax.Array, batch: Any) -> tuple[jax.Array, Any]:
        return self.digits.training_batch(key, batch)

    def bound(self, nats: float) -> dict[str, float]:
        bits = self.digits.bits_per_dimension(-jnp.asarray(nats))
        return {"validation_bits_per_dimension_bound": float(bits)}

    def draw(self, folder: RunFolder, model: rj.DiffusionModel, times: np.ndarray, n: int, key: jax.Array) -> None:
        """Samples of the ten classes in turn, and what their own densities say."""
        classes = self.digits.NUM_CLASSES
        x = np.zeros((n, *self.shape), np.float32)
        log_density = np.zeros(n, np.float32)
        for label in range(min(n, classes)):
            chosen = slice(label, None, classes)
            each = model.with_condition(jnp.int32(label))
            samples = rj.sample(jax.random.fold_in(key, label), each, times, num_samples=len(x[chosen]))
            x[chosen], log_density[chosen] = samples.x, samples.log_density
        folder.arrays("samples.npz", x=x, log_density=log_density)
        bits = self.digits.bits_per_dimension(jnp.asarray(log_density))
        folder.record(samples_bits_per_dimension=summary(bits))
        folder.picture("samples.png", plot.sample_sheet(x, columns=2 * classes))


class Molecules:
    """Configurations of a system at one temperature, scaled, to a mean square of 1 by default; the last set validates.

    Where the space is all of R^d, they are moved to a mean of zero as well.
    """

    condition: Any = None
    null_label: Any = None

    def __init__(self, data: MoleculeData):
        require_molecules()
        self.system = build_system(data.system)
        stored = load_reference_of("data.reference", data.system, data.reference, data.temperature)
        self.shape: tuple[int, ...] = self.system.shape
        self.subspace = self.system.subspace
        self.reference = stored.x[-1]
        dimension = self.subspace.dimension(self.shape)
        train = (stored.x[:-1] if len(stored.x) > 1 else stored.x).reshape(-1, *self.shape)
        shift = train.mean(axis=0, dtype=np.float64) if isinstance(self.subspace, FullSpace) else 0.0
        own = float(np.sqrt(np.sum(np.square(train - shift, dtype=np.float64)) / (len(train) * dimension)))
        scale = own if data.scale is None else data.scale
        self.transform = Affine(scale, shift)
        self.log_scale = dimension * np.log(scale)
        order = np.random.default_rng(0).permutation(len(train))  # neighbours in a chain resemble each other
        self.train = np.asarray((train[order] - shift) / scale, np.float32)
        validation = self.reference[np.random.default_rng(1).permutation(len(self.reference))[:2000]]
        self.held_out = (jnp.asarray((validation - shift) / scale, np.float32), None)

    def prepare(self, key: jax.Array, batch: Any) -> tuple[jax.Array, Any]:
        return batch, None

    def bound(self, nats: float) -> dict[str, float]:
        return {"validation_nats_bound": float(nats + self.log_scale)}

    def draw(self, folder: RunFolder, model: rj.DiffusionModel, times: np.ndarray, n: int, key: jax.Array) -> None:
        """Samples against the second reference set: every metric, energies and distances."""
        from ..systems.metrics import compare, energies, pair_distances, standard_form

        samples = rj.sample(key, model, times, num_samples=n)
        x = np.asarray(samples.x)
        folder.arrays("samples.npz", x=x, log_density=samples.log_density)
        x = standard_form(self.system, x)
        energy = energies(self.system, x)
        folder.record(samples_against_reference=compare(self.system, x, self.reference, energy=energy))
        reference = energies(self.system, self.reference)
        groups = {"reference": reference, "model": energy}
        folder.picture("energies.png", plot.histograms(groups, over="reference", xlabel="energy"))
        if len(self.shape) == 2:
            distances = {"reference": pair_distances(self.reference), "model": pair_distances(x)}
            folder.picture("distances.png", plot.histograms(distances, over="reference", xlabel="distance of a pair"))
