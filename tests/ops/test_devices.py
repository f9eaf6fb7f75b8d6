"""Kernels run where their tensors are, whichever CUDA device is the current one."""

import pytest
import torch

import csfast
import tiny
from csfast import ops
from csfast.bench.cases import CASES
from csfast.session import Session
from numeric import layer_of, made, middle_threshold

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not (ops.cuda_available() and torch.cuda.device_count() > 1),
        reason="needs two CUDA devices and a build with CUDA",
    ),
]


@pytest.mark.parametrize("current", [0, 1])
def test_operations_run_on_the_device_of_their_tensors(current):
    wanted = made(CASES[5], torch.float32, "cpu")
    threshold = middle_threshold(wanted)
    p = made(CASES[5], torch.float32, "cuda:1")
    with torch.cuda.device(current):
        y, _ = ops.sense(p.codes, p.equal, p.x, bits=p.bits)
        layer = layer_of(p, threshold.to("cuda:1"))
        tiles, _ = ops.select(layer.sensor, layer.decision, p.x)
        out = ops.ffn(layer, p.x)
        assert torch.cuda.current_device() == current
    torch.cuda.synchronize(1)
    on_cpu = layer_of(wanted, threshold)
    want_y, _ = ops.sense(wanted.codes, wanted.equal, wanted.x, bits=wanted.bits)
    want_tiles, _ = ops.select(on_cpu.sensor, on_cpu.decision, wanted.x)
    for found, cpu in ((y, want_y), (tiles.n_tiles, want_tiles.n_tiles)):
        assert found.device == torch.device("cuda:1") and torch.equal(found.cpu(), cpu)
    with torch.cuda.device(1):
        assert torch.equal(ops.ffn(layer, p.x), out)


def test_a_model_of_another_device_decodes_there():
    model = tiny.make_model(dtype=torch.bfloat16).to("cuda:1")
    plan = csfast.calibrate(model, tiny.make_ids(30, 80))
    csfast.apply(model, plan, density=0.5)
    step = torch.tensor([[3]], device="cuda:1")
    with torch.no_grad():
        with torch.cuda.device(0):
            found = model(step).logits
        with torch.cuda.device(1):
            assert torch.equal(model(step).logits, found)
    assert csfast.stats(model).fallbacks == (0, 0) and csfast.stats(model).tokens == (2, 2)


def test_a_session_is_of_one_device():
    session = Session(torch.device("cuda"))
    for place in ("cuda:1", "cuda:0"):
        p = made(CASES[5], torch.float32, place)
        layer = layer_of(p, middle_threshold(p))
        if place == "cuda:1":
            session.bind(layer, max_batch=len(p.x))
            continue
        with pytest.raises(ValueError, match=r"gate is on cuda:0: want cuda:1"):
            session.bind(layer, max_batch=len(p.x))
        with pytest.raises(ValueError, match=r"x on cuda:0, out on cuda:0: want cuda:1"):
            session.ffn(0, p.x, torch.empty_like(p.x))
