"""What `train` and `distill` do: resolve the recipe, load, step, log, save.

Precedence: defaults < preset < --config < flags. The resolved run is written to config.json before the first step.
"""

from __future__ import annotations

import dataclasses
import os
import signal
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sized
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from cmtool import __version__
from cmtool.cli import console, images, options, presets
from cmtool.errors import CheckpointError, ConfigError, DataError, DivergenceError, UsageError, UserError, nearest

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from cmtool.cli.logbook import Logbook
    from cmtool.cli.train import Request
    from cmtool.flow.flow_map import FlowMap, ModelCard, Role
    from cmtool.io.data import Dataset
    from cmtool.io.run import RunFolder
    from cmtool.io.stored import StoredDataset
    from cmtool.io.streamed import StreamedDataset
    from cmtool.networks import Config
    from cmtool.processes import Processes
    from cmtool.training.presets import Shape
    from cmtool.training.recipe import Recipe
    from cmtool.training.trainer import Trainer

    Data = Dataset | StoredDataset | StreamedDataset

STOPPED = 75  # stopped, and can be continued
INTERRUPTED = 130
_ECHO = 2.0  # seconds in which a second Ctrl-C may be the first one, passed on


def run(request: Request) -> None:
    """Train as asked, in a run folder."""
    for one, other in (("resume", "overwrite"), ("resume", "config"), ("iterations", "duration")):
        if getattr(request, one) and getattr(request, other):
            raise UsageError(f"--{one} and --{other} do not go together", "give one of the two")

    from cmtool import processes
    from cmtool.io.run import KEEP, RunFolder, read_config

    team = processes.join()
    folder = RunFolder(_folder(request), processes=team)
    # A job that is always started with --resume begins with nothing.
    resumed = request.resume is not None and team.told(folder.holds_something)
    if request.resume is not None and not resumed and request.data is None:
        raise UsageError(f"there is no run in {folder.path} to continue", "name its folder, or start one with --data")
    if not resumed and not request.dry_run:
        folder.check(overwrite=request.overwrite)
    images.check_folder("--out" if request.resume is None else "--resume", folder.path)
    if request.config is not None and not request.config.exists():
        raise CheckpointError(f"--config {request.config}: there is no such run or file", "name a run or a config.json")
    earlier = folder.config() if resumed else read_config(request.config) if request.config else {}
    settings = _settings(request, earlier)
    request = _recalled(request, earlier, resumed=resumed)
    folder.keep = request.keep or KEEP

    from cmtool import precision as policy
    from cmtool.cli.logbook import Logbook, Rhythm
    from cmtool.io.trackers import check_trackers, open_trackers
    from cmtool.training.presets import Shape

    # What can be wrong with the options is found before anything large is read.
    draft = _recipe(request, earlier, Shape(distils=request.distils), judge_network=False)
    _check_teacher(draft, settings["teacher"], request.distils)
    if draft.objective.needs_first and not settings["init"]:
        raise UsageError(
            f"{draft.preset} is a second stage here: a first one answers where the noise is low, and there is none",
            "add --init runs/first, a consistency model: of --preset ect or ict, for example",
        )
    tracked = options.parse_trackers(request.track) if request.track else ()
    check_trackers(tracked)
    backbone = _backbone(draft, request.lpips_backbone)
    device = policy.device(request.device)
    policy.tune(device)
    compute = policy.compute_dtype(request.precision, device)  # type: ignore[arg-type]
    teacher = _model(settings["teacher"], device, role="denoiser")
    first: Role | None = "consistency" if draft.objective.needs_first else None  # it answers where the noise is low
    init = _model(settings["init"], device, role=first, assume="denoiser")
    data = _data(settings, request)
    if teacher is not None:
        _check_data(data, teacher)
    recipe = _recipe(request, earlier, _shape(data, init or teacher, request.distils))
    _check_network(recipe, init or teacher)
    _check_images(recipe, data)
    _check_guidance(recipe, teacher)
    _check_pairs(recipe, data)
    _check_labels(data, recipe)
    config = _config(recipe, settings, data, _ways(request, compute))
    _check_together(config, team)
    if resumed:
        _check_unchanged(config, earlier, folder.path)
    card = _card(recipe, settings, data, teacher, init)
    micro = options.parse_micro_batch(request.micro_batch) if request.micro_batch else recipe.batch
    trainer = _trainer(
        recipe,
        data,
        card,
        teacher=teacher,
        init=init,
        backbone=backbone,
        seed=settings["seed"],
        device=device,
        compute_dtype=compute,
        micro_batch=micro,
        checkpoint_activations=request.checkpoint_activations,
        compiled=bool(request.compile_),
        processes=team,
        sharded=bool(request.shard),
    )
    if request.preset is None and not earlier:
        console.note(f"no --preset is named: {draft.preset}; for others see cmtool presets ls")
    with folder.writing() if not request.dry_run else nullcontext():
        damaged = _continue(trainer, folder) if resumed else ()
        if micro is None:
            trainer.micro_batch = _fitting(trainer)
        if request.dry_run:
            _describe(config, trainer, request.as_json)
            return
        if resumed:
            folder.put_aside(damaged)
            for file in damaged:
                console.note(f"{file} is damaged and put aside: continuing from step {trainer.step:,}")
            folder.rewind(trainer.step)
        else:
            if request.resume is not None:
                console.note(f"there is no run in {folder.path} yet: starting one")
            folder.prepare(config, overwrite=request.overwrite)
        _announce(trainer, data, teacher, "float32" if compute is None else "bfloat16")
        _announce_start(recipe, init or (teacher if recipe.init_from_teacher else None))
        rhythm = Rhythm(
            recipe.iterations,
            log=request.log_every,
            save=request.save_every,
            sample=request.sample_every,
            judge=request.judge_every,
        )
        opened = open_trackers(tracked, folder.path, config, trainer.step) if team.first else []
        book = Logbook(trainer, folder, rhythm, opened)
        try:
            _loop(trainer, folder, request, book)
        except DivergenceError as error:
            kept = folder.saved()
            raise DivergenceError(
                error.message
                + (f"; the checkpoint of step {kept:,} is intact" if kept else " and no checkpoint was made"),
                "start again with a lower --lr or --precision fp32, and --overwrite or another --out",
            ) from error
        except DataError as error:
            raise DataError(error.message, "; ".join(filter(None, (error.hint, _kept(trainer, folder))))) from error
        finally:
            book.close()


