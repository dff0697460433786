"""Filling in blanks, against conditionals by counting."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rnejax as rj
from rnejax.systems.token_law import TokenLaw

KEY = jax.random.key(0)
LAW = TokenLaw.random(0, 3, 5)
MASK = 3
TEMPLATE = np.asarray([MASK, 1, MASK, 0, MASK])
FITS = np.all((TEMPLATE == MASK) | (LAW.sequences == TEMPLATE), axis=1)
QUIET = {"progress": False}


def conditional(exponent=1.0):
    """log of p(x)^exponent among the sequences that fit, unnormalised; -inf elsewhere. And log p(given)."""
    given = np.logaddexp.reduce(LAW.log_probs[FITS])
    return np.where(FITS, exponent * (LAW.log_probs - given), -np.inf)


def test_one_token_per_step_blanks_have_their_conditional_law_and_density():
    model = rj.infill(LAW.one_by_one(), TEMPLATE)
    times = rj.time_grid(model.process, 3, t_max=3)
    samples = rj.sample(KEY, model, times, 4000, **QUIET)
    x = np.asarray(samples.x)
    assert np.all(x[:, [1, 3]] == [1, 0])
    np.testing.assert_allclose(samples.log_density, conditional()[LAW.index(x)], atol=1e-5)
    # Of n draws its mean is at most sum sqrt(p (1 - p) / n) / 2, and one draw moves it by 1 / n: sd < 1 / sqrt(4 n).
    p = np.exp(conditional())
    mean = 0.5 * np.sum(np.sqrt(p * (1 - p) / 4000))
    assert LAW.total_variation(conditional(), x) < mean + 4 * 0.5 / np.sqrt(4000)


@pytest.mark.parametrize("proposal", ["locally_optimal", "base"])
def test_steering_what_is_filled_in_has_the_normaliser_of_the_blanks(proposal):
    """sum over blanks of p(blanks | given)^2, unbiased over 300 runs."""
    model = rj.infill(LAW.one_by_one(), TEMPLATE)
    times = rj.time_grid(model.process, 3, t_max=3)
    target = rj.temper(model, 2.0)
    result = rj.steer(KEY, target, times, 16, proposal=proposal, num_groups=300, warn=False, **QUIET)
    z = np.exp(np.asarray(result.log_normalizer, np.float64) - np.logaddexp.reduce(conditional(2.0)))
    assert abs(z.mean() - 1) < 4 * z.std(ddof=1) / np.sqrt(300) + 1e-5
    weights = result.log_weights + result.log_normalizer[:, None]
    # What each sequence weighs, unbiased, in units of its standard error over the runs; of one that is too rare to have
    # been seen, that of 16 particles of equal weight.
    exact, index, shares = np.exp(conditional(2.0)), LAW.index(result.particles), np.exp(np.asarray(weights)) / 16
    for sequence in np.flatnonzero(FITS):
        found = np.sum(shares * (index == sequence), axis=1)
        deviation = max(found.std(ddof=1), np.sqrt(exact.sum() * exact[sequence] / 16))
        assert abs(found.mean() - exact[sequence]) < 4.5 * deviation / np.sqrt(300)
    found = np.asarray(result.log_densities)[..., 0]
    np.testing.assert_allclose(found, conditional()[LAW.index(result.particles)], atol=1e-5)


def test_many_tokens_per_step_come_closer_with_the_number_of_steps():
    model = rj.infill(LAW.masked(), TEMPLATE)
    distances = [
        LAW.total_variation(conditional(), rj.sample(KEY, model, rj.time_grid(model.process, n), 20_000, **QUIET).x)
        for n in (1, 64)
    ]
    assert distances[1] < 0.5 * distances[0]


@pytest.mark.parametrize("renoise", [None, rj.control.Remask(0.3)])
@pytest.mark.parametrize("options", [{}, {"proposal": rj.control.Candidates(3)}])
def test_steering_many_tokens_per_step_leaves_what_is_given_and_has_the_normaliser(renoise, options):
    """Of tokens that know nothing of each other, for which a step that reveals several is exact."""
    rows = np.log(np.random.default_rng(0).dirichlet(np.ones(3), 5))
    model = rj.DiffusionModel(rj.processes.Masked(3, 5), lambda x, t: jnp.asarray(rows))
    exact = np.logaddexp.reduce(2 * rows[TEMPLATE == MASK], axis=1).sum()
    target, times = rj.temper(rj.infill(model, TEMPLATE), 2.0), rj.time_grid(model.process, 4)
    result = rj.steer(KEY, target, times, 16, num_groups=300, renoise=renoise, warn=False, **QUIET, **options)
    assert np.all(np.asarray(result.particles)[..., [1, 3]] == [1, 0])
    z = np.exp(np.asarray(result.log_normalizer, np.float64) - exact)
    assert abs(z.mean() - 1) < 4 * z.std(ddof=1) / np.sqrt(300) + 1e-5


def test_another_template_recompiles_nothing():
    model = LAW.one_by_one()
    times = rj.time_grid(model.process, 3, t_max=3)
    traces = []

    def fn(x, t):
        traces.append(1)
        return LAW.conditional(x)

    model = rj.DiffusionModel(model.process, fn)
    first, second = (rj.infill(model, template) for template in (TEMPLATE, np.asarray([0, MASK, MASK, MASK, 2])))
    rj.sample(KEY, first, times, 4, **QUIET)
    before = len(traces)
    rj.sample(KEY, second, times, 4, **QUIET)
    assert len(traces) == before


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: rj.infill(LAW.uniform(), TEMPLATE), "only masked tokens can be filled in"),
        (lambda: rj.infill(LAW.masked(), np.zeros(5, int)), "template has no blank"),
        (lambda: rj.infill(LAW.masked(), TEMPLATE[None]), r"template must have shape \(5,\), .* got \(1, 5\)"),
        (lambda: rj.infill(LAW.masked(), []), r"template must have shape \(5,\), .* got \(0,\)"),
        (lambda: rj.infill(LAW.masked(), np.asarray([4, 3, 3, 3, 3])), r"template\[0\] is 4"),
        (
            lambda: rj.sample(KEY, rj.infill(LAW.one_by_one(), TEMPLATE), np.arange(6.0), 4),
            "the template has 3 blanks, so one token per step starts at t = 3",
        ),
        (
            lambda: rj.steer(KEY, rj.product([rj.infill(LAW.masked(), TEMPLATE), LAW.masked()]), np.asarray([0, 1.0])),
            "given the same template",
        ),
        (
            lambda: rj.log_density(KEY, rj.infill(LAW.masked(), TEMPLATE), LAW.sequences, np.asarray([0, 1.0]), 2),
            "those of a template are given",
        ),
    ],
)
def test_what_makes_no_sense_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_template_is_a_law_of_one_state():
    model = rj.infill(LAW.masked(), TEMPLATE)
    prior = model.prior_at(model.process.level(1.0))
    assert float(prior.log_prob(jnp.asarray(TEMPLATE))) == 0
    assert float(prior.log_prob(jnp.asarray(LAW.sequences[0]))) == -np.inf
