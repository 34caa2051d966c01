"""A norm and a convolution in one pass over memory, against the two of them and against torch in float64."""

from __future__ import annotations

import weakref

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import forward_ad

from cmtool.networks import convolution, native, winograd
from cmtool.networks.chance import seeded
from cmtool.networks.convolution import Conv2d
from cmtool.networks.norms import GroupNorm

pytestmark = pytest.mark.skipif(
    winograd.library() is None or native.library() is None, reason="no compiler on this machine"
)

WIDTH = 32  # channels that fit vectors of any width
# Images, channels in and out in multiples of WIDTH, height and width.
SHAPES = [(4, 1, 1, 8, 8), (16, 2, 3, 7, 9), (40, 3, 1, 4, 4), (2, 1, 2, 16, 5), (6, 4, 2, 32, 32), (17, 1, 1, 3, 4)]
KINDS = ["plain", "film", "added", "dropout", "no-silu"]


@pytest.fixture(autouse=True)
def fewest(monkeypatch):
    """What is computed is right for few tiles, too, for which torch would be faster."""
    monkeypatch.setattr(winograd, "_FEWEST", 1)


@pytest.fixture
def threads():
    """Sets torch's number of threads for a while."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def given(images, channels, outputs, height, width, kind="plain"):
    """A norm, a convolution, and all tensors that a gradient goes to, x first; what the norm is told; a gradient."""
    torch.manual_seed(0)
    channels, outputs = channels * WIDTH, outputs * WIDTH
    norm, conv = GroupNorm(channels, eps=1e-5, group_channels=4), Conv2d(channels, outputs, 3)
    with torch.no_grad():
        for parameter in norm.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    x = (torch.randn(images, channels, height, width) + 0.5).contiguous(memory_format=torch.channels_last)
    rows = [torch.randn(images, channels).requires_grad_() for _ in range(2)]
    how = {"silu": kind != "no-silu"}
    how |= {"film": tuple(rows)} if kind == "film" else {"added": rows[0]} if kind == "added" else {}
    how |= {"dropout": 0.3} if kind == "dropout" else {}
    given = [*rows] if kind == "film" else [rows[0]] if kind == "added" else []
    leaves = [x.requires_grad_(), *norm.parameters(), *conv.parameters(), *given]
    return norm, conv, how, leaves, torch.randn(images, outputs, height, width)


def together(norm, conv, x, how, gain=1.0):
    with seeded(torch.arange(len(x))):
        return conv(norm.pending(x, **how), gain)


def apart(norm, conv, x, how, gain=1.0):
    with seeded(torch.arange(len(x))):
        return conv(norm(x, **how), gain)


def reference(norm, conv, leaves, how):
    """torch's own operations in float64; nothing is dropped."""
    x, weight, bias, kernel, shift, *rows = leaves
    if "added" in how:
        x = x + rows[0][:, :, None, None]
    y = F.group_norm(x, norm.num_groups, weight, bias, norm.eps)
    if "film" in how:
        y = y * (1 + rows[0][:, :, None, None]) + rows[1][:, :, None, None]
    return F.conv2d(F.silu(y) if how["silu"] else y, kernel, shift, padding=1)


def close(found, expected, bound):
    found, expected = found.detach(), expected.detach()
    assert found.shape == expected.shape
    assert float((found.double() - expected).abs().max() / expected.double().square().mean().sqrt()) < bound


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_it_is_the_norm_and_the_convolution(shape, kind, threads):
    threads(1)
    norm, conv, how, leaves, grad = given(*shape, kind)
    x = leaves[0]
    out, expected = together(norm, conv, x, how, 0.7), apart(norm, conv, x, how, 0.7)
    assert type(out.grad_fn).__name__ == "_ConvolveNormedBackward"
    assert out.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(out, expected)
    with torch.no_grad():
        assert torch.equal(together(norm, conv, x, how, 0.7), expected)
    found = torch.autograd.grad(out, leaves, grad)
    for index, (one, other) in enumerate(zip(found, torch.autograd.grad(expected, leaves, grad), strict=True)):
        if index == 3:  # sums over tiles, in another order
            close(one, other, 1e-5)
        else:
            assert torch.equal(one, other)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "dropout"])