# Resolving what is asked for.


def _folder(request: Request) -> Path:
    """Where the run is, or will be."""
    if request.out is not None and request.resume is not None and request.out != request.resume:
        raise UsageError(
            f"--resume {request.resume} continues that run, and --out {request.out} is another folder",
            "leave out --out, or start anew with --config and --out",
        )
    found = request.resume or request.out
    if found is None:
        raise UsageError("missing option '--out'", "for example --out runs/first")
    return found


def _continue(trainer: Trainer, folder: RunFolder) -> tuple[Path, ...]:
    """Take the trainer to where the run was saved; the checkpoints that are too damaged for that."""
    state, damaged = folder.latest(trainer.like)
    if state is not None:
        trainer.load_state_dict(state)
    return damaged


# How a run goes about its work, and what such a value looks like: none changes the result by more than rounding.
_WAYS: dict[str, Callable[[Any], bool]] = {
    **dict.fromkeys(("log_every", "save_every", "keep"), lambda value: type(value) is int and value > 0),
    **dict.fromkeys(("sample_every", "judge_every", "workers"), lambda value: type(value) is int and value >= 0),
    **dict.fromkeys(("micro_batch", "track"), lambda value: isinstance(value, str)),
    **dict.fromkeys(("checkpoint_activations", "compile_", "shard"), lambda value: value is True),
    "precision": lambda value: value in ("fp32", "bf16"),
}


