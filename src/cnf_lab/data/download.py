"""Files from the web: checked, resumed, taken from mirrors, placed whole; or placed by hand.

Any address can rot. Hence every file may also be put under the data folder by the user, and
every failure ends in one line that names the file, its addresses, its checksum and that folder.
"""

import hashlib
import os
import sys
import tarfile
import tempfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from cnf_lab.errors import DataError

# Small, because urllib3 drops the block in which a connection breaks.
_BLOCK = 1 << 16
_TRIES = 4  # per address, as long as each brings the file further
_TIMEOUT = (10, 60)  # seconds to connect, and between two blocks


@dataclass(frozen=True)
class RemoteFile:
    r"""A file that can be downloaded.

    Args:
        path: Its place below the data folder, with forward slashes.
        urls: Addresses, tried in this order.
        checksum: ``md5:...``, ``sha256:...`` or ``git:...`` (the name of the git blob: the sha1
            of ``blob <size>\0`` and the content); None where none was published, and the reader
            of the file then has to check what it finds.
        size: Length in bytes, where it is known.
    """

    path: str
    urls: tuple[str, ...]
    checksum: str | None = None
    size: int | None = None

    def __str__(self) -> str:
        return f"{PurePosixPath(self.path).name} ({self.checksum or 'no checksum was published'})"


class _WrongContent(ValueError):
    """The bytes are not those of the file."""


def fetch(remote: RemoteFile, root: str | os.PathLike[str], download: bool = True) -> Path:
    """Find a file below the data folder, or download it there, and check it.

    A file that is there already, downloaded or placed by hand, is checked once; the result is
    remembered beside it until its size or time of change differ. Several processes may
    ask at once: one downloads, the others wait. An interrupted download leaves ``<name>.part``,
    which the next try continues.

    Args:
        remote: The file.
        root: The data folder.
        download: Whether a missing file is downloaded; otherwise it is an error.

    Returns:
        The file's path.

    Raises:
        DataError: The file is damaged, or is missing and could not be downloaded.
    """
    target = Path(root) / remote.path
    if not target.is_file():
        if not download:
            advice = "Type dataset.download=true, or place"
            raise _missing(remote, target, "no such file, and downloads are off", advice)
        try:
            with _lock(target):
                if not target.is_file():
                    _download(remote, target)
        except OSError as error:
            raise _missing(remote, target, _reason(error)) from error
    _check(target, remote)
    return target


def extract(archive: Path, members: Mapping[str, Path]) -> None:
    """Place chosen members of a tar.gz, files or whole folders, each in one step.

    What exists already is left alone. Links that leave the archive, device files and
    absolute names are refused (the ``data`` filter of :mod:`tarfile`).

    Args:
        archive: The tar.gz.
        members: Name in the archive to the path it gets.

    Raises:
        DataError: The archive is damaged, or has no such member.
    """
    try:
        with _lock(archive):
            wanted = {name: target for name, target in members.items() if not target.exists()}
            if wanted:
                with tempfile.TemporaryDirectory(dir=archive.parent, prefix=".extract-") as folder:
                    _unpack(archive, wanted, Path(folder))
    except OSError as error:
        raise DataError(
            f"Expected room and permission to unpack {archive}, got {_reason(error)}. Make some, or place "
            f"its members by hand: {', '.join(map(str, members.values()))}."
        ) from error
    except (tarfile.TarError, EOFError, zlib.error) as error:
        raise DataError(
            f"Expected a whole tar.gz at {archive}, got {_reason(error)}. Delete it and start again, "
            "or place a whole copy there."
        ) from error


def _unpack(archive: Path, wanted: Mapping[str, Path], folder: Path) -> None:
    found = set()
    with tarfile.open(archive, "r|gz") as tar:
        for member in tar:
            place = PurePosixPath(os.path.normpath(member.name))
            name = next((name for name in wanted if place.is_relative_to(name)), None)
            if name is None:
                continue
            tar.extract(member, folder, filter="data")
            found.add(name)
            if member.isfile() and str(place) == name and found == set(wanted):
                break
    for name, target in wanted.items():
        if name not in found:
            raise DataError(
                f"Expected {name} in {archive}, got an archive without it. Delete the archive and start "
                f"again, or place the file as {target}."
            )
        target.parent.mkdir(parents=True, exist_ok=True)
        os.replace(folder / name, target)


# -- one download ---------------------------------------------------------------------------


def _download(remote: RemoteFile, target: Path) -> None:
    import pooch

    pooch.get_logger().setLevel("WARNING")  # the lab says in one line what pooch says in five
    part = target.with_name(f"{target.name}.part")
    # A part may come from another version of the file: after it has failed, each address is tried afresh.
    attempts = remote.urls * (2 if part.exists() else 1)
    reasons = {}
    for url in attempts:
        try:
            # The downloader has checked the content: pooch knows no git checksums.
            downloader = _Resuming(remote, part)
            pooch.retrieve(url, None, fname=target.name, path=target.parent, downloader=downloader)
        except (OSError, ValueError) as error:
            reasons[url] = f"{_reason(error)} from {url}"
        else:
            return
    raise _missing(remote, target, "; ".join(reasons.values()))


