import dataclasses
import struct

import matplotlib.figure
import pytest

from tests.report.examples import example, example_profiles, weight
from tfcompress import report
from tfcompress.measure import Profile
from tfcompress.report import figures, plots

ALL = [
    plots.accuracy_vs_size,
    plots.accuracy_vs_latency,
    plots.layer_sparsity,
    plots.weight_histograms,
]


def png_size(path) -> tuple[int, int]:
    header = path.read_bytes()[:24]
    assert header[:8] == b"\x89PNG\r\n\x1a\n"
    return struct.unpack(">II", header[16:])


@pytest.mark.parametrize("plot", ALL)
def test_every_plot_writes_a_png(plot, tmp_path):
    assert plot(example_profiles(), tmp_path / "p.png") == tmp_path / "p.png"
    width, height = png_size(tmp_path / "p.png")
    assert width > 600 and height > 250


@pytest.mark.parametrize("plot", ALL)
def test_profiles_without_the_numbers_are_refused(plot, tmp_path):
    with pytest.raises(ValueError, match="None of the 1 profiles has .* Measure"):
        plot([Profile("net", "original", "keras")], tmp_path / "p.png")
    assert not (tmp_path / "p.png").exists()


def drawn(drawing: figures.Drawing, profile: Profile) -> list:
    """The axes of a drawing of one profile."""
    figure = matplotlib.figure.Figure()
    drawing.draw(figure, [profile], figures.styles([profile]))
    return figure.axes


@pytest.mark.parametrize(
    ("drawing", "x"), [(figures.ACCURACY_VS_SIZE, 200_000), (figures.ACCURACY_VS_LATENCY, 0.4)]
)
def test_a_single_profile_is_a_point(drawing, x):
    (axes,) = drawn(drawing, example_profiles()[0])
    assert [line.get_xydata().tolist() for line in axes.lines] == [[[x, 92.0]]]
    assert axes.get_xlim()[0] < x < axes.get_xlim()[1]


def test_a_single_profile_is_a_bar_for_each_layer():
    (axes,) = drawn(figures.LAYER_SPARSITY, example_profiles()[1])
    assert [bar.get_width() for bar in axes.patches] == [50.0, 25.0]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["a/kernel", "b/kernel"]


def test_a_single_profile_is_a_histogram_for_each_layer():
    found = drawn(figures.WEIGHT_HISTOGRAMS, example_profiles()[1])
    counts = [[patch.get_data().values.tolist() for patch in axes.patches] for axes in found]
    assert counts == [[[25, 50, 25]], [[37, 25, 38]]]


@pytest.mark.parametrize("plot", ALL)
def test_a_single_profile_is_enough_for_a_file(plot, tmp_path):
    assert png_size(plot(example_profiles()[:1], tmp_path / "p.png"))[0] > 600


def test_a_colour_is_a_variant_and_a_marker_a_tool():
    used = figures.styles(example_profiles())
    assert list(used.colours) == ["original", "pruned [50%] $x$ <b>"]
    assert len(set(used.colours.values())) == 2
    assert len(set(used.markers.values())) == len(used.markers) == 2


def test_layers_are_aligned_by_position_or_by_path():
    original = example("m", "original", "keras", 1, 1.0)
    renamed = dataclasses.replace(original, layers=(weight("x", 10), weight("y", 20)))
    found = figures.aligned(original, renamed)
    assert {path: layer.path for path, layer in found.items()} == {"a/kernel": "x", "b/kernel": "y"}
    shrunk = dataclasses.replace(original, layers=(weight("b/kernel", 10, (100, 1)),))
    assert list(figures.aligned(original, shrunk)) == ["b/kernel"]


def test_files_are_left_out_where_layers_are_compared():
    assert [p.tool for p in figures.comparable(example_profiles())] == ["keras"] * 3


def measured(num_weights=2, **changes):
    """What `Sensitivity.get_config()` gives; the last weight is the most sensitive."""
    values = {f"net/layer_{i}/kernel": (0.9, 0.9 - 0.01 * i) for i in range(num_weights)}
    config = {
        "metric": "accuracy", "higher_is_better": True, "baseline": 0.91,
        "sparsities": (0.5, 0.9), "values": values, "sizes": dict.fromkeys(values, 100),
    }  # fmt: skip
    return config | changes


def test_a_sensitivity_is_a_line_for_each_weight_from_the_dashed_baseline():
    shown = figures.curves(measured())
    figure = matplotlib.figure.Figure()
    figures.SENSITIVITY.draw(figure, shown, figures.SENSITIVITY.styles(shown))
    (axes,) = figure.axes
    first, second, baseline = axes.lines
    assert first.get_xydata().tolist() == [[0, 0.91], [50, 0.9], [90, 0.9]]
    assert second.get_xydata().tolist() == [[0, 0.91], [50, 0.9], [90, 0.89]]
    assert baseline.get_linestyle() == "--" and baseline.get_ydata() == [0.91, 0.91]
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels == ["layer_1/kernel", "layer_0/kernel", "not pruned"]
    assert axes.get_ylabel() == "accuracy (higher is better)"


def test_the_most_sensitive_have_a_colour_and_the_others_are_counted():
    shown = figures.curves(measured(15))
    used = figures.SENSITIVITY.styles(shown)
    coloured = [path for path, colour in used.colours.items() if colour != "#8a93a3"]
    assert coloured == [f"net/layer_{i}/kernel" for i in range(5, 15)]
    figure = matplotlib.figure.Figure()
    figures.SENSITIVITY.draw(figure, shown, used)
    assert "5 less sensitive" in [text.get_text() for text in figure.legends[0].get_texts()]


def test_of_a_loss_the_highest_is_the_most_sensitive():
    values = {"a": (1.0, 2.0), "b": (1.0, 5.0)}
    shown = figures.curves(measured(higher_is_better=False, values=values))
    assert shown.most_sensitive == ["b", "a"]


def test_a_sensitivity_is_written_as_png_and_anything_else_refused(tmp_path):
    assert png_size(plots.sensitivity(measured(), tmp_path / "s.png"))[0] > 600
    with pytest.raises(ValueError, match="Expected the result of tfcompress.sensitivity.*got list"):
        plots.sensitivity([1, 2], tmp_path / "no.png")
    assert not (tmp_path / "no.png").exists()


def test_the_page_shows_a_sensitivity_with_a_text_for_it(tmp_path):
    config = measured(metric="<accuracy>")
    without = report.html(example_profiles()[:1], tmp_path / "a.html").read_text()
    page = report.html(example_profiles()[:1], tmp_path / "b.html", sensitivity=config).read_text()
    assert page.count("<svg") == without.count("<svg") + 1
    assert page.count("<svg") == page.count('<svg role="img" aria-label="')
    assert "most sensitive first: net/layer_1/kernel, net/layer_0/kernel" in page
    assert "<accuracy>" not in page and "&lt;accuracy&gt; against the zeros" in page