def _recalled(request: Request, earlier: Mapping[str, Any], *, resumed: bool) -> Request:
    """The request with the ways of the earlier run, where it asks for no others.

    A continued run computes in the type it began with, whatever machine it is on now; a new one in that of its machine.
    """
    stored = earlier.get("ways") or {}
    if not isinstance(stored, dict) or not all(name in _WAYS and _WAYS[name](stored[name]) for name in stored):
        raise UsageError("the config has a section of ways that is none", f"it may hold {', '.join(_WAYS)}")
    silent = [name for name in stored if not _asked(getattr(request, name))]
    return dataclasses.replace(request, **{name: stored[name] for name in silent if resumed or name != "precision"})


def _asked(value: object) -> bool:
    """Whether an option was given; 0 is a value."""
    return value is not None and value is not False and value != "auto"


def _ways(request: Request, compute: torch.dtype | None) -> dict[str, Any]:
    """What `_recalled` reads."""
    found = {name: getattr(request, name) for name in _WAYS} | {"precision": "fp32" if compute is None else "bf16"}
    return {name: value for name, value in found.items() if _asked(value) or (name == "micro_batch" and value)}


def _data(settings: Mapping[str, Any], request: Request) -> Data:
    """The images to learn from."""
    asked = dict(settings["data"])
    if not asked.pop("stream", False):
        from cmtool.io.data import open_data

        return open_data(**asked, workers=request.workers)
    if request.workers:
        raise UsageError(
            "--workers decode what stays where it is, and --stream keeps nothing", "leave one of the two out"
        )
    from cmtool.io.streamed import open_stream

    return open_stream(**asked, seed=settings["seed"])


def _settings(request: Request, earlier: Mapping[str, Any]) -> dict[str, Any]:
    """All that is no recipe: data, teacher, init, seed; from the flags, else from the earlier config."""
    asked = {"source": request.data} | {
        name: getattr(request, name) for name in ("resolution", "crop", "resize", "upscale", "channels")
    }
    asked["stream"] = request.stream or None
    stored = earlier.get("data") or {}
    if not isinstance(stored, dict) or not stored.keys() <= {*asked, "fingerprint"}:
        raise UsageError("the config has a data section that is none", f"it may hold {', '.join(asked)}")
    data = {name: stored.get(name) if value is None else value for name, value in asked.items()}
    if not data["source"]:
        raise UsageError("missing option '--data'", "for example --data digits, or a folder of images")
    return {
        "data": {name: value for name, value in data.items() if value is not None},
        "teacher": request.teacher or earlier.get("teacher"),
        "init": request.init or earlier.get("init"),
        "seed": request.seed if request.seed is not None else earlier.get("seed", 0),
    }


def _recipe(request: Request, earlier: Mapping[str, Any], shape: Shape, *, judge_network: bool = True) -> Recipe:
    """The preset for data of this shape, changed by the earlier config, then by --set, then by the named flags.

    Without `judge_network` its settings are left out: what is right for them depends on the true shape.
    """
    from cmtool import spec
    from cmtool.training.presets import DEFAULTS, PRESETS
    from cmtool.training.recipe import KINDS, Recipe

    stored = earlier.get("recipe") or {}
    known = stored.get("preset") if isinstance(stored, dict) else None
    name = request.preset or known
    if name is None and stored:
        raise UsageError("the config does not tell its preset", f"add --preset, one of {', '.join(PRESETS)}")
    if name is None:
        name = DEFAULTS["teacher" if request.distils else "init" if request.init else "nothing"]
    if known not in (None, name):
        raise UsageError(f"--preset {name} contradicts the config, a run of {known}", "leave one of the two out")
    if request.network is not None:
        shape = dataclasses.replace(shape, network=_network(request.network, shape))
    recipe = presets.resolve(name, shape)
    network: Any = recipe.network
    if stored:
        recipe = spec.from_dict(_merged(spec.to_dict(recipe), stored), Recipe, KINDS, "recipe")
    if request.network is not None:
        recipe = dataclasses.replace(recipe, network=network)
    for text in request.set_ or ():
        path, equals, value = text.partition("=")
        if not equals:
            raise UsageError(f"--set {text}: expected NAME=VALUE", f"see cmtool presets show {name}")
        path = path.strip()
        if path == "preset":
            raise UsageError(f"--set {text}: a preset is no setting", f"use --preset {value}")
        if path.startswith("network.") and not judge_network:
            continue
        recipe = spec.replace(recipe, path, value.strip(), KINDS)
    return _with_flags(_told_augmentation(recipe), request)


