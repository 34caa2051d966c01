"""The ODE error where everything is known: Gaussian data, whose flow map is a factor."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch

from cmtool.errors import UsageError
from cmtool.evaluation.ode_error import ode_error
from cmtool.flow.path import VE
from tests.models import model

SCALE = 0.5  # standard deviation of the data


class Known:
    """A model of N(0, SCALE^2) on VE; `wrong` is what its jumps are multiplied by."""

    def __init__(self, wrong=1.0, role="consistency"):
        self.path, self.wrong, self.device = VE(), wrong, torch.device("cpu")
        self.network = torch.nn.Linear(1, 1)
        self.card = SimpleNamespace(role=role, image_shape=(1, 4, 4), num_classes=0, grid_rho=7.0)

    def denoised(self, x, t, labels=None):
        t = t[:, None, None, None]
        return SCALE**2 / (SCALE**2 + t**2) * x

    def jump(self, x, t, s, labels=None):
        t, s = (one[:, None, None, None] for one in (t, s))
        return self.wrong * ((SCALE**2 + s**2) / (SCALE**2 + t**2)).sqrt() * x


def test_the_exact_map_has_no_error():
    found = ode_error(Known(), Known(role="denoiser"), range(20), batch=7)
    assert found.error < 1e-5
    assert found.solution < 1e-4
    assert found.levels[0] == pytest.approx(80)
    assert found.levels == sorted(found.levels, reverse=True)
    assert max(found.from_level) < 1e-5


def test_a_wrong_map_has_the_error_it_makes():
    found = ode_error(Known(wrong=0.9), Known(role="denoiser"), range(400), batch=100)
    variance = 80**2 * (SCALE**2 + 0.002**2) / (SCALE**2 + 80**2)
    assert found.error == pytest.approx(0.01 * variance, rel=0.1)  # 6,400 numbers: 1.8 % standard deviation
    assert found.from_level[4] == pytest.approx(found.error, rel=1e-2)  # the same trajectories


def test_the_solution_converges_with_the_order_of_its_solver():
    coarse, fine = (ode_error(Known(), Known(role="denoiser"), range(4), steps=n, batch=4) for n in (20, 40))
    order = 0.5 * math.log2(coarse.solution / fine.solution)
    assert order == pytest.approx(2, abs=0.3)
    assert (coarse.steps, fine.steps) == (40, 80)


def test_another_distance():
    def largest(a, b):
        return (a - b).abs().flatten(1).amax(1)

    found = ode_error(Known(wrong=0.5), Known(role="denoiser"), range(4), batch=4, distance=largest)
    assert found.distance is not None
    assert found.distance > 0.1


def test_networks_of_any_kind_are_compared():
    """The student's error against itself as a teacher is what its jump lacks."""
    student, teacher = model(), model("denoiser")
    found = ode_error(student, teacher, range(3), steps=4)
    assert all(math.isfinite(value) for value in found.from_level)
    assert found.error == found.from_level[0]


def test_refusals():
    with pytest.raises(UsageError, match="makes no jump"):
        ode_error(Known(role="denoiser"), Known(role="denoiser"), range(2))
    other = Known(role="denoiser")
    other.card.image_shape = (3, 4, 4)
    with pytest.raises(UsageError, match="other images"):
        ode_error(Known(), other, range(2))
