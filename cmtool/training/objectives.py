"""Objectives: what a training step minimises.

`Denoising` regresses on the data at one time; `Consistency` compares the model at t with its target at a neighbour r on
the same trajectory; `Tangent` and `Continuous` are its limits r -> t, with the derivative in the network's output or in
the jump; `Mixture` gives each a share of the batch. Configs are frozen dataclasses; `build` makes the module that holds
what has weights.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, NamedTuple, get_args

import torch
from torch import Tensor, nn

from cmtool.errors import ConfigError
from cmtool.flow.flow_map import FlowMap, on_path
from cmtool.flow.path import Path, expand
from cmtool.networks.chance import seeded
from cmtool.processes import ALONE, Processes
from cmtool.times import (
    Adjacent,
    Dyadic,
    Halving,
    Landing,
    LogNormal,
    LogStudentT,
    Mapped,
    NextGrid,
    Pair,
    RhoUniform,
    Tangential,
    Times,
)
from cmtool.training import distances, tangents, weights
from cmtool.training.distances import L2, AnyDistance
from cmtool.training.tangents import AnyBalance, AnyLimit, Balance
from cmtool.training.targets import AdaptiveAverage, AnyTarget, Online, Truncated
from cmtool.training.trajectory import (
    AnyTrajectory,
    Batch,
    Data,
    PathSample,
    PredecessorTrajectory,
    Self,
    Teacher,
    Trajectory,
    told,
)
from cmtool.training.weights import AnyWeight


class Ingredients(NamedTuple):
    """What objectives are built from besides their config, where they need it; see `Composition.build`."""

    teacher: FlowMap | None
    first: FlowMap | None
    backbone: Mapping[str, Tensor] | None


class Loss(NamedTuple):
    """The mean over the batch, the losses of the samples [B], the times they were computed at [B], and named parts."""

    value: Tensor
    per_sample: Tensor
    t: Tensor
    terms: Mapping[str, Tensor]


class Drawn(NamedTuple):
    """A batch, or a piece of one, with all that chance has to say about it: the pieces add up to the whole exactly."""

    objective: Objective  # whose loss it is for
    weight: float  # of its mean loss in the sum
    batch: Batch  # with its noise
    times: Times
    seeds: Tensor  # int64 [B], of the units each sample's dropout takes
    name: str = ""

    def pieces(self, size: int | None, processes: Processes = ALONE) -> Iterator[Drawn]:
        """Neighbouring pieces of at most `size` samples, with their share of the weight; None is all at once.

        Args:
            processes: several share the samples, and this one's pieces are given. All get equally many, as they go
                through the network together: one that has a sample less may get one that counts nothing.
        """
        total = len(self.batch.x0)
        own = processes.share(total)
        first, last = own.start, own.stop
        most = -(-total // processes.count)
        number = -(-most // min(size or most, most))
        for index in range(number):
            begin, end = (first + (last - first) * i // number for i in (index, index + 1))
            part = slice(begin, end) if end > begin else slice(last - 1, last)
            batch = Batch(*(None if whole is None else whole[part] for whole in self.batch))  # type: ignore[arg-type]
            t, r, s = self.times
            start, landing = t[part], s[part]
            times = Times(start, landing if r is s else r[part], landing)
            weight = self.weight * (end - begin) / total
            yield self._replace(weight=weight, batch=batch, times=times, seeds=self.seeds[part])


def joined(parts: Sequence[tuple[Drawn, Loss]]) -> Loss:
    """The loss of several pieces together, each with its weight; that of a whole batch as it is."""
    if len(parts) == 1 and parts[0][0].weight == 1 and not parts[0][0].name:
        return parts[0][1]
    terms: dict[str, Tensor] = {}
    for drawn, loss in parts:
        for name, term in loss.terms.items():
            name += drawn.name
            terms[name] = terms[name] + term if name in terms else term  # what is not finite stays so
    return Loss(
        torch.stack([drawn.weight * loss.value for drawn, loss in parts]).sum(),
        torch.cat([loss.per_sample for _, loss in parts]),
        torch.cat([loss.t for _, loss in parts]),
        terms,
    )


class Objective(nn.Module):
    """One training objective: `draw` asks chance, `loss` computes; `forward` is both."""

    config: Any

    def draw(self, path: Path, batch: Batch, progress: float, generator: torch.Generator) -> tuple[Drawn, ...]:
        """Times, noise and dropout for a batch: one `Drawn`, or one for each of several objectives that share it.

        Args:
            path: of the model that is trained.
            batch: clean images with labels.
            progress: share of the training done, in [0, 1]; curricula are functions of it.
            generator: where it all comes from, on the device of the batch.
        """
        times = self.config.times(path, len(batch.x0), progress, generator)
        if batch.eps is None:
            batch = batch._replace(eps=_noise(batch.x0, generator))
        seeds = torch.randint(2**62, (len(batch.x0),), generator=generator, device=generator.device)
        return (Drawn(self, 1.0, batch, times, seeds),)

    def sizes(self, count: int) -> tuple[int, ...]:
        """How many samples of a batch of `count` each `Drawn` gets, in the order of the batch."""
        return (count,)

    def loss(self, model: FlowMap, target: FlowMap, drawn: Drawn, progress: float) -> Loss:
        """The loss of what was drawn, before its weight.

        Args:
            model: what is trained.
            target: the weights of the comparison; the model itself for online targets and for denoising.
            drawn: of `draw`, or a piece of it.
            progress: as it was there.
        """
        raise NotImplementedError

    def forward(
        self, model: FlowMap, target: FlowMap, batch: Batch, progress: float, generator: torch.Generator
    ) -> Loss:
        """The loss of a batch; arguments as `draw` and `loss`."""
        drawn = self.draw(model.path, batch, progress, generator)
        return joined([(one, one.objective.loss(model, target, one, progress)) for one in drawn])

    def stage(self, progress: float) -> tuple[int, float]:
        """The stage the training is in, and the share of it that is done; one stage unless students are promoted."""
        return 0, progress

    def promote(self, model: FlowMap) -> None:
        """A stage ends with this model."""


class Composition:
    """What all objective configs can say of themselves."""

    kind: ClassVar[str]

    def build(
        self,
        teacher: FlowMap | None = None,
        *,
        first: FlowMap | None = None,
        backbone: Mapping[str, Tensor] | None = None,
    ) -> Objective:
        """The module of this objective.

        Args:
            teacher: the model to follow. first: the model the training starts from. backbone: the trunk of LPIPS.
        Raises:
            ConfigError: without the teacher or the first stage that it needs.
        """
        return _module(self, Ingredients(teacher, first, backbone))

    @property
    def parts_of(self) -> tuple[Any, ...]:
        """The objectives this one is made of."""
        return (self,)

    @property
    def needs_teacher(self) -> bool:
        """Whether a teacher is followed."""
        return any(isinstance(part, Teacher) for one in self.parts_of for part in vars(one).values())

    @property
    def guidance(self) -> float:
        """The scale of guidance that is distilled."""
        teachers = (part for one in self.parts_of for part in vars(one).values() if isinstance(part, Teacher))
        return next((teacher.guidance for teacher in teachers), 1.0)

    @property
    def needs_first(self) -> bool:
        """Whether the model the training starts from goes on answering."""
        return any(isinstance(getattr(one, "target", None), Truncated) for one in self.parts_of)

    @property
    def distances(self) -> tuple[Any, ...]:
        """The distances used."""
        return tuple(one.distance for one in self.parts_of if hasattr(one, "distance"))

    @property
    def grid(self) -> tuple[int, float] | None:
        """Points and rho of the grid that the training ends on, if it is on one."""
        for one in self.parts_of:
            times = getattr(one.times, "start", one.times)
            if hasattr(times, "grid"):
                return times.curriculum(1.0) if hasattr(times, "curriculum") else 18, times.grid.rho
        return None

    def decay(self, progress: float) -> float:
        """The decay of the target average."""
        return max((_decay(one, progress) for one in self.parts_of), default=0.0)


def _decay(one: Any, progress: float) -> float:
    curriculum = getattr(one.times, "curriculum", None)
    decay: float = (
        one.target.decay(progress, curriculum(progress) if curriculum else 0) if hasattr(one, "target") else 0.0
    )
    return decay


# --- the configs -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Denoising(Composition):
    """weight * d(D(x_t, t), x0): denoising score matching. Karras et al. (2022), arXiv:2206.00364, eq. 2.

    With `VelocityError` as weight it is flow matching.

    Args:
        pairs: solve x0 from the noise by a teacher: ReFlow, Liu et al. (2022), arXiv:2209.03003, on the fly. None takes
            the data's x0, with its own noise where the data holds pairs.
    """

    kind: ClassVar[str] = "denoising"
    times: LogNormal | RhoUniform | LogStudentT = field(default_factory=LogNormal)
    distance: AnyDistance = field(default_factory=L2)
    weight: AnyWeight = field(default_factory=weights.Karras)
    balance: AnyBalance | None = None
    pairs: Teacher | None = None


@dataclass(frozen=True)
class Consistency(Composition):
    """weight * d(f(x_t, t), f-(x_r, r)): consistency distillation and training. Song et al. (2023), eq. 7 and 10.

    f jumps to the landing s. Where r = s the target is the neighbour itself (direct and progressive distillation).

    Args:
        compare_denoised: compare the clean images that the landings imply, instead of the landings.
    """

    kind: ClassVar[str] = "consistency"
    trajectory: AnyTrajectory = field(default_factory=Teacher)
    times: Adjacent | Mapped | Landing | NextGrid | Dyadic = field(default_factory=Adjacent)
    distance: AnyDistance = field(default_factory=L2)
    weight: AnyWeight = field(default_factory=weights.Uniform)
    target: AnyTarget = field(default_factory=Online)
    compare_denoised: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.target, AdaptiveAverage) and not hasattr(self.times, "curriculum"):
            raise ValueError("an adaptive average adapts to a grid, and these times are on none")


@dataclass(frozen=True)
class Tangent(Composition):
    """|F - sg(F - change)|^2: the network's output follows the derivative of its jump along the trajectory.

    g = d/dt jump(x_t, t, s) with dx_t/dt from the trajectory vanishes for the exact flow map. With the coefficients of
    jump = skip x_t + out F it is g = (skip v + out' F) + (skip' x_t + out dF/dt); `warmup` fades the second bracket in.
    TrigFlow's simplified consistency models, Lu and Song (2024), arXiv:2410.11081, eq. 8, take change = cos(t) g,
    limited; MeanFlow, Geng et al. (2025), arXiv:2505.13447, eq. 11, takes change = g / out', all of it.

    Args:
        scale: factor of g; None is 1 / |out'|, the step to the F that makes g vanish while dF/dt stays.
        limit: what keeps the change small; None is nothing.
        warmup: share of the training over which the second bracket grows from nothing.
        weight: of the squared change, before the balance.
        balance: how much each sample counts.
    """

    kind: ClassVar[str] = "tangent"
    trajectory: Data | Teacher = field(default_factory=Data)
    times: Tangential | Pair = field(default_factory=Tangential)
    scale: AnyWeight | None = None
    limit: AnyLimit | None = None
    warmup: float = 0.0
    weight: AnyWeight = field(default_factory=weights.Uniform)
    balance: AnyBalance | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.warmup <= 1:
            raise ValueError(f"the warm-up is a share of the training, 0 to 1, found {self.warmup}")


@dataclass(frozen=True)
class Continuous(Composition):
    """The limit of `Consistency` for neighbours that close in. Song et al. (2023), arXiv:2303.01469, appendix B.

    With L f = d/dt f(x_t, t) along the trajectory: theorems 3 and 4, weight * (L f)^T G (L f) / 2, which for squared l2
    is the mean of (L f)^2 and for l1 that of |L f|; with `stop_gradient` theorems 5 and 6, whose gradient is that of
    f^T G(f-) L f-. The value of the latter is no measure of progress (remarks 7 and 11).
    """

    kind: ClassVar[str] = "continuous"
    trajectory: Data | Teacher = field(default_factory=Teacher)
    times: Tangential = field(default_factory=lambda: Tangential(RhoUniform()))
    distance: AnyDistance = field(default_factory=L2)
    weight: AnyWeight = field(default_factory=weights.Uniform)
    stop_gradient: bool = True
    target: Online = field(default_factory=Online)

    def __post_init__(self) -> None:
        if not self.stop_gradient and isinstance(self.trajectory, Data):
            # The tangent of the data is that of the ODE only on average, and a square does not average.
            raise ValueError("without stop_gradient the trajectory must be a teacher's (theorem 6 needs stop_gradient)")


@dataclass(frozen=True)
class Part:
    """One objective of a mixture.

    Args:
        share: of the batch. weight: of its mean loss in the sum; None is its share, so that every sample counts alike.
    """

    objective: Denoising | Consistency | Tangent | Continuous
    share: float = 0.5
    weight: float | None = None

    def __post_init__(self) -> None:
        if not 0 < self.share < 1:
            raise ValueError(f"the share of a part lies between 0 and 1, found {self.share}")


@dataclass(frozen=True)
class Mixture(Composition):
    """A share of each batch to each objective, in order: flow matching with self-consistency, a truncated boundary."""

    kind: ClassVar[str] = "mixture"
    parts: tuple[Part, ...] = ()

    def __post_init__(self) -> None:
        if not self.parts or abs(sum(part.share for part in self.parts) - 1) > 1e-6:
            raise ValueError("the shares of a mixture's parts add up to 1")

    @property
    def parts_of(self) -> tuple[Any, ...]:
        return tuple(part.objective for part in self.parts)


# --- the modules -----------------------------------------------------------------------------------------------------


class DenoisingLoss(Objective):
    """`Denoising` at work."""

    def __init__(self, config: Denoising, given: Ingredients) -> None:
        super().__init__()
        self.config = config
        self.distance = distances.build(config.distance, given.backbone)
        self.balance = tangents.balance(config.balance)
        self.pairs = None if config.pairs is None else _trajectory(config.pairs, given)

    def loss(self, model: FlowMap, target: FlowMap, drawn: Drawn, progress: float) -> Loss:
        batch, times = drawn.batch, drawn.times
        if self.pairs is not None:
            batch = self._solved(model, batch)
        sample = noised(model.path, batch, times.t)
        with seeded(drawn.seeds):
            estimate = model.denoised(sample.x_t, sample.t, batch.labels, batch.augment)
        losses = self.config.weight(model.path, times) * self.distance(estimate, batch.x0)
        return _loss(self.config.kind, losses, sample.t, self.balance, model.path)

    def draw(self, path: Path, batch: Batch, progress: float, generator: torch.Generator) -> tuple[Drawn, ...]:
        # Noise that the data came with belongs to its images, not to those that the teacher is about to make.
        return super().draw(path, batch if self.pairs is None else batch._replace(eps=None), progress, generator)

    def _solved(self, model: FlowMap, batch: Batch) -> Batch:
        """The noise, and the image that the teacher's ODE makes of it."""
        assert self.pairs is not None
        assert batch.eps is not None
        path, eps = model.path, batch.eps
        t = eps.new_full((len(eps),), path.t_max, dtype=torch.float32)
        start = PathSample(path.sigma(t[0]) * eps, t, eps, eps, batch.labels, batch.augment)
        return batch._replace(x0=self.pairs.step(model, start, torch.full_like(t, path.t_min)), eps=eps)


