"""The training loop: jitted chunks of steps, an averaged copy of the weights, metrics, checkpoints, resumption."""

import json
import math
import os
import sys
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from ..checkpoint import CheckpointError, load_arrays, load_metadata, save_arrays
from .ema import ema_decay as decay_at
from .ema import ema_update

Loss = Callable[[jax.Array, Any, Any], Any]
"""loss(key, params, batch) -> losses of the examples, shape (batch_size,), or (these, {name: parts to report})."""


class FitState(NamedTuple):
    """All that a later step depends on."""

    step: jax.Array
    params: Any
    average: Any
    optimizer: Any
    data: Any = None  # where it changes


class FitResult(NamedTuple):
    """What a run has come to.

    `params`: the weights after the last step. `average`: their exponential moving average, which is what to use.
    `metrics`: one dictionary per report. `interrupted`: whether the run was stopped (Ctrl-C) before `num_steps`.
    """

    params: Any
    average: Any
    metrics: list[dict[str, float]]
    interrupted: bool


def fit(
    key: jax.Array,
    loss: Loss,
    params: Any,
    data: Any,
    optimizer: optax.GradientTransformation,
    *,
    num_steps: int,
    batch_size: int,
    microbatch_size: int | None = None,
    ema_decay: float = 0.999,
    steps_per_call: int = 1,
    evaluate: Callable[[Any], Mapping[str, float]] | None = None,
    report_every: int = 100,
    folder: str | Path | None = None,
    save_every: int = 500,
    fingerprint: Mapping[str, Any] | None = None,
    on_report: Callable[[dict[str, float]], None] | None = None,
    progress: bool | None = None,
    renew: Callable[[jax.Array, Any, Any], Any] | None = None,
    renew_every: int = 100,
) -> FitResult:
    """Minimise the mean of `loss` over minibatches of `data`.

    A step depends on `key` and its own number only, so a run that was stopped and resumed is the run that was not
    stopped. Minibatches go through the data in a fresh random order in every epoch, without replacement.

    Args:
        key: a typed key.
        loss: loss(key, params, batch) -> one loss per example, averaged here; or that and a dictionary of its parts,
            one number per example, whose means are reported by name.
        params: a pytree of arrays (`rnejax.networks.functional` makes one of an nnx module).
        data: a pytree of arrays with a common leading axis, the examples.
        optimizer: any optax transformation; `make_optimizer` gives the usual one.
        num_steps: total number of steps, those before a resumption included.
        batch_size: examples per step, at most the number there are.
        microbatch_size: compute the gradient over so many examples at a time (a divisor of batch_size) and add up: less
            memory, and on a CPU faster for networks of particles, whose pairs then fit into the cache. The loss is
            called on each part with a key of its own.
        ema_decay: the share of the average that one step keeps (`rnejax.training.ema`).
        steps_per_call: steps in one compiled call; between calls the host reports, saves and can be interrupted. More
            than one pays for small networks and on accelerators; on a CPU it makes convolutional networks some twenty
            times slower, since XLA has no fast gradient of a convolution inside a loop (jax issue 12868).
        evaluate: evaluate(averaged params) -> further metrics, computed at every report.
        report_every: steps between reports.
        folder: where to keep the state ("state.safetensors") and the metrics ("metrics.jsonl"). If a state is there
            already, the run goes on from it.
        save_every: steps between saves, a multiple of report_every.
        fingerprint: stored with the state and compared on resumption: a run with other settings must not go on from it.
        on_report: called with every report, beside the progress bar.
        progress: show a progress bar; default, only on a terminal.
        renew: renew(key, averaged params, data) -> data of the same shapes, for data that change with what is learned,
            such as a replay buffer; called every so many steps, before the step, and saved with the state.
        renew_every: steps between.

    Returns:
        FitResult.

    Raises:
        ValueError: sizes that do not fit.
        CheckpointError: the folder's state is of another architecture, optimiser or fingerprint.
        FloatingPointError: a loss became NaN or infinite; the last saved state stays.
    """
    num_examples = _check_sizes(data, num_steps, batch_size, steps_per_call, report_every, save_every, renew_every)
    parts = _num_parts(batch_size, microbatch_size)
    _check_loss(loss, key, params, data, batch_size)
    batch_key, step_key = jax.random.split(key)
    data = jax.tree.map(jnp.asarray, data)
    kept = None if renew is None else data  # what does not change is given again by whoever resumes
    state = FitState(jnp.zeros((), jnp.int32), params, params, optimizer.init(params), kept)
    path = None if folder is None else Path(folder) / "state.safetensors"
    metrics: list[dict[str, float]] = []
    if path is not None and path.exists():
        state, metrics = _resume(path, state, fingerprint)

    run_chunk = _make_chunk(loss, optimizer, step_key, ema_decay, parts)
    order = _Order(batch_key, num_examples, batch_size)
    renew_key = jax.random.fold_in(batch_key, num_examples)
    step, interrupted, started = int(state.step), False, time.perf_counter()
    totals: list[dict[str, jax.Array]] = []
    training = 0.0  # seconds of steps alone, since the last report
    with _Progress(num_steps, step, progress) as bar:
        try:
            while step < num_steps:
                # A chunk ends where something is due, so reports fall on the same steps after a resumption.
                due = [steps_per_call, report_every, save_every, *([] if renew is None else [renew_every])]
                until = min(num_steps, *(step - step % n + n for n in due))
                # The state is not donated: an interrupt between the call and the assignment must leave it readable.
                began = time.perf_counter()
                before = state
                if renew is not None and step % renew_every == 0:
                    # Not kept before the steps that see it: who goes on from here renews once, and not twice.
                    fresh = renew(jax.random.fold_in(renew_key, step), state.average, state.data)
                    before = state._replace(data=_renewed(fresh, state.data))
                examples = data if renew is None else before.data
                state, means = run_chunk(before, examples, order.batches(step, until))
                _check_finite(means, step)
                training += time.perf_counter() - began
                step = until
                totals.append(means)
                if step % report_every == 0 or step == num_steps:
                    report = _report(step, totals, time.perf_counter() - started, training, evaluate, state.average)
                    totals, training = [], 0.0
                    metrics.append(report)
                    bar.show(report)
                    if on_report is not None:
                        on_report(report)
                bar.advance(step)
                if path is not None and (step % save_every == 0 or step == num_steps):
                    _save(path, state, metrics, fingerprint)
        except KeyboardInterrupt:
            interrupted = True
            step = int(state.step)
    if interrupted:
        kept = "the weights so far are returned"
        if path is not None:
            _save(path, state, metrics, fingerprint)
            kept += f" and saved in {path.parent}; the same call goes on from there"
        warnings.warn(f"interrupted after {step} of {num_steps} steps: {kept}", stacklevel=2)
    return FitResult(state.params, state.average, metrics, interrupted)


