"""How data is noised, how a network becomes an estimate, and the one model class built on both."""

from cmtool.flow.flow_map import FlowMap, ModelCard, guided, on_path
from cmtool.flow.parameterization import (
    EDM,
    BoundaryEDM,
    Coefficients,
    CosineStep,
    Epsilon,
    LogRatio,
    Parameterization,
    PathTime,
    Piecewise,
    Sample,
    Velocity,
    VPrediction,
    VPTime,
)
from cmtool.flow.path import VE, VP, Linear, Path, Trig

__all__ = [
    "EDM",
    "VE",
    "VP",
    "BoundaryEDM",
    "Coefficients",
    "CosineStep",
    "Epsilon",
    "FlowMap",
    "Linear",
    "LogRatio",
    "ModelCard",
    "Parameterization",
    "Path",
    "PathTime",
    "Piecewise",
    "Sample",
    "Trig",
    "VPTime",
    "VPrediction",
    "Velocity",
    "guided",
    "on_path",
]