class ConsistencyLoss(Objective):
    """`Consistency` at work."""

    def __init__(self, config: Consistency, given: Ingredients) -> None:
        super().__init__()
        self.config = config
        self.distance = distances.build(config.distance, given.backbone)
        self.trajectory = _trajectory(config.trajectory, given)
        self.first = _First(given.first) if isinstance(config.target, Truncated) else None

    def loss(self, model: FlowMap, target: FlowMap, drawn: Drawn, progress: float) -> Loss:
        batch, times = drawn.batch, drawn.times
        sample = noised(model.path, batch, times.t)
        with _without_gradient(target):
            with seeded(drawn.seeds):  # a teacher drops nothing: these are for a target that answers for itself
                x_r = self.trajectory.step(target, sample, times.r)
            with seeded(drawn.seeds):
                goal = self._goal(target, x_r, times, batch)
        goal = goal.clone()  # what inference made, a backward pass may not keep
        # The same seeds: both passes drop the same units.
        with seeded(drawn.seeds):
            estimate = model.jump(sample.x_t, sample.t, times.s, batch.labels, batch.augment)
        if self.config.compare_denoised:
            estimate, goal = (model.path.implied(sample.x_t, x, sample.t, times.s) for x in (estimate, goal))
        losses = self.config.weight(model.path, times) * self.distance(estimate, goal)
        return _loss(self.config.kind, losses, sample.t)

    def _goal(self, target: FlowMap, x_r: Tensor, times: Times, batch: Batch) -> Tensor:
        if times.r is times.s:
            return x_r  # jump(x, s, s) = x
        goal = target.jump(x_r, times.r, times.s, batch.labels, batch.augment)
        if self.first is not None:
            assert isinstance(self.config.target, Truncated)
            below = target.path.ratio(times.r) < self.config.target.at
            frozen = self.first.jump(target.path, x_r, times, batch)
            goal = torch.where(expand(below, goal), frozen, goal)
        return goal

    def stage(self, progress: float) -> tuple[int, float]:
        curriculum = getattr(self.config.times, "curriculum", None)
        promotes = isinstance(self.trajectory, PredecessorTrajectory) and isinstance(curriculum, Halving)
        return curriculum.stage(progress) if promotes else (0, progress)  # type: ignore[union-attr]

    def promote(self, model: FlowMap) -> None:
        if isinstance(self.trajectory, PredecessorTrajectory):
            self.trajectory.promote(model)


