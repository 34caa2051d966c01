"""Files that judge images: Inception's weights, exported feature extractors, reference statistics."""

from __future__ import annotations

import json
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cmtool.errors import DataError, DependencyError
from cmtool.io import auxiliary, catalogue
from cmtool.io.files import sha256_of, write_atomic

if TYPE_CHECKING:
    import torch
    from torch import Tensor

INCEPTION = catalogue.WEIGHTS["inception"]  # torch-fidelity's conversion of the TensorFlow weights
DINOV2 = "dinov2_vitl14_pretrain.pth"
_DINOV2_CODE = "facebookresearch_dinov2_main"
_COPY = "copy or download it again"


def find_inception(given: Path | None = None) -> tuple[Path, str]:
    """The file with the weights of the Inception network that FID is defined by, and its SHA-256.

    Args:
        given: the file; None looks where torch-fidelity keeps it, in torch.hub's folder, and in cmtool's cache.
    Raises:
        DependencyError: if it is missing, is damaged or holds something else. Nothing in it is run.
    """
    import torch

    path = given or auxiliary.find("inception")
    hint = (
        f"cmtool fetch inception, or put torch-fidelity's {INCEPTION} there, or name it with --weights; "
        "--features random needs none"
    )
    if not path.is_file():
        raise DependencyError(f"FID needs the weights of its Inception network, and there is no {path}", hint)
    digest = sha256_of(path)
    if said := auxiliary.damage(path, digest):
        raise DependencyError(said, hint)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)  # what passes here runs nothing elsewhere
        shape = tuple(state["fc.weight"].shape)
    except Exception as error:  # bytes that are no weights make torch's reader fail in a dozen ways
        raise DependencyError(f"{path} cannot be read as weights of an Inception network", hint) from error
    if shape != (1008, 2048):
        raise DependencyError(f"{path} holds another network: its last layer is {shape}", hint)
    return path, digest


def find_dinov2() -> tuple[Path, str]:
    """The weights of DINOv2 ViT-L/14 where torch.hub keeps them, beside its code; and their SHA-256.

    Raises:
        DependencyError: if the weights or the code are missing.
    """
    import torch

    hub = Path(torch.hub.get_dir())
    path, code = hub / "checkpoints" / DINOV2, hub / _DINOV2_CODE
    for place in (path, code):
        if not place.exists():
            raise DependencyError(
                f"FD-DINOv2 needs facebookresearch/dinov2 in torch.hub's folder, and there is no {place}",
                "fetch it once: python -c \"import torch; torch.hub.load('facebookresearch/dinov2', 'dinov2_vitl14')\"",
            )
    return path, sha256_of(path)


def read_extractor(path: Path, device: torch.device | str = "cpu") -> tuple[torch.nn.Module, str]:
    """A feature extractor exported as TorchScript or by torch.export (.pt2), and the SHA-256 of its file.

    Args:
        path: the file.
        device: where it is to compute. An exported program remembers where it was made, in its operations too.
    Raises:
        DataError: if it is neither.
    """
    import torch
    from torch.export.passes import move_to_device_pass

    if not path.is_file():
        raise DataError(f"--features {path}: there is no such file", "name random, inception, dinov2 or a file")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # TorchScript is old, and what most such files are
            if path.suffix == ".pt2":
                module: Any = move_to_device_pass(torch.export.load(path), str(device)).module()
            else:
                module = torch.jit.load(str(path), map_location="cpu").eval().to(device)
    except Exception as error:
        raise DataError(
            f"--features {path} is no exported network", "save one with torch.jit.save, or torch.export.save as .pt2"
        ) from error
    return module, sha256_of(path)


# Reference statistics.


def is_statistics(source: str) -> bool:
    """Whether a source is a file of statistics: a pickle, or an .npz with a mean and a covariance."""
    path = Path(source)
    if not path.is_file():
        return False
    if path.suffix == ".pkl":
        return True
    if path.suffix != ".npz":
        return False
    try:
        with zipfile.ZipFile(path) as archive:
            return {"mu.npy", "sigma.npy"} <= set(archive.namelist())
    except (OSError, zipfile.BadZipFile):
        return False


def read_statistics(source: str) -> dict[str, dict[str, Any]]:
    """What a file of statistics holds, by the features they are of: mu, sigma, and what else is known of them.

    Read are our own files, those of EDM and ADM (.npz with mu and sigma, of Inception features), and those of EDM2
    (.pkl with both for fid and fd_dinov2).

    Raises:
        DataError: if it cannot be read or holds none.
    """
    path = Path(source)
    found = _from_pickle(path) if path.suffix == ".pkl" else _from_npz(path)
    for name, entry in found.items():
        mu, sigma = (np.asarray(entry[key], np.float64) for key in ("mu", "sigma"))
        if mu.ndim != 1 or sigma.shape != 2 * mu.shape or not (np.isfinite(mu).all() and np.isfinite(sigma).all()):
            raise DataError(f"{source!r} holds no statistics of {name}: mu {mu.shape}, sigma {sigma.shape}", _COPY)
        entry["mu"], entry["sigma"] = mu, sigma
    return found


def _from_npz(path: Path) -> dict[str, dict[str, Any]]:
    try:
        with np.load(path, allow_pickle=False) as arrays:
            entry = {key: arrays[key] for key in ("mu", "sigma", "vectors", "about") if key in arrays.files}
        about = json.loads(str(entry.pop("about"))) if "about" in entry else {}
        return {about.get("features", "inception"): {**entry, **about}}
    except (OSError, ValueError, KeyError, AttributeError, zipfile.BadZipFile) as error:
        raise DataError(f"{str(path)!r} cannot be read as statistics", _COPY) from error


def _from_pickle(path: Path) -> dict[str, dict[str, Any]]:
    from cmtool.errors import CheckpointError
    from cmtool.io import unpickle

    try:
        held = unpickle.read(path)
    except CheckpointError as error:
        raise DataError(f"{str(path)!r} cannot be read as statistics: {error.message}", _COPY) from error
    names = {"fid": "inception", "fd_dinov2": "dinov2"}
    found = {
        features: {key: _numbers(held[name][key]) for key in ("mu", "sigma")}
        for name, features in names.items()
        if isinstance(held, dict) and isinstance(held.get(name), dict) and {"mu", "sigma"} <= held[name].keys()
    }
    if not found:
        raise DataError(f"{str(path)!r} holds no statistics of fid or fd_dinov2", "name an .npz, or a .pkl as EDM2's")
    return found


def _numbers(value: Any) -> Any:
    """The numbers of an array in a pickle."""
    values = getattr(value, "values", None)
    return np.empty(0) if values is None or callable(values) else values.numpy()


def write_statistics(
    target: Path, mu: Tensor, sigma: Tensor, about: Mapping[str, Any], vectors: Tensor | None = None
) -> None:
    """Statistics of features as an .npz that EDM's tools read, too: mu and sigma, and what they are of as JSON."""
    arrays: dict[str, Any] = {"mu": mu.numpy(), "sigma": sigma.numpy(), "about": np.array(json.dumps(dict(about)))}
    if vectors is not None:
        arrays["vectors"] = vectors.numpy()
    write_atomic(target, lambda file: np.savez(file, **arrays))
