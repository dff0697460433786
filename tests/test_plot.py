"""Pictures: that they show what they are given, and that drawing one leaves nothing behind."""

import subprocess
import sys
import types

import numpy as np
import pytest

from rnejax import plot


def info(num_steps=6, num_particles=8, groups=None):
    """What `traces` reads of a run, with a resampling at the third step."""
    shape = (num_steps,) if groups is None else (groups, num_steps)
    ones = np.ones(shape)
    return types.SimpleNamespace(
        time=np.linspace(1.0, 0.0, num_steps),
        ess=num_particles * ones,
        resampled=np.broadcast_to(np.arange(num_steps) == 2, shape),
        log_normalizer_increments=0.5 * ones,
        unique_ancestors=num_particles * ones,
    )


def test_a_sheet_shows_every_image_at_its_place():
    images = np.arange(5 * 2 * 2).reshape(5, 2, 2) / 19.0
    figure = plot.sample_sheet(images, columns=3, value_range=(0.0, 1.0))
    shown = figure.axes[0].images[0].get_array()
    assert shown.shape == (4, 6)
    np.testing.assert_allclose(shown[:2, 4:], images[2])
    np.testing.assert_allclose(shown[2:, :2], images[3])
    np.testing.assert_array_equal(shown[2:, 4:], 1.0)  # there is no sixth image


def test_values_outside_the_range_show_as_black_and_white():
    figure = plot.sample_sheet(np.array([[[-3.0, 3.0]]]), value_range=(-1.0, 1.0))
    np.testing.assert_array_equal(figure.axes[0].images[0].get_array(), [[0.0, 1.0]])


def test_captions_stand_under_their_images():
    figure = plot.sample_sheet(np.zeros((3, 8, 8, 1)), ["a", "b", "c"], columns=2)
    texts = {text.get_text(): text.get_position() for text in figure.axes[0].texts}
    assert texts["a"][0] == texts["c"][0] == 4.0
    assert texts["b"][0] == 12.0
    assert texts["a"][1] == texts["b"][1] < texts["c"][1]


@pytest.mark.parametrize("images", [np.zeros((0, 4, 4)), np.zeros((4, 4)), np.zeros((2, 4, 4, 2))])
def test_what_is_no_image_is_refused_with_its_shape(images):
    with pytest.raises(ValueError, match="images must have shape"):
        plot.sample_sheet(images)


def test_captions_must_match_images():
    with pytest.raises(ValueError, match="got 1 labels for 2 images"):
        plot.sample_sheet(np.zeros((2, 4, 4)), ["a"])


def test_the_log_normalising_constant_is_drawn_as_the_sum_of_its_increments():
    figure = plot.traces(info(), num_particles=8, ess_threshold=0.5)
    np.testing.assert_allclose(figure.axes[1].lines[0].get_ydata(), 0.5 * np.arange(1, 7))


def test_resamplings_are_marked_at_their_time():
    figure = plot.traces(info(), num_particles=8)
    marks = [line for line in figure.axes[0].lines if line.get_marker() == "|"]
    np.testing.assert_allclose(marks[0].get_xdata(), [0.6])


def test_groups_are_drawn_as_one_line_each():
    figure = plot.traces(info(groups=3), num_particles=8)
    assert len(figure.axes[1].lines) == 3


def test_weights_are_shown_as_shares_that_sum_to_one():
    figure = plot.weights(np.array([-1000.0, -1001.0, -np.inf]))
    shares = figure.axes[0].lines[0].get_ydata()
    np.testing.assert_allclose(shares, [1 / (1 + np.exp(-1)), np.exp(-1) / (1 + np.exp(-1)), 0.0], rtol=1e-6)


def test_the_genealogy_counts_the_initial_particles_that_have_descendants():
    ancestors = np.array([[0, 1, 2, 3], [0, 0, 2, 2], [1, 1, 1, 1]])  # all descend from 0
    title = plot.genealogy(ancestors).axes[0].get_title()
    assert title == "1 of 4 initial particles have descendants at the end"


def test_the_genealogy_draws_every_step_of_every_particle_once():
    ancestors = np.random.default_rng(0).integers(0, 5, size=(4, 5))
    extinct, surviving = plot.genealogy(ancestors).axes[0].collections
    assert len(extinct.get_segments()) + len(surviving.get_segments()) == 4 * 5


@pytest.mark.parametrize("ancestors", [np.array([[0, 2]]), np.array([[-1, 0]]), np.zeros((2, 2)), np.zeros(3, int)])
def test_what_is_no_genealogy_is_refused(ancestors):
    with pytest.raises(ValueError, match="ancestors must be"):
        plot.genealogy(ancestors)