@pytest.mark.parametrize("shape", SHAPES)
def test_it_is_what_float64_says(shape, kind):
    norm, conv, how, leaves, grad = given(*shape, kind)
    wide = [one.detach().double().requires_grad_() for one in leaves]
    out, expected = together(norm, conv, leaves[0], how), reference(norm, conv, wide, how)
    close(out, expected, 2e-5)
    gradients = torch.autograd.grad(expected, wide, grad.double())
    for one, other in zip(torch.autograd.grad(out, leaves, grad), gradients, strict=True):
        close(one, other, 5e-5)


@pytest.mark.parametrize("kind", ["film", "added"])
def test_threads_share_the_images(threads, kind):
    norm, conv, how, leaves, grad = given(24, 1, 2, 8, 8, kind)
    found = []
    for number in (1, 2, 3, 5, 7):
        threads(number)
        out = together(norm, conv, leaves[0], how)
        assert (type(out.grad_fn).__name__ == "_ConvolveNormedBackward") == (number < 5)
        found.append((out, *torch.autograd.grad(out, leaves, grad)))
    for other in found[1:]:
        for index, (a, b) in enumerate(zip(found[0], other, strict=True)):
            if index == 4:  # of the kernel
                close(b, a, 1e-5)
            else:
                assert torch.equal(a, b)


def test_many_images_are_shared_out_unevenly(threads):
    """A few images more for one thread than for the other do not matter among many."""
    threads(2)
    norm, conv, how, leaves, _ = given(19, 1, 1, 8, 8)
    out = together(norm, conv, leaves[0], how)
    assert type(out.grad_fn).__name__ == "_ConvolveNormedBackward"
    assert torch.equal(out, apart(norm, conv, leaves[0], how))
    few = leaves[0][:3]
    assert type(together(norm, conv, few, how).grad_fn).__name__ == "_ConvolveBackward"


@pytest.mark.parametrize("cached", [1, 10**9])
def test_images_at_a_time_change_nothing(monkeypatch, cached):
    norm, conv, how, leaves, grad = given(12, 1, 1, 12, 8, "added")
    expected = torch.autograd.grad(apart(norm, conv, leaves[0], how), leaves, grad)
    monkeypatch.setattr(winograd, "_CACHED", cached)
    out = together(norm, conv, leaves[0], how)
    assert torch.equal(out, apart(norm, conv, leaves[0], how))
    for one, other in zip(torch.autograd.grad(out, leaves, grad), expected, strict=True):
        close(one, other, 1e-5)


@pytest.mark.parametrize("flags", ["-mno-avx512f", "-D__AVX512F__"], ids=["narrower", "wider"])
def test_any_width_of_vectors(monkeypatch, flags):
    """The convolution with the sizes chosen for other processors, around the norm of this one."""
    norm, conv, how, leaves, grad = given(5, 1, 2, 9, 8, "film")
    expected = torch.autograd.grad(apart(norm, conv, leaves[0], how), leaves, grad)
    monkeypatch.setenv("CXX", f"c++ {flags}")
    other = winograd.library.__wrapped__()
    if other is None:
        pytest.skip("the compiler does not know this processor's vectors")
    monkeypatch.setattr(winograd, "library", lambda: other)
    monkeypatch.setattr(convolution, "_along", lambda *_: True)
    out = together(norm, conv, leaves[0], how)
    assert type(out.grad_fn).__name__ == "_ConvolveNormedBackward"
    for one, b in zip(torch.autograd.grad(out, leaves, grad), expected, strict=True):
        close(one, b, 1e-5)


