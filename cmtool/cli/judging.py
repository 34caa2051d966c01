"""What `evaluate`, `stats` and `search` share: features, references, and the protocol that goes with each number."""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cmtool import __version__
from cmtool.cli import console
from cmtool.errors import DataError, UsageError, nearest

if TYPE_CHECKING:
    import torch

    from cmtool.evaluation.features import Features
    from cmtool.evaluation.metrics import Metric, Reference
    from cmtool.flow.flow_map import FlowMap
    from cmtool.processes import Processes

NAMED = ("random", "inception", "dinov2")
FeaturesOption = Annotated[
    str,
    typer.Option(
        "--features",
        metavar="NAME|FILE",
        help="What fd, kd, precision and recall compare: random, inception, dinov2, or an exported network.",
    ),
]
WeightsOption = Annotated[
    Path | None,
    typer.Option("--weights", metavar="FILE", help="torch-fidelity's Inception weights. [default: in its cache]"),
]
ReferenceOption = Annotated[
    str,
    typer.Option("--data", metavar="SOURCE", help="What to compare with: images, or a file of cmtool stats or EDM's."),
]
LimitOption = Annotated[
    int | None, typer.Option("--limit", metavar="N", min=2, help="Compare with N images of --data, evenly spread.")
]


def open_features(
    names: Iterable[str], *, channels: int, weights: Path | None, device: torch.device
) -> dict[str, Features]:
    """The extractors of these names; what is missing is told before anything is computed."""
    from cmtool.evaluation import features
    from cmtool.io import extractors

    wanted = list(dict.fromkeys(names))
    if weights is not None and "inception" not in wanted:
        raise UsageError("--weights are those of Inception, and no metric asks for it", "add --metrics fid")
    found: dict[str, Any] = {}
    for name in wanted:
        if name == "random":
            found[name] = features.RandomFeatures(channels)
        elif name == "inception":
            file, digest = extractors.find_inception(weights)
            found[name] = features.Inception(str(file), digest, device)
        elif name == "dinov2":
            found[name] = features.DINOv2(extractors.find_dinov2()[1], device)
        else:
            if not Path(name).suffix:
                raise UsageError(f"--features: there are no features {name!r}", nearest(name, NAMED))
            module, digest = extractors.read_extractor(Path(name), device)
            found[name] = features.Exported(module, digest, Path(name).stem, device)
    return found


def open_references(
    source: str,
    metrics: Iterable[Metric],
    features: dict[str, Features],
    *,
    limit: int | None,
    size: tuple[int, int] | None,
    team: Processes,
) -> tuple[dict[str, Reference], dict[str, Any]]:
    """What images are compared with, by the names of the features; and what is known of it.

    Args:
        source: a data set, or a file of statistics.
        size: side and channels that the images are brought to; None leaves them.
    """
    from cmtool.evaluation.judging import references_of
    from cmtool.io import extractors

    if extractors.is_statistics(source):
        if limit is not None:
            raise UsageError("--limit is for images, and --data is a file of statistics", "leave it out")
        return _stored_references(source, list(metrics), features)
    from cmtool.io.data import open_data

    data = open_data(
        source, resolution=size[0] if size else None, channels=size[1] if size else None, limit=limit, workers=0
    )
    console.note(f"reference: {data.report.summary()}")
    with console.progress("reference", len(data) // team.count) as update:
        found = references_of(features, data, team, update)
    about = {
        "source": source,
        "images": len(data),
        "fingerprint": data.fingerprint,
        "resolution": data.report.resolution,
        "crop": data.report.crop if data.report.cropped else "none needed",
        "resize": data.report.resize if data.report.resized else "none needed",
    }
    return found, about


def _stored_references(
    source: str, metrics: list[Metric], features: dict[str, Features]
) -> tuple[dict[str, Reference], dict[str, Any]]:
    import torch

    from cmtool.evaluation.metrics import Reference
    from cmtool.evaluation.statistics import Statistics
    from cmtool.io import extractors
    from cmtool.io.files import sha256_of

    held = extractors.read_statistics(source)
    found = {}
    about: dict[str, Any] = {"source": source, "sha256": sha256_of(Path(source))}
    for name, extractor in features.items():
        key = extractor.name
        if key not in held:
            raise DataError(
                f"--data {source} has statistics of {', '.join(held)}, and they are wanted of {key}",
                "name other --metrics or --features, or the images themselves",
            )
        entry = held[key]
        known = entry.get("sha256")
        if known is not None and known != extractor.about["sha256"]:
            raise DataError(
                f"--data {source} was made with other weights of {key} ({known[:8]}, here "
                f"{extractor.about['sha256'][:8]})",
                "make it again: cmtool stats",
            )
        mean, covariance = (torch.from_numpy(entry[part]) for part in ("mu", "sigma"))
        vectors = torch.from_numpy(entry["vectors"]) if "vectors" in entry else None
        if vectors is None and any(one.needs_vectors for one in metrics if one.features == name):
            raise DataError(
                f"--data {source} has a mean and a covariance only, which make an fd, and nothing else",
                "make it with cmtool stats --vectors, or name the images themselves",
            )
        found[name] = Reference(Statistics(mean, covariance, int(entry.get("images", 0))), vectors)
        about |= {part: entry[part] for part in ("images", "fingerprint", "resolution") if part in entry}
    return found, about


def machine(device: torch.device, dtype: Any) -> dict[str, Any]:
    """What the numbers were computed with."""
    import torch

    return {
        "cmtool": __version__,
        "torch": torch.__version__,
        "device": str(device),
        "precision": "fp32" if dtype is None else "bf16",
        "machine": platform.machine(),
    }


def identity(model: FlowMap, source: str) -> dict[str, Any]:
    """A model, so that it can be told from others: SHA-256 of its weights, and what its card says."""
    digest = hashlib.sha256()
    for name, value in sorted(model.network.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().float().cpu().contiguous().numpy().tobytes())
    card = model.card
    known = {name: getattr(card, name) for name in ("preset", "iterations", "average", "data", "teacher")}
    return {
        "source": source,
        "sha256": digest.hexdigest(),
        "role": card.role,
        "resolution": card.resolution,
        "channels": card.channels,
        **{name: value for name, value in known.items() if value},
    }
