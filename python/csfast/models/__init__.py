"""Models of Hugging Face transformers: found by structure, loaded, fingerprinted, fed with text.

The one room that imports transformers, and only where it is called: importing it takes seconds.
"""

from .chat import Message, has_template, render
from .decoder import DECODED, Decoder, DecoderLayer, Map, find_decoder, rotations
from .fingerprint import Fingerprint, fingerprint
from .linears import FAMILIES, KINDS, Kind, Stacked, family_of, find_linears, hash_of
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
    NothingLeftError,
    cache_argument,
    cached_tokens,
    check_ids,
    context_length,
    encode,
    end_tokens,
    hidden_states,
    pieces,
    prompt_ids,
    stream_text,
    token_ids,
    vocabulary,
)

__all__ = [
    "ACTIVATIONS",
    "APART",
    "DECODED",
    "DTYPES",
    "FAMILIES",
    "FUSED",
    "KINDS",
    "N_DENSE",
    "PATCH",
    "Decoder",
    "DecoderLayer",
    "Encoded",
    "Ffn",
    "Fingerprint",
    "Kind",
    "Map",
    "Message",
    "NothingLeftError",
    "Projection",
    "Stacked",
    "cache_argument",
    "cached_tokens",
    "check_ids",
    "context_length",
    "demo_folder",
    "encode",
    "end_tokens",
    "family_of",
    "find_decoder",
    "find_ffns",
    "find_linears",
    "fingerprint",
    "has_template",
    "hash_of",
    "hidden_states",
    "is_patched",
    "load",
    "pieces",
    "prompt_ids",
    "render",
    "rotations",
    "stream_text",
    "token_ids",
    "vocabulary",
]
