"""The whole family, side by side: every method with the same network, data, batches and number of steps.

On a 2-D mixture of Gaussians, whose denoiser and probability-flow ODE are known, and on handwritten digits.

    python examples/family.py --on mixture              one table, in examples/LOG.md's time
    python examples/family.py --on digits               the other
    python examples/family.py --on mixture --short      a few steps of each: does everything run?

Results are kept in --out as they come (results.jsonl), and what is there is not run again. Every method runs with its
preset as it is; only network, number of steps and batch are set here.
"""

from __future__ import annotations

import argparse
import json
import math
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from cmtool import precision, spec
from cmtool.flow import VE, FlowMap, ModelCard
from cmtool.generate import generate
from cmtool.io import checkpoint
from cmtool.io.data import open_data
from cmtool.io.images import from_uint8, grid, to_uint8, write_image
from cmtool.networks.configs import MLPConfig, small
from cmtool.solvers import Heun, solve
from cmtool.times import Karras
from cmtool.training.presets import PRESETS, Shape
from cmtool.training.recipe import KINDS
from cmtool.training.trainer import Trainer


@dataclass(frozen=True)
class Method:
    """A row: a preset, and the rows it starts from or follows."""

    name: str
    preset: str
    teacher: str | None = None
    init: str | None = None
    solver: str | None = None  # how it is sampled, where it is not by its own jumps
    changes: tuple[str, ...] = ()  # settings, as --set takes them
    steps: tuple[int, ...] = (1, 2)


TEACHERS = (Method("edm", "edm", solver="heun", steps=(18,)), Method("flow", "flow", solver="heun", steps=(18,)))
METHODS = (
    Method("ct", "ct"),
    Method("ict", "ict"),
    Method("ect", "ect", init="edm"),
    Method("tcm", "tcm", init="ect"),
    Method("sct", "sct"),
    Method("sct-from-edm", "sct", init="edm"),
    Method("ct-continuous", "ct-continuous", init="edm"),
    Method("flow-ct", "flow-ct"),
    Method("flow-ct-edm", "flow-ct", changes=("parameterization=edm", "parameterization.time_input=path_time")),
    Method("meanflow", "meanflow"),
    Method("shortcut", "shortcut"),
    Method("cd", "cd", teacher="edm"),
    Method("cd-continuous", "cd-continuous", teacher="edm"),
    Method("scd", "scd", teacher="edm"),
    Method("direct", "direct", teacher="edm"),
    Method("pd", "pd", teacher="edm", steps=(1,)),
    Method("pd-2", "pd", teacher="edm", changes=("objective.times.curriculum.end=2",), steps=(2,)),
    Method("flow-cd", "flow-cd", teacher="flow"),
    Method("reflow", "reflow", teacher="flow", solver="euler"),
    Method("meanflow-distilled", "meanflow", teacher="flow"),
)


