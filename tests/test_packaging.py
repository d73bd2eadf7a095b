"""What a user gets with `pip install tfcompress`."""

import configparser
import importlib.metadata
import pathlib
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile

import pytest

ROOT = pathlib.Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


@pytest.fixture(scope="module")
def config():
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg")
    return parser


def lines(text):
    return [line for line in text.splitlines() if line and not line.startswith("#")]


def test_the_extras_are_there(config):
    extras = {"demo", "test", "litert", "hub", "onnx", "openvino", "report", "all"}
    assert extras <= set(config["options.extras_require"])


def test_all_is_every_extra_for_users(config):
    # `tpu` checks our own ops, and `launch` belongs to a cluster.
    everything = set(config["options.extras_require"]) - {"all", "launch", "test", "tpu"}
    (line,) = lines(config["options.extras_require"]["all"])
    assert line == f"tfcompress[{','.join(sorted(everything))}]"


def test_every_extra_that_an_error_names_exists(config):
    sources = "\n".join(path.read_text() for path in (ROOT / "tfcompress").rglob("*.py"))
    named = set(re.findall(r'require\([^)]*extra="(\w+)"', sources))
    assert named
    assert named <= set(config["options.extras_require"])


def test_the_requirements_are_in_range_of_the_tpu_wheel_and_numpy_2(config):
    requirements = lines(config["options"]["install_requires"])
    assert "tensorflow>=2.20,<2.22" in requirements
    assert "numpy>=2" in requirements
    assert config["options"]["python_requires"] == ">=3.11,<3.14"


def test_the_readme_names_the_versions_that_are_declared(config):
    tensorflow = lines(config["options"]["install_requires"])[0]
    lowest, above = re.findall(r"2\.\d+", tensorflow)
    assert f"{lowest} to 2.{int(above.split('.')[1]) - 1}" in README
    assert "3.11 to 3.13" in README


def test_the_readme_shows_the_commands_that_ci_runs():
    script = (ROOT / ".ci" / "run").read_text()
    for part in ('pip install ".[demo]"', "tfcompress demo", 'pip install ".[test]"', "pytest"):
        assert part in README
        assert part.replace("install ", "install --quiet ") in script or part in script


def test_the_version_is_the_same_everywhere(config):
    version = config["metadata"]["version"]
    assert f"## {version}" in (ROOT / "CHANGELOG.md").read_text()
    try:
        assert importlib.metadata.version("tfcompress") == version
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("runs from a checkout that is not installed")


def test_the_build_backend_is_declared():
    build = tomllib.loads((ROOT / "pyproject.toml").read_text())["build-system"]
    assert build["build-backend"] == "setuptools.build_meta"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The files of the wheel that setuptools builds from a copy of the sources."""
    return build_wheel(tmp_path_factory.mktemp("wheel"))


def build_wheel(directory):
    source = directory / "source"
    shutil.copytree(ROOT / "tfcompress", source / "tfcompress")
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    # Without isolation nothing is downloaded: the extra `test` brings the build backend.
    options = ["--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", directory]
    subprocess.run([sys.executable, "-m", "pip", "wheel", *options, source], check=True)
    (path,) = directory.glob("*.whl")
    return zipfile.ZipFile(path)


def test_every_module_and_the_template_are_in_the_wheel(wheel):
    expected = {
        path.relative_to(ROOT).as_posix()
        for suffix in ("*.py", "*.html", "*.yaml")
        for path in (ROOT / "tfcompress").rglob(suffix)
    }
    packaged = {name for name in wheel.namelist() if name.startswith("tfcompress/")}
    assert packaged == expected


def test_the_wheel_has_licence_command_and_nothing_else_at_the_top(wheel):
    tops = {name.split("/")[0] for name in wheel.namelist()}
    assert tops == {"tfcompress", "tfcompress-0.1.0.dist-info"}
    entry_points = wheel.read("tfcompress-0.1.0.dist-info/entry_points.txt").decode()
    assert "tfcompress = tfcompress.cli:main" in entry_points
    assert any(name.endswith("LICENSE") for name in wheel.namelist())
