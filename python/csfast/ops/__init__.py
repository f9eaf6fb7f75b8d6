"""The operations on tensors: the CPU and CUDA kernels behind one function each."""

from .. import _native as native  # for what is no operation: `session`, `designs`, `bench.reader`
from .._native import BackendError as BackendError
from .._native import cuda_available as cuda_available
from .._native import isa as isa
from ..layer import Pursuit as Pursuit
from ..layer import PursuitStatus as PursuitStatus
from ..layer import Support as Support
from ..layer import TileList as TileList
from .calls import backend_info as backend_info
from .calls import execute as execute
from .calls import ffn as ffn
from .calls import nested as nested
from .calls import omp as omp
from .calls import project as project
from .calls import recover as recover
from .calls import select as select
from .calls import sense as sense
from .calls import tile as tile
from .register import stream as stream

__all__ = ["native"]
