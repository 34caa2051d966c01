"""The compiled pass against torch's own operations, and what happens where it cannot be had."""

from __future__ import annotations

import sys
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import forward_ad

from cmtool import compiled
from cmtool.networks import chance, native, recomputed
from cmtool.networks.chance import seeded
from cmtool.networks.convolution import Conv2d
from cmtool.networks.norms import GroupNorm, _Normalise, _normalise

available = pytest.mark.skipif(native.library() is None, reason="no compiler on this machine")


def inputs(batch, channels, side, dtype, *, added, dropout, silu, groups=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, channels, side, side + 1, generator=generator).to(dtype)
    x = (x * 3 + 1).contiguous(memory_format=torch.channels_last)
    pre = torch.randn(batch, channels, generator=generator) if added else None
    weight = 1 + 0.3 * torch.randn(batch, channels, generator=generator)
    bias = torch.randn(batch, channels, generator=generator)
    grad = torch.randn(x.shape, generator=generator).to(dtype)
    with seeded(torch.arange(batch) * 7919 + 2**40):
        keys = chance.keys(x) if dropout else None
    return x, pre, weight, bias, keys, native.Shape(groups, 1e-5, silu, *chance.threshold(dropout)), grad


def gradients(function, x, pre, weight, bias, keys, how, grad, dtype=None):
    """Output and gradients of x, pre, weight, bias."""
    leaves = [
        None if one is None else one.detach().to(dtype or one.dtype).requires_grad_() for one in (x, pre, weight, bias)
    ]
    out = function(*leaves, keys, how)
    out = out[0] if isinstance(out, tuple) else out
    out.backward(grad.to(out.dtype))
    return [out.detach(), *(leaf.grad for leaf in leaves if leaf is not None)]


@available
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 8e-3)])
@pytest.mark.parametrize(("added", "dropout", "silu"), [(False, 0.0, True), (True, 0.3, True), (True, 0.0, False)])
@pytest.mark.parametrize(("batch", "channels", "side"), [(1, 8, 3), (2, 64, 8), (5, 48, 5), (7, 36, 1)])
def test_the_kernel_is_the_formula(batch, channels, side, dtype, tolerance, added, dropout, silu):
    given = inputs(batch, channels, side, dtype, added=added, dropout=dropout, silu=silu)
    how = given[5]
    assert native.usable(given[0])
    found = gradients(_Normalise.apply, *given)
    expected = gradients(_normalise, *given, dtype=torch.float64)
    assert len(found) == 4 + added
    for a, b in zip(found, expected, strict=True):
        assert a.shape == b.shape
        error = (a.double() - b).norm() / b.norm().clamp_min(1e-3)
        assert error < tolerance, float(error)
    assert found[0].dtype == dtype
    assert found[0].is_contiguous(memory_format=torch.channels_last)
    if dropout:  # the very same entries
        assert torch.equal(found[0] == 0, chance.mask(found[0], given[4], how) == 0)


@available
@pytest.mark.parametrize(
    "narrower", ["-mno-avx512f", "-mno-avx512bf16 -mno-avx512dq", "-mno-avx512f -mno-avx -mno-fma"]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_processor_gets_the_same_numbers(monkeypatch, dtype, narrower):
    """Dropout takes the same entries and SiLU is the same, whatever vectors the processor has."""
    given = inputs(3, 36, 5, dtype, added=True, dropout=0.3, silu=True)
    given[0][0, 0, 0, 0] = torch.nan
    given[2][2] *= 100  # far beyond what exp() has numbers for
    expected = native.forward(*given[:6])[0]
    monkeypatch.setenv("CXX", f"c++ {narrower}")
    other = native.library.__wrapped__()
    if other is None:
        pytest.skip("the compiler does not know this processor's vectors")
    monkeypatch.setattr(native, "library", lambda: other)
    found = native.forward(*given[:6])[0]
    assert torch.equal(found == 0, expected == 0)
    torch.testing.assert_close(found, expected, equal_nan=True)


@available
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 8e-3)])
@pytest.mark.parametrize(("batch", "channels", "side", "threads"), [(2, 16, 4, 1), (5, 36, 3, 2), (1, 64, 7, 3)])
@pytest.mark.parametrize("which", range(1, 16))
def test_what_follows_a_change(monkeypatch, batch, channels, side, threads, dtype, tolerance, which):
    """Along x, what is added to it, the weight and the bias: any of them, against torch in float64."""
    *values, keys, how, _ = inputs(batch, channels, side, dtype, added=True, dropout=0.3, silu=True)
    changes = [torch.randn_like(value) if which >> index & 1 else None for index, value in enumerate(values)]
    made, tangent = [], native.tangent
    monkeypatch.setattr(native, "tangent", lambda *given: (made.append(1), tangent(*given))[1])
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        with torch.no_grad(), forward_ad.dual_level():
            moved = [
                value if change is None else forward_ad.make_dual(value, change)
                for value, change in zip(values, changes, strict=True)
            ]
            found = forward_ad.unpack_dual(_Normalise.apply(*moved, keys, how)[0])
    finally:
        torch.set_num_threads(before)
    assert made
    wide = tuple(value.double() for value in values)
    along = tuple(
        torch.zeros_like(value) if change is None else change.double()
        for value, change in zip(wide, changes, strict=True)
    )
    _, expected = torch.func.jvp(lambda *given: _normalise(*given, keys, how), wide, along)
    assert found.tangent.dtype == dtype
    assert (found.tangent.double() - expected).norm() < tolerance * expected.norm()


