"""Where model files come from: a path, an address, a repository of the Hugging Face Hub, or the name of a release.

`resolve` turns what a user wrote into a local path and downloads what is not there yet, once:

    $CMTOOL_CACHE, else $XDG_CACHE_HOME/cmtool, else ~/.cache/cmtool
        models/NAME               a released checkpoint under its own file name, also one that a user put there
        models/HASH/NAME          a file from any other address, HASH being that of the address
        models/.../NAME.json      what is known of the file beside it: address, bytes, SHA-256, when
        models/.../NAME.part      a download that is under way or was cut; NAME.part.json tells whether it can go on
    the cache of huggingface_hub  what comes from the Hub

A file is complete or absent. Where its publisher gives no checksum, that of the first download is recorded and holds
from then on. $CMTOOL_OFFLINE=1 and $HF_HUB_OFFLINE=1 keep everything off the network.
"""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import ipaddress
import json
import os
import re
import shutil
import socket
import ssl
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from email.message import Message
from pathlib import Path
from typing import IO, Any, NamedTuple, NoReturn
from urllib.parse import SplitResult, quote, unquote, urlsplit

from cmtool import __version__, cache
from cmtool.errors import CheckpointError, UserError
from cmtool.io import box, catalogue, hub
from cmtool.io.catalogue import Released
from cmtool.io.files import sha256_of, write_atomic

Progress = Callable[[int, int | None], None]  # bytes there so far, bytes in all

ENDINGS = (".safetensors", ".pt", ".pth", ".pkl", ".ckpt", ".bin", ".msgpack", ".npz")
_TIMEOUT = 30.0  # seconds without a byte
_TRIES = 5
_PAUSE = 1.0  # seconds before the second try, doubled from one to the next
_CHUNK = 2**18
_RESERVE = 64 * 2**20  # bytes that a download leaves free on the disk
_BUSY = (408, 425, 429, 500, 502, 503, 504)  # answers that may change by themselves


@dataclass(frozen=True)
class Located:
    """A source's place on this machine.

    Args:
        path: a file, or a folder (a run, or a model in parts).
        released: what it is, if it comes from the catalogue or is called like a file of it.
        source: what the user wrote.
    """

    path: Path
    released: Released | None
    source: str


def resolve(
    source: str | os.PathLike[str], *, offline: bool | None = None, progress: Progress | None = None
) -> Located:
    """The local path of a model source, downloaded if need be.

    Args:
        source: a path; an https address; `hf:owner/name[@revision][:file]`; a name of `box.BOXED` or of
            `catalogue.RELEASED`. What exists as a path is that path; an `os.PathLike` is never anything else.
        offline: stay off the network; None asks $CMTOOL_OFFLINE and $HF_HUB_OFFLINE.
        progress: called with the bytes there so far and those in all (None if nobody knows).
    Raises:
        CheckpointError: nothing is called so, or it cannot be had, or it is not what it should be.
        DependencyError: `hf:` without huggingface_hub.
    """
    text = os.fspath(source)
    offline = kept_offline() if offline is None else offline
    if isinstance(source, str):
        if text.startswith(hub.MARK):
            path = hub.fetch(text, offline, progress)
            if path.is_file():
                _refuse_stand_in(_start(path), text)
            return Located(path, None, text)
        if re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", text):
            return _from_address(text, offline, progress)
    path = Path(text).expanduser() if text.startswith("~") else Path(text)
    if text and os.path.exists(path):
        if path.is_file():
            _refuse_stand_in(_start(path), str(path))
        return Located(path, catalogue.by_file(path), text)
    if isinstance(source, str) and text in box.BOXED:
        return Located(box.BOXED[text].file, None, text)
    if isinstance(source, str) and text in catalogue.RELEASED:
        released = catalogue.RELEASED[text]
        file = folder() / released.file
        _ensure(released.url, file, released, text, offline, progress)
        return Located(file, released, text)
    if isinstance(source, str) and text in catalogue.WEIGHTS:
        raise CheckpointError(f"{text} are the weights of a measure, and no model", "cmtool models ls lists the models")
    if not isinstance(source, str) or _like_path(text):
        named = catalogue.by_file(Path(text))
        hint = f"did you mean the release {named.name}?" if named else "name a run folder, a model file or a release"
        raise CheckpointError(f"there is no model at {text!r}", hint)
    raise CheckpointError(
        f"there is no model at {text!r}, and no released checkpoint is called so", catalogue.suggest(text)
    )