class _First:
    """The frozen first stage of a truncated model. Not a Module: it is a file of its own, given with --init."""

    def __init__(self, model: FlowMap | None) -> None:
        if model is None:
            raise ConfigError("a truncated model starts from its first stage, and there is none", "give it with --init")
        self.model = model.requires_grad_(False).eval()

    def jump(self, path: Path, x_r: Tensor, times: Times, batch: Batch) -> Tensor:
        return on_path(self.model, path).jump(x_r, times.r, times.s, batch.labels, told(self.model, batch.augment))


class TangentLoss(Objective):
    """`Tangent` at work."""

    def __init__(self, config: Tangent, given: Ingredients) -> None:
        super().__init__()
        self.config = config
        self.trajectory = _trajectory(config.trajectory, given)
        self.balance = tangents.balance(config.balance)

    def loss(self, model: FlowMap, target: FlowMap, drawn: Drawn, progress: float) -> Loss:
        batch, times = drawn.batch, drawn.times
        sample = noised(model.path, batch, times.t)
        with torch.no_grad():
            change = self._change(target, sample, times, progress, drawn.seeds)
        with seeded(drawn.seeds):
            raw = model.raw(sample.x_t, sample.t, times.s, batch.labels, batch.augment)
        losses = (raw - (raw + change).detach()).square().flatten(1).mean(1)
        return _loss(
            self.config.kind,
            self.config.weight(model.path, times) * losses,
            sample.t,
            self.balance,
            model.path,
        )

    def _change(self, target: FlowMap, sample: PathSample, times: Times, progress: float, seeds: Tensor) -> Tensor:
        """What is to be added to F."""

        def ask(x: Tensor, t: Tensor) -> Tensor:
            return target.raw(x, t, times.s, sample.labels, sample.augment)

        v = self.trajectory.velocity(target, sample)
        with seeded(seeds), tangents.full_precision(target):
            raw, d_raw = tangents.along(ask, sample.x_t, sample.t, v)
        now, slope = tangents.coefficients_along(target, sample.t, times.s)
        skip, out, d_skip, d_out = (expand(c, v) for c in (now.skip, now.out, slope.skip, slope.out))
        grown = min(progress / self.config.warmup, 1.0) if self.config.warmup else 1.0
        tangent = skip * v + d_out * raw + grown * (d_skip * sample.x_t + out * d_raw)
        scale = self.config.scale
        tangent = tangent / d_out.abs() if scale is None else expand(scale(target.path, times), v) * tangent
        limited = tangent if self.config.limit is None else self.config.limit(tangent)
        # g grows with F where out does with t: F has to go the other way.
        return -limited * d_out.sign()


