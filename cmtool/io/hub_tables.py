"""Tables in data repositories of the Hugging Face Hub, through `datasets` and into its own cache."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from cmtool.errors import DataError
from cmtool.io import hub, origins

MARK = hub.MARK
# huggingface_hub makes several tries of each of these, in 23 s: so a lost connection is told within a minute.
_TRIES, _PAUSE = 2, 1  # `datasets` would try for ten minutes without a word
_FORM = f"write {MARK}owner/name[@revision][:[subset/]split]"


@dataclass(frozen=True)
class _Place:
    """`hf:owner/name[@revision][:[subset/]split]`, taken apart."""

    repository: str
    revision: str | None
    subset: str | None
    split: str

    @classmethod
    def of(cls, text: str) -> _Place:
        # What follows the split, as in train[:1000], is for `datasets`.
        found = re.fullmatch(r"hf:([\w.-]+(?:/[\w.-]+)?)(?:@([^:@]+))?(?::(?:([^:/\[]+)/)?([^/]*))?", text)
        if not found or not text.isprintable():
            raise DataError(f"{text!r} names nothing on the Hub", _FORM)
        repository, revision, subset, split = found.groups()
        return cls(repository, revision, subset, split or "train")


def load(datasets: Any, text: str, *, stream: bool) -> Any:
    """The rows of a split, of `datasets`' own kinds.

    Args:
        datasets: the package.
        text: `hf:owner/name[@revision][:[subset/]split]`; the split is train where none is named.
        stream: store nothing.
    Raises:
        DataError: there is nothing of the name, or it cannot be had. Else what `datasets` raises.
    """
    place = _Place.of(text)
    if stream:
        settings = datasets.config
        settings.STREAMING_READ_MAX_RETRIES = settings.STREAMING_OPEN_MAX_RETRIES = _TRIES
        settings.STREAMING_READ_RETRY_INTERVAL = settings.STREAMING_OPEN_RETRY_INTERVAL = _PAUSE
    barred = origins.kept_offline() or datasets.config.HF_HUB_OFFLINE  # $HF_DATASETS_OFFLINE says it, too
    absent = "this is offline" if barred else _asked(place, text)
    try:
        with _offline(datasets, absent is not None):
            return datasets.load_dataset(
                place.repository, place.subset, split=place.split, revision=place.revision, streaming=stream
            )
    except Exception as error:  # of many kinds: arrow's, fsspec's, the hub's
        if absent is not None:
            raise DataError(
                f"cannot read {text!r}: {absent}, and it is not in the cache of datasets",
                f"read it once while there is a connection: cmtool data inspect {text}",
            ) from error
        if isinstance(error, datasets.exceptions.DatasetNotFoundError):  # and yet it is there
            raise DataError(*hub.gated(place.repository)) from error
        if isinstance(error, ValueError):  # of what was named, not of the connection or the disk
            raise _explained(datasets, error, place, text) from error
        raise


def _asked(place: _Place, text: str) -> str | None:
    """None if the Hub answers that there is such a repository; or why it cannot be asked.

    One question, and no retries: they would take half a minute where there is no connection.
    """
    from huggingface_hub import HfApi, errors

    try:
        HfApi().dataset_info(place.repository, revision=place.revision, timeout=hub.TIMEOUT)
    except errors.HFValidationError as error:
        raise DataError(f"{text!r} names nothing on the Hub", _FORM) from error
    except Exception as error:  # the errors of its network library are not huggingface_hub's, and change with it
        if said := hub.explained(error, text, place.repository, place.revision, "data set"):
            raise DataError(*said) from error
        return f"no connection ({type(error).__name__})"
    return None


@contextmanager
def _offline(datasets: Any, wanted: bool) -> Iterator[None]:
    """Keep `datasets` off the network; it asks about this only once, when it is imported."""
    from huggingface_hub import constants

    places: tuple[Any, ...] = (constants, datasets.config)
    before = [(place, place.HF_HUB_OFFLINE) for place in places]
    try:
        for place, own in before:
            place.HF_HUB_OFFLINE = own or wanted
        yield
    finally:
        for place, own in before:
            place.HF_HUB_OFFLINE = own


def _explained(datasets: Any, error: ValueError, place: _Place, text: str) -> DataError:
    """Why a repository has no such rows."""
    reason = str(error).strip().split("\n")[0]
    if place.subset is None and reason.startswith("Config name is missing"):
        names = datasets.get_dataset_config_names(place.repository, revision=place.revision)
        shown = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
        which = f"{place.split}/train" if place.split in names else f"{names[0]}/{place.split}"
        revision = f"@{place.revision}" if place.revision else ""
        return DataError(
            f"{place.repository} has the subsets {shown}", f"name one: {MARK}{place.repository}{revision}:{which}"
        )
    return DataError(f"cannot read {text!r}: {reason[:200]}", f"check what is named; {_FORM}")
