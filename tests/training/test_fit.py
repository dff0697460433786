"""The training loop: it learns, resumes as if nothing had happened, keeps what it had, and says what is wrong."""

import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rnejax.checkpoint import CheckpointError
from rnejax.training import fit, make_optimizer

DATA = {"x": jnp.linspace(-1.0, 1.0, 40), "y": 3.0 * jnp.linspace(-1.0, 1.0, 40) + 1.0}
START = {"slope": jnp.float32(0.0), "offset": jnp.float32(0.0)}
SIZES = {"num_steps": 40, "batch_size": 8, "report_every": 10, "save_every": 10}


def loss(key, params, batch):
    noise = 0.1 * jax.random.normal(key, batch["x"].shape)
    return jnp.square(params["slope"] * batch["x"] + params["offset"] + noise - batch["y"])


def run(key=0, loss=loss, params=START, data=DATA, **options):
    options = SIZES | options
    return fit(jax.random.key(key), loss, params, data, optax.adam(0.1), **options)


def losses(result):
    return [report["loss"] for report in result.metrics]


def test_it_finds_the_line():
    result = run(num_steps=400, report_every=100, save_every=100)
    # Least squares on noise of 0.1: 400 steps of Adam end well within a tenth of the answer.
    np.testing.assert_allclose([result.params["slope"], result.params["offset"]], [3.0, 1.0], atol=0.1)
    np.testing.assert_allclose([result.average["slope"], result.average["offset"]], [3.0, 1.0], atol=0.5)


def test_the_same_key_gives_the_same_run_and_another_key_another():
    assert losses(run()) == losses(run())
    assert losses(run()) != losses(run(key=1))


def test_steps_in_one_call_change_nothing():
    np.testing.assert_allclose(losses(run(steps_per_call=7)), losses(run()), rtol=1e-5)


def test_a_resumed_run_is_the_run_that_was_not_stopped(tmp_path):
    whole = run(folder=tmp_path / "whole")
    run(folder=tmp_path / "parts", num_steps=20)
    resumed = run(folder=tmp_path / "parts")
    assert losses(resumed) == losses(whole)
    jax.tree.map(np.testing.assert_array_equal, resumed.params, whole.params)
    jax.tree.map(np.testing.assert_array_equal, resumed.average, whole.average)


def test_an_interrupted_run_keeps_what_it_had_and_goes_on(tmp_path):
    def interrupt(report):
        if report["step"] == 20:
            raise KeyboardInterrupt

    with pytest.warns(UserWarning, match="interrupted after 20 of 40 steps.*saved in"):
        stopped = run(folder=tmp_path, on_report=interrupt)
    assert stopped.interrupted
    assert [report["step"] for report in stopped.metrics] == [10, 20]
    resumed = run(folder=tmp_path)
    assert not resumed.interrupted
    assert losses(resumed) == losses(run())


@pytest.mark.parametrize("stop", [15, 20, 30])
def test_data_that_change_are_part_of_the_state(tmp_path, stop):
    """Renewed every ten steps by noise and by the weights; stopped anywhere, the run goes on as if it had not been."""
    calls = []

    def renew(key, average, data):
        calls.append(0)
        return data | {"y": data["y"] + average["offset"] + 0.1 * jax.random.normal(key, data["y"].shape)}

    options = {"renew": renew, "renew_every": 10, "report_every": 5, "save_every": 5}
    whole = run(**options)
    assert len(calls) == 4
    assert losses(whole) != losses(run(report_every=5, save_every=5))
    if stop == 30:  # in the middle of things, by hand

        def interrupt(report):
            if report["step"] == stop:
                raise KeyboardInterrupt

        with pytest.warns(UserWarning, match="interrupted after 30"):
            run(folder=tmp_path, on_report=interrupt, **options)
    else:
        run(folder=tmp_path, num_steps=stop, **options)
    resumed = run(folder=tmp_path, **options)
    assert losses(resumed) == losses(whole)
    jax.tree.map(np.testing.assert_array_equal, resumed.params, whole.params)


def test_renewed_data_keep_their_shapes():
    with pytest.raises(ValueError, match="renew must return data of the same structure, shapes and types"):
        run(renew=lambda key, average, data: data | {"y": data["y"][:20]})


def test_every_epoch_sees_every_example_once():
    seen = []

    def spy(key, params, batch):
        jax.debug.callback(lambda x: seen.append(np.asarray(x)), batch["x"], ordered=True)
        return loss(key, params, batch)

    run(loss=spy, num_steps=10)
    jax.effects_barrier()
    epochs = [np.concatenate(seen[first : first + 5]) for first in (0, 5)]
    for epoch in epochs:
        np.testing.assert_array_equal(np.sort(epoch), DATA["x"])
    assert not np.array_equal(*epochs)


def test_every_step_has_noise_of_its_own():
    def noise(key, params, batch):
        return jax.random.uniform(key, batch["x"].shape) + 0.0 * params["slope"]

    assert len(set(losses(run(loss=noise, num_steps=10, report_every=1, save_every=1)))) == 10


def test_evaluation_sees_the_average_and_lands_in_the_metrics(tmp_path):
    result = run(evaluate=lambda average: {"slope": average["slope"]}, folder=tmp_path)
    assert result.metrics[-1]["slope"] == float(result.average["slope"])
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == result.metrics


