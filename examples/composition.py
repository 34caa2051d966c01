"""A method nobody published, made of known parts: a truncated TrigFlow model distilled from an EDM teacher.

    python examples/composition.py --teacher runs/teacher --first runs/first --out new.safetensors

Above sigma = 1 it follows the teacher's ODE on the great circle, under the Pseudo-Huber distance; below, a first stage
(any consistency model of the same network) answers. The same from the shell, with `cd` as the start:

    cmtool distill --teacher runs/teacher --init runs/first --data digits --preset cd --out runs/new --set path=trig \\
        --set objective.target=truncated --set objective.distance=pseudo_huber
"""

from __future__ import annotations

import argparse
from pathlib import Path

import cmtool
from cmtool.flow import FlowMap
from cmtool.io import checkpoint
from cmtool.io.data import open_data
from cmtool.training import parts as p
from cmtool.training.trainer import Trainer


def recipe(teacher: FlowMap, iterations: int) -> p.Recipe:
    """The method itself."""
    times = p.Mapped(p.LogStudentT(low=1.0), q=16.0, stages=1)
    objective = p.Consistency(p.Teacher(), times, p.PseudoHuber(), p.InverseGap(), p.Truncated(1.0))
    form = p.EDM(teacher.parameterization.sigma_data, teacher.parameterization.time_input)
    shared = {"path": p.Trig(), "parameterization": form, "iterations": iterations, "batch": 64}
    return p.Recipe("truncated-trig", "consistency", objective, teacher.network.config, **shared)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", required=True)
    parser.add_argument("--first", required=True)
    parser.add_argument("--data", default="digits")
    parser.add_argument("--iterations", type=int, default=200)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    teacher, first = cmtool.load(options.teacher, role="denoiser"), cmtool.load(options.first)
    side, channels = teacher.card.resolution, teacher.card.channels
    data = open_data(options.data, resolution=side, channels=channels)
    trainer = Trainer(recipe(teacher, options.iterations), data, teacher.card, teacher=teacher, init=first)
    for report in trainer.run():
        if report.step % 20 == 0:
            print(f"step {report.step}: loss {float(report.loss):.4g}")
    checkpoint.save(trainer.average, options.out)
    print(options.out)


if __name__ == "__main__":
    main()
