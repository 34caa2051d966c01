"""`cmtool bench`: how fast this machine trains and samples, beside a plain PyTorch implementation."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cmtool import __version__
from cmtool.benchmark import rows as known
from cmtool.cli import console, options
from cmtool.errors import UsageError

if TYPE_CHECKING:
    from cmtool.benchmark.measure import Ceiling, Result, Timing
    from cmtool.benchmark.shared import Setup

_QUICK = {"batch": 2, "rounds": 1}
_FULL = {"batch": 32, "rounds": 5}
_NAMES = {"fp32": "float32", "bf16": "bfloat16"}


def bench(
    rows: Annotated[
        str | None,
        typer.Option(
            "--rows",
            metavar="LIST",
            help=f"Some of {','.join(known.ROWS)}. [default: all]",
            **options.parsed(known.parse),
        ),
    ] = None,
    batch: Annotated[
        int | None, typer.Option("--batch", metavar="N", min=1, max=4096, help="Images at once. [default: 32]")
    ] = None,
    rounds: Annotated[
        int | None,
        typer.Option("--rounds", metavar="N", min=1, max=1000, help="Times each side is measured. [default: 5]"),
    ] = None,
    threads: Annotated[
        int | None, typer.Option("--threads", metavar="N", min=1, max=1024, help="Of a CPU. [default: torch's choice]")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="A few rows, once, in small batches: does it run?")] = False,
    peer: Annotated[
        bool, typer.Option("--peer/--no-peer", help="Measure the plain implementation, too; it needs diffusers.")
    ] = True,
    peer_precision: Annotated[
        str,
        typer.Option(
            "--peer-precision",
            help="What the plain implementation computes in; bf16 is torch.autocast.",
            **options.one_of("--peer-precision", ("fp32", "bf16")),
        ),
    ] = "fp32",
    profile: Annotated[
        bool, typer.Option("--profile", help="Tell where the time of each row goes, too; on a CPU.")
    ] = False,
    compile_: Annotated[
        bool, typer.Option("--compile/--no-compile", help="Let torch.compile work on cmtool's networks.")
    ] = False,
    device: options.Device = "auto",
    precision: options.Precision = "auto",
    as_json: options.Json = False,
) -> None:
    """Measure training steps and sampling on this machine.

    Beside each, in turn within one run, the same method in plain PyTorch around diffusers' UNet2DModel of the same
    weights, and what the machine reaches of torch's pure convolutions of the network's shapes: the ceiling, which
    float32 on a CPU may pass, by convolutions of fewer multiplications. Images a second are medians; the spread is
    that of all rounds. Measure on a machine that does nothing else.
    """
    if quick and rows is not None:
        raise UsageError("--quick and --rows do not go together", "give one of the two")
    wanted = (
        known.parse(rows) if rows else [known.ROWS[name] for name in known.QUICK] if quick else [*known.ROWS.values()]
    )
    usual = _QUICK if quick else _FULL
    rounds = rounds or usual["rounds"]

    from cmtool import precision as policy
    from cmtool.benchmark import measure
    from cmtool.benchmark.profile import shares
    from cmtool.benchmark.shared import Setup

    place = policy.device(device)
    policy.tune(place)
    if profile and place.type != "cpu":
        raise UsageError(f"--profile tells where a CPU's time goes, and this is {place}", "add --device cpu")
    dtype = policy.compute_dtype(precision, place)  # type: ignore[arg-type]
    setup = Setup(
        batch=batch or usual["batch"],
        device=str(place),
        dtype="float32" if dtype is None else "bfloat16",
        threads=threads or 0,
        compiled=compile_,
        peer_dtype=_NAMES[peer_precision],
    )
    if peer:
        measure.require_peer()
    machine, network = _machine(setup), _network(setup)
    console.note(_words(machine))
    console.note(
        f"{network['parameters']:,} parameters, {network['flops'] / 1e9:.2f} GFLOP an image and call, batches of "
        f"{setup.batch}, cmtool in {setup.dtype}"
        + (" and compiled" if setup.compiled else "")
        + (f", the peer in {setup.peer_dtype}" if peer else "")
    )
    difference = measure.check(setup) if peer else None
    kinds = sorted({row.trains for row in wanted})
    ceilings = {trains: measure.ceiling(setup, trains=trains) for trains in kinds}
    found: list[Result] = []
    profiles: dict[str, dict[str, float]] = {}
    with console.progress("bench", len(wanted)) as update:
        for row in wanted:
            update(len(found), row.title)
            found.append(measure.measure(row, setup, rounds, flops=network["flops"], peer_too=peer))
            if profile:
                profiles[row.name] = shares(row, setup)
        update(len(found))
    # Once more, for the better of two: the machine may have been busy.
    ceilings = {trains: first.or_better(measure.ceiling(setup, trains=trains)) for trains, first in ceilings.items()}
    found = [replace(result, ceiling=ceilings[result.row.trains].rate) for result in found]
    if as_json:
        console.emit_json(
            {
                "machine": machine,
                "network": network,
                "batch": setup.batch,
                "rounds": rounds,
                "dtype": setup.dtype,
                "compiled": setup.compiled,
                "peer_dtype": setup.peer_dtype if peer else None,
                "difference": difference,
                "ceilings": [_ceiling(ceiling) for ceiling in ceilings.values()],
                "rows": [{**_result(result), "profile": profiles.get(result.row.name)} for result in found],
            }
        )
        return
    for ceiling in ceilings.values():
        console.emit_rows(_ceiling_rows(ceiling))
        console.emit_line("")
    console.emit_rows([_HEADER, *map(_row, found)])
    if profiles:
        console.emit_line("")
        console.emit_rows(_profile_rows(profiles))


_HEADER = ("", "images/s", "peer", "ratio", "of ceiling", "memory", "peer's")


def _row(result: Result) -> tuple[str, ...]:
    peer, ratio = result.peer, result.ratio
    return (
        result.row.name,
        _rate(result.ours),
        _rate(peer) if peer else "-",
        f"{ratio:.2f}" if ratio else "-",
        f"{result.share:.0%}",
        _size(result.ours.memory),
        _size(peer.memory) if peer else "-",
    )


def _profile_rows(profiles: dict[str, dict[str, float]]) -> list[tuple[str, ...]]:
    kinds = next(iter(profiles.values()))
    rows = [(kind, *(f"{found[kind]:.0%}" for found in profiles.values())) for kind in kinds]
    return [("of the time", *profiles), *rows]


def _rate(timing: Timing) -> str:
    return f"{timing.rate:.3g} ±{timing.spread / 2:.0%}"


def _size(size: int | None) -> str:
    return "-" if size is None else console.size(size)


def _ceiling_rows(ceiling: Ceiling) -> list[tuple[str, str]]:
    rates = {**ceiling.convolutions, "matrix product": ceiling.matmul, "the convolutions together": ceiling.rate}
    title = f"ceiling, {ceiling.dtype}, forward" + (" and backward" if ceiling.trains else "")
    return [(title, "TFLOP/s"), *((f"  {name}", f"{rate / 1e12:.3g}") for name, rate in rates.items())]


def _ceiling(ceiling: Ceiling) -> dict[str, Any]:
    return {
        "dtype": ceiling.dtype,
        "trains": ceiling.trains,
        "convolutions": ceiling.convolutions,
        "matmul": ceiling.matmul,
        "flops": ceiling.rate,
    }


def _result(result: Result) -> dict[str, Any]:
    def side(timing: Timing | None) -> dict[str, Any] | None:
        if timing is None:
            return None
        return {
            "images_per_second": timing.rate,
            "spread": timing.spread,
            "seconds": list(timing.seconds),
            "memory": timing.memory,
        }

    return {
        "name": result.row.name,
        "title": result.row.title,
        "calls": result.row.calls.total,
        "passes": result.row.calls.passes,
        "cmtool": side(result.ours),
        "peer": side(result.peer),
        "ratio": result.ratio,
        "memory_ratio": result.memory_ratio,
        "share_of_ceiling": result.share,
    }


def _machine(setup: Setup) -> dict[str, Any]:
    """What is measured, and by which versions."""
    import torch

    from cmtool.io import machine

    versions = {"torch": torch.__version__, "cmtool": __version__}
    if torch.device(setup.device).type == "cuda":
        return {"name": torch.cuda.get_device_name(setup.device), **versions}
    cpu = machine.cpu()
    threads = setup.threads or torch.get_num_threads()
    return {"name": cpu.name, "cores": cpu.cores, "threads": threads, "flags": list(cpu.flags), **versions}


def _words(machine: dict[str, Any]) -> str:
    """The machine on a line."""
    words = [machine["name"]]
    if "cores" in machine:
        words += [f"{machine['cores']} cores, {machine['threads']} threads", " ".join(machine["flags"])]
    return ", ".join([*words, f"torch {machine['torch']}", f"cmtool {machine['cmtool']}"])


def _network(setup: Setup) -> dict[str, int]:
    """How large the network is."""
    from cmtool.benchmark import measure

    return {"parameters": measure.count_parameters(setup.config), "flops": measure.count_flops(setup.config)}
