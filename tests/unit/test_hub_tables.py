"""Data sets of the Hub, read by `datasets` itself from a stand-in on loopback, in programs of their own."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
import time
from collections import namedtuple
from http.server import BaseHTTPRequestHandler
from urllib.parse import unquote, urlsplit

import numpy as np
import pytest
import torch
from PIL import Image

from cmtool.errors import DataError
from cmtool.io.data import open_data
from cmtool.io.hub_tables import _Place
from tests.unit.test_origins import COMMIT, oid, reply, serving

datasets = pytest.importorskip("datasets")

SUBSETS = """---
configs:
- config_name: small
  data_files: [{split: train, path: small/train.parquet}]
- config_name: big
  data_files: [{split: train, path: big/train.parquet}]
---
"""


def rows(count: int, seed: int) -> bytes:
    """A parquet file of images 8x8 in two classes."""
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])})
    cells = []
    for image in np.random.default_rng(seed).integers(0, 256, (count, 8, 8, 3), dtype=np.uint8):
        Image.fromarray(image).save(encoded := io.BytesIO(), "PNG")
        cells.append({"bytes": encoded.getvalue(), "path": None})
    labels = [number % 2 for number in range(count)]
    datasets.Dataset.from_dict({"image": cells, "label": labels}, features).to_parquet(file := io.BytesIO())
    return file.getvalue()


def entries(files: dict[str, bytes], folder: str) -> list[dict]:
    """What lies directly in a folder of a repository."""
    found = {}
    for name, body in files.items():
        first, _, deeper = name.removeprefix(folder).partition("/")
        if name.startswith(folder):
            kind = {"type": "directory", "size": 0} if deeper else {"type": "file", "size": len(body)}
            found[folder + first] = {"path": folder + first, "oid": oid(body), **kind}
    return list(found.values())


@pytest.fixture
def hub(tmp_path):
    """repositories: name -> {file: bytes}, or the Hub's code for an error; asked: what it was asked for."""
    table = {f"data/train-{part}-of-00002.parquet": rows(5, part) for part in range(2)}
    repositories: dict[str, dict[str, bytes] | str] = {
        "cm/pictures": {"README.md": b"---\n---\n", "data/test-0-of-1.parquet": rows(3, 2), **table},
        "cm/many": {"README.md": SUBSETS.encode(), "small/train.parquet": rows(2, 3), "big/train.parquet": rows(4, 4)},
    }
    asked: list[str] = []
    broken: set[str] = set()  # files whose connection breaks
    listed: set[str] = set()  # repositories that are shown to everybody and given to some

    def answer(handler: BaseHTTPRequestHandler) -> None:
        path = unquote(urlsplit(handler.path).path)
        asked.append(path)
        owner, name, *words = path.removeprefix("/api").removeprefix("/datasets/").split("/")
        verb, revision, *deeper = [*words, *("", "main")[len(words) :]]
        files = repositories.get(f"{owner}/{name}", "RepoNotFound")
        place = "/".join(deeper)
        code, body, headers = 200, b"", {}
        if isinstance(files, str):
            code, headers["X-Error-Code"] = {"GatedRepo": 403, "Ill": 500}.get(files, 401), files
        elif revision not in ("main", "v1", COMMIT):
            code, headers["X-Error-Code"] = 404, "RevisionNotFound"
        elif verb == "tree":
            body = json.dumps(entries(files, f"{place}/" if place else "")).encode()
        elif path.startswith("/api/"):
            body = json.dumps({"id": f"{owner}/{name}", "sha": COMMIT, "siblings": []}).encode()
        elif f"{owner}/{name}" in listed:
            code, headers["X-Error-Code"] = 403, "GatedRepo"
        elif place in broken and handler.command == "GET":
            handler.connection.close()
            return
        elif place in files:
            body = files[place]
            headers |= {"ETag": f'"{oid(body)}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
            if part := re.fullmatch(r"bytes=(\d+)-(\d+)", handler.headers.get("Range", "")):
                first, last = int(part[1]), min(int(part[2]), len(body) - 1)
                headers["Content-Range"] = f"bytes {first}-{last}/{len(body)}"
                code, body = 206, body[first : last + 1]
        else:
            code, headers["X-Error-Code"] = 404, "EntryNotFound"
        reply(handler, code, body, headers)

    with serving(answer) as address:
        yield namedtuple("Hub", "repositories asked broken listed address home")(
            repositories, asked, broken, listed, address, tmp_path / "home"
        )


def run(hub, *command: str, **more: str) -> subprocess.CompletedProcess[str]:
    """A program that knows no other Hub."""
    proxies = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy")
    inherited = {key: value for key, value in os.environ.items() if key not in proxies and not key.startswith("HF_")}
    own = {"HF_ENDPOINT": hub.address, "HF_HOME": str(hub.home), "HF_HUB_DISABLE_TELEMETRY": "1"}
    environment = inherited | own | more
    return subprocess.run(
        [sys.executable, "-m", "cmtool", *command], env=environment, capture_output=True, text=True, timeout=120
    )


def packed(hub, source: str, folder, *options: str, **more: str):
    done = run(hub, "data", "pack", *options, source, str(folder), **more)
    assert done.returncode == 0, done.stderr
    return open_data(folder)


def test_streamed_and_stored_they_are_the_same(hub, tmp_path):
    """Then, without a connection or kept off the network, it comes from the cache; a stream asks for what it needs."""
    streamed = packed(hub, "hf:cm/pictures", tmp_path / "a", "--stream")
    assert not any("test-0" in path for path in hub.asked)
    stored = packed(hub, "hf:cm/pictures@v1:train", tmp_path / "b")
    assert len(streamed) == 10
    assert streamed.class_names == ("cat", "dog")
    assert torch.equal(streamed.pictures, stored.pictures)
    assert torch.equal(streamed.labels, stored.labels)
    assert streamed.fingerprint == stored.fingerprint

    hub.asked.clear()
    kept = packed(hub, "hf:cm/pictures@v1", tmp_path / "c", CMTOOL_OFFLINE="1")
    assert hub.asked == []
    assert torch.equal(kept.pictures, stored.pictures)
    start = time.monotonic()
    cut = packed(hub, "hf:cm/pictures@v1:train", tmp_path / "d", HF_ENDPOINT="http://127.0.0.1:9")
    assert time.monotonic() - start < 20  # the client's own retries take 25 s
    assert torch.equal(cut.pictures, stored.pictures)


def test_a_subset_and_a_part_of_a_split(hub, tmp_path):
    assert len(packed(hub, "hf:cm/many:big/train", tmp_path / "a", "--stream")) == 4
    assert len(packed(hub, "hf:cm/many@main:small/train[:1]", tmp_path / "b")) == 1


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("hf:cm/many", ["subsets small, big", "hf:cm/many:small/train"]),
        ("hf:cm/many@v1:big", ["subsets small, big", "hf:cm/many@v1:big/train"]),
        ("hf:cm/many:huge/train", ["'huge' not found", "[subset/]split"]),
        ("hf:cm/pictures:val", ["'train', 'test'", "[subset/]split"]),
        ("hf:cm/pictures@gone", ["no revision gone", "leave out @revision"]),
        ("hf:cm/none", ["no data set cm/none", "hf auth login"]),
        ("hf:cm/shut", ["agreed to its terms", "hf auth login"]),
        ("hf:cm/shown", ["agreed to its terms", "hf auth login"]),
        ("hf:cm/ill", ["the Hub answered 500", "later"]),
        ("hf:cm/bare", ["data files", "check the name"]),
    ],
)
def test_what_is_not_there(hub, tmp_path, source, words):
    hub.repositories.update({"cm/shut": "GatedRepo", "cm/ill": "Ill", "cm/bare": {"README.md": b"none"}})
    hub.repositories["cm/shown"] = hub.repositories["cm/pictures"]
    hub.listed.add("cm/shown")
    done = run(hub, "data", "pack", "--stream", source, str(tmp_path / "a"))
    assert done.returncode == 1
    assert re.fullmatch(r"error: .*\nhint: .*\n", done.stderr), done.stderr
    for word in words:
        assert word in done.stderr
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        ({"CMTOOL_OFFLINE": "1"}, "this is offline"),
        ({"HF_DATASETS_OFFLINE": "1"}, "this is offline"),
        ({"HF_ENDPOINT": "http://127.0.0.1:9"}, "no connection"),
    ],
)
def test_nothing_without_a_connection(hub, more, reason):
    done = run(hub, "data", "inspect", "hf:cm/pictures", **more)
    assert done.returncode == 1
    assert reason in done.stderr
    assert "not in the cache" in done.stderr
    assert hub.asked == []


