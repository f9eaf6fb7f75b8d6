"""Encode: trellis codes with error feedback, against the specification and by what they lose."""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys

import pytest
import torch

from csfast import ops, reference
from csfast.codes import feedback, trellis

SIZES = ((1, 1), (40, 6), (130, 70), (300, 9))


def _problem(rows, cols, seed=0, device="cpu"):
    draws = torch.Generator().manual_seed(seed)
    w = torch.randn(rows, cols, generator=draws)
    w *= torch.rand(rows, 1, generator=draws) + 0.5
    inputs = torch.randn(4 * cols + 8, cols, generator=draws) @ torch.randn(
        cols, cols, generator=draws
    )
    factor = feedback.spread(inputs.T @ inputs).contiguous()
    return w.to(device), factor.to(device), inputs


def _step(w, bits):
    return w.square().mean(1).sqrt() * trellis.UNIT[bits]


def _error(w, step, value, inputs):
    return float(((w - step[:, None] * value) @ inputs.T).square().sum())


def test_is_as_good_as_the_specification():
    for (rows, cols), bits in zip(SIZES, trellis.BITS, strict=True):
        w, factor, inputs = _problem(rows, cols)
        step = _step(w, bits)
        codes, value = ops.encode(w, factor, step, bits=bits)
        assert torch.equal(trellis.values(codes, rows, cols), value)
        index, u = reference.encode(w, factor, step, bits=bits)
        wanted = trellis.table(bits)[index.int()]
        # Float32 may take another of two paths that tie but for its rounding; after one such column
        # those that follow code other targets, as well as before.
        assert (value == wanted)[:, :1].all()
        assert _error(w, step, value, inputs) <= 1.1 * _error(w, step, wanted, inputs)
        if bool((value == wanted).all()):
            assert torch.equal(codes, trellis.pack(index, u, bits))


def test_is_exact_on_small_integers():
    # Errors that are multiples of 1/2 and a factor of powers of two: nothing is rounded.
    draws = torch.Generator().manual_seed(5)
    for bits in trellis.BITS:
        w = torch.randint(-126, 127, (144, 3), generator=draws) / 2
        factor = torch.eye(3) + 0.5 * torch.ones(3, 3).triu(1)
        step = torch.ones(144)
        codes, value = ops.encode(w, factor, step, bits=bits)
        index, u = reference.encode(w, factor, step, bits=bits)
        assert torch.equal(value, trellis.table(bits)[index.int()])
        assert torch.equal(codes, trellis.pack(index, u, bits))


def test_feedback_and_memory_pay():
    w, factor, inputs = _problem(256, 64, seed=2)
    step = _step(w, 3)
    _, value = ops.encode(w, factor, step, bits=3)
    _, alone = ops.encode(w, torch.eye(64), step, bits=3)
    _, short = ops.encode(w, factor, step, bits=3, nu=3)
    error = _error(w, step, value, inputs)
    assert error < 0.9 * _error(w, step, alone, inputs)
    assert error < _error(w, step, short, inputs)


def test_rows_of_nothing_stay_nothing():
    w, factor, _ = _problem(40, 12)
    w[3] = 0
    w[5] = 2.5
    step = _step(w, 2)
    codes, value = ops.encode(w, factor, step, bits=2)
    decoded = step[:, None] * value
    assert not decoded[3].any() and bool(torch.isfinite(decoded).all())
    assert float((decoded[5] - 2.5).abs().max()) < 2.5
    assert codes.shape == (1, 2, 2, 64)


def test_does_not_depend_on_threads_or_instruction_set():
    script = (
        "import sys, torch; sys.path.insert(0, sys.argv[1]); import hashlib;"
        "from csfast import ops; from test_encode import _problem, _step;"
        "w, f, _ = _problem(200, 130, seed=4); c, _ = ops.encode(w, f, _step(w, 3), bits=3);"
        "print(hashlib.sha256(bytes(c.numpy())).hexdigest())"
    )
    here = str(pathlib.Path(__file__).parent)
    found = set()
    for isa, threads in (("base", "1"), (ops.isa(), "1"), (ops.isa(), "2"), ("", "2")):
        env = {**os.environ, "OMP_NUM_THREADS": threads}
        env.pop("CSFAST_ISA", None)
        if isa:
            env["CSFAST_ISA"] = isa
        run = subprocess.run(
            [sys.executable, "-c", script, here],
            env=env,
            capture_output=True,
            text=True,
            check=True,
        )
        found.add(run.stdout)
    assert len(found) == 1


def test_refuses_what_it_cannot_code():
    w, factor, _ = _problem(20, 8)
    step = _step(w, 3)
    with pytest.raises(ValueError, match=r"\[encode\] w: not finite"):
        ops.encode(w.where(w < 1, torch.nan), factor, step, bits=3)
    with pytest.raises(ValueError, match=r"\[encode\] step = -1.0: want none negative"):
        ops.encode(w, factor, step.where(step < 0, -1.0), bits=3)
    with pytest.raises(ValueError, match=r"\[encode\] bits = 5: want 1 to 4"):
        ops.encode(w, factor, step, bits=5, table=trellis.table(4))
    with pytest.raises(
        ValueError, match=r"\[encode\] table has shape \(8,\): want \(16,\) for 3 bits"
    ):
        ops.encode(w, factor, step, bits=3, table=trellis.table(2))
    with pytest.raises(ValueError, match=r"\[encode\] nu = 9: want 3 to 8"):
        ops.encode(w, factor, step, bits=3, nu=9)


@pytest.mark.gpu
@pytest.mark.skipif(not ops.cuda_available(), reason="needs a CUDA device")
def test_gives_the_same_codes_on_a_gpu():
    for (rows, cols), bits in zip(SIZES, trellis.BITS, strict=True):
        w, factor, inputs = _problem(rows, cols)
        step = _step(w, bits)
        _, wanted = ops.encode(w, factor, step, bits=bits)
        codes, value = ops.encode(w.cuda(), factor.cuda(), step.cuda(), bits=bits)
        assert torch.equal(trellis.values(codes.cpu(), rows, cols), value.cpu())
        assert (value.cpu() == wanted)[:, :1].all()
        assert _error(w, step, value.cpu(), inputs) <= 1.1 * _error(w, step, wanted, inputs)
