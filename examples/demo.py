"""The whole idea on real images in ten minutes: teach, distil, sample in one step, edit. `make demo` runs this.

Every step is a public command, printed before it runs; this script only makes the inputs of the edits, puts the
pictures together and judges the samples. With --short the same commands run with little training, to see that they do.
"""

from __future__ import annotations

import argparse
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from digits_judge import Judge, read_folder, table
from PIL import Image, ImageDraw

from cmtool.io.data import open_data

SCALE = 4  # pixels of a picture for each pixel of an image
INK, GROUND = (236, 236, 240), (24, 25, 32)


class Demo:
    """Runs commands, remembers how long they took."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.seconds: dict[str, float] = {}

    def run(self, phase: str, *argv: str) -> None:
        """Print a command, run it, add its time to its phase; stop the demo if it fails."""
        print(f"\n$ {shlex.join(('cmtool', *argv))}", flush=True)
        start = time.perf_counter()
        code = subprocess.run(
            [sys.executable, "-m", "cmtool", *argv], stdout=subprocess.DEVNULL, check=False
        ).returncode
        self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - start
        if code:
            sys.exit(code)


def main() -> None:
    """The demo."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("demo"))
    parser.add_argument("--short", action="store_true", help="little training, few samples")
    options = parser.parse_args()
    out: Path = options.out
    if out.exists() and not (out / "teacher").is_dir() and any(out.iterdir()):
        sys.exit(f"{out} holds something else; name another folder with --out")
    shutil.rmtree(out, ignore_errors=True)
    began = time.perf_counter()
    demo = Demo(out)
    little = ("--iterations", "10") if options.short else ()
    count = 40 if options.short else 1000
    teacher, student = str(out / "teacher"), str(out / "student")

    demo.run("train the teacher", "train", "--data", "digits:train", "--preset", "edm", "--out", teacher, *little)
    demo.run(
        "distil the student",
        *("distill", "--teacher", teacher, "--data", "digits:train", "--preset", "cd", "--out", student, *little),
    )

    seeds = ("--seeds", f"0-{count - 1}", "--labels", "0-9")
    sets = {
        "teacher, Heun, 18 steps": (teacher, "images/teacher", ("--solver", "heun", "--steps", "18")),
        "student, one step": (student, "images/one-step", ("--steps", "1")),
        "student, two steps": (student, "images/two-steps", ("--steps", "2")),
    }
    for model, folder, how in sets.values():
        demo.run("sample", "sample", "--model", model, *how, *seeds, "--out", str(out / folder))

    edits(demo, student, (3,) if options.short else (3, 5, 8))
    samples_picture(out, {name: out / folder for name, (_, folder, _) in sets.items()})
    judge = Judge()
    verdicts = {name: judge(*read_folder(out / folder)) for name, (_, folder, _) in sets.items()}
    summary = [
        "# Demo",
        "",
        f"{count} samples of each kind; a classifier trained on real digits says which digit it sees.",
        "",
        table(verdicts, judge.real),
        "",
        "| phase | seconds |",
        "|---|---|",
        *(f"| {phase} | {seconds:.0f} |" for phase, seconds in demo.seconds.items()),
        f"| all | {time.perf_counter() - began:.0f} |",
    ]
    (out / "summary.md").write_text("\n".join(summary) + "\n", encoding="utf-8")
    print("\n" + "\n".join(summary[2:]))
    print(f"\npictures: {', '.join(sorted(str(file) for file in out.glob('*.png')))}")


def edits(demo: Demo, student: str, digits: tuple[int, ...]) -> None:
    """Inpaint, colorize and enlarge held-out digits; three pictures of before, what is known, and answers."""
    work = demo.out / "edits"
    work.mkdir(parents=True)
    held_out = open_data("digits:test")
    chosen = [int((held_out.labels == digit).nonzero()[0, 0]) for digit in digits]
    rows: dict[str, list[list[np.ndarray]]] = {"inpaint": [], "colorize": [], "superres": []}
    for index in chosen:
        real = held_out.images[index].numpy().transpose(1, 2, 0)
        digit = str(int(held_out.labels[index]))
        size = real.shape[0]
        name = work / f"digit-{digit}"
        Image.fromarray(real).save(f"{name}.png")
        mask = Image.new("L", (size, size))
        ImageDraw.Draw(mask).rectangle((0, size // 2, size - 1, size - 1), fill=255)
        mask.save(f"{name}-mask.png")
        Image.fromarray(real).convert("L").save(f"{name}-grey.png")
        small = Image.fromarray(real).resize((size // 2, size // 2), Image.Resampling.BOX)
        small.save(f"{name}-small.png")

        common = ("--model", student, "--labels", digit, "--seeds", "0-4")
        hole = np.where(np.asarray(mask)[..., None] > 0, 110, real).astype(np.uint8)
        asked = {
            "inpaint": (hole, ("--image", f"{name}.png", "--mask", f"{name}-mask.png")),
            "colorize": (np.asarray(Image.open(f"{name}-grey.png").convert("RGB")), ("--image", f"{name}-grey.png")),
            "superres": (
                np.asarray(small.resize((size, size), Image.Resampling.NEAREST)),
                ("--image", f"{name}-small.png", "--factor", "2"),
            ),
        }
        for edit, (known, how) in asked.items():
            target = work / f"{edit}-{digit}"
            demo.run("edit", edit, *common, *how, "--out", str(target))
            answers = [np.asarray(Image.open(file).convert("RGB")) for file in sorted(target.glob("*.png"))]
            between = [np.repeat(np.asarray(mask)[..., None], 3, 2)] if edit == "inpaint" else []
            rows[edit].append([real, *between, known, *answers])
    heads = {
        "inpaint": ["real", "mask", "known", "answers"],
        "colorize": ["real", "known", "answers"],
        "superres": ["real", "known", "answers"],
    }
    for edit, images in rows.items():
        picture(demo.out / f"{edit}.png", images, heads[edit])


def samples_picture(out: Path, sets: dict[str, Path]) -> None:
    """Real digits over the same seeds from teacher and student."""
    real = open_data("digits:test")
    order = [int((real.labels == digit).nonzero()[k, 0]) for k in range(2) for digit in range(10)]
    rows = [[real.images[i].numpy().transpose(1, 2, 0) for i in order]]
    for folder in sets.values():
        rows.append(list(read_folder(folder)[0][:20]))
    picture(out / "samples.png", rows, ["real, held out", *sets], captions_on_rows=True)


def picture(file: Path, rows: list[list[np.ndarray]], captions: list[str], captions_on_rows: bool = False) -> None:
    """A sheet of enlarged images with captions over the columns, or over each row."""
    size, pad, line = rows[0][0].shape[0] * SCALE, 4, 16
    width = max(map(len, rows)) * (size + pad) + pad
    tall = size + pad + (line if captions_on_rows else 0)
    sheet = Image.new("RGB", (width, len(rows) * tall + pad + (0 if captions_on_rows else line)), GROUND)
    draw = ImageDraw.Draw(sheet)
    for i, row in enumerate(rows):
        top = i * tall + pad + (line if captions_on_rows else 0) + (0 if captions_on_rows else line)
        if captions_on_rows:
            draw.text((pad, i * tall + pad), captions[i], fill=INK)
        for j, image in enumerate(row):
            tile = Image.fromarray(image).resize((size, size), Image.Resampling.NEAREST)
            sheet.paste(tile, (pad + j * (size + pad), top))
    if not captions_on_rows:
        for j, caption in enumerate(captions):
            draw.text((pad + j * (size + pad), pad), caption, fill=INK)
    sheet.save(file)


if __name__ == "__main__":
    main()
