"""The flags of every command, written down: a change of them is a change for users, and belongs in the CHANGELOG."""

from __future__ import annotations

from typer.main import get_command

from cmtool.cli.app import app

MAKE = "--batch --device --precision --json"
EDIT = f"--model --image --out --seeds --labels --times --steps --compare --truth --lpips-backbone {MAKE}"
TRAIN = f"""--out --data --preset --iterations --duration --lr --init --lpips-backbone --network --seed --resolution
    --crop --resize --upscale --no-upscale --channels --stream --workers --config --set --log-every --save-every
    --sample-every --judge-every --track --micro-batch --checkpoint-activations --shard --compile --no-compile
    --dry-run -n --resume --stop-after --keep --overwrite {MAKE}"""
FLAGS = {
    "": "--version --quiet -q --debug --install-completion --show-completion",
    "train": TRAIN,
    "evaluate": f"""--model --data --images --metrics --features --weights --steps --num -n --repeats --limit --labels
        --times --solver --guidance --teacher --lpips-backbone --out --role {MAKE}""",
    "report": "RUN... --out --png --json",
    "stats": "--data --out --features --weights --resolution --channels --limit --vectors --device --json",
    "search": f"""--model --data --steps --metric --features --weights --num -n --points --scan --write --limit --labels
        {MAKE}""",
    "distill": f"--teacher --guidance {TRAIN}",
    "pairs": f"--model --out --count -n --seeds --labels --solver --steps --guidance {MAKE}",
    "sample": f"""--model --out --grid --seeds --num -n --labels --steps --times --solver --churn --landing --guidance
        --clip --no-clip --role {MAKE}""",
    "inpaint": f"--mask --invert-mask --soft-mask {EDIT}",
    "colorize": f"--luma {EDIT}",
    "stroke": f"--model --image --out --seeds --labels --times --compare {MAKE}",
    "denoise": "--model --image --out --sigma --labels --device --precision --json",
    "studio": "--model --port --browser --no-browser --device --precision",
    "interpolate": "--model --out --seeds --image --frames --labels --steps --times --solver --loop --fps --scale "
    f"{MAKE}",
    "superres": f"--factor {EDIT}",
    "deblur": f"--kernel --floor {EDIT}",
    "info": "SOURCE --check --no-check --role --json",
    "convert": "SRC DST --to --role --resolution --set --overwrite --json",
    "doctor": "--device --json",
    "fetch": "NAME --json",
    "models": "",
    "models ls": "--json",
    "average": "RUN --name --sigma-rel --step --out --json",
    "presets": "",
    "presets ls": "--json",
    "presets show": "NAME --recipe --no-recipe --resolution --json",
    "bench": "--rows --batch --rounds --threads --quick --peer --no-peer --peer-precision --profile "
    "--compile --no-compile --device --precision --json",
    "data": "",
    "data inspect": "PATH --json",
    "data pack": "PATH FOLDER --resolution --crop --resize --upscale --channels --shard-images --stream --json",
    "data preview": "PATH --count -n --out --resolution --crop --resize --upscale --channels --scale --json",
}


def flags(command, path: str = "") -> dict[str, set[str]]:
    """Options, and arguments by their metavar, of a command and of those below it."""
    found = set()
    for parameter in command.params:
        if parameter.hidden:
            continue
        options = [*parameter.opts, *parameter.secondary_opts]
        found |= set(options) if options[0].startswith("-") else {parameter.metavar}
    tree = {path: found - {"--help", "-h"}}
    for name, below in getattr(command, "commands", {}).items():
        tree |= flags(below, f"{path} {name}".strip())
    return tree


def test_the_flags_are_these():
    assert flags(get_command(app)) == {path: set(text.split()) for path, text in FLAGS.items()}


def test_every_option_is_explained():
    def commands(command):
        yield command
        for below in getattr(command, "commands", {}).values():
            yield from commands(below)

    for command in commands(get_command(app)):
        assert command.help
        for parameter in command.params:
            assert parameter.help, (command.name, parameter.opts)
