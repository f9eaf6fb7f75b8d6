"""Calibration: from a model and sample texts to a plan, or to a sketch."""

from .passes import DENSITIES, TOKENS_MAX, Progress, Watch, calibrate
from .resume import FORMAT
from .samples import Sample
from .sketching import make as sketch

__all__ = [
    "DENSITIES",
    "FORMAT",
    "TOKENS_MAX",
    "Progress",
    "Sample",
    "Watch",
    "calibrate",
    "sketch",
]
