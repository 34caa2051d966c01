"""Models in repositories of the Hugging Face Hub, through huggingface_hub and into its own cache."""

from __future__ import annotations

import glob
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from cmtool.errors import CheckpointError, DependencyError, UserError, nearest

Progress = Callable[[int, int | None], None]  # bytes there so far, bytes in all

MARK = "hf:"  # how such a source begins
_FORM = f"write {MARK}owner/name[@revision][:file]"
TIMEOUT = 10.0  # seconds for the one question that comes first
_FOLDER_FILES = (
    *("model_index.json", "config.json", "README.md", "unet/config.json"),
    *("scheduler/scheduler_config.json", "scheduler_config.json"),  # the first pipelines had all in one folder
)
_STEM = "diffusion_pytorch_model"


@dataclass(frozen=True)
class _Repository:
    """`hf:owner/name[@revision][:file]`, taken apart."""

    name: str
    revision: str | None
    file: str | None

    @classmethod
    def of(cls, text: str) -> _Repository:
        found = re.fullmatch(r"hf:([\w.-]+/[\w.-]+)(?:@([^:@]+))?(?::(.+))?", text)
        if not found:
            raise CheckpointError(f"{text!r} names nothing on the Hub", _FORM)
        name, revision, file = found.groups()
        steps = PurePosixPath(file or "x").parts
        if ".." in (*steps, *(revision or "").split("/")) or steps[0] == "/" or not text.isprintable():
            raise CheckpointError(f"{text!r} names no file within a repository", _FORM)
        return cls(name, revision, file)

    def wanted(self, names: Iterable[str]) -> list[str]:
        """Of a repository's files those that are needed; none where something is missing."""
        known = set(names)
        if self.file is not None:
            return [self.file] if self.file in known else []
        if "unet/config.json" in known:
            whole = "model_index.json" not in known or "scheduler/scheduler_config.json" in known
            weights = _weights(known, "unet/") if whole else []
        elif "config.json" in known and _weights(known, ""):
            weights = _weights(known, "")
        else:
            weights = [name for name in ("model.safetensors",) if name in known]
        return [*(name for name in _FOLDER_FILES if name in known), *weights] if weights else []


def _weights(names: set[str], place: str) -> list[str]:
    """The weights of a diffusers model, as safetensors if there are such; all parts of one, or nothing."""
    for ending in ("safetensors", "bin"):
        if f"{place}{_STEM}.{ending}" in names:
            return [f"{place}{_STEM}.{ending}"]
        index = f"{place}{_STEM}.{ending}.index.json"
        parts = [
            (name, int(found[1]))
            for name in sorted(names)
            if (found := re.fullmatch(rf"{place}{_STEM}-\d+-of-(\d+)\.{ending}", name))
        ]
        if index in names and parts and all(count == len(parts) for _, count in parts):
            return [index, *(name for name, _ in parts)]
    return []


def fetch(text: str, offline: bool, progress: Progress | None) -> Path:
    """A file of a repository, or the folder with what makes up its model, downloaded if it is not in the Hub's cache.

    Args:
        text: `hf:owner/name[@revision][:file]`.
        offline: stay off the network.
        progress: called with the bytes there so far and those in all.
    Raises:
        CheckpointError: nothing of the name, or it cannot be had. DependencyError: without huggingface_hub.
    """
    repository = _Repository.of(text)
    try:
        import huggingface_hub as hub
        import huggingface_hub.errors
        import huggingface_hub.utils
    except ImportError as error:
        raise DependencyError(f"{text} needs huggingface_hub, which is missing", "pip install 'cmtool[hub]'") from error
    try:
        place = _cached(hub, repository)
        if place is None and not offline:
            place = _download(hub, repository, text, progress)
    except (UserError, KeyboardInterrupt):
        raise
    except Exception as error:  # the errors of its network library are not huggingface_hub's, and change with it
        raise _explained(hub, error, repository, text) from error
    if place is None:
        raise CheckpointError(
            f"cannot download {text}: this is offline, and it is not in the Hub's cache",
            f"fetch it while there is a connection: cmtool fetch {text}",
        )
    return place if repository.file is None else place / repository.file


