"""`inspect`, `bench`, `compare`, `report` and `doctor`."""

import configparser
import json
import pathlib
import re

import pytest

from tfcompress.cli.doctor import EXTRAS

ROOT = pathlib.Path(__file__).parents[2]


def found(result):
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_inspect_a_model(invoke, files):
    values = found(invoke("inspect", files / "m.keras", "--json"))
    assert (values["parameters"], values["macs"]) == (259, 240)
    weight = values["weights"][0]
    assert weight["path"].endswith("hidden/kernel")
    assert (weight["shape"], weight["parameters"], weight["macs"]) == ([12, 16], 192, 192)
    assert values["techniques"]["prune"] == "2 weights with 240 of 259 parameters"
    assert values["techniques"]["shrink"].startswith("ratio 0.5: 259 to 131 parameters")
    assert values["techniques"]["quantize"] == "2 Dense"
    assert values["recipe"] is None
    text = invoke("inspect", files / "m.keras").stdout
    assert "hidden/kernel" in text
    assert "no batch norm to fold" in text


def test_inspect_a_file(invoke, files):
    values = found(invoke("inspect", files / "m.tflite", "--json"))
    assert values["kind"] == "litert"
    assert sorted(weight["parameters"] for weight in values["weights"])[-2:] == [48, 192]


def test_bench_interleaves_and_report_reads_it(invoke, files, tmp_path):
    pair = [files / "m.keras", files / "m.tflite"]
    options = ["--rounds", "3", "--data", files / "d.npz", "-o", "p.json"]
    values = found(invoke("bench", *pair, *options, "--json"))
    assert [each["tool"] for each in values] == ["keras", "litert"]
    assert values[0]["accuracy"] == values[1]["accuracy"]
    assert values[1]["max_abs_diff"] < 1e-4
    assert sorted(values[0]["latency"]) == ["1", "32"]
    assert "3 interleaved rounds" in values[0]["environment"]["timing"]
    pytest.importorskip("jinja2")
    assert found(invoke("report", "p.json", "-o", "r.html", "--json"))["profiles"] == 2
    assert "m.tflite" in (tmp_path / "r.html").read_text()


def test_bench_without_data(invoke, files):
    result = invoke("bench", files / "m.tflite", "--rounds", "1", "--batch-size", "4")
    assert result.exit_code == 0, result.output


def test_compare(invoke, files):
    pair = [files / "m.keras", files / "m.tflite"]
    values = found(invoke("compare", *pair, "--data", files / "d.npz", "--json"))
    assert values["difference"]["max_abs"] < 1e-4
    assert values["difference"]["same_class"] == 1.0
    assert values["a"]["accuracy"] == values["b"]["accuracy"]
    assert values["examples"] == 39
    assert "same class" in invoke("compare", *pair).stdout


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["inspect", "none.keras"], "no file"),
        (["inspect", "D"], "suffix '.npz'"),
        (["bench", "M", "M"], "named twice"),
        (["bench", "M", "none.tflite"], "no file"),
        (["compare", "M", "D"], "suffix '.npz'"),
        (["report", "none.json"], "none.json"),
    ],
)
def test_bad_input_is_one_message(refused, files, arguments, message):
    known = {"M": files / "m.keras", "D": files / "d.npz"}
    assert message in refused(*[known.get(each, each) for each in arguments])


@pytest.mark.parametrize(
    "text", ["", "{}", "[1]", "[{}]", '[{"latency": 3, "layers": []}]', "[" * 500]
)
def test_reports_of_something_else(refused, tmp_path, text):
    (tmp_path / "p.json").write_text(text)
    assert refused("report", "p.json")


def test_doctor(invoke):
    values = found(invoke("doctor", "--json"))
    assert values["versions"]["keras"].startswith("3.")
    assert "CPU" in values["machine"]["devices"]
    missing = [each for each in values["extras"] if each["version"] is None]
    assert all(each["install"].startswith('pip install "tfcompress[') for each in missing)
    assert {each["extra"] for each in values["extras"]} == set(EXTRAS)


def test_doctor_knows_the_extras():
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg")
    declared = dict(parser["options.extras_require"])
    for extra, packages in EXTRAS.items():
        assert extra in declared, f"setup.cfg has no extra {extra}"
        named = re.findall(r"^[\w-]+", declared[extra], re.M)
        distributions = {"sklearn": "scikit-learn"}
        for package in packages:
            assert distributions.get(package, package).replace("_", "-") in named
