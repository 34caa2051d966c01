"""What images are compared by: a function from uint8 images to vectors.

`RandomFeatures` needs no weights file and is always there. Its numbers are comparable with each other, with nothing
published, and are never called FID.
"""

from __future__ import annotations

import hashlib
import importlib
import warnings
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from cmtool.compat import repair_torchvision
from cmtool.errors import DataError, DependencyError

_BATCH = 256


class Extracted(NamedTuple):
    """What is known of some images: their vectors [B, D], and of a classifier's its logits [B, classes]; float32."""

    vectors: Tensor
    logits: Tensor | None = None


class Features(Protocol):
    """A feature extractor."""

    name: str
    batch: int  # images at once

    @property
    def about(self) -> dict[str, str]:
        """What identifies it, and what it does to the size of an image."""
        ...

    def __call__(self, images: Tensor) -> Extracted:
        """Of uint8 images [B, C, H, W], on the CPU; of each by itself, whatever else is there."""
        ...


class RandomFeatures:
    """Mean responses of random filters, at a fourth of the image each, over scales from the pixel up.

    Three layers of random zero-mean filters with rectification and pooling, on the image and on the image halved. The
    filters come from a seed, and are the same on every machine.

    Args:
        channels: of the images, 1 or 3.
        width: filters a layer.
        seed: of the filters.
    """

    name = "random"
    batch = _BATCH

    def __init__(self, channels: int = 3, width: int = 24, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.channels = channels
        self._filters = []
        for entering in (channels, width, width):
            weight = torch.randn(width, entering, 3, 3, generator=generator, dtype=torch.float64)
            weight -= weight.mean((2, 3), keepdim=True) * (torch.arange(width) % 4 > 0)[:, None, None, None]
            self._filters.append((weight / weight.flatten(1).norm(dim=1)[:, None, None, None]).float())

    @property
    def about(self) -> dict[str, str]:
        digest = hashlib.sha256(b"".join(weight.numpy().tobytes() for weight in self._filters)).hexdigest()
        return {"features": self.name, "sha256": digest, "resize": "none"}

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> Extracted:
        """See `Features`.

        Raises:
            DataError: for images with another number of channels, or smaller than 8x8.
        """
        if images.shape[1] != self.channels or min(images.shape[2:]) < 8:
            found = "x".join(map(str, images.shape[1:]))
            raise DataError(
                f"random features are of images of {self.channels} channels and at least 8x8, found {found}",
                "use larger images, or other --features",
            )
        x = images.float().cpu() / 127.5 - 1
        parts = []
        for _ in range(2):
            response = x
            for weight in self._filters:
                response = F.conv2d(response, weight, padding=1).abs()
                parts.append(F.adaptive_avg_pool2d(response, 2).flatten(1))
                response = F.avg_pool2d(response, 2)
                if min(response.shape[2:]) < 2:
                    break
            x = F.avg_pool2d(x, 2)
        return Extracted(torch.cat(parts, dim=1))


class _Network:
    """Features that a network makes whose weights are in a file."""

    name: str
    batch = 32
    resize: str

    def __init__(self, network: torch.nn.Module, sha256: str, device: torch.device | str) -> None:
        self._device = torch.device(device)
        self._network, self._sha256 = network.to(self._device), sha256

    @property
    def about(self) -> dict[str, str]:
        return {"features": self.name, "sha256": self._sha256, "resize": self.resize}

    @torch.inference_mode()
    def _run(self, images: Tensor) -> Any:
        return self._network(images.to(self._device))


class Inception(_Network):
    """The Inception network of 2015 that FID is defined by, as torch-fidelity has it: its pool3 layer and its logits.

    Images are enlarged to 299x299 as TensorFlow did.

    Args:
        weights: torch-fidelity's file, see `cmtool.io.extractors.find_inception`. sha256: of the file.
    Raises:
        DependencyError: without torch-fidelity.
    """

    name = "inception"
    resize = "bilinear to 299x299, as TensorFlow 1"

    def __init__(self, weights: str, sha256: str, device: torch.device | str = "cpu") -> None:
        layers = ["2048", "logits_unbiased"]
        kind = _torch_fidelity("feature_extractor_inceptionv3", "FeatureExtractorInceptionV3")
        made = kind("inception-v3-compat", layers, feature_extractor_weights_path=weights)
        super().__init__(made, sha256, device)

    def __call__(self, images: Tensor) -> Extracted:
        vectors, logits = self._run(_rgb(images))
        return Extracted(vectors.float().cpu(), logits.float().cpu())


class DINOv2(_Network):
    """DINOv2 ViT-L/14 as torch-fidelity has it, for FD-DINOv2: Stein et al. (2023), arXiv:2306.04675.

    Args:
        sha256: of the weights in torch.hub's folder, see `cmtool.io.extractors.find_dinov2`.
    Raises:
        DependencyError: without torch-fidelity.
    """

    name = "dinov2"
    resize = "bilinear to 224x224, as TensorFlow 1"

    def __init__(self, sha256: str, device: torch.device | str = "cpu") -> None:
        kind = _torch_fidelity("feature_extractor_dinov2", "FeatureExtractorDinoV2")
        super().__init__(kind("dinov2-vit-l-14", ["dinov2"]), sha256, device)

    def __call__(self, images: Tensor) -> Extracted:
        (vectors,) = self._run(_rgb(images))
        return Extracted(vectors.float().cpu())


class Exported(_Network):
    """A network exported as TorchScript or by torch.export: uint8 [B, C, H, W] in, [B, D] or [B, D, h, w] out.

    Args:
        module: what was read, see `cmtool.io.extractors.read_extractor`. sha256: of the file. name: of the file.
    """

    resize = "its own"

    def __init__(self, module: torch.nn.Module, sha256: str, name: str, device: torch.device | str = "cpu") -> None:
        super().__init__(module, sha256, device)
        self.name = name

    def __call__(self, images: Tensor) -> Extracted:
        """See `Features`.

        Raises:
            DataError: for a network that takes no such images, or makes something else of them.
        """
        try:
            made = self._run(images)
        except Exception as error:  # of a foreign program
            reason = str(error).strip().splitlines()[-1] if str(error).strip() else type(error).__name__
            raise DataError(
                f"the features {self.name} cannot be computed of images {list(images.shape)}: {reason[:160]}",
                "export a network that takes uint8 images of this size, in any number",
            ) from error
        made = made[0] if isinstance(made, tuple | list) else made
        if not isinstance(made, Tensor) or made.ndim not in (2, 4) or len(made) != len(images):
            raise DataError(f"the features {self.name} are no vectors", "export a network that returns [B, D]")
        return Extracted((made.mean((2, 3)) if made.ndim == 4 else made).float().cpu())


def _rgb(images: Tensor) -> Tensor:
    return images.expand(-1, 3, -1, -1) if images.shape[1] == 1 else images


def _torch_fidelity(module: str, name: str) -> Any:
    """A class of torch-fidelity's, which warns of much while it is made."""
    repair_torchvision()
    try:
        kind = getattr(importlib.import_module(f"torch_fidelity.{module}"), name)
    except ImportError as error:
        raise DependencyError(
            "FID, KID and the Inception score need the package torch-fidelity, which cannot be imported",
            "pip install 'cmtool[evaluate]', or use --features random",
        ) from error

    def make(*args: Any, **options: Any) -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return kind(*args, **options)

    return make
