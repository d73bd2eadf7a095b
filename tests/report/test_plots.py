import dataclasses
import struct

import pytest

from tests.report.examples import example, example_profiles, weight
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


def test_a_single_profile_is_enough(tmp_path):
    for plot in ALL:
        png_size(plot(example_profiles()[:1], tmp_path / "p.png"))


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
