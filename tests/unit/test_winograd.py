"""Winograd's convolution against torch's in float64, and who gets it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import forward_ad

from cmtool import networks
from cmtool.networks import ADMConfig, winograd
from cmtool.networks.convolution import Conv2d, convolve

pytestmark = pytest.mark.skipif(winograd.library() is None, reason="no compiler on this machine")

ONES = (1, 1)
WIDTH = 32  # channels that fit vectors of any width, so that errors are the same on every processor
# Images, channels in and out in multiples of WIDTH, height and width.
SHAPES = [(4, 1, 1, 8, 8), (3, 2, 3, 7, 9), (40, 3, 1, 4, 4), (2, 1, 2, 16, 5), (1, 4, 2, 32, 32), (17, 1, 1, 3, 4)]


@pytest.fixture(autouse=True)
def fewest(monkeypatch):
    """What is computed is right for 16 tiles, too, for which torch would be faster; returns the real bound."""
    real = winograd._FEWEST
    monkeypatch.setattr(winograd, "_FEWEST", 16)
    return real


def given(images, channels, outputs, height, width, *, seed=0, last=True):
    generator = torch.Generator().manual_seed(seed)
    size = (images, channels * WIDTH, height, width)
    x = torch.randn(size, generator=generator)
    weight = torch.randn(outputs * WIDTH, size[1], 3, 3, generator=generator) / (9 * size[1]) ** 0.5
    bias = torch.randn(len(weight), generator=generator)
    grad = torch.randn(images, len(weight), height, width, generator=generator)
    if last:
        x, weight, grad = (one.contiguous(memory_format=torch.channels_last) for one in (x, weight, grad))
    return x, weight, bias, grad


def distance(found, expected):
    """Largest difference in units of the expected values' size."""
    assert found.shape == expected.shape
    return float((found.double() - expected).abs().max() / expected.square().mean().sqrt())


def wide(x, weight, bias, grad):
    """torch's convolution and its gradients, in float64."""
    leaves = [one.double().requires_grad_() for one in (x, weight, bias)]
    out = F.conv2d(*leaves, padding=1)
    return out.detach(), *torch.autograd.grad(out, leaves, grad.double())


@pytest.mark.parametrize("last", [True, False], ids=["channels-last", "contiguous"])
@pytest.mark.parametrize("shape", SHAPES)
def test_it_is_the_convolution_and_its_gradients(shape, last):
    x, weight, bias, grad = given(*shape, last=last)
    assert winograd.usable(x, weight, ONES, ONES)
    out, dx, dweight, _ = wide(x, weight, bias, grad)
    found = winograd.forward(x, weight, bias)
    assert found.is_contiguous(memory_format=torch.channels_last)
    assert distance(found, out) < 1e-5
    assert distance(winograd.forward(x, weight), out - bias.double()[:, None, None]) < 1e-5
    assert distance(winograd.input_gradient(grad, weight), dx) < 1e-5
    gradient = winograd.weight_gradient(x, grad, weight)
    assert gradient.stride() == weight.stride()
    assert distance(gradient, dweight) < 1e-5


@pytest.mark.parametrize("first", [0, WIDTH, 5])
@pytest.mark.parametrize("shape", SHAPES)
def test_slices_of_more_channels_need_no_copy(monkeypatch, shape, first):
    x, weight, bias, grad = given(*shape)

    def slice_of_more(one):
        more = torch.full((len(one), one.shape[1] + 2 * WIDTH, *one.shape[2:]), torch.nan)
        some = more.contiguous(memory_format=torch.channels_last)[:, first : first + one.shape[1]]
        return some.copy_(one)

    expected = winograd.forward(x, weight, bias), winograd.input_gradient(grad, weight)
    gradient = winograd.weight_gradient(x, grad, weight)
    some_x, some_grad = slice_of_more(x), slice_of_more(grad)
    assert not some_x.is_contiguous(memory_format=torch.channels_last)
    monkeypatch.setattr(winograd, "laid_out", lambda one: pytest.fail("copied") if one is not x else one)
    found = winograd.forward(some_x, weight, bias), winograd.input_gradient(some_grad, weight)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert torch.equal(winograd.weight_gradient(x, some_grad, weight), gradient)