@available
def test_the_kernel_takes_any_layout():
    x, *rest, grad = inputs(3, 8, 4, torch.float32, added=True, dropout=0.2, silu=True)
    expected = gradients(_Normalise.apply, x, *rest, grad)
    found = gradients(_Normalise.apply, x.contiguous(), *rest, grad.contiguous())
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


@available
@pytest.mark.parametrize("threads", [1, 2, 3, 7])
def test_the_number_of_threads_changes_only_rounding(threads):
    given = inputs(3, 32, 9, torch.float32, added=True, dropout=0.2, silu=True)
    expected = gradients(_normalise, *given)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        found = gradients(_Normalise.apply, *given)
    finally:
        torch.set_num_threads(before)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@available
def test_values_far_from_zero_keep_their_variance():
    x, *rest, grad = inputs(2, 8, 16, torch.float32, added=False, dropout=0.0, silu=False)
    x = x + 1000
    found = gradients(_Normalise.apply, x, *rest, grad)[0]
    expected = gradients(_normalise, x, *rest, grad, dtype=torch.float64)[0]
    assert (found - expected).abs().max() < 2e-3


@available
def test_what_it_does_not_compute_goes_another_way():
    assert not native.usable(torch.zeros(1, 8, 2, 2, dtype=torch.float64))
    assert not native.usable(torch.zeros(0, 8, 2, 2))
    assert not native.usable(torch.zeros(1, 8, 2, 2, dtype=torch.float16))


# --- what is made again rather than kept ----------------------------------------------------------------------------


def block():
    """A norm, a convolution, and what both are of: x in float32, and weights."""
    torch.manual_seed(0)
    norm, conv = GroupNorm(16, eps=1e-5, group_channels=4), Conv2d(16, 16, 3)
    x = torch.randn(4, 16, 12, 12).contiguous(memory_format=torch.channels_last).requires_grad_()
    return norm, conv, x, torch.randn(4, 16, 12, 12), [x, *norm.parameters(), *conv.parameters()]


@pytest.fixture(params=[True, False], ids=["forgetting", "keeping"])
def forgets(request, monkeypatch):
    monkeypatch.setattr(recomputed, "_forgets", request.param)
    return request.param and native.library() is not None


def test_a_norm_is_made_again_for_the_gradient(forgets):
    norm, conv, x, grad, leaves = block()
    with seeded(torch.arange(4)):
        hidden = norm(x, silu=True, dropout=0.3)
    gone = weakref.ref(hidden)
    out = conv(hidden)
    del hidden
    assert (gone() is None) == forgets
    found = torch.autograd.grad(out, leaves, grad, retain_graph=True)
    again = torch.autograd.grad(out, leaves, grad)
    assert all(torch.equal(one, other) for one, other in zip(found, again, strict=True))
    # The same as where everything is kept, bit for bit.
    with pytest.MonkeyPatch.context() as patch, seeded(torch.arange(4)):
        patch.setattr(recomputed, "_forgets", False)
        kept = torch.autograd.grad(conv(norm(x, silu=True, dropout=0.3)), leaves, grad)
    assert all(torch.equal(one, other) for one, other in zip(found, kept, strict=True))


def test_a_norm_that_was_changed_is_kept(forgets):
    norm, conv, x, grad, leaves = block()
    changed = torch.autograd.grad(conv(norm(x, silu=True).mul_(2)), leaves, grad)
    expected = torch.autograd.grad(conv(norm(x, silu=True) * 2), leaves, grad)
    assert all(torch.equal(one, other) for one, other in zip(changed, expected, strict=True))


