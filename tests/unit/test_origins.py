"""Sources of models: what a text means, and that a download is whole, the right one, or an error, whatever happens."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections import namedtuple
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

from cmtool.errors import CheckpointError, DependencyError
from cmtool.io import catalogue, origins

BODY = bytes(range(256)) * 4000  # a megabyte
SHA = hashlib.sha256(BODY).hexdigest()
ENVIRONMENT = ("CMTOOL_CACHE", "CMTOOL_OFFLINE", "HF_HUB_OFFLINE", "XDG_CACHE_HOME")


@dataclass
class Resource:
    """What the server says when asked for a path."""

    body: bytes = BODY
    etag: str = '"1"'
    modified: str = ""
    status: int = 200
    ranges: bool = True
    obeys_if_range: bool = True
    length: int | str | None = -1  # the announced one: -1 is the true one, None none
    cuts: list[int] = field(default_factory=list)  # bytes after which the next answers stop
    skew: int = 0  # how far a part starts from where it was asked for
    location: str = ""
    headers: dict[str, str] = field(default_factory=dict)
    before: Callable[[], None] = lambda: None


@dataclass
class Site:
    """A file server on 127.0.0.1 and what it was asked: (path, headers, bytes sent)."""

    address: str
    files: dict[str, Resource] = field(default_factory=dict)
    asked: list[tuple[str, dict[str, str], int]] = field(default_factory=list)

    def put(self, name: str = "model.pt", body: bytes = BODY, **kwargs) -> str:
        self.files[f"/{name}"] = Resource(body, **kwargs)
        return f"{self.address}/{name}"


@contextmanager
def serving(answer: Callable[[BaseHTTPRequestHandler], None]) -> Iterator[str]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            answer(self)

        do_HEAD = do_GET

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture
def site() -> Iterator[Site]:
    made = Site("")

    def answer(handler: BaseHTTPRequestHandler) -> None:
        path = urlsplit(handler.path).path
        resource = made.files.get(path, Resource(b"", status=404))
        resource.before()
        status, body, headers = resource.status, resource.body, dict(resource.headers)
        asked = {name.lower(): value for name, value in handler.headers.items()}
        if resource.etag:
            headers.setdefault("ETag", resource.etag)
        if resource.modified:
            headers["Last-Modified"] = resource.modified
        if resource.location:
            headers["Location"] = resource.location
        same = asked.get("if-range") in (resource.etag, resource.modified) or not resource.obeys_if_range
        if resource.ranges and "range" in asked and same and status == 200:
            start = int(asked["range"].removeprefix("bytes=").removesuffix("-")) + resource.skew
            headers["Content-Range"] = f"bytes {start}-{len(body) - 1}/{len(body)}"
            status, body = 206, body[start:]
            if not body:
                status, headers["Content-Range"] = 416, f"bytes */{start}"
        if resource.length is not None:
            headers["Content-Length"] = str(len(body) if resource.length == -1 else resource.length)
        sent = body[: resource.cuts.pop(0)] if resource.cuts else body
        made.asked.append((path, asked, len(sent)))
        handler.send_response(status)
        for name, value in headers.items():
            handler.send_header(name, value)
        handler.end_headers()
        try:
            handler.wfile.write(sent)
        except OSError:  # the client has had enough
            handler.close_connection = True

    with serving(answer) as address:
        made.address = address
        yield made


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path) -> Path:
    """An own cache, no waiting, and no way out of this machine."""
    for name in ENVIRONMENT:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("CMTOOL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(origins, "_PAUSE", 0.0)
    look_up = socket.getaddrinfo

    def only_here(host, *args, **kwargs):
        if host not in ("127.0.0.1", b"127.0.0.1", "localhost"):
            raise socket.gaierror(socket.EAI_AGAIN, f"no network in tests: {host}")
        return look_up(host, *args, **kwargs)

    monkeypatch.setattr(socket, "getaddrinfo", only_here)
    return tmp_path / "cache" / "models"


@pytest.fixture
def release(monkeypatch, site) -> Callable[..., catalogue.Released]:
    """Put a release on the site and in the catalogue."""

    def make(name: str = "tiny_model", body: bytes = BODY, size=None, sha256=None, **kwargs) -> catalogue.Released:
        url = site.put(f"{name}.pt", body, **kwargs)
        made = replace(
            catalogue.RELEASED["cd_imagenet64_l2"], name=name, url=url, file=f"{name}.pt", size=size, sha256=sha256
        )
        monkeypatch.setitem(catalogue.RELEASED, name, made)
        monkeypatch.setitem(catalogue._URLS, url, made)
        monkeypatch.setitem(catalogue._FILES, made.file, made)
        return made

    return make


def refused(source, *words: str, kind: type = CheckpointError, **kwargs) -> str:
    """The two lines of a refusal; asserts that they hold the words."""
    with pytest.raises(kind) as caught:
        origins.resolve(source, **kwargs)
    error = caught.value
    assert error.message
    assert error.hint
    text = f"{error.message}\n{error.hint}"
    for word in words:
        assert word in text, text
    return text


def left(folder: Path) -> set[str]:
    """Names of what lies in the cache, locks aside."""
    return {file.name for file in folder.rglob("*") if file.is_file() and file.suffix != ".lock"}


# --- what a text means -----------------------------------------------------------------------------------------------


def test_a_path_is_itself(tmp_path, monkeypatch):
    (tmp_path / "run").mkdir()
    (tmp_path / "m.pt").write_bytes(BODY)
    assert origins.resolve(str(tmp_path / "run")) == origins.Located(tmp_path / "run", None, str(tmp_path / "run"))
    assert origins.resolve(tmp_path / "m.pt").path == tmp_path / "m.pt"
    monkeypatch.setenv("HOME", str(tmp_path))
    assert origins.resolve("~/m.pt").path == tmp_path / "m.pt"
    monkeypatch.chdir(tmp_path)
    assert origins.resolve("m.pt").path == Path("m.pt")


def test_a_path_goes_before_a_release_and_a_path_object_is_nothing_else(tmp_path, monkeypatch, release):
    release()
    monkeypatch.chdir(tmp_path)
    refused(Path("tiny_model"), "there is no model at 'tiny_model'")
    (tmp_path / "tiny_model").mkdir()
    assert origins.resolve("tiny_model").path == Path("tiny_model")


def test_a_file_called_like_a_release_is_known_as_that(tmp_path):
    file = tmp_path / "cd_imagenet64_l2.pt"
    file.write_bytes(BODY)
    assert origins.resolve(file).released is catalogue.RELEASED["cd_imagenet64_l2"]


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("no/such/run", ["there is no model at 'no/such/run'", "name a run folder"]),
        ("gone.safetensors", ["there is no model at 'gone.safetensors'"]),
        ("cd_imagenet64_l2.pt", ["there is no model", "did you mean the release cd_imagenet64_l2?"]),
        ("cd_imagenet64_l1", ["no released checkpoint", "did you mean cd_imagenet64_l2"]),
        ("zzzzzz", ["no released checkpoint", "cmtool models ls"]),
        ("", ["there is no model at ''"]),
        ("a\0b", ["there is no model"]),
        ("x" * 5000, ["there is no model"]),
        ("ftp://host/x.pt", ["only https"]),
        ("file:///etc/passwd", ["no address"]),
        ("http://example.org/x.pt", ["only https"]),
        ("https://", ["no address"]),
        ("https://[::1/x", ["no address"]),
        ("https://host:port/x", ["no address"]),
        ("https://ho st/x", ["no address"]),
        ("https://host/x\ny", ["no address"]),
        ("https://" + "a" * 70 + ".org/x", ["no address"]),
        ("https://user:secret@host/x.pt", ["user name"]),
        ("hf:alone", ["names nothing on the Hub", "hf:owner/name"]),
        ("hf:owner/name@", ["names nothing on the Hub"]),
        ("hf:owner/name:../x", ["no file within a repository"]),
        ("hf:owner/name:/etc/passwd", ["no file within a repository"]),
        ("hf:owner/name@../../x", ["no file within a repository"]),
    ],
)
def test_what_cannot_be_a_source(source, words):
    text = refused(source, *words)
    assert "secret" not in text
    assert len(text.splitlines()) == 2 or "\n" in source


def test_where_the_cache_is(monkeypatch, tmp_path):
    monkeypatch.setenv("CMTOOL_CACHE", str(tmp_path / "a"))
    assert origins.folder() == tmp_path / "a" / "models"
    monkeypatch.delenv("CMTOOL_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "b"))
    assert origins.folder() == tmp_path / "b" / "cmtool" / "models"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # to be ignored, says its specification
    monkeypatch.setenv("HOME", str(tmp_path))
    assert origins.folder() == tmp_path / ".cache" / "cmtool" / "models"


# --- downloads -------------------------------------------------------------------------------------------------------


def test_a_download_is_whole_recorded_and_made_once(site, cache):
    url = site.put()
    seen: list[tuple[int, int | None]] = []
    located = origins.resolve(url, progress=lambda done, total: seen.append((done, total)))
    assert located == origins.Located(located.path, None, url)
    assert located.path.read_bytes() == BODY
    assert located.path.name == "model.pt"
    assert located.path.parent.parent == cache
    assert seen[0] == (0, len(BODY))
    assert seen[-1] == (len(BODY), len(BODY))
    assert seen == sorted(seen)
    record = json.loads((located.path.parent / "model.pt.json").read_text())
    assert (record["url"], record["bytes"], record["sha256"]) == (url, len(BODY), SHA)
    assert record["when"].startswith("20")
    assert origins.checksum(located.path) == SHA
    assert left(cache) == {"model.pt", "model.pt.json"}
    assert origins.resolve(url, offline=True).path == located.path
    assert len(site.asked) == 1


def test_equal_names_from_two_addresses_do_not_meet(site):
    one, two = site.put("a/model.pt", b"one"), site.put("b/model.pt", b"two")
    assert origins.resolve(one).path.read_bytes() == b"one"
    assert origins.resolve(two).path.read_bytes() == b"two"


def test_a_release_lies_under_its_own_name_and_its_address_is_the_same_file(site, cache, release):
    made = release()
    located = origins.resolve("tiny_model")
    assert located == origins.Located(cache / "tiny_model.pt", made, "tiny_model")
    assert origins.kept(made) == located.path
    assert origins.resolve(made.url).path == located.path
    assert origins.resolve(made.url).released is made
    assert len(site.asked) == 1


def test_a_key_in_the_address_is_neither_kept_nor_shown(site, cache):
    url = site.put("gone.pt", status=403) + "?token=secret"
    assert "secret" not in refused(url, "403")
    site.put("gone.pt")
    path = origins.resolve(url).path
    assert "secret" not in (path.parent / "gone.pt.json").read_text()


@pytest.mark.parametrize("validator", [{"etag": '"x"'}, {"etag": "", "modified": "Tue, 01 Aug 2023 10:00:00 GMT"}])
def test_a_cut_download_goes_on_where_it_stopped(site, cache, validator):
    url = site.put(cuts=[300_000, 200_000], **validator)
    assert origins.resolve(url).path.read_bytes() == BODY
    ranges = [headers.get("range") for _, headers, _ in site.asked]
    assert ranges == [None, "bytes=300000-", "bytes=500000-"]
    assert [sent for _, _, sent in site.asked] == [300_000, 200_000, len(BODY) - 500_000]
    assert all(headers["if-range"] in validator.values() for _, headers, _ in site.asked[1:])
    assert all(headers["accept-encoding"] == "identity" for _, headers, _ in site.asked)


def test_a_cut_download_goes_on_in_the_next_run(site, cache, monkeypatch):
    monkeypatch.setattr(origins, "_TRIES", 1)
    url = site.put(cuts=[400_000])
    refused(url, "the connection broke at 400,000 of 1,024,000 bytes", "goes on where it stopped")
    assert left(cache) == {"model.pt.part", "model.pt.part.json"}
    assert origins.resolve(url).path.read_bytes() == BODY
    assert site.asked[-1][1]["range"] == "bytes=400000-"
    assert left(cache) == {"model.pt", "model.pt.json"}


def test_a_finished_part_is_not_fetched_again(site, cache):
    url = site.put()
    path = origins.resolve(url).path
    part = path.rename(path.with_name("model.pt.part"))
    (path.parent / "model.pt.part.json").write_text(json.dumps({"url": url, "etag": '"1"'}))
    assert origins.resolve(url).path.read_bytes() == BODY
    assert site.asked[-1][2] == 0
    assert not part.exists()


@pytest.mark.parametrize("obeys", [True, False], ids=["obeys If-Range", "ignores If-Range"])
def test_a_file_that_changed_meanwhile_is_fetched_whole(site, obeys):
    url = site.put(cuts=[300_000])
    other = BODY[::-1]

    def change() -> None:
        if site.asked:
            resource.body, resource.etag = other, '"2"'

    resource = site.files["/model.pt"]
    resource.before, resource.obeys_if_range = change, obeys
    assert origins.resolve(url).path.read_bytes() == other
    assert site.asked[1][1]["range"] == "bytes=300000-"
    assert site.asked[-1][2] == len(other)


@pytest.mark.parametrize(
    "how", [{"ranges": False}, {"etag": "", "modified": ""}, {"etag": 'W/"1"'}], ids=["no ranges", "no tag", "weak tag"]
)
def test_without_ranges_a_cut_download_starts_over(site, how):
    url = site.put(cuts=[300_000], **how)
    assert origins.resolve(url).path.read_bytes() == BODY
    assert [sent for _, _, sent in site.asked] == [300_000, len(BODY)]
    assert ("range" in site.asked[1][1]) == ("ranges" in how)


def test_another_part_than_asked_for_is_not_taken(site):
    url = site.put(cuts=[300_000], skew=7)
    assert origins.resolve(url).path.read_bytes() == BODY
    assert [headers.get("range") for _, headers, _ in site.asked] == [None, "bytes=300000-", None]


def test_a_truncated_file_never_becomes_a_model(site, cache):
    url = site.put(ranges=False, cuts=[1000] * 100)
    refused(url, "cannot download", "the connection broke at 1,000 of 1,024,000 bytes")
    assert len(site.asked) == origins._TRIES
    assert left(cache) == {"model.pt.part", "model.pt.part.json"}


def test_a_body_of_unknown_length(site):
    assert origins.resolve(site.put(length=None)).path.read_bytes() == BODY


def test_a_wrong_checksum(site, cache, release):
    release(sha256="0" * 64)
    refused("tiny_model", "not the right file", "0" * 64, SHA)
    assert left(cache) == set()


def test_a_wrong_size_is_seen_before_the_download(site, cache, release):
    release(size=1000)
    refused("tiny_model", "has 1,024,000 bytes", "should have 1,000")
    assert left(cache) == set()


def test_the_first_checksum_of_a_release_holds(site, cache, release):
    made = release()
    path = origins.resolve("tiny_model").path
    path.unlink()
    release(body=BODY[::-1])
    refused("tiny_model", "not the right file", SHA, "tiny_model.pt.json")
    assert not path.exists()
    (cache / "tiny_model.pt.json").unlink()
    assert origins.resolve(made.name).path.read_bytes() == BODY[::-1]


def test_a_file_that_was_changed_in_the_cache_is_refused(site, cache, release):
    release()
    path = origins.resolve("tiny_model").path
    path.write_bytes(BODY[:-1] + b"!")
    refused("tiny_model", "is not the file it should be", SHA, "delete it")
    assert origins.checksum(path) is None
    path.write_bytes(BODY[:1000])
    refused("tiny_model", "1,024,000 bytes expected, found 1,000 bytes")
    path.write_bytes(BODY)  # the same again, only newer
    assert origins.resolve("tiny_model").path == path
    assert origins.checksum(path) == SHA
    assert len(site.asked) == 1


def test_a_file_put_there_by_hand_is_accepted_if_it_is_right(site, cache, release):
    cache.mkdir(parents=True)
    (cache / "tiny_model.pt").write_bytes(BODY)
    release(size=len(BODY), sha256=SHA)
    assert origins.resolve("tiny_model", offline=True).path == cache / "tiny_model.pt"
    assert origins.checksum(cache / "tiny_model.pt") == SHA
    release("other", sha256="1" * 64)
    (cache / "other.pt").write_bytes(BODY)
    refused("other", "is not the file it should be", "1" * 64)
    assert site.asked == []


def test_a_verified_file_is_not_read_again(release, monkeypatch):
    release()
    origins.resolve("tiny_model")
    monkeypatch.setattr(origins, "sha256_of", lambda file: pytest.fail("read through again"))
    origins.resolve("tiny_model")


@pytest.mark.parametrize("damage", [b"", b"[1]", b'{"bytes": "x", "sha256": 3}', b"\xff\xfe", b"[" * 60000])
def test_a_damaged_record_is_no_record(site, release, cache, damage):
    release()
    path = origins.resolve("tiny_model").path
    (cache / "tiny_model.pt.json").write_bytes(damage)
    assert origins.resolve("tiny_model").path == path
    assert origins.checksum(path) == SHA
    assert len(site.asked) == 1


def test_a_damaged_note_of_a_part_costs_only_a_new_start(site, cache, monkeypatch):
    monkeypatch.setattr(origins, "_TRIES", 1)
    url = site.put(cuts=[1000])
    refused(url, "broke")
    next(cache.rglob("*.part.json")).write_bytes(b'{"url": 3, "etag": "a\\nRange: x"}')
    assert origins.resolve(url).path.read_bytes() == BODY


@pytest.mark.parametrize(
    ("status", "words", "requests"),
    [
        (404, "not there (404)", 1),
        (410, "no more (410)", 1),
        (401, "login (401)", 1),
        (403, "refuses it (403)", 1),
        (418, "answered 418", 1),
        (204, "answered 204", 1),
        (503, "answered 503", 5),
        (429, "answered 429", 5),
    ],
)
def test_answers_without_a_file(site, cache, status, words, requests):
    refused(site.put(status=status, length=0, body=b""), "cannot download", words)
    assert len(site.asked) == requests
    assert left(cache) == set()


def test_a_busy_server_is_asked_again(site):
    url = site.put(status=503)

    def recover() -> None:
        site.files["/model.pt"].status = 503 if len(site.asked) < 2 else 200

    site.files["/model.pt"].before = recover
    assert origins.resolve(url).path.read_bytes() == BODY
    assert len(site.asked) == 3


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"\n<!DOCTYPE html><html>login</html>", ["web page", "/resolve/ instead of /blob/"]),
        (b"\xef\xbb\xbf<HTML><body>", ["web page"]),
        (b"<?xml version='1.0'?><Error>AccessDenied</Error>", ["web page"]),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n", ["git-LFS pointer", "git lfs pull"]),
        (b"", ["is empty"]),
    ],
)
def test_what_stands_in_for_weights(site, cache, release, tmp_path, body, words):
    refused(site.put("page.pt", body), "the download of", *words)
    assert left(cache) == set()
    local = tmp_path / "page.pt"
    local.write_bytes(body)
    refused(local, str(local), words[0])
    release("by_hand")
    cache.mkdir(exist_ok=True)
    (cache / "by_hand.pt").write_bytes(body)
    refused("by_hand", words[0])


Usage = namedtuple("Usage", "total used free")


@pytest.mark.parametrize("length", [-1, None], ids=["announced", "unknown"])
def test_a_full_disk_is_seen_before_it_is_full(site, cache, monkeypatch, length):
    usage = Usage(0, 0, origins._RESERVE + 500_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage)
    refused(site.put(length=length), "GB free", "CMTOOL_CACHE")
    assert left(cache) == set()


def test_an_absurd_length_is_refused_at_once(site, cache):
    refused(site.put(length=10**18), "needs 1000000000.00 GB")
    assert left(cache) == set()


def test_a_folder_that_cannot_be_written(site, cache):
    cache.parent.mkdir()
    cache.write_bytes(b"a file where the folder should be")
    refused(site.put(), "cannot keep", "CMTOOL_CACHE")


@pytest.mark.parametrize("variable", ["CMTOOL_OFFLINE", "HF_HUB_OFFLINE"])
def test_offline_asks_nobody_and_says_what_to_put_where(site, cache, release, monkeypatch, variable):
    release()
    monkeypatch.setenv(variable, "1")
    refused("tiny_model", "cannot download tiny_model", "offline", f"put it into {cache} as tiny_model.pt")
    refused(site.put(), "cannot download", "offline", "as model.pt")
    assert site.asked == []
    assert not cache.exists()
    assert origins.resolve("tiny_model", offline=False).path.exists()


def test_no_connection(cache):
    refused("cd_imagenet64_l2", "no connection", f"put it into {cache} as cd_imagenet64_l2.pt, or give its path")
    refused("https://example.invalid/x.pt", "no connection", "as x.pt")
    with socket.socket() as taken:  # bound and not listening: connections are refused
        taken.bind(("127.0.0.1", 0))
        refused(f"http://127.0.0.1:{taken.getsockname()[1]}/x.pt", "no connection")


def test_a_proxy_is_not_asked_for_this_machine(site, monkeypatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    assert origins.resolve(site.put()).path.read_bytes() == BODY


def test_a_silent_server(site, monkeypatch):
    monkeypatch.setattr(origins, "_TIMEOUT", 0.1)
    done = threading.Event()
    url = site.put()
    site.files["/model.pt"].before = lambda: done.wait(10)
    refused(url, "the server does not answer")
    done.set()


def test_an_answer_that_makes_no_sense():
    def answer(handler: BaseHTTPRequestHandler) -> None:
        handler.wfile.write(b"SSH-2.0-OpenSSH_9\r\n")

    with serving(answer) as address:
        refused(f"{address}/x.pt", "cannot download", "the answer makes no sense")


def test_https_to_a_server_that_speaks_http(site):
    refused(site.address.replace("http://", "https://") + "/x.pt", "no secure connection")


def test_redirects_are_followed_within_bounds(site):
    site.put()
    url = site.put("there", b"", status=302, location="/model.pt", length=0)
    located = origins.resolve(url)
    assert located.path.read_bytes() == BODY
    assert located.path.name == "there"
    site.put("loop", b"", status=302, location="/loop", length=0)
    refused(f"{site.address}/loop", "cannot download", "302")


@pytest.mark.parametrize(
    ("location", "words"),
    [
        ("http://example.org/x.pt", "only https"),
        ("ftp://example.org/x.pt", "only https"),
        ("file:///etc/passwd", "302"),
        ("https://user:secret@example.org/x", "user name"),
    ],
)
def test_redirects_to_elsewhere_are_refused(site, cache, location, words):
    url = site.put("there", b"", status=302, location=location, length=0)
    assert "secret" not in refused(url, words)
    assert left(cache) == set()


def test_a_redirect_never_leaves_https(site):
    """The server here speaks http only: the rule itself is asked."""
    from email.message import Message
    from io import BytesIO
    from urllib.request import Request

    follow = origins._Redirects().redirect_request
    secure, plain = Request("https://example.org/a"), Request("http://127.0.0.1/a")
    with pytest.raises(CheckpointError, match="away from https"):
        follow(secure, BytesIO(), 302, "", Message(), "http://127.0.0.1/b")
    assert follow(secure, BytesIO(), 302, "", Message(), "https://example.net/b").full_url == "https://example.net/b"
    assert follow(plain, BytesIO(), 302, "", Message(), "http://localhost/b").full_url == "http://localhost/b"


@pytest.mark.parametrize(
    ("last", "name"),
    [
        ("model.pt", "model.pt"),
        ("model.pt?download=true", "model.pt"),
        ("", "model"),
        ("..", "model"),
        ("%2e%2e", "model"),
        ("%2e%2e%2f%2e%2e%2fetc%2fpasswd", "etc_passwd"),
        ("..%5c..%5cx.pt", "x.pt"),
        (".hidden", "hidden"),
        ("a%00b%0a.pt", "a_b_.pt"),
        ("naïve model.pt", "na_ve_model.pt"),
        ("x" * 300 + ".pt", "x" * 97 + ".pt"),
    ],
)
def test_file_names_in_addresses_are_made_harmless(site, cache, last, name):
    url = f"{site.address}/{last}"
    site.files.update({urlsplit(origins._checked(url)).path: Resource()})
    path = origins.resolve(url).path
    assert path.name == name
    assert path.parent.parent == cache
    assert path.read_bytes() == BODY
    assert [file for file in cache.parent.parent.iterdir() if file.name != "cache"] == []


def test_two_at_once_download_once(site, cache, release):
    release(length=-1)
    site.files["/tiny_model.pt"].before = lambda: time.sleep(0.2)
    found: list[Path] = []
    threads = [threading.Thread(target=lambda: found.append(origins.resolve("tiny_model").path)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [cache / "tiny_model.pt"] * 4
    assert found[0].read_bytes() == BODY
    assert len(site.asked) == 1


def test_an_interrupted_download_keeps_what_it_has(site, cache):
    url = site.put()

    def stop(done: int, total: int | None) -> None:
        if done > 300_000:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        origins.resolve(url, progress=stop)
    have = next(cache.rglob("*.part")).stat().st_size
    assert 300_000 < have < len(BODY)
    assert origins.resolve(url).path.read_bytes() == BODY
    assert site.asked[-1][1]["range"] == f"bytes={have}-"


# --- the Hugging Face Hub --------------------------------------------------------------------------------------------

COMMIT = "0123456789abcdef0123456789abcdef01234567"
PIPELINE = {  # no two files alike: of equal ones the Hub's client fetches one
    "model_index.json": b"{}",
    "README.md": b"---\nlicense: mit\n---\n",
    "unet/config.json": b"{ }",
    "unet/diffusion_pytorch_model.safetensors": BODY,
    "unet/diffusion_pytorch_model.bin": BODY[::-1],
    "unet/diffusion_pytorch_model.fp16.safetensors": BODY[:5000],
    "scheduler/scheduler_config.json": b"{  }",
    "vae/diffusion_pytorch_model.safetensors": b"vae",
    "samples/x.png": b"png",
}


def reply(handler: BaseHTTPRequestHandler, code: int, body: bytes, headers: dict[str, str]) -> None:
    """An answer of the Hub's."""
    handler.send_response(code)
    for key, value in {"Content-Length": str(len(body)), "Content-Type": "application/json", **headers}.items():
        handler.send_header(key, value)
    handler.end_headers()
    if handler.command == "GET":
        handler.wfile.write(body)


