"""What is written down of a training: numbers, sample grids, the quality of the average, and the best one so far."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import TYPE_CHECKING

from cmtool.cli import console

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from cmtool.evaluation.proxy import Proxy
    from cmtool.flow.path import Path
    from cmtool.io.run import RunFolder
    from cmtool.io.trackers import Tracker
    from cmtool.processes import Processes
    from cmtool.training.trainer import Report, Trainer

_JUDGED_RUN = 1000  # steps of a run that is judged without being asked to
_WITHIN = 1800.0  # seconds of work that a crash may cost, about


class Rhythm:
    """Every how many steps what is done; 0 is never."""

    def __init__(self, total: int, *, log: int | None, save: int | None, sample: int | None, judge: int | None) -> None:
        self.log = log or max(1, min(100, total // 50))
        self.save = save or max(100, total // 5)
        self.sample = max(100, total // 10) if sample is None else sample
        self.judge = (total // 10 if total >= _JUDGED_RUN else 0) if judge is None else judge


class Checkpoints:
    """At which steps checkpoints are made: every so many, and in time, whatever a step takes.

    The pace is looked at 1, 2, 4, 8, ... steps after a checkpoint, and agreed on: all processes save together.

    Args:
        trainer: the training; at the step it goes on from.
        every: the number of steps.
        within: seconds after which one is made in any case, roughly.
    """

    def __init__(self, trainer: Trainer, every: int, within: float = _WITHIN) -> None:
        self._processes, self._every, self._within = trainer.processes, every, within
        self.made(trainer.step)

    def made(self, step: int) -> None:
        """There is one of this step."""
        self._last, self._since = step, time.monotonic()
        self._limit = 0  # of steps, known after the first

    def overdue(self, step: int) -> bool:
        """Whether one is to be made for the time that has passed; asked after every step that makes none."""
        done = step - self._last
        if done & (done - 1) == 0:
            import torch

            pace = (time.monotonic() - self._since) / done
            limit = max(1, int(self._within / max(pace, 1e-9)))
            self._limit = int(self._processes.smallest(torch.tensor(limit)))
        return done >= self._limit

    def planned(self, step: int) -> bool:
        """Whether it is one of every so many steps."""
        return step % self._every == 0


class Logbook:
    """Writes into a run's folder, for all processes of the run together.

    Args:
        trainer: the training; at the step it goes on from.
        folder: where it is written to.
        rhythm: how often.
        trackers: other places that get the numbers and grids.
    """

    def __init__(self, trainer: Trainer, folder: RunFolder, rhythm: Rhythm, trackers: list[Tracker]) -> None:
        from cmtool.evaluation.proxy import REFERENCE, Proxy

        self.trainer, self.folder, self.rhythm, self.trackers = trainer, folder, rhythm, trackers
        self.loss: float | None = None  # the last one written
        self._losses: list[Tensor] = []
        self._levels = Levels(trainer.model.path, trainer.device)
        self._since = time.monotonic()
        self._proxy: Proxy | None = None
        known = trainer.data.head(REFERENCE) if rhythm.judge and trainer.order is None else trainer.data
        proxy = Proxy(known, trainer.processes) if rhythm.judge else None
        if proxy is not None and proxy.suits(trainer.model):
            self._proxy = proxy
            self._best = folder.best(proxy.name(trainer.model))

    def note(self, report: Report, *, ending: bool) -> str | None:
        """Take in a step, and write what is due; a line for the screen if there is a new one.

        Args:
            ending: it is the last one, for now or for good.
        """
        step = report.step
        self._losses.append(report.loss)
        self._levels.add(report)
        over = step == self.trainer.recipe.iterations
        judged = self._due(self.rhythm.judge, step, over) and self._proxy is not None
        quality = self._judge(self._proxy) if judged and self._proxy is not None else {}
        text = None
        if step % self.rhythm.log == 0 or ending or quality:
            text = self._write(report, quality)
        if self._due(self.rhythm.sample, step, over):
            image = preview(self.trainer)
            if image is not None:
                self.folder.write_samples(step, image)
                for tracker in self.trackers:
                    tracker.picture(step, image)
        return text

    @staticmethod
    def _due(every: int, step: int, over: bool) -> bool:
        return bool(every) and (step % every == 0 or over)

    def _write(self, report: Report, quality: Mapping[str, float]) -> str:
        import torch

        trainer, team = self.trainer, self.trainer.processes
        loss = float(team.sum(torch.stack(self._losses).sum()) / len(self._losses))
        now = time.monotonic()
        each = max(now - self._since, 1e-9) / len(self._losses)
        speed = trainer.recipe.batch / each
        line = {
            "step": report.step,
            "images": report.images,
            "loss": console.finite(loss),
            "grad_norm": console.finite(float(report.grad_norm)),
            "lr": report.lr,
            "images_per_second": round(speed, 1),
            "seconds_left": round((trainer.recipe.iterations - report.step) * each, 1),
            "loss_by_noise": self._levels.means(team),
            **quality,
        }
        self.folder.log(line)
        for tracker in self.trackers:
            tracker.log(report.step, line)
        self._losses, self.loss = [], loss
        self._since = time.monotonic()
        shown = "".join(f", {name} {value:.4g}" for name, value in quality.items())
        return f"loss {loss:.4g}, {speed:.0f} images/s{shown}"

    def _judge(self, proxy: Proxy) -> dict[str, float]:
        """Measure the average, and keep it if it is the best so far."""
        began = time.monotonic()
        average = self.trainer.average
        found = proxy(average)
        if self._best is None or found < self._best:
            self._best = found
            self.folder.save_best(average)
        self._since += time.monotonic() - began  # the speed is that of the training
        return {proxy.name(average): found}

    def close(self) -> None:
        """Let the trackers write what they still hold."""
        for tracker in self.trackers:
            tracker.close()


class Levels:
    """Mean losses by the decade of the noise-to-signal ratio; summed on the device, so that no step waits for it."""

    _FIRST, _LAST = -4, 3

    def __init__(self, path: Path, device: torch.device) -> None:
        import torch

        self._path = path
        self._sums = torch.zeros(2, self._LAST - self._FIRST + 1, device=device)

    def add(self, report: Report) -> None:
        """The losses of a step."""
        import torch

        ratio = self._path.sigma(report.t) / self._path.alpha(report.t)
        decade = ratio.float().log10().floor().clamp(self._FIRST, self._LAST).long() - self._FIRST
        values = torch.stack([report.per_sample.float(), torch.ones_like(ratio, dtype=torch.float32)])
        self._sums.index_add_(1, decade, values)

    def means(self, team: Processes) -> dict[str, float | None]:
        """The means since the last call, by the lower end of the decade: "0.1" is 0.1 to 1."""
        losses, counts = team.sum(self._sums.clone()).tolist()
        self._sums.zero_()
        return {
            f"{10.0**decade:g}": console.finite(loss / count)
            for decade, loss, count in zip(range(self._FIRST, self._LAST + 1), losses, counts, strict=True)
            if count
        }


def preview(trainer: Trainer) -> Tensor | None:
    """A grid of samples from the average, always of the same seeds: uint8 [3, H, W], on the first process."""
    import torch

    from cmtool.generate import generate
    from cmtool.io.images import grid, to_uint8

    model, team = trainer.average, trainer.processes
    seeds = range(64 if model.card.resolution <= 64 else 16)
    labels = range(model.card.num_classes) if model.card.num_classes else None
    solver = "heun" if model.card.role == "denoiser" else None
    own = seeds[team.share(len(seeds))]
    made = [to_uint8(part.images) for part in generate(model, own, labels=labels, solver=solver)]
    parts = [part for share in team.gathered(made) for part in share]
    return grid(torch.cat(parts)) if team.first else None