def test_a_second_derivative_goes_through_what_is_made_again(forgets):
    """Against torch's own operations in float64."""

    def second(run, leaves, grad):
        first = torch.autograd.grad(run(), leaves, grad, create_graph=True)
        total = sum(one.square().sum() for one in first)
        return torch.autograd.grad(total, leaves[:4])  # the last bias is in no gradient

    norm, conv, x, grad, leaves = block()
    found = second(lambda: conv(norm(x, silu=True)), leaves, grad)
    wide = [one.detach().double().requires_grad_() for one in leaves]
    y, weight, bias, kernel, shift = wide

    def run():
        return F.conv2d(F.silu(F.group_norm(y, norm.num_groups, weight, bias, norm.eps)), kernel, shift, padding=1)

    for one, other in zip(found, second(run, wide, grad.double()), strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-3, atol=1e-4 * other.abs().max())


def test_a_block_that_forgets_everything_keeps_nothing_of_it(forgets):
    """Its norms' inputs are no more kept than their outputs are."""

    class Block(recomputed.Recomputed):
        def __init__(self):
            super().__init__()
            self.norm, self.conv, self.inside = norm, conv, []

        def forward(self, x):
            doubled = 2 * x
            self.inside.append(weakref.ref(doubled.untyped_storage()))
            return self.conv(self.norm(doubled, silu=True))

    norm, conv, x, grad, leaves = block()
    made = Block()
    plain = torch.autograd.grad(made(x), leaves, grad)
    made.recompute = True
    out = made(x)
    assert made.inside[-1]() is None
    for one, other in zip(torch.autograd.grad(out, leaves, grad), plain, strict=True):
        assert torch.equal(one, other)


def test_forward_derivatives_and_transformations_keep_what_they_need(forgets):
    norm, conv, x, grad, _ = block()
    forward = torch.func.jvp(lambda x: conv(norm(x, silu=True)), (x.detach(),), (grad,))[1]
    (backward,) = torch.func.vjp(lambda x: conv(norm(x, silu=True)), x.detach())[1](grad)
    (expected,) = torch.autograd.grad(conv(norm(x, silu=True)), x, grad)
    torch.testing.assert_close(backward, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close((forward * grad).sum(), (expected * grad).sum(), rtol=1e-4, atol=1e-3)


# --- the library -----------------------------------------------------------------------------------------------------


@pytest.fixture
def ask(monkeypatch, tmp_path):
    """Whether there is a library under these settings; what is computed is right in any case."""

    def asked(**env: str) -> bool:
        with monkeypatch.context() as patch:
            patch.setenv("CMTOOL_CACHE", str(tmp_path))
            for name, value in env.items():
                patch.setenv(name, value)
            found = native.library.__wrapped__()
            patch.setattr(native, "library", lambda: found)
            x, norm = torch.randn(2, 8, 4, 4), GroupNorm(8, eps=1e-5, group_channels=4)
            torch.testing.assert_close(norm(x, silu=True), F.silu(F.group_norm(x, 2)), rtol=1e-5, atol=1e-5)
        return found is not None

    return asked


@available
def test_it_is_compiled_once_into_the_cache(ask, tmp_path):
    assert ask()
    (made,) = (tmp_path / "native").iterdir()
    before = made.stat().st_mtime_ns
    assert ask()
    assert ask(CXX="no-such-compiler") is False  # another compiler makes another file
    assert [file.stat().st_mtime_ns for file in (tmp_path / "native").iterdir()] == [before]


@available
def test_the_cache_may_be_named_from_home(ask, tmp_path):
    assert ask(HOME=str(tmp_path), CMTOOL_CACHE="~/kept")
    assert [file.suffix for file in (tmp_path / "kept" / "native").iterdir()] == [".so"]


def test_it_can_be_switched_off(ask, tmp_path):
    assert not ask(CMTOOL_NATIVE="0")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("compiler", ["no-such-compiler", "false", f"{sys.executable} -c pass"])
def test_without_a_compiler_torch_computes(ask, tmp_path, compiler):
    assert not ask(CXX=compiler)
    assert not [file for file in tmp_path.rglob("*") if file.is_file()]


def test_a_broken_library_is_not_loaded(ask, tmp_path, monkeypatch):
    broken = tmp_path / "broken.so"
    broken.write_bytes(b"\x7fELF" + bytes(96))
    monkeypatch.setattr(compiled, "made", lambda source: broken)
    assert not ask()


def test_a_cache_that_is_no_folder(ask, tmp_path):
    (tmp_path / "file").write_text("")
    assert not ask(CMTOOL_CACHE=str(tmp_path / "file"))
