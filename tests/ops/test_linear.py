"""Linear: a model's own matrices on few rows, the same bits in any company."""

from __future__ import annotations

import hashlib
import os
import pathlib
import subprocess
import sys

import pytest
import torch

from axes import inside
from csfast import ops, reference
from csfast.bench.cases import LINEARS, ProjectCase
from numeric import UNIT, assert_within, dot_tolerance

WIDE = (torch.float32, torch.bfloat16)


def problem(case, dtype, device="cpu"):
    """Weights, inputs and a bias, at random."""
    w, x = case.make(torch.float32, device)
    return w.to(dtype), x, w[:, 0].to(dtype).contiguous()


@inside(case=LINEARS, dtype=WIDE)
def test_is_the_product_for_every_row_alone(case, dtype, device):
    """The reference, small integers, one channel at a time, any company, what is not finite."""
    w, x, bias = problem(case, dtype, device)
    y = ops.linear(w, x, bias=bias)
    assert y.dtype == torch.float32
    want = reference.linear(w, x, bias=bias)
    tolerance = dot_tolerance(x.to(dtype), w)
    assert_within(y, want, tolerance + UNIT * (want.abs() + tolerance))  # the bias rounds once
    for first, last in {(0, n) for n in range(len(x) + 1)} | {(len(x) // 2, len(x))}:
        assert torch.equal(ops.linear(w, x[first:last].contiguous(), bias=bias), y[first:last])

    w, x = case.make_exact(dtype, device)
    assert torch.equal(ops.linear(w, x.float()).double(), reference.linear(w, x.float()))
    some = torch.arange(0, case.d, max(1, case.d // 40), device=device)
    one = torch.nn.functional.one_hot(some, case.d).float()
    assert torch.equal(ops.linear(w, one), w.T[some].float())

    x = x.float()
    want = ops.linear(w, x)
    x[1:2, case.d // 2] = torch.nan
    x[2:3, case.d - 1] = torch.inf
    y = ops.linear(w, x)
    assert torch.equal(y[:1], want[:1]) and torch.equal(y[3:], want[3:])
    assert not y[1:3].isfinite().any()


def test_gives_the_same_bits_everywhere():
    """With bfloat16 on every instruction set, with float32 on those that fuse; typed refusals."""
    script = (
        "import sys; sys.path[:0] = sys.argv[1:3]; from test_linear import digest;"
        "print(*digest(int(sys.argv[3])))"
    )
    folder = pathlib.Path(__file__).parent
    here = digest(2)
    assert here == digest(1)
    better = [isa for isa in ("avx2",) if ops.isa() in ("avx2", "avx512")]
    for isa in ("base", *better):
        run = subprocess.run(
            [sys.executable, "-c", script, str(folder), str(folder.parent), "2"],
            env={**os.environ, "CSFAST_ISA": isa, "OMP_NUM_THREADS": "2"},
            capture_output=True,
            text=True,
            check=True,
        )
        f32, bf16 = run.stdout.split()
        assert bf16 == here[1], isa
        assert isa == "base" or f32 == here[0], isa
    w, x, _ = problem(LINEARS[1], torch.float16)
    with pytest.raises(TypeError, match=r"\[linear\] w is float16: want float32 or bfloat16"):
        ops.linear(w, x)
    w, x, bias = problem(LINEARS[1], torch.bfloat16)
    with pytest.raises(TypeError, match=r"\[linear\] bias is float32: want bfloat16"):
        ops.linear(w, x, bias=bias.float())


def digest(threads):
    """What stands for the results of all cases, by dtype."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found = []
        for dtype in WIDE:
            ys = []
            for case in (*LINEARS, ProjectCase("two_threads", batch=3, d=640, m=200)):
                w, x, bias = problem(case, dtype)
                ys.append(ops.linear(w, x, bias=bias))
            found.append(hashlib.sha256(b"".join(bytes(y.numpy().view("u1")) for y in ys)))
        return [hash_.hexdigest() for hash_ in found]
    finally:
        torch.set_num_threads(before)