def test_only_what_is_wanted_is_computed(monkeypatch):
    norm, conv, how, leaves, grad = given(4, 1, 1, 8, 8, "added")
    x, *_, kernel, bias, added = leaves
    expected = torch.autograd.grad(together(norm, conv, x, how), leaves, grad)
    asked = []
    for name in ("weight_gradient", "use_input_gradient"):
        own = getattr(winograd, name)
        monkeypatch.setattr(winograd, name, lambda *given, own=own, name=name: (asked.append(name), own(*given))[1])
    norm.requires_grad_(False)
    conv.requires_grad_(False)
    dx, d_added = torch.autograd.grad(together(norm, conv, x, how), [x, added], grad)
    assert asked == ["use_input_gradient"]
    assert torch.equal(dx, expected[0])
    assert torch.equal(d_added, expected[-1])
    conv.requires_grad_(True)
    d_kernel, d_bias = torch.autograd.grad(together(norm, conv, x.detach(), {"silu": True}), [kernel, bias], grad)
    assert asked == ["use_input_gradient", "weight_gradient"]
    close(d_bias, expected[4], 1e-5)
    assert d_kernel.stride() == kernel.stride()


def test_the_norm_s_result_is_kept_nowhere():
    norm, conv, how, leaves, _ = given(4, 1, 2, 8, 8)
    x = leaves[0]
    out = together(norm, conv, x, how)
    images = [one for one in out.grad_fn.saved_tensors if one is not None and one.shape == x.shape]
    assert [one.data_ptr() for one in images] == [x.data_ptr()]
    gone = weakref.ref(out)
    del out
    assert gone() is None


def test_an_input_that_was_changed_is_noticed():
    norm, conv, how, leaves, grad = given(4, 1, 1, 8, 8)
    x = leaves[0] * 1
    out = together(norm, conv, x, how)
    x.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(out, leaves, grad)


@pytest.mark.parametrize("kind", ["plain", "film", "added"])
def test_it_is_differentiated_twice(kind):
    """Also where one of its inputs is made of another."""
    norm, conv, how, leaves, grad = given(3, 1, 1, 8, 8, kind)
    wide = [one.detach().double().requires_grad_() for one in leaves]

    def second(run, leaves, grad):
        first = torch.autograd.grad(run().tanh(), leaves, grad, create_graph=True)
        return torch.autograd.grad(sum(one.square().sum() for one in first), leaves)

    found = second(lambda: together(norm, conv, leaves[0], how), leaves, grad)
    for one, other in zip(found, second(lambda: reference(norm, conv, wide, how), wide, grad.double()), strict=True):
        close(one, other, 1e-3)

    def tangled(run, x, grad):
        (first,) = torch.autograd.grad(run(x, x.mean((2, 3))).tanh(), x, grad, create_graph=True)
        return torch.autograd.grad(first.square().sum(), x)[0]

    ours = tangled(lambda x, added: together(norm, conv, x, {"silu": True, "added": added}), leaves[0], grad)
    theirs = tangled(
        lambda x, added: reference(norm, conv, [x, *wide[1:5], added], {"silu": True, "added": added}),
        wide[0],
        grad.double(),
    )
    close(ours, theirs, 1e-3)


def test_derivatives_and_transformations_go_another_way():
    norm, conv, how, leaves, grad = given(4, 1, 1, 8, 8)
    x, dx = leaves[0].detach(), torch.randn_like(leaves[0])
    expected = together(norm, conv, x, how)
    with torch.no_grad(), forward_ad.dual_level():
        moved = forward_ad.unpack_dual(together(norm, conv, forward_ad.make_dual(x, dx), how)).tangent
    _, other = torch.func.jvp(lambda x: together(norm, conv, x, how), (x,), (dx,))
    close(moved, other, 1e-5)
    out, back = torch.func.vjp(lambda x: together(norm, conv, x, how), x)
    close(out, expected, 1e-5)
    torch.testing.assert_close((back(grad)[0] * dx).sum(), (moved * grad).sum(), rtol=1e-4, atol=1e-3)
