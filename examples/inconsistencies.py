"""Does a student that solves its teacher's ODE better make better samples? `direct` against `cd`.

Vouitsis et al. (2024), "Inconsistencies in Consistency Models", arXiv:2411.08954, found that it need not: trained by
regression on the ends of the teacher's trajectories (`direct`), a student of Stable Diffusion XL came closer to the ODE
than one that need only agree with itself a solver's step further on (`cd`), and its images were worse. Here both follow
the same teacher with the same solver on the same grid, from the same first weights, with the same starts, noise, loss
and number of training steps. What differs is the target. With N solver's steps from noise to data, `cd` takes one of
them and asks itself for the rest; `direct` takes N from wherever it starts (finer than the grid below its top).

    python examples/inconsistencies.py --on mixture                   about 12 minutes on one core
    python examples/inconsistencies.py --on digits --teacher FILE     about 50 minutes on one core
    python examples/inconsistencies.py --on mixture --short           a few steps of each: does everything run?

On the mixture the teacher is the exact denoiser, so that the teacher's own error plays no part, and the students are of
two sizes; on digits it is an `edm` model (trained here if none is given), whose copies the students start as. Results
are kept in --out as they come (results.jsonl), and what is there is not run again. A table and plots are made of them
at the end. DDIM is missing among the solvers: on the variance-exploding path it is Euler's method.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from itertools import pairwise
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from family import Mixture, sliced_wasserstein, within_classes
from PIL import Image
from torch import Tensor, nn

from cmtool import precision, rng, spec
from cmtool.flow import EDM, VE, FlowMap, ModelCard
from cmtool.io import checkpoint
from cmtool.io.data import open_data
from cmtool.io.images import from_uint8, grid, to_uint8, write_image
from cmtool.networks.configs import Config, MLPConfig, small
from cmtool.reporting.plot import COLOURS, MARKERS, Axis, Series, plot
from cmtool.solvers import SOLVERS, solve
from cmtool.times import Karras
from cmtool.training.presets import PRESETS, Shape
from cmtool.training.recipe import KINDS, Recipe
from cmtool.training.trainer import Images, Trainer

METHODS = ("cd", "direct")


@dataclass(frozen=True)
class Student:
    """One training: its network, how long, by which preset, and how the teacher is solved."""

    network: str
    iterations: int
    method: str
    solver: str
    steps: int  # of the solver, from noise to data
    seed: int

    @property
    def settings(self) -> dict[str, str]:
        """What `--set` would be given."""
        grid = {"cd": "objective.times.curriculum.num", "direct": "objective.times.start.curriculum.num"}[self.method]
        substeps = {"cd": 1, "direct": self.steps}[self.method]
        return {
            grid: str(self.steps + 1),
            "objective.trajectory.solver": self.solver,
            "objective.trajectory.substeps": str(substeps),
        }


@dataclass(frozen=True)
class Measure:
    """A measure of quality: how it is written, and how bad a value is."""

    name: str
    head: str
    form: str
    badness: Callable[[float], float]
    log: bool = False


class Exact(FlowMap):
    """The exact denoiser of a mixture as a model."""

    def __init__(self, mixture: Mixture) -> None:
        super().__init__(nn.Identity(), VE(), EDM(), ModelCard("denoiser", resolution=1, channels=2))
        self.mixture = mixture

    def denoised(self, x_t: Tensor, t: Tensor, labels: Tensor | None = None, augment: Tensor | None = None) -> Tensor:
        return self.mixture.denoise(x_t, t).to(x_t.dtype)


class Problem:
    """A teacher, its trajectories from given noise, and how answers to that noise are judged."""

    intervals = 16  # of a trajectory, where self-consistency is looked at
    per_interval: int  # steps of Heun's solver in one, for the reference
    path = VE()
    teacher: FlowMap
    noise: Tensor
    labels: Tensor | None = None
    followed: int  # trajectories on which self-consistency is looked at
    numbers: int  # errors are root mean squares over samples of the distance, over the root of this
    compute: torch.dtype | None = None
    measures: tuple[Measure, ...]
    students: tuple[Student, ...]
    solved: tuple[tuple[str, int], ...]  # by which solvers and steps the teacher itself is sampled, to compare with
    batch: int
    chunk: int  # samples judged at once
    data: Images
    shape: Shape

    def start(self, network: str) -> FlowMap:
        """The denoiser whose weights a student of this size starts with."""
        raise NotImplementedError

    def quality(self, samples: Tensor, name: str) -> dict[str, float]:
        raise NotImplementedError

    def real(self) -> dict[str, float]:
        """The quality of real data."""
        raise NotImplementedError

    def chunks(self, x: Tensor) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Points of the first trajectories in chunks, with their labels."""
        for first in range(0, len(x), self.chunk):
            part = slice(first, min(first + self.chunk, len(x)))
            yield x[part], None if self.labels is None else self.labels[part]

    # --- the ODE -----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def solve(self, solver: str, steps: int, *, every: int = 1, count: int | None = None) -> Tensor:
        """The teacher's trajectories [steps / every + 1, N, C, H, W] on a grid; the first `count` of them."""
        teacher, times = self.teacher.compute_in(None).eval(), Karras().times(self.path, steps + 1)
        parts = []
        for noise, labels in self.chunks(self.noise[:count]):
            states = [self.path.t_max * noise]
            denoise = partial(teacher.denoised, labels=labels)
            for state in solve(SOLVERS[solver](), denoise, self.path, states[0], times):
                if state.step % every == 0:
                    states.append(state.x)
            parts.append(torch.stack(states))
        return torch.cat(parts, 1)

    @cached_property
    def trajectories(self) -> Tensor:
        """As accurate as it gets."""
        return self.solve("heun", self.intervals * self.per_interval, every=self.per_interval)

    def error(self, a: Tensor, b: Tensor) -> float:
        return float(((a.double() - b.double()).square().flatten(1).sum(1) / self.numbers).mean().sqrt())

    def errors(self, ends: Tensor, true: Tensor) -> dict[str, float]:
        """Absolute, and relative to that of whoever answers everything with the mean."""
        error = self.error(ends, true)
        return {"ode_error": error, "relative": error / self.error(true.mean(0, keepdim=True), true)}

    def judge(self, ends: Tensor, name: str) -> dict[str, float]:
        return self.errors(ends, self.trajectories[-1]) | self.quality(ends.float(), name)

    # --- the rows ----------------------------------------------------------------------------------------------------

    def reference(self) -> dict[str, float]:
        """The accurate solution: how far its first hundred are from one with twice the steps, and its quality."""
        finer = self.solve("heun", 2 * self.intervals * self.per_interval, count=100)[-1]
        ends = self.trajectories[-1]
        return self.errors(ends[: len(finer)], finer) | self.quality(ends.float(), "ode")

    def alone(self, solver: str, steps: int) -> dict[str, float]:
        """The teacher, solved with few steps."""
        return self.judge(self.solve(solver, steps)[-1], f"{solver}-{steps}")

    def train(self, student: Student) -> dict[str, float]:
        trainer = Trainer(
            self.recipe(student),
            self.data,
            self.teacher.card,
            teacher=self.teacher,
            init=self.start(student.network),
            seed=student.seed,
            compute_dtype=self.compute,
        )
        start = time.process_time()  # others may be on the same core
        for _ in trainer.run():
            pass
        seconds = time.process_time() - start
        model = trainer.average.compute_in(None).eval()
        name = f"{student.method}-{student.solver}-{student.steps}-{student.seed}"
        found = self.judge(self.answers(model, self.trajectories[0], self.path.t_max), name)
        return found | {"consistency": self.consistency(model), "cpu_seconds": seconds}

    def recipe(self, student: Student) -> Recipe:
        start = self.start(student.network)
        shape = replace(
            self.shape,
            network=start.network.config,
            path=start.path,
            parameterization=start.parameterization,
            distils=True,
        )
        recipe = replace(PRESETS[student.method](shape), iterations=student.iterations, batch=self.batch)
        for name, value in student.settings.items():
            recipe = spec.replace(recipe, name, value, KINDS)
        return recipe

    @torch.no_grad()
    def answers(self, model: FlowMap, x: Tensor, t: float) -> Tensor:
        """f(x, t) for the first trajectories' points x at t."""
        parts = []
        for part, labels in self.chunks(x):
            at = torch.full((len(part),), t)
            parts.append(model.jump(part.float(), at, torch.full_like(at, self.path.t_min), labels))
        return torch.cat(parts)

    def consistency(self, model: FlowMap) -> float:
        """How far apart the answers at neighbouring points of the same trajectory are."""
        times = Karras().times(self.path, self.intervals + 1).tolist()
        states = self.trajectories[:, : self.followed]
        answers = [self.answers(model, x, t) for x, t in zip(states, times, strict=True)]
        return float(np.sqrt(np.mean([self.error(a, b) ** 2 for a, b in pairwise(answers)])))


