r"""When a sample commits, by experiment: clone it on its way, and see whether both copies end alike.

phi(t) is the probability that two samples that a model makes from one state at time t, each by its own noise, end with
the same label: the same class (then it rises from chance, where noise is all, to 1 past speciation), or the same
training point (then it rises at collapse).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.stats

from ..checks import check_count, check_key, check_number
from ..density import Generate, Walkers, blame_network, check_points, check_times, warn_of_signal
from ..increments import transitions
from ..kernels import Array
from ..model import DiffusionModel
from ..smc import Resampling, run


class Cloning(NamedTuple):
    """How often two clones end alike.

    Attributes:
      time: where they were cloned, increasing, (k,).
      probability: the share of pairs with the same label, (k,).
      lower, upper: limits of its confidence interval (Wilson's), (k,).
      num_pairs: at each time.
    """

    time: np.ndarray
    probability: np.ndarray
    lower: np.ndarray
    upper: np.ndarray
    num_pairs: int

    def time_at(self, level: float) -> float:
        """The largest time at which the probability is ``level``, by linear interpolation; NaN where there is none.

        The two-class criterion s_t = 1 is the level `same_class_probability(1)` = 0.7752.
        """
        above = np.flatnonzero(self.probability >= level)
        if not above.size or above[-1] == len(self.time) - 1:
            return math.nan
        i = int(above[-1])
        p, q = self.probability[i], self.probability[i + 1]
        return float(self.time[i] + (p - level) / (p - q) * (self.time[i + 1] - self.time[i]))


def cloning_probability(
    key: Array,
    model: DiffusionModel,
    times: Any,
    label: Callable[[Array], Array],
    *,
    num_pairs: int = 1000,
    num_times: int = 20,
    data: Any = None,
    confidence: float = 0.95,
    chunk_size: int = 1000,
    progress: bool | None = False,
) -> Cloning:
    """phi(t) at every so many times of a grid, by cloning.

    Args:
      key: a typed key.
      model: any diffusion model of numbers.
      times: the grid (`rnejax.time_grid`) on which the model's own reverse kernels run; a number of steps that
        ``num_times`` divides, or the last piece is shorter.
      label: of one sample, in the user's coordinates, an integer or a boolean: its class, or `nearest_point`. Of a
        phase space it is given the whole state, x[0] being the data.
      num_pairs: pairs of clones at each time; the interval narrows with its root.
      num_times: at how many times, evenly along the grid's steps; a few more where it does not divide their number.
      data: clean states (n, *shape), of a phase space with any velocities, that are noised to each time, to start the
        clones from the true law of x_t; default: the model's own samples on their way.
      confidence: of the intervals.
      chunk_size: pairs that run together: what memory is needed depends on this, not on ``num_pairs``.
      progress: a bar for each piece.

    Costs 2 num_pairs evaluations per step below every clone time, about num_times / 2 times as many as one run.

    Raises:
      ValueError: for unsuitable times or data, counts below 1, a confidence that is not between 0 and 1, or a label
        that is not an integer or a boolean.
      SMCError: where the network returned NaN or infinity.
    """
    check_key(key)
    times = check_times(model, times)
    num_pairs, num_times = check_count("num_pairs", num_pairs), check_count("num_times", num_times)
    chunk_size = min(check_count("chunk_size", chunk_size), num_pairs)
    if not 0 < check_number("confidence", confidence) < 1:
        raise ValueError(f"confidence must be between 0 and 1, got {confidence}")
    check_label(model, label)
    clean = None if data is None else jax.vmap(model.transform.to_model)(check_points(model, data))
    if clean is None:
        warn_of_signal(model, times)
    stride = max(1, len(times[1:]) // num_times)
    marks = list(range(stride, len(times), stride))
    walk = Walk(model, times, progress)
    same = np.zeros(len(marks), np.int64)
    labels = jax.jit(jax.vmap(label))
    for chunk in range(-(-num_pairs // chunk_size)):
        size = min(chunk_size, num_pairs - chunk * chunk_size)
        states: Array | None = None
        position = len(times) - 1
        for i in reversed(range(len(marks))):
            key_state, key_clones = jax.random.split(jax.random.fold_in(jax.random.fold_in(key, chunk), i))
            if clean is None:
                states = walk(key_state, states, position, marks[i], size)
                position = marks[i]
            else:
                states = noised(key_state, model, clean, times[marks[i]], size)
            clones = jnp.repeat(states, 2, axis=0)
            at = marks[i]
            for piece, below in enumerate(reversed([0, *marks[:i]])):
                clones = walk(jax.random.fold_in(key_clones, piece), clones, at, below, 2 * size)
                at = below
            ends = np.asarray(labels(walk.position(clones))).reshape(size, 2)
            same[i] += int((ends[:, 0] == ends[:, 1]).sum())
    return _counted(times[marks], same, num_pairs, confidence)


def pooled(runs: Sequence[Cloning], confidence: float = 0.95) -> Cloning:
    """The pairs of several runs at the same times together, such as of networks from several seeds.

    The interval is that of all pairs alike; that the networks differ is not in it.

    Raises:
      ValueError: for no runs, or times that differ.
    """
    if not runs or any(not np.array_equal(run.time, runs[0].time) for run in runs):
        raise ValueError("runs that are pooled must have been cloned at the same times, and there must be one")
    same = sum(np.round(run.probability * run.num_pairs).astype(np.int64) for run in runs)
    return _counted(runs[0].time, np.asarray(same), sum(run.num_pairs for run in runs), confidence)


def _counted(time: np.ndarray, same: np.ndarray, num_pairs: int, confidence: float) -> Cloning:
    limits = [scipy.stats.binomtest(int(n), num_pairs).proportion_ci(confidence, method="wilson") for n in same]
    return Cloning(
        time=time,
        probability=same / num_pairs,
        lower=np.array([each.low for each in limits]),
        upper=np.array([each.high for each in limits]),
        num_pairs=num_pairs,
    )


def commitment_times(
    key: Array,
    model: DiffusionModel,
    times: Any,
    label: Callable[[Array], Array],
    num_samples: int = 1000,
    *,
    progress: bool | None = False,
) -> np.ndarray:
    """For each of the samples, the last time at which the label of the denoised state E[x_0 | x_t] changed.

    With `nearest_point` as the label of an `empirical_model`: the last change of the nearest neighbour. A sample whose
    label never changes has committed at the largest time.

    Returns:
      times, (num_samples,).

    Raises:
      ValueError, SMCError: as `cloning_probability`.
    """
    check_key(key)
    times = check_times(model, times)
    num_samples = check_count("num_samples", num_samples)
    check_label(model, label)
    walk = Walk(model, times, progress, label)
    walk(key, None, len(times) - 1, 0, num_samples)
    return times[np.asarray(walk.changed)]


class Walk:
    """A model's own run over one grid, piece by piece; every piece of one length and size is compiled once."""

    def __init__(
        self,
        model: DiffusionModel,
        times: np.ndarray,
        progress: bool | None,
        label: Callable[[Array], Array] | None = None,
    ):
        self.model, self.times, self.progress, self.label = model, times, progress, label
        self.steps = transitions(model.process, times)
        self.ends = model.process.level(times[-1])
        self.position = jax.jit(jax.vmap(model.transform.to_data))
        self.changed: Any = None

    def __call__(self, key: Array, start: Array | None, first: int, last: int, size: int) -> Array:
        """From states at times[first] (the prior's, if None) to times[last]."""
        if first == last and start is not None:
            return start
        n = len(self.times) - 1
        problem: Any = Generate(self.model, self.ends, self.ends, "exact", start)
        steps = jax.tree.map(lambda leaf: leaf[n - first : n - last], self.steps)
        if first == last:
            return problem.init(key, size)[0].x
        if self.label is not None:
            problem = Watch(problem, _Label(self.label, self.model))
            steps = (steps, jnp.arange(first, last, -1))
        result = run(
            key,
            problem,
            steps,
            num_particles=size,
            resampling=Resampling(ess_threshold=0.0),
            progress=self.progress,
            describe=blame_network(self.model.process, self.times[last + 1 : first + 1][::-1]),
        )
        if self.label is not None:
            self.changed = result.state.changed
            return result.state.walkers.x
        return result.state.x


class Watched(NamedTuple):
    """Walkers, the labels of what they would be, and where in the grid these last changed."""

    walkers: Walkers
    label: Array
    changed: Array


@partial(jax.tree_util.register_dataclass, data_fields=["problem"], meta_fields=["label"])
class Watch:
    """A run whose denoised states are labelled at every step."""

    def __init__(self, problem: Generate, label: Any):
        self.problem, self.label = problem, label

    def init(self, key: Array, num_particles: int) -> tuple[Watched, Array]:
        walkers, log_weights = self.problem.init(key, num_particles)
        none = jnp.full(num_particles, -1)
        return Watched(walkers, none, none), log_weights

    def step(self, key: Array, state: Watched, step: Any) -> tuple[Watched, Array, None]:
        transition, index = step
        x = state.walkers.x
        evaluation = self.problem.model.evaluate(jax.random.fold_in(key, 1), x, transition.t)
        label = jax.vmap(lambda x, excess: self.label(transition.t, x, excess))(x, evaluation.excess).astype(int)
        walkers, faults, _ = self.problem.step(key, state.walkers, transition)
        changed = jnp.where(label != state.label, index, state.changed)
        return Watched(walkers, label, changed), faults, None

    def position(self, state: Watched) -> Array:
        return self.problem.position(state.walkers)


class _Label:
    """The label of the denoised state, in the user's coordinates."""

    def __init__(self, label: Callable[[Array], Array], model: DiffusionModel):
        self.label, self.transform = label, model.transform

    def __call__(self, level: Any, x: Array, excess: Array) -> Array:
        return self.label(self.transform.to_data(level.clean_state(x, excess)))


def noised(key: Array, model: DiffusionModel, clean: Array, t: float, size: int) -> Array:
    """States at time t, noised from clean ones that are drawn at random."""
    key_choice, key_noise = jax.random.split(key)
    chosen = clean[jax.random.randint(key_choice, (size,), 0, len(clean))]
    return _noised(model.process.level(t), chosen, jax.random.split(key_noise, size), model)


@jax.jit
def _noised(level: Any, clean: Array, keys: Array, model: DiffusionModel) -> Array:
    def one(x: Array, key: Array) -> Array:
        noise = model.process.subspace.project(jax.random.normal(key, x.shape, x.dtype))
        state: Array = level.noised(model.process.data_of(x), noise)
        return state

    return jax.vmap(one)(clean, keys)


def check_label(model: DiffusionModel, label: Any) -> None:
    """Raises ValueError where a label, tried on one state, is not one integer or boolean."""
    if model.process.is_discrete:
        raise ValueError(
            f"{type(model.process).__name__} is a process of tokens; clones are of states that are numbers"
        )
    if not callable(label):
        raise ValueError(f"label must be a function of one sample, got {label!r}")
    found = jax.eval_shape(label, jax.ShapeDtypeStruct(model.shape, model.process.dtype))
    kind = getattr(found, "dtype", None)
    is_label = kind is not None and (jnp.issubdtype(kind, jnp.integer) or jnp.issubdtype(kind, jnp.bool_))
    if getattr(found, "shape", None) != () or not is_label:
        raise ValueError(f"label must return one integer or boolean for one sample, got {found}")


__all__ = ["Cloning", "cloning_probability", "commitment_times", "pooled"]
