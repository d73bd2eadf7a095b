"""What XLA fuses, counted from its own programs."""

import json

import keras
import numpy as np
import pytest
import rich.console
import tensorflow as tf
from keras import layers

from tests.acceleration import networks
from tfcompress.acceleration import FusedGroup, FusionReport, fusion, fusion_report
from tfcompress.measure import Profile
from tfcompress.report import html


@pytest.fixture(scope="module")
def report():
    inputs = keras.Input((64,))
    x = layers.Dense(32, activation="gelu", name="first")(inputs)
    x = layers.Dense(32, name="second")(x)
    x = layers.LayerNormalization(name="norm")(x)
    return fusion_report(keras.Model(inputs, layers.ReLU(name="relu")(x)), np.ones((8, 64), "f4"))


def test_kernels_and_bytes_become_fewer(report):
    before, after = report.num_kernels
    assert report.batch_size == 8
    assert report.kernels_before["dot"] == 2
    assert "fusion" not in report.kernels_before
    assert 2 < after < before / 2
    assert 0 < report.bytes_after < report.bytes_before
    assert report.bytes_saved == report.bytes_before - report.bytes_after
    # The weights and the input are read once at least, the output is written.
    assert report.bytes_after > 4 * (64 * 32 + 32 * 32 + 8 * 64 + 8 * 32)


def test_groups_name_their_layers(report):
    named = {name for group in report.groups for name in group.layers}
    assert {"first", "second", "norm", "relu"} <= named
    (gelu,) = [group for group in report.groups if group.layers == ("first",)]
    assert {"BiasAdd", "Mul"} <= set(gelu.operations)
    # x is read and the result written once, and the bias is read.
    assert gelu.bytes_after == 4 * (2 * 8 * 32 + 32)
    assert gelu.num_kernels >= 5
    assert gelu.bytes_before > 4 * 8 * 32 * 2 * 4
    assert any({"norm", "relu"} <= set(group.layers) for group in report.groups)


def test_those_that_save_most_come_first(report):
    saved = [group.bytes_saved for group in report.groups]
    assert saved == sorted(saved, reverse=True)
    assert all(group.num_kernels > 1 for group in report.groups)


def test_it_is_data(report, tmp_path):
    assert FusionReport.from_config(json.loads(report.to_json())) == report
    assert FusionReport.load(report.save(tmp_path / "fusion.json")) == report
    assert FusionReport.from_config(report.get_config()) == report


def test_the_table_has_every_group(report):
    console = rich.console.Console(width=200, record=True)
    console.print(report)
    text = console.export_text()
    before, after = report.num_kernels
    assert f"{before} kernels before fusion, {after} after" in " ".join(text.split())
    assert text.count("first") >= 1
    assert f"{report.groups[0].bytes_saved / 1000:,.1f}" in text


@pytest.mark.parametrize("make", [networks.cnn, networks.two_in_two_out, networks.residual])
def test_models_of_every_kind(make):
    model, batch = make()
    found = fusion_report(model, batch)
    assert found.groups
    assert not any("BatchNorm" in name for group in found.groups for name in group.operations)
    # Nothing is left behind in the model.
    assert all("call" not in vars(layer) for layer in model._flatten_layers())


def test_bytes_of_shapes():
    data = fusion.xla_data_pb2
    pair = data.ShapeProto(element_type=data.TUPLE)
    for kind, dims in ((data.F32, (2, 3)), (data.BF16, (5,)), (data.PRED, (7,)), (data.C64, ())):
        pair.tuple_shapes.add(element_type=kind, dimensions=dims)
    assert [fusion._bytes(shape) for shape in pair.tuple_shapes] == [24, 10, 7, 8]
    assert fusion._bytes(pair) == 49


def test_a_group_may_cost():
    assert FusedGroup("f", (), (), 2, bytes_before=10, bytes_after=12).bytes_saved == -2


def call_the_host(x):
    return tf.ensure_shape(tf.py_function(lambda t: t, [x], "float32"), (None, 3))


def test_what_xla_cannot_compile_is_refused():
    x = keras.Input((3,))
    model = keras.Model(x, layers.Lambda(call_the_host, output_shape=(3,))(x))
    with pytest.raises(ValueError, match="XLA cannot compile"):
        fusion_report(model, np.ones((2, 3), "float32"))


def test_the_report_draws_it(report, tmp_path):
    pytest.importorskip("matplotlib")
    profiles = [Profile("net", "original", "keras", params=1, nonzeros=1)]
    for given in (report, report.get_config(), json.loads(report.to_json())):
        page = html(profiles, tmp_path / "report.html", fusion=given).read_text()
        before, after = report.num_kernels
        assert f"{before} kernels before fusion, {after} after" in page
        assert "kB moved for a batch of 8" in page
        assert "second, norm" in page
    assert "kernels before fusion" not in html(profiles, tmp_path / "r.html").read_text()
    with pytest.raises(ValueError, match="Expected the result of .*fusion_report"):
        html(profiles, tmp_path / "r.html", fusion={"model": "net"})
