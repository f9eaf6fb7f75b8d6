"""Models of Hugging Face transformers: found by structure, loaded, fingerprinted, fed with text.

The one room that imports transformers, and only where it is called: importing it takes seconds.
"""

from .fingerprint import Fingerprint, fingerprint
from .load import demo_folder, load
from .structure import (
    ACTIVATIONS,
    APART,
    DTYPES,
    FUSED,
    PATCH,
    Ffn,
    Projection,
    find_ffns,
    is_patched,
)
from .text import (
    N_DENSE,
    Encoded,
    cache_argument,
    context_length,
    encode,
    hidden_states,
    stream_text,
)

__all__ = [
    "ACTIVATIONS",
    "APART",
    "DTYPES",
    "FUSED",
    "N_DENSE",
    "PATCH",
    "Encoded",
    "Ffn",
    "Fingerprint",
    "Projection",
    "cache_argument",
    "context_length",
    "demo_folder",
    "encode",
    "find_ffns",
    "fingerprint",
    "hidden_states",
    "is_patched",
    "load",
    "stream_text",
]