def _make_chunk(
    loss: Loss, optimizer: optax.GradientTransformation, step_key: jax.Array, ema_decay: float, parts: int
) -> Callable:
    def objective(params: Any, key: jax.Array, batch: Any) -> tuple[jax.Array, dict[str, jax.Array]]:
        losses, named = _split(loss(key, params, batch))
        return jnp.mean(losses), {name: jnp.mean(each) for name, each in named.items()}

    def value_and_gradient(params: Any, key: jax.Array, batch: Any) -> Any:
        """((loss, its parts), gradient), means over the batch."""
        differentiate = jax.value_and_grad(objective, has_aux=True)
        if parts == 1:
            return differentiate(params, key, batch)

        def add(total: Any, part: tuple[jax.Array, Any]) -> tuple[Any, None]:
            return jax.tree.map(jnp.add, total, differentiate(params, *part)), None

        split = jax.tree.map(lambda leaf: leaf.reshape(parts, -1, *leaf.shape[1:]), batch)
        keys = jax.random.split(key, parts)
        shapes = jax.eval_shape(differentiate, params, keys[0], jax.tree.map(lambda leaf: leaf[0], split))
        nothing = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
        total, _ = jax.lax.scan(add, nothing, (keys, split))
        return jax.tree.map(lambda leaf: leaf / parts, total)

    @jax.jit
    def run_chunk(state: FitState, data: Any, indices: jax.Array) -> tuple[FitState, dict[str, jax.Array]]:
        def one_step(state: FitState, chosen: jax.Array) -> tuple[FitState, dict[str, jax.Array]]:
            batch = jax.tree.map(lambda leaf: leaf[chosen], data)
            key = jax.random.fold_in(step_key, state.step)
            (value, named), gradient = value_and_gradient(state.params, key, batch)
            updates, memory = optimizer.update(gradient, state.optimizer, state.params)
            params = optax.apply_updates(state.params, updates)
            average = ema_update(state.average, params, decay_at(state.step, ema_decay))
            means = {"loss": value, "gradient_norm": _norm(gradient), **named}
            return FitState(state.step + 1, params, average, memory, state.data), means

        if indices.shape[0] == 1:
            state, means = one_step(state, indices[0])
            return state, jax.tree.map(lambda leaf: leaf[None], means)
        return jax.lax.scan(one_step, state, indices)

    return run_chunk


