"""The methods on CIFAR-10: one teacher, one network, equal budgets, two seeds.

    python examples/study_cifar10/study.py --data TRAIN_FOLDER --test TEST_FOLDER --out study
    python examples/study_cifar10/study.py --out study --table      only the tables, from what is there
    python examples/study_cifar10/study.py --out study --store examples/study_cifar10/kept      keep what they need

Every row is a run folder of `cmtool train` or `distill`, with its `config.json` and `metrics.jsonl`, and what `cmtool
evaluate` said of it (`quality.json`, `ode.json`): samples in 1, 2 and 4 network calls against the test images, in the
features of a classifier that `examples/cifar_judge.py` trains on the training images. These distances are called
fd_judge; they are no FID. What is there is not run again, and what was stopped goes on. With --short a few steps of
each.
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
import shutil
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from cmtool.io.data import open_data
from cmtool.reporting.plot import Axis, Series, plot

HERE = Path(__file__).parent
CALLS = (1, 2, 4)


@dataclass(frozen=True)
class Row:
    """A method: its preset, and the row that it follows or starts from."""

    name: str
    preset: str
    teacher: str | None = None
    init: str | None = None
    solver: str | None = None  # how it is sampled, where it is not by its own jumps
    calls: tuple[int, ...] = CALLS
    settings: tuple[str, ...] = ()
    published: str = ""  # FID of CIFAR-10 at 32x32 in 1 and 2 calls, and who says so

    @property
    def kind(self) -> str:
        """What it learns from."""
        if self.preset == "edm":
            return "the teacher"
        return "distilled from it" if self.teacher else "started from it" if self.init else "from scratch"


KINDS = {
    "the teacher": "#000000",
    "from scratch": "#0072b2",
    "started from it": "#009e73",
    "distilled from it": "#d55e00",
}
TEACHERS = (Row("edm", "edm", solver="heun", calls=(18,), published="1.79, 35 calls (Karras et al. 2022)"),)
ROWS = (
    Row("ct", "ct", published="8.70, 5.83 (Song et al. 2023)"),
    Row("ict", "ict", published="2.83, 2.46 (Song and Dhariwal 2023)"),
    Row("ect", "ect", init="edm", published="3.60, 2.11 (Geng et al. 2024)"),
    Row("tcm", "tcm", init="ect", published="2.46 (Lee et al. 2024)"),
    Row("sct", "sct", init="edm", published="2.85, 2.06 (Lu and Song 2024)"),
    Row("ct-continuous", "ct-continuous", init="edm"),
    Row("flow-ct", "flow-ct"),
    Row("meanflow", "meanflow", published="2.92 (Geng et al. 2025)"),
    Row("shortcut", "shortcut"),
    Row("cd", "cd", teacher="edm", published="3.55, 2.93 (Song et al. 2023)"),
    Row("cd-continuous", "cd-continuous", teacher="edm"),
    Row("scd", "scd", teacher="edm", published="3.66, 2.52 (Lu and Song 2024)"),
    Row("direct", "direct", teacher="edm"),
    Row("pd", "pd", teacher="edm", calls=(1,), published="8.34 (Song et al. 2023)"),
    Row("flow-cd", "flow-cd", teacher="edm"),
    Row("reflow", "reflow", teacher="edm", solver="euler"),
)


class Study:
    """The runs of a folder."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.out = options, Path(options.out)
        self.seeds = [int(seed) for seed in options.seeds.split(",")]
        self.judge = self.out / "judge.pt2"

    def folder(self, row: Row, seed: int) -> Path:
        """A teacher has one seed: all rows share it."""
        return self.out / (row.name if row in TEACHERS else f"{row.name}-{seed}")

    def parent(self, name: str, seed: int) -> Path:
        return self.folder(next(row for row in (*TEACHERS, *ROWS) if row.name == name), seed)

    def images(self, split: str) -> Path:
        """The images of --data or --test at the resolution: one file opens faster than 50,000."""
        file = self.out / f"{split}.npz"
        if not file.exists():
            known = open_data(getattr(self.options, split), resolution=self.options.resolution)
            np.savez(file, arr_0=known.images.permute(0, 2, 3, 1).numpy(), arr_1=known.labels.numpy())
        return file

    def cmtool(self, *arguments: object) -> None:
        print("cmtool", *arguments, flush=True)
        subprocess.run([sys.executable, "-m", "cmtool", *map(str, arguments)], check=True)

    def run(self) -> None:
        """Everything that is not there yet."""
        names = [row.name for row in (*TEACHERS, *ROWS)]
        wanted = needed(self.options.only.split(",")) if self.options.only else names
        self.out.mkdir(parents=True, exist_ok=True)
        if not self.judge.exists():
            script = HERE.parent / "cifar_judge.py"
            ask = ("--data", self.images("data"), "--resolution", str(self.options.resolution), "--out", self.judge)
            short = ("--epochs", "1", "--limit", "512") if self.options.short else ("--test", self.images("test"))
            subprocess.run([sys.executable, script, *ask, *short], check=True)
        for row in TEACHERS:
            if row.name in wanted:
                self.row(row, 0)
        for seed in self.seeds:
            for row in ROWS:
                if row.name in wanted:
                    self.row(row, seed)

    def row(self, row: Row, seed: int) -> None:
        """Train and judge one."""
        options, folder = self.options, self.folder(row, seed)
        if not self._finished(folder):
            images = options.teacher_images if row in TEACHERS else options.images
            length = ("--iterations", 2, "--batch", 4) if options.short else ("--duration", images)
            start = ("--teacher", self.parent(row.teacher, seed)) if row.teacher else ()
            start += ("--init", self.parent(row.init, seed)) if row.init else ()
            settings = [word for one in row.settings for word in ("--set", one)]
            network = () if row.teacher or row.init else ("--network", *shlex.split(options.network))
            length += ("--batch", options.batch) if options.batch and not options.short else ()
            command = "distill" if row.teacher else "train"
            ask = ("--data", self.images("data"), "--preset", row.preset, "--seed", seed, "--resume", folder)
            self.cmtool(command, *ask, *start, *length, *network, *settings)
        if not (folder / "quality.json").exists():
            solver = ("--solver", row.solver) if row.solver else ()
            steps = ",".join(map(str, row.calls))
            count = 8 if options.short else options.count
            against = ("--data", self.images("test"), "--features", self.judge, "-n", count)
            less = ("--limit", 64, "--metrics", "fd") if options.short else ()
            self.cmtool(
                *("evaluate", "--model", folder, *against, "--steps", steps, *solver, *less),
                *("--out", folder / "quality.json"),
            )
        if row.teacher and not row.solver and not (folder / "ode.json").exists():
            teacher = self.parent("edm", seed)
            self.cmtool(
                *("evaluate", "--model", folder, "--teacher", teacher, "--metrics", "ode-error"),
                *("-n", 4 if options.short else 256, "--out", folder / "ode.json"),
            )

    def store(self, where: Path) -> None:
        """Copy what the tables need of each finished row, told from the study's folder on, and make them there."""
        here = str(self.out.resolve()) + "/"
        for row in (*TEACHERS, *ROWS):
            for folder in (self.folder(row, seed) for seed in self._seeds(row)):
                if (folder / "quality.json").exists():
                    (where / folder.name).mkdir(parents=True, exist_ok=True)
                    for name in ("config.json", "metrics.jsonl", "quality.json", "ode.json"):
                        if (folder / name).exists():
                            text = (folder / name).read_text().replace(here, "")
                            (where / folder.name / name).write_text(text)
                    if (folder / "strip.png").exists():
                        shutil.copy(folder / "strip.png", where / folder.name)

    def _finished(self, folder: Path) -> bool:
        try:
            length = json.loads((folder / "config.json").read_text())["recipe"]["iterations"]
            return last_line(folder)["step"] >= length
        except (OSError, ValueError, KeyError, IndexError):
            return False

    # --- tables ------------------------------------------------------------------------------------------------------

    def table(self) -> None:
        """table.md, quality.png and samples.png, from the folders alone."""
        found = {row: [self._read(self.folder(row, seed)) for seed in self._seeds(row)] for row in (*TEACHERS, *ROWS)}
        found = {row: [one for one in many if one] for row, many in found.items()}
        found = {row: many for row, many in found.items() if many}
        if not found:
            raise SystemExit(f"{self.out} holds no finished rows")
        heads = ["method", "from", "fd_judge, 1 call", "2 calls", "4 calls", "precision, recall (fewest calls)"]
        heads += ["ODE error", "images seen", "minutes", "s / 1,000 images", "published FID, 32x32"]
        lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
        lines += [self._line(row, many) for row, many in found.items()]
        (self.out / "table.md").write_text("\n".join(lines) + "\n")
        print("\n".join(lines))
        self._plot(found)
        self._samples(list(found))

    def _seeds(self, row: Row) -> Sequence[int]:
        """Those that are there."""
        if row in TEACHERS:
            return [0]
        names = (re.fullmatch(rf"{row.name}-(\d+)", folder.name) for folder in self.out.glob(f"{row.name}-*"))
        return sorted(int(name[1]) for name in names if name)

    def _read(self, folder: Path) -> dict | None:
        if not (folder / "quality.json").exists():
            return None
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        speed = [line["images_per_second"] for line in lines if line.get("images_per_second")]
        quality = json.loads((folder / "quality.json").read_text())
        by_calls = {row["nfe"]: row for row in quality["results"]}
        ode = folder / "ode.json"
        return {
            "images": lines[-1]["images"],
            "minutes": lines[-1]["images"] / sorted(speed)[len(speed) // 2] / 60 if speed else 0.0,
            "calls": by_calls,
            "count": quality["samples"]["count"],
            "ode": json.loads(ode.read_text())["results"][0]["metrics"] if ode.exists() else {},
        }

    def _line(self, row: Row, many: list[dict]) -> str:
        def over(values: list[float], form: str) -> str:
            """Of two seeds both, of more the mean and the standard deviation."""
            if len(values) < 3:
                return " to ".join(format(value, form) for value in sorted(values))
            return f"{statistics.fmean(values):{form}} ± {statistics.stdev(values):{form}} ({len(values)})"

        fewest = min(min(one["calls"]) for one in many)
        teacher = row in TEACHERS
        fds = [over([metric(one["calls"][n], "fd") for one in many if n in one["calls"]], ".3f") for n in CALLS]
        if teacher:
            fds[0] = over([metric(one["calls"][fewest], "fd") for one in many], ".3f") + f" ({fewest} calls)"
        pr = [over([metric(one["calls"][fewest], name) for one in many], ".2f") for name in ("precision", "recall")]
        odes = [value for one in many for name, value in one["ode"].items() if name.startswith("ode_error")]
        first = many[0]  # times are of the first seed: others may have run beside other work
        seconds = 1000 * first["calls"][fewest]["seconds"] / first["count"]
        cells = [
            *(
                f"`{row.name}`",
                row.teacher or (f"{row.init}'s weights" if row.init else "scratch"),
                *fds,
                ", ".join(pr),
            ),
            *(over(odes, ".4f"), f"{first['images']:,}", f"{first['minutes']:.1f}", f"{seconds:.1f}", row.published),
        ]
        return "| " + " | ".join(cells) + " |"

    def _plot(self, found: dict[Row, list[dict]]) -> None:
        """Distances (means over the seeds) against calls and seconds; what a method starts from is its colour."""
        for axis in ("network calls", "seconds a 1,000 images"):
            series, seen = [], set()
            for row, many in found.items():
                points = []
                for calls in sorted(many[0]["calls"]):
                    rows = [one["calls"][calls] for one in many if calls in one["calls"]]
                    across = calls if axis == "network calls" else 1000 * rows[0]["seconds"] / many[0]["count"]
                    points.append((across, sum(metric(one, "fd") for one in rows) / len(rows)))
                kind = row.kind
                name = "" if kind in seen else kind
                seen.add(kind)
                labels = [""] * (len(points) - 1) + [row.name]
                series.append(Series(name, points, labels, line=len(points) > 1, colour=KINDS[kind], marker="circle"))
            title = "Distance to CIFAR-10's test images in a classifier's features"
            name = "calls" if axis == "network calls" else "seconds"
            picture = plot(series, Axis(axis, log=True), Axis("fd_judge", log=True), title=title, size=(1000, 720))
            picture.save(self.out / f"{name}.png")

    def _samples(self, rows: list[Row]) -> None:
        """The same ten seeds of each method in one and two calls (of the teacher in 35); needs the models."""
        strips = []
        for row in rows:
            folder = self.folder(row, self._seeds(row)[0])
            strip = folder / "strip.png"
            if not strip.exists():
                if not (folder / "model.safetensors").exists():
                    continue
                pieces = [
                    (place, column, piece)
                    for column, calls in enumerate(row.calls[:2])
                    for place, piece in enumerate(self._ten(row, folder, calls))
                ]
                side = pieces[0][2].width
                _pasted([(side * place + 11 * side * column, 0, piece) for place, column, piece in pieces]).save(strip)
            strips.append((row.name, strip))
        pictures = []
        for place, (name, strip) in enumerate(strips):
            with Image.open(strip) as small:
                large = small.convert("RGB").resize((3 * small.width, 3 * small.height), Image.Resampling.NEAREST)
            label = Image.new("RGB", (110, large.height), "white")
            ImageDraw.Draw(label).text((104, large.height // 2), name, "black", anchor="rm", font_size=14)
            top = place * (large.height + 4)
            pictures += [(0, top, label), (label.width, top, large)]
        if pictures:
            _pasted(pictures).save(self.out / "samples.png")

    def _ten(self, row: Row, folder: Path, calls: int) -> list[Image.Image]:
        how = ("--solver", row.solver) if row.solver else ()
        ask = ("--seeds", "0-9", "--labels", "0-9", "--steps", calls, "--out", folder / f"ten-{calls}")
        self.cmtool("sample", "--model", folder, *ask, *how)
        return [Image.open(file).convert("RGB") for file in sorted((folder / f"ten-{calls}").glob("*.png"))]


def _pasted(pictures: list[tuple[int, int, Image.Image]]) -> Image.Image:
    """Pictures at their places, on white."""
    width, height = (max(one[axis] + one[2].size[axis] for one in pictures) for axis in (0, 1))
    whole = Image.new("RGB", (width, height), "white")
    for left, top, picture in pictures:
        whole.paste(picture, (left, top))
    return whole


def needed(names: Sequence[str]) -> list[str]:
    """Those rows and the ones they learn or start from."""
    rows = {row.name: row for row in (*TEACHERS, *ROWS)}
    found: list[str] = []
    ahead = list(names)
    while ahead:
        name = ahead.pop()
        if name not in rows:
            raise SystemExit(f"error: there is no row {name!r}\nhint: the rows are {', '.join(rows)}")
        found.append(name)
        ahead += [one for one in (rows[name].teacher, rows[name].init) if one]
    return found


def last_line(folder: Path) -> dict:
    """The last of metrics.jsonl."""
    return json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])


def metric(row: dict, name: str) -> float:
    """A number by the beginning of its name: it goes on with the features and the count."""
    return next((value for key, value in row["metrics"].items() if key.startswith(name)), float("nan"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="the folder of the training images")
    parser.add_argument("--test", help="the folder of the test images")
    parser.add_argument("--out", default="study")
    parser.add_argument("--images", default="50k", help="that each method sees in training")
    parser.add_argument("--teacher-images", default="400k", help="that the teacher sees")
    parser.add_argument("--network", default="small", help="and settings: 'small --set network.num_blocks=2'")
    parser.add_argument("--batch", type=int, help="images a step, in place of the presets'")
    parser.add_argument("--count", type=int, default=2000, help="samples that are judged")
    parser.add_argument("--resolution", type=int, default=16, help="of the images; 16 is for 2 cores")
    parser.add_argument("--seeds", default="0,1")
    parser.add_argument("--only", help="methods, separated by commas; what they start from is trained, too")
    parser.add_argument("--store", type=Path, help="copy the run folders there without weights; trains nothing")
    parser.add_argument("--table", action="store_true", help="only the tables")
    parser.add_argument("--short", action="store_true", help="a few steps of each: does everything run?")
    options = parser.parse_args()
    study = Study(options)
    if options.store:
        study.table()  # makes the samples
        study.store(options.store)
        options.out = options.store
        Study(options).table()
        return
    if not options.table:
        if not (options.data and options.test):
            raise SystemExit(
                "error: there are no images to learn from\nhint: name their folders with --data and --test"
            )
        study.run()
    study.table()


if __name__ == "__main__":
    main()