def bring(url: str, file: Path, name: str, sha256: str, *, progress: Progress | None = None) -> None:
    """See to it that a file of the cache is there, and is what it should be.

    Args:
        url: where it comes from. file: where it is to lie. name: what users call it. sha256: how its checksum starts.
    Raises:
        CheckpointError: it cannot be had, or is another file.
    """
    _ensure(url, file, _Known(sha256=sha256), name, kept_offline(), progress)


def folder() -> Path:
    """Where downloaded models are kept; it need not exist."""
    return cache.folder("models")


def kept(released: Released) -> Path | None:
    """The file of a release, if it is in the cache; it is not looked into."""
    file = folder() / released.file
    return file if file.is_file() else None


def checksum(file: Path) -> str | None:
    """The recorded SHA-256 of a cached file; None if there is no record that fits."""
    try:
        return _Record.of(file).sha256 if file.is_file() and _Record.of(file).fits(file.stat()) else None
    except OSError:
        return None


def kept_offline() -> bool:
    """Whether $CMTOOL_OFFLINE or $HF_HUB_OFFLINE keeps everything off the network."""
    names = ("CMTOOL_OFFLINE", "HF_HUB_OFFLINE")
    return any(os.environ.get(name, "").strip().lower() in ("1", "true", "yes", "on") for name in names)


def _like_path(text: str) -> bool:
    separators = {"/", os.sep, os.altsep or os.sep}
    return not text or any(separator in text for separator in separators) or text.lower().endswith(ENDINGS)


# --- addresses -------------------------------------------------------------------------------------------------------


def _from_address(text: str, offline: bool, progress: Progress | None) -> Located:
    url = _checked(text)
    if released := catalogue.by_url(url):
        file = folder() / released.file
    else:
        file = folder() / hashlib.sha256(url.encode()).hexdigest()[:16] / _file_name(url)
    _ensure(url, file, released, shown(url), offline, progress)
    return Located(file, released, text)


def _checked(text: str) -> str:
    """The address as it is asked for, without its fragment.

    Raises:
        CheckpointError: no address, another scheme than https (http within this machine), a password in it.
    """
    try:
        parts = urlsplit(text)
        host, _ = parts.hostname, parts.port
        if not host or not text.isprintable() or " " in host:
            raise ValueError
        host.encode("idna")
    except ValueError as error:  # UnicodeError too
        raise CheckpointError(f"{text!r} is no address of a file", "write https://host/path/file") from error
    if parts.scheme != "https" and not (parts.scheme == "http" and _loopback(host)):
        raise CheckpointError(
            f"{shown(text)} cannot be downloaded: only https can be trusted",
            "use an https address, or download the file and give its path",
        )
    if parts.username is not None or parts.password is not None:
        raise CheckpointError(
            f"the address of {host} holds a user name, which would be kept and shown",
            "download the file and give its path",
        )
    path = quote(parts.path, safe="/%~!$&'()*+,;=:@") or "/"
    query = quote(parts.query, safe="/?%~!$&'()*+,;=:@")
    return SplitResult(parts.scheme, parts.netloc, path, query, "").geturl()


def _loopback(host: str) -> bool:
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return host == "localhost"


