"""What tests share: every device and dtype of the operations, a tiny model with its plan."""

import pytest
import torch

import tiny
from csfast import calibrate, documents, ops
from csfast.codes import planes
from texts import make_documents


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


@pytest.fixture(scope="module")
def tokenizer():
    return tiny.make_tokenizer()


@pytest.fixture(scope="module")
def model():
    # Weights large enough that the feed-forward layers matter to the logits.
    return tiny.make_model(initializer_range=0.1)


@pytest.fixture(scope="module")
def plan(model, tokenizer):
    return calibrate(model, documents.split(make_documents(12), "select"), tokenizer)


@pytest.fixture(scope="module")
def held_out():
    return documents.split(make_documents(12), "report")