@pytest.mark.parametrize("shape", [(8, 2, 2, 16, 16), (8, 4, 4, 16, 16), (32, 1, 1, 32, 32)])
def test_its_errors_are_a_few_roundings(shape):
    """On average within three times those of torch's own sums, over many channels and over many tiles."""
    x, weight, bias, grad = given(*shape)
    out, dx, dweight, _ = wide(x, weight, bias, grad)
    ours = (winograd.forward(x, weight, bias), winograd.input_gradient(grad, weight))
    leaves = [one.requires_grad_() for one in (x, weight, bias)]
    torchs = F.conv2d(*leaves, padding=1)
    theirs = (torchs.detach(), *torch.autograd.grad(torchs, leaves[:2], grad))
    ours = (*ours, winograd.weight_gradient(x.detach(), grad, weight.detach()))
    for a, b, exact in zip(ours, theirs, (out, dx, dweight), strict=True):
        assert (a.detach() - exact).norm() < 3 * (b - exact).norm() + 1e-7 * exact.norm()


@pytest.mark.parametrize("shape", SHAPES)
def test_threads_change_last_digits_at_most(shape):
    x, weight, bias, grad = given(*shape)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 7):
            torch.set_num_threads(threads)
            out = winograd.forward(x, weight, bias), winograd.input_gradient(grad, weight)
            gradients = [winograd.weight_gradient(x, grad, weight) for _ in range(2)]
            assert torch.equal(*gradients)
            found.append((*out, gradients[0]))
    finally:
        torch.set_num_threads(before)
    for out, dx, dweight in found[1:]:
        assert torch.equal(out, found[0][0])
        assert torch.equal(dx, found[0][1])
        assert distance(dweight, found[0][2].double()) < 1e-5


@pytest.mark.parametrize("kept", [0, 1, 2, 3])
@pytest.mark.parametrize("shape", [(4, 1, 1, 8, 8), (3, 2, 3, 7, 9)])
def test_threads_share_the_sums_of_a_gradient(monkeypatch, shape, kept):
    """As on machines of many threads, where not every one can have its own."""
    x, weight, bias, grad = given(*shape)
    monkeypatch.setenv("CXX", f"c++ -DSUMS={kept * 36 * weight[..., 0, 0].numel() * 4}L")
    other = winograd.library.__wrapped__()
    assert other is not None
    monkeypatch.setattr(winograd, "library", lambda: other)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            assert other.parts(weight.shape[1], len(weight), threads) == min(max(kept, 1), threads)
            assert distance(winograd.weight_gradient(x, grad, weight), wide(x, weight, bias, grad)[2]) < 1e-5
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("flags", ["-mno-avx512f", "-D__AVX512F__"], ids=["narrower", "wider"])
def test_any_width_of_vectors(monkeypatch, flags):
    """The sizes chosen for other processors, as this one computes them."""
    monkeypatch.setenv("CXX", f"c++ {flags}")
    other = winograd.library.__wrapped__()
    if other is None:
        pytest.skip("the compiler does not know this processor's vectors")
    x, weight, bias, grad = given(5, 1, 2, 9, 8)
    expected = wide(x, weight, bias, grad)
    monkeypatch.setattr(winograd, "library", lambda: other)
    assert WIDTH % other.channels() == 0
    found = (
        winograd.forward(x, weight, bias),
        winograd.input_gradient(grad, weight),
        winograd.weight_gradient(x, grad, weight),
    )
    for a, b in zip(found, expected, strict=False):
        assert distance(a, b) < 1e-5


def test_processors_without_wide_vectors_go_without(monkeypatch):
    monkeypatch.setenv("CXX", "c++ -mno-avx512f -mno-avx2 -mno-fma")
    assert winograd.library.__wrapped__() is None


def test_who_gets_it():
    x, weight, *_ = given(2, 1, 1, 16, 16)
    assert winograd.usable(x, weight, ONES, ONES)
    assert winograd.usable(x, torch.nn.Parameter(weight), ONES, ONES)
    assert not winograd.usable(x, weight, (2, 2), ONES)
    assert not winograd.usable(x, weight, ONES, (0, 0))
    assert not winograd.usable(x, weight[..., :1, :1], ONES, ONES)
    assert not winograd.usable(x.bfloat16(), weight.bfloat16(), ONES, ONES)
    assert not winograd.usable(x.double(), weight.double(), ONES, ONES)
    assert not winograd.usable(x[:, :3], weight[:, :3], ONES, ONES)  # colours
    assert not winograd.usable(x, weight[:3], ONES, ONES)
    assert not winograd.usable(x[:1, ..., :8, :4], weight, ONES, ONES)  # too little of it
    assert not winograd.usable(x.repeat(9, 1, 1, 1)[..., :2, :2], weight, ONES, ONES)  # mostly beyond the edges
    assert not winograd.usable(x[:0], weight, ONES, ONES)
    assert not winograd.usable(x.to("meta"), weight.to("meta"), ONES, ONES)


