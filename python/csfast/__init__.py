"""Dynamic sparse inference of language models by compressive sensing.

`calibrate` makes a `Plan` for a model, `apply` runs the model by it, `remove` undoes that. `sketch`
makes few-bit codes of the whole model.
"""

from __future__ import annotations

import importlib.util

if importlib.util.find_spec(f"{__name__}._native") is None:
    raise ImportError(
        "[csfast] the native module is not there: want csfast installed (pip install .), "
        "not run from its source folder."
    )

from ._version import __version__
from .bypass import StaleWeightsError
from .calibration import calibrate, sketch
from .documents import read as read_documents
from .engine import Engine, Result
from .models import stream_text
from .ops import BackendError, NotFiniteError
from .patch import (
    Applied,
    ResourceLimitError,
    Stats,
    apply,
    dense,
    needed_bytes,
    remove,
    set_density,
    set_votes,
    stats,
    unfinished_votes,
)
from .plan import Plan
from .sketches import Sketch
from .types import Document, PlanError, SketchError, UnsupportedModelError

__all__ = [
    "Applied",
    "BackendError",
    "Document",
    "Engine",
    "NotFiniteError",
    "Plan",
    "PlanError",
    "ResourceLimitError",
    "Result",
    "Sketch",
    "SketchError",
    "StaleWeightsError",
    "Stats",
    "UnsupportedModelError",
    "__version__",
    "apply",
    "calibrate",
    "dense",
    "needed_bytes",
    "read_documents",
    "remove",
    "set_density",
    "set_votes",
    "sketch",
    "stats",
    "stream_text",
    "unfinished_votes",
]
