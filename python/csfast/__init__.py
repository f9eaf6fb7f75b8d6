"""Dynamic sparse inference of language models by compressive sensing.

`calibrate` makes a `Plan` for a model, `apply` runs the model by it, `remove` undoes that.
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
from .calibration import calibrate
from .documents import read as read_documents
from .models import stream_text
from .ops import BackendError
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
from .types import Document, PlanError, UnsupportedModelError

__all__ = [
    "Applied",
    "BackendError",
    "Document",
    "Plan",
    "PlanError",
    "ResourceLimitError",
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
    "stats",
    "stream_text",
    "unfinished_votes",
]