class ContinuousLoss(Objective):
    """`Continuous` at work."""

    def __init__(self, config: Continuous, given: Ingredients) -> None:
        super().__init__()
        self.config = config
        self.trajectory = _trajectory(config.trajectory, given)
        self.distance = distances.build(config.distance, given.backbone)

    def loss(self, model: FlowMap, target: FlowMap, drawn: Drawn, progress: float) -> Loss:
        batch, times = drawn.batch, drawn.times
        sample, seeds = noised(model.path, batch, times.t), drawn.seeds
        with torch.no_grad():
            v = self.trajectory.velocity(model, sample)
        losses = (
            self._stopped(model, target, sample, times, v, seeds)
            if self.config.stop_gradient
            else (self.distance.metric(*self._along(model, sample, times, v, seeds)))
        )
        return _loss(self.config.kind, self.config.weight(model.path, times) * losses, sample.t)

    def _along(
        self, model: FlowMap, sample: PathSample, times: Times, v: Tensor, seeds: Tensor
    ) -> tuple[Tensor, Tensor]:
        """f and L f."""

        def ask(x: Tensor, t: Tensor) -> Tensor:
            return model.jump(x, t, times.s, sample.labels, sample.augment)

        with seeded(seeds), tangents.full_precision(model):
            return tangents.along(ask, sample.x_t, sample.t, v)

    def _stopped(
        self, model: FlowMap, target: FlowMap, sample: PathSample, times: Times, v: Tensor, seeds: Tensor
    ) -> Tensor:
        with torch.no_grad():
            f, slope = self._along(target, sample, times, v, seeds)
        with torch.enable_grad():
            slope = slope.requires_grad_()
            (pull,) = torch.autograd.grad(self.distance.metric(f, slope).sum(), slope)  # G L f
        with seeded(seeds):
            estimate = model.jump(sample.x_t, sample.t, times.s, sample.labels, sample.augment)
        return (estimate * pull).flatten(1).sum(1)