def test_a_histogram_leaves_no_value_out_silently():
    figure = plot.log_density_histogram({"a": np.array([0.0, 1.0, np.nan, -np.inf])}, bins=4)
    ax = figure.axes[0]
    assert ax.get_legend().get_texts()[0].get_text() == "a (2 not finite)"


def test_a_histogram_is_drawn_over_the_range_of_the_group_asked_for():
    """What is far off is counted in the legend and does not squeeze the rest."""
    groups = {"reference": np.linspace(0.0, 1.0, 1001), "model": np.r_[np.linspace(0.0, 1.0, 99), 1e6]}
    low, high = (plot.histograms(groups, over=over, xlabel="x").axes[0].get_xlim()[1] for over in ("reference", None))
    assert low < 1.5 < 1e5 < high
    labels = [t.get_text() for t in plot.histograms(groups, over="reference", xlabel="x").axes[0].get_legend().texts]
    assert labels == ["reference", "model (1 % outside)"]
    assert plot.histograms({"model": [0.0, 1.0]}, over="reference", xlabel="x").axes[0].get_xlim()[1] > 0.9


def test_a_histogram_of_nothing_is_an_error():
    with pytest.raises(ValueError, match="no finite value"):
        plot.log_density_histogram({"a": [np.nan]})


def test_a_logarithmic_axis_within_one_decade_has_numbers():
    figure = plot.curves([1, 2, 4], {"error": [1.5, 2.5, 6.0]}, xlabel="n", ylabel="error", log=True, log_x=True)
    figure.canvas.draw()
    labels = [label.get_text() for label in figure.axes[0].yaxis.get_minorticklabels()]
    assert sum(bool(label) for label in labels) >= 2
    assert [label.get_text() for label in figure.axes[0].get_xticklabels()] == ["1", "2", "4"]


def test_the_colours_of_a_ramachandran_plot_span_one_group():
    even, uneven = np.full((4, 4), 1 / 16), np.full((4, 4), 1e-9)
    even[0, 0] = 2 / 16
    uneven[0, 0] = 1.0
    groups = {"weighted": uneven, "reference": even}
    for over, highest in ((None, np.log(1e9)), ("nobody", np.log(1e9)), ("reference", np.log(2))):
        (image,) = plot.ramachandran(groups, over=over).axes[0].images
        assert image.get_clim() == pytest.approx((0, highest))


def test_lines_join_the_values_that_are_there():
    groups = {"plain": [1.0, np.nan, 4.0], "barred": [np.nan, 2.0, 3.0]}
    figure = plot.curves([1, 2, 4], groups, errors={"barred": [np.nan, 0.5, 0.2]}, xlabel="n", ylabel="error", log=True)
    lines = {line.get_label(): line for line in figure.axes[0].lines if not line.get_label().startswith("_")}
    np.testing.assert_array_equal(lines["plain"].get_xydata(), [[1, 1], [4, 4]])
    (bars,) = figure.axes[0].containers
    np.testing.assert_array_equal(bars.lines[0].get_xydata(), [[2, 2], [4, 3]])
    figure.canvas.draw()
    assert "1" in [label.get_text() for label in figure.axes[0].get_yticklabels()]


def test_drawing_neither_needs_a_display_nor_keeps_figures_open(tmp_path):
    code = (
        "import sys, numpy as np; from rnejax import plot\n"
        f"plot.save(plot.weights(np.zeros(4)), {str(tmp_path / 'w.png')!r})\n"
        "print('matplotlib.pyplot' in sys.modules)"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert shown.stdout.strip() == "False"
    assert (tmp_path / "w.png").stat().st_size > 0


def test_rows_that_mean_the_same_are_labelled_once():
    images = np.zeros((6, 4, 4))
    figure = plot.compare_sheets({"a": images, "b": images}, columns=3, row_labels=["first", "second"])
    assert [text.get_text() for text in figure.axes[0].texts] == ["first", "second"]
    assert not figure.axes[1].texts
    with pytest.raises(ValueError, match="got 1 labels for 2 rows"):
        plot.compare_sheets({"a": images}, columns=3, row_labels=["first"])


def test_a_long_title_is_broken_into_lines_that_fit():
    figure = plot.sample_sheet(np.zeros((4, 4, 4)), columns=4, title="a bold slanted seven, a thin upright three")
    assert figure.get_suptitle().split("\n") == ["a bold slanted seven, a thin", "upright three"]
