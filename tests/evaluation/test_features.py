"""Features: the same whatever they are computed with, and of use."""

from __future__ import annotations

import pytest
import torch

from cmtool.errors import DataError
from cmtool.evaluation.features import RandomFeatures
from cmtool.evaluation.judging import vectors_of
from cmtool.evaluation.proxy import Proxy
from cmtool.evaluation.statistics import frechet, statistics
from cmtool.generate import generate
from cmtool.io.images import to_uint8
from tests.models import Pictures, micro, model


def pictures(count=64, size=16, channels=3, seed=0):
    """Smooth colour patches."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, channels, 4, 4, generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, size=(size, size), mode="bilinear")
    return (smooth * 255).round().to(torch.uint8)


@pytest.mark.parametrize(("channels", "size"), [(3, 8), (3, 33), (1, 16)])
def test_an_image_by_itself_is_as_in_a_batch(channels, size):
    images, features = pictures(5, size, channels), RandomFeatures(channels)
    whole = features(images).vectors
    alone = torch.cat([features(image[None]).vectors for image in images])
    assert whole == pytest.approx(alone, rel=1e-5, abs=1e-6)
    parts = vectors_of({"random": features}, [images[:2], images[2:]])["random"]
    assert torch.equal(parts.vectors, torch.cat([features(images[:2]).vectors, features(images[2:]).vectors]))


def test_every_number_tells_images_apart():
    made = RandomFeatures()(pictures(64, 32)).vectors
    assert made.shape == (64, 576)
    assert float(made.std(0).min()) > 1e-3


def test_a_distance_grows_with_what_is_done_to_the_images():
    images, features = pictures(256, 16), RandomFeatures()
    reference = statistics(features(pictures(256, 16, seed=1)).vectors)
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(2))

    def distance(amount):
        noisy = (images.float() + amount * noise).clamp(0, 255).round().to(torch.uint8)
        return frechet(statistics(features(noisy).vectors), reference)

    found = [distance(amount) for amount in (0, 15, 40, 80)]
    assert found == sorted(found)
    assert found[0] < 0.5 * found[2]


def test_refusals():
    with pytest.raises(DataError, match="random features are of images"):
        RandomFeatures(3)(pictures(2, 16, 1))
    with pytest.raises(DataError, match="random features are of images"):
        RandomFeatures(3)(pictures(2, 4))
    with pytest.raises(ValueError, match="no images"):
        vectors_of({"random": RandomFeatures()}, [])


class Made:
    """A data set of images with labels."""

    def __init__(self, images, labels=None):
        self.images, self.labels = images, labels

    def __len__(self):
        return len(self.images)

    def batch(self, indices):
        return self.images[indices], None if self.labels is None else self.labels[indices]


@pytest.mark.parametrize("role", ["consistency", "denoiser"])
def test_the_proxy_is_nothing_where_the_data_is_what_the_model_makes(role):
    made = model(role)
    solver = {"solver": "heun", "steps": 10} if role == "denoiser" else {}
    images = torch.cat([to_uint8(part.images) for part in generate(made, range(12), **solver)])
    proxy = Proxy(Made(images))
    assert proxy.name(made) == "fd_random@12"
    assert proxy.suits(made)
    assert not Proxy(Made(images[:1])).suits(made)
    assert proxy(made) == pytest.approx(0, abs=1e-9)
    assert Proxy(Pictures(12))(made) > 0.01


def test_samples_have_the_classes_of_the_data():
    config = micro(num_classes=3)
    made, labels = model(config=config), torch.tensor([2, 2, 0, 2, 1, 2])
    images = torch.cat([to_uint8(part.images) for part in generate(made, range(6), labels=labels.tolist())])
    assert Proxy(Made(images, labels))(made) == pytest.approx(0, abs=1e-9)
    other = Proxy(Made(images, labels.flip(0)))
    assert other(made) > 1e-6
