"""How the gradient of a step is made of what each process has computed of it.

A batch belongs to all processes together: chance is asked for the whole of it, each process takes its share of the
samples, and the gradients are summed before the optimizer sees them. So the training is the same for any number of
processes, to rounding.

`Alone` is one process. `Replicated` keeps all weights in every process (torch's DistributedDataParallel). `Sharded`
keeps a part of all weights in each, also of the target, the averages, the teacher and the optimizer's numbers, and
collects the layers that are needed when they are (torch's `fully_shard`).
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from cmtool import networks
from cmtool.errors import DependencyError
from cmtool.flow.flow_map import FlowMap
from cmtool.processes import Processes
from cmtool.training.objectives import Drawn, Loss, Objective


class Alone:
    """One process: its gradient is the gradient."""

    sharded = False

    def __init__(self, model: FlowMap, target: FlowMap, objective: Objective) -> None:
        self.model, self.target, self.objective = model, target, objective

    def loss(self, piece: Drawn, progress: float) -> Loss:
        """The loss of a piece of the batch, with its graph."""
        return piece.objective.loss(self.model, self.target, piece, progress)

    def adding(self, last: bool) -> Any:
        """Around the loss of a piece and its backward pass; the gradients are summed at the last piece of a step."""
        del last
        return nullcontext()

    def finish(self) -> None:
        """After the last piece of a step: what has not been summed by then."""


class Replicated(Alone):
    """All weights in every process. The sum over the processes begins while the last piece goes backward."""

    def __init__(self, model: FlowMap, target: FlowMap, objective: Objective, *, find_unused: bool) -> None:
        super().__init__(model, target, objective)
        # The memory layouts that it warns of are one and the same: those of 1x1 kernels.
        warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of another name for `broadcast_buffers` to come
            self._parallel = nn.parallel.DistributedDataParallel(
                _Step(model, objective),
                broadcast_buffers=False,  # the processes begin with the same numbers, and that is checked
                init_sync=False,
                find_unused_parameters=find_unused,
                gradient_as_bucket_view=True,
            )

    def loss(self, piece: Drawn, progress: float) -> Loss:
        done: Loss = self._parallel(piece, self.target, progress)
        return done

    def adding(self, last: bool) -> Any:
        return nullcontext() if last else self._parallel.no_sync()


class _Step(nn.Module):
    """The loss as a module's forward pass, so that all that is trained is below one module."""

    def __init__(self, model: FlowMap, objective: Objective) -> None:
        super().__init__()
        self.model, self.objective = model, objective

    def forward(self, piece: Drawn, target: FlowMap, progress: float) -> Loss:
        return piece.objective.loss(self.model, target, piece, progress)


class Sharded(Alone):
    """A part of all weights in each process.

    What an objective learns by itself is small, and is kept whole.
    """

    sharded = True

    def __init__(self, model: FlowMap, target: FlowMap, objective: Objective, processes: Processes) -> None:
        super().__init__(model, target, objective)
        self._processes = processes
        # It warns of changes in place to what a network returns; nothing here makes any.
        warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")

    @contextmanager
    def adding(self, last: bool) -> Iterator[None]:
        root: Any = self.model.network
        root.set_requires_gradient_sync(last)
        root.set_is_last_backward(last)
        yield

    def finish(self) -> None:
        import torch.distributed as dist

        for parameter in self.objective.parameters():
            if parameter.requires_grad and parameter.grad is not None:
                dist.all_reduce(parameter.grad)
                parameter.grad /= self._processes.count


def shard(network: nn.Module, device: torch.device) -> None:
    """Spread a network's weights over the processes, block by block; in place.

    Raises:
        DependencyError: with a torch that does it wrong: before 2.9 the gradients come as sums over the processes on
            CPUs, and before 2.8 the outermost block stays together after a pass without gradient.
    """
    if torch.__version__ < "2.9":
        raise DependencyError(
            f"--shard needs torch 2.9 or newer, found {torch.__version__}",
            "leave it out, and every process holds all weights, or install a newer torch",
        )
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    if isinstance(next(network.parameters()), _dtensor()):
        return
    import torch.distributed as dist

    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    networks.forget_casts(network)
    network.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]  # it takes no other
    # The outermost would else stay together after a pass without gradient, and copies could not be blended.
    for block in [*networks.blocks(network), network]:
        fully_shard(block, mesh=mesh, reshard_after_forward=True)


def _dtensor() -> Any:
    from torch.distributed.tensor import DTensor

    return DTensor


def is_sharded(tensor: Any) -> bool:
    """Whether a tensor is spread over the processes."""
    return hasattr(tensor, "device_mesh")


def local(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor; the tensor itself where it is not spread."""
    spread: Any = tensor
    here: Tensor = spread.to_local() if is_sharded(tensor) else tensor
    return here


def like(tensor: Tensor, reference: Tensor) -> Tensor:
    """A whole tensor spread as another one is, without communication: every process has all of it."""
    if not is_sharded(reference) or is_sharded(tensor):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    where: Any = reference
    return distribute_tensor(tensor.to(where.device), where.device_mesh, where.placements, src_data_rank=None)


def whole(model: FlowMap) -> FlowMap:
    """The model with all of its weights here, a copy if they are spread; all processes ask together."""
    if not any(is_sharded(parameter) for parameter in model.parameters()):
        return model
    with torch.device("meta"):
        network = networks.build(model.network.config)  # type: ignore[arg-type]
    state = {name: _full(tensor) for name, tensor in model.network.state_dict().items()}
    network.load_state_dict(state, assign=True)
    networks.restore_constants(network)
    network.requires_grad_(False).train(model.network.training)
    made = FlowMap(network, model.path, model.parameterization, copy.copy(model.card))
    return made.compute_in(model.compute_dtype)


@torch.no_grad()
def _full(tensor: Any) -> Tensor:
    found: Tensor = (tensor.full_tensor() if is_sharded(tensor) else tensor).detach()
    return found


def norm(tensors: Sequence[Tensor]) -> Tensor:
    """The Euclidean norm of all entries of all tensors, spread ones included; a plain tensor, the same everywhere."""
    parts = [[one for one in tensors if is_sharded(one) is spread] for spread in (False, True)]
    norms = [torch.nn.utils.get_total_norm(part, foreach=not spread) for spread, part in enumerate(parts) if part]
    found = [_full(one) for one in norms]
    return found[0] if len(found) == 1 else torch.linalg.vector_norm(torch.stack(found))


def checksum(module: nn.Module) -> int:
    """A number that two modules share if all of their bits are equal, and hardly otherwise; waits for the device."""
    total: Any = 0
    for tensor in (*module.parameters(), *module.buffers()):
        here = tensor.detach()
        if here.is_floating_point():
            here = here.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[here.element_size()])
        total = 31 * total + here.sum(dtype=torch.int64)  # wraps around
    return int(total)


def unused(parameters: Iterable[nn.Parameter]) -> bool:
    """Whether a backward pass has left any of them without a gradient."""
    return any(parameter.grad is None for parameter in parameters)