class _Resuming:
    """A downloader for pooch that continues the part of an interrupted try."""

    def __init__(self, remote: RemoteFile, part: Path) -> None:
        self.remote, self.part = remote, part

    def __call__(self, url: str, output_file: str, pooch: Any) -> None:
        """Download the address into the part, and move the part to pooch's temporary file."""
        for tries_left in reversed(range(_TRIES)):
            before = self._have()
            try:
                self._stream(url)
                break
            except OSError:
                if tries_left == 0 or self._have() <= before:
                    raise
        self._reject_other_content()
        os.replace(self.part, output_file)

    def _have(self) -> int:
        return self.part.stat().st_size if self.part.exists() else 0

    def _stream(self, url: str) -> None:
        import requests
        from urllib3.exceptions import HTTPError

        have = self._have()
        headers = {"Accept-Encoding": "identity"}
        if have:
            headers["Range"] = f"bytes={have}-"
        with requests.get(url, headers=headers, stream=True, timeout=_TIMEOUT) as response:
            if response.status_code == requests.codes.requested_range_not_satisfiable and have:
                if not response.headers.get("Content-Range", "").endswith(f"/{have}"):
                    self.part.unlink()
                    self._stream(url)
                return  # otherwise the part is the whole file
            response.raise_for_status()
            if response.status_code != requests.codes.partial_content:
                have = 0
            try:
                self._write(response, url, have)
            except HTTPError as error:
                raise ConnectionError(f"a connection that broke after {self._have():,} bytes") from error

    def _write(self, response: Any, url: str, have: int) -> None:
        from tqdm import tqdm

        length = response.headers.get("Content-Length")
        total = self.remote.size if length is None else have + int(length)
        name, terminal = self.part.stem, sys.stderr.isatty()
        if not terminal:
            size = "" if total is None else f", {total / 1e6:,.1f} MB"
            print(f"Downloading {name}{size}, from {url}", file=sys.stderr, flush=True)
        bar = tqdm(desc=name, total=total, initial=have, unit="B", unit_scale=True, disable=not terminal)
        with bar, open(self.part, "ab" if have else "wb") as file:
            # Undecoded: some servers declare a .tgz to be gzip-encoded content.
            for block in response.raw.stream(_BLOCK, decode_content=False):
                file.write(block)
                bar.update(len(block))

    def _reject_other_content(self) -> None:
        size, checksum = self.remote.size, self.remote.checksum
        if size is not None and self._have() != size:
            actual, expected = f"{self._have():,} bytes", f"{size:,}"
        elif checksum is not None and (found := _checksum(self.part, checksum)) != checksum:
            actual, expected = found, checksum
        else:
            return
        self.part.unlink()
        raise _WrongContent(f"{actual} instead of {expected}")


# -- checks, locks, words -------------------------------------------------------------------


def _check(path: Path, remote: RemoteFile) -> None:
    """Compare a file with its checksum, unless that was done since it last changed."""
    expected = remote.checksum
    if expected is None:
        return
    stat = path.stat()
    stamp = f"{expected} {stat.st_size} {stat.st_mtime_ns}".encode()
    note = path.with_name(f".{path.name}.checked")
    with suppress(OSError):
        if note.read_bytes() == stamp:
            return
    actual = _checksum(path, expected)
    if actual != expected:
        raise DataError(
            f"Expected {expected} of {path}, got {actual} ({stat.st_size:,} bytes): the file is damaged or "
            f"another one. Delete it to download it again, or replace it by a whole copy from "
            f"{' or '.join(remote.urls)}."
        )
    with suppress(OSError):  # a folder that may only be read keeps no notes
        note.write_bytes(stamp)


def _checksum(path: Path, like: str) -> str:
    """Return the checksum of a file by the algorithm of another checksum."""
    algorithm = like.partition(":")[0]
    digest = hashlib.new("sha1" if algorithm == "git" else algorithm, usedforsecurity=False)
    if algorithm == "git":
        digest.update(b"blob %d\0" % path.stat().st_size)
    with open(path, "rb") as file:
        hashlib.file_digest(file, lambda: digest)
    return f"{algorithm}:{digest.hexdigest()}"


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Let one process at a time place what the path names."""
    from filelock import FileLock, Timeout

    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path.with_name(f".{path.name}.lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        print(f"Waiting for the process that is at work on {path}", file=sys.stderr, flush=True)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _missing(remote: RemoteFile, target: Path, reason: str, advice: str = "Place") -> DataError:
    return DataError(
        f"Expected {remote} in {target.parent}, got {reason}. "
        f"{advice} the file there by hand; its address: {' or '.join(remote.urls)}."
    )


def _reason(error: BaseException) -> str:
    """Say in some words why a file could not be had."""
    response = getattr(error, "response", None)
    if response is not None:
        return f"HTTP {response.status_code}"
    plain = type(error).__module__ != "requests.exceptions"  # whose texts are long and repeat the address
    text = (getattr(error, "strerror", None) or str(error)).split("\n")[0] if plain else ""
    return text or type(error).__name__
