"""Calibration: from a model and sample texts to a plan."""

from .passes import DENSITIES, TOKENS_MAX, Progress, Watch, calibrate
from .resume import FORMAT
from .samples import Sample

__all__ = [
    "DENSITIES",
    "FORMAT",
    "TOKENS_MAX",
    "Progress",
    "Sample",
    "Watch",
    "calibrate",
]