def _cached(hub: Any, repository: _Repository) -> Path | None:
    """The folder of a repository in the Hub's own cache, if all that is needed is there; asks nobody."""
    for name in [repository.file] if repository.file else [*_FOLDER_FILES, "model.safetensors"]:
        found = hub.try_to_load_from_cache(repository.name, name, revision=repository.revision)
        if isinstance(found, str):
            place = Path(found).parents[name.count("/")]
            names = {file.relative_to(place).as_posix() for file in place.rglob("*") if file.is_file()}
            return place if repository.wanted(names) else None
    return None


def _download(hub: Any, repository: _Repository, text: str, progress: Progress | None) -> Path:
    # One question first, without the retries of a download: it fails at once where there is no connection.
    info = hub.HfApi().model_info(repository.name, revision=repository.revision, timeout=TIMEOUT, files_metadata=True)
    sizes = {file.rfilename: file.size or 0 for file in info.siblings or ()}
    wanted = repository.wanted(sizes)
    if not wanted and repository.file is not None:
        raise CheckpointError(
            f"{repository.name} has no file {repository.file}", nearest(repository.file, sizes, "did you mean ")
        )
    if not wanted:
        raise CheckpointError(
            f"{text} holds no model in a form that is known: neither unet/, config.json with {_STEM}, "
            "nor model.safetensors",
            f"name a file of it: {MARK}{repository.name}:FILE",
        )
    bar = _bar(hub, progress, sum(sizes[name] for name in wanted))
    patterns = [glob.escape(name) for name in wanted]
    return Path(
        hub.snapshot_download(
            repository.name, revision=repository.revision, allow_patterns=patterns, tqdm_class=bar, max_workers=2
        )
    )


def _bar(hub: Any, progress: Progress | None, total: int) -> type:
    """A progress bar that draws nothing and tells `progress` how many bytes have come."""
    base: type = hub.utils.tqdm

    class Bar(base):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            # Bytes as they are written; another bar counts them as they arrive, and one counts files.
            self.counted = kwargs.get("unit") == "B" and not str(kwargs.get("name", "")).endswith(".transfer")
            self.done = 0
            super().__init__(*args, **{**kwargs, "disable": True})

        def update(self, n: float | None = 1) -> None:
            if progress and self.counted:
                self.done += int(n or 0)
                progress(min(self.done, total), total)

    return Bar


def explained(error: Exception, text: str, name: str, revision: str | None, what: str) -> tuple[str, str] | None:
    """What the Hub said of a repository, and what to do; None if it was not the Hub that said something.

    Args:
        text: what the user wrote.
        what: a word for what the repository holds.
    """
    from huggingface_hub import errors

    if isinstance(error, errors.GatedRepoError):
        return gated(name)
    if isinstance(error, errors.RepositoryNotFoundError):
        message = f"the Hub has no {what} {name}, or shows it to its owner only"
        return message, "check the name; `hf auth login` opens what is yours"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{name} has no revision {revision}", "leave out @revision for the newest"
    if isinstance(error, errors.HfHubHTTPError):
        code = getattr(getattr(error, "response", None), "status_code", "an error")
        return f"cannot download {text}: the Hub answered {code}", "try again later"
    return None


def gated(name: str) -> tuple[str, str]:
    """What to say of a repository that is listed, and not given."""
    message = f"{name} is given only to those who have agreed to its terms"
    return message, "agree on its page on the Hub, then log in with `hf auth login`"


def _explained(hub: Any, error: Exception, repository: _Repository, text: str) -> CheckpointError:
    """What the Hub said, in two lines."""
    errors, name = hub.errors, repository.name
    if isinstance(error, errors.LocalEntryNotFoundError):
        return CheckpointError(
            f"cannot download {text}: the connection broke", "try again, or download it by hand and give its path"
        )
    if isinstance(error, errors.EntryNotFoundError):
        return CheckpointError(f"{name} has no file {repository.file}", "check the name of the file")
    if isinstance(error, errors.HFValidationError):
        return CheckpointError(f"{text!r} names nothing on the Hub", _FORM)
    if said := explained(error, text, name, repository.revision, "model"):
        return CheckpointError(*said)
    if isinstance(error, OSError) and not isinstance(error, (ConnectionError, TimeoutError)):
        return CheckpointError(
            f"cannot keep {text}: {error.strerror or error}", "check the folder that HF_HOME names, and its free space"
        )
    return CheckpointError(
        f"cannot download {text}: no connection ({type(error).__name__})",
        "try again, or download it by hand and give its path",
    )
