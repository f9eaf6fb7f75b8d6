"""What the tests of the operations run on: every device, every dtype."""

import pytest
import torch

from csfast import ops, planes


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    if request.param == "cuda" and not ops.cuda_available():
        pytest.skip("needs a CUDA device and a build with CUDA")
    return request.param


@pytest.fixture(params=[torch.float32, torch.float16, torch.bfloat16], ids=str)
def dtype(request):
    return request.param


@pytest.fixture(params=planes.CODES, ids=lambda bits: f"{bits}bit" if bits in planes.BITS else bits)
def bits(request):
    return request.param
