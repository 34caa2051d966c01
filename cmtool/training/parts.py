"""Everything a recipe is made of, under one name: `from cmtool.training import parts as p`."""

from __future__ import annotations

from cmtool.flow.parameterization import EDM, BoundaryEDM, LogRatio, PathTime, Piecewise, Velocity
from cmtool.flow.path import VE, Linear, Trig
from cmtool.solvers import DDIM, DPMSolver2, Euler, Heun
from cmtool.times import (
    Adjacent,
    Constant,
    Doubling,
    Dyadic,
    Fixed,
    Halving,
    Landing,
    LogNormal,
    LogNormalIndex,
    LogStudentT,
    Mapped,
    NextGrid,
    OnGrid,
    Pair,
    Progressive,
    RhoUniform,
    Tangential,
    UniformIndex,
)
from cmtool.times import Karras as KarrasGrid
from cmtool.training.augment import Augment
from cmtool.training.average import Exponential, HalfLife, Power
from cmtool.training.distances import L1, L2, LPIPS, PseudoHuber
from cmtool.training.objectives import Consistency, Continuous, Denoising, Mixture, Part, Tangent
from cmtool.training.recipe import Optimizer, Recipe
from cmtool.training.tangents import Adaptive, Clipped, Learned, Normalised
from cmtool.training.targets import AdaptiveAverage, MovingAverage, Online, Truncated
from cmtool.training.trajectory import Data, Predecessor, Self, Teacher
from cmtool.training.weights import (
    SNR,
    Alpha,
    InverseGap,
    InverseJump,
    InverseRatio,
    SNRPlusOne,
    TruncatedSNR,
    Uniform,
    VelocityError,
)
from cmtool.training.weights import Karras as KarrasWeight

__all__ = [
    "DDIM",
    "EDM",
    "L1",
    "L2",
    "LPIPS",
    "SNR",
    "VE",
    "Adaptive",
    "AdaptiveAverage",
    "Adjacent",
    "Alpha",
    "Augment",
    "BoundaryEDM",
    "Clipped",
    "Consistency",
    "Constant",
    "Continuous",
    "DPMSolver2",
    "Data",
    "Denoising",
    "Doubling",
    "Dyadic",
    "Euler",
    "Exponential",
    "Fixed",
    "HalfLife",
    "Halving",
    "Heun",
    "InverseGap",
    "InverseJump",
    "InverseRatio",
    "KarrasGrid",
    "KarrasWeight",
    "Landing",
    "Learned",
    "Linear",
    "LogNormal",
    "LogNormalIndex",
    "LogRatio",
    "LogStudentT",
    "Mapped",
    "Mixture",
    "MovingAverage",
    "NextGrid",
    "Normalised",
    "OnGrid",
    "Online",
    "Optimizer",
    "Pair",
    "Part",
    "PathTime",
    "Piecewise",
    "Power",
    "Predecessor",
    "Progressive",
    "PseudoHuber",
    "Recipe",
    "RhoUniform",
    "SNRPlusOne",
    "Self",
    "Tangent",
    "Tangential",
    "Teacher",
    "Trig",
    "Truncated",
    "TruncatedSNR",
    "Uniform",
    "UniformIndex",
    "Velocity",
    "VelocityError",
]