def _renewed(fresh: Any, data: Any) -> Any:
    fresh = jax.tree.map(jnp.asarray, fresh)
    shapes = [jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), each) for each in (fresh, data)]
    if shapes[0] != shapes[1]:
        raise ValueError(f"renew must return data of the same structure, shapes and types: got {shapes[0]}")
    return fresh


def _norm(tree: Any) -> jax.Array:
    return jnp.sqrt(sum(jnp.sum(jnp.square(leaf)) for leaf in jax.tree.leaves(tree)))


class _Order:
    """Which examples each step sees: a random order per epoch, a function of the key and the step's number."""

    def __init__(self, key: jax.Array, num_examples: int, batch_size: int):
        self.key, self.num_examples, self.batch_size = key, num_examples, batch_size
        self.per_epoch = num_examples // batch_size
        self.epoch, self.permutation = -1, jnp.zeros(0, jnp.int32)

    def batches(self, first: int, last: int) -> jax.Array:
        """Indices for the steps first, ..., last - 1; shape (last - first, batch_size)."""
        return jnp.stack([self._batch(step) for step in range(first, last)])

    def _batch(self, step: int) -> jax.Array:
        epoch, position = divmod(step, self.per_epoch)
        if epoch != self.epoch:
            self.epoch = epoch
            self.permutation = jax.random.permutation(jax.random.fold_in(self.key, epoch), self.num_examples)
        return self.permutation[position * self.batch_size : (position + 1) * self.batch_size]


