"""Editing operators: the laws of a pseudo-inverse, and projections that are nearest points."""

from __future__ import annotations

import inspect

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cmtool import editing
from cmtool.editing import AvgPool, Blur, Luma, Mask, project, to_range

HOLE = torch.zeros(1, 1, 4, 4, dtype=torch.bool)
HOLE[..., 1:3, 2:] = True
PER_CHANNEL = torch.zeros(1, 3, 4, 4, dtype=torch.bool)
PER_CHANNEL[:, 1, 0] = True
OPERATORS = {
    "mask": Mask(HOLE),
    "mask of each channel": Mask(PER_CHANNEL),
    "luma": Luma(),
    "luma of other weights": Luma((0.2126, 0.7152, 0.0722)),
    "pool 2": AvgPool(2),
    "pool 4": AvgPool(4),
    "blur": Blur(torch.tensor([[0.1, 0.2], [0.5, 0.15], [0.0, 0.05]], dtype=torch.float64), 0.4),
    "blur that loses much": Blur(torch.full((3, 3), 1 / 9, dtype=torch.float64), 0.3),
}
SIZE = (3, 4, 4)
N = 48
operators = pytest.mark.parametrize("op", OPERATORS.values(), ids=OPERATORS)
DISJOINT = {name: op for name, op in OPERATORS.items() if op.disjoint}
disjoint = pytest.mark.parametrize("op", DISJOINT.values(), ids=DISJOINT)


