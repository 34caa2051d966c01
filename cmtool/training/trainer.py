"""`Trainer`: one loop for every objective.

`run` is a generator: it does a step and yields a `Report`; the caller decides when to log, sample, save and stop. The
trainer knows no files and prints nothing.

Every random number of a step comes from (seed, step), and the order of the data from (seed, epoch), so a run that is
continued from a checkpoint goes on exactly as if it had not been stopped. Several processes ask chance for the whole
batch, too, and compute a share of it each (`cmtool.training.distributed`).
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from cmtool import networks, rng
from cmtool.errors import ConfigError, DataError, DivergenceError, TrainingError
from cmtool.flow.flow_map import FlowMap, ModelCard
from cmtool.processes import ALONE, Processes, same
from cmtool.training import distributed
from cmtool.training.average import blend
from cmtool.training.objectives import Drawn, Loss, joined
from cmtool.training.recipe import Optimizer, Recipe
from cmtool.training.trajectory import Batch

_NEVER = 2**62
_CHECK_EVERY = 20  # steps between looks at whether the losses are finite; each look waits for the device
_COMPARE_EVERY = 100  # steps between looks at whether all processes hold the same weights


class Images(Protocol):
    """What a data set has to offer: images by index, with their labels and, where it holds pairs, their noise."""

    def __len__(self) -> int: ...

    def batch(self, indices: Tensor) -> tuple[Tensor | None, ...]:
        """uint8 images, or floats in [-1, 1], [B, C, H, W]; labels [B] or None; for pairs also eps as the images."""
        ...


class Stream(Protocol):
    """What a data set may offer besides: batches that are known ahead, made ready before they are asked for."""

    def stream(self, batches: Iterable[Tensor]) -> Iterator[tuple[Tensor | None, ...]]:
        """What `Images.batch` gives, for one batch of indices after another."""
        ...


class Endless(Stream, Protocol):
    """Data in an order of its own, without end: images are asked for by their position in the training."""

    endless: bool

    def batch(self, positions: Tensor) -> tuple[Tensor | None, ...]:
        """As `Images.batch`."""
        ...

    def state_dict(self, position: int) -> Mapping[str, Any]:
        """What is needed to go on with a position."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there."""
        ...


class Report(NamedTuple):
    """One finished step. The losses are tensors on the device: reading them waits for it.

    Of several processes each reports its share: `loss` is to be summed over them.
    """

    step: int  # 1 after the first
    images: int
    progress: float
    loss: Tensor  # what was minimised, the mean over the batch
    per_sample: Tensor  # [B]
    t: Tensor  # [B], the times of `per_sample`
    grad_norm: Tensor
    lr: float


class Order:
    """The infinite order of the data: a new permutation an epoch, from (seed, epoch) alone."""

    def __init__(self, size: int, seed: int) -> None:
        self.size, self.seed = size, seed
        self._epoch, self._permutation = -1, torch.empty(0)

    def indices(self, position: int, count: int) -> Tensor:
        """The `count` indices that follow after `position` samples; int64."""
        parts = []
        while count:
            epoch, offset = divmod(position, self.size)
            if epoch != self._epoch:
                generator = torch.Generator().manual_seed(rng.derive(self.seed, 1, epoch))
                small = torch.int32 if self.size < 2**31 else torch.int64  # half the memory for the same order
                self._epoch, self._permutation = epoch, torch.randperm(self.size, generator=generator, dtype=small)
            part = self._permutation[offset : offset + count].long()
            parts.append(part)
            position, count = position + len(part), count - len(part)
        return torch.cat(parts)


