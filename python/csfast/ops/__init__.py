"""The operations on tensors: the CPU and CUDA kernels behind one function each."""

from .._native import BackendError, cuda_available, isa
from ..layer import Support, TileList
from .calls import (
    Pursuit,
    PursuitStatus,
    backend_info,
    choose,
    execute,
    ffn,
    nested,
    omp,
    omp_plan,
    project,
    recover,
    select,
    sense,
    tile,
)
from .session import Session, ffn_workspace

__all__ = [
    "BackendError",
    "Pursuit",
    "PursuitStatus",
    "Session",
    "Support",
    "TileList",
    "backend_info",
    "choose",
    "cuda_available",
    "execute",
    "ffn",
    "ffn_workspace",
    "isa",
    "nested",
    "omp",
    "omp_plan",
    "project",
    "recover",
    "select",
    "sense",
    "tile",
]