def test_few_tiles_are_torch_s(monkeypatch, fewest):
    monkeypatch.setattr(winograd, "_FEWEST", fewest)
    for images, height, used in ((1, 24, False), (1, 28, True), (3, 16, True), (2, 16, False)):
        x, weight, *_ = given(images, 1, 1, height, 28 if images == 1 else 16)
        assert winograd.usable(x, weight, ONES, ONES) == used
        out = wide(x, weight, torch.zeros(len(weight)), torch.zeros(images, len(weight), *x.shape[2:]))[0]
        assert distance(convolve(x, weight, None, ONES, ONES), out) < 1e-5


def test_the_network_s_convolution():
    """With and without a gradient, along a direction, and differentiated twice."""
    x, weight, bias, grad = given(4, 1, 2, 8, 12)
    out, *expected = wide(x, weight, bias, grad)
    with torch.no_grad():
        plain = convolve(x, weight, bias, ONES, ONES)
    leaves = [one.requires_grad_() for one in (x, weight, bias)]
    found = convolve(*leaves, ONES, ONES)
    assert torch.equal(plain, found)
    assert torch.equal(plain, winograd.forward(x.detach(), weight.detach(), bias.detach()))
    assert distance(found.detach(), out) < 1e-5
    for a, b in zip(torch.autograd.grad(found, leaves, grad), expected, strict=True):
        assert distance(a, b) < 1e-5

    def twice(x, weight, bias, grad):
        first = torch.autograd.grad(convolve(x, weight, bias, ONES, ONES).tanh(), x, grad, create_graph=True)
        return torch.autograd.grad(first[0].square().sum(), (x, weight, bias))

    wider = [one.detach().double().requires_grad_() for one in leaves]
    for a, b in zip(twice(*leaves, grad), twice(*wider, grad.double()), strict=True):
        assert distance(a, b) < 3e-5

    x, weight, bias = (one.detach() for one in leaves)
    dx, dbias = torch.randn_like(x), torch.randn_like(bias)
    with torch.no_grad(), forward_ad.dual_level():
        dual = convolve(forward_ad.make_dual(x, dx), weight, forward_ad.make_dual(bias, dbias), ONES, ONES)
        moved = forward_ad.unpack_dual(dual)
    assert torch.equal(moved.primal, plain)
    change = F.conv2d(dx.double(), weight.double(), dbias.double(), padding=1)
    assert distance(moved.tangent, change) < 1e-5
    _, other = torch.func.jvp(lambda x, bias: convolve(x, weight, bias, ONES, ONES), (x, bias), (dx, dbias))
    assert distance(other, change) < 1e-5
    each = torch.func.vmap(lambda one: F.conv2d(one[None], weight, bias, padding=1)[0])(x)
    assert distance(each, out) < 1e-5


def test_a_network_uses_it_for_all_its_wide_convolutions(monkeypatch, fewest):
    monkeypatch.setattr(winograd, "_FEWEST", fewest)
    config = ADMConfig(resolution=16, channels=2 * WIDTH, channel_mult=(1, 2), num_blocks=1, attention_resolutions=())
    network = networks.build(config).to(memory_format=torch.channels_last)
    many = [m for m in network.modules() if isinstance(m, Conv2d) and m.kernel_size == (3, 3)]
    many = [m for m in many if m.stride == ONES and m.in_channels > 3 and m.out_channels > 3]
    counts = dict.fromkeys(("forward", "input_gradient", "use_input_gradient", "weight_gradient"), 0)

    def counting(name):
        own = getattr(winograd, name)

        def counted(*given):
            counts[name] += 1
            return own(*given)

        monkeypatch.setattr(winograd, name, counted)

    for name in counts:
        counting(name)
    x, t = torch.randn(12, 3, 16, 16), torch.rand(12)  # 48 tiles at 8x8
    network(x, t).square().mean().backward()
    assert len(many) > 5
    plain = counts.pop("input_gradient")  # of convolutions after something else than a norm
    assert plain == sum(getattr(m, "resample", None) is not None for m in network.modules()) > 0
    counts["use_input_gradient"] += plain
    assert counts == dict.fromkeys(counts, len(many))
    found = [p.grad.clone() for p in network.parameters()]
    network.zero_grad()
    monkeypatch.setattr(winograd, "usable", lambda *_: False)
    network(x, t).square().mean().backward()
    for a, p in zip(found, network.parameters(), strict=True):
        assert (a - p.grad).norm() <= 1e-5 * p.grad.norm() + 1e-8