def test_a_connection_that_breaks_is_told(hub, tmp_path):
    """`datasets` would be silent for ten minutes; a minute's patience here, most of it huggingface_hub's own."""
    hub.broken.add("data/train-1-of-00002.parquet")
    start = time.monotonic()
    done = run(hub, "data", "pack", "--stream", "hf:cm/pictures", str(tmp_path / "a"))
    assert time.monotonic() - start < 100
    assert done.returncode == 1
    assert re.fullmatch(r"error: cannot read 'hf:cm/pictures': .*\nhint: .*connection\n", done.stderr), done.stderr
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("hf:o/n", ("o/n", None, None, "train")),
        ("hf:n:test", ("n", None, None, "test")),
        ("hf:o/n@v1.0:a/b", ("o/n", "v1.0", "a", "b")),
        ("hf:o/n@refs/pr/1", ("o/n", "refs/pr/1", None, "train")),
        ("hf:o/n:a/", ("o/n", None, "a", "train")),
        ("hf:o/n:train[:10%]", ("o/n", None, None, "train[:10%]")),
    ],
)
def test_names(text, found):
    place = _Place.of(text)
    assert (place.repository, place.revision, place.subset, place.split) == found


@pytest.mark.parametrize("text", ["hf:", "hf:/n", "hf:a/b/c", "hf:o/n:a/b/c", "hf:o/n@", "hf:o/n:\n", "hf:o n"])
def test_no_names(text):
    with pytest.raises(DataError, match="names nothing on the Hub"):
        _Place.of(text)