def oid(body: bytes) -> str:
    """What the Hub calls a file of this content."""
    return hashlib.sha1(body).hexdigest()


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A Hub with the repositories of its dictionary: name -> {file: bytes}, or the Hub's code for an error."""
    package = pytest.importorskip("huggingface_hub")
    constants = pytest.importorskip("huggingface_hub.constants")
    repositories: dict[str, dict[str, bytes] | str] = {"cm/pipeline": dict(PIPELINE)}
    asked: list[str] = []
    refusing: set[str] = set()  # files that are listed, and then not given

    def answer(handler: BaseHTTPRequestHandler) -> None:
        path = unquote(urlsplit(handler.path).path)
        asked.append(f"{handler.command} {path}")
        words = path.removeprefix("/api/models").strip("/").split("/")
        files = repositories.get("/".join(words[:2]), "RepoNotFound")
        code, body, headers = 200, b"", {}
        revision = words[3] if len(words) > 3 else "main"
        name = "/".join(words[4:])
        if isinstance(files, dict) and revision not in ("main", COMMIT):
            code, headers["X-Error-Code"] = 404, "RevisionNotFound"
        elif isinstance(files, str):
            code, headers["X-Error-Code"] = (403 if files == "GatedRepo" else 401), files
        elif path.startswith("/api/models") and words[2:3] == ["tree"]:
            described = [{"type": "file", "path": f, "size": len(b), "oid": oid(b)} for f, b in files.items()]
            body = json.dumps(described).encode()
        elif path.startswith("/api/models"):
            listed = [{"rfilename": f, "size": len(b), "blobId": oid(b)} for f, b in files.items()]
            body = json.dumps({"id": "/".join(words[:2]), "sha": COMMIT, "siblings": listed}).encode()
        elif name in refusing:
            code, headers["X-Error-Code"] = 403, "GatedRepo"
        elif name in files:
            body = files[name]
            headers |= {"ETag": f'"{oid(body)}"', "X-Repo-Commit": COMMIT}
        else:
            code, headers["X-Error-Code"] = 404, "EntryNotFound"
        reply(handler, code, body, headers)

    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", True)
    with serving(answer) as address:
        monkeypatch.setattr(constants, "ENDPOINT", address)
        template = address + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        yield namedtuple("Hub", "repositories asked refusing cache")(repositories, asked, refusing, tmp_path / "hub")
        package.close_session()