def _told_augmentation(recipe: Recipe) -> Recipe:
    """With a network that is told what was done to an image: else it would make augmented images, too."""
    network: Any = recipe.network
    if recipe.augment is None:
        return recipe
    if not hasattr(network, "augment_dim"):
        raise ConfigError(
            f"a network of the kind {network.kind} cannot be told how an image was augmented",
            "add --set augment=none, or choose a --network of the kind ddpmpp",
        )
    if network.augment_dim:
        return recipe
    return dataclasses.replace(recipe, network=dataclasses.replace(network, augment_dim=recipe.augment.dim))


def _guided(recipe: Recipe, scale: float) -> Any:
    """The recipe's objective with a teacher that is guided."""
    from cmtool.training.objectives import with_guidance

    if not 0 <= scale < float("inf"):
        raise UsageError(f"--guidance {scale:g}: a scale is 0 or more", "1 is no guidance; for example --guidance 2")
    return with_guidance(recipe.objective, scale)


def _network(size: str, shape: Shape) -> Config:
    """The network of a named size for these images; what its method needs of it, the preset adds."""
    from cmtool.networks import SIZES

    if size not in SIZES:
        raise UsageError(f"--network: there is no size {size!r}", nearest(size, SIZES))
    try:
        return SIZES[size](shape.resolution, shape.channels, shape.num_classes)
    except ValueError as error:
        raise UsageError(f"--network {size}: {error}", "choose another --resolution") from error


