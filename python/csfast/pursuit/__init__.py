"""Few unknowns from few linear measurements."""

from .recovery import Measured, Rules, dense, innovation, measure, mmse, support_energy

__all__ = ["Measured", "Rules", "dense", "innovation", "measure", "mmse", "support_energy"]
