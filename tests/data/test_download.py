import hashlib
import io
import os
import subprocess
import sys
import tarfile
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from cnf_lab.data import download
from cnf_lab.data.download import RemoteFile, extract, fetch
from cnf_lab.errors import DataError

CONTENT = bytes(range(256)) * 2000  # 512,000 bytes: several blocks
MD5 = "md5:" + hashlib.md5(CONTENT).hexdigest()


class Server(ThreadingHTTPServer):
    """Serves ``content`` under every path; the attributes make it misbehave."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.content, self.ranges, self.cut_after, self.delay = CONTENT, True, None, 0.0
        self.missing, self.requests = set(), []

    def url(self, path="/file.bin"):
        return f"http://127.0.0.1:{self.server_port}{path}"


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        server = self.server
        asked = self.headers.get("Range")
        server.requests.append((self.path, asked))
        time.sleep(server.delay)
        if self.path in server.missing:
            return self.send_error(404)
        start = int(asked.removeprefix("bytes=").rstrip("-")) if asked and server.ranges else 0
        total = len(server.content)
        if start >= total:
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{total}")
            self.send_header("Content-Length", "0")
            return self.end_headers()
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{total - 1}/{total}")
        self.send_header("Content-Length", str(total - start))
        self.end_headers()
        stop = total if server.cut_after is None else start + server.cut_after
        self.wfile.write(server.content[start:stop])
        return None

    def log_message(self, *args):
        pass


@pytest.fixture
def server():
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def remote(server, *paths, **changes):
    urls = tuple(server.url(path) for path in paths or ("/file.bin",))
    return RemoteFile(**({"path": "folder/file.bin", "urls": urls, "checksum": MD5} | changes))


def one_line(error, *parts):
    text = str(error.value)
    assert "\n" not in text
    for part in parts:
        assert str(part) in text
    return text


def test_downloads_into_the_folder_and_only_once(server, tmp_path, capsys):
    file = remote(server, size=len(CONTENT))
    path = fetch(file, tmp_path)
    assert path == tmp_path / "folder" / "file.bin"
    assert path.read_bytes() == CONTENT
    assert fetch(file, tmp_path) == path
    assert len(server.requests) == 1
    assert capsys.readouterr().err.count("\n") == 1  # not a terminal: one line, no bar
    assert not list(tmp_path.rglob("*.part"))


@pytest.mark.parametrize(
    "checksum",
    [
        "sha256:" + hashlib.sha256(CONTENT).hexdigest(),
        "git:" + hashlib.sha1(b"blob %d\0" % len(CONTENT) + CONTENT).hexdigest(),
        None,
    ],
    ids=["sha256", "git", "none"],
)
def test_kinds_of_checksum(server, tmp_path, checksum):
    assert fetch(remote(server, checksum=checksum), tmp_path).read_bytes() == CONTENT
    if checksum is not None:
        server.content = CONTENT[:-1] + b"!"
        with pytest.raises(DataError):
            fetch(remote(server, checksum=checksum, path="other.bin"), tmp_path)
        assert not (tmp_path / "other.bin").exists()


@pytest.mark.parametrize("ranges", [True, False])
def test_continues_the_part_of_an_interrupted_try(server, tmp_path, ranges):
    server.ranges = ranges
    part = tmp_path / "folder" / "file.bin.part"
    part.parent.mkdir()
    part.write_bytes(CONTENT[:200_000])
    assert fetch(remote(server), tmp_path).read_bytes() == CONTENT
    assert server.requests == [("/file.bin", "bytes=200000-")]


@pytest.mark.parametrize("part", [CONTENT, CONTENT + b"more"], ids=["whole", "longer"])
def test_part_that_is_whole_or_too_long(server, tmp_path, part):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "file.bin.part").write_bytes(part)
    assert fetch(remote(server), tmp_path).read_bytes() == CONTENT


def test_part_of_another_file_is_thrown_away(server, tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "file.bin.part").write_bytes(b"?" * 1000)
    assert fetch(remote(server), tmp_path).read_bytes() == CONTENT
    assert [asked for _, asked in server.requests] == ["bytes=1000-", None]


def test_connection_that_is_cut_is_taken_up_again(server, tmp_path):
    server.cut_after = 200_000
    assert fetch(remote(server), tmp_path).read_bytes() == CONTENT
    assert len(server.requests) == 3


def test_cut_for_good_keeps_the_part_for_the_next_run(server, tmp_path):
    server.cut_after = 100_000
    with pytest.raises(DataError) as error:
        fetch(remote(server), tmp_path)
    one_line(error, "a connection that broke", server.url(), MD5, tmp_path / "folder")
    part = tmp_path / "folder" / "file.bin.part"
    assert CONTENT.startswith(part.read_bytes())
    assert part.stat().st_size > 200_000
    server.cut_after = None
    assert fetch(remote(server), tmp_path).read_bytes() == CONTENT


def test_second_mirror_after_404(server, tmp_path):
    server.missing = {"/gone"}
    assert fetch(remote(server, "/gone", "/there"), tmp_path).read_bytes() == CONTENT
    assert [path for path, _ in server.requests] == ["/gone", "/there"]


def test_no_mirror_works(server, tmp_path):
    server.missing = {"/a", "/b"}
    with pytest.raises(DataError) as error:
        fetch(remote(server, "/a", "/b"), tmp_path)
    one_line(error, "HTTP 404", server.url("/a"), server.url("/b"), "file.bin", MD5, tmp_path / "folder")


def test_nobody_listens(tmp_path):
    file = RemoteFile("file.bin", ("http://127.0.0.1:9/file.bin",), MD5)
    with pytest.raises(DataError) as error:
        fetch(file, tmp_path)
    one_line(error, "http://127.0.0.1:9/file.bin", "ConnectionError", tmp_path)


@pytest.mark.parametrize("size", [None, len(CONTENT)])
def test_wrong_content_is_never_placed(server, tmp_path, size):
    server.content = CONTENT[1:]
    with pytest.raises(DataError) as error:
        fetch(remote(server, size=size), tmp_path)
    one_line(error, MD5, "instead of", tmp_path / "folder")
    assert [path.name for path in (tmp_path / "folder").iterdir() if path.name[0] != "."] == []


def test_downloads_are_off(tmp_path):
    with pytest.raises(DataError, match="dataset.download=true"):
        fetch(RemoteFile("file.bin", ("http://127.0.0.1:9/",), MD5), tmp_path, download=False)


def test_folder_that_cannot_be_made(server, tmp_path):
    (tmp_path / "folder").write_text("a file")
    with pytest.raises(DataError) as error:
        fetch(remote(server), tmp_path)
    one_line(error, tmp_path / "folder", "File exists")


def test_file_placed_by_hand_is_hashed_once(tmp_path, monkeypatch):
    (tmp_path / "file.bin").write_bytes(CONTENT)
    file = RemoteFile("file.bin", ("http://127.0.0.1:9/",), MD5)
    hashed = []
    checksum = download._checksum
    monkeypatch.setattr(download, "_checksum", lambda *args: hashed.append(args) or checksum(*args))
    for _ in range(3):
        assert fetch(file, tmp_path) == tmp_path / "file.bin"
    assert len(hashed) == 1
    os.utime(tmp_path / "file.bin", ns=(1, 1))
    fetch(file, tmp_path)
    assert len(hashed) == 2


def test_damaged_file_names_both_checksums(tmp_path):
    (tmp_path / "file.bin").write_bytes(b"damaged")
    with pytest.raises(DataError) as error:
        fetch(RemoteFile("file.bin", ("http://127.0.0.1:9/",), MD5), tmp_path)
    one_line(error, MD5, "md5:" + hashlib.md5(b"damaged").hexdigest(), "Delete it", tmp_path / "file.bin")


TWO_PROCESSES = """
import sys, types
for name, path in (("cnf_lab", sys.argv[1]), ("cnf_lab.data", sys.argv[1] + "/data")):
    sys.modules[name] = types.ModuleType(name)  # without what the packages import: seconds of torch
    sys.modules[name].__path__ = [path]