class MixtureLoss(Objective):
    """`Mixture` at work."""

    def __init__(self, config: Mixture, given: Ingredients) -> None:
        super().__init__()
        self.config = config
        self.parts = nn.ModuleList(_module(part.objective, given) for part in config.parts)

    def draw(self, path: Path, batch: Batch, progress: float, generator: torch.Generator) -> tuple[Drawn, ...]:
        drawn: list[Drawn] = []
        for index, (part, module, piece) in enumerate(
            zip(self.config.parts, self._modules_of(), self._split(batch), strict=True)
        ):
            factor = part.share if part.weight is None else part.weight
            for one in module.draw(path, piece, progress, generator):
                drawn.append(one._replace(weight=factor * one.weight, name=f" of part {index}{one.name}"))
        return tuple(drawn)

    def _split(self, batch: Batch) -> Iterator[Batch]:
        first = 0
        for size in self.sizes(len(batch.x0)):
            piece: list[Any] = [None if whole is None else whole[first : first + size] for whole in batch]
            yield Batch(*piece)
            first += size

    def sizes(self, count: int) -> tuple[int, ...]:
        """Neighbouring pieces of the batch, at least one sample each."""
        number, first, taken, sizes = len(self.config.parts), 0, 0.0, []
        if count < number:
            raise ConfigError(f"a batch of {count} does not share out to {number} objectives", "use a larger --batch")
        for index, part in enumerate(self.config.parts):
            taken += part.share
            left = number - index - 1
            last = count if not left else min(max(round(taken * count), first + 1), count - left)
            sizes.append(last - first)
            first = last
        return tuple(sizes)

    def stage(self, progress: float) -> tuple[int, float]:
        stages: list[tuple[int, float]] = [part.stage(progress) for part in self._modules_of()]
        return max(stages, key=lambda stage: stage[0])

    def promote(self, model: FlowMap) -> None:
        for part in self._modules_of():
            part.promote(model)

    def _modules_of(self) -> list[Any]:
        return list(self.parts)