class OnMixture(Problem):
    """Small networks against the exact denoiser."""

    batch, chunk, numbers = 256, 10_000, 1
    networks: ClassVar = {"16 wide": (16, 2), "64 wide": (64, 4)}  # width and depth
    measures = (
        Measure("distance", "distance to the mixture", "{:.4f}", lambda value: value, log=True),
        Measure("astray", "astray", "{:.1%}", lambda value: value, log=True),
    )

    def __init__(self, folder: Path, short: bool) -> None:
        self.folder, self.short = folder, short
        self.data = self.mixture = Mixture()
        self.teacher = Exact(self.mixture)
        self.shape = Shape(1, 2, 0)
        count = 25 if short else 1250
        # Turned copies of noise and of real points fill the eight modes equally: chance has less to say.
        self.noise = turned(rng.noise(range(count), (2,)))[:, :, None, None].double()
        self.points = turned(self.mixture.draw(count, seed=1))
        self.followed = len(self.noise)
        self.per_interval = 4 if short else 16
        ways = [("euler", 4), ("euler", 8), ("euler", 16), ("euler", 32), ("heun", 16)]
        plan = [
            ("16 wide", 1500, ways, 3),
            ("16 wide", 5000, [("heun", 16)], 2),
            ("64 wide", 1500, [way for way in ways if way != ("euler", 32)], 2),
        ]
        if short:
            plan = [("16 wide", 20, [("euler", 4), ("heun", 4)], 2), ("64 wide", 20, [("euler", 4)], 1)]
        self.students = tuple(
            Student(network, iterations, method, solver, steps, seed)
            for network, iterations, ways, seeds in plan
            for solver, steps in ways
            for seed in range(seeds)
            for method in METHODS
        )
        self.solved = tuple((solver, steps) for solver in ("euler", "heun") for steps in (4, 8, 16, 32))

    def start(self, network: str) -> FlowMap:
        file = self.folder / f"{network.replace(' ', '-')}.safetensors"
        if not file.exists():
            width, depth = self.networks[network]
            config = MLPConfig(in_channels=2, out_channels=2, width=width, depth=depth)
            checkpoint.save(denoiser(self, config, 20 if self.short else 2000), file)
        return checkpoint.load(file)

    def quality(self, samples: Tensor, name: str) -> dict[str, float]:
        points = samples.flatten(1)
        nearest = (points.double()[:, None] - self.mixture.centres).norm(dim=2).min(1).values
        away = (nearest > 4 * self.mixture.std).double().mean()
        return {"distance": sliced_wasserstein(points, self.points), "astray": float(away)}

    def real(self) -> dict[str, float]:
        others = [self.quality(turned(self.mixture.draw(len(self.points) // 8, seed)), "") for seed in range(2, 12)]
        return {name: float(np.mean([other[name] for other in others])) for name in others[0]}


class OnDigits(Problem):
    """Copies of a trained teacher."""

    batch, chunk, numbers = 128, 250, 16 * 16 * 3
    measures = (
        Measure("agreement", "class agreement", "{:.1%}", lambda value: 1 - value),
        Measure("muddiness", "muddiness, of real", "{:.2f}", lambda value: abs(value - 1)),
        Measure("variety", "variety within a class, of real", "{:.2f}", lambda value: abs(value - 1)),
    )

    def __init__(self, folder: Path, short: bool, teacher: Path | None) -> None:
        from digits_judge import Judge

        self.folder = folder
        self.data = open_data("digits:train")
        self.shape = Shape(16, 3, 10)
        self.compute = precision.compute_dtype("auto", torch.device("cpu"))
        self.judge_of_digits = Judge()
        test = open_data("digits:test")
        self.variety = within_classes(from_uint8(test.images), test.labels.numpy())
        count = 30 if short else 1000
        self.noise = rng.noise(range(count), (3, 16, 16))
        self.labels = torch.arange(count) % 10
        self.followed = 10 if short else 250
        self.per_interval = 1 if short else 3
        if teacher is None:
            teacher = folder / "teacher.safetensors"
            if not teacher.exists():
                checkpoint.save(denoiser(self, small(16, 3, 10), 3 if short else 900), teacher)
        self.teacher = checkpoint.load(teacher, role="denoiser")
        # What matters most first: this takes long, and the table can be read before all is there.
        wanted = [("cd", "heun", 9), ("direct", "heun", 9), ("cd", "euler", 9), ("direct", "euler", 9)]
        wanted += [("cd", "heun", 17), ("direct", "heun", 5), ("direct", "heun", 3)]
        if short:
            wanted, self.batch = [("cd", "heun", 3), ("direct", "heun", 3)], 32
        self.students = tuple(Student("copies", 3 if short else 300, *way, seed=0) for way in wanted)
        self.solved = tuple(dict.fromkeys((solver, steps) for _, solver, steps in wanted))

    def start(self, network: str) -> FlowMap:
        return self.teacher

    def quality(self, samples: Tensor, name: str) -> dict[str, float]:
        pictures = to_uint8(samples)
        write_image(self.folder / f"{name}.png", grid(pictures[:100], columns=10))
        assert self.labels is not None
        verdict = self.judge_of_digits(pictures.permute(0, 2, 3, 1).numpy(), self.labels.numpy())
        real = self.judge_of_digits.real
        return {
            "agreement": verdict.agreement,
            "muddiness": verdict.muddiness / real.muddiness,
            "variety": within_classes(samples, self.labels.numpy()) / self.variety,
        }

    def real(self) -> dict[str, float]:
        return {"agreement": self.judge_of_digits.real.agreement, "muddiness": 1.0, "variety": 1.0}


def turned(points: Tensor) -> Tensor:
    """Points [N, 2] and their copies turned by multiples of 45 degrees: [8 N, 2]."""
    angles = torch.arange(8) * (torch.pi / 4)
    turns = torch.stack([angles.cos(), -angles.sin(), angles.sin(), angles.cos()], 1).reshape(8, 2, 2).to(points)
    return torch.einsum("kij,nj->kni", turns, points).flatten(0, 1)


def denoiser(problem: Problem, network: Config, iterations: int) -> FlowMap:
    """A trained `edm` model."""
    shape = replace(problem.shape, network=network)
    recipe = replace(PRESETS["edm"](shape), iterations=iterations, batch=problem.batch)
    card = ModelCard("denoiser", shape.resolution, shape.channels, shape.num_classes)
    trainer = Trainer(recipe, problem.data, card, compute_dtype=problem.compute)
    for _ in trainer.run():
        pass
    return trainer.average


# --- what came out ---------------------------------------------------------------------------------------------------


class Results:
    """Rows in a file, by what they are the results of."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.rows = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []

    def get(self, key: dict, make: Callable[[], dict[str, float]]) -> dict:
        """The row of this key, made now if it is not there."""
        for row in self.rows:
            if all(row.get(name) == value for name, value in key.items()):
                return row
        row = {**key, **make()}
        self.rows.append(row)
        with self.file.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(json.dumps(row), flush=True)
        return row


def groups(rows: Iterable[dict]) -> dict[tuple[str, int], list[dict]]:
    """Students of one network, trained for as long."""
    found: dict[tuple[str, int], list[dict]] = {}
    for row in rows:
        found.setdefault((row["network"], row["iterations"]), []).append(row)
    return found


def alike(rows: Iterable[dict]) -> list[list[dict]]:
    """Students that differ in their seed alone, together."""
    found: dict[tuple, list[dict]] = {}
    for row in rows:
        found.setdefault((row["solver"], row["steps"], row["method"]), []).append(row)
    return list(found.values())


def spread(values: Sequence[float], form: str) -> str:
    mean = form.format(float(np.mean(values)))
    return f"{mean} ± {form.format(float(np.std(values, ddof=1)))}" if len(values) > 1 else mean


def table(problem: Problem, none: list[dict], students: list[dict]) -> str:
    """Markdown: what everyone came to."""
    forms = {"ode_error": "{:.4f}", "relative": "{:.3f}", "consistency": "{:.4f}"}
    forms |= {measure.name: measure.form for measure in problem.measures} | {"cpu_seconds": "{:.0f}"}
    heads = ["student", "preset", "teacher solved by", "ODE error", "relative", "self-consistency error"]
    heads += [measure.head for measure in problem.measures] + ["CPU seconds"]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    named = [(["none: " + row["network"], "", way(row)], [row]) for row in none]
    for (network, iterations), rows in groups(students).items():
        for same in alike(rows):
            named.append(([f"{network}, {iterations:,} steps", f"`{same[0]['method']}`", way(same[0])], same))
    for first, rows in named:
        cells = [spread([row[name] for row in rows], form) if name in rows[0] else "" for name, form in forms.items()]
        lines.append("| " + " | ".join([*first, *cells]) + " |")
    return "\n".join(lines)


def way(row: dict) -> str:
    return f"{row['solver'].capitalize()}, {row['steps']} steps" if "solver" in row else ""


def short(row: dict) -> str:
    return f"{row['solver'][0].upper()}{row['steps']}"


def verdict(problem: Problem, students: list[dict]) -> str:
    """Markdown: where all but the method is the same, which is closer to the ODE, and which makes better samples."""
    heads = ["students", "pairs", "`direct` closer to the ODE"]
    for measure in problem.measures:
        heads += [f"`cd` better by {measure.head}", "of these, farther from the ODE", "rank correlation with ODE error"]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for (network, iterations), rows in groups(students).items():
        found: dict[tuple, dict[str, dict]] = {}
        for row in rows:
            found.setdefault((row["solver"], row["steps"], row["seed"]), {})[row["method"]] = row
        pairs = [[one[method] for method in METHODS] for one in found.values() if len(one) == len(METHODS)]
        closer = [direct["ode_error"] < cd["ode_error"] for cd, direct in pairs]
        cells = [f"{network}, {iterations:,} steps", str(len(pairs)), str(sum(closer))]
        for measure in problem.measures:
            bad = [[measure.badness(row[measure.name]) for row in pair] for pair in pairs]
            better = [cd < direct for cd, direct in bad]
            both = sum(a and b for a, b in zip(better, closer, strict=True))
            every = [measure.badness(row[measure.name]) for row in rows]
            cells += [str(sum(better)), str(both), rank_correlation([row["ode_error"] for row in rows], every)]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def rank_correlation(a: Sequence[float], b: Sequence[float]) -> str:
    """Spearman's, where there are ranks to speak of."""
    if min(len(set(a)), len(set(b))) < 3:
        return ""
    ranks = []
    for values in (a, b):
        _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
        ranks.append((np.cumsum(counts) - (counts - 1) / 2)[inverse])
    return f"{np.asarray(np.corrcoef(np.stack(ranks)))[0, 1]:+.2f}"


def draw(problem: Problem, measure: Measure, none: list[dict], students: list[dict]) -> Image.Image:
    """ODE error across, quality up; a line joins the two methods where all else is the same."""
    methods: list[Series] = []
    joined: dict[tuple, list[tuple[float, float]]] = {}
    for marker, ((network, iterations), rows) in zip(MARKERS, groups(students).items(), strict=False):
        for colour, method in zip(COLOURS, METHODS, strict=False):
            points, labels, cloud = [], [], []
            for same in alike(row for row in rows if row["method"] == method):
                runs = [(row["ode_error"], row[measure.name]) for row in same]
                x, y = np.mean(runs, 0).tolist()
                points.append((x, y))
                labels.append(short(same[0]))
                cloud += runs if len(runs) > 1 else []
                joined.setdefault((marker, labels[-1]), []).append((x, y))
            methods.append(
                Series(f"{method}, {network}, {iterations:,} steps", points, labels, cloud, False, colour, marker)
            )
    lines = [Series("", ends, line=True, colour="#999999", marker="") for ends in joined.values() if len(ends) == 2]
    solved = [row for row in none if "solver" in row]
    errors = [row["ode_error"] for row in students]
    alone = [row for row in solved if min(errors) / 1.3 < row["ode_error"] < 1.3 * max(errors)]
    beyond = [short(row) for row in solved if row not in alone]
    teacher = Series(
        "the teacher itself" + (f" (out of range: {', '.join(beyond)})" if beyond else ""),
        [(row["ode_error"], row[measure.name]) for row in alone],
        [short(row) for row in alone],
        colour="#555555",
        marker="cross",
    )
    slope = "falls" if measure.badness(2.0) > measure.badness(1.0) else "rises"
    return plot(
        [*lines, *methods, teacher],
        Axis("ODE error of one-step samples; E16: target from 16 steps of Euler's solver, H: Heun's", log=True),
        Axis(f"{measure.head}; real data: {measure.form.format(none[0][measure.name])}", log=measure.log),
        title=f"A line that {slope} to the right: direct is closer to the ODE, and its samples are worse",
    )


def report(problem: Problem, folder: Path, none: list[dict], students: list[dict]) -> str:
    """The tables, and with the plots also in the folder."""
    text = f"{table(problem, none, students)}\n\n{verdict(problem, students)}\n"
    (folder / "table.md").write_text(text)
    for measure in problem.measures:
        draw(problem, measure, none, students).save(folder / f"{measure.name}.png")
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--on", choices=("mixture", "digits"), required=True)
    parser.add_argument("--teacher", type=Path, help="for digits: a run folder or model file of the preset edm")
    parser.add_argument("--out", type=Path, default=Path("inconsistencies"), help="of one teacher only")
    parser.add_argument("--short", action="store_true", help="a few steps of each")
    options = parser.parse_args()
    folder = options.out / (f"{options.on}-short" if options.short else options.on)
    folder.mkdir(parents=True, exist_ok=True)
    problem: Problem
    if options.on == "mixture":
        if options.teacher:
            parser.error("the teacher of the mixture is its exact denoiser: leave out --teacher")
        problem = OnMixture(folder, options.short)
    else:
        problem = OnDigits(folder, options.short, options.teacher)
    results = Results(folder / "results.jsonl")
    none = [results.get({"network": "real data"}, problem.real), results.get({"network": "the ODE"}, problem.reference)]
    for solver, steps in problem.solved:
        key = {"network": "the teacher", "solver": solver, "steps": steps}
        none.append(results.get(key, partial(problem.alone, solver, steps)))
    students: list[dict] = []
    for student in problem.students:
        known = len(results.rows)
        students.append(results.get(asdict(student), partial(problem.train, student)))
        if len(results.rows) > known:
            report(problem, folder, none, students)
    print(report(problem, folder, none, students))


if __name__ == "__main__":
    main()
