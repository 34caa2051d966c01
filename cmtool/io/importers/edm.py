"""Networks of Karras et al. (2022), arXiv:2206.00364, as NVlabs' EDM code pickles them, and of what builds on it.

Read are snapshots of EDM (its four preconditionings around DDPM++, NCSN++ and ADM), of EDM2 and of ECT, Geng et al.
(2024), arXiv:2406.14548. Which network it is follows from the names and shapes of the tensors alone; what the pickle
says of its construction is held against that. Our DDPM++ has the names of the release, our ADM those of OpenAI's.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path, PurePath
from typing import Any

import torch
from torch import Tensor

from cmtool.errors import CheckpointError
from cmtool.flow.flow_map import ModelCard, Role
from cmtool.flow.parameterization import EDM, BoundaryEDM, CosineStep, Epsilon, LogRatio, Parameterization, VPTime
from cmtool.flow.path import VE
from cmtool.io import torchfile, unpickle
from cmtool.io.imported import Imported, other_role
from cmtool.io.importers import edm2
from cmtool.io.unpickle import Record
from cmtool.networks import ADMConfig, Config, DDPMppConfig
from cmtool.networks.configs import level_resolutions

LICENCE = "CC-BY-NC-SA-4.0"  # of NVlabs' weights and code, and so of what is derived from them
RANGE = (0.002, 80.0)  # the noise levels that EDM's samplers use of any network
NETWORKS_KEPT = ("ema", "net")  # where snapshots keep their network, the better one first
MAX_RECORDS = 10**5  # objects in a network; a released one has some thousand
MAX_DEPTH = 16
AGAIN = "get the file again"


@dataclass(frozen=True)
class Known:
    """What a pickle says of its network: its attributes, and the arguments it was constructed with."""

    values: Mapping[str, Any]

    def number(self, name: str, default: float) -> float:
        """A real number.

        Raises:
            ValueError: something else.
        """
        value = self.values.get(name, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or math.isnan(value):
            raise ValueError(f"{name} is no number")
        return float(value)

    def positive(self, name: str, default: float) -> float:
        """A number above 0 that is not infinite, else ValueError."""
        value = self.number(name, default)
        if not 0 < value < math.inf:
            raise ValueError(f"{name} is {value:g}")
        return value


@dataclass(frozen=True)
class Form:
    """How a network is read: its parameterization, the noise levels it knows, its role, remarks."""

    parameterization: Parameterization
    sigma_min: float
    sigma_max: float
    role: Role = "denoiser"
    times: tuple[float, ...] = ()  # recommended for two steps
    notes: tuple[str, ...] = ()


def _edm(known: Known) -> Form:
    return Form(EDM(known.positive("sigma_data", 0.5), LogRatio(0.25)), 0.0, math.inf)


def _vp(known: Known) -> Form:
    """Variance preserving: sigma(t) = sqrt(exp(beta_d t^2 / 2 + beta_min t) - 1), the network told (M - 1) t."""
    beta_d, beta_min = known.positive("beta_d", 19.9), known.positive("beta_min", 0.1)
    told = VPTime(beta_d, beta_min, known.positive("M", 1000) - 1)
    low, high = (
        math.sqrt(math.expm1(beta_d * t * t / 2 + beta_min * t)) for t in (known.positive("epsilon_t", 1e-5), 1.0)
    )
    return Form(Epsilon(time_input=told), low, high)


def _ve(known: Known) -> Form:
    return Form(Epsilon(sign=-1, unit_input=False, time_input=LogRatio(1.0, unit=2.0)), 0.02, 100.0)


def _iddpm(known: Known) -> Form:
    steps = known.positive("M", 1000)
    if not steps.is_integer() or not 2 <= steps <= 10**5:
        raise ValueError(f"there are {steps:g} steps")
    told = CosineStep(int(steps), known.positive("C_1", 0.001), known.positive("C_2", 0.008))
    levels = told.levels()
    return Form(Epsilon(time_input=told), float(levels[-2]), float(levels[0]))


def _ecm(known: Known) -> Form:
    return Form(
        BoundaryEDM(known.positive("sigma_data", 0.5), LogRatio(0.25)),
        0.003,
        math.inf,
        "consistency",
        (80.0, 0.821),
        (
            "trained with the scalings of EDM and used with those of a consistency function, as its own code does: "
            "f near t_min is not exactly the f that was trained",
        ),
    )


FORMS: dict[str, Callable[[Known], Form]] = {
    "EDMPrecond": _edm,
    "VPPrecond": _vp,
    "VEPrecond": _ve,
    "iDDPMPrecond": _iddpm,
    "ECMPrecond": _ecm,
    "Precond": _edm,
}


def read(path: Path, role: Role | None = None) -> Imported:
    """The model of a pickled snapshot.

    Raises:
        CheckpointError: a pickle that is damaged or asks for code to be run, none of these networks, weights that do
            not fit, another role.
    """
    file = str(path)
    content = unpickle.read(path)
    record = _network(content, file)
    state = flatten(record, file)
    torchfile.check_honest(state, path.stat().st_size, file)
    others = content.values() if isinstance(content, dict) else ()
    around = {other.name for other in others if isinstance(other, Record)}
    return _import(state, file, role, record.name, Known(_told(record)), around)


def read_state(
    state: dict[str, Tensor], file: str, role: Role | None = None, precondition: str | None = None
) -> Imported:
    """The model of a bare state dict with EDM's or EDM2's names.

    Args:
        state: with or without `model.` before the names.
        file: its name, for messages.
        role: what is needed.
        precondition: the class around the network, which the names tell only of EDM2 and iDDPM; None for a guess.
    Raises:
        CheckpointError: none of these networks, weights that do not fit, another role.
    """
    if edm2.MARK in state or edm2.PREFIX + edm2.MARK in state:
        return _import(state, file, role, "Precond", Known({}), set())
    if "u" in state:
        return _import(state, file, role, "iDDPMPrecond", Known({}), set())
    imported = _import(state, file, role, precondition or "EDMPrecond", Known({}), set())
    if precondition is None:
        note = "that it is scaled as EDMPrecond is a guess: the weights do not tell, the pickle they came in does"
        imported.card = replace(imported.card, notes=(*imported.card.notes, note))
    return imported


def _network(content: Any, file: str) -> Record:
    """The network of a snapshot."""
    found = content
    if isinstance(content, dict):
        found = next((content[key] for key in NETWORKS_KEPT if isinstance(content.get(key), Record)), None)
        if found is None:
            keys = ascii(", ".join(key for key in content if isinstance(key, str)))[1:-1][:80]
            raise CheckpointError(
                f"{file} is a pickle without a network of EDM's under {' or '.join(NETWORKS_KEPT)}; it holds {keys}",
                "name a network-snapshot-*.pkl",
            )
    if not isinstance(found, Record):
        raise CheckpointError(f"{file} is a pickle of something else than a network", "name a network-snapshot-*.pkl")
    if found.name not in FORMS:
        raise CheckpointError(
            f"{file} holds a network of the class {ascii(found.name)[1:-1][:60]}, which cmtool does not know",
            f"known are {', '.join(FORMS)}",
        )
    return found


def _told(record: Record) -> dict[str, Any]:
    arguments = record.state.get("_init_kwargs")
    attributes = {name: value for name, value in record.state.items() if isinstance(name, str) and name[:1] != "_"}
    told = {**(arguments if isinstance(arguments, dict) else {}), **attributes}
    return {name: value for name, value in told.items() if isinstance(name, str) and _plain(value)}


def _plain(value: Any) -> bool:
    """Whether a value is a number, a name, or a few of them: anything else may be endless to look at."""
    if isinstance(value, (list, tuple)):
        return len(value) <= 32 and all(isinstance(item, (int, float, str)) for item in value)
    return value is None or isinstance(value, (int, float, str))


def flatten(record: Record, file: str) -> dict[str, Tensor]:
    """The state dict of a module as its objects were pickled: parameters and persistent buffers, by dotted names.

    Raises:
        CheckpointError: objects that are no modules, or far too many.
    """
    state: dict[str, Tensor] = {}
    left = MAX_RECORDS

    def walk(module: Any, prefix: str, depth: int) -> None:
        nonlocal left
        left -= 1
        if left < 0 or depth > MAX_DEPTH or not isinstance(module, Record):
            raise ValueError("this is no module")
        left -= len(_part(module, "_parameters", dict)) + len(_part(module, "_buffers", dict))
        hidden = _part(module, "_non_persistent_buffers_set", set)
        for name, tensor in [*_part(module, "_parameters", dict).items(), *_part(module, "_buffers", dict).items()]:
            if tensor is None or name in hidden:
                continue
            if not isinstance(name, str) or not isinstance(tensor, Tensor):
                raise ValueError("this is no tensor")
            state[prefix + name] = tensor
        for name, child in _part(module, "_modules", dict).items():
            if child is not None:
                walk(child, f"{prefix}{name}.", depth + 1)

    try:
        walk(record, "", 0)
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{file} holds a network that is no module of torch's", AGAIN) from error
    return state


def _part(module: Record, name: str, kind: type) -> Any:
    part = module.state.get(name, kind())
    if not isinstance(part, kind):
        raise ValueError(f"{name} is something else")
    return part


def _import(
    state: dict[str, Tensor], file: str, role: Role | None, precondition: str, known: Known, around: set[str]
) -> Imported:
    """All that files of weights and pickles have in common.

    Args:
        around: the classes of what else the pickle holds: a loss, an encoder.
    """
    for name, tensor in state.items():
        if not tensor.is_floating_point():
            raise CheckpointError(f"{file}: {name} holds {tensor.dtype}, not real numbers", AGAIN)
    second = precondition == "Precond"
    config: Config
    try:
        form = FORMS[precondition](known)
        if second:
            headless = not any(name.startswith(edm2.LOSS_HEAD) for name in state)
            if "ECMLoss" in around or (headless and role == "consistency"):  # ECT keeps EDM2's class and form
                form = replace(form, role="consistency", times=(80.0, 1.526))
            config, state = edm2.convert(state, known.values)
        else:
            config, state = _from_names(state, file, precondition, form, known)
        low = max(RANGE[0], known.number("sigma_min", form.sigma_min))
        high = min(RANGE[1], known.number("sigma_max", form.sigma_max))
        path = VE(low, high)
        config = _trained(config, known)
    except (ValueError, ArithmeticError, TypeError, LookupError) as error:
        what = f"{error.args[0]} is missing" if isinstance(error, KeyError) else str(error)
        raise CheckpointError(f"{file} does not fit {precondition}: {what}", AGAIN) from error
    if role not in (None, form.role):
        raise other_role(file, form.role, role)
    _check_told(config, known, file)
    notes = list(form.notes)
    if config.in_channels == 4 or "StabilityVAEEncoder" in around:
        notes.append(
            "latents of an autoencoder, not pixels: cmtool has no decoder for what it samples "
            "(stabilityai/sd-vae-ft-mse, with the scale and bias of the pickle's encoder)"
        )
    family = "ECT" if form.role == "consistency" else "NVlabs EDM2" if second else "NVlabs EDM"
    card = ModelCard(
        role=form.role,
        resolution=config.resolution,
        channels=config.in_channels,
        num_classes=config.num_classes,
        grid_points=32 if second else 18 if config.resolution == 32 else 40,
        grid_rho=7.0,
        times={"2": form.times} if form.times else {},
        licence=LICENCE,
        source=f"{family}, {PurePath(file).name}, {precondition}",
        notes=tuple(notes),
    )
    return Imported(config, path, form.parameterization, card, state, "edm2" if second else "edm", file)


def _trained(config: Config, known: Known) -> Config:
    """With the dropout of training, which no tensor tells; 0 where nothing does."""
    label_dropout = known.number("label_dropout", 0.0) if config.num_classes else 0.0
    return replace(config, dropout=known.number("dropout", 0.0), label_dropout=label_dropout)


def _check_told(config: Config, known: Known, file: str) -> None:
    """Hold what the pickle says against what its tensors are."""
    found = {
        "img_resolution": config.resolution,
        "img_channels": config.in_channels,
        "label_dim": config.num_classes,
    }
    if isinstance(config, (DDPMppConfig, ADMConfig)):
        found["model_channels"] = config.channels
    for name, actual in found.items():
        said = known.values.get(name)
        if said is not None and (not isinstance(said, (int, float)) or said != actual):
            said = f"{said:g}" if isinstance(said, (int, float)) else "something else"
            raise CheckpointError(f"{file} says {name} is {said}, and the network's tensors say {actual}", AGAIN)


def _from_names(
    state: dict[str, Tensor], file: str, precondition: str, form: Form, known: Known
) -> tuple[Config, dict[str, Tensor]]:
    """The network and the weights under our names, of DDPM++, NCSN++ and ADM."""
    state = {name.removeprefix("model."): tensor for name, tensor in state.items()}
    for name in state:
        if re.search(r"_aux_(down|skip|up)\.", name) or name == edm2.MARK:
            raise ValueError(f"{name} belongs to a variant that no released model has")
    levels = state.pop("u", None)
    if levels is not None:
        told = form.parameterization.time_input if isinstance(form.parameterization, Epsilon) else None
        expected = told.levels() if isinstance(told, CosineStep) else torch.empty(0)
        # theirs were computed in float32, which is coarse for the smallest levels
        if levels.shape != expected.shape or not torch.allclose(levels.double(), expected, rtol=0.02):
            raise ValueError("its noise levels are not those of the cosine schedule")
    taps = take_filters(state)
    config = infer(state, taps)
    if precondition == "iDDPMPrecond":
        if config.out_channels != 2 * config.in_channels:
            raise ValueError(f"it has {config.out_channels} output channels for {config.in_channels} of input")
        config = replace(config, out_channels=config.in_channels)
        last = "out_conv" if isinstance(config, ADMConfig) else f"dec.{_name(config.resolution)}_aux_conv"
        for part in ("weight", "bias"):  # the second half tells of a variance, for which no sampler here asks
            state[f"{last}.{part}"] = state[f"{last}.{part}"][: config.out_channels]
    elif config.out_channels != config.in_channels:
        raise ValueError(f"it has {config.out_channels} output channels for {config.in_channels} of input")
    return config, openai_names(state, config) if isinstance(config, ADMConfig) else state


def take_filters(state: dict[str, Tensor]) -> tuple[int, ...]:
    """The taps of the resampling filter, whose copies are taken out of the state dict: they are constants here.

    Raises:
        ValueError: filters that differ, or are not the outer product of whole taps.
    """
    filters = [state.pop(name).float() for name in list(state) if name.endswith(".resample_filter")]
    if not filters:
        return (1, 1)  # of a network with a single level
    side = filters[0].shape[-1] if filters[0].ndim else 0
    if not 1 <= side <= 16 or any(found.numel() != side**2 for found in filters):
        raise ValueError("its resampling filters have no size that goes together")
    sums = filters[0].reshape(side, side).sum(1)
    taps = (sums / sums.min()).round() if bool(sums.min() > 0) else sums
    expected = torch.outer(taps, taps) / taps.sum() ** 2
    for found in filters:
        if found.shape[-2:] != expected.shape or not torch.allclose(found.reshape(side, side), expected, atol=1e-3):
            raise ValueError("its resampling filter is not one of whole taps, the same everywhere")
    return tuple(int(tap) for tap in taps.tolist())


def infer(state: Mapping[str, Tensor], taps: tuple[int, ...]) -> DDPMppConfig | ADMConfig:
    """The network that has tensors of these names (without `model.`) and shapes.

    Raises:
        KeyError, ValueError: the tensors of none.
    """

    def shape(name: str, dimensions: int = 4) -> tuple[int, ...]:
        found = tuple(state[name].shape)
        if len(found) != dimensions or 0 in found:
            raise ValueError(f"{name} has shape {found}")
        return found

    stems = [match for name in state if (match := re.fullmatch(r"enc\.(\d{1,5})x\1_conv\.weight", name))]
    if len(stems) != 1:
        raise ValueError("there is no single first convolution enc.*_conv.weight")
    resolution = int(stems[0][1])
    names = {match[1] for name in state if (match := re.match(r"enc\.(\d+x\d+)_", name))}
    reached = [_name(r) for r in level_resolutions(resolution, (1,) * len(names))]
    if names != set(reached):
        raise ValueError(f"the levels {', '.join(sorted(names)[:6])} do not halve the resolution {resolution}")
    stem, in_channels = shape(stems[0][0])[:2]
    emb_channels, noise_channels = shape("map_layer0.weight", 2)
    adm = "out_conv.weight" in state
    channels = noise_channels if adm else stem
    num_blocks = sum(f"enc.{reached[0]}_block{index}.conv1.weight" in state for index in range(len(state)))
    widths = [shape(f"enc.{name}_block0.conv1.weight")[0] for name in reached]
    attended = [level for level, name in enumerate(reached) if f"enc.{name}_block0.qkv.weight" in state]
    for what, width in [
        *(("a level", width) for width in widths),
        ("the embedding", emb_channels),
        ("the noise's features", noise_channels),
    ]:
        if width % channels:
            raise ValueError(f"{what} of {width} channels is no multiple of {channels}")
    num_classes = shape("map_label.weight", 2)[1] if "map_label.weight" in state else 0
    mult = tuple(width // channels for width in widths)
    attention = tuple(resolution >> level for level in attended)
    if not adm:
        return DDPMppConfig(
            resolution=resolution,
            in_channels=in_channels,
            out_channels=shape(f"dec.{reached[0]}_aux_conv.weight")[0],
            num_classes=num_classes,
            augment_dim=shape("map_augment.weight", 2)[1] if "map_augment.weight" in state else 0,
            channels=channels,
            channel_mult=mult,
            channel_mult_emb=emb_channels // channels,
            channel_mult_noise=noise_channels // channels,
            num_blocks=num_blocks,
            attention_resolutions=attention,
            embedding="fourier" if "map_noise.freqs" in state else "positional",
            encoder="residual" if any("_aux_residual." in name for name in state) else "standard",
            resample_filter=taps,
        )
    if "map_augment.weight" in state or emb_channels != 4 * channels or taps != (1, 1):
        raise ValueError("an ADM with augmentation labels, another embedding or another filter is not known")
    if f"dec.{reached[-1]}_in0.qkv.weight" in state:
        attended.append(len(widths) - 1)
    head_channels, num_heads = _heads({widths[level] for level in attended})
    return ADMConfig(
        resolution=resolution,
        in_channels=in_channels,
        out_channels=shape("out_conv.weight")[0],
        num_classes=num_classes,
        channels=channels,
        channel_mult=mult,
        num_blocks=num_blocks,
        attention_resolutions=attention,
        head_channels=head_channels,
        num_heads=num_heads,
        group_channels=4,
    )


def _heads(widths: set[int]) -> tuple[int, int]:
    """Channels of a head, or 0 and how many heads: theirs are width // 64 heads, and no attention without one."""
    if widths and all(width % 64 == 0 for width in widths):
        return 64, 1
    counts = {width // 64 for width in widths} or {1}
    if len(counts) > 1 or 0 in counts:
        raise ValueError("its attention layers do not split into heads of 64 channels")
    return 0, counts.pop()


def _name(resolution: int) -> str:
    return f"{resolution}x{resolution}"


# ADM under OpenAI's names.

RES_BLOCK = {
    "norm0": "in_layers.0",
    "conv0": "in_layers.2",
    "affine": "emb_layers.1",
    "norm1": "out_layers.0",
    "conv1": "out_layers.3",
    "skip": "skip_connection",
}
ATTENTION = {"norm2": "norm", "qkv": "qkv", "proj": "proj_out"}


def openai_names(state: dict[str, Tensor], config: ADMConfig) -> dict[str, Tensor]:
    """The release's ADM weights (names without `model.`) under the names and in the layouts of our ADM.

    A network too narrow for a single head has no attention; ours then gets one in the middle that adds zero.

    Args:
        state: is emptied; a name that is not known is kept, to be reported by whoever fits the weights.
    """
    out: dict[str, Tensor] = {}
    if "map_label.weight" in state:
        out["label_emb.weight"] = state.pop("map_label.weight").t()
    for theirs, ours in _modules(config):
        for part in ("weight", "bias"):
            if (tensor := state.pop(f"{theirs}.{part}", None)) is not None:
                out[f"{ours}.{part}"] = qkv_blocks(tensor) if theirs.endswith(".qkv") else tensor
    out |= state
    state.clear()
    if "middle_block.1.qkv.weight" not in out:
        width = config.channels * config.channel_mult[-1]
        for name, rows, rest in (
            ("norm", width, ()),
            ("qkv", 3 * width, (width, 1, 1)),
            ("proj_out", width, (width, 1, 1)),
        ):
            out[f"middle_block.1.{name}.weight"] = torch.zeros(rows, *rest)
            out[f"middle_block.1.{name}.bias"] = torch.zeros(rows)
    return out


def _modules(config: ADMConfig) -> Iterator[tuple[str, str]]:
    """Each module of the release's ADM that has weights, and its name in ours."""
    names = [_name(resolution) for resolution in level_resolutions(config.resolution, config.channel_mult)]
    yield from (("map_layer0", "time_embed.0"), ("map_layer1", "time_embed.2"))
    yield f"enc.{names[0]}_conv", "input_blocks.0.0"
    parts = ("down", *(f"block{index}" for index in range(config.num_blocks)))
    blocks = [f"{name}_{part}" for name in names for part in parts]
    for index, block in enumerate(blocks[1:], start=1):  # nothing comes down to the finest level
        yield from _block(f"enc.{block}", f"input_blocks.{index}.0", f"input_blocks.{index}.1")
    yield from _block(f"dec.{names[-1]}_in0", "middle_block.0", "middle_block.1")
    yield from _block(f"dec.{names[-1]}_in1", "middle_block.2")
    first = 0
    for level in reversed(range(len(names))):
        for index in range(config.num_blocks + 1):
            target = f"output_blocks.{first + index}"
            yield from _block(f"dec.{names[level]}_block{index}", f"{target}.0", f"{target}.1")
        if level:  # the next level begins with upsampling, which here is the end of this level's last block
            place = 2 if config.resolution >> level in config.attention_resolutions else 1
            yield from _block(f"dec.{names[level - 1]}_up", f"{target}.{place}")
        first += config.num_blocks + 1
    yield from (("out_norm", "out.0"), ("out_conv", "out.2"))


def _block(theirs: str, ours: str, attention: str = "") -> Iterator[tuple[str, str]]:
    yield from ((f"{theirs}.{old}", f"{ours}.{new}") for old, new in RES_BLOCK.items())
    if attention:
        yield from ((f"{theirs}.{old}", f"{attention}.{new}") for old, new in ATTENTION.items())


def qkv_blocks(rows: Tensor) -> Tensor:
    """Rows that alternate q, k, v for each channel, as all of q, then all of k, then all of v."""
    return rows.unflatten(0, (-1, 3)).transpose(0, 1).flatten(0, 1)