def with_guidance(objective: Any, scale: float) -> Any:
    """The objective with all of its teachers guided by this scale.

    Raises:
        ConfigError: for an objective that follows no teacher.
    """
    if not objective.needs_teacher:
        raise ConfigError("guidance is of a teacher, and this objective follows none", "leave out the guidance")
    if isinstance(objective, Mixture):
        return replace(
            objective,
            parts=tuple(
                replace(part, objective=with_guidance(part.objective, scale)) if part.objective.needs_teacher else part
                for part in objective.parts
            ),
        )
    teachers = {name: part for name, part in vars(objective).items() if isinstance(part, Teacher)}
    return replace(objective, **{name: replace(part, guidance=scale) for name, part in teachers.items()})


def _without_gradient(model: FlowMap) -> torch.inference_mode | torch.no_grad:
    """Inference mode; not where the weights are spread over processes and come together for every pass.

    Those that come together in inference mode could have no gradient later.
    """
    return torch.no_grad() if hasattr(model.network, "reshard") else torch.inference_mode()


def noised(path: Path, batch: Batch, t: Tensor) -> PathSample:
    """The batch at times t [B]."""
    assert batch.eps is not None
    return PathSample(path.mix(batch.x0, batch.eps, t), t, batch.x0, batch.eps, batch.labels, batch.augment)


