"""CUDA graphs of a network: its operations are recorded once, and then started all together.

A GPU is done with most operations of a small network before Python has asked for the next one. A graph asks for all at
once. It is recorded when the same kind of call (shapes, types, with or without a gradient) has come often enough to
come again; what cannot be recorded runs as it is. With CMTOOL_GRAPHS=0 nothing is recorded.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from cmtool import compiled
from cmtool.networks.chance import Chance, current_chance, entered
from cmtool.networks.modes import derived

_MOST = 16  # graphs of one network: each holds the memory of its activations
_KEPT = 4  # of them from one sampling to the next
_TRAINING = 1  # calls of a kind before it is recorded: steps repeat thousands of times
_SAMPLING = 6  # to record takes as long as some four calls: not worth it for one, two or four steps


class Graphs:
    """What a network is called through: `network._compiled_call_impl`, as with `nn.Module.compile`.

    A call with a gradient is recorded with its backward pass. Until that was run (or given up), the activations in the
    graph are in use, and another call with a gradient runs as it is. Derivatives of derivatives and forward-mode
    derivatives always run as they are.

    Args:
        after: calls of a kind before it is recorded.
    """

    def __init__(self, network: nn.Module, after: int) -> None:
        self._network, self._after = weakref.ref(network), after  # the network holds this
        self._recorded: dict[Any, _Recording | int] = {}  # a number: how often a kind was seen
        self._refused: set[Any] = set()

    def __call__(self, *args: Tensor, **named: Tensor | None) -> Tensor:
        network = self._network()
        assert network is not None
        inputs = dict(enumerate(args)) | {name: value for name, value in named.items() if value is not None}
        key = _kind(network, inputs)
        if key is None or key in self._refused:
            return _direct(network, inputs)
        if key not in self._recorded and len(self._recorded) >= _MOST:
            return _direct(network, inputs)
        recording = self._recorded.get(key, 0)
        if isinstance(recording, int):
            if recording < self._after:
                self._recorded[key] = recording + 1
                return _direct(network, inputs)
            try:
                recording = self._recorded[key] = _Recording(network, inputs)
            except RuntimeError:  # an operation that cannot be recorded, or too little memory to keep a graph
                del self._recorded[key]
                self._refused.add(key)
                torch.cuda.empty_cache()
                return _direct(network, inputs)
        return _direct(network, inputs) if recording.busy else recording(inputs)

    def shrink(self, count: int) -> None:
        """Forget all but the latest recordings; how often other kinds were seen is remembered."""
        kinds = [key for key, recording in self._recorded.items() if not isinstance(recording, int)]
        for key in kinds[: max(0, len(kinds) - count)]:
            del self._recorded[key]


class _Recording:
    """One kind of call: the graphs, and the memory that they read from and write to."""

    def __init__(self, network: nn.Module, inputs: dict[Any, Tensor]) -> None:
        _hush()
        chance = current_chance()
        self._inputs = {name: value.detach().clone() for name, value in inputs.items()}
        self._chance = None if chance is None else Chance(chance.seeds.clone(), chance.made)
        made = 0 if chance is None else chance.made
        self._wanted: list[Tensor] = []  # what has a gradient: inputs, then parameters
        self._open: weakref.ref[Any] | None = None  # the call whose gradient is still to come
        if torch.is_grad_enabled():
            for name, value in inputs.items():
                self._inputs[name].requires_grad_(value.requires_grad)
            self._names = [name for name, value in inputs.items() if value.requires_grad]
            self._parameters = [parameter for parameter in network.parameters() if parameter.requires_grad]
            self._wanted = [*(self._inputs[name] for name in self._names), *self._parameters]

        def run() -> Tensor:
            if self._chance is not None:
                self._chance.made = made
            with entered(self._chance) if self._chance is not None else nullcontext():
                return _direct(network, self._inputs)

        def differentiate(out: Tensor, upstream: Tensor) -> tuple[Tensor | None, ...]:
            return torch.autograd.grad(out, self._wanted, upstream, allow_unused=True)

        # Once beside the stream of the caller, as torch asks for: libraries set themselves up at the first call.
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            out = run()
            if self._wanted:
                differentiate(out, torch.ones_like(out))
            del out
        torch.cuda.current_stream().wait_stream(side)

        self._forward, self._backward = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._forward, capture_error_mode="thread_local"):
            out = run()
        if self._wanted:
            self._upstream = torch.empty_like(out)
            again: Any = {"pool": self._forward.pool(), "capture_error_mode": "thread_local"}
            with torch.cuda.graph(self._backward, **again):
                self._gradients = differentiate(out, self._upstream)
        self._out = out.detach()
        self._decisions = 0 if self._chance is None else self._chance.made - made

    @property
    def busy(self) -> bool:
        """Whether the activations of a call wait for its backward pass."""
        return self._open is not None and self._open() is not None

    def __call__(self, inputs: dict[Any, Tensor]) -> Tensor:
        chance = current_chance()
        if self._chance is not None and chance is not None:
            self._chance.seeds.copy_(chance.seeds)
            chance.made += self._decisions
        if not self._wanted:
            return self._replay(inputs)
        out: Tensor = _Replay.apply(self, inputs, *(inputs[name] for name in self._names), *self._parameters)
        return out

    def _replay(self, inputs: dict[Any, Tensor]) -> Tensor:
        with torch.no_grad():
            for name, value in inputs.items():
                self._inputs[name].copy_(value)
        self._forward.replay()
        return self._out.clone()

    def begin(self, call: Any, inputs: dict[Any, Tensor]) -> Tensor:
        """The output; the call's backward pass is to come."""
        out = self._replay(inputs)
        self._open = weakref.ref(call)
        return out

    def end(self, upstream: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients."""
        self._upstream.copy_(upstream)
        self._backward.replay()
        self._open = None
        return tuple(None if gradient is None else gradient.clone() for gradient in self._gradients)


class _Call:
    """Alive for as long as autograd may ask for a gradient."""


class _Replay(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, recording: _Recording, inputs: dict[Any, Tensor], *wanted: Tensor) -> Tensor:
        ctx.recording, ctx.call = recording, _Call()
        return recording.begin(ctx.call, inputs)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.call is None:
            raise RuntimeError("the gradient of a recorded call was taken already")
        ctx.call = None
        return None, None, *ctx.recording.end(upstream)


def _direct(network: nn.Module, inputs: dict[Any, Tensor]) -> Tensor:
    args = [value for name, value in inputs.items() if isinstance(name, int)]
    out: Tensor = network._call_impl(*args, **{name: value for name, value in inputs.items() if isinstance(name, str)})
    return out


def _hush() -> None:
    """torch warns of gradients that come on another stream than it expects: those of graphs do, and it waits."""
    warn = getattr(torch.autograd.graph, "set_warn_on_accumulate_grad_stream_mismatch", lambda wanted: None)
    warn(False)


def _kind(network: nn.Module, inputs: dict[Any, Tensor]) -> Any:
    """What two calls have in common that one graph can do; None for calls that cannot be recorded."""
    first = next(network.parameters(), None)
    if first is None or not first.is_cuda or derived() or torch.cuda.is_current_stream_capturing():
        return None
    chance, grad = current_chance(), torch.is_grad_enabled()
    return (
        tuple((name, v.shape, v.stride(), v.dtype, v.device, grad and v.requires_grad) for name, v in inputs.items()),
        (network.training, grad, torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cuda")),
        None if chance is None else (chance.seeds.shape, chance.made),
        (first.data_ptr(), grad and any(parameter.requires_grad for parameter in network.parameters())),
    )


def record(network: nn.Module, after: int = _TRAINING) -> None:
    """Let the calls of a network on a GPU be recorded from now on; in place, for as long as it lives."""
    if compiled.enabled("CMTOOL_GRAPHS"):
        network._compiled_call_impl = Graphs(network, after)


_kept: weakref.WeakKeyDictionary[nn.Module, tuple[tuple[int, ...], Graphs]] = weakref.WeakKeyDictionary()


@contextmanager
def recorded(network: nn.Module) -> Iterator[None]:
    """`record` for a while, unless the network is recorded or compiled already.

    Graphs are kept for the next time, as long as the network lives and its weights stay where they are in memory (their
    values may change), so that who samples single batches one after another does not wait for Python either.
    """
    if network._compiled_call_impl is not None or not next(network.parameters()).is_cuda:
        yield
        return
    record(network, _SAMPLING)
    where = tuple(tensor.data_ptr() for tensor in (*network.parameters(), *network.buffers()))
    before = _kept.pop(network, None)
    if before is not None and before[0] == where and network._compiled_call_impl is not None:
        network._compiled_call_impl = before[1]
    try:
        yield
    finally:
        graphs, network._compiled_call_impl = network._compiled_call_impl, None
        if graphs is not None:
            graphs.shrink(_KEPT)
            _kept[network] = where, graphs


def forget(network: nn.Module) -> None:
    """Give back the memory of a network's recordings; it may be recorded anew."""
    _kept.pop(network, None)
    if isinstance(graphs := network._compiled_call_impl, Graphs):
        graphs.shrink(0)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