def fetched(hub) -> set[str]:
    """The files of whose bytes the Hub was asked."""
    return {line.split("/", 5)[5] for line in hub.asked if line.startswith("GET ") and "/resolve/" in line}


def test_a_pipeline_comes_as_the_folder_of_what_is_needed(hub, capfd):
    seen: list[tuple[int, int | None]] = []
    located = origins.resolve("hf:cm/pipeline", progress=lambda done, total: seen.append((done, total)))
    needed = {
        "model_index.json",
        "README.md",
        "unet/config.json",
        "unet/diffusion_pytorch_model.safetensors",
        "scheduler/scheduler_config.json",
    }
    assert fetched(hub) == needed
    assert {file.relative_to(located.path).as_posix() for file in located.path.rglob("*.*")} == needed
    assert (located.path / "unet/diffusion_pytorch_model.safetensors").read_bytes() == BODY
    total = sum(len(PIPELINE[name]) for name in needed)
    assert seen[-1] == (total, total)
    assert located.released is None
    assert capfd.readouterr() == ("", "")  # its own bars are silent
    hub.asked.clear()
    assert origins.resolve("hf:cm/pipeline").path == located.path
    assert origins.resolve("hf:cm/pipeline", offline=True).path == located.path
    assert hub.asked == []


SHARDS = {f"diffusion_pytorch_model-0000{n}-of-00002.safetensors": BODY[:n] for n in (1, 2)}