def shown(url: str) -> str:
    """An address for messages and records: a query may hold a key."""
    parts = urlsplit(url)
    return SplitResult(parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", "").geturl()


def _file_name(url: str) -> str:
    """A harmless file name after the last part of an address."""
    last = unquote(urlsplit(url).path.rpartition("/")[2], errors="replace")
    return re.sub(r"[^A-Za-z0-9._+-]", "_", last).strip("._")[-100:] or "model"


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows where the next address would be allowed as the first one, and never from https back to http."""

    def redirect_request(
        self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: Message, newurl: str
    ) -> urllib.request.Request | None:
        try:
            url = _checked(newurl)
            if urlsplit(req.full_url).scheme == "https" and urlsplit(url).scheme != "https":
                raise CheckpointError(
                    f"{shown(req.full_url)} leads to {shown(url)}, away from https",
                    "download the file and give its path",
                )
        except CheckpointError:
            fp.close()
            raise
        return super().redirect_request(req, fp, code, msg, headers, url)  # type: ignore[arg-type]


def _open(url: str, headers: Mapping[str, str]) -> http.client.HTTPResponse:
    handlers: list[urllib.request.BaseHandler] = [_Redirects()]
    if _loopback(urlsplit(url).hostname or ""):
        handlers.append(urllib.request.ProxyHandler({}))  # a proxy's loopback is another machine's
    opener = urllib.request.build_opener(*handlers)
    opener.addheaders = []
    request = urllib.request.Request(url, headers={"User-Agent": f"cmtool/{__version__}", **headers})
    response: http.client.HTTPResponse = opener.open(request, timeout=_TIMEOUT)
    return response


# --- files of the cache ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Record:
    """What is known of a file in the cache. The time stamp tells whether it was written to since it was checked."""

    url: str = ""
    bytes: int = -1
    sha256: str | None = None
    when: str = ""
    mtime_ns: int = -1

    @classmethod
    def of(cls, file: Path) -> _Record:
        """The record beside a file; an empty one where there is none, or a damaged one."""
        found = _read_json(_record_file(file))
        usable = {"url": str, "bytes": int, "sha256": str, "when": str, "mtime_ns": int}
        return cls(**{name: found[name] for name, kind in usable.items() if isinstance(found.get(name), kind)})

    def fits(self, stat: os.stat_result) -> bool:
        """Whether the file is still the one that was checked."""
        return (self.bytes, self.mtime_ns) == (stat.st_size, stat.st_mtime_ns) and self.sha256 is not None


class _Known(NamedTuple):
    """What is known of a file that is no release: its bytes, and at least the start of its SHA-256."""

    size: int | None = None
    sha256: str | None = None


def _ensure(
    url: str, file: Path, released: Released | _Known | None, name: str, offline: bool, progress: Progress | None
) -> None:
    """See to it that the file is there and is the right one."""
    try:
        if _there(file, released):
            return
        if offline:
            _unreachable(name, file, "this is offline")
        with _locked(file):
            if not _there(file, released):  # another process may have brought it meanwhile
                _download(url, file, released, name, progress)
    except UserError:
        raise
    except OSError as error:
        raise CheckpointError(
            f"cannot keep {name} in {file.parent}: {error.strerror or error}",
            "check the folder, or name another one in CMTOOL_CACHE",
        ) from error


def _there(file: Path, released: Released | _Known | None) -> bool:
    """Whether the file is in the cache and is what it should be.

    It is read through only if it has changed since it was last found right, or was put there by hand.

    Raises:
        CheckpointError: another size or checksum than is known.
    """
    if not file.is_file():
        return False
    stat, record = file.stat(), _Record.of(file)
    size, sha256 = _expected(released, record)
    if record.fits(stat) and _is(record.sha256, sha256) and size == record.bytes:
        return True
    _refuse_stand_in(_start(file), str(file))
    found = sha256_of(file)
    if (size is not None and stat.st_size != size) or not _is(found, sha256):
        known = f"{size:,} bytes" if size is not None and stat.st_size != size else f"SHA-256 {sha256}"
        raise CheckpointError(
            f"{file} is not the file it should be: {known} expected, found {stat.st_size:,} bytes, SHA-256 {found}",
            f"delete it to download it again; if it is right, delete {_record_file(file)}",
        )
    with contextlib.suppress(OSError):  # a cache that others fill may be read only
        _write_record(file, record.url, found)
    return True


def _is(found: str | None, sha256: str | None) -> bool:
    """Whether a checksum is the expected one, of which perhaps only the start is known, or nothing."""
    return sha256 is None or (found is not None and found.startswith(sha256))


def _expected(released: Released | _Known | None, record: _Record) -> tuple[int | None, str | None]:
    """Size and checksum: the published ones, else those of the first time."""
    size = record.bytes if record.bytes >= 0 else None
    sha256 = record.sha256
    return (released and released.size) or size, (released and released.sha256) or sha256


def _write_record(file: Path, url: str, sha256: str) -> None:
    stat = file.stat()
    when = datetime.now(UTC).isoformat(timespec="seconds")
    record = _Record(url, stat.st_size, sha256, when, stat.st_mtime_ns)
    _write_json(_record_file(file), vars(record))


def _record_file(file: Path) -> Path:
    return file.with_name(f"{file.name}.json")


def _read_json(file: Path) -> dict[str, Any]:
    """What the file holds, or nothing: such notes are only ever a help."""
    try:
        with file.open("rb") as stream:
            found = json.loads(stream.read(2**16))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _write_json(file: Path, value: Mapping[str, Any]) -> None:
    text = json.dumps(value, indent=2) + "\n"
    write_atomic(file, lambda stream: stream.write(text.encode()))


@contextlib.contextmanager
def _locked(file: Path) -> Iterator[None]:
    """Only one process at a time brings a file. The lock ends with the process, however that ends."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.with_name(f"{file.name}.lock").open("a") as lock:
        # Without such locks (Windows, some network disks) two at once waste a download: the checks hold all the same.
        with contextlib.suppress(ImportError, OSError):
            import fcntl

            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _start(file: Path) -> bytes:
    try:
        with file.open("rb") as stream:
            return stream.read(512)
    except OSError as error:
        raise CheckpointError(
            f"cannot read {file}: {error.strerror or error}", "check the path and its permissions"
        ) from error


def _refuse_stand_in(start: bytes, name: str) -> None:
    """Refuse what is often found in place of weights, by its first bytes."""
    if start.startswith(b"version https://git-lfs.github.com/spec/"):
        raise CheckpointError(
            f"{name} holds a git-LFS pointer in place of the weights",
            "fetch it with `git lfs pull`, or download the file itself",
        )
    text = start.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    if text.startswith((b"<!doctype", b"<html", b"<head", b"<?xml")):
        raise CheckpointError(
            f"{name} holds a web page in place of the weights",
            "use the address of the file itself (on the Hub /resolve/ instead of /blob/)",
        )
    if not start:
        raise CheckpointError(f"{name} is empty", "get the file again")


# --- downloads -------------------------------------------------------------------------------------------------------


class _CutError(Exception):
    """A download that stopped and may go on at the next try."""


def _download(url: str, file: Path, released: Released | _Known | None, name: str, progress: Progress | None) -> None:
    """Bring the file, in several tries if it must be; what a cut download has brought is kept for the next run."""
    size, sha256 = _expected(released, _Record.of(file)) if released else (None, None)
    part = file.with_name(f"{file.name}.part")
    for tried in range(_TRIES):
        if tried:
            time.sleep(_PAUSE * 2 ** (tried - 1))
        try:
            _continue(url, part, size, name, file, progress)
            break
        except _CutError as error:
            reason = error
    else:
        raise CheckpointError(f"cannot download {name}: {reason}", "try again later; it goes on where it stopped")
    found = sha256_of(part)
    if not _is(found, sha256):
        _forget(part)
        raise CheckpointError(
            f"{name} was downloaded, but is not the right file: SHA-256 {sha256} expected, found {found}",
            f"try again; if {shown(url)} has changed for good, delete {_record_file(file)} or give the path of a file",
        )
    with part.open("rb+") as stream:
        os.fsync(stream.fileno())
    os.replace(part, file)
    _forget(part)
    _write_record(file, shown(url), found)


def _continue(url: str, part: Path, size: int | None, name: str, file: Path, progress: Progress | None) -> None:
    """One request, for what is still missing of `part`.

    Raises:
        _CutError: it may go better the next time. CheckpointError: it will not.
    """
    state = _read_json(_record_file(part))
    have = part.stat().st_size if part.exists() else 0
    # Only a strong tag, or a date, says that the rest will be the rest of the same file.
    same = _text(state, "etag") or _text(state, "last_modified")
    if not have or not same or state.get("url") != shown(url):
        have = 0
    headers = {"Accept-Encoding": "identity"}
    if have:
        headers |= {"Range": f"bytes={have}-", "If-Range": same}
    try:
        response = _open(url, headers)
    except urllib.error.HTTPError as error:
        with error:
            if error.code == 416 and have:
                if error.headers.get("Content-Range") == f"bytes */{have}":
                    return  # nothing was missing
                _forget(part)
                raise _CutError("the file has changed") from error
            _refused(error.code, name, file)
    except (OSError, http.client.HTTPException, ValueError) as error:
        _unreachable(name, file, _why(error), error)
    with response:
        if response.status == 206:
            span = re.fullmatch(r"bytes (\d+)-\d+/(\d+)", response.headers.get("Content-Range", ""))
            tag = response.headers.get("ETag")
            if not have or not span or int(span[1]) != have or (tag and state.get("etag") not in (None, tag)):
                _forget(part)
                raise _CutError("the server sent another part than was asked for")
            total: int | None = int(span[2])
        elif response.status == 200:
            have, total = 0, response.length
        else:
            _refused(response.status, name, file)
        if size is not None and total is not None and total != size:
            raise CheckpointError(
                f"{shown(url)} has {total:,} bytes, and {name} should have {size:,}",
                f"the file there has changed: put the right one into {file.parent} as {file.name}, or give its path",
            )
        free = shutil.disk_usage(part.parent).free + (part.stat().st_size if part.exists() and not have else 0)
        room = free - _RESERVE
        if total is not None and total - have > room:
            _no_room(name, total - have, part.parent, free)
        if not have:
            _write_json(_record_file(part), _validators(url, response.headers))
        _receive(response, part, have, total, room, name, progress)


def _receive(
    response: http.client.HTTPResponse,
    part: Path,
    have: int,
    total: int | None,
    room: int,
    name: str,
    progress: Progress | None,
) -> None:
    """Write the body behind the first `have` bytes of `part`."""
    start = have
    report = progress or (lambda done, total: None)
    with part.open("ab" if have else "wb") as stream:
        report(have, total)
        while True:
            try:
                chunk = response.read1(_CHUNK)
            except (OSError, http.client.HTTPException, ValueError) as error:
                raise _CutError(_stopped(have, total)) from error
            if not chunk:
                break
            if not have:
                try:
                    _refuse_stand_in(chunk[:512], f"the download of {name}")
                except CheckpointError:
                    _forget(part)
                    raise
            have += len(chunk)
            if total is None and have - start > room:
                _forget(part)
                _no_room(name, None, part.parent, room + _RESERVE)
            stream.write(chunk)
            report(have, total)
    if total is not None and have != total:
        raise _CutError(_stopped(have, total))
    if not have:
        _forget(part)
        raise CheckpointError(f"the download of {name} is empty", "check the address")


def _validators(url: str, headers: Message) -> dict[str, str]:
    tag = headers.get("ETag", "")
    strong = "" if tag.startswith("W/") else tag
    return {"url": shown(url), "etag": strong, "last_modified": headers.get("Last-Modified", "")}


def _text(state: Mapping[str, Any], key: str) -> str:
    value = state.get(key)
    return value if isinstance(value, str) and value.isprintable() else ""


def _forget(part: Path) -> None:
    for file in (part, _record_file(part)):
        file.unlink(missing_ok=True)


def _stopped(have: int, total: int | None) -> str:
    return f"the connection broke at {have:,} of {total:,} bytes" if total is not None else "the connection broke"


def _no_room(name: str, needed: int | None, place: Path, free: int) -> NoReturn:
    size = "more" if needed is None else f"{needed / 1e9:.2f} GB"
    raise CheckpointError(
        f"{name} needs {size}, and {place} has {max(free, 0) / 1e9:.2f} GB free",
        "free some space, or name a folder on another disk in CMTOOL_CACHE",
    )


def _refused(code: int, name: str, file: Path) -> NoReturn:
    """The answer of a server that sends no file."""
    if code in _BUSY:
        raise _CutError(f"the server answered {code} ({http.client.responses.get(code, 'busy')})")
    reason = {
        401: "the server wants a login (401)",
        403: "the server refuses it (403)",
        404: "the file is not there (404)",
        410: "the file is there no more (410)",
    }.get(code, f"the server answered {code}")
    raise CheckpointError(
        f"cannot download {name}: {reason}",
        f"check the address, put the file into {file.parent} as {file.name}, or give its path",
    )


def _unreachable(name: str, file: Path, reason: str, cause: BaseException | None = None) -> NoReturn:
    raise CheckpointError(
        f"cannot download {name}: {reason}", f"put it into {file.parent} as {file.name}, or give its path"
    ) from cause


def _why(error: BaseException) -> str:
    """What is wrong with a connection, in a few words."""
    reason = error.reason if isinstance(error, urllib.error.URLError) else error
    if isinstance(reason, TimeoutError):
        return "the server does not answer"
    if isinstance(reason, ssl.SSLError):
        return f"no secure connection ({getattr(reason, 'verify_message', '') or reason.reason or reason})"
    if isinstance(reason, (socket.gaierror, ConnectionError)):
        return "no connection"
    if isinstance(reason, OSError):
        return f"no connection ({reason.strerror or reason})"
    return f"the answer makes no sense ({type(reason).__name__})"