class Mixture:
    """Eight Gaussians on a ring, equally likely: data for the trainer, its exact denoiser, its exact ODE."""

    def __init__(self, count: int = 50_000, radius: float = 0.7, std: float = 0.05) -> None:
        angles = torch.arange(8) * (2 * math.pi / 8)
        self.centres, self.std = radius * torch.stack([angles.cos(), angles.sin()], 1).double(), std
        self.points = self.draw(count, seed=0)

    def draw(self, count: int, seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        which = torch.randint(8, (count,), generator=generator)
        return (self.centres[which] + self.std * torch.randn(count, 2, generator=generator)).float()

    def __len__(self) -> int:
        return len(self.points)

    def batch(self, indices: Tensor) -> tuple[Tensor, None]:
        return self.points[indices][:, :, None, None], None

    def denoise(self, x: Tensor, t: Tensor) -> Tensor:
        """E[x0 | x0 + t eps = x]."""
        variance = self.std**2 + t[:, None] ** 2
        offset = x.flatten(1)[:, None] - self.centres
        share = (-(offset**2).sum(2) / (2 * variance)).softmax(1)
        return (share[..., None] * (self.centres + self.std**2 / variance[..., None] * offset)).sum(1)[:, :, None, None]

    def ends(self, eps: Tensor, steps: int = 1024) -> Tensor:
        """Where the probability-flow ODE takes noise eps [N, 2, 1, 1] from sigma = 80 to 0.002; float64."""
        times = Karras().times(VE(), steps + 1)
        for state in solve(Heun(), self.denoise, VE(), 80 * eps.double(), times):
            last = state.x
        return last


def sliced_wasserstein(a: Tensor, b: Tensor, projections: int = 256) -> float:
    """Root mean square over directions of the 1-D Wasserstein-2 distance of two samples [N, 2]."""
    angles = torch.arange(projections) * (math.pi / projections)
    directions = torch.stack([angles.cos(), angles.sin()])
    ordered = [(x.double() @ directions.double()).sort(0).values for x in (a, b)]
    return float((ordered[0] - ordered[1]).square().mean().sqrt())


def within_classes(images: Tensor, labels: np.ndarray) -> float:
    """Root mean square distance of images to the mean of their class: 0 where all of a class are the same."""
    parts = [images[torch.from_numpy(labels == label)] for label in range(10)]
    return float(torch.cat([part - part.mean(0) for part in parts]).square().mean().sqrt())


class OnMixture:
    """How a method does on the mixture."""

    iterations, teacher_iterations, batch = 3000, 3000, 256

    def __init__(self) -> None:
        self.data = Mixture()
        self.network = MLPConfig(in_channels=2, out_channels=2)
        self.card = ModelCard("denoiser", resolution=1, channels=2)
        self.seeds = range(10_000)
        self.real = self.data.draw(len(self.seeds), seed=1)
        self.compute = None

    def prepare(self) -> dict[str, float]:
        """What the numbers are to be compared with."""
        from cmtool import rng

        self.exact = self.data.ends(rng.noise(list(self.seeds), (2, 1, 1)))
        coarse = self.data.ends(rng.noise(list(self.seeds), (2, 1, 1)), 512)
        floors = [sliced_wasserstein(self.data.draw(len(self.seeds), seed), self.real) for seed in range(2, 12)]
        return {
            "two samples of the mixture": float(np.mean(floors)),
            "the exact ODE": sliced_wasserstein(self.exact.flatten(1), self.real),
            "what the exact ODE's own solution is off by": float((self.exact - coarse).square().sum(1).mean().sqrt()),
        }

    def shape(self) -> Shape:
        return Shape(1, 2, 0, network=self.network)

    def judge(self, images: Tensor, file: Path) -> dict[str, float]:
        off = (images.double() - self.exact).square().sum((1, 2, 3))
        return {"distance": sliced_wasserstein(images.flatten(1), self.real), "ode_error": float(off.mean().sqrt())}


class OnDigits:
    """How a method does on digits."""

    iterations, teacher_iterations, batch = 300, 900, 128

    def __init__(self) -> None:
        from digits_judge import Judge

        self.data = open_data("digits:train")
        self.network = small(16, 3, 10)
        self.card = ModelCard("denoiser", resolution=16, channels=3, num_classes=10)
        self.seeds = range(1000)
        self.judge_of_digits = Judge()
        test = open_data("digits:test")
        self.held_out, self.held_out_labels = from_uint8(test.images), test.labels.numpy()
        self.compute = precision.compute_dtype("auto", torch.device("cpu"))

    def prepare(self) -> dict[str, float]:
        real = self.judge_of_digits.real
        return {"class agreement of held-out real digits": real.agreement, "their muddiness": real.muddiness}

    def shape(self) -> Shape:
        return Shape(16, 3, 10, network=self.network)

    def judge(self, images: Tensor, file: Path) -> dict[str, float]:
        pictures = to_uint8(images)
        write_image(file, grid(pictures[:100], columns=10))
        labels = np.arange(len(images)) % 10
        verdict = self.judge_of_digits(pictures.permute(0, 2, 3, 1).numpy(), labels)
        return {
            "agreement": verdict.agreement,
            "muddiness": verdict.muddiness / self.judge_of_digits.real.muddiness,
            "variety": within_classes(images, labels) / within_classes(self.held_out, self.held_out_labels),
        }


Problem = OnMixture | OnDigits
FORMS = {"agreement": "{:.1%}", "muddiness": "{:.2f}", "variety": "{:.2f}"}


def shape_for(problem: Problem, start: FlowMap | None, distils: bool) -> Shape:
    shape = problem.shape()
    if start is not None:
        network = start.network.config
        shape = replace(shape, network=network, path=start.path, parameterization=start.parameterization)
    return replace(shape, distils=distils)


def iterations(problem: Problem, method: Method) -> int:
    return problem.teacher_iterations if method in TEACHERS else problem.iterations


def retime(problem: Problem, rows: list[dict], models: Callable[[str], FlowMap], steps: int = 20) -> None:
    """Measure the seconds anew, from a few steps of each, for a quiet machine."""
    for row in rows:
        method = next(one for one in (*TEACHERS, *METHODS) if one.name == row["method"])
        train(problem, method, models, 2)  # whatever is slow once
        row["seconds"] = train(problem, method, models, steps)[1] / steps * iterations(problem, method)
        print(f"{method.name}: {row['seconds']:.0f} s", flush=True)


def train(
    problem: Problem, method: Method, models: Callable[[str], FlowMap], steps: int
) -> tuple[FlowMap, float, float]:
    """The trained model, its seconds on one core, and the last losses."""
    teacher = models(method.teacher) if method.teacher else None
    init = models(method.init) if method.init else None
    recipe = PRESETS[method.preset](shape_for(problem, init or teacher, teacher is not None))
    recipe = replace(recipe, iterations=steps, batch=problem.batch)
    for change in method.changes:
        recipe = spec.replace(recipe, *change.split("=", 1), KINDS)
    trainer = Trainer(recipe, problem.data, problem.card, teacher=teacher, init=init, compute_dtype=problem.compute)
    start, losses = time.process_time(), []
    for report in trainer.run():
        losses.append(float(report.loss))
    return trainer.average, time.process_time() - start, float(np.mean(losses[-50:]))


def evaluate(problem: Problem, method: Method, model: FlowMap, folder: Path) -> dict[str, float]:
    """The judgement of one-step and two-step samples; of a teacher's, with 18 steps of Heun's solver."""
    found: dict[str, float] = {}
    labels = list(range(10)) if model.card.num_classes else None
    for count in method.steps:
        parts = generate(model, list(problem.seeds), steps=count, solver=method.solver, labels=labels, clip=False)
        images = torch.cat([part.images for part in parts])
        file = folder / f"{method.name}-{count}.png"
        found |= {f"{key}_{count}": value for key, value in problem.judge(images, file).items()}
    return found


def table(problem: Problem, rows: list[dict]) -> str:
    """A Markdown table of the results."""
    if isinstance(problem, OnMixture):
        columns = [("distance", 1, "{:.4f}"), ("distance", 2, "{:.4f}"), ("ode_error", 1, "{:.4f}")]
        heads = ["distance, 1 step", "2 steps", "ODE error, 1 step"]
    else:
        columns = [(name, steps, form) for name, form in FORMS.items() for steps in (1, 2)]
        heads = ["class agreement, 1 step", "2 steps", "muddiness, 1 step", "2 steps", "variety, 1 step", "2 steps"]
    lines = ["| method | from | " + " | ".join(heads) + " | seconds |", "|---" * (len(heads) + 3) + "|"]
    for row in rows:
        cells = []
        for name, steps, form in columns:
            many = f"{name}_18" if steps == 1 else ""  # a teacher's
            found = row.get(f"{name}_{steps}", row.get(many))
            cells.append("" if found is None else form.format(found) + (" (35 calls)" if many in row else ""))
        lines.append(f"| `{row['method']}` | {row['from']} | " + " | ".join(cells) + f" | {row['seconds']:.0f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--on", choices=("mixture", "digits"), required=True)
    parser.add_argument("--out", type=Path, default=Path("family"))
    parser.add_argument("--only", help="methods, separated by commas")
    parser.add_argument("--time", action="store_true", help="measure the seconds of what is there again")
    parser.add_argument("--precision", choices=("auto", "fp32", "bf16"), help="[default: digits auto, mixture fp32]")
    parser.add_argument("--short", action="store_true", help="a few steps of each")
    options = parser.parse_args()
    warnings.filterwarnings("ignore", category=DeprecationWarning)  # of torch's forward-mode derivatives
    problem: Problem = OnMixture() if options.on == "mixture" else OnDigits()
    if options.precision:
        problem.compute = precision.compute_dtype(options.precision, torch.device("cpu"))
    if options.short:
        problem.seeds, problem.batch = range(60), 8
        if isinstance(problem, OnMixture):
            problem.real = problem.data.draw(60, seed=1)
    folder = options.out / options.on
    folder.mkdir(parents=True, exist_ok=True)
    kept = folder / "results.jsonl"
    rows = [json.loads(line) for line in kept.read_text().splitlines()] if kept.exists() else []
    floors = problem.prepare()

    def model(name: str) -> FlowMap:
        return checkpoint.load(folder / f"{name}.safetensors")

    if options.time:
        retime(problem, rows, model)
        kept.write_text("".join(json.dumps(row) + "\n" for row in rows))
    wanted = [one for one in (*TEACHERS, *METHODS) if not options.only or one.name in options.only.split(",")]
    for method in wanted:
        if any(row["method"] == method.name for row in rows):
            continue
        trained, seconds, loss = train(problem, method, model, 3 if options.short else iterations(problem, method))
        checkpoint.save(trained, folder / f"{method.name}.safetensors")
        origin = method.teacher or (f"{method.init} (start)" if method.init else "scratch")
        row = {"method": method.name, "from": origin, "seconds": seconds, "loss": loss}
        row |= evaluate(problem, method, trained.eval(), folder)
        rows.append(row)
        with kept.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(json.dumps(row), flush=True)
    order = [one.name for one in (*TEACHERS, *METHODS)]
    text = table(problem, sorted(rows, key=lambda row: order.index(row["method"])))
    floor = "; ".join(f"{name} {value:.4f}" for name, value in floors.items())
    (folder / "table.md").write_text(f"{text}\n\n{floor}\n")
    print(f"{text}\n\n{floor}")


if __name__ == "__main__":
    main()