@pytest.mark.parametrize("survivor", ["log", "state"])
def test_a_kill_while_saving_changes_nothing(tmp_path, monkeypatch, survivor):
    """Killed before either file is in its place: the run goes on from the state before, to the same losses."""
    module = sys.modules["rnejax.training.fit"]
    whole = run(num_steps=30)
    run(folder=tmp_path, num_steps=10)
    with monkeypatch.context() as broken:

        def killed(*arguments):
            raise SystemExit("killed")

        if survivor == "log":  # the log of step 20 is written, its state is not
            broken.setattr(module, "save_arrays", killed)
        else:  # neither is: half a log must not be in the place of the whole one
            broken.setattr(module.os, "replace", killed)
        with pytest.raises(SystemExit):
            run(folder=tmp_path, num_steps=30)
    assert losses(run(folder=tmp_path, num_steps=30)) == losses(whole)


def test_other_settings_must_not_go_on_from_a_state(tmp_path):
    run(folder=tmp_path, fingerprint={"width": 32, "seed": 0}, num_steps=10)
    with pytest.raises(CheckpointError, match=r"width was 32, now 64.*another folder"):
        run(folder=tmp_path, fingerprint={"width": 64, "seed": 0})


def test_a_state_of_another_architecture_is_an_error(tmp_path):
    run(folder=tmp_path, num_steps=10)

    def other_loss(key, params, batch):
        return loss(key, params["inner"], batch)

    with pytest.raises(CheckpointError, match="another architecture"):
        run(folder=tmp_path, params={"inner": START}, loss=other_loss)


def test_a_loss_that_is_not_a_number_stops_the_run_and_names_the_step(tmp_path):
    def breaks(key, params, batch):
        return loss(key, params, batch) + jnp.where(params["slope"] > 1.0, jnp.nan, 0.0)

    with pytest.raises(FloatingPointError, match=r"the loss is nan .* at step 1[0-9]"):
        run(loss=breaks, folder=tmp_path)
    saved = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])
    assert saved["step"] == 10


def test_a_loss_that_is_already_averaged_is_an_error():
    with pytest.raises(ValueError, match=r"one number per example, shape \(8,\): got \(\)"):
        run(loss=lambda key, params, batch: loss(key, params, batch).mean())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 41}, "batch_size must not exceed the number of examples, 40: got 41"),
        ({"num_steps": 0}, "num_steps must be at least 1: got 0"),
        ({"microbatch_size": 3}, "microbatch_size must divide batch_size = 8: got 3"),
        ({"report_every": 7}, "save_every must be a multiple of report_every"),
        (
            {"data": {"x": jnp.zeros(3), "y": jnp.zeros(4)}},
            r"share a leading axis of examples: got leading sizes \[3, 4\]",
        ),
    ],
)
def test_sizes_that_do_not_fit_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        run(**options)


def test_it_is_silent_when_there_is_no_terminal(capfd):
    run()
    captured = capfd.readouterr()
    assert captured.out + captured.err == ""


def test_a_progress_bar_can_be_asked_for(capfd):
    run(progress=True)
    assert "40/40" in capfd.readouterr().err


def test_the_usual_optimizer_fits_too():
    result = fit(jax.random.key(0), loss, START, DATA, make_optimizer(0.1, num_steps=40, warmup_steps=5), **SIZES)
    assert losses(result)[-1] < losses(result)[0]


def test_gradients_in_parts_are_the_gradient_of_the_whole():
    def exact(key, params, batch):
        return jnp.square(params["slope"] * batch["x"] + params["offset"] - batch["y"])

    whole, parts = run(loss=exact), run(loss=exact, microbatch_size=2)
    np.testing.assert_allclose(losses(parts), losses(whole), rtol=1e-4)
    np.testing.assert_allclose(parts.params["slope"], whole.params["slope"], rtol=1e-4)


@pytest.mark.parametrize("microbatch_size", [None, 2])
def test_named_parts_of_a_loss_are_reported_as_means(microbatch_size):
    def named(key, params, batch):
        square, offset = loss(key, params, batch), jnp.broadcast_to(params["offset"], batch["x"].shape)
        return square + 0 * offset, {"square": square, "offset": offset}

    plain, parts = (run(loss=each, microbatch_size=microbatch_size) for each in (loss, named))
    np.testing.assert_allclose(losses(parts), losses(plain), rtol=1e-5)
    np.testing.assert_allclose([report["square"] for report in parts.metrics], losses(plain), rtol=1e-5)
    offsets = [report["offset"] for report in parts.metrics]
    assert offsets[0] < offsets[-1], "the offset grows from 0 towards 1"
    assert all(report["seconds_per_step"] > 0 for report in plain.metrics)


def test_a_part_that_is_averaged_already_is_an_error():
    with pytest.raises(ValueError, match=r"one number per example, shape \(8,\): got \(\)"):
        run(loss=lambda key, params, batch: (loss(key, params, batch), {"mean": jnp.zeros(())}))


def test_parts_have_noise_of_their_own():
    """Were the same key used for all parts, the noise would not average out between them."""

    def noise(key, params, batch):
        return params["slope"] + 0 * batch["x"] + jax.random.normal(key)

    one, many = (
        np.asarray([report["loss"] for report in run(loss=noise, report_every=1, save_every=1, **part).metrics])
        for part in ({}, {"microbatch_size": 1})
    )
    # Differences from step to step leave out what Adam does to the slope: eight parts, a variance eight times smaller.
    assert np.diff(many).std() < 0.6 * np.diff(one).std()