def normal(n, seed=0):
    return torch.randn(n, *SIZE, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def matrix(op):
    """A as a matrix: its columns are the images of the unit vectors."""
    return op.A(torch.eye(N, dtype=torch.float64).view(N, *SIZE)).flatten(1).T


def inverse_matrix(op):
    y = op.A(normal(1))
    eye = torch.eye(y[0].numel(), dtype=torch.float64).view(-1, *y.shape[1:])
    return op.pinv(eye).flatten(1).T


def test_every_operator_is_tested():
    """A new operator must join the table above."""
    classes = {
        cls
        for _, cls in inspect.getmembers(editing, inspect.isclass)
        if cls.__module__ == editing.__name__ and not getattr(cls, "_is_protocol", False)
    }
    assert classes == {type(op) for op in OPERATORS.values()}


@operators
def test_pinv_is_the_moore_penrose_inverse(op):
    a, b = matrix(op), inverse_matrix(op)
    torch.testing.assert_close(a @ b @ a, a)
    torch.testing.assert_close(b @ a @ b, b)
    torch.testing.assert_close((b @ a).T, b @ a)
    torch.testing.assert_close((a @ b).T, a @ b)
    torch.testing.assert_close(b, torch.linalg.pinv(a))


@operators
def test_operators_are_linear_and_act_on_each_image(op):
    x, z = normal(3), normal(3, seed=1)
    torch.testing.assert_close(op.A(2 * x - 3 * z), 2 * op.A(x) - 3 * op.A(z))
    torch.testing.assert_close(op.A(x)[1:2], op.A(x[1:2]))
    y, w = op.A(x), op.A(z)
    torch.testing.assert_close(op.pinv(2 * y - 3 * w), 2 * op.pinv(y) - 3 * op.pinv(w))


@operators
def test_projection_knows_y_and_stays_there(op):
    x, y = normal(3), op.A(normal(3, seed=1))
    once = project(op, x, y)
    torch.testing.assert_close(op.A(once), y)
    torch.testing.assert_close(project(op, once, y), once)
    torch.testing.assert_close(project(op, x, op.A(x)), x)


@operators
def test_projection_is_the_nearest_point(op):
    """x - p is orthogonal to every direction in which A does not change."""
    x, y = normal(1), op.A(normal(1, seed=1))
    p = project(op, x, y)
    free = normal(20, seed=2)
    free = free - op.pinv(op.A(free))
    assert float(free.abs().max()) > 0.1
    torch.testing.assert_close(((x - p) * free).flatten(1).sum(1), torch.zeros(20, dtype=torch.float64))
    distance = (x - p).norm()
    assert all(float((x - (p + step)).norm()) >= float(distance) for step in free)


@operators
def test_the_filled_image_is_the_smallest(op):
    y = op.A(normal(1))
    torch.testing.assert_close(op.A(op.pinv(y)), y)
    assert float(op.pinv(y).norm()) <= float(normal(1).norm()) + 1e-12
    torch.testing.assert_close(op.pinv(y), project(op, torch.zeros(1, *SIZE, dtype=torch.float64), y))


def test_what_they_mean():
    x = normal(1)
    known = Mask(HOLE).A(x)
    assert torch.equal(known[~HOLE.expand_as(x)], x[~HOLE.expand_as(x)])
    assert bool((known[HOLE.expand_as(x)] == 0).all())
    red, green, blue = x[0]
    torch.testing.assert_close(Luma().A(x)[0, 0], 0.2989 * red + 0.5870 * green + 0.1140 * blue)
    torch.testing.assert_close(AvgPool(2).A(x)[0, 1, 0, 1], x[0, 1, :2, 2:].mean())
    assert AvgPool(4).pinv(AvgPool(4).A(x))[0, 2].unique().numel() == 1


def test_luma_is_the_first_coordinate_of_the_papers_basis():
    """Song et al. (2023), app. D.2: replace one coordinate in an orthonormal basis that begins with the weights."""
    w = torch.tensor(Luma.weights, dtype=torch.float64)
    basis = torch.linalg.qr(torch.stack([w, *torch.eye(3, dtype=torch.float64)[:2]], 1)).Q
    x, reference = normal(2), normal(2, seed=1)
    inside, known = (torch.einsum("bchw,cd->bdhw", image, basis) for image in (x, reference))
    expected = torch.einsum("bdhw,cd->bchw", torch.cat([known[:, :1], inside[:, 1:]], 1), basis)
    torch.testing.assert_close(project(Luma(), x, Luma().A(reference)), expected)


@pytest.mark.parametrize("factor", [1, 0, -2])
def test_an_enlargement_enlarges(factor):
    with pytest.raises(ValueError, match="at least 2"):
        AvgPool(factor)


# Back into the range of images.


@operators
def test_to_range_leaves_what_is_inside_alone(op):
    x = normal(2).tanh()
    assert torch.equal(to_range(op, x, op.A(x)), x)


@settings(max_examples=40)
@given(
    name=st.sampled_from(sorted(DISJOINT)),
    seed=st.integers(0, 2**31),
    spread=st.floats(0.1, 3),
    gain=st.floats(0.5, 1),
)
def test_to_range_keeps_what_is_known(name, seed, spread, gain):
    """y from any image that is inside the range, and x anywhere."""
    op = OPERATORS[name]
    truth = (normal(4, seed) * spread).clamp(-1, 1) * gain
    y = op.A(truth)
    x = project(op, normal(4, seed + 1) * spread, y)
    found = to_range(op, x, y)
    assert float(found.abs().max()) <= 1
    torch.testing.assert_close(op.A(found), y, rtol=0, atol=1e-9)
    # the nearest one: no step inside the range that keeps y leads closer to x
    free = normal(4, seed + 2)
    free = free - op.pinv(op.A(free))
    near = (x - found).flatten(1).norm(dim=1)
    for size in (1e-3, 0.1):
        other = found + size * free
        allowed = (other.abs() <= 1).flatten(1).all(1)
        assert bool(((x - other).flatten(1).norm(dim=1) >= near - 1e-9)[allowed].all())
    # and seen from every image that is allowed, found lies on the way to x
    inward = ((x - found) * (truth - found)).flatten(1).sum(1)
    assert float(inward.max()) <= 1e-8


@disjoint
@pytest.mark.parametrize("corner", [1.0, -1.0])
def test_to_range_at_the_very_end_of_the_range(op, corner):
    """A white image leaves no freedom at all in what it fixes."""
    truth = torch.full((1, *SIZE), corner, dtype=torch.float64)
    y = op.A(truth)
    found = to_range(op, project(op, normal(1), y), y)
    # (the weights of luma sum to 0.9999: white is at 0.9999)
    torch.testing.assert_close(op.A(found), y, rtol=0, atol=1e-9)


@disjoint
def test_to_range_does_what_it_can_for_the_impossible(op):
    y = op.A(torch.full((1, *SIZE), 1.3, dtype=torch.float64))
    found = to_range(op, project(op, normal(1), y), y)
    assert float(found.abs().max()) <= 1
    torch.testing.assert_close(op.A(found), op.A(torch.ones(1, *SIZE, dtype=torch.float64)))


@disjoint
def test_to_range_works_in_float32_too(op):
    y = op.A((normal(8, 1) * 2).clamp(-1, 1).float())
    x = project(op, 3 * normal(8).float(), y)
    torch.testing.assert_close(op.A(to_range(op, x, y)), y, rtol=0, atol=2e-6)


@pytest.mark.parametrize("name", ["blur", "blur that loses much"])
def test_to_range_comes_near_where_pixels_share_what_is_known(name):
    op = OPERATORS[name]
    y = op.A((normal(8, 1) / 2).clamp(-1, 1))
    x = project(op, normal(8), y)
    found = to_range(op, x, y)
    assert float(found.abs().max()) <= 1
    off, before = (op.A(one) - y for one in (found, x.clamp(-1, 1)))
    assert float(off.abs().max()) < 0.1 * float(before.abs().max())
    assert float(off.abs().max()) < 0.01


def test_a_blur_is_a_convolution_around_the_edges():
    x, kernel = normal(1), torch.rand(3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    padded = torch.nn.functional.pad(x, (1, 1, 1, 1), mode="circular")
    expected = torch.nn.functional.conv2d(padded.transpose(0, 1), kernel.flip(0, 1)[None, None]).transpose(0, 1)
    torch.testing.assert_close(Blur(kernel, 1e-9).A(x), expected)


def test_to_range_with_nothing_known_is_a_clamp():
    op = Mask(torch.ones(1, 1, 4, 4, dtype=torch.bool))
    x = 2 * normal(2)
    assert torch.equal(to_range(op, x, op.A(x)), x.clamp(-1, 1))