@pytest.mark.parametrize(
    ("files", "needed"),
    [
        ({"model.safetensors": BODY, "other.bin": BODY}, {"model.safetensors"}),
        (
            {"config.json": b"{}", "diffusion_pytorch_model.bin": BODY, "x.ckpt": BODY},
            {"config.json", "diffusion_pytorch_model.bin"},
        ),
        (
            {"config.json": b"{}", "diffusion_pytorch_model.safetensors.index.json": b"{ }", **SHARDS},
            {"config.json", "diffusion_pytorch_model.safetensors.index.json", *SHARDS},
        ),
    ],
    ids=["cmtool", "bare UNet", "in parts"],
)
def test_other_repositories(hub, files, needed):
    hub.repositories["cm/other"] = files
    path = origins.resolve("hf:cm/other").path
    assert fetched(hub) == needed
    assert all((path / name).read_bytes() == files[name] for name in needed)


def test_one_file_of_a_repository_at_a_revision(hub):
    hub.repositories["cm/other"] = {"a/b [1].pt": BODY, "a/b 1.pt": b"no"}
    located = origins.resolve(f"hf:cm/other@{COMMIT}:a/b [1].pt")
    assert located.path.name == "b [1].pt"
    assert located.path.read_bytes() == BODY
    assert len([line for line in hub.asked if line.startswith("GET ") and "/resolve/" in line]) == 1
    hub.asked.clear()
    assert origins.resolve(f"hf:cm/other@{COMMIT}:a/b [1].pt").path == located.path
    assert hub.asked == []