from cnf_lab.data.download import RemoteFile, fetch
print(fetch(RemoteFile("file.bin", (sys.argv[2],), sys.argv[3]), sys.argv[4]).stat().st_size)
"""


def test_two_processes_download_once(server, tmp_path):
    server.delay = 0.5
    package = str(Path(download.__file__).parents[1])
    command = [sys.executable, "-c", TWO_PROCESSES, package, server.url(), MD5, str(tmp_path)]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    outputs = [process.communicate(timeout=60) for process in processes]
    assert [output for output, _ in outputs] == [f"{len(CONTENT)}\n"] * 2, outputs
    assert len(server.requests) == 1


# -- archives -------------------------------------------------------------------------------


def write_archive(path, files, links=()):
    with tarfile.open(path, "w:gz") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
        for name, target in links:
            member = tarfile.TarInfo(name)
            member.type, member.linkname = tarfile.SYMTYPE, target
            tar.addfile(member)
    return path


def test_extracts_only_what_is_asked_for(tmp_path):
    files = {
        "data/a/x.npy": b"x",
        "./data/b/y.npy": b"y",
        "data/images/1.jpg": b"1",
        "data/images/2.jpg": b"2",
    }
    archive = write_archive(tmp_path / "data.tar.gz", files)
    extract(archive, {"data/b/y.npy": tmp_path / "b" / "y.npy", "data/images": tmp_path / "images"})
    found = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    assert {name for name in found if name[0] != "."} == {
        "data.tar.gz",
        "b/y.npy",
        "images/1.jpg",
        "images/2.jpg",
    }
    assert (tmp_path / "b" / "y.npy").read_bytes() == b"y"


def test_extraction_leaves_existing_files_alone(tmp_path):
    archive = write_archive(tmp_path / "data.tar.gz", {"data/x": b"new"})
    (tmp_path / "x").write_bytes(b"old")
    extract(archive, {"data/x": tmp_path / "x"})
    assert (tmp_path / "x").read_bytes() == b"old"


def test_member_that_is_not_there(tmp_path):
    archive = write_archive(tmp_path / "data.tar.gz", {"data/x": b"x"})
    with pytest.raises(DataError) as error:
        extract(archive, {"data/z": tmp_path / "z"})
    one_line(error, "data/z", archive)


def test_truncated_archive(tmp_path):
    archive = write_archive(tmp_path / "data.tar.gz", {"data/x": os.urandom(100_000)})
    archive.write_bytes(archive.read_bytes()[:50_000])
    with pytest.raises(DataError) as error:
        extract(archive, {"data/x": tmp_path / "x"})
    one_line(error, archive, "Delete")
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("files", "links"),
    [({"images/../../evil": b"x", "images/a": b"a"}, ()), ({}, [("images/evil", "/etc/passwd")])],
    ids=["parent", "link"],
)
def test_archive_cannot_write_elsewhere(tmp_path, files, links):
    folder = tmp_path / "root"
    folder.mkdir()
    archive = write_archive(folder / "data.tar.gz", files, links)
    try:
        extract(archive, {"images": folder / "images"})
    except DataError:
        assert not (folder / "images").exists()
    assert not (tmp_path / "evil").exists()
    assert not (folder / "images" / "evil").is_symlink()