def _with_flags(recipe: Recipe, request: Request) -> Recipe:
    if request.network is not None and recipe.init_from_teacher:
        raise UsageError(
            f"the preset {recipe.preset} starts as a copy of its teacher, which has a network already",
            "leave out --network, or add --set init_from_teacher=false to start from nothing",
        )
    if request.guidance is not None:
        recipe = dataclasses.replace(recipe, objective=_guided(recipe, request.guidance))
    if request.batch is not None:
        recipe = dataclasses.replace(recipe, batch=request.batch)
    if request.iterations is not None:
        recipe = dataclasses.replace(recipe, iterations=options.parse_count(request.iterations, "--iterations"))
    if request.duration is not None:
        images = options.parse_count(request.duration, "--duration")
        recipe = dataclasses.replace(recipe, iterations=-(-images // recipe.batch))
    if request.lr is not None:
        if not 0 < request.lr < float("inf"):
            raise UsageError(f"--lr {request.lr:g}: a learning rate is positive", "for example --lr 4e-4")
        recipe = dataclasses.replace(recipe, optimizer=dataclasses.replace(recipe.optimizer, lr=request.lr))
    return recipe


def _merged(base: Any, over: Any) -> Any:
    """`base` with the fields of `over`, part by part; a component of another kind is replaced as a whole."""
    if (
        not isinstance(base, dict)
        or not isinstance(over, dict)
        or over.get("kind", base.get("kind")) != base.get("kind")
    ):
        return over
    return base | {name: _merged(base.get(name), value) for name, value in over.items()}


def _config(recipe: Recipe, settings: Mapping[str, Any], data: Data, ways: Mapping[str, Any]) -> dict[str, Any]:
    """The resolved run: what config.json holds."""
    from cmtool import spec

    report = data.report
    resolved = {"resolution": report.resolution, "crop": report.crop, "resize": report.resize}
    return {
        "version": __version__,
        "recipe": spec.to_dict(recipe),
        **settings,
        "data": settings["data"] | resolved | {"channels": report.channels, "fingerprint": data.fingerprint},
        "ways": dict(ways),
    }


def _shape(data: Data, start: FlowMap | None, distils: bool) -> Shape:
    """What data and starting weights fix of the recipe."""
    from cmtool.training.presets import Shape

    classes = len(data.class_names) if data.highest_label is not None else 0
    paired = data.report.pairs is not None
    shape = Shape(data.report.resolution, data.report.channels, classes, distils=distils, paired=paired)
    if start is None:
        return shape
    network: Any = start.network.config
    return dataclasses.replace(shape, network=network, path=start.path, parameterization=start.parameterization)


def _card(
    recipe: Recipe, settings: Mapping[str, Any], data: Data, teacher: FlowMap | None, init: FlowMap | None
) -> ModelCard:
    from cmtool.flow.flow_map import ModelCard
    from cmtool.io import origins

    classes = recipe.network.num_classes
    return ModelCard(
        role=recipe.role,
        resolution=data.report.resolution,
        channels=data.report.channels,
        num_classes=classes,
        class_names=data.class_names if classes == len(data.class_names) else (),
        teacher=origins.shown(settings["teacher"] or ""),
        data=f"{settings['data']['source']} ({_amount(data)}, {data.fingerprint})",
        licence=_licence(teacher, init, data),
    )


def _amount(data: Data) -> str:
    return f"{len(data)} images" if isinstance(data, Sized) else "streamed"


def _licence(teacher: FlowMap | None, init: FlowMap | None, data: Data) -> str:
    """What the weights inherit: the terms of the teacher, of the weights to start from and of the pairs."""
    parts = [model.card.licence for model in (teacher, init) if model is not None]
    parts += [data.report.pairs.licence] if data.report.pairs else []
    return "; ".join(dict.fromkeys(part for part in parts if part))


def _model(source: str | None, device: torch.device, **roles: Role | None) -> FlowMap | None:
    """The model to follow or to start from."""
    from cmtool.io.imported import assemble

    return None if source is None else assemble(images.read_model(source, **roles)).to(device)


# Refusing what does not fit together.


def _check_teacher(recipe: Recipe, teacher: str | None, distils: bool) -> None:
    follows = recipe.objective.needs_teacher or recipe.init_from_teacher
    if follows and not distils:
        raise UsageError(
            f"the preset {recipe.preset} follows a teacher, and train has none",
            f"use cmtool distill --teacher runs/teacher --preset {recipe.preset}",
        )
    if follows and teacher is None:
        raise UsageError(
            f"the preset {recipe.preset} follows a teacher, and there is none", "add --teacher runs/teacher"
        )
    if distils and not follows:
        raise UsageError(
            f"the preset {recipe.preset} follows no teacher and would ignore --teacher",
            f"use cmtool train --preset {recipe.preset}; --init starts from the weights of a model",
        )


def _check_network(recipe: Recipe, start: FlowMap | None) -> None:
    """A student that starts as a copy has its model's network; only what is no weight may differ."""
    if start is None or not recipe.init_from_teacher:
        return
    config: Any = start.network.config
    names = ("dropout", "label_dropout", "two_times", "augment_dim")
    free = {name: getattr(recipe.network, name) for name in names if hasattr(config, name)}
    if dataclasses.replace(config, **free) != recipe.network:
        raise UsageError(
            f"the preset {recipe.preset} starts as a copy of its teacher, and the recipe has another network",
            "leave out --set network..., or add --set init_from_teacher=false to start from nothing",
        )


def _check_images(recipe: Recipe, data: Data) -> None:
    side, channels, network = data.report.resolution, data.report.channels, recipe.network
    if (network.resolution, network.in_channels, network.out_channels) != (side, channels, channels):
        raise UsageError(
            f"the network takes {network.resolution}x{network.resolution} images with {network.in_channels} channels "
            f"and makes {network.out_channels}, the data has {side}x{side} with {channels}",
            f"leave out --set network..., or add --resolution {network.resolution} --channels {network.in_channels}",
        )


def _check_guidance(recipe: Recipe, teacher: FlowMap | None) -> None:
    from cmtool.flow.flow_map import guided

    if teacher is not None:
        guided(teacher, recipe.objective.guidance)


def _check_pairs(recipe: Recipe, data: Data) -> None:
    if data.report.pairs is None:
        return
    if recipe.flip or recipe.augment is not None:
        raise UsageError(
            "the data holds pairs of an image and its noise: a mirrored or augmented image has another noise",
            "add --set flip=false --set augment=none",
        )
    if getattr(recipe.objective, "pairs", None) is not None:
        raise UsageError(
            "the data holds pairs already, and the recipe solves its own", "add --set objective.pairs=none"
        )


def _check_data(data: Data, teacher: FlowMap) -> None:
    side, channels = data.report.resolution, data.report.channels
    card = teacher.card
    if (side, channels) != (card.resolution, card.channels):
        raise DataError(
            f"the teacher makes {card.resolution}x{card.resolution} images with {card.channels} channels, "
            f"the data has {side}x{side} with {channels}",
            f"add --resolution {card.resolution} --channels {card.channels}",
        )


def _check_labels(data: Data, recipe: Recipe) -> None:
    classes = recipe.network.num_classes
    if not classes:
        return
    highest = data.highest_label
    if highest is None:
        raise DataError(
            f"the network knows {classes} classes, and the data has no labels",
            "sort the images into a sub-folder a class"
            + ("" if recipe.init_from_teacher else ", or add --set network.num_classes=0"),
        )
    if highest >= classes:
        raise DataError(
            f"the network knows {classes} classes, the data has label {highest}",
            "use the data the network was made for",
        )


def _check_together(config: Mapping[str, Any], team: Processes) -> None:
    """Several processes do the same thing with the same data."""
    from cmtool.processes import same

    settings = dict(options.settings(config))
    numbers = [zlib.crc32(repr(settings[name]).encode()) for name in sorted(settings)]
    if not same(team, [len(numbers)]) or not same(team, numbers):
        raise UsageError(
            "the processes were started with different options, versions or data",
            "give all of them the same command line, and the same data at the same place",
        )


def _check_unchanged(config: Mapping[str, Any], stored: Mapping[str, Any], out: Path) -> None:
    """A continued run is the same run: what decides its result may not change."""
    new, old = (dict(options.settings({**part, "version": None, "ways": None})) for part in (config, stored))
    for name in sorted(new.keys() | old.keys()):
        if new.get(name) != old.get(name):
            longer = f"what follows the length would change: train on with --init {out} and another --out"
            raise UsageError(
                f"--resume: the run was started with {name} = {old.get(name)}, not {new.get(name)}",
                longer
                if name == "recipe.iterations"
                else "leave out what changes it, or start a new run with --config and another --out",
            )


def _fitting(trainer: Trainer) -> int | None:
    """The micro-batch of `--micro-batch auto`."""
    import torch

    from cmtool.generate import free_memory
    from cmtool.training.forecast import fitting_micro_batch

    free = free_memory(trainer.device)
    if free is None:
        raise UsageError(
            f"--micro-batch auto: nobody knows how much memory is free on {trainer.device}", "give a number instead"
        )
    if trainer.device.type != "cuda":
        free //= int(os.environ.get("LOCAL_WORLD_SIZE", trainer.processes.count))  # all take from the same
    batch = trainer.recipe.batch
    mine = torch.tensor(fitting_micro_batch(trainer, free) or batch)
    found = int(trainer.processes.smallest(mine))
    if found < batch:
        console.note(f"a batch of {batch} does not fit at once: micro-batches of {found}")
    return found if found < batch else None


def _describe(config: Mapping[str, Any], trainer: Trainer, as_json: bool) -> None:
    """What --dry-run prints: the settings, and what the run will take as a rehearsal tells."""
    from cmtool.training.forecast import forecast

    expected = forecast(trainer)
    if as_json:
        console.emit_json({**config, "forecast": expected._asdict()})
        return
    rest = {name: value for name, value in config.items() if name != "recipe"}
    parts = (expected.memory_bytes, expected.weights_bytes, expected.scratch_bytes, expected.bytes_per_image)
    whole, held, scratch, each = map(console.size, parts)
    console.emit_rows(
        [
            *options.settings(config["recipe"]),
            *options.settings(rest),
            ("parameters", f"{expected.parameters:,}"),
            (
                "memory",
                f"{whole}: {held} of weights, gradients and the optimizer, {scratch} of scratch, {each} an image in "
                f"micro-batches of {expected.micro_batch}",
            ),
            ("speed", f"{expected.images_per_second:.3g} images/s on {trainer.device}"),
            ("time", console.clock(expected.seconds)),
        ]
    )


# Running.


def _backbone(recipe: Recipe, file: Path | None) -> Mapping[str, Tensor] | None:
    """The trunk of LPIPS if the recipe needs it."""
    from cmtool.io.backbones import read_backbone
    from cmtool.training.distances import LPIPS, import_lpips

    wanted = [distance for distance in recipe.objective.distances if isinstance(distance, LPIPS)]
    if wanted:
        import_lpips()
        return read_backbone(wanted[0].net, file)
    if file is not None:
        raise UsageError(
            f"the preset {recipe.preset} does not compare by lpips and would ignore --lpips-backbone",
            "leave it out, or add --set objective.distance=lpips",
        )
    return None


def _trainer(recipe: Recipe, data: Data, card: ModelCard, **rest: Any) -> Trainer:
    from cmtool.training.trainer import Trainer

    try:
        return Trainer(recipe, data, card, **rest)
    except RuntimeError as error:
        if "loading state_dict" not in str(error):
            raise
        raise UsageError(
            "the weights to start from do not fit the network of the recipe", "leave out --set network..."
        ) from error


def _announce(trainer: Trainer, data: Data, teacher: FlowMap | None, dtype: str) -> None:
    """Say what is about to run."""
    recipe = trainer.recipe
    size = sum(parameter.numel() for parameter in trainer.model.parameters())
    console.note(f"data: {data.report.summary()}")
    console.note(
        f"{recipe.preset}: {size:,} parameters, {recipe.iterations:,} steps of {recipe.batch} images, "
        f"{dtype} on {_where(trainer)}" + (f", from step {trainer.step:,}" if trainer.step else "")
    )
    for note in teacher.card.notes if teacher is not None else ():
        console.note(f"teacher: {note}")
    if teacher is not None and teacher.card.licence:
        console.note(f"the teacher is under {teacher.card.licence}: its student may be, too")


def _where(trainer: Trainer) -> str:
    """The device, and how many processes share the work."""
    if not trainer.processes.many:
        return str(trainer.device)
    held = ", each with a part of the weights" if trainer.sharded else ""
    return f"{trainer.device.type} in {trainer.processes.count} processes{held}"


def _announce_start(recipe: Recipe, start: FlowMap | None) -> None:
    """Say where weights do not carry over: a network's output is no velocity, or the velocity of one path."""
    from cmtool.flow.parameterization import Epsilon, Sample, Velocity, VPrediction

    def meaning(path: Any, parameterization: Any) -> str:
        if isinstance(parameterization, Velocity):
            return f"the velocity of the {path.kind} path"
        other = {Epsilon: "the noise", VPrediction: "v", Sample: "the image"}
        return other.get(type(parameterization), "no velocity")

    if start is not None:
        before = meaning(start.path, start.parameterization)
        after = meaning(recipe.path, recipe.parameterization)
        if before != after:
            console.note(f"the network to start from predicts {before}, here it learns {after}: only a rough start")


def _loop(trainer: Trainer, folder: RunFolder, request: Request, book: Logbook) -> None:
    from cmtool.cli.logbook import Checkpoints

    total = trainer.recipe.iterations
    signalled = 0
    first, text = trainer.step, ""
    team = trainer.processes
    agreed, checkpoints = team.agreement(), Checkpoints(trainer, book.rhythm.save)
    with console.progress(trainer.recipe.preset, total, done=first) as update, _stop_signal(team.many) as stopped:
        for report in trainer.run():
            agreed.note(stopped())
            signalled = agreed.ask()
            ending = bool(report.step == total or signalled or report.step - first == request.stop_after)
            text = book.note(report, ending=ending) or text
            planned = ending or checkpoints.planned(report.step)
            if planned or checkpoints.overdue(report.step):
                folder.save(trainer, series=planned)
                checkpoints.made(report.step)
            update(report.step, text)
            if ending:
                break
    if trainer.compiler_error is not None:
        console.note(
            f"torch.compile failed on these networks, and they ran as they are: {trainer.compiler_error[:300]}"
        )
    dropped = sum(getattr(trainer.data, "dropped", {}).values())
    if dropped:
        console.note(f"{dropped:,} rows could not be read (first: {trainer.data.first_bad}); others took their places")
    if trainer.step == first:
        console.note(f"nothing left to do: the run has made its {total:,} steps")
    model = folder.path / "model.safetensors"
    if request.as_json:
        console.emit_json(
            {
                "run": str(folder.path),
                "model": str(model),
                "iterations": trainer.step,
                "images": trainer.images,
                "loss": book.loss,
                "finished": trainer.step == total,
            }
        )
    else:
        console.emit_line(model)
    if trainer.step < total:
        console.note(f"stopped at step {trainer.step:,} of {total:,}; --resume {folder.path} continues")
        raise typer.Exit(INTERRUPTED if signalled == signal.SIGINT else STOPPED)


def _kept(trainer: Trainer, folder: RunFolder) -> str:
    """What a hint goes on to say when images stop coming: the steps made so far are not lost by it."""
    if folder.saved() < trainer.step and not trainer.processes.many:  # others would have to help, and know nothing yet
        with suppress(UserError):  # what went wrong first is what is told
            folder.save(trainer)
    saved = folder.saved()
    return f"step {saved:,} is saved, and --resume {folder.path} goes on from there" if saved else ""


@contextmanager
def _stop_signal(many: bool = False) -> Iterator[Callable[[], int]]:
    """Turn the first Ctrl-C, SIGTERM or SIGUSR1 into a number to ask for (0: none), so that the step in work is saved.

    A second Ctrl-C interrupts at once; where there are `many` processes, not one that comes with the first: the
    terminal sends it, and torchrun does once more.
    """
    received, since = 0, 0.0

    def note(number: int, frame: object) -> None:
        nonlocal received, since
        now = time.monotonic()
        if received and number == signal.SIGINT and not (many and now - since < _ECHO):
            raise KeyboardInterrupt
        received, since = received or number, since or now

    names = [name for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name)]
    before = {}
    with suppress(ValueError):  # outside the main thread there are no handlers to set
        before = {name: signal.signal(getattr(signal, name), note) for name in names}
    try:
        yield lambda: received
    finally:
        for name, handler in before.items():
            signal.signal(getattr(signal, name), handler)