def test_a_cache_that_another_program_made_works_offline(hub):
    """The layout of the Hub's cache, without the lists that this version of its package writes."""
    root = hub.cache / "models--cm--made"
    for name in ("model_index.json", "unet/config.json", "unet/diffusion_pytorch_model.safetensors"):
        file = root / "snapshots" / COMMIT / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(PIPELINE[name])
    (root / "refs").mkdir()
    (root / "refs" / "main").write_text(COMMIT)
    refused("hf:cm/made", "offline", "cmtool fetch hf:cm/made", offline=True)  # its scheduler is missing
    (root / "snapshots" / COMMIT / "scheduler").mkdir()
    (root / "snapshots" / COMMIT / "scheduler" / "scheduler_config.json").write_bytes(b"{}")
    assert origins.resolve("hf:cm/made", offline=True).path == root / "snapshots" / COMMIT
    assert origins.resolve(f"hf:cm/made@{COMMIT}", offline=True).path == root / "snapshots" / COMMIT
    file = origins.resolve("hf:cm/made:unet/config.json", offline=True).path
    assert file == root / "snapshots" / COMMIT / "unet" / "config.json"
    assert hub.asked == []


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("hf:cm/nothing", ["the Hub has no model cm/nothing", "hf auth login"]),
        ("hf:cm/gated", ["agreed to its terms", "hf auth login"]),
        ("hf:cm/pipeline@old", ["cm/pipeline has no revision old", "leave out @revision"]),
        ("hf:cm/pipeline:modle_index.json", ["has no file modle_index.json", "did you mean model_index.json"]),
        ("hf:cm/empty", ["holds no model in a form that is known", "hf:cm/empty:FILE"]),
        ("hf:cm/part", ["holds no model in a form that is known"]),
        ("hf:cm/busy", ["the Hub answered 401"]),
        ("hf:cm/pointer:m.pt", ["git-LFS pointer"]),
        ("hf:cm/--bad..name", ["names nothing on the Hub"]),
    ],
)
def test_what_the_hub_refuses(hub, source, words):
    more = {
        "cm/gated": "GatedRepo",
        "cm/busy": "SomethingElse",
        "cm/empty": {"notes.txt": b"x"},
        "cm/part": {
            "config.json": b"{}",
            "diffusion_pytorch_model.safetensors.index.json": b"{ }",
            "diffusion_pytorch_model-00002-of-00002.safetensors": BODY,
        },
        "cm/pointer": {"m.pt": b"version https://git-lfs.github.com/spec/v1\n"},
    }
    hub.repositories.update(more)
    refused(source, *words)


