"""How data is noised, how a network becomes an estimate, and the one model class built on both."""

from cmtool.flow.flow_map import FlowMap, ModelCard, guided, on_path
from cmtool.flow.parameterization import (
    EDM,
    BoundaryEDM,
    Coefficients,
    LogRatio,
    Parameterization,
    PathTime,
    Piecewise,
    Velocity,
)
from cmtool.flow.path import VE, Linear, Path, Trig

__all__ = [
    "EDM",
    "VE",
    "BoundaryEDM",
    "Coefficients",
    "FlowMap",
    "Linear",
    "LogRatio",
    "ModelCard",
    "Parameterization",
    "Path",
    "PathTime",
    "Piecewise",
    "Trig",
    "Velocity",
    "guided",
    "on_path",
]