class Trainer:
    """Trains a model by a recipe.

    Args:
        recipe: what to do.
        data: images by index, or endless ones.
        card: the model card of the result; its `role`, `preset` and `iterations` are filled in here.
        teacher: the model to follow; required by recipes that distil.
        init: model to start from, the first stage of a truncated one; the teacher where the recipe says so.
        backbone: pretrained trunk of LPIPS, where the recipe needs it.
        seed: of everything random.
        device: where to train.
        compute_dtype: type inside the network; None is float32.
        micro_batch: images whose gradient is computed at once; None is the whole batch. The gradients of the pieces add
            up to that of the batch, and chance is asked for the batch as a whole: it changes the memory, nothing else.
        checkpoint_activations: see `networks.recompute`.
        compiled: let torch.compile work on the networks. Where it fails they run as they are, see `compiled`.
        processes: those that share each batch; every one makes its trainer with the same arguments.
        sharded: keep only a part of all weights in each of them.
    Raises:
        DataError: if the data holds fewer images than a batch.
        ConfigError: for a batch, or a part of one, that has fewer images than there are processes.
        TrainingError: if the processes do not begin with the same weights.
    """

    def __init__(
        self,
        recipe: Recipe,
        data: Images | Endless,
        card: ModelCard,
        *,
        teacher: FlowMap | None = None,
        init: FlowMap | None = None,
        backbone: Mapping[str, Tensor] | None = None,
        seed: int = 0,
        device: torch.device | str = "cpu",
        compute_dtype: torch.dtype | None = None,
        micro_batch: int | None = None,
        checkpoint_activations: bool = False,
        compiled: bool = False,
        processes: Processes = ALONE,
        sharded: bool = False,
    ) -> None:
        size = _size(data)
        if size is not None and size < recipe.batch:
            raise DataError(
                f"the data has {size} images, fewer than one batch of {recipe.batch}", "try a smaller --batch"
            )
        if recipe.augment is not None and getattr(recipe.network, "augment_dim", 0) != recipe.augment.dim:
            raise ConfigError(
                "the images are augmented, and the network is not told how",
                f"set network.augment_dim={recipe.augment.dim}",
            )
        if micro_batch is not None and micro_batch < 1:
            raise ConfigError(
                f"a micro-batch holds at least 1 image, found {micro_batch}", "leave it out for all at once"
            )
        self.data: Any = data
        self.recipe, self.seed, self.micro_batch = recipe, seed, micro_batch
        self.device, self.processes = torch.device(device), processes
        self.order = None if size is None else Order(size, seed)
        self.step = 0
        self._feed: _Feed | None = None
        self._health = Health(self.device)

        with rng.forked(rng.derive(seed, 0), "cpu"):
            network = networks.build(recipe.network)
        start = teacher if init is None and recipe.init_from_teacher else init
        if start is not None:
            networks.load_start(network, start.network.state_dict())
        card = _filled(card, recipe)
        model = FlowMap(network, recipe.path, recipe.parameterization, card)
        self.model = model.to(self.device, memory_format=torch.channels_last).compute_in(compute_dtype)  # type: ignore[call-overload]
        self.averages = {rule.name: (rule, self._frozen_copy()) for rule in recipe.averages}
        networks.recompute(self.model.network, checkpoint_activations)
        # Online targets are the model itself; a copy of their own costs memory only where the rule moves.
        self.target = (
            self._frozen_copy(train=True) if recipe.objective.decay(1.0) or recipe.objective.decay(0.0) else self.model
        )
        self._others = [other for other in (teacher, init) if other is not None]
        for other in self._others:
            other.to(self.device, memory_format=torch.channels_last).compute_in(compute_dtype)  # type: ignore[call-overload]
        objective = recipe.objective.build(teacher, first=init, backbone=backbone)
        self.objective = objective.to(self.device)
        if min(self.objective.sizes(recipe.batch)) < processes.count:
            raise ConfigError(
                f"a batch of {recipe.batch} does not share out to {processes.count} processes",
                "use a larger --batch, or fewer processes",
            )
        self._compare([self.model, self.target, *(average for _, average in self.averages.values()), *self._others])
        calls = {id(one): one.network for one in (self.model, self.target, *self._others)}
        sharded = sharded and processes.many
        if sharded:
            inside = [part for part in self.objective.modules() if isinstance(part, FlowMap)]
            for one in [*self.networks, *inside]:
                distributed.shard(one.network, self.device)
        self.optimizer = self._new_optimizer()
        self._compiled = list(calls.values()) if compiled else []
        self.compiler_error: str | None = None
        for module in self._compiled:
            networks.compile_(module)
        if self.device.type == "cuda" and not compiled and not checkpoint_activations and not sharded:
            for module in calls.values():
                networks.record(module)
        self._parallel = distributed.Alone(self.model, self.target, self.objective)
        if sharded:
            self._parallel = distributed.Sharded(self.model, self.target, self.objective, processes)
        elif processes.many:
            self._parallel = distributed.Replicated(
                self.model, self.target, self.objective, find_unused=self._leaves_some()
            )

    # --- the loop ------------------------------------------------------------------------------------------------

    @property
    def images(self) -> int:
        """Training images seen so far."""
        return self.step * self.recipe.batch

    def run(self) -> Iterator[Report]:
        """Train to the recipe's last iteration, yielding after every step.

        Raises:
            DivergenceError: when a loss or a gradient is no longer finite; the weights are then not worth keeping.
        """
        self._feed = _Feed.of(self)
        try:
            yield from self._steps()
        finally:
            self._feed = None

    def _steps(self) -> Iterator[Report]:
        recipe = self.recipe
        self.model.train()
        while self.step < recipe.iterations:
            progress = self.step / recipe.iterations
            stage, done = self.objective.stage(progress)
            if self.step and stage != self.objective.stage((self.step - 1) / recipe.iterations)[0]:
                self._promote()
            lr = recipe.optimizer.rate(done, self.images + recipe.batch)
            for group in self.optimizer.param_groups:
                group["lr"] = lr
            loss = self._gradients(progress)
            grad_norm = self._clipped()
            self.step += 1
            self._health.note(self.step, {**loss.terms, "gradient": grad_norm})
            if self.step % _CHECK_EVERY == 0 or self.step == recipe.iterations:
                self._check()
            self.optimizer.step()
            self._follow(progress, self.images)
            if self.step % _COMPARE_EVERY == 0:
                self._compare([self.model, self.target, *(average for _, average in self.averages.values())])
            yield Report(
                self.step,
                self.images,
                self.step / recipe.iterations,
                loss.value,
                loss.per_sample,
                loss.t,
                grad_norm,
                lr,
            )

    def _gradients(self, progress: float) -> Loss:
        """The gradient of this step's loss, left at the weights; the loss itself, without a graph."""
        self.optimizer.zero_grad(set_to_none=True)
        try:
            return self._backward(progress)
        except Exception as error:
            # Seeds belong to the step, so what is done again comes out the same.
            if not self._compiled or not type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
                raise
            self._uncompile(error)
            self.optimizer.zero_grad(set_to_none=True)
            return self._backward(progress)

    def _backward(self, progress: float, count: int | None = None) -> Loss:
        """Add the gradient of the next batch to that at the weights; of only `count` images, it is not shared."""
        generator = torch.Generator(self.device).manual_seed(rng.derive(self.seed, 2, self.step))
        batch = self._batch(generator, count)
        drawn = self.objective.draw(self.model.path, batch, progress, generator)
        pieces = [piece for one in drawn for piece in one.pieces(self.micro_batch, self.processes)]
        done: list[tuple[Drawn, Loss]] = []
        for piece in pieces:
            with self._parallel.adding(last=count is None and piece is pieces[-1]):
                loss = self._parallel.loss(piece, progress)
                # What is summed over processes is then divided by their number.
                (self.processes.count * piece.weight * loss.value).backward()
            if piece.weight:  # not one that only keeps company
                done.append((piece, loss._replace(value=loss.value.detach())))
        if count is None:
            self._parallel.finish()
        return joined(done)

    def _leaves_some(self) -> bool:
        """Whether a pass leaves some of the weights without a gradient."""
        self.rehearse(self.rehearsal(self.processes.count))
        parts = len(self.recipe.objective.parts_of)
        left = distributed.unused(self._trained()) or (
            parts > 1 and any(p.requires_grad for p in self.objective.parameters())
        )
        self.optimizer.zero_grad(set_to_none=True)
        return left

    # --- rehearsal ---------------------------------------------------------------------------------------------------

    @property
    def networks(self) -> list[FlowMap]:
        """All models in memory: the one that is trained, its target and averages, and those that were given."""
        return [self.model, self.target, *(average for _, average in self.averages.values()), *self._others]

    def rehearsal(self, count: int) -> int:
        """As near to `count` as a batch can be in size: each of several objectives takes a sample a process."""
        count = max(count, len(self.recipe.objective.parts_of))
        while count < self.recipe.batch and min(self.objective.sizes(count)) < self.processes.count:
            count += 1
        return min(count, self.recipe.batch)

    def rehearse(self, count: int) -> None:
        """The gradient of so many images of the next batch, for its time and memory; a step begins without it."""
        self.model.train()
        self._backward(self.step / self.recipe.iterations, count)

    def rehearse_update(self) -> None:
        """What follows the gradient in a step. Moves the weights: for a trainer that is thrown away."""
        self._clipped()
        self.optimizer.step()
        self._follow(self.step / self.recipe.iterations, self.images + self.recipe.batch)

    # --- parts of a step ---------------------------------------------------------------------------------------------

    def _clipped(self) -> Tensor:
        """The norm of the gradient, which is then scaled down to the recipe's limit."""
        parameters = [parameter for parameter in self._trained() if parameter.grad is not None]
        limit = self.recipe.optimizer.clip_norm
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        norm = distributed.norm(gradients)
        if limit is not None:
            scale = (limit / (norm + 1e-6)).clamp(max=1.0)
            torch._foreach_mul_([distributed.local(gradient) for gradient in gradients], scale)
        return norm

    @property
    def compiled(self) -> bool:
        """Whether the networks are compiled; no longer so after a compiler has failed, see `compiler_error`."""
        return bool(self._compiled)

    def _uncompile(self, error: Exception) -> None:
        self.compiler_error = " ".join(str(error).split("\n\n")[0].split()) or type(error).__name__
        for module in self._compiled:
            module._compiled_call_impl = None
        self._compiled = []

    def _check(self, *, weights: bool = False) -> None:
        """Raise if anything so far was not finite.

        Args:
            weights: look at them, too: before they leave, so that none are saved that are not finite.
        """
        sick = self._health.first(self.processes)
        if sick is None and weights:
            fine = _finite(self.model.parameters())
            if self.processes.smallest(torch.tensor(int(fine))) == 0:
                sick = self.step, "weights"
        if sick is not None:
            step, term = sick
            seed, were = rng.derive(self.seed, 2, step - 1), "were" if term == "weights" else "was"
            raise DivergenceError(
                f"the training diverged: at step {step:,} the {term} {were} no longer finite (seed {self.seed}, that "
                f"of the batch {seed})",
                "try a lower learning rate, or float32",
            )

    def _compare(self, models: Iterable[FlowMap]) -> None:
        """Raise if the processes do not hold the same weights."""
        if not self.processes.many or distributed.is_sharded(next(self.model.parameters())):
            return
        if not same(self.processes, [distributed.checksum(one.network) for one in models]):
            raise TrainingError(
                f"at step {self.step:,} the processes no longer hold the same weights"
                if self.step
                else "the processes do not begin with the same weights",
                "run all of them on the same kind of machine, with the same versions and the same model files",
            )

    def _promote(self) -> None:
        """The end of a stage: the student becomes the teacher, and training begins anew from it."""
        self.objective.promote(self.model)
        self.optimizer = self._new_optimizer()
        for _, average in self.averages.values():
            blend(average, self.model, 0.0)

    def _trained(self) -> list[torch.nn.Parameter]:
        """What the optimizer moves: the network, and what an objective learns by itself."""
        return [p for module in (self.model, self.objective) for p in module.parameters() if p.requires_grad]

    def _new_optimizer(self) -> torch.optim.Optimizer:
        learned = [parameter for parameter in self.objective.parameters() if parameter.requires_grad]
        trained = [parameter for parameter in self._trained() if not any(parameter is one for one in learned)]
        return make_optimizer(self.recipe.optimizer, trained, learned)

    def _batch(self, generator: torch.Generator, count: int | None = None) -> Batch:
        """The next batch, or its first `count` images.

        Those that are other processes' are left black: chance takes no notice of them.
        """
        count = count or self.recipe.batch
        own = self._own(count)
        if self._feed is not None and count == self.recipe.batch:
            images, labels, *rest = self._feed.at(self.step)
        else:
            images, labels, *rest = self.data.batch(self.indices(self.step)[:count][own])
        assert images is not None
        images, labels = _among(images, own, count), _among(labels, own, count)
        eps = _among(rest[0], own, count) if rest else None
        assert images is not None
        if self.device.type == "cuda":  # page-locked memory is copied while the host goes on
            images = images.pin_memory()
        x0 = images.to(self.device, non_blocking=True).to(torch.float32, memory_format=torch.channels_last)
        if not images.is_floating_point():
            x0 = x0 / 127.5 - 1
        if self.recipe.flip:
            mirrored = torch.rand(len(x0), generator=generator, device=self.device) < 0.5
            x0 = torch.where(mirrored[:, None, None, None], x0.flip(-1), x0)
        augment = None
        if self.recipe.augment is not None:
            x0, augment = self.recipe.augment(x0, generator)
        conditional = labels is not None and self.recipe.network.num_classes > 0
        if eps is not None and (self.recipe.flip or augment is not None):
            raise ConfigError(
                "the data holds pairs of an image and its noise, and mirrored or augmented images have another noise",
                "add --set flip=false --set augment=none",
            )
        return Batch(
            x0,
            labels.to(self.device) if conditional and labels is not None else None,
            None if eps is None else eps.to(self.device, memory_format=torch.channels_last),
            augment,
        )

    def indices(self, step: int) -> Tensor:
        """The images of the batch of a step, over all processes; of endless data their positions."""
        first, count = step * self.recipe.batch, self.recipe.batch
        return torch.arange(first, first + count) if self.order is None else self.order.indices(first, count)

    def _own(self, count: int) -> Tensor | slice:
        """Which of a batch's images this process computes with."""
        if not self.processes.many:
            return slice(None)
        first, own = 0, []
        for size in self.objective.sizes(count):
            part = self.processes.share(size)
            own.append(torch.arange(first + part.start, first + part.stop))
            first += size
        return torch.cat(own)

    def _follow(self, progress: float, images: int) -> None:
        """Move the target and the averages after the weights."""
        if self.target is not self.model:
            blend(self.target, self.model, self.recipe.objective.decay(progress))
        for rule, average in self.averages.values():
            blend(average, self.model, rule.decay(images, self.recipe.batch))

    def _frozen_copy(self, train: bool = False) -> FlowMap:
        # The target keeps dropping units as the model does (under the shared mask); averages are for sampling.
        return copy.deepcopy(self.model).requires_grad_(False).train(train)

    # --- results and state -----------------------------------------------------------------------------------------

    @property
    def average(self) -> FlowMap:
        """The first average: what is exported and previewed. Its card says which average it is.

        A copy where the weights are spread over processes, which then all ask for it.

        Raises:
            DivergenceError: if the training has diverged.
        """
        self._check(weights=True)
        name, (_, model) = next(iter(self.averages.items()))
        model.card = replace(model.card, average=name, iterations=self.step)
        return self.whole(model)

    def whole(self, model: FlowMap) -> FlowMap:
        """One of the trainer's models with all of its weights here; see `average`."""
        return distributed.whole(model)

    def state_dict(self) -> dict[str, Any]:
        """Everything a continued run needs; tensors and plain values only.

        Raises:
            DivergenceError: if the training has diverged.
        """
        self._check(weights=True)
        return {
            "step": self.step,
            "seed": self.seed,
            "model": self.model.state_dict(),
            "target": None if self.target is self.model else self.target.state_dict(),
            "averages": {name: model.state_dict() for name, (_, model) in self.averages.items()},
            "objective": self.objective.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            **({} if self.order is not None else {"data": self.data.state_dict(self.images)}),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state_dict()`."""
        self._health, self._feed = Health(self.device), None
        self.step, self.seed = state["step"], state["seed"]
        if self.order is not None:
            self.order = Order(self.order.size, self.seed)
        else:
            self.data.load_state_dict(state["data"])
        self.model.load_state_dict(_spread(state["model"], self.model))
        if self.target is not self.model:
            self.target.load_state_dict(_spread(state["target"], self.target))
        for name, (_, model) in self.averages.items():
            model.load_state_dict(_spread(state["averages"][name], model))
        self.objective.load_state_dict(_spread(state["objective"], self.objective))
        numbers = {
            index: {name: _spread_as(value, self._trained()[index]) for name, value in entry.items()}
            for index, entry in state["optimizer"]["state"].items()
        }
        self.optimizer.load_state_dict({**state["optimizer"], "state": numbers})
        self._compare([self.model, self.target, *(average for _, average in self.averages.values())])

    def like(self, path: tuple[Any, ...], size: torch.Size, dtype: torch.dtype) -> Tensor:
        """An empty tensor for what `state_dict()` holds at a place, spread over the processes as it is."""
        part, *rest = path
        holders: dict[str, torch.nn.Module] = {"model": self.model, "target": self.target, "objective": self.objective}
        reference: Any = None
        if part == "optimizer":
            reference = self._trained()[rest[1]]
        elif part == "averages":
            reference = self.averages[rest[0]][1].state_dict().get(rest[1])
        elif part in holders:
            reference = holders[part].state_dict().get(rest[0])
        if isinstance(reference, Tensor) and reference.shape == size:
            return torch.empty_like(reference, dtype=dtype, requires_grad=False)
        return torch.empty(size, dtype=dtype)

    @property
    def sharded(self) -> bool:
        """Whether each process holds only a part of the weights."""
        return self._parallel.sharded


def _size(data: Any) -> int | None:
    """How many images there are; None for endless data."""
    return None if getattr(data, "endless", False) else len(data)


def _spread(state: Mapping[str, Any], module: torch.nn.Module) -> dict[str, Any]:
    """A module's state, spread over the processes as the module is."""
    own = module.state_dict()
    return {name: _spread_as(value, own[name]) if name in own else value for name, value in state.items()}


def _spread_as(value: Any, reference: Any) -> Any:
    if not isinstance(value, Tensor) or not isinstance(reference, Tensor) or value.shape != reference.shape:
        return value
    return distributed.like(value, reference)


def _among(values: Tensor | None, own: Tensor | slice, count: int) -> Tensor | None:
    """A batch of `count` with these values at their places, zero elsewhere."""
    if values is None or isinstance(own, slice):
        return values
    batch = values.new_zeros(count, *values.shape[1:])
    batch[own] = values
    return batch


class _Feed:
    """The batches of the steps to come, from a data set that makes them ready in time."""

    def __init__(self, trainer: Trainer, data: Stream) -> None:
        own, first, last = trainer._own(trainer.recipe.batch), trainer.step, trainer.recipe.iterations
        self._batches = iter(data.stream(trainer.indices(step)[own] for step in range(first, last)))
        self._next = first
        self._batch: tuple[Tensor | None, ...] = ()

    @classmethod
    def of(cls, trainer: Trainer) -> _Feed | None:
        """The feed of a trainer whose data can be streamed."""
        data: Any = trainer.data
        return cls(trainer, data) if hasattr(data, "stream") else None

    def at(self, step: int) -> tuple[Tensor | None, ...]:
        """The batch of a step: that of the last call, or the next."""
        if step == self._next:
            self._batch = next(self._batches)
            self._next += 1
        assert step == self._next - 1
        return self._batch


class Health:
    """Which number was the first to be no longer finite, kept on the device so that no step waits for it."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._first: dict[str, Tensor] = {}  # name -> the first bad step, a large number for none

    def note(self, step: int, values: Mapping[str, Tensor]) -> None:
        """Look at the numbers of a step."""
        for name, value in values.items():
            if name not in self._first:
                self._first[name] = torch.full((), _NEVER, dtype=torch.int64, device=self._device)
            self._first[name].clamp_(max=torch.where(value.isfinite(), _NEVER, step))

    def first(self, processes: Processes = ALONE) -> tuple[int, str] | None:
        """The first bad step and what was bad in it, in any of the processes; waits for the device."""
        if not self._first:
            return None
        names = list(self._first)  # in the order of the first step: the same in all processes
        steps = processes.smallest(torch.stack([self._first[name] for name in names])).tolist()
        step, name = min(zip(steps, names, strict=True), key=lambda one: one[0])
        return None if step == _NEVER else (step, name)


@torch.no_grad()
def _finite(tensors: Iterable[Tensor]) -> bool:
    """Whether all entries of all tensors are; waits for the device."""
    sums = [distributed.local(tensor.detach()).sum() for tensor in tensors]
    return bool(torch.stack(sums).isfinite().all())


def _filled(card: ModelCard, recipe: Recipe) -> ModelCard:
    """The card with what the recipe says of the result."""
    card = replace(card, role=recipe.role, preset=recipe.preset, iterations=recipe.iterations)
    points, rho = recipe.objective.grid or (card.grid_points, recipe.path.rho)
    card = replace(card, grid_points=points, grid_rho=rho, guidance=recipe.objective.guidance)
    if recipe.two_step is not None:
        card = replace(card, times={**card.times, "2": (recipe.path.t_max, recipe.two_step)})
    return card


def make_optimizer(config: Optimizer, *groups: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
    """torch's own optimizer for a config; each group of parameters is moved at once."""
    parameters = [parameter for group in groups for parameter in group]
    rules: dict[str, Any] = {
        "radam": torch.optim.RAdam,
        "adam": torch.optim.Adam,
        "adamw": torch.optim.AdamW,
    }
    options: dict[str, Any] = {"lr": config.lr, "betas": config.betas, "eps": config.eps}
    # One pass over memory where torch has a kernel for it.
    known = all(
        p.device.type in ("cpu", "cuda") and p.dtype == torch.float32 and not distributed.is_sharded(p)
        for p in parameters
    )
    way = {"fused": True} if config.rule != "radam" and known else {"foreach": True}
    optimizer: torch.optim.Optimizer = rules[config.rule](
        [{"params": group} for group in groups if group], **options, weight_decay=config.weight_decay, **way
    )
    return optimizer