def _noise(like: Tensor, generator: torch.Generator) -> Tensor:
    return torch.empty_like(like).normal_(generator=generator)  # in the memory layout of the batch


def _trajectory(config: AnyTrajectory, given: Ingredients) -> Trajectory:
    if isinstance(config, Data | Self):
        return config
    if given.teacher is None:
        raise ConfigError("this objective follows a teacher, and there is none", "give one with --teacher")
    return config.bind(given.teacher)


def _loss(kind: str, losses: Tensor, t: Tensor, balance: Balance | None = None, path: Path | None = None) -> Loss:
    """The mean of the losses [B], balanced; what is reported of each sample is the loss itself."""
    balanced = losses if balance is None or path is None else balance(losses, path, t)
    value = balanced.mean()
    return Loss(value, losses.detach(), t, {f"{kind} loss": value.detach()})


_MODULES: dict[type, Any] = {
    Denoising: DenoisingLoss,
    Consistency: ConsistencyLoss,
    Tangent: TangentLoss,
    Continuous: ContinuousLoss,
    Mixture: MixtureLoss,
}


def _module(config: Any, given: Ingredients) -> Objective:
    made: Objective = _MODULES[type(config)](config, given)
    return made


AnyObjective = Denoising | Consistency | Tangent | Continuous | Mixture
OBJECTIVES: dict[str, type] = {config.kind: config for config in get_args(AnyObjective)}
