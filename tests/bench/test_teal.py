"""The kernels of the rule of TEAL: that what csfast is compared with computes that rule."""

import importlib.util

import pytest
import torch
from torch.nn import functional

from axes import DTYPES, inside
from csfast import ops
from csfast.bench import layers
from numeric import EPS_F32, assert_within, dot_tolerance, execute_tolerance

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not ops.cuda_available() or importlib.util.find_spec("triton") is None,
        reason="needs a CUDA device, a build with CUDA, and triton",
    ),
]
# Off every block, smaller than one, and a layer of the demo's size.
SIZES = [(200, 77), (33, 5), (384, 1152), (1000, 2600)]


@pytest.fixture
def kernels():
    from csfast.bench import teal

    return teal


def layer(d, n_neurons, dtype):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(1, d, generator=g)
    weights = torch.randn(2, d, n_neurons, generator=g) / d**0.5
    down_t = torch.randn(n_neurons, d, generator=g) / n_neurons**0.5
    return [t.to("cuda", dtype) for t in (x, weights, down_t)]


def configs_of(kernels, d, dtype):
    """All that may be timed, at the type that is; elsewhere a small one: each has to be compiled.

    A layer of 384 channels has fewer outputs than their largest block.
    """
    small = kernels.Config(16, 32, 1)
    return [*kernels.CONFIGS, small] if (d, dtype) == (384, torch.bfloat16) else [small]


@inside(density=[0.1, 0.5, 1.0], dtype=DTYPES)
@pytest.mark.parametrize(("d", "n_neurons"), SIZES)
def test_gate_and_up_leave_out_channels(kernels, d, n_neurons, density, dtype):
    x, weights, _ = layer(d, n_neurons, dtype)
    threshold = layers.threshold_of(x, density)
    kept = torch.where(x.double().abs() > threshold, x.double(), 0.0)
    assert (kept != 0).sum() <= max(1, round(density * d))
    want = torch.cat([kept @ w for w in weights.double()])
    tolerance = torch.cat([dot_tolerance(kept, w.T) for w in weights])
    for config in configs_of(kernels, d, dtype):
        out = torch.zeros(2, n_neurons, device="cuda")
        kernels.gate_up(x, weights, threshold, out, config)
        assert_within(out, want, tolerance)


@inside(density=[0.1, 0.5, 1.0], dtype=DTYPES)
@pytest.mark.parametrize(("d", "n_neurons"), SIZES)
def test_down_leaves_out_neurons(kernels, d, n_neurons, density, dtype):
    _, _, down_t = layer(d, n_neurons, dtype)
    products = torch.randn(2, n_neurons, generator=torch.Generator().manual_seed(1)).cuda()
    gate, up = products.double()
    a = (functional.silu(gate) * up)[None]
    threshold = layers.threshold_of(a, density)
    # Relative error of a in float32: exp(-z) by ex2.approx is right to 2 ulp, its argument rounds
    # twice, which |z| magnifies; a sum, a quotient right to 2 ulp and two products follow.
    error = a.abs() * (2 * gate.abs() + 10) * EPS_F32
    assert density == 1.0 or ((a.abs() - threshold).abs() > error).all()  # so no decision differs
    kept = torch.where(a.abs() > threshold, a, 0.0)
    assert (kept != 0).sum() == max(1, round(density * n_neurons))
    want = kept @ down_t.double()
    # Unlike a weight of 16 bits, a float32 factor makes products round, too.
    tolerance = (1 + EPS_F32) * dot_tolerance(kept, down_t.T)
    tolerance += (torch.where(kept != 0, error, 0.0) + EPS_F32 * kept.abs()) @ down_t.double().abs()
    for config in configs_of(kernels, d, dtype):
        out = torch.zeros(1, d, device="cuda")
        kernels.down(products, down_t, threshold, out, config)
        assert_within(out, want, tolerance)


def dense(x, weights, down_t):
    """The dense layer in float64, and how far off the kernels may be with nothing left out."""
    gate, up = (w.T.contiguous() for w in weights)
    z = x.double() @ gate.double().T
    a = functional.silu(z) * (x.double() @ up.double().T)
    tolerance = execute_tolerance(gate, up, down_t, x, torch.ones_like(a, dtype=torch.bool))
    # The exponential of Triton is ex2.approx: as in the test above, beside what is counted there.
    more = (a.abs() * (2 * z.abs() + 10) * EPS_F32) @ down_t.double().abs()
    return a @ down_t.double(), tolerance + more


@pytest.mark.parametrize(("d", "n_neurons"), SIZES)
def test_with_nothing_left_out_it_is_the_dense_layer(kernels, d, n_neurons):
    x, weights, down_t = layer(d, n_neurons, torch.float32)
    poison = torch.full((4 * n_neurons + 4 * d,), float("nan"), device="cuda")
    del poison  # what the next allocation may find
    for config in configs_of(kernels, d, torch.float32):
        out = kernels.ffn(x, weights, down_t, (-1.0, -1.0), (config, config))
        assert_within(out, *dense(x, weights, down_t))


def test_it_can_be_replayed(kernels):
    x, weights, down_t = layer(384, 1152, torch.float32)
    configs = (kernels.Config(16, 32, 1), kernels.Config(16, 32, 1))
    kernels.ffn(x, weights, down_t, (-1.0, -1.0), configs)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = kernels.ffn(x, weights, down_t, (-1.0, -1.0), configs)
    for _ in range(2):  # the second time it has to begin from zeros again
        out.fill_(float("nan"))
        graph.replay()
        assert_within(out, *dense(x, weights, down_t))