def _split(losses: Any) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Losses, and their named parts where there are any."""
    return losses if isinstance(losses, tuple) else (losses, {})


def _report(
    step: int,
    totals: list[dict[str, jax.Array]],
    seconds: float,
    training: float,
    evaluate: Callable | None,
    average: Any,
) -> dict[str, float]:
    """Means over the steps since the last report; `training` seconds were spent in them."""
    named = {name: jnp.concatenate([means[name] for means in totals]) for name in totals[0]}
    report: dict[str, float] = {"step": step} | {name: float(jnp.mean(values)) for name, values in named.items()}
    report["seconds"] = round(seconds, 2)
    report["seconds_per_step"] = float(f"{training / len(named['loss']):.3g}")
    if evaluate is not None:
        report |= {name: float(value) for name, value in evaluate(average).items()}
    return report


def _check_finite(means: dict[str, jax.Array], first_step: int) -> None:
    loss, norm = means["loss"], means["gradient_norm"]
    finite = jnp.isfinite(loss) & jnp.isfinite(norm)
    if not bool(jnp.all(finite)):
        index = int(jnp.argmin(finite))
        # A reward that is no number says so by its name.
        parts = {name: float(values[index]) for name, values in means.items()}
        wrong = {name: value for name, value in parts.items() if not math.isfinite(value)}
        broken = ", ".join(f"{name} {wrong[name]}" for name in wrong.keys() - {"loss", "gradient_norm"})
        raise FloatingPointError(
            f"the loss is {float(loss[index])} and its gradient's norm {float(norm[index])} at step "
            f"{first_step + index}{f' ({broken})' if broken else ''}: lower the learning rate, or look at what the "
            "loss does at the smallest noise levels"
        )


def _save(path: Path, state: FitState, metrics: list[dict[str, float]], fingerprint: Mapping[str, Any] | None) -> None:
    # The log first, and whole: a kill between the two leaves reports that resuming drops, never a state without them.
    path.parent.mkdir(parents=True, exist_ok=True)
    log = path.parent / "metrics.jsonl"
    part = log.with_suffix(".part")
    part.write_text("".join(json.dumps(report) + "\n" for report in metrics))
    os.replace(part, log)
    save_arrays(path, state._asdict(), {"step": int(state.step), "fingerprint": dict(fingerprint or {})})


def check_state(folder: str | Path, fingerprint: Mapping[str, Any]) -> None:
    """Raises CheckpointError where `fit` would refuse to go on from the state in a folder: before anything is done."""
    path = Path(folder) / "state.safetensors"
    if path.exists():
        _check_fingerprint(path, load_metadata(path), fingerprint)


def _resume(
    path: Path, like: FitState, fingerprint: Mapping[str, Any] | None
) -> tuple[FitState, list[dict[str, float]]]:
    tree, metadata = load_arrays(path, like._asdict())
    _check_fingerprint(path, metadata, fingerprint)
    log = path.parent / "metrics.jsonl"
    reports = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    return FitState(**tree), [report for report in reports if report["step"] <= metadata["step"]]


def _check_fingerprint(path: Path, metadata: Mapping[str, Any], fingerprint: Mapping[str, Any] | None) -> None:
    wanted = json.loads(json.dumps(dict(fingerprint or {})))
    stored = metadata.get("fingerprint", {})
    differing = sorted(name for name in wanted.keys() | stored.keys() if wanted.get(name) != stored.get(name))
    if differing:
        raise CheckpointError(
            f"{path} was made with other settings: "
            + ", ".join(f"{name} was {stored.get(name)!r}, now {wanted.get(name)!r}" for name in differing)
            + "; choose another folder, or delete this one to start afresh"
        )


def _check_sizes(
    data: Any,
    num_steps: int,
    batch_size: int,
    steps_per_call: int,
    report_every: int,
    save_every: int,
    renew_every: int,
) -> int:
    sizes = sorted({jnp.shape(leaf)[0] if jnp.ndim(leaf) else 0 for leaf in jax.tree.leaves(data)})
    if len(sizes) != 1 or sizes[0] == 0:
        raise ValueError(f"the arrays of data must share a leading axis of examples: got leading sizes {sizes}")
    for name, value in {
        "num_steps": num_steps,
        "batch_size": batch_size,
        "steps_per_call": steps_per_call,
        "report_every": report_every,
        "save_every": save_every,
        "renew_every": renew_every,
    }.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1: got {value}")
    if save_every % report_every:
        raise ValueError(
            f"save_every must be a multiple of report_every, so that a resumed run reports the same: got {save_every} "
            f"and {report_every}"
        )
    if batch_size > sizes[0]:
        raise ValueError(f"batch_size must not exceed the number of examples, {sizes[0]}: got {batch_size}")
    return sizes[0]


def _num_parts(batch_size: int, microbatch_size: int | None) -> int:
    if microbatch_size is None:
        return 1
    if microbatch_size < 1 or batch_size % microbatch_size:
        raise ValueError(f"microbatch_size must divide batch_size = {batch_size}: got {microbatch_size}")
    return batch_size // microbatch_size


def _check_loss(loss: Loss, key: jax.Array, params: Any, data: Any, batch_size: int) -> None:
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((batch_size, *leaf.shape[1:]), leaf.dtype), data)
    losses, named = _split(jax.eval_shape(loss, key, params, shapes))
    for each in (losses, *named.values()):
        if each.shape != (batch_size,):
            raise ValueError(f"loss must return one number per example, shape ({batch_size},): got {each.shape}")


class _Progress:
    """A tqdm bar if wanted and there is a terminal; otherwise silence."""

    def __init__(self, total: int, start: int, show: bool | None):
        self.bar = None
        if show or (show is None and sys.stderr.isatty()):
            from tqdm import tqdm

            self.bar = tqdm(total=total, initial=start, unit="step")

    def __enter__(self) -> "_Progress":
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.close()

    def show(self, report: Mapping[str, float]) -> None:
        if self.bar is not None:
            shown = {name: f"{value:.4g}" for name, value in report.items() if name != "step" and math.isfinite(value)}
            self.bar.set_postfix(shown)

    def advance(self, step: int) -> None:
        if self.bar is not None:
            self.bar.update(step - self.bar.n)