def test_a_gated_model_that_may_be_listed(hub):
    hub.refusing.add("unet/diffusion_pytorch_model.safetensors")
    refused("hf:cm/pipeline", "agreed to its terms")
    refused("hf:cm/pipeline", "offline", offline=True)  # what has come of it is not taken for a model


def test_no_connection_to_the_hub_is_said_at_once(hub, monkeypatch):
    from huggingface_hub import constants

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{taken.getsockname()[1]}")
        start = time.monotonic()
        refused("hf:cm/pipeline", "cannot download hf:cm/pipeline: no connection", "give its path")
        refused("hf:cm/pipeline:model_index.json", "no connection")
    assert time.monotonic() - start < 5
    assert hub.asked == []


def test_offline_and_the_hub(hub, monkeypatch):
    monkeypatch.setenv("CMTOOL_OFFLINE", "yes")
    refused("hf:cm/pipeline", "offline", "cmtool fetch hf:cm/pipeline")
    assert hub.asked == []


def test_the_hub_without_its_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    refused("hf:cm/pipeline", "huggingface_hub", "pip install 'cmtool[hub]'", kind=DependencyError)


def test_the_hub_of_the_environment(hub, tmp_path):
    """HF_ENDPOINT and HF_HOME, which huggingface_hub reads when it is imported."""
    from huggingface_hub import constants

    hub.repositories["cm/other"] = {"m.bin": BODY}
    code = "from cmtool.io import origins; print(origins.resolve('hf:cm/other:m.bin').path)"
    environment = {**os.environ, "HF_ENDPOINT": constants.ENDPOINT, "HF_HOME": str(tmp_path / "home")}
    environment.pop("HF_HUB_CACHE", None)
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], env=environment, capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert Path(done.stdout.strip()).is_relative_to(tmp_path / "home" / "hub")
    assert Path(done.stdout.strip()).read_bytes() == BODY
