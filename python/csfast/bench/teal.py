"""The rule of TEAL as Triton kernels: what a feed-forward layer costs that skips input channels.

For comparison only (Liu et al., "Training-Free Activation Sparsity in Large Language Models",
2024). The gate and the up projection leave out channels of the activation of small magnitude, the
down projection leaves out small activations of neurons. The threshold is applied where the weights
are loaded; parts of a sum are added by float32 atomics to a buffer that begins as zeros.

Importing this module wants Triton, so nothing but `bench` does, and only on a GPU.
"""

from __future__ import annotations

import dataclasses

import torch
import triton  # type: ignore[import-not-found, import-untyped, unused-ignore]
import triton.language as tl  # type: ignore[import-not-found, import-untyped, unused-ignore]
from torch import Tensor


@dataclasses.dataclass(frozen=True)
class Config:
    """How a product is cut into programs."""

    block_k: int  # input channels of a program: rows of the transposed weight
    block_n: int  # outputs of a program
    warps: int


# What a kernel that cannot be built or run here raises.
FAILURES: tuple[type[BaseException], ...] = (RuntimeError, OSError, triton.TritonError)
CONFIGS = (
    Config(16, 512, 4),
    Config(16, 1024, 4),
    Config(32, 256, 4),
    Config(32, 512, 4),
    Config(64, 256, 4),
    Config(64, 512, 8),
)


def gate_up(x: Tensor, weights: Tensor, threshold: float, out: Tensor, config: Config) -> None:
    """Add the products of the kept channels of `x` with both projections to `out`.

    Args:
        x: Activation, ``(1, d)``, T.
        weights: The transposed gate and up projection, ``(2, d, n_neurons)``, T.
        threshold: Channels of a magnitude beyond it are kept.
        out: ``(2, n_neurons)``, float32, zeros.
        config: How to cut it.
    """
    _, d, n_neurons = weights.shape
    grid = (triton.cdiv(n_neurons, config.block_n), triton.cdiv(d, config.block_k), 2)
    _gate_up_kernel[grid](
        x,
        weights,
        out,
        threshold,
        d,
        n_neurons,
        BLOCK_K=config.block_k,
        BLOCK_N=config.block_n,
        num_warps=config.warps,
    )


def down(products: Tensor, down_t: Tensor, threshold: float, out: Tensor, config: Config) -> None:
    """Activate, then add the products of the kept neurons with the down projection to `out`.

    Args:
        products: What `gate_up` gives, ``(2, n_neurons)``, float32.
        down_t: The transposed down projection, ``(n_neurons, d)``, T.
        threshold: Neurons whose activation has a magnitude beyond it are kept.
        out: ``(1, d)``, float32, zeros.
        config: How to cut it.
    """
    n_neurons, d = down_t.shape
    grid = (triton.cdiv(d, config.block_n), triton.cdiv(n_neurons, config.block_k))
    _down_kernel[grid](
        products,
        down_t,
        out,
        threshold,
        d,
        n_neurons,
        BLOCK_K=config.block_k,
        BLOCK_N=config.block_n,
        num_warps=config.warps,
    )


def ffn(
    x: Tensor,
    weights: Tensor,
    down_t: Tensor,
    thresholds: tuple[float, float],
    configs: tuple[Config, Config],
) -> Tensor:
    """Run the layer: one fill with zeros and two kernels. Arguments are those of the two above.

    Returns:
        Output, ``(1, d)``, float32.
    """
    n_neurons, d = down_t.shape
    sums = torch.zeros(2 * n_neurons + d, dtype=torch.float32, device=x.device)
    products = sums[: 2 * n_neurons].view(2, n_neurons)
    out = sums[2 * n_neurons :].view(1, d)
    gate_up(x, weights, thresholds[0], products, configs[0])
    down(products, down_t, thresholds[1], out, configs[1])
    return out


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _gate_up_kernel(  # type: ignore[no-untyped-def]
    x,  # (d), T
    weights,  # (2, d, n_neurons), T
    out,  # (2, n_neurons), float32
    threshold,
    d,
    n_neurons,
    BLOCK_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    matrix = tl.program_id(2)
    k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    value = tl.load(x + k, mask=k < d, other=0.0, eviction_policy="evict_last").to(tl.float32)
    kept = (k < d) & (tl.abs(value) > threshold)
    # One matrix has fewer than 2^31 entries, two may have more.
    rows = weights + matrix.to(tl.int64) * d * n_neurons
    tile = tl.load(
        rows + k[:, None] * n_neurons + n[None, :],
        mask=kept[:, None] & (n < n_neurons)[None, :],
        other=0.0,
        eviction_policy="evict_first",
    )
    part = tl.sum(tile.to(tl.float32) * value[:, None], axis=0)
    tl.atomic_add(out + matrix * n_neurons + n, part, mask=n < n_neurons, sem="relaxed")


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _down_kernel(  # type: ignore[no-untyped-def]
    products,  # (2, n_neurons), float32
    down_t,  # (n_neurons, d), T
    out,  # (d), float32
    threshold,
    d,
    n_neurons,
    BLOCK_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    gate = tl.load(products + k, mask=k < n_neurons, other=0.0, eviction_policy="evict_last")
    up = tl.load(
        products + n_neurons + k, mask=k < n_neurons, other=0.0, eviction_policy="evict_last"
    )
    value = gate * tl.sigmoid(gate) * up
    kept = (k < n_neurons) & (tl.abs(value) > threshold)
    tile = tl.load(
        down_t + k[:, None] * d + n[None, :],
        mask=kept[:, None] & (n < d)[None, :],
        other=0.0,
        eviction_policy="evict_first",
    )
    part = tl.sum(tile.to(tl.float32) * value[:, None], axis=0)
    tl.atomic_add(out + n, part, mask=n < d, sem="relaxed")
