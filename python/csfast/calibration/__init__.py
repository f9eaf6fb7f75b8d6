"""Calibration: from a model and sample texts to a plan."""

from .passes import DENSITIES, FORMAT, PLAIN, TOKENS_MAX, Progress, Sample, T, Watch, calibrate

__all__ = [
    "DENSITIES",
    "FORMAT",
    "PLAIN",
    "TOKENS_MAX",
    "Progress",
    "Sample",
    "T",
    "Watch",
    "calibrate",
]
