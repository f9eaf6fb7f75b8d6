"""Sketch: products with coded matrices, exact in integers, the same everywhere."""

from __future__ import annotations

import hashlib
import os
import pathlib
import subprocess
import sys

import pytest
import torch

from csfast import ops, reference
from csfast.codes import rotation, trellis

# Rows and columns off every tile, blocks of 1 to 128; levels of bits.
CASES = (
    (1, 1, (1,)),
    (70, 6, (2,)),
    (200, 48, (3,)),
    (130, 576, (4,)),
    (300, 256, (3, 3)),
    (64, 136, (2, 4, 1)),
    (66, 96, (1,)),
)


def _problem(rows, cols, bits, batch, seed=0, dtype=torch.float32):
    draws = torch.Generator().manual_seed(seed)
    column = torch.rand(cols, generator=draws)
    turn = rotation.fit(torch.rand(cols, generator=draws), column=column, seed=seed)
    codes, step = [], []
    for n in bits:
        tiles = (-(-rows // trellis.TILE_ROWS), -(-cols // trellis.TILE_COLS))
        codes.append(torch.randint(0, 256, (*tiles, n, 64), generator=draws, dtype=torch.uint8))
        step.append((torch.rand(rows, generator=draws) + 0.5).bfloat16())
    x = torch.randn(batch, cols, generator=draws).to(dtype)
    return codes, step, turn.words(), x


def test_matches_the_specification():
    for rows, cols, bits in CASES:
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            given = _problem(rows, cols, bits, 3, dtype=dtype)
            y, wanted = ops.sketch(*given), reference.sketch(*given)
            # Each level is rounded twice, their sum once a level and the scale three times.
            size = reference.sketch(given[0], [s.abs() for s in given[1]], *given[2:]).abs()
            most = size.amax() * (3 * len(bits) + 3) * 2.0**-24
            assert float((y - wanted).abs().max()) <= float(most), (rows, cols, bits, dtype)


def test_is_the_product_with_what_was_coded():
    draws = torch.Generator().manual_seed(3)
    w = torch.randn(2048, 64, generator=draws)
    turn = rotation.fit(torch.ones(64))
    rotated = turn.weight(w).contiguous()
    step = (rotated.square().mean(1).sqrt() * trellis.UNIT[4]).bfloat16()
    codes, _ = ops.encode(rotated, torch.eye(64), step.float(), bits=4)
    x = torch.randn(5, 64, generator=draws)
    y = ops.sketch([codes], [step], turn.words(), x)
    wanted = x @ w.T
    # .0070 of the variance by the code, and (4 sigma / 127)^2 / 12 by int8.
    assert float((y - wanted).square().mean() / wanted.square().mean()) < 0.0080


def test_a_row_does_not_depend_on_the_others():
    for rows, cols, bits in CASES[2:]:
        codes, step, turn, x = _problem(rows, cols, bits, 16)
        whole = ops.sketch(codes, step, turn, x)
        for n in (1, 2, 3, 5, 16):
            assert torch.equal(ops.sketch(codes, step, turn, x[:n].contiguous()), whole[:n])
        assert torch.equal(ops.sketch(codes, step, turn, x[7:8].contiguous()), whole[7:8])


def test_gives_the_same_bits_everywhere():
    script = (
        "import sys; sys.path.insert(0, sys.argv[1]); import hashlib, torch;"
        "from csfast import ops; from test_sketch import CASES, _problem;"
        "torch.set_num_threads(int(sys.argv[2]));"
        "ys = [ops.sketch(*_problem(*case, 3)) for case in CASES];"
        "print(hashlib.sha256(b''.join(bytes(y.numpy().view('u1')) for y in ys)).hexdigest())"
    )
    ys = [ops.sketch(*_problem(*case, 3)) for case in CASES]
    here = hashlib.sha256(b"".join(bytes(y.numpy().view("u1")) for y in ys)).hexdigest()
    others = ["base"] + [isa for isa in ("avx2",) if ops.isa() in ("avx2", "avx512")]
    for isa, threads in zip([*others, ops.isa()], ("1", "2", "2"), strict=False):
        run = subprocess.run(
            [sys.executable, "-c", script, str(pathlib.Path(__file__).parent), threads],
            env={**os.environ, "CSFAST_ISA": isa, "OMP_NUM_THREADS": threads},
            capture_output=True,
            text=True,
            check=True,
        )
        assert run.stdout.strip() == here, isa


def test_says_nothing_of_what_is_not_finite():
    codes, step, turn, x = _problem(70, 48, (3,), 4)
    wanted = ops.sketch(codes, step, turn, x)
    x[0] = 0
    x[1, 7] = torch.nan
    x[2, 3] = torch.inf
    y = ops.sketch(codes, step, turn, x)
    assert not y[0].any()
    assert bool(y[1:3].isnan().all())
    assert torch.equal(y[3], wanted[3])
    assert ops.sketch(codes, step, turn, x[:0]).shape == (0, 70)


def test_refuses_what_does_not_fit():
    codes, step, turn, x = _problem(70, 48, (3,), 2)
    with pytest.raises(ValueError, match=r"\[sketch\] 0 levels: want 1 to 4"):
        ops.sketch([], [], turn, x)
    with pytest.raises(ValueError, match=r"\[sketch\] .*codes\[0\] has shape"):
        ops.sketch([codes[0][:, :5].contiguous()], step, turn, x)
    with pytest.raises(ValueError, match=r"\[sketch\] .*want as many of each"):
        ops.sketch(codes * 2, step, turn, x)


@pytest.mark.gpu
@pytest.mark.skipif(not ops.cuda_available(), reason="needs a CUDA device")
def test_gives_the_same_bits_on_a_gpu():
    for rows, cols, bits in CASES:
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            codes, step, turn, x = _problem(rows, cols, bits, 5, dtype=dtype)
            wanted = ops.sketch(codes, step, turn, x)
            there = [[t.cuda() for t in many] for many in (codes, step)]
            y = ops.sketch(*there, turn.cuda(), x.cuda())
            assert torch.equal(y.cpu(), wanted)
